// SPDX-License-Identifier: MIT OR Apache-2.0

//! Methods of a block device: one call for each request, and the conversion of its outcome.

use pyo3::exceptions::{PyException, PyTypeError, PyValueError};
use pyo3::prelude::*;
use ublk_core::{DetachedRequest, Errno, Op};

use crate::any_request::AnyRequest;
use crate::buffer::CachedBuffer;
use crate::call::call_at;
use crate::error::to_errno;
use crate::extents::{ATTEMPTS, Extents, Returned, forward_returned, is_extent};
use crate::held::{Held, Hold};
use crate::holders::Holders;
use crate::operations::op_name;

/// Bound methods of a block device.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Methods {
    read: Py<PyAny>,
    write: Option<Py<PyAny>>,
    flush: Option<Py<PyAny>>,
    discard: Option<Py<PyAny>>,
    write_zeroes: Option<Py<PyAny>>,
    /// Methods of a zoned disk.
    #[pyo3(item("zones"), default)]
    zones: Option<Zones>,
    /// Extents, which methods may return.
    extents: Py<Extents>,
    /// Called with `(operation, exception)` for an exception that is not an errno.
    report: Py<PyAny>,
}

/// Bound methods of a zoned disk.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
struct Zones {
    zone_append: Option<Py<PyAny>>,
    zone_open: Option<Py<PyAny>>,
    zone_close: Option<Py<PyAny>>,
    zone_finish: Option<Py<PyAny>>,
    zone_reset: Option<Py<PyAny>>,
    zone_reset_all: Option<Py<PyAny>>,
    /// Called with `(offset, buffer)`, for an array of `struct blk_zone`.
    report_zones: Option<Py<PyAny>>,
}

impl Zones {
    fn clone_ref(&self, py: Python<'_>) -> Self {
        let clone = |method: &Option<Py<PyAny>>| method.as_ref().map(|m| m.clone_ref(py));
        Zones {
            zone_append: clone(&self.zone_append),
            zone_open: clone(&self.zone_open),
            zone_close: clone(&self.zone_close),
            zone_finish: clone(&self.zone_finish),
            zone_reset: clone(&self.zone_reset),
            zone_reset_all: clone(&self.zone_reset_all),
            report_zones: clone(&self.report_zones),
        }
    }

    /// Returns the method for an operation.
    fn of(&self, op: Op) -> Option<&Py<PyAny>> {
        match op {
            Op::ZoneAppend => self.zone_append.as_ref(),
            Op::ZoneOpen => self.zone_open.as_ref(),
            Op::ZoneClose => self.zone_close.as_ref(),
            Op::ZoneFinish => self.zone_finish.as_ref(),
            Op::ZoneReset => self.zone_reset.as_ref(),
            Op::ZoneResetAll => self.zone_reset_all.as_ref(),
            Op::ReportZones => self.report_zones.as_ref(),
            _ => None,
        }
    }
}

impl Methods {
    pub(crate) fn clone_ref(&self, py: Python<'_>) -> Self {
        let clone = |method: &Option<Py<PyAny>>| method.as_ref().map(|m| m.clone_ref(py));
        Methods {
            read: self.read.clone_ref(py),
            write: clone(&self.write),
            flush: clone(&self.flush),
            discard: clone(&self.discard),
            write_zeroes: clone(&self.write_zeroes),
            zones: self.zones.as_ref().map(|zones| zones.clone_ref(py)),
            extents: self.extents.clone_ref(py),
            report: self.report.clone_ref(py),
        }
    }

    /// Registers the waiting flushes with the holders of a device.
    pub(crate) fn know_flushes(&self, holders: &Holders) {
        self.extents.get().0.flushes.known(holders);
    }

