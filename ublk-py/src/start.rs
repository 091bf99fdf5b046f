// SPDX-License-Identifier: MIT OR Apache-2.0

//! How devices are made, and taken over.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use ublk_core::driver::fake;
use ublk_core::driver::kernel::KernelDriver;
use ublk_core::pull::{channels, pull_with};
use ublk_core::{Access, DeviceId, DeviceOptions, MAX_COALESCING, Params, Recovery, Server, Target, ZonedLimits};

use crate::device::NativeDevice;
use crate::error::to_python;
use crate::extents::{Extents, Mapper};
use crate::fake::FakeDriver;
use crate::handler::{PythonTarget, Style};
use crate::interpreter;
use crate::logging;
use crate::methods::operations;
use crate::pull::Pulled;
use crate::stats;
use crate::targets::NativeTarget;
use crate::threads::PythonSpawn;
use crate::watch::Watch;

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
    let made = Server::with_driver(Arc::new(KernelDriver::open()?), Arc::new(spawn), threads);
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
    zone_size: u32,
    max_open_zones: u32,
    max_active_zones: u32,
    max_append_bytes: u32,
    /// Names of methods: what it can do beside being read.
    operations: Vec<String>,
    /// `methods`, `mapped`, `batch`, `pull`, `mapped-pull` or `native`.
    style: String,
    /// How long requests may be coalesced.
    coalesce_usecs: u32,
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
        if self.zone_size != 0 {
            params.chunk_size = self.zone_size;
            let mut zoned = ZonedLimits::new(self.max_append_bytes);
            (zoned.max_open, zoned.max_active) = (self.max_open_zones, self.max_active_zones);
            params.zoned = Some(zoned);
        }
        params
    }

    /// Has the flushes of the block device know that another server has written to the disk.
    fn note_recovery(&self, handlers: &Bound<'_, PyAny>) -> PyResult<()> {
        // The others have no extents. Nor does a program that pulls, which has no methods.
        if !matches!(self.style.as_str(), "native" | "batch") && handlers.contains("read")? {
            let extents = handlers.get_item("extents")?;
            extents.cast::<Extents>()?.get().0.flushes.recovered(self.style.starts_with("mapped"));
        }
        Ok(())
    }

    /// Makes the target, and queues if its requests are pulled.
    fn target(self, handlers: &Bound<'_, PyAny>, queues: u32, watch: &Watch) -> PyResult<(Arc<dyn Target>, Pulled)> {
        if self.style == "native" {
            return Ok((handlers.cast::<NativeTarget>()?.get().sized(self.size), Pulled::default()));
        }
        let py = handlers.py();
        let params = self.params();
        let part = |name: &str| handlers.get_item(name);
        let extents = || PyResult::Ok(part("extents")?.cast::<Extents>()?.get().0.clone());
        let mapper = || PyResult::Ok(Mapper { map: part("map")?.unbind(), extents: extents()? });
        let mut pulled = Pulled::default();
        let style = match self.style.as_str() {
            "pull" => {
                let made = pull_with(self.kind, params, Access::Bytes, queues);
                let (target, queues) = made.map_err(|e| to_python(py, &e))?;
                return Ok((target, Pulled { queues, extents: extents()? }));
            }
            "methods" => Style::Methods(handlers.extract()?),
            "mapped" => Style::Mapped(handlers.extract()?, mapper()?, None),
            "mapped-pull" => {
                let (senders, queues) = channels(queues).map_err(|e| to_python(py, &e))?;
                pulled = Pulled { queues, extents: extents()? };
                Style::Mapped(handlers.extract()?, mapper()?, Some(senders))
            }
            "batch" => Style::Batch(handlers.extract()?),
            other => return Err(PyValueError::new_err(format!("there is no style {other}"))),
        };
        Ok((Arc::new(PythonTarget { kind: self.kind, params, style, watch: watch.clone() }), pulled))
    }
}

/// A server on the given driver, or on the kernel's.
fn server(driver: Option<fake::FakeDriver>, spawn: Py<PyAny>, threads: u32) -> ublk_core::Result<Server> {
    let spawn = PythonSpawn(spawn);
    match driver {
        Some(fake) => Ok(Server::with_driver(Arc::new(fake), Arc::new(spawn), threads as usize)),
        None => kernel_server(spawn),
    }
}

