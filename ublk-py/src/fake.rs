// SPDX-License-Identifier: MIT OR Apache-2.0

//! The stand-in driver, for tests of Python block devices without a kernel.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ublk_core::fake::{FakeDisk, FakeDriver as Inner};
use ublk_core::{DeviceId, Errno};

use crate::error::os_error;
use crate::interpreter;

/// Stand-in driver in this process, and the client of its disks.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct FakeDriver(Inner);

/// Value that clients read where a handler has left bytes unwritten. With the kernel's driver they read zeros.
const POISON: u8 = 0xa5;

impl FakeDriver {
    pub(crate) fn inner(&self) -> Inner {
        self.0.clone()
    }

    fn disk(&self, id: u32) -> FakeDisk {
        self.0.disk(DeviceId(id))
    }
}

fn check<T>(result: Result<T, Errno>) -> PyResult<T> {
    result.map_err(os_error)
}

/// Raises `ValueError` for more than one request can have: sectors are counted in 32 bits.
fn check_length(length: usize) -> PyResult<()> {
    if length == 0 || length / 512 > u32::MAX as usize {
        return Err(PyValueError::new_err(format!("invalid length of a request: {length} bytes")));
    }
    Ok(())
}

#[pymethods]
impl FakeDriver {
    #[new]
    fn new() -> Self {
        let driver = Inner::new();
        driver.poison_reads(POISON);
        FakeDriver(driver)
    }

    fn read<'py>(&self, py: Python<'py>, id: u32, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        interpreter::check_return()?;
        let bytes = check(interpreter::detached(py, || self.disk(id).read(offset, length)).0)?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn write(&self, py: Python<'_>, id: u32, offset: u64, data: &[u8]) -> PyResult<()> {
        interpreter::check_return()?;
        check(interpreter::detached(py, || self.disk(id).write(offset, data)).0)
    }

    /// Sends `rounds` times `depth` reads of 4 KiB, for measurements. The device must have one queue of at least that
    /// depth.
    fn load(&self, py: Python<'_>, id: u32, rounds: usize, depth: usize) -> PyResult<()> {
        interpreter::check_return()?;
        check(
            interpreter::detached(py, || {
                let disk = self.disk(id);
                // All tags must have been fetched.
                disk.read(0, 4096)?;
                (0..rounds).try_for_each(|_| disk.read_at_once(depth, 4096))
            })
            .0,
        )
    }

    fn flush(&self, py: Python<'_>, id: u32) -> PyResult<()> {
        interpreter::check_return()?;
        check(interpreter::detached(py, || self.disk(id).flush()).0)
    }

    fn discard(&self, py: Python<'_>, id: u32, offset: u64, length: usize) -> PyResult<()> {
        interpreter::check_return()?;
        check_length(length)?;
        check(interpreter::detached(py, || self.disk(id).discard(offset, length)).0)
    }

    fn write_zeroes(&self, py: Python<'_>, id: u32, offset: u64, length: usize) -> PyResult<()> {
        interpreter::check_return()?;
        check_length(length)?;
        check(interpreter::detached(py, || self.disk(id).write_zeroes(offset, length)).0)
    }

    /// Returns the numbers of the devices.
    fn devices(&self) -> PyResult<Vec<u32>> {
        Ok(self.0.devices().into_iter().map(|id| id.0).collect())
    }

    /// Returns the violations of the driver's protocol by the server.
    fn violations(&self) -> Vec<String> {
        self.0.violations()
    }
}