    /// Calls the method for a request and ends the request accordingly. `buffer` is the buffer object of its memory. The
    /// request is in `held` while the method runs; if it is not there any more, it was revoked.
    pub(crate) fn serve<'q, R: AnyRequest<'q>>(
        &self,
        py: Python<'_>,
        buffer: &mut CachedBuffer,
        held: &impl Hold<R>,
        mut request: R,
    ) {
        for _ in 0..ATTEMPTS {
            match self.try_to_serve(py, buffer, held, request) {
                Some(stale) => request = stale,
                None => return,
            }
        }
        log::error!("{request:?}: what its handler returned was invalidated {ATTEMPTS} times in a row");
        request.into().fail(Errno::EIO);
    }

    /// Calls the method for a flush, and ends it according to that and to concurrent flushes.
    pub(crate) fn flush(&self, py: Python<'_>, held: &Held<DetachedRequest>, request: DetachedRequest) {
        let flush = self.extents.get().0.flushes.begin();
        held.put_flush(request, flush);
        let returned = call(&self.flush, |method| method.bind(py).call0());
        let left = held.take_flush();
        let outcome = returned.and_then(|returned| match returned {
            Some(value) => check_return(&value, None).map(Ok),
            None => Ok(Err(Errno::EOPNOTSUPP)),
        });
        let result = outcome.unwrap_or_else(|error| Err(self.errno_of(py, op_name(Op::Flush), &error)));
        // Otherwise it was revoked, and counts as failed.
        if let Some((request, flush)) = left {
            flush.end(request, result);
        }
    }

    /// Returns the request if its extent was invalidated meanwhile.
    fn try_to_serve<'q, R: AnyRequest<'q>>(
        &self,
        py: Python<'_>,
        buffer: &mut CachedBuffer,
        held: &impl Hold<R>,
        request: R,
    ) -> Option<R> {
        let op = request.get().op();
        let (offset, len) = (request.get().offset(), request.get().len());
        let extents = &self.extents.get().0;
        let asked = extents.map.now();
        let zone_method = || self.zones.as_ref().and_then(|zones| zones.of(op));
        let method = match op {
            Op::Read => Some(&self.read),
            Op::Write => self.write.as_ref(),
            // Served by `flush`.
            Op::Flush => None,
            Op::Discard => self.discard.as_ref(),
            Op::WriteZeroes => self.write_zeroes.as_ref(),
            _ => zone_method(),
        };
        let (request, returned) = match (op, method) {
            (_, None) => (Some(request), Ok(None)),
            (Op::Read | Op::Write | Op::ZoneAppend | Op::ReportZones, Some(method)) => {
                with_data(py, method, buffer, held, request)
            }
            (_, Some(method)) => {
                let (request, returned) = held.during(request, || match op {
                    Op::Discard | Op::WriteZeroes => method.bind(py).call1((offset, len)),
                    Op::ZoneResetAll => method.bind(py).call0(),
                    _ => method.bind(py).call1((offset,)),
                });
                (request, returned.map(Some))
            }
        };
        let Some(request) = request else {
            // It was revoked meanwhile.
            if let Err(error) = returned {
                self.errno_of(py, op_name(op), &error);
            }
            return None;
        };
        // The usual case.
        if let Ok(Some(value)) = &returned
            && value.is_none()
            && op != Op::ZoneAppend
        {
            extents.flushes.handled(op);
            request.into().complete();
            return None;
        }
        if op == Op::ZoneAppend
            && let Ok(Some(value)) = &returned
        {
            let landed = value.extract::<u64>();
            match landed {
                Ok(landed) => request.into().complete_append(landed),
                Err(_) => {
                    let text = "zone_append must return where on the disk the data is";
                    request.into().fail(self.errno_of(py, op_name(op), &PyTypeError::new_err(text)));
                }
            }
            return None;
        }
        if let Ok(Some(value)) = &returned
            && is_extent(op, value)
        {
            match forward_returned(request, value, op_name(op), extents, asked) {
                Returned::Forwarded => {}
                Returned::Stale(request) => return Some(request),
                Returned::Refused(request, error) => request.into().fail(self.errno_of(py, op_name(op), &error)),
            }
            return None;
        }
        let outcome = returned.and_then(|returned| match returned {
            Some(value) => check_return(&value, op.has_data().then_some(len)).map(Ok),
            None => Ok(Err(Errno::EOPNOTSUPP)),
        });
        match outcome {
            Ok(result) => {
                if result.is_ok() {
                    extents.flushes.handled(op);
                }
                request.into().finish(result);
            }
            Err(error) => request.into().fail(self.errno_of(py, op_name(op), &error)),
        }
        None
    }

