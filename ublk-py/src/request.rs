// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests as Python objects, which can be ended at any time and from any thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pyo3::exceptions::{PyNotImplementedError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyMemoryView, PyTuple};
use ublk_core::extents::Moment;
use ublk_core::pull::uncork_if_slow;
use ublk_core::{DetachedRequest, Errno, Op};

use crate::buffer::Lease;
use crate::call::call_at;
use crate::extents::{ATTEMPTS, DiskExtents, Returned, forward_returned, is_extent};
use crate::flushes::Flush;
use crate::holders::{Holders, Revoke};
use crate::interpreter;
use crate::methods::{check_return, to_handlers_errno};
use crate::operations::{op_name, op_object};
use crate::pending::unraisable;

/// Request of the block layer.
#[pyclass(frozen, weakref, module = "ublk", name = "Request")]
#[derive(Debug)]
pub(crate) struct PyRequest {
    op: Op,
    offset: u64,
    length: u64,
    fua: bool,
    no_unmap: bool,
    queue: u16,
    device: u32,
    extents: DiskExtents,
    ending: Arc<Ending>,
}

/// State of a request that has not ended.
#[derive(Debug)]
pub(crate) struct Ending(Mutex<State>);

#[derive(Debug)]
struct State {
    request: Option<DetachedRequest>,
    /// When its handler was called, for the check of an extent that the handler returns.
    asked: Moment,
    /// How often the extent that the handler returned was invalidated meanwhile.
    stale: u32,
    /// View of its memory that Python has.
    lease: Option<Lease>,
    /// Whether the memory of a read was cleared, before Python first got it.
    cleared: bool,
    /// The flush, if it is one.
    flush: Option<Flush>,
}

impl Ending {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the request back from Python, with its memory.
    fn take(&self, py: Python<'_>) -> Option<DetachedRequest> {
        let (request, lease) = {
            let mut state = self.state();
            (state.request.take(), state.lease.take())
        };
        let mut request = request?;
        if lease.is_some_and(|lease| !lease.end(py).0) {
            // A view is still in use: it keeps the memory, and the tag gets fresh memory.
            request.replace_buffer();
        }
        Some(request)
    }

    /// Like [`take`](Ending::take), to complete the request. A read whose memory Python has not got returns zeros.
    fn take_done(&self, py: Python<'_>) -> Option<DetachedRequest> {
        let cleared = self.state().cleared;
        let mut request = self.take(py)?;
        if !cleared {
            request.clear();
        }
        Some(request)
    }

    /// Ends a request that was taken.
    fn finish(&self, request: DetachedRequest, result: Result<(), Errno>) {
        let flush = self.state().flush.take();
        match flush {
            Some(flush) => flush.end(request, result),
            None => request.finish(result),
        }
    }

    /// Fails the request unless it has ended.
    pub(crate) fn fail_if_left(&self, py: Python<'_>, errno: Errno) {
        if let Some(request) = self.take(py) {
            self.finish(request, Err(errno));
        }
    }
}

impl Revoke for Ending {
    fn revoke(&self, py: Python<'_>) -> bool {
        let is_left = self.state().request.is_some();
        self.fail_if_left(py, Errno::EIO);
        is_left
    }
}

impl PyRequest {
    /// Creates a request object. `extents` are those of its block device.
    pub(crate) fn new(request: DetachedRequest, extents: &DiskExtents, holders: &Holders) -> Self {
        let asked = extents.map.now();
        let flush = (request.op() == Op::Flush).then(|| extents.flushes.begin());
        let (op, offset, length) = (request.op(), request.offset(), request.len());
        let (fua, no_unmap) = (request.force_unit_access(), request.no_unmap());
        let (queue, device) = (request.queue().0, request.device().0);
        let state = State { request: Some(request), asked, stale: 0, lease: None, cleared: false, flush };
        let ending = Arc::new(Ending(Mutex::new(state)));
        let weak: Weak<Ending> = Arc::downgrade(&ending);
        holders.add(weak);
        PyRequest { op, offset, length, fua, no_unmap, queue, device, extents: extents.clone(), ending }
    }

