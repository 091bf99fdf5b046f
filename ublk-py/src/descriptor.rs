// SPDX-License-Identifier: MIT OR Apache-2.0

//! Open files given by Python objects.

use std::os::fd::{BorrowedFd, RawFd};

use pyo3::prelude::*;
use ublk_core::Errno;

use crate::error::os_error;
use crate::interpreter;

/// Calls `fdatasync` once. `os.fdatasync` would repeat it after `EINTR`.
#[pyfunction]
pub(crate) fn fdatasync(py: Python<'_>, file: &Bound<'_, PyAny>) -> PyResult<()> {
    interpreter::check_return()?;
    with_descriptor(file, |file| {
        let (result, _permit) = interpreter::detached(py, || ublk_core::fdatasync(file));
        result.map_err(os_error)
    })
}

/// Calls a function with the file of a Python object, which is a descriptor or has a `fileno()`.
pub(crate) fn with_descriptor<T>(
    file: &Bound<'_, PyAny>,
    act: impl FnOnce(BorrowedFd<'_>) -> PyResult<T>,
) -> PyResult<T> {
    let number = match file.extract::<RawFd>() {
        Ok(number) => number,
        Err(_) => {
            let _permit = interpreter::permit()?;
            file.call_method0("fileno")?.extract()?
        }
    };
    if number < 0 {
        return Err(os_error(Errno::EBADF));
    }
    // SAFETY: it is not -1. The number is Python's, and used during this call only. If it is not open, system calls fail
    // with EBADF.
    act(unsafe { BorrowedFd::borrow_raw(number) })
}
