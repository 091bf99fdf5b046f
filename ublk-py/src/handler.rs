// SPDX-License-Identifier: MIT OR Apache-2.0

//! Python objects as targets: the interpreter is entered once for all requests of a wake-up.

use std::sync::Arc;
use std::time::Duration;

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyList;
use ublk_core::pull::{PullSender, PullSenders};
use ublk_core::{Access, Errno, Op, Params, QueueHandler, QueueInfo, Request, Requests, Result, Target};

use crate::buffer::CachedBuffer;
use crate::error::to_python;
use crate::extents::{DiskExtents, Mapped, Mapper};
use crate::held::{Held, Kept};
use crate::interpreter;
use crate::methods::{Methods, report, to_handlers_errno};
use crate::request::PyRequest;
use crate::watch::{HandlerThread, Watch};

/// Way in which requests reach Python on the thread of their queue.
#[derive(Debug)]
pub(crate) enum Style {
    /// By a method for each operation.
    Methods(Methods),
    /// By `map`, which returns where bytes are stored. Other requests go to the methods, or to queues if there are senders.
    Mapped(Methods, Mapper, Option<PullSenders>),
    /// By one function for all requests of a wake-up.
    Batches(BatchHandler),
}

/// The method `handle`, which gets requests in batches, and a function for its exceptions.
#[derive(Debug, FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct BatchHandler {
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
            // Sufficient for direct I/O on block devices.
            Style::Mapped(..) => Access::Forwards { memory_alignment: 512 },
            _ => Access::Bytes,
        }
    }

    fn open_queue(self: Arc<Self>, info: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        let failed = |source| ublk_core::Error::Target { context: "opening a queue".into(), source };
        interpreter::attach(|py| self.open(py, info))
            .ok_or_else(|| failed(std::io::Error::other("the interpreter is shutting down")))?
            .map_err(|error| failed(std::io::Error::other(error)))
    }
}

impl PythonTarget {
    fn open(&self, py: Python<'_>, info: &QueueInfo) -> PyResult<Box<dyn QueueHandler>> {
        let thread = self.watch.register_thread(py)?;
        let methods_queue = |methods: &Methods, depth| {
            let buffers = (0..depth).map(|_| CachedBuffer::default()).collect();
            MethodsQueue { methods: methods.clone_ref(py), buffers, thread: thread.clone() }
        };
        Ok(match &self.style {
            Style::Methods(methods) => Box::new(Attached::new(methods_queue(methods, info.depth), &self.watch)),
            Style::Mapped(methods, mapper, senders) => {
                let sender = senders.as_ref().map(|senders| senders.open(info.queue)).transpose();
                let sender = sender.map_err(|error| to_python(py, &error))?;
                let methods = methods_queue(methods, if sender.is_some() { 0 } else { info.depth });
                let inner = Some((methods, mapper.clone_ref(py)));
                Box::new(MappedQueue { inner, sender, watch: self.watch.clone() })
            }
            Style::Batches(BatchHandler { handle, report }) => {
                let handler = BatchHandler { handle: handle.clone_ref(py), report: report.clone_ref(py) };
                Box::new(Attached::new(BatchQueue { handler, thread, watch: self.watch.clone() }, &self.watch))
            }
        })
    }
}

/// Serves requests while attached to the interpreter.
trait Serve {
    fn serve(&mut self, py: Python<'_>, requests: Requests<'_>);
}

/// Handler that attaches once for all requests of a wake-up.
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
        // Without an interpreter the requests are dropped with the closure, and fail.
        interpreter::attach(|py| inner.serve(py, requests));
    }
}

impl<S: Serve> Drop for Attached<S> {
    fn drop(&mut self) {
        // Attached, so that Python objects are released now and not at a later attach.
        let inner = self.inner.take();
        interpreter::attach(|_| drop(inner));
    }
}

/// One queue of a device with methods.
struct MethodsQueue {
    methods: Methods,
    /// By tag.
    buffers: Vec<CachedBuffer>,
    thread: Arc<HandlerThread>,
}

impl Serve for MethodsQueue {
    fn serve(&mut self, py: Python<'_>, mut requests: Requests<'_>) {
        while let Some(request) = requests.next() {
            self.serve_one(py, request, Some(requests.taken_at()));
        }
    }
}

