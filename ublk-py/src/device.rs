// SPDX-License-Identifier: MIT OR Apache-2.0

//! `NativeDevice`: a device of this process as a Python object.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::{Features, Op, Recovery, SharedMemory, Target};

use crate::descriptor::with_descriptor;
use crate::error::to_python;
use crate::interpreter;
use crate::operations::op_name;
use crate::pull::{Pulled, PyPullQueue};
use crate::stats;
use crate::watch::Watch;

/// Interval at which a wait of the main thread checks for signals.
const SIGNAL_POLL: Duration = Duration::from_millis(50);
/// Longer than any device is served.
const FOREVER: Duration = Duration::from_secs(1 << 31);
/// Minimum time that requests have to end before they are revoked.
const GRACE: Duration = Duration::from_millis(500);
/// Time that the engine gets to commit revoked requests before it gives up the queues.
const COMMIT: Duration = Duration::from_secs(1);

/// A device of this process.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct NativeDevice {
    /// `None` only while this object is dropped.
    device: Option<Arc<ublk_core::Device>>,
    /// The target, until the device goes live or is stopped.
    target: Mutex<Option<Arc<dyn Target>>>,
    /// One queue for each hardware queue, if requests are pulled.
    pull_queues: Vec<Py<PyPullQueue>>,
    watch: Watch,
    /// Whether the device is on the kernel's driver.
    on_kernel: bool,
    /// Number of revoked requests.
    revoked: AtomicUsize,
    /// Whether to revoke requests at once.
    hurried: AtomicBool,
    /// Whether the device is being deleted, so that no other server can follow.
    deletes: AtomicBool,
    /// Whether the device is being left to another server: no stop deletes it then, even if that was interrupted.
    leaving: Arc<AtomicBool>,
}

impl NativeDevice {
    pub(crate) fn new(
        py: Python<'_>,
        device: ublk_core::Device,
        target: Option<Arc<dyn Target>>,
        queues: Pulled,
        watch: Watch,
        on_kernel: bool,
    ) -> PyResult<Self> {
        let Pulled { queues, extents } = queues;
        let wrap = |queue| Py::new(py, PyPullQueue::new(queue, watch.clone(), extents.clone()));
        let pull_queues = queues.into_iter().map(wrap).collect::<PyResult<_>>()?;
        Ok(NativeDevice {
            device: Some(Arc::new(device)),
            target: Mutex::new(target),
            pull_queues,
            watch,
            on_kernel,
            revoked: AtomicUsize::new(0),
            hurried: AtomicBool::new(false),
            deletes: AtomicBool::new(false),
            leaving: Arc::default(),
        })
    }

    fn device(&self) -> &Arc<ublk_core::Device> {
        self.device.as_ref().expect("a live object has its device")
    }

    /// Withdraws the statistics of a device that has ended in any way.
    fn withdraw_if_over(&self) {
        if self.on_kernel && self.device().is_stopped() {
            stats::withdraw(self.device().id());
        }
    }

    /// Fails the requests that have left the threads of their queues, unless another server may follow: a method that is
    /// still running would overwrite newer data of that server. It has to wait for such a method, or for the end of this
    /// process.
    fn revoke(&self, py: Python<'_>) {
        if self.device().recovery().is_some() && !self.deletes.load(Ordering::Relaxed) {
            return;
        }
        let not_taken: usize = self.pull_queues.iter().map(|queue| queue.get().revoke()).sum();
        let revoked = self.watch.holders().revoke(py) + not_taken;
        self.revoked.fetch_add(revoked, Ordering::Relaxed);
    }

