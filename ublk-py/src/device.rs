// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices of this process, as Python sees them.

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
use crate::methods::op_name;
use crate::pull::{Pulled, PyPullQueue};
use crate::stats;
use crate::watch::Watch;

/// How often a wait of the main thread looks for signals.
const SIGNAL_POLL: Duration = Duration::from_millis(50);
/// Longer than any device is served.
const FOREVER: Duration = Duration::from_secs(1 << 31);
/// How long requests have to end by themselves, however little time there is.
const GRACE: Duration = Duration::from_millis(500);
/// How long the engine has to commit what was revoked, before it gives up the queues.
const COMMIT: Duration = Duration::from_secs(1);

/// A device of this process.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct NativeDevice {
    /// Taken out when this object goes.
    device: Option<Arc<ublk_core::Device>>,
    /// Until the device goes live, or is stopped before that.
    target: Mutex<Option<Arc<dyn Target>>>,
    /// Where its requests are taken from, if its style is to pull them.
    pull_queues: Vec<Py<PyPullQueue>>,
    watch: Watch,
    /// The device is one of the system.
    on_kernel: bool,
    /// How many requests were revoked.
    revoked: AtomicUsize,
    /// They are to be revoked at once.
    hurried: AtomicBool,
    /// The device is being deleted: no other server can follow.
    deletes: AtomicBool,
    /// It is being left to another server, whatever has interrupted that: no stop deletes it.
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

    /// Whatever has ended it.
    fn withdraw_if_over(&self) {
        if self.on_kernel && self.device().is_stopped() {
            stats::withdraw(self.device().id());
        }
    }

    /// Fails the requests that have left the threads of their queues, unless another server may come: a method that is still
    /// at work would write beside it, over newer data. The next server has to wait for such a method, or for the end of
    /// this process.
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
            // Each time: a worker may have just got another.
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

/// Whether this is why a device was not left, not why its queues do not end.
fn is_refusal(error: &ublk_core::Error) -> bool {
    use ublk_core::Error::{Control, Unsupported};
    error.is_refusal() && matches!(error, Unsupported { .. } | Control { command: "QUIESCE_DEV", .. })
}

/// Does something with a device, and looks for signals meanwhile. If their handlers raise, the rest goes on in the
/// background, [expedited](ublk_core::Device::expedite). Calls `meanwhile` now and then.
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
        // Without threads or memory a device can still be stopped, if not interrupted.
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
                return Err(PyRuntimeError::new_err("the thread that was to end the device has panicked"));
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
        // The object may be gone, and with it all other references.
        drop(device);
        let _ = sender.send(result);
    }
}

