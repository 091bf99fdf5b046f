// SPDX-License-Identifier: MIT OR Apache-2.0

//! Errors in both directions.

use pyo3::exceptions::{PyMemoryError, PyNotImplementedError, PyOSError, PyTimeoutError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use ublk_core::{Errno, Error};

/// A failure of the library as Python knows it: `ValueError` for impossible values, else
/// `ublk.UblkError` with the errno.
pub(crate) fn to_python(py: Python<'_>, error: &Error) -> PyErr {
    static CLASS: PyOnceLock<Py<PyAny>> = PyOnceLock::new();
    // An exception that came through the core, from starting a thread say, is itself.
    if let Error::Target { source, .. } = error
        && let Some(exception) = source.get_ref().and_then(|inner| inner.downcast_ref::<PyErr>())
    {
        return exception.clone_ref(py);
    }
    if matches!(error, Error::InvalidValue { .. }) {
        return PyValueError::new_err(error.to_string());
    }
    let class = CLASS.get_or_try_init(py, || py.import("ublk._errors")?.getattr("UblkError").map(Bound::unbind));
    let made = class.and_then(|class| class.bind(py).call1((error.errno() as i32, error.to_string())));
    match made {
        Ok(value) => PyErr::from_value(value),
        Err(error) => error,
    }
}

/// An errno as `OSError`.
pub(crate) fn os_error(errno: Errno) -> PyErr {
    PyOSError::new_err((errno as i32, errno.desc()))
}

/// The errno that says what a handler's exception says, if there is one.
pub(crate) fn to_errno(py: Python<'_>, error: &PyErr) -> Option<Errno> {
    if error.is_instance_of::<PyOSError>(py) {
        let value = error.value(py).getattr(pyo3::intern!(py, "errno")).and_then(|e| e.extract::<i32>());
        return match value {
            Ok(errno) if (1..4096).contains(&errno) => Some(Errno::from_raw(errno)),
            _ if error.is_instance_of::<PyTimeoutError>(py) => Some(Errno::ETIMEDOUT),
            _ => None,
        };
    }
    if error.is_instance_of::<PyNotImplementedError>(py) {
        return Some(Errno::EOPNOTSUPP);
    }
    error.is_instance_of::<PyMemoryError>(py).then_some(Errno::ENOMEM)
}
