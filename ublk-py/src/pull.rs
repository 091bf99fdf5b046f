// SPDX-License-Identifier: MIT OR Apache-2.0

//! Queues from which Python takes requests: for event loops, pools of threads, and `pull=True`.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefReference};
use ublk_core::pull::{self, PullQueue};
use ublk_core::{Errno, Op};

use crate::buffer::CachedBuffer;
use crate::extents::DiskExtents;
use crate::held::Held;
use crate::interpreter;
use crate::methods::Methods;
use crate::request::PyRequest;
use crate::watch::Watch;

/// Queues of a device whose requests are pulled; none for other devices.
#[derive(Debug, Default)]
pub(crate) struct Pulled {
    pub(crate) queues: Vec<PullQueue>,
    /// Extents of the block device.
    pub(crate) extents: DiskExtents,
}

/// Requests of one hardware queue.
#[pyclass(frozen, module = "ublk._ublk", name = "PullQueue")]
#[derive(Debug)]
pub(crate) struct PyPullQueue {
    queue: Mutex<Option<Arc<PullQueue>>>,
    watch: Watch,
    /// Extents of the block device.
    extents: DiskExtents,
    /// Generation of the process that it belongs to.
    generation: usize,
}

impl PyPullQueue {
    pub(crate) fn new(queue: PullQueue, watch: Watch, extents: DiskExtents) -> Self {
        let queue = Mutex::new(Some(Arc::new(queue)));
        PyPullQueue { queue, watch, extents, generation: interpreter::generation() }
    }

    fn queue(&self) -> Option<Arc<PullQueue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PyPullQueue {
    /// Fails in a forked child, which would serve copies of its parent's requests.
    fn check_process(&self) -> PyResult<()> {
        if self.generation == interpreter::generation() {
            return Ok(());
        }
        Err(PyRuntimeError::new_err("the requests belong to the process that this one was forked from"))
    }

    /// Fails the requests that were not taken; returns how many.
    pub(crate) fn revoke(&self) -> usize {
        let mut revoked = 0;
        while let Some(batch) = self.queue().and_then(|queue| queue.next_batch_timeout(usize::MAX, Duration::ZERO)) {
            if batch.is_empty() {
                break;
            }
            revoked += batch.len();
            batch.into_iter().for_each(|request| request.fail(Errno::EIO));
        }
        revoked
    }
}

#[pymethods]
impl PyPullQueue {
    /// Take at most `max` requests, without waiting. `None` when no request will arrive any more.
    ///
    /// Weak references to them are in `hand` before a signal handler can raise an exception, so that the caller finds them
    /// there if it is interrupted before it has the list.
    fn take<'py>(
        &self,
        py: Python<'py>,
        max: usize,
        hand: &Bound<'py, PyList>,
    ) -> PyResult<Option<Vec<Bound<'py, PyRequest>>>> {
        self.check_process()?;
        let Some(batch) = self.queue().and_then(|queue| queue.next_batch_timeout(max, Duration::ZERO)) else {
            return Ok(None);
        };
        self.watch.entered();
        let wrap = |request| {
            let request = Bound::new(py, PyRequest::new(request, &self.extents, self.watch.holders()))?;
            hand.append(PyWeakrefReference::new(&request)?)?;
            Ok(request)
        };
        batch.into_iter().map(wrap).collect::<PyResult<_>>().map(Some)
    }

    /// Take at most `max` requests, without waiting, and append them to `requests`, the last one first. Return whether more
    /// requests may arrive.
    fn take_into(&self, py: Python<'_>, max: usize, requests: &Bound<'_, PyList>) -> PyResult<bool> {
        self.check_process()?;
        let Some(batch) = self.queue().and_then(|queue| queue.next_batch_timeout(max, Duration::ZERO)) else {
            return Ok(false);
        };
        self.watch.entered();
        for request in batch.into_iter().rev() {
            requests.append(Bound::new(py, PyRequest::new(request, &self.extents, self.watch.holders()))?)?;
        }
        Ok(true)
    }

    /// Call a function, and then send the ends of all requests that it has ended, with one wake-up of the queue's thread.
    ///
    /// A method, and not two calls, because a signal handler may raise an exception at any place of Python code.
    #[pyo3(signature = (call, /))]
    fn corked(&self, call: &Bound<'_, PyAny>) -> PyResult<()> {
        pull::corked(|| call.call0()).map(drop)
    }

    /// Descriptor that is readable while there are requests, and once no more will arrive. -1 after `close`.
    fn fileno(&self) -> RawFd {
        self.queue().map_or(-1, |queue| queue.as_raw_fd())
    }

    /// Fail all requests in the queue, and later ones. Does nothing in a forked child.
    fn close(&self, py: Python<'_>) {
        if self.check_process().is_err() {
            return;
        }
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        interpreter::detached(py, || drop(queue));
    }
}

/// Serves requests of a queue on a thread, one at a time.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct Worker {
    queue: Arc<PullQueue>,
    methods: Methods,
    watch: Watch,
}

#[pymethods]
impl Worker {
    #[new]
    fn new(queue: &PyPullQueue, methods: Methods) -> PyResult<Self> {
        let closed = || pyo3::exceptions::PyValueError::new_err("the queue is closed");
        Ok(Worker { queue: queue.queue().ok_or_else(closed)?, methods, watch: queue.watch.clone() })
    }

    /// Serve until the queue ends.
    fn run(&self, py: Python<'_>) -> PyResult<()> {
        let mut buffer = CachedBuffer::default();
        let thread = self.watch.register_thread(py)?;
        self.methods.know_flushes(self.watch.holders());
        let held = Held::known(self.watch.holders());
        // With a permit while handlers run, without one while waiting.
        while let (Some(batch), _permit) = interpreter::detached(py, || self.queue.next_batch(1)) {
            self.watch.entered();
            for request in batch {
                thread.during(|| match request.op() {
                    Op::Flush => self.methods.flush(py, &held, request),
                    _ => self.methods.serve(py, &mut buffer, &*held, request),
                });
            }
        }
        Ok(())
    }
}
