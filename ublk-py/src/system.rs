// SPDX-License-Identifier: MIT OR Apache-2.0

//! Features of the driver, and devices of the system.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;
use ublk_core::control::{Control, DRAIN_TIMEOUT, DeviceInfo};
use ublk_core::{DeviceId, DeviceState, Errno, Features, Params, Recovery, Result};

use crate::error::to_python;
use crate::interpreter;

/// Returns the features of the driver: a dict from name to bool.
#[pyfunction]
pub(crate) fn features(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let features = on_system(py, Control::features)?;
    let dict = PyDict::new(py);
    for flag in Features::all() {
        dict.set_item(flag.name(), features.contains(flag))?;
    }
    Ok(dict)
}

/// Returns the devices of the system: a list of dicts.
#[pyfunction]
pub(crate) fn devices(py: Python<'_>) -> PyResult<Vec<Bound<'_, PyDict>>> {
    let found = on_system(py, |control| {
        let ids = control.device_ids()?;
        let mut found = Vec::new();
        for id in ids {
            match look(control, id) {
                Ok(both) => found.push(both),
                // It was deleted meanwhile.
                Err(error) if error.errno() == Errno::ENODEV => {}
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    })?;
    found.into_iter().map(|found| to_dict(py, found)).collect()
}

/// Returns a device of the system: a dict.
#[pyfunction]
pub(crate) fn device(py: Python<'_>, id: u32) -> PyResult<Bound<'_, PyDict>> {
    to_dict(py, on_system(py, |control| look(control, DeviceId(id)))?)
}

/// Stops and deletes a device, whichever process serves it. Fails if it is in use, unless `force`.
#[pyfunction]
pub(crate) fn delete(py: Python<'_>, id: u32, force: bool) -> PyResult<()> {
    let id = DeviceId(id);
    on_system(py, |control| {
        let instance = control.instance(id);
        // By now, the number may be another device's.
        if !force && control.info(id)?.state != DeviceState::Dead && control.is_instance(id, instance) {
            control.try_stop(id)?;
        }
        match control.remove_instance(id, instance) {
            // Its server has deleted it first.
            Err(error) if error.errno() == Errno::ENODEV && !force => Ok(()),
            other => other.map(drop),
        }
    })
}

/// Quiesces a device, and waits until its server has left.
#[pyfunction]
pub(crate) fn quiesce(py: Python<'_>, id: u32) -> PyResult<()> {
    on_system(py, |control| control.quiesce_until(DeviceId(id), DRAIN_TIMEOUT).map(drop))
}

/// Changes the size of a disk. Its server is not notified.
#[pyfunction]
pub(crate) fn resize(py: Python<'_>, id: u32, size: u64) -> PyResult<()> {
    on_system(py, |control| control.update_size(DeviceId(id), size))
}

/// Calls the driver while other threads run Python.
fn on_system<T: Send>(py: Python<'_>, call: impl FnOnce(&Control) -> Result<T> + Send) -> PyResult<T> {
    interpreter::check_return()?;
    let (result, _permit) = interpreter::detached(py, || call(&Control::open()?));
    result.map_err(|e| to_python(py, &e))
}

type Found = (PathBuf, DeviceInfo, Params);

fn look(control: &Control, id: DeviceId) -> Result<Found> {
    Ok((control.block_path(id), control.info(id)?, control.params(id)?.params))
}

fn to_dict(py: Python<'_>, (path, info, params): Found) -> PyResult<Bound<'_, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("id", info.id.0)?;
    dict.set_item("path", path.to_string_lossy().into_owned())?;
    dict.set_item("state", info.state.name())?;
    // For the driver, -1 is no process; for `os.kill` it is every process.
    dict.set_item("pid", Some(info.pid).filter(|pid| *pid > 0))?;
    dict.set_item("queues", info.queues)?;
    dict.set_item("depth", info.depth)?;
    dict.set_item("size", params.size)?;
    dict.set_item("block_size", params.logical_block_size)?;
    dict.set_item("max_io_bytes", info.max_io_bytes)?;
    dict.set_item("read_only", params.read_only)?;
    dict.set_item("recovery", Recovery::from_features(info.features).map(Recovery::name))?;
    Ok(dict)
}
