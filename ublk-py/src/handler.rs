// SPDX-License-Identifier: MIT OR Apache-2.0

//! A Python object as a target: the interpreter is entered once for all requests of a wake-up.

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::PyMemoryView;
use ublk_core::{Errno, Op, Operations, Params, QueueHandler, QueueInfo, Request, Requests, Result, Target};

use crate::buffer::Slot;
use crate::error::to_errno;

/// The bound methods of a block device.
#[derive(Debug)]
pub(crate) struct Methods {
    pub(crate) read: Py<PyAny>,
    pub(crate) write: Option<Py<PyAny>>,
    pub(crate) flush: Option<Py<PyAny>>,
    pub(crate) discard: Option<Py<PyAny>>,
    pub(crate) write_zeroes: Option<Py<PyAny>>,
    /// Called with `(operation, exception)` for an exception that is no errno.
    pub(crate) report: Py<PyAny>,
}

impl Methods {
    fn clone_ref(&self, py: Python<'_>) -> Self {
        let clone = |method: &Option<Py<PyAny>>| method.as_ref().map(|m| m.clone_ref(py));
        Methods {
            read: self.read.clone_ref(py),
            write: clone(&self.write),
            flush: clone(&self.flush),
            discard: clone(&self.discard),
            write_zeroes: clone(&self.write_zeroes),
            report: self.report.clone_ref(py),
        }
    }

    /// What the methods can do.
    pub(crate) fn operations(&self) -> Operations {
        let mut operations = Operations::empty();
        operations.set(Operations::WRITE, self.write.is_some());
        operations.set(Operations::FLUSH, self.flush.is_some());
        operations.set(Operations::DISCARD, self.discard.is_some());
        operations.set(Operations::WRITE_ZEROES, self.write_zeroes.is_some());
        operations
    }
}

/// A Python block device.
#[derive(Debug)]
pub(crate) struct PythonTarget {
    pub(crate) kind: String,
    pub(crate) params: Params,
    pub(crate) methods: Methods,
}

impl Target for PythonTarget {
    fn kind(&self) -> &str {
        &self.kind
    }

    fn params(&self) -> Params {
        self.params
    }

    fn open_queue(&self, info: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        let methods = Python::try_attach(|py| self.methods.clone_ref(py)).ok_or_else(shutting_down)?;
        let slots = (0..info.depth).map(|_| Slot::default()).collect();
        Ok(Box::new(PythonQueue(Some(State { methods, slots }))))
    }
}

fn shutting_down() -> ublk_core::Error {
    ublk_core::Error::Target {
        context: "opening a queue".into(),
        source: std::io::Error::other("the interpreter is shutting down"),
    }
}

/// One queue of a Python block device; the state is taken out when it is dropped.
struct PythonQueue(Option<State>);

struct State {
    methods: Methods,
    /// By tag.
    slots: Vec<Slot>,
}

impl QueueHandler for PythonQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        let Some(state) = &mut self.0 else { return };
        // Without an interpreter the requests are dropped with the closure and fail.
        Python::try_attach(|py| {
            for request in requests {
                state.serve(py, request);
            }
        });
    }
}

impl Drop for PythonQueue {
    fn drop(&mut self) {
        // Attached, so that the objects go now and not at some later attach.
        let state = self.0.take();
        Python::try_attach(|_| drop(state));
    }
}

impl State {
    fn serve(&mut self, py: Python<'_>, mut request: Request<'_>) {
        let op = request.op();
        let (offset, len) = (request.offset(), request.len());
        let outcome = match op {
            Op::Read => self.with_data(py, &mut request, true),
            Op::Write => self.with_data(py, &mut request, false),
            Op::Flush => call(&self.methods.flush, |method| method.bind(py).call0()),
            Op::Discard => call(&self.methods.discard, |method| method.bind(py).call1((offset, len))),
            Op::WriteZeroes => call(&self.methods.write_zeroes, |method| method.bind(py).call1((offset, len))),
            // The disk has no zones.
            _ => Ok(None),
        };
        let outcome = outcome.and_then(|returned| match returned {
            Some(value) => check_return(&value, op.has_data().then_some(len)).map(Ok),
            None => Ok(Err(Errno::EOPNOTSUPP)),
        });
        match outcome {
            Ok(result) => request.finish(result),
            Err(error) => {
                let errno = match to_errno(py, &error) {
                    Some(errno) if error.is_instance_of::<PyException>(py) => errno,
                    _ => {
                        self.report(py, op, &error);
                        Errno::EIO
                    }
                };
                request.fail(errno);
            }
        }
    }

    /// Calls `read` or `write` with a view on the request's memory.
    fn with_data<'py>(
        &mut self,
        py: Python<'py>,
        request: &mut Request<'_>,
        is_read: bool,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let method = if is_read { Some(&self.methods.read) } else { self.methods.write.as_ref() };
        let Some(method) = method else { return Ok(None) };
        let slot = &mut self.slots[usize::from(request.tag().0)];
        let lease = slot.lease(py, request.buffer(), request.len() as usize, !is_read)?;
        let arguments: (u64, &Bound<'py, PyMemoryView>) = (request.offset(), lease.view());
        let returned = method.bind(py).call1(arguments);
        // A traceback in flight holds the handler's frame and with it the view; it is no reason to give
        // the memory away, because `end` releases the view itself.
        if !slot.end(lease) {
            // A view is still alive: the memory stays with it, and the tag gets fresh memory.
            request.replace_buffer();
        }
        returned.map(Some)
    }

    /// Tells Python about an exception; the request fails with `EIO` whatever comes of it.
    fn report(&self, py: Python<'_>, op: Op, error: &PyErr) {
        let name = match op {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write_zeroes",
            _ => "a zone operation",
        };
        if let Err(second) = self.methods.report.call1(py, (name, error.value(py))) {
            second.write_unraisable(py, None);
        }
    }
}

/// Calls a method if the class has it. One that it lacks is not advertised, so the kernel does not ask.
fn call<'py>(
    method: &Option<Py<PyAny>>,
    call: impl FnOnce(&Py<PyAny>) -> PyResult<Bound<'py, PyAny>>,
) -> PyResult<Option<Bound<'py, PyAny>>> {
    method.as_ref().map(call).transpose()
}

/// A handler returns nothing, or how many bytes it did: all of them.
fn check_return(value: &Bound<'_, PyAny>, len: Option<u64>) -> PyResult<()> {
    use pyo3::exceptions::{PyTypeError, PyValueError};
    if value.is_none() {
        return Ok(());
    }
    match (value.extract::<i64>(), len) {
        (Ok(count), Some(len)) if count == len as i64 => Ok(()),
        (Ok(count), Some(len)) => {
            Err(PyValueError::new_err(format!("the handler returned {count}, but the request has {len} bytes")))
        }
        (_, Some(_)) => Err(PyTypeError::new_err(format!(
            "the handler returned {}; it must return None or the number of bytes, and put data into the buffer",
            value.get_type().name()?
        ))),
        (_, None) => {
            Err(PyTypeError::new_err(format!("the handler returned {}; it must return None", value.get_type().name()?)))
        }
    }
}