/// How a device is made, as Python gives it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Options {
    queues: u32,
    depth: u32,
    id: Option<u32>,
    recovery: Option<String>,
    shared_memory: bool,
}

impl Options {
    fn convert(&self) -> PyResult<DeviceOptions> {
        let recovery = |name: &String| {
            name.parse::<Recovery>().map_err(|_| {
                let names = Recovery::ALL.map(Recovery::name).join(", ");
                PyValueError::new_err(format!("recoverable = {name:?}: there are True, False, {names}"))
            })
        };
        let mut options = DeviceOptions::new().queues(self.queues).depth(self.depth).shared_memory(self.shared_memory);
        options.id = self.id.map(DeviceId);
        options.recovery = self.recovery.as_ref().map(recovery).transpose()?;
        Ok(options)
    }
}

/// Checks the shape of a disk.
#[pyfunction]
pub(crate) fn check(py: Python<'_>, description: Description) -> PyResult<()> {
    description.params().validate().map_err(|e| to_python(py, &e))
}

/// Makes a device that is not live yet, and appends it to `made`: a returned object could be lost to a
/// signal's exception before the caller has stored it.
#[pyfunction]
pub(crate) fn add(
    py: Python<'_>,
    description: Description,
    handlers: &Bound<'_, PyAny>,
    options: Options,
    spawn: Py<PyAny>,
    driver: Option<&FakeDriver>,
    made: &Bound<'_, PyList>,
) -> PyResult<()> {
    interpreter::check_open()?;
    logging::follow(py)?;
    let watch = Watch::new();
    let window = Duration::from_micros(description.coalesce_usecs.into());
    let (target, queues) = description.target(handlers, options.queues, &watch)?;
    let device_options = options.convert()?;
    let fake = driver.map(FakeDriver::inner);
    // Before the driver is looked for, which may be missing.
    if window > MAX_COALESCING {
        let most = MAX_COALESCING.as_micros();
        return Err(PyValueError::new_err(format!("coalesce_usecs = {}: {most} at most", window.as_micros())));
    }
    target.params().validate().and_then(|()| device_options.validate()).map_err(|e| to_python(py, &e))?;
    let make = || server(fake, spawn, options.queues)?.with_coalescing(window)?.add(&target, &device_options);
    let (device, _permit) = interpreter::detached(py, make);
    let device = device.map_err(|e| to_python(py, &e))?;
    made.append(NativeDevice::new(py, device, Some(target), queues, watch, driver.is_none())?)
}

/// Serves a device whose last server is gone, and appends it to `made`.
#[pyfunction]
pub(crate) fn recover(
    py: Python<'_>,
    description: Description,
    handlers: &Bound<'_, PyAny>,
    id: u32,
    spawn: Py<PyAny>,
    driver: Option<&FakeDriver>,
    made: &Bound<'_, PyList>,
) -> PyResult<()> {
    interpreter::check_open()?;
    logging::follow(py)?;
    let watch = Watch::new();
    let fake = driver.map(FakeDriver::inner);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let window = Duration::from_micros(description.coalesce_usecs.into());
    let find = || {
        let server = server(fake, spawn, threads)?.with_coalescing(window)?;
        let info = server.wait_until_unserved(DeviceId(id))?;
        Ok((server, info))
    };
    let (found, permit) = interpreter::detached(py, find);
    let (server, info) = found.map_err(|e| to_python(py, &e))?;
    description.note_recovery(handlers)?;
    let (target, queues) = description.target(handlers, info.queues.into(), &watch)?;
    let on_kernel = driver.is_none();
    let serve = || {
        let device = server.recover(info.id, target)?;
        if on_kernel {
            stats::publish(&device);
        }
        Ok(device)
    };
    drop(permit);
    let (device, _permit) = interpreter::detached(py, serve);
    let device = device.map_err(|e| to_python(py, &e))?;
    made.append(NativeDevice::new(py, device, None, queues, watch, on_kernel)?)
}
