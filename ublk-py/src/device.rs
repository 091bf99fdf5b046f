// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices, made and seen from Python.

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};
use ublk_core::control::Control;
use ublk_core::driver::kernel::KernelDriver;
use ublk_core::pull::{PullQueue, pull_with};
use ublk_core::{Access, DeviceId, DeviceOptions, Features, Params, Server, Target};

use crate::error::to_python;
use crate::fake::FakeDriver;
use crate::handler::{PythonTarget, Style};
use crate::logging;
use crate::methods::operations;
use crate::pull::PyPullQueue;
use crate::threads::PythonSpawn;

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
}

impl NativeDevice {
    fn device(&self) -> &ublk_core::Device {
        self.device.as_ref().expect("a live object has its device")
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
        py.detach(|| self.device().go_live(target)).map_err(|e| to_python(py, &e))
    }

    /// Stops and deletes the device.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            drop(self.take_target());
            self.device().stop()
        })
        .map_err(|e| to_python(py, &e))
    }
}

/// The process's server on the kernel's driver, made with the first device.
fn kernel_server(spawn: PythonSpawn) -> ublk_core::Result<Server> {
    static SERVER: Mutex<Option<(u32, Server)>> = Mutex::new(None);
    let mut server = SERVER.lock().unwrap_or_else(PoisonError::into_inner);
    let pid = std::process::id();
    match server.take() {
        Some((owner, made)) if owner == pid => {
            *server = Some((owner, made.clone()));
            return Ok(made);
        }
        // A forked child's copy: its threads are the parent's, and its rings are not mapped here.
        Some(inherited) => std::mem::forget(inherited),
        None => {}
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let made = Server::with(Arc::new(KernelDriver::open()?), Arc::new(spawn), threads);
    *server = Some((pid, made.clone()));
    Ok(made)
}

/// What a disk is, and how Python serves it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Description {
    kind: String,
    size: u64,
    block_size: u32,
    physical_block_size: u32,
    max_io_bytes: u32,
    rotational: bool,
    read_only: bool,
    discard_granularity: u32,
    /// Names of methods: what it can do beside being read.
    operations: Vec<String>,
    /// `methods`, `batch` or `pull`.
    style: String,
}

impl Description {
    fn params(&self) -> Params {
        let mut params = Params::new(self.size, self.block_size);
        params.physical_block_size = self.physical_block_size;
        params.io_min = self.physical_block_size;
        params.max_io_bytes = self.max_io_bytes;
        params.rotational = self.rotational;
        params.read_only = self.read_only;
        params.discard.granularity = self.discard_granularity;
        params.operations = operations(&self.operations);
        params
    }

    /// Makes the target, and queues if its requests are pulled.
    fn target(self, handlers: &Bound<'_, PyAny>, queues: u32) -> PyResult<(Arc<dyn Target>, Vec<PullQueue>)> {
        let params = self.params();
        let style = match self.style.as_str() {
            "pull" => {
                return pull_with(self.kind, params, Access::Bytes, queues).map_err(|e| to_python(handlers.py(), &e));
            }
            "methods" => Style::Methods(handlers.extract()?),
            "batch" => Style::Batch(handlers.extract()?),
            other => return Err(PyValueError::new_err(format!("there is no style {other}"))),
        };
        Ok((Arc::new(PythonTarget { kind: self.kind, params, style }), Vec::new()))
    }
}

/// Makes a device that is not live yet, and appends it to `made`: a returned object could be lost to a
/// signal's exception before the caller has stored it.
#[pyfunction]
#[pyo3(signature = (description, handlers, queues, depth, id, spawn, driver, made))]
#[allow(clippy::too_many_arguments, reason = "a private function with one caller, which passes all by name")]
pub(crate) fn add(
    py: Python<'_>,
    description: Description,
    handlers: &Bound<'_, PyAny>,
    queues: u32,
    depth: u32,
    id: Option<u32>,
    spawn: Py<PyAny>,
    driver: Option<&FakeDriver>,
    made: &Bound<'_, PyList>,
) -> PyResult<()> {
    logging::follow(py)?;
    let (target, pull_queues) = description.target(handlers, queues)?;
    let options = DeviceOptions { id: id.map(DeviceId), queues, depth, ..DeviceOptions::default() };
    let spawn = PythonSpawn(spawn);
    let fake = driver.map(FakeDriver::inner);
    let device = py.detach(|| {
        let server = match fake {
            Some(fake) => Server::with(Arc::new(fake), Arc::new(spawn), queues as usize),
            None => kernel_server(spawn)?,
        };
        server.add(&target, &options)
    });
    let device = device.map_err(|e| to_python(py, &e))?;
    let pull_queues = pull_queues.into_iter().map(|queue| Py::new(py, PyPullQueue::new(queue)));
    let pull_queues = pull_queues.collect::<PyResult<_>>()?;
    made.append(NativeDevice { device: Some(device), target: Mutex::new(Some(target)), pull_queues })
}

/// What the driver offers: a dict from feature name to bool.
#[pyfunction]
pub(crate) fn features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features =
        py.detach(|| Control::new(Arc::new(KernelDriver::open()?)).features()).map_err(|e| to_python(py, &e))?;
    let dict = PyDict::new(py);
    for flag in Features::all() {
        dict.set_item(flag.name(), features.contains(flag))?;
    }
    Ok(dict)
}

/// What the driver knows about all devices: a list of dicts.
#[pyfunction]
pub(crate) fn devices(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let found = py.detach(|| {
        let control = Control::new(Arc::new(KernelDriver::open()?));
        let ids = control
            .driver()
            .device_ids()
            .map_err(|source| ublk_core::Error::Target { context: "listing the devices".into(), source })?;
        let mut found = Vec::new();
        for id in ids {
            match control.info(id).and_then(|info| Ok((info, control.params(id)?.params))) {
                Ok(both) => found.push((control.driver().block_path(id), both)),
                // It went away between the two looks.
                Err(error) if error.errno() == ublk_core::Errno::ENODEV => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    });
    let found = found.map_err(|e: ublk_core::Error| to_python(py, &e))?;
    found
        .into_iter()
        .map(|(path, (info, params))| {
            let dict = PyDict::new(py);
            dict.set_item("id", info.id.0)?;
            dict.set_item("path", path.to_string_lossy().into_owned())?;
            dict.set_item("state", info.state.name())?;
            dict.set_item("pid", info.pid)?;
            dict.set_item("queues", info.queues)?;
            dict.set_item("depth", info.depth)?;
            dict.set_item("size", params.size)?;
            dict.set_item("block_size", params.logical_block_size)?;
            dict.set_item("max_io_bytes", info.max_io_bytes)?;
            dict.set_item("read_only", params.read_only)?;
            Ok(dict)
        })
        .collect()
}