/// One queue of a device with `map`. Python gets only requests that no cached extent covers.
struct MappedQueue {
    /// `None` only while it is dropped.
    inner: Option<(MethodsQueue, Mapper)>,
    /// Queue for requests that `map` leaves to other threads.
    sender: Option<PullSender>,
    watch: Watch,
}

impl QueueHandler for MappedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        let Some((queue, mapper)) = &mut self.inner else { return };
        let unknown = requests.serve_fast(|request| mapper.forward_known(request));
        if unknown.len() == 0 {
            return;
        }
        self.watch.entered();
        let mut left = Vec::new();
        interpreter::attach(|py| {
            for request in unknown {
                let Some(request) = queue.map(py, mapper, request) else { continue };
                if self.sender.is_some() {
                    left.push(request);
                } else if let Some(request) = loaded(request) {
                    queue.serve_one(py, request, None);
                }
            }
        });
        if let Some(sender) = &self.sender {
            // Not attached to the interpreter.
            sender.send(left.into_iter().filter_map(loaded).map(Request::detach));
        }
    }
}

impl Drop for MappedQueue {
    fn drop(&mut self) {
        let inner = self.inner.take();
        interpreter::attach(|_| drop(inner));
    }
}

/// Loads the data of a request into memory. Fails the request and returns `None` if that fails.
fn loaded(mut request: Request<'_>) -> Option<Request<'_>> {
    match request.load() {
        Ok(()) => Some(request),
        Err(errno) => {
            request.fail(errno);
            None
        }
    }
}

impl MethodsQueue {
    /// Calls `map`, and forwards the request to the extent. Returns the request if the handler has to serve it.
    fn map<'q>(&self, py: Python<'_>, mapper: &Mapper, request: Request<'q>) -> Option<Request<'q>> {
        match self.thread.during(|| mapper.ask(py, &request)) {
            Ok(Mapped::At(pieces, flight)) => mapper.extents.forward(request, pieces, flight),
            Ok(Mapped::Unknown) => return Some(request),
            Err(error) => request.fail(self.methods.errno_of(py, "map", &error)),
        }
        None
    }

    /// Calls a method for a request, which was taken at this time if that is known.
    fn serve_one(&mut self, py: Python<'_>, request: Request<'_>, taken: Option<Duration>) {
        if request.op() == Op::Flush {
            // It may have to wait for other flushes.
            return self.thread.during(|| self.methods.flush(py, &Held::default(), request.detach()));
        }
        let buffer = &mut self.buffers[usize::from(request.tag().0)];
        let serve = || self.methods.serve(py, buffer, &Kept, request);
        match taken {
            Some(taken) => self.thread.during_at(taken, serve),
            None => self.thread.during(serve),
        }
    }
}

/// One queue of a device that gets requests in batches.
struct BatchQueue {
    handler: BatchHandler,
    thread: Arc<HandlerThread>,
    watch: Watch,
}

impl Serve for BatchQueue {
    fn serve(&mut self, py: Python<'_>, requests: Requests<'_>) {
        let requests: Vec<_> = requests
            .map(|request| PyRequest::new(request.detach(), &DiskExtents::default(), self.watch.holders()))
            .collect();
        let endings: Vec<_> = requests.iter().map(PyRequest::ending).collect();
        let list = PyList::new(py, requests);
        let outcome = list
            .as_ref()
            .map_err(|error| error.clone_ref(py))
            .and_then(|list| self.thread.during(|| self.handler.call(list)));
        if let Err(error) = outcome {
            let errno = to_handlers_errno(py, &error);
            if errno.is_none() {
                report(py, &self.handler.report, "handle", &error);
            }
            endings.iter().for_each(|ending| ending.fail_if_left(py, errno.unwrap_or(Errno::EIO)));
        }
    }
}

impl BatchHandler {
    fn call(&self, requests: &Bound<'_, PyList>) -> PyResult<()> {
        let returned = self.handle.bind(requests.py()).call1((requests,))?;
        if returned.is_none() {
            return Ok(());
        }
        let name = returned.get_type().name()?;
        Err(PyTypeError::new_err(format!(
            "handle returned {name}; it must return None, and complete or fail each request itself"
        )))
    }
}