/// Python may drop the object anywhere: attached, where waiting would keep the handlers from finishing
/// the requests that are waited for, or on the very thread that serves the device. So the device, if it
/// still runs, is stopped by a thread of its own.
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

    /// Readable once the device begins to end.
    fn fileno(&self) -> RawFd {
        self.device().as_fd().as_raw_fd()
    }

    /// One for each hardware queue, of a device whose requests are pulled.
    #[getter]
    fn pull_queues(&self, py: Python<'_>) -> Vec<Py<PyPullQueue>> {
        self.pull_queues.iter().map(|queue| queue.clone_ref(py)).collect()
    }

    /// Serves the device, and returns when its node can be used.
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

    /// Stops and deletes the device; leaves one that this or another process has asked to wait for another server. Waits for
    /// handlers for so many seconds; then, if the device is deleted, requests that are not on the thread of their queue fail.
    /// In the main thread a signal's handler may end the wait by an exception; the device is stopped all the same, without
    /// waiting for handlers any longer.
    fn stop(&self, py: Python<'_>, seconds: f64) -> PyResult<()> {
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(FOREVER).min(FOREVER);
        drop(self.take_target());
        let patience = timeout.max(GRACE);
        let timeout = patience + COMMIT;
        // Otherwise this or another process has asked that the device wait for another server. When all tags are at the
        // server, only the flag shows it.
        let is_left = self.leaving.load(Ordering::Relaxed) || self.device().is_ending();
        let deletes = !(is_left && self.device().recovery().is_some());
        self.deletes.store(deletes, Ordering::Relaxed);
        self.end(py, patience, move |device| {
            if deletes { device.stop_within(timeout) } else { device.conclude_within(timeout).map(drop) }
        })
    }

    /// Has no later stop delete the device: one concludes what `leave` may not have finished.
    fn hand_over(&self) {
        self.leaving.store(true, Ordering::Relaxed);
    }

    /// Finishes the requests in flight and leaves the device to another server. Can be interrupted as `stop`.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        let leaving = self.leaving.clone();
        self.end(py, Duration::MAX, move |device| {
            let left = device.leave();
            // What the driver has refused was not begun.
            if left.as_ref().is_err_and(is_refusal) && !device.is_ending() {
                leaving.store(false, Ordering::Relaxed);
            }
            left
        })
    }

    /// Ends waits for handlers: of a stop that is under way, and of later ones.
    fn expedite(&self, py: Python<'_>) {
        self.hurried.store(true, Ordering::Relaxed);
        self.revoke(py);
        self.device().expedite();
    }

    /// How many requests have failed because they had not ended in time.
    #[getter]
    fn revoked(&self) -> usize {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Whether they are revoked without waiting for them.
    #[getter]
    fn hurried(&self) -> bool {
        self.hurried.load(Ordering::Relaxed)
    }

    /// Whether the calling thread serves one of the queues, perhaps beside those of other devices.
    #[getter]
    fn served_here(&self) -> bool {
        self.device().is_served_here()
    }

    /// Gives up a device whose recovery has gone wrong.
    fn abandon(&self, py: Python<'_>) {
        interpreter::detached(py, || {
            self.device().abandon();
            self.withdraw_if_over();
        });
    }

    /// Changes the disk's capacity.
    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        interpreter::check_return()?;
        let (result, _permit) = interpreter::detached(py, || self.device().resize(size));
        result.map_err(|e| to_python(py, &e))
    }

    /// Lets clients use memory of a file that they map, too; gives its number.
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

    /// Takes shared memory back.
    fn unshare_memory(&self, py: Python<'_>, number: u16) -> PyResult<()> {
        interpreter::check_return()?;
        let (result, _permit) = interpreter::detached(py, || self.device().unshare_memory(number));
        result.map_err(|e| to_python(py, &e))
    }

    /// What becomes of the device when its server is gone.
    #[getter]
    fn recovery(&self) -> Option<&'static str> {
        self.device().recovery().map(Recovery::name)
    }

    /// Whether it can be left to another server without a failure.
    #[getter]
    fn can_be_left(&self) -> bool {
        self.device().info().features.contains(Features::QUIESCE)
    }

    /// How data moves.
    #[getter]
    fn data(&self) -> &'static str {
        self.device().data_movement().0.name()
    }

    /// What each operation has done: a dict for each, latencies in nanoseconds.
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

    /// Whether the device is one of the system.
    #[getter]
    fn on_kernel(&self) -> bool {
        self.on_kernel
    }

    /// How many queues the driver or a handler still has.
    #[getter]
    fn queues_left(&self) -> usize {
        self.device().queues_left()
    }

    /// Threads that are in a handler: ident, a number of the call, seconds.
    fn busy(&self) -> Vec<(u64, u64, f64)> {
        self.watch.busy()
    }

    /// Whether the calling thread is in one of its handlers.
    #[getter]
    fn in_handler(&self, py: Python<'_>) -> PyResult<bool> {
        self.watch.is_busy_here(py)
    }

    /// How often the interpreter was entered for requests.
    #[getter]
    fn entries(&self) -> u64 {
        self.watch.entries()
    }
}
