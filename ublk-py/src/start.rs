// SPDX-License-Identifier: MIT OR Apache-2.0

//! Creates and recovers devices.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use ublk_core::fake;
use ublk_core::pull::{channels, pull_with};
use ublk_core::{
    Access, DeviceId, DeviceOptions, Error, MAX_COALESCING, Operations, Parameter, Params, PerProcess, Recovery,
    Server, Target, ZonedLimits,
};

use crate::device::NativeDevice;
use crate::error::to_python;
use crate::extents::{DiskExtents, Extents, Mapper};
use crate::fake::FakeDriver;
use crate::handler::{PythonTarget, Style};
use crate::interpreter;
use crate::logging;
use crate::operations::operations;
use crate::pull::Pulled;
use crate::stats;
use crate::targets::NativeTarget;
use crate::threads::PythonSpawn;
use crate::watch::Watch;

/// Returns the process's server on the kernel's driver, which is created with the first device.
fn kernel_server(spawn: PythonSpawn) -> ublk_core::Result<Server> {
    static SERVER: PerProcess<Option<Server>> = PerProcess::new();
    let mut server = SERVER.lock();
    if let Some(made) = &*server {
        return Ok(made.clone());
    }
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let made = Server::new()?.with_threads(threads).with_spawn(Arc::new(spawn));
    *server = Some(made.clone());
    Ok(made)
}

/// Shape of a disk, as Python gives it.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Shape {
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
}

impl Shape {
    fn params(&self, operations: Operations) -> Params {
        let mut params = Params::new(self.size, self.block_size);
        params.physical_block_size = self.physical_block_size;
        params.io_min = self.physical_block_size;
        params.max_io_bytes = self.max_io_bytes;
        params.rotational = self.rotational;
        params.read_only = self.read_only;
        params.discard.granularity = self.discard_granularity;
        params.operations = operations;
        if self.zone_size != 0 {
            params.chunk_size = self.zone_size;
            let mut zoned = ZonedLimits::new(self.max_append_bytes);
            (zoned.max_open, zoned.max_active) = (self.max_open_zones, self.max_active_zones);
            params.zoned = Some(zoned);
        }
        params
    }
}

/// Way in which Python serves a disk: the attributes of a `Serving` object.
#[derive(FromPyObject)]
pub(crate) struct Serving<'py> {
    kind: String,
    /// Names of the operations that the disk supports.
    operations: Vec<String>,
    /// A native target, or a mapping of names to functions, which determine the style.
    handlers: Bound<'py, PyAny>,
    /// Whether Python takes requests from queues.
    is_pulled: bool,
}

impl Serving<'_> {
    fn native(&self) -> Option<&Bound<'_, NativeTarget>> {
        self.handlers.cast::<NativeTarget>().ok()
    }

    fn has(&self, name: &str) -> PyResult<bool> {
        self.handlers.contains(name)
    }

    fn extents(&self) -> PyResult<DiskExtents> {
        Ok(self.handlers.get_item("extents")?.cast::<Extents>()?.get().0.clone())
    }

    /// Informs the flushes of the block device that another server has written to the disk.
    fn note_recovery(&self) -> PyResult<()> {
        // Native targets, batches and programs that pull have no methods that could return extents.
        if self.native().is_none() && self.has("read")? {
            self.extents()?.flushes.recovered(self.has("map")?);
        }
        Ok(())
    }

    /// Creates the target, and queues if requests are pulled.
    fn target(self, shape: &Shape, queues: u32, watch: &Watch) -> PyResult<(Arc<dyn Target>, Pulled)> {
        if let Some(native) = self.native() {
            return Ok((native.get().sized(shape.size), Pulled::default()));
        }
        let py = self.handlers.py();
        let params = shape.params(operations(&self.operations));
        let mut pulled = Pulled::default();
        let style = if self.has("handle")? {
            Style::Batches(self.handlers.extract()?)
        } else if self.has("map")? {
            let mapper = Mapper { map: self.handlers.get_item("map")?.unbind(), extents: self.extents()? };
            let mut given = None;
            if self.is_pulled {
                let (senders, queues) = channels(queues).map_err(|e| to_python(py, &e))?;
                pulled = Pulled { queues, extents: self.extents()? };
                given = Some(senders);
            }
            Style::Mapped(self.handlers.extract()?, mapper, given)
        } else if self.is_pulled {
            let extents = self.extents()?;
            let made = pull_with(self.kind, params, Access::Bytes, queues);
            let (target, queues) = made.map_err(|e| to_python(py, &e))?;
            return Ok((target, Pulled { queues, extents }));
        } else {
            Style::Methods(self.handlers.extract()?)
        };
        Ok((Arc::new(PythonTarget { kind: self.kind, params, style, watch: watch.clone() }), pulled))
    }
}

