// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices of this process, as Python sees them.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::{Features, Op, Recovery, SharedMemory, Target};

use crate::descriptor::with_descriptor;
use crate::error::to_python;
use crate::methods::op_name;
use crate::pull::{Pulled, PyPullQueue};
use crate::stats;
use crate::watch::Watch;

/// A device of this process.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct NativeDevice {
    /// Taken out when this object goes.
    device: Option<ublk_core::Device>,
    /// Until the device goes live, or is stopped before that.
    target: Mutex<Option<Arc<dyn Target>>>,
    /// Where its requests are taken from, if its style is to pull them.
    pull_queues: Vec<Py<PyPullQueue>>,
    watch: Watch,
    /// The device is one of the system.
    on_kernel: bool,
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
        Ok(NativeDevice { device: Some(device), target: Mutex::new(target), pull_queues, watch, on_kernel })
    }

    fn device(&self) -> &ublk_core::Device {
        self.device.as_ref().expect("a live object has its device")
    }

    /// Whatever has ended it.
    fn withdraw_if_over(&self) {
        if self.on_kernel && self.device().is_stopped() {
            stats::withdraw(self.device().id());
        }
    }

    fn take_target(&self) -> Option<Arc<dyn Target>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner).take()
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
        let Some(target) = self.take_target() else { return Ok(()) };
        py.detach(|| {
            let device = self.device();
            device.go_live(target)?;
            if self.on_kernel {
                stats::publish(device);
                // Another thread may have stopped it meanwhile.
                self.withdraw_if_over();
            }
            Ok(())
        })
        .map_err(|e| to_python(py, &e))
    }

    /// Stops and deletes the device; leaves one that somebody has asked to wait for another server.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            drop(self.take_target());
            let device = self.device();
            let ended = if device.is_ending() && device.recovery().is_some() {
                device.conclude().map(drop)
            } else {
                device.stop()
            };
            self.withdraw_if_over();
            ended
        })
        .map_err(|e| to_python(py, &e))
    }

    /// Finishes the requests in flight and leaves the device to another server.
    fn leave(&self, py: Python<'_>) -> PyResult<()> {
        let left = py.detach(|| {
            let left = self.device().leave();
            self.withdraw_if_over();
            left
        });
        left.map_err(|e| to_python(py, &e))
    }

    /// Gives up a device whose recovery has gone wrong.
    fn abandon(&self, py: Python<'_>) {
        py.detach(|| {
            self.device().abandon();
            self.withdraw_if_over();
        });
    }

    /// Changes the disk's capacity.
    fn resize(&self, py: Python<'_>, size: u64) -> PyResult<()> {
        py.detach(|| self.device().resize(size)).map_err(|e| to_python(py, &e))
    }

    /// Lets clients use memory of a file that they map, too; gives its number.
    fn share_memory(&self, py: Python<'_>, file: &Bound<'_, PyAny>, read_only: bool) -> PyResult<u16> {
        let file = with_descriptor(file, |file| Ok(File::from(file.try_clone_to_owned()?)))?;
        let len = file.metadata()?.len();
        let memory = SharedMemory::map(&file, len, read_only).map_err(|error| {
            if error.raw_os_error().is_some() {
                return error.into();
            }
            PyValueError::new_err(format!("memory to share has whole pages, up to 4 GiB; the file has {len} bytes"))
        })?;
        py.detach(|| self.device().share_memory(memory)).map_err(|e| to_python(py, &e))
    }

    /// Takes shared memory back.
    fn unshare_memory(&self, py: Python<'_>, number: u16) -> PyResult<()> {
        py.detach(|| self.device().unshare_memory(number)).map_err(|e| to_python(py, &e))
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
        let stats = py.detach(|| self.device().stats());
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

    /// How many queues the driver or a handler still has.
    #[getter]
    fn queues_left(&self) -> usize {
        self.device().queues_left()
    }

    /// Threads that are in a handler: ident, a number of the call, seconds.
    fn busy(&self) -> Vec<(u64, u64, f64)> {
        self.watch.busy()
    }

    /// How often the interpreter was entered for requests.
    #[getter]
    fn entries(&self) -> u64 {
        self.watch.entries()
    }
}