    /// Ends the device in a way that may take long. Requests that have not ended after `patience` are revoked.
    fn end<F>(&self, py: Python<'_>, patience: Duration, end: F) -> PyResult<()>
    where
        F: FnOnce(&ublk_core::Device) -> ublk_core::Result<()> + Send + 'static,
    {
        interpreter::check_return()?;
        let begin = Instant::now();
        let ended = on_another_thread(py, self.device(), end, || {
            // Repeatedly: a worker may have just received another request.
            if begin.elapsed() >= patience || self.hurried.load(Ordering::Relaxed) {
                self.revoke(py);
            }
        })?;
        self.withdraw_if_over();
        ended.map_err(|e| to_python(py, &e))
    }

    fn take_target(&self) -> Option<Arc<dyn Target>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Returns whether an error is the reason why a device was not left, rather than why its queues do not end.
fn is_refusal(error: &ublk_core::Error) -> bool {
    use ublk_core::Error::{Control, Unsupported};
    error.is_refusal() && matches!(error, Unsupported { .. } | Control { command: "QUIESCE_DEV", .. })
}

/// Calls a function with a device, and checks for signals meanwhile. If a signal handler raises, the function continues in
/// the background, [expedited](ublk_core::Device::expedite). Calls `meanwhile` periodically.
fn on_another_thread<T: Send + 'static, F>(
    py: Python<'_>,
    device: &Arc<ublk_core::Device>,
    act: F,
    meanwhile: impl Fn(),
) -> PyResult<T>
where
    F: FnOnce(&ublk_core::Device) -> T + Send + 'static,
{
    let (sender, mut receiver) = channel();
    let job = Arc::new(Mutex::new(Some((act, device.clone(), sender))));
    let theirs = job.clone();
    let body = move || run_once(&theirs);
    if std::thread::Builder::new().name("ublk-stop".into()).spawn(body).is_err() {
        // If no thread can be created, the device is stopped here, without checks for signals.
        interpreter::detached(py, || run_once(&job));
    }
    drop(job);
    loop {
        let wait = move || {
            let received = receiver.recv_timeout(SIGNAL_POLL);
            (received, receiver)
        };
        let ((received, back), permit) = interpreter::detached(py, wait);
        receiver = back;
        match received {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(PyRuntimeError::new_err("the thread that stops the device has panicked"));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        meanwhile();
        py.check_signals().and_then(|()| interpreter::check_stay(&permit)).inspect_err(|_| device.expedite())?;
    }
}

type Job<F, T> = Mutex<Option<(F, Arc<ublk_core::Device>, Sender<T>)>>;

fn run_once<T, F: FnOnce(&ublk_core::Device) -> T>(job: &Job<F, T>) {
    let job = job.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some((act, device, sender)) = job {
        let result = act(&device);
        // This may be the last reference.
        drop(device);
        let _ = sender.send(result);
    }
}

/// Python may drop the object on any thread: attached, where waiting would keep handlers from finishing, or on the thread that
/// serves the device. So a device that is still running is stopped by another thread.
impl Drop for NativeDevice {
    fn drop(&mut self) {
        if let Some(device) = self.device.take()
            && !device.is_stopped()
        {
            let body = move || drop(device);
            if let Err(error) = std::thread::Builder::new().name("ublk-drop".into()).spawn(body) {
                log::error!("a thread that stops a forgotten device: {error}");
            }
        }
    }
}

#[pymethods]
impl NativeDevice {
    #[getter]
    fn id(&self) -> u32 {
        self.device().id().0
    }

    #[getter]
    fn path(&self) -> PathBuf {
        self.device().path().to_owned()
    }

    #[getter]
    fn queues(&self) -> u16 {
        self.device().info().queues
    }

    #[getter]
    fn depth(&self) -> u16 {
        self.device().info().depth
    }

    #[getter]
    fn max_io_bytes(&self) -> u32 {
        self.device().info().max_io_bytes
    }

    #[getter]
    fn ending(&self) -> bool {
        self.device().is_ending()
    }

    #[getter]
    fn stopped(&self) -> bool {
        self.device().is_stopped()
    }

    /// Returns a descriptor that is readable once the device begins to end.
    fn fileno(&self) -> RawFd {
        self.device().as_fd().as_raw_fd()
    }

    /// One queue for each hardware queue, if requests are pulled.
    #[getter]
    fn pull_queues(&self, py: Python<'_>) -> Vec<Py<PyPullQueue>> {
        self.pull_queues.iter().map(|queue| queue.clone_ref(py)).collect()
    }

    /// Starts to serve the device, and returns when its node is ready.
    fn go_live(&self, py: Python<'_>) -> PyResult<()> {
        interpreter::check_return()?;
        let Some(target) = self.take_target() else { return Ok(()) };
        let (result, _permit) = interpreter::detached(py, || {
            let device = self.device();
            device.go_live(target)?;
            if self.on_kernel {
                stats::publish(device);
                // Another thread may have stopped it meanwhile.
                self.withdraw_if_over();
            }
            Ok(())
        });
        result.map_err(|e| to_python(py, &e))
    }

    /// Stops and deletes the device, or leaves it if this or another process has quiesced it. Waits for handlers for so many
    /// seconds; then, if the device is deleted, requests that are not on the thread of their queue fail. In the main thread
    /// an exception of a signal handler ends the wait; the device is then stopped without waiting for handlers.
    fn stop(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(FOREVER).min(FOREVER);
        drop(self.take_target());
        let patience = timeout.max(GRACE);
        let timeout = patience + COMMIT;
        // Otherwise this or another process has quiesced the device. When all tags are at the server, only the flag
        // shows it.
        let is_left = self.leaving.load(Ordering::Relaxed) || self.device().is_ending();
        let deletes = !(is_left && self.device().recovery().is_some());
        self.deletes.store(deletes, Ordering::Relaxed);
        self.end(py, patience, move |device| {
            if deletes { device.stop_within(timeout) } else { device.conclude_within(timeout).map(drop) }
        })
    }

    /// Makes later stops finish what an interrupted `leave` has begun, instead of deleting the device.
    fn hand_over(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Finishes the requests in flight and leaves the device to another server. Can be interrupted like `stop`.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        let leaving = self.leaving.clone();
        self.end(py, Duration::MAX, move |device| {
            let left = device.leave();
            // The driver has rejected it, so nothing has begun.
            if left.as_ref().is_err_and(is_refusal) && !device.is_ending() {
                leaving.store(false, Ordering::Relaxed);
            }
            left
        })
    }

    /// Ends the waits for handlers of the current stop and of later ones.
    fn expedite(&self, py: Python<'_>) {
        self.hurried.store(true, Ordering::Relaxed);
        self.revoke(py);
        self.device().expedite();
    }

    /// Number of requests that failed because they had not ended in time.
    #[getter]
    fn revoked(&self) -> usize {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Whether requests are revoked without waiting for them.
    #[getter]
    fn hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }

    /// Whether the calling thread serves one of the queues, possibly besides queues of other devices.
    #[getter]
    fn served_here(&self) -> bool {
        self.device().is_served_here()
    }

    /// Gives up a device whose recovery has failed.
    fn abandon(&self, py: Python<'_>) {
        interpreter::detached(py, || {
            self.device().abandon();
            self.withdraw_if_over();
        });
    }

    /// Changes the capacity of the disk.
    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        interpreter::check_return()?;
        let (result, _permit) = interpreter::detached(py, || self.device().resize(size));
        result.map_err(|e| to_python(py, &e))
    }

    /// Shares the memory of a file with clients that map it; returns its number.
    fn share_memory(&self, py: Python<'_>, file: &Bound<'_, PyAny>, read_only: bool) -> PyResult<u16> {
        interpreter::check_return()?;
        let file = with_descriptor(file, |file| Ok(File::from(file.try_clone_to_owned()?)))?;
        let len = file.metadata()?.len();
        let memory = SharedMemory::map(&file, len, read_only).map_err(|error| {
            if error.raw_os_error().is_some() {
                return error.into();
            }
            PyValueError::new_err(format!("memory to share has whole pages, up to 4 GiB; the file has {len} bytes"))
        })?;
        let (result, _permit) = interpreter::detached(py, || self.device().share_memory(memory));
        result.map_err(|e| to_python(py, &e))
    }

    /// Unshares memory.
    fn unshare_memory(&self, py: Python<'_>, number: u16) -> PyResult<()> {
        interpreter::check_return()?;
        let (result, _permit) = interpreter::detached(py, || self.device().unshare_memory(number));
        result.map_err(|e| to_python(py, &e))
    }

    /// Recovery mode of the device.
    #[getter]
    fn recovery(&self) -> Option<&'static str> {
        self.device().recovery().map(Recovery::name)
    }

