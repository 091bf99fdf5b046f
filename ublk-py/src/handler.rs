// SPDX-License-Identifier: MIT OR Apache-2.0

//! Python objects as targets: the interpreter is entered once for all requests of a wake-up.

use std::sync::Arc;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use ublk_core::{Access, Errno, Params, QueueHandler, QueueInfo, Request, Requests, Result, Target};

use crate::buffer::Slot;
use crate::extents::{Mapped, Mapper};
use crate::methods::{Methods, report, to_handlers_errno};
use crate::request::PyRequest;
use crate::watch::{Seat, Watch};

/// How Python gets requests on the thread of their queue.
#[derive(Debug)]
pub(crate) enum Style {
    /// A method for each operation.
    Methods(Methods),
    /// The same, and one that says where bytes lie.
    Mapped(Methods, Mapper),
    /// One function for all requests of a wake-up.
    Batch(Batch),
}

/// A function that takes requests, and another for its exceptions.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Batch {
    handle: Py<PyAny>,
    report: Py<PyAny>,
}

/// A Python block device.
#[derive(Debug)]
pub(crate) struct PythonTarget {
    pub(crate) kind: String,
    pub(crate) params: Params,
    pub(crate) style: Style,
    pub(crate) watch: Watch,
}

impl Target for PythonTarget {
    fn kind(&self) -> &str {
        &self.kind
    }

    fn params(&self) -> Params {
        self.params
    }

    fn access(&self) -> Access {
        match self.style {
            // What files on block devices, opened for direct I/O, ask for.
            Style::Mapped(..) => Access::Forwards { memory_alignment: 512 },
            _ => Access::Bytes,
        }
    }

    fn open_queue(&self, info: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        let failed = |source| ublk_core::Error::Target { context: "opening a queue".into(), source };
        Python::try_attach(|py| self.open(py, info.depth))
            .ok_or_else(|| failed(std::io::Error::other("the interpreter is shutting down")))?
            .map_err(|error| failed(std::io::Error::other(error)))
    }
}

impl PythonTarget {
    fn open(&self, py: Python<'_>, depth: u16) -> PyResult<Box<dyn QueueHandler>> {
        let seat = self.watch.seat(py)?;
        let methods_queue = |methods: &Methods| {
            let slots = (0..depth).map(|_| Slot::default()).collect();
            Attached::new(MethodsQueue { methods: methods.clone_ref(py), slots, seat: seat.clone() }, &self.watch)
        };
        Ok(match &self.style {
            Style::Methods(methods) => Box::new(methods_queue(methods)),
            Style::Mapped(methods, mapper) => {
                Box::new(MappedQueue { methods: methods_queue(methods), mapper: Some(mapper.clone_ref(py)) })
            }
            Style::Batch(Batch { handle, report }) => {
                let batch = Batch { handle: handle.clone_ref(py), report: report.clone_ref(py) };
                Box::new(Attached::new(BatchQueue { batch, seat }, &self.watch))
            }
        })
    }
}

/// Serves requests while attached to the interpreter.
trait Serve {
    fn serve(&mut self, py: Python<'_>, requests: Requests<'_>);
}

/// A handler that attaches once for all requests of a wake-up. It is taken out when it is dropped.
struct Attached<S: Serve> {
    inner: Option<S>,
    watch: Watch,
}

impl<S: Serve> Attached<S> {
    fn new(inner: S, watch: &Watch) -> Self {
        Attached { inner: Some(inner), watch: watch.clone() }
    }
}

impl<S: Serve> QueueHandler for Attached<S> {
    fn handle(&mut self, requests: Requests<'_>) {
        let Some(inner) = &mut self.inner else { return };
        self.watch.entered();
        // Without an interpreter the requests are dropped with the closure and fail.
        Python::try_attach(|py| inner.serve(py, requests));
    }
}

impl<S: Serve> Drop for Attached<S> {
    fn drop(&mut self) {
        // Attached, so that the objects go now and not at some later attach.
        let inner = self.inner.take();
        Python::try_attach(|_| drop(inner));
    }
}

/// One queue of a device with methods.
struct MethodsQueue {
    methods: Methods,
    /// By tag.
    slots: Vec<Slot>,
    seat: Arc<Seat>,
}

impl Serve for MethodsQueue {
    fn serve(&mut self, py: Python<'_>, requests: Requests<'_>) {
        for request in requests {
            let slot = &mut self.slots[usize::from(request.tag().0)];
            self.seat.during(|| self.methods.serve(py, slot, request));
        }
    }
}

/// One queue of a device that says where bytes lie. Python sees only what it has not told before.
struct MappedQueue {
    methods: Attached<MethodsQueue>,
    mapper: Option<Mapper>,
}

impl QueueHandler for MappedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        let (Some(mapper), Some(queue)) = (&self.mapper, &mut self.methods.inner) else { return };
        let unknown: Vec<Request<'_>> = requests.filter_map(|request| mapper.forward_known(request)).collect();
        if unknown.is_empty() {
            return;
        }
        self.methods.watch.entered();
        Python::try_attach(|py| {
            for request in unknown {
                request.keep_pace();
                queue.serve_mapped(py, mapper, request);
            }
        });
    }
}

impl Drop for MappedQueue {
    fn drop(&mut self) {
        let mapper = self.mapper.take();
        Python::try_attach(|_| drop(mapper));
    }
}

impl MethodsQueue {
    fn serve_mapped(&mut self, py: Python<'_>, mapper: &Mapper, mut request: Request<'_>) {
        match self.seat.during(|| mapper.ask(py, &request)) {
            Ok(Mapped::At(pieces, flight)) => request.forward_pieces(pieces, Box::new(flight)),
            Ok(Mapped::Unknown) => match request.load() {
                Ok(()) => {
                    let slot = &mut self.slots[usize::from(request.tag().0)];
                    self.seat.during(|| self.methods.serve(py, slot, request));
                }
                Err(errno) => request.fail(errno),
            },
            Err(error) => request.fail(self.methods.errno_of(py, "map", &error)),
        }
    }
}

/// One queue of a device that gets requests in batches.
struct BatchQueue {
    batch: Batch,
    seat: Arc<Seat>,
}

impl Serve for BatchQueue {
    fn serve(&mut self, py: Python<'_>, requests: Requests<'_>) {
        let requests: Vec<_> = requests.map(|request| PyRequest::new(request.detach())).collect();
        let endings: Vec<_> = requests.iter().map(PyRequest::ending).collect();
        let list = PyList::new(py, requests);
        let outcome = list
            .as_ref()
            .map_err(|error| error.clone_ref(py))
            .and_then(|list| self.seat.during(|| self.batch.call(list)));
        if let Err(error) = outcome {
            let errno = to_handlers_errno(py, &error);
            if errno.is_none() {
                report(py, &self.batch.report, "handle", &error);
            }
            endings.iter().for_each(|ending| ending.fail_if_left(py, errno.unwrap_or(Errno::EIO)));
        }
    }
}

impl Batch {
    fn call(&self, requests: &Bound<'_, PyList>) -> PyResult<()> {
        let returned = self.handle.bind(requests.py()).call1((requests,))?;
        if returned.is_none() {
            return Ok(());
        }
        let name = returned.get_type().name()?;
        Err(PyTypeError::new_err(format!(
            "handle returned {name}; it must return None, and end each request by itself"
        )))
    }
}
