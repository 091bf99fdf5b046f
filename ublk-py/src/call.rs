// SPDX-License-Identifier: MIT OR Apache-2.0

//! Calls of handlers without a tuple of their arguments.
//!
//! PyO3 makes a tuple for each call if the package supports Python 3.11, where vector calls do not belong to the stable ABI.
//! But each interpreter since then exports the function.

use std::ffi::c_void;

use pyo3::ffi::PyObject;
use pyo3::prelude::*;

/// That the argument before the first one may be overwritten (`PY_VECTORCALL_ARGUMENTS_OFFSET`).
const ARGUMENTS_OFFSET: usize = 1 << (usize::BITS - 1);

unsafe extern "C" {
    /// `cpython/abstract.h`; since Python 3.12 in the stable ABI.
    fn PyObject_Vectorcall(
        callable: *mut PyObject,
        args: *const *mut PyObject,
        nargsf: usize,
        kwnames: *mut c_void,
    ) -> *mut PyObject;
}

/// Calls a function with an offset and another argument.
pub(crate) fn call_at<'py>(
    function: &Bound<'py, PyAny>,
    offset: u64,
    argument: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let py = function.py();
    let offset = offset.into_pyobject(py)?;
    // The first one is for the object that a method is bound to.
    let mut arguments = [std::ptr::null_mut(), offset.as_ptr(), argument.as_ptr()];
    // SAFETY: the thread is attached. The objects and the array live until the call has returned, and the array begins one
    // element before the two arguments.
    let returned = unsafe {
        let first = arguments.as_mut_ptr().add(1);
        PyObject_Vectorcall(function.as_ptr(), first, 2 | ARGUMENTS_OFFSET, std::ptr::null_mut())
    };
    // SAFETY: the call has returned a new reference, or null with an exception set.
    unsafe { Bound::from_owned_ptr_or_err(py, returned) }
}
