// SPDX-License-Identifier: MIT OR Apache-2.0

//! Calls in the main thread, between two of its bytecode instructions.
//!
//! Invariant that the `unsafe` blocks of this file refer to:
//!
//! 1. The interpreter receives its own reference to a live object. It passes the reference to [`call`], once, attached, or
//!    rejects it.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::PyRuntimeError;
use pyo3::ffi;
use pyo3::prelude::*;

/// Makes the main thread call a function soon. Exceptions of the function are reported as unraisable.
#[pyfunction]
pub(crate) fn call_in_main_thread(py: Python<'_>, function: Py<PyAny>) -> PyResult<()> {
    let argument = function.into_ptr();
    // SAFETY: (1).
    if unsafe { ffi::Py_AddPendingCall(Some(call), argument.cast()) } == 0 {
        return Ok(());
    }
    // SAFETY: (1): it was rejected, so this function owns the reference again.
    drop(unsafe { Bound::from_owned_ptr(py, argument) });
    Err(PyRuntimeError::new_err("too many calls wait for the main thread"))
}

extern "C" fn call(function: *mut c_void) -> c_int {
    Python::try_attach(|py| {
        // SAFETY: (1).
        let function = unsafe { Bound::from_owned_ptr(py, function.cast()) };
        if let Err(error) = function.call0() {
            error.write_unraisable(py, None);
        }
    });
    0
}
