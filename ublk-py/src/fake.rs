// SPDX-License-Identifier: MIT OR Apache-2.0

//! The stand-in driver, for tests of Python block devices without a kernel.

use pyo3::prelude::*;
use pyo3::types::PyBytes;
use ublk_core::driver::fake::{FakeDisk, FakeDriver as Inner};
use ublk_core::{DeviceId, Errno};

use crate::error::os_error;

/// A driver in this process, and the client of its disks.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct FakeDriver(Inner);

/// What clients read where a handler has left bytes unwritten. The kernel's get zeros.
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

#[pymethods]
impl FakeDriver {
    #[new]
    fn new() -> Self {
        let driver = Inner::new();
        driver.poison_reads(POISON);
        FakeDriver(driver)
    }

    fn read<'py>(&self, py: Python<'py>, id: u32, offset: u64, length: usize) -> PyResult<Bound<'py, PyBytes>> {
        let bytes = check(py.detach(|| self.disk(id).read(offset, length)))?;
        Ok(PyBytes::new(py, &bytes))
    }

    fn write(&self, py: Python<'_>, id: u32, offset: u64, data: &[u8]) -> PyResult<()> {
        check(py.detach(|| self.disk(id).write(offset, data)))
    }

    /// Sends `rounds` times `depth` reads of 4 KiB, for those who measure what a device does with them. It has one
    /// queue, of that depth at least.
    fn load(&self, py: Python<'_>, id: u32, rounds: usize, depth: usize) -> PyResult<()> {
        check(py.detach(|| {
            let disk = self.disk(id);
            // So that all tags have been lent.
            disk.read(0, 4096)?;
            (0..rounds).try_for_each(|_| disk.read_at_once(depth, 4096))
        }))
    }

    fn flush(&self, py: Python<'_>, id: u32) -> PyResult<()> {
        check(py.detach(|| self.disk(id).flush()))
    }

    fn discard(&self, py: Python<'_>, id: u32, offset: u64, length: usize) -> PyResult<()> {
        check(py.detach(|| self.disk(id).discard(offset, length)))
    }

    fn write_zeroes(&self, py: Python<'_>, id: u32, offset: u64, length: usize) -> PyResult<()> {
        check(py.detach(|| self.disk(id).write_zeroes(offset, length)))
    }

    /// Ids of the devices that exist.
    fn devices(&self) -> PyResult<Vec<u32>> {
        use ublk_core::driver::Driver;
        Ok(self.0.device_ids()?.into_iter().map(|id| id.0).collect())
    }

    /// Rules of the driver that the server broke.
    fn violations(&self) -> Vec<String> {
        self.0.violations()
    }
}
