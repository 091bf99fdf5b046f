// SPDX-License-Identifier: MIT OR Apache-2.0

//! Observation of a device's handlers: how often Python was entered, and which threads are in handlers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use pyo3::prelude::*;

use crate::holders::Holders;
use crate::interpreter;

/// Observer of one device.
#[derive(Clone, Debug)]
pub(crate) struct Watch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    entries: AtomicU64,
    /// Holders of requests that have left the threads of their queues.
    holders: Holders,
    threads: Mutex<Vec<Weak<HandlerThread>>>,
}

/// Thread that calls handlers.
#[derive(Debug)]
pub(crate) struct HandlerThread {
    /// Its `threading.get_ident()`.
    ident: u64,
    /// When the current call began, in nanoseconds of the monotonic clock, or a tick earlier; 0 without a call.
    since: AtomicU64,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Watch(Arc::new(Shared { entries: AtomicU64::new(0), holders: Holders::default(), threads: Mutex::default() }))
    }

    pub(crate) fn holders(&self) -> &Holders {
        &self.0.holders
    }

    /// Counts an entry of Python for requests.
    pub(crate) fn entered(&self) {
        self.0.entries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn entries(&self) -> u64 {
        self.0.entries.load(Ordering::Relaxed)
    }

    /// Registers the calling thread.
    pub(crate) fn register_thread(&self, py: Python<'_>) -> PyResult<Arc<HandlerThread>> {
        let thread = Arc::new(HandlerThread { ident: thread_ident(py)?, since: AtomicU64::new(0) });
        let mut threads = self.0.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|thread| thread.strong_count() != 0);
        threads.push(Arc::downgrade(&thread));
        Ok(thread)
    }

    /// Returns whether the calling thread is in a handler.
    pub(crate) fn is_busy_here(&self, py: Python<'_>) -> PyResult<bool> {
        let here = thread_ident(py)?;
        Ok(self.busy().iter().any(|(thread, ..)| *thread == here))
    }

    /// Returns the threads that are in a handler: the ident, the time of the call (which identifies calls unless they began
    /// in the same tick of the clock, a few milliseconds), and for how many seconds it has run.
    pub(crate) fn busy(&self) -> Vec<(u64, u64, f64)> {
        let now = now();
        let threads = self.0.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |thread: Arc<HandlerThread>| {
            let since = Some(thread.since.load(Ordering::Relaxed)).filter(|since| *since != 0)?;
            Some((thread.ident, since, now.saturating_sub(since) as f64 / 1e9))
        };
        threads.iter().filter_map(Weak::upgrade).filter_map(busy).collect()
    }
}

/// Calls `threading.get_ident()`.
fn thread_ident(py: Python<'_>) -> PyResult<u64> {
    py.import("threading")?.call_method0("get_ident")?.extract()
}

/// Reads the kernel's coarse clock, which is exact enough for seconds and cheap to read.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(1, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

impl HandlerThread {
    /// Calls a handler.
    pub(crate) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.during_since(now(), call)
    }

    /// Calls a handler for a request that was taken at a time of the clock, which saves reading it.
    pub(crate) fn during_at<T>(&self, taken: Duration, call: impl FnOnce() -> T) -> T {
        self.during_since((taken.as_nanos() as u64).max(1), call)
    }

    fn during_since<T>(&self, since: u64, call: impl FnOnce() -> T) -> T {
        self.since.store(since, Ordering::Relaxed);
        let generation = interpreter::generation();
        let result = call();
        interpreter::end_forked_child(generation);
        self.since.store(0, Ordering::Relaxed);
        result
    }
}