    /// Returns a handle that can end the request later, without keeping the object alive.
    pub(crate) fn ending(&self) -> Arc<Ending> {
        self.ending.clone()
    }

    fn end(&self, py: Python<'_>, result: Result<(), Errno>) -> PyResult<()> {
        let taken = if result.is_ok() { self.ending.take_done(py) } else { self.ending.take(py) };
        self.ending.finish(taken.ok_or_else(over)?, result);
        Ok(())
    }
}

fn over() -> PyErr {
    PyValueError::new_err("the request has ended")
}

#[pymethods]
impl PyRequest {
    /// Operation of the request, an `ublk.Op`.
    #[getter]
    fn op(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        op_object(py, self.op)
    }

    /// First byte on the disk; 0 for a flush.
    #[getter]
    fn offset(&self) -> u64 {
        self.offset
    }

    /// Length in bytes; 0 for a flush.
    #[getter]
    fn length(&self) -> u64 {
        self.length
    }

    /// Whether the write must be durable before it is acknowledged (FUA). Linux sends FUA writes only to disks that
    /// advertise them; others get a flush after the write.
    #[getter]
    fn fua(&self) -> bool {
        self.fua
    }

    /// Whether zeroed blocks must stay allocated.
    #[getter]
    fn no_unmap(&self) -> bool {
        self.no_unmap
    }

    /// Number of the hardware queue that delivered the request.
    #[getter]
    fn queue(&self) -> u16 {
        self.queue
    }

    /// Whether the request has been completed or failed.
    #[getter]
    fn done(&self) -> bool {
        self.ending.state().request.is_none()
    }

    /// The request's own memory, with the data of a write (read-only) or for the data of a read. Valid until the
    /// request ends; empty for requests without data.
    #[getter]
    fn buffer<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyMemoryView>> {
        let memory = {
            let mut state = self.ending.state();
            let State { request, lease, cleared, .. } = &mut *state;
            let request = request.as_mut().ok_or_else(over)?;
            if let Some(lease) = lease {
                return Ok(lease.view(py).clone());
            }
            if !std::mem::replace(cleared, true) {
                request.clear();
            }
            self.op.has_data().then(|| request.buffer().clone())
        };
        let Some(memory) = memory else { return PyMemoryView::from(&PyBytes::new(py, b"")) };
        // Not under the lock: creating an object may run any finalizer.
        let lease = Lease::new(py, &memory, self.length as usize, !self.op.fills())?;
        let view = lease.view(py).clone();
        let late = {
            let mut state = self.ending.state();
            if state.request.is_some() && state.lease.is_none() {
                state.lease = Some(lease);
                return Ok(view);
            }
            lease
        };
        // Another thread has ended the request meanwhile, or has created the buffer, too.
        drop(view);
        late.end(py);
        self.buffer(py)
    }

    /// Complete the request in full.
    fn complete(&self, py: Python<'_>) -> PyResult<()> {
        self.end(py, Ok(()))
    }

    /// Fail the request with an errno.
    #[pyo3(signature = (errno = 5))]
    fn fail(&self, py: Python<'_>, errno: i32) -> PyResult<()> {
        let errno = Errno::new(errno)
            .ok_or_else(|| PyValueError::new_err(format!("errno = {errno}: must be from 1 to 4095")))?;
        self.end(py, Err(errno))
    }

    fn __enter__(slf: Py<Self>) -> Py<Self> {
        slf
    }

    /// Complete the request unless the block has ended it, or fail it with the exception's errno. Exceptions without an
    /// errno propagate.
    fn __exit__(
        &self,
        py: Python<'_>,
        _kind: &Bound<'_, PyAny>,
        value: &Bound<'_, PyAny>,
        _traceback: &Bound<'_, PyAny>,
    ) -> PyResult<bool> {
        if value.is_none() {
            if let Some(request) = self.ending.take_done(py) {
                self.ending.finish(request, Ok(()));
            }
            return Ok(false);
        }
        let Some(request) = self.ending.take(py) else { return Ok(false) };
        let errno = to_handlers_errno(py, &PyErr::from_value(value.clone()));
        self.ending.finish(request, Err(errno.unwrap_or(Errno::EIO)));
        Ok(errno.is_some())
    }

