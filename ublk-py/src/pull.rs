// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that Python takes when it likes: for event loops, for pools of threads, and for programs of their own
//! kind.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyList, PyWeakrefReference};
use ublk_core::pull::PullQueue;
use ublk_core::{Errno, Op};

use crate::buffer::Slot;
use crate::extents::DiskExtents;
use crate::held::Held;
use crate::interpreter;
use crate::methods::Methods;
use crate::request::PyRequest;
use crate::watch::Watch;

/// The queues that a device's requests are taken from, if its style is to take them.
#[derive(Debug, Default)]
pub(crate) struct Pulled {
    pub(crate) queues: Vec<PullQueue>,
    /// Of the block device.
    pub(crate) extents: DiskExtents,
}

/// The requests of one hardware queue.
#[pyclass(frozen, module = "ublk._ublk", name = "PullQueue")]
#[derive(Debug)]
pub(crate) struct PyPullQueue {
    queue: Mutex<Option<Arc<PullQueue>>>,
    watch: Watch,
    /// Of the block device.
    extents: DiskExtents,
}

impl PyPullQueue {
    pub(crate) fn new(queue: PullQueue, watch: Watch, extents: DiskExtents) -> Self {
        PyPullQueue { queue: Mutex::new(Some(Arc::new(queue))), watch, extents }
    }

    fn queue(&self) -> Option<Arc<PullQueue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl PyPullQueue {
    /// Fails what nothing has taken yet; returns how many requests.
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
    /// Take the requests that are there, at most `max`. `None` when no request will come any more.
    ///
    /// Weak references to them are in `hand` before a signal's handler can raise anything: whoever is interrupted before
    /// he knows what he has finds it there.
    fn take<'py>(
        &self,
        py: Python<'py>,
        max: usize,
        hand: &Bound<'py, PyList>,
    ) -> PyResult<Option<Vec<Bound<'py, PyRequest>>>> {
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

    /// Readable while there are requests, and once no more will come. -1 after `close`.
    fn fileno(&self) -> RawFd {
        self.queue().map_or(-1, |queue| queue.as_raw_fd())
    }

    /// Fail what is in the queue and what still comes.
    fn close(&self, py: Python<'_>) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        interpreter::detached(py, || drop(queue));
    }
}

/// For a thread that serves requests of a queue, one at a time.
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
        let mut slot = Slot::default();
        let seat = self.watch.seat(py)?;
        self.methods.know_flushes(self.watch.holders());
        let held = Held::known(self.watch.holders());
        // With a permit while handlers run, and without one while this waits.
        while let (Some(batch), _permit) = interpreter::detached(py, || self.queue.next_batch(1)) {
            self.watch.entered();
            for request in batch {
                seat.during(|| match request.op() {
                    Op::Flush => self.methods.flush(py, &held, request),
                    _ => self.methods.serve(py, &mut slot, &held, request),
                });
            }
        }
        Ok(())
    }
}