    /// Whether the device can be quiesced.
    #[getter]
    fn can_quiesce(&self) -> bool {
        self.device().info().features.contains(Features::QUIESCE)
    }

    /// How data moves.
    #[getter]
    fn data_movement(&self) -> &'static str {
        self.device().data_movement().0.name()
    }

    /// Statistics: a dict for each operation, with latencies in nanoseconds.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        interpreter::check_return()?;
        let (stats, _permit) = interpreter::detached(py, || self.device().stats());
        let one = |(op, stats): (&Op, &ublk_core::OpStats)| {
            let dict = PyDict::new(py);
            dict.set_item("op", op_name(*op))?;
            let latency = &stats.latency_ns;
            for (name, value) in [
                ("requests", stats.requests),
                ("bytes", stats.bytes),
                ("errors", stats.errors),
                ("mean", latency.mean),
                ("p50", latency.p50),
                ("p99", latency.p99),
                ("p99_9", latency.p99_9),
                ("max", latency.max),
            ] {
                dict.set_item(name, value)?;
            }
            Ok(dict)
        };
        stats.total.iter().map(one).collect()
    }

    /// Whether the device is on the kernel's driver.
    #[getter]
    fn on_kernel(&self) -> bool {
        self.on_kernel
    }

    /// Number of queues that the driver or a handler still uses.
    #[getter]
    fn queues_left(&self) -> usize {
        self.device().queues_left()
    }

    /// Threads that are in a handler: ident, number of the call, seconds.
    fn busy(&self) -> Vec<(u64, u64, f64)> {
        self.watch.busy()
    }

    /// Whether the calling thread is in one of its handlers.
    #[getter]
    fn in_handler(&self, py: Python<'_>) -> PyResult<bool> {
        self.watch.is_busy_here(py)
    }

    /// Number of times that the interpreter was entered for requests.
    #[getter]
    fn entries(&self) -> u64 {
        self.watch.entries()
    }
}