    /// Returns the errno for an exception: `EIO`, with a report, if the exception has none.
    pub(crate) fn errno_of(&self, py: Python<'_>, operation: &str, error: &PyErr) -> Errno {
        to_handlers_errno(py, error).unwrap_or_else(|| {
            report(py, &self.report, operation, error);
            Errno::EIO
        })
    }
}

/// Calls `read` or `write` with a view of the request's memory. Returns the request unless it was revoked meanwhile.
fn with_data<'py, 'q, R: AnyRequest<'q>>(
    py: Python<'py>,
    method: &Py<PyAny>,
    buffer: &mut CachedBuffer,
    held: &impl Hold<R>,
    mut request: R,
) -> (Option<R>, PyResult<Option<Bound<'py, PyAny>>>) {
    // Bytes that a handler leaves unwritten must not be another request's data.
    request.get_mut().clear();
    let (offset, len) = (request.get().offset(), request.get().len() as usize);
    let lease = match buffer.lease(py, request.get().buffer(), len, !request.get().op().fills()) {
        Ok(lease) => lease,
        Err(error) => return (Some(request), Err(error)),
    };
    let (mut request, returned) = held.during(request, || call_at(method.bind(py), offset, lease.view(py)));
    // A traceback holds the handler's frame and so the view; that does not keep the memory from being
    // reused, because `end` releases the view.
    let is_free = buffer.end(py, lease);
    if !is_free && let Some(request) = &mut request {
        // A view is still in use: it keeps the memory, and the tag gets fresh memory.
        request.get_mut().replace_buffer();
    }
    (request, returned.map(Some))
}

/// Calls a method if the class has it. The kernel does not request operations whose methods are missing.
fn call<'py>(
    method: &Option<Py<PyAny>>,
    call: impl FnOnce(&Py<PyAny>) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    method.as_ref().map(call).transpose()
}

/// Reports an exception that is not an errno to Python.
pub(crate) fn report(py: Python<'_>, report: &Py<PyAny>, operation: &str, error: &PyErr) {
    // Not `value`, which has no traceback before Python 3.12.
    let exception = error.clone_ref(py).into_value(py);
    if let Err(second) = report.call1(py, (operation, exception)) {
        second.write_unraisable(py, None);
    }
}

/// Returns the errno of a handler's exception. `None` for programming errors and for exceptions like `SystemExit`.
pub(crate) fn to_handlers_errno(py: Python<'_>, error: &PyErr) -> Option<Errno> {
    to_errno(py, error).filter(|_| error.is_instance_of::<PyException>(py))
}

/// Checks the return value of a handler: `None`, or the number of bytes, which must be all of them.
pub(crate) fn check_return(value: &Bound<'_, PyAny>, len: Option<u64>) -> PyResult<()> {
    if value.is_none() {
        return Ok(());
    }
    match (value.extract::<i64>(), len) {
        (Ok(count), Some(len)) if count == len as i64 => Ok(()),
        (Ok(count), Some(len)) => {
            Err(PyValueError::new_err(format!("the handler returned {count}, but the request has {len} bytes")))
        }
        (_, Some(_)) => Err(PyTypeError::new_err(format!(
            "the handler returned {}; it must return None or the number of bytes, and put data into the buffer, or return an extent",
            value.get_type().name()?
        ))),
        (_, None) => {
            Err(PyTypeError::new_err(format!("the handler returned {}; it must return None", value.get_type().name()?)))
        }
    }
}