    /// Call the handler of the operation, of five: for read, write, flush, discard and write_zeroes. Returns what it returns;
    /// `None`, without a call, if the request has ended.
    fn _call<'py>(slf: &Bound<'py, Self>, methods: &Bound<'py, PyTuple>) -> PyResult<Option<Bound<'py, PyAny>>> {
        let (py, this) = (slf.py(), slf.get());
        let number = match this.op {
            Op::Read => 0,
            Op::Write => 1,
            Op::Flush => 2,
            Op::Discard => 3,
            Op::WriteZeroes => 4,
            _ => return Err(PyNotImplementedError::new_err(())),
        };
        if this.done() {
            return Ok(None);
        }
        let method = methods.get_borrowed_item(number)?;
        if method.is_none() {
            // An operation that the class declares, because `map` is meant to handle all of its requests.
            return Err(PyNotImplementedError::new_err(()));
        }
        uncork_if_slow();
        let returned = match this.op {
            Op::Read | Op::Write => {
                let buffer = this.buffer(py)?;
                call_at(&method, this.offset, &buffer)
            }
            Op::Flush => method.call0(),
            _ => method.call1((this.offset, this.length)),
        };
        returned.map(Some)
    }

    /// End the request according to a handler's return value. Return false if the handler must be called again.
    fn _finish(&self, py: Python<'_>, returned: &Bound<'_, PyAny>) -> PyResult<bool> {
        // A handler that has ended the request may return anything.
        if self.done() {
            return Ok(true);
        }
        let _permit = interpreter::permit()?;
        if is_extent(self.op, returned) {
            let Some(request) = self.ending.take(py) else { return Ok(true) };
            let asked = self.ending.state().asked;
            let (request, outcome) = match forward_returned(request, returned, op_name(self.op), &self.extents, asked) {
                Returned::Forwarded => return Ok(true),
                Returned::Refused(request, error) => (request, Err(error)),
                Returned::Stale(request) => (request, Ok(false)),
            };
            let mut state = self.ending.state();
            (state.request, state.asked) = (Some(request), self.extents.map.now());
            state.stale += 1;
            if state.stale < ATTEMPTS {
                return outcome;
            }
            let text = format!("the extent that the handler returned was invalidated {ATTEMPTS} times in a row");
            return outcome.and(Err(PyRuntimeError::new_err(text)));
        }
        check_return(returned, self.op.has_data().then_some(self.length))?;
        self.extents.flushes.handled(self.op);
        self.end(py, Ok(()))?;
        Ok(true)
    }

    /// End the request according to a handler's exception. False if that is not an errno: the request has not ended then.
    fn _raise(&self, py: Python<'_>, exception: &Bound<'_, PyAny>) -> bool {
        let errno = to_handlers_errno(py, &PyErr::from_value(exception.clone()));
        if let Some(errno) = errno {
            self.ending.fail_if_left(py, errno);
        }
        errno.is_some()
    }

    fn __repr__(&self) -> String {
        let done = if self.done() { " done" } else { "" };
        let name = op_name(self.op);
        format!(
            "<ublk.Request {name} {}+{} of ublkb{} queue {}{done}>",
            self.offset, self.length, self.device, self.queue
        )
    }
}

/// Fails a request that has not ended, and logs that.
impl Drop for PyRequest {
    fn drop(&mut self) {
        if self.done() {
            return;
        }
        let text = format!("{} {}+{} of ublkb{}", op_name(self.op), self.offset, self.length, self.device);
        interpreter::attach(|py| {
            // An exception that is set stays set.
            let pending = PyErr::take(py);
            let logged = py.import("ublk._requests").and_then(|module| module.call_method1("dropped", (text,)));
            if let Err(error) = logged {
                unraisable(py, error);
            }
            if let Some(pending) = pending {
                pending.restore(py);
            }
        });
        // The thread is attached, as for each drop of a Python object; this runs no Python code.
        Python::try_attach(|py| self.ending.fail_if_left(py, Errno::EIO));
    }
}
