// SPDX-License-Identifier: MIT OR Apache-2.0

//! What can be seen of a device's handlers from outside: how often Python was entered, and who is in there.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::time::{ClockId, clock_gettime};
use pyo3::prelude::*;

use crate::held::Holders;
use crate::interpreter;

/// One for each device.
#[derive(Clone, Debug)]
pub(crate) struct Watch(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    entries: AtomicU64,
    /// Of requests that have left the threads of their queues.
    holders: Holders,
    seats: Mutex<Vec<Weak<Seat>>>,
}

/// A thread that calls handlers.
#[derive(Debug)]
pub(crate) struct Seat {
    /// As `threading.get_ident()` returns it.
    thread: u64,
    /// When the call that is going on began, in nanoseconds of the clock; 0 without one.
    since: AtomicU64,
}

impl Watch {
    pub(crate) fn new() -> Self {
        Watch(Arc::new(Shared { entries: AtomicU64::new(0), holders: Holders::default(), seats: Mutex::default() }))
    }

    pub(crate) fn holders(&self) -> &Holders {
        &self.0.holders
    }

    /// Python is entered for requests.
    pub(crate) fn entered(&self) {
        self.0.entries.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn entries(&self) -> u64 {
        self.0.entries.load(Ordering::Relaxed)
    }

    /// A seat for the calling thread.
    pub(crate) fn seat(&self, py: Python<'_>) -> PyResult<Arc<Seat>> {
        let thread = thread_ident(py)?;
        let seat = Arc::new(Seat { thread, since: AtomicU64::new(0) });
        let mut seats = self.0.seats.lock().unwrap_or_else(PoisonError::into_inner);
        seats.retain(|seat| seat.strong_count() != 0);
        seats.push(Arc::downgrade(&seat));
        Ok(seat)
    }

    /// Whether the calling thread is in a handler.
    pub(crate) fn is_busy_here(&self, py: Python<'_>) -> PyResult<bool> {
        let here = thread_ident(py)?;
        Ok(self.busy().iter().any(|(thread, ..)| *thread == here))
    }

    /// Threads that are in a handler: which, when it was called (a number that tells calls apart unless they began in
    /// the same tick of the clock, a few milliseconds), and for how many seconds it has run.
    pub(crate) fn busy(&self) -> Vec<(u64, u64, f64)> {
        let now = now();
        let seats = self.0.seats.lock().unwrap_or_else(PoisonError::into_inner);
        let busy = |seat: Arc<Seat>| {
            let since = Some(seat.since.load(Ordering::Relaxed)).filter(|since| *since != 0)?;
            Some((seat.thread, since, now.saturating_sub(since) as f64 / 1e9))
        };
        seats.iter().filter_map(Weak::upgrade).filter_map(busy).collect()
    }
}

/// `threading.get_ident()`.
fn thread_ident(py: Python<'_>) -> PyResult<u64> {
    py.import("threading")?.call_method0("get_ident")?.extract()
}

/// The kernel's coarse clock: exact enough for seconds, and nearly free to read.
fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(1, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

impl Seat {
    /// Calls a handler.
    pub(crate) fn during<T>(&self, call: impl FnOnce() -> T) -> T {
        self.since.store(now(), Ordering::Relaxed);
        let generation = interpreter::generation();
        let result = call();
        interpreter::end_forked_child(generation);
        self.since.store(0, Ordering::Relaxed);
        result
    }
}