/// Returns a server on the given driver, or on the kernel's.
fn server(driver: Option<fake::FakeDriver>, spawn: Py<PyAny>, threads: u32) -> ublk_core::Result<Server> {
    let spawn = PythonSpawn(spawn);
    match driver {
        Some(fake) => Ok(Server::with_fake(&fake).with_threads(threads as usize).with_spawn(Arc::new(spawn))),
        None => kernel_server(spawn),
    }
}

/// Options of a device: the attributes of an `Options` object.
#[derive(FromPyObject)]
pub(crate) struct Options {
    queues: u32,
    depth: u32,
    id: Option<u32>,
    recovery: Option<String>,
    shared_memory: bool,
    coalesce_usecs: u32,
    accept_replaced: bool,
}

impl Options {
    fn convert(&self) -> PyResult<DeviceOptions> {
        let recovery = |name: &String| {
            name.parse::<Recovery>().map_err(|_| {
                let names = Recovery::ALL.map(Recovery::name).join(", ");
                PyValueError::new_err(format!("recoverable = {name:?}: must be True, False, {names}"))
            })
        };
        let mut options = DeviceOptions::new().queues(self.queues).depth(self.depth).shared_memory(self.shared_memory);
        options.id = self.id.map(DeviceId);
        options.recovery = self.recovery.as_ref().map(recovery).transpose()?;
        Ok(options)
    }
}

/// Validates the shape of a disk.
#[pyfunction]
pub(crate) fn check(py: Python<'_>, shape: Shape) -> PyResult<()> {
    shape.params(Operations::empty()).validate().map_err(|e| to_python(py, &e))
}

/// Creates a device that is not live yet, and appends it to `made`: a returned object could be lost if a
/// signal handler raises before the caller has stored it.
#[pyfunction]
pub(crate) fn add(
    py: Python<'_>,
    shape: Shape,
    serving: Serving<'_>,
    options: Options,
    spawn: Py<PyAny>,
    driver: Option<&FakeDriver>,
    made: &Bound<'_, PyList>,
) -> PyResult<()> {
    interpreter::check_open()?;
    logging::follow(py)?;
    let watch = Watch::new();
    let window = Duration::from_micros(options.coalesce_usecs.into());
    let (target, queues) = serving.target(&shape, options.queues, &watch)?;
    let device_options = options.convert()?;
    let fake = driver.map(FakeDriver::inner);
    // Before the driver is opened, which may be missing.
    if window > MAX_COALESCING {
        let most = MAX_COALESCING.as_micros();
        return Err(PyValueError::new_err(format!("coalesce_usecs = {}: must be at most {most}", window.as_micros())));
    }
    target.params().validate().and_then(|()| device_options.validate()).map_err(|e| to_python(py, &e))?;
    let make = || server(fake, spawn, options.queues)?.with_coalescing(window)?.add(&target, &device_options);
    let (device, _permit) = interpreter::detached(py, make);
    let device = device.map_err(|e| to_python(py, &e))?;
    made.append(NativeDevice::new(py, device, Some(target), queues, watch, driver.is_none())?)
}

/// Serves a device that has lost its server, and appends it to `made`.
#[pyfunction]
pub(crate) fn recover(
    py: Python<'_>,
    shape: Shape,
    serving: Serving<'_>,
    options: Options,
    spawn: Py<PyAny>,
    driver: Option<&FakeDriver>,
    made: &Bound<'_, PyList>,
) -> PyResult<()> {
    interpreter::check_open()?;
    logging::follow(py)?;
    let watch = Watch::new();
    let fake = driver.map(FakeDriver::inner);
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let window = Duration::from_micros(options.coalesce_usecs.into());
    let id = DeviceId(options.id.ok_or_else(|| PyValueError::new_err("id = None: must be the number of a device"))?);
    let find = || {
        let server = server(fake, spawn, threads)?.with_coalescing(window)?;
        let info = server.wait_until_unserved(id)?;
        Ok((server, info))
    };
    let (found, permit) = interpreter::detached(py, find);
    let (server, info) = found.map_err(|e| to_python(py, &e))?;
    serving.note_recovery()?;
    let (target, queues) = serving.target(&shape, info.queues.into(), &watch)?;
    let on_kernel = driver.is_none();
    let serve = || {
        let device = if options.accept_replaced {
            server.recover_replaced(info.id, target)?
        } else {
            server.recover(info.id, target)?
        };
        if on_kernel {
            stats::publish(&device);
        }
        Ok(device)
    };
    drop(permit);
    let (device, _permit) = interpreter::detached(py, serve);
    let device = device.map_err(|error| match error {
        Error::Mismatch { parameter: Parameter::BackingFile, .. } => PyValueError::new_err(
            "the file is not the one that the disk is stored in: another file has taken its name, its file system was \
             mounted again, or the block device was deactivated or unplugged. Move the disk's file back to this name. If this is the same file, or if it is to replace the \
             disk's data, pass accept_replaced=True",
        ),
        error => to_python(py, &error),
    })?;
    made.append(NativeDevice::new(py, device, None, queues, watch, on_kernel)?)
}
