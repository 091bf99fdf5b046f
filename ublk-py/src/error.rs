// SPDX-License-Identifier: MIT OR Apache-2.0

//! Conversion of errors from and to Python exceptions.

use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyOSError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use ublk_core::{Errno, Error};

/// Converts an error of the library: to `ValueError` for invalid values, otherwise to `ublk.UblkError` with
/// the errno.
pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // An exception that passed through the core, from starting a thread for example, stays itself.
    if let Error::Target { source, .. } = error
        && let Some(exception) = source.get_ref().and_then(|inner| inner.downcast_ref::<PyErr>())
    {
        return exception.clone_ref(py);
    }
    if error.is_invalid_input() {
        return PyValueError::new_err(error.to_string());
    }
    let class = CLASS.get_or_try_init(py, || py.import("ublk._errors")?.getattr("UblkError").map(Bound::unbind));
    let made = class.and_then(|class| class.bind(py).call1((error.errno().get(), error.to_string())));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// Returns an `OSError` with an errno.
pub(crate) fn os_error(errno: Errno) -> PyErr {
    PyOSError::new_err((errno.get(), errno.known().desc()))
}

/// Returns the errno that corresponds to an exception of a handler, if there is one.
pub(crate) fn to_errno(py: Python<'_>, error: &PyErr) -> Option<Errno> {
    if error.is_instance_of::<PyOSError>(py) {
        let value = error.value(py).getattr(pyo3::intern!(py, "errno")).and_then(|e| e.extract::<i32>());
        let timed_out = || error.is_instance_of::<PyTimeoutError>(py).then_some(Errno::ETIMEDOUT);
        return value.ok().and_then(Errno::new).or_else(timed_out);
    }
    if error.is_instance_of::<PyNotImplementedError>(py) {
        return Some(Errno::EOPNOTSUPP);
    }
    error.is_instance_of::<PyMemoryError>(py).then_some(Errno::ENOMEM)
}
