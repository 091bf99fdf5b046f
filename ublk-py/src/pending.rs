// SPDX-License-Identifier: MIT OR Apache-2.0

//! Calls in the main thread, between two of its bytecode instructions.
//!
//! Invariant that the `unsafe` blocks of this file refer to:
//!
//! 1. The interpreter receives its own reference to a live object. It passes the reference to [`call`] or [`raise`], once,
//!    attached, or rejects it.

use std::ffi::{c_int, c_void};

use pyo3::exceptions::{PyException, PyRuntimeError};
use pyo3::ffi;
use pyo3::prelude::*;

/// Makes the main thread call a function soon. An `Exception` of the function is reported as unraisable; exceptions that
/// signal handlers raise meanwhile are raised in the main thread.
#[pyfunction]
pub(crate) fn call_in_main_thread(py: Python<'_>, function: Py<PyAny>) -> PyResult<()> {
    add(py, call, function)
}

/// Reports an exception that the caller cannot raise. What a signal's handler has raised in the main thread is the
/// program's: that is raised soon.
pub(crate) fn unraisable(py: Python<'_>, error: PyErr) {
    if error.is_instance_of::<PyException>(py)
        || !is_main_thread(py)
        || add(py, raise, error.clone_ref(py).into_value(py).into_any()).is_err()
    {
        error.write_unraisable(py, None);
    }
}

fn is_main_thread(py: Python<'_>) -> bool {
    let compare = || {
        let threading = py.import("threading")?;
        threading.call_method0("get_ident")?.eq(threading.call_method0("main_thread")?.getattr("ident")?)
    };
    // If it is, a signal may come meanwhile, too.
    compare().unwrap_or_else(|error: PyErr| !error.is_instance_of::<PyException>(py))
}

/// Has the main thread call `act` with `argument`.
fn add(py: Python<'_>, act: extern "C" fn(*mut c_void) -> c_int, argument: Py<PyAny>) -> PyResult<()> {
    let argument = argument.into_ptr();
    // SAFETY: (1).
    if unsafe { ffi::Py_AddPendingCall(Some(act), argument.cast()) } == 0 {
        return Ok(());
    }
    // SAFETY: (1): it was rejected, so this function owns the reference again.
    drop(unsafe { Bound::from_owned_ptr(py, argument) });
    Err(PyRuntimeError::new_err("too many calls wait for the main thread"))
}

extern "C" fn call(function: *mut c_void) -> c_int {
    let done = Python::try_attach(|py| {
        // SAFETY: (1).
        let function = unsafe { Bound::from_owned_ptr(py, function.cast()) };
        match function.call0() {
            Ok(_) => 0,
            Err(error) if error.is_instance_of::<PyException>(py) => {
                error.write_unraisable(py, None);
                0
            }
            Err(error) => {
                error.restore(py);
                -1
            }
        }
    });
    done.unwrap_or(0)
}

extern "C" fn raise(exception: *mut c_void) -> c_int {
    let raised = Python::try_attach(|py| {
        // SAFETY: (1).
        let exception = unsafe { Bound::from_owned_ptr(py, exception.cast()) };
        PyErr::from_value(exception).restore(py);
    });
    if raised.is_some() { -1 } else { 0 }
}
