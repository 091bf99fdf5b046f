// SPDX-License-Identifier: MIT OR Apache-2.0

//! Flushes of a disk whose data the engine writes to the files of extents.
//!
//! The kernel reports a write-back error once to each open file description, and marks the lost pages clean. The handlers
//! of all queues sync the same descriptor, so that one flush gets the error, and concurrent and later ones succeed although
//! data is lost. Therefore, for a disk that has been written to through extents:
//!
//! 1. A flush succeeds only after all flushes that were in progress when its handler returned have ended. When a flush
//!    fails, all that are in progress fail.
//! 2. Once a flush has failed, all later ones fail, because it is unknown which writes were lost.
//!
//! Writes of the server that a device was recovered from count as well: they may still be dirty, and the error of their
//! write-back goes to the first flush here. A recovered disk with `map` counts as written to through extents. One whose
//! handlers may return extents is known to have been as soon as a handler returns an extent, even for a read. Before that,
//! rule 1 applies, and rule 2 until `write` returns without an extent: a class that writes by itself may retry a flush.
//! Its failures up to then do not count when the disk is recovered again.
//!
//! Handlers that write to files themselves decide what a failure means and what can be retried.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::prelude::*;
use ublk_core::{DetachedRequest, Errno, Op};

use crate::holders::{Holders, Revoke};

/// Flushes of a block device, shared by all queues and by all devices that serve it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flushes(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Whether writes have gone to extents.
    written: AtomicBool,
    /// Another server may have written to extents before.
    recovered: AtomicBool,
    /// It is assumed to have done so, for rule 2: `write` has not returned without an extent since.
    assumed: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether a flush has failed. It counts if writes have gone to extents.
    failed: bool,
    /// Whether a flush has failed while that was assumed, and still is.
    failed_assumed: bool,
    /// Whether the failure was logged.
    reported: bool,
    /// Number of the next flush.
    next: u64,
    /// Numbers of the flushes in progress.
    running: Vec<u64>,
    /// Flushes with smaller numbers were in progress when one failed for which rule 1 applies.
    failing_before: u64,
    /// Flushes that have succeeded and wait for all with smaller numbers.
    succeeded: Vec<(u64, DetachedRequest)>,
}

impl Flushes {
    /// Notes that a request goes to an extent.
    pub(crate) fn forwarded(&self, op: Op) {
        if op == Op::Write || self.0.recovered.load(Ordering::Relaxed) {
            self.written();
        }
    }

    /// Notes that the disk was recovered from a server that has written to extents, `certainly` or perhaps.
    pub(crate) fn recovered(&self, certainly: bool) {
        self.0.recovered.store(true, Ordering::Relaxed);
        if certainly {
            self.written();
        } else {
            self.0.assumed.store(true, Ordering::Release);
        }
    }

    /// Notes that a handler has done a request by itself.
    pub(crate) fn handled(&self, op: Op) {
        if op == Op::Write && self.0.assumed.load(Ordering::Relaxed) {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.assumed.store(false, Ordering::Release);
            // The class may retry the flush. It must not count when the disk is recovered again.
            state.failed_assumed = false;
            // The log reports the next failure again.
            state.reported &= self.0.written.load(Ordering::Acquire);
        }
    }

    fn written(&self) {
        // Read first, so that the queues can share the cache line.
        if !self.0.written.load(Ordering::Relaxed) {
            self.0.written.store(true, Ordering::Release);
        }
    }

    /// Registers the waiting flushes with the holders of a device.
    pub(crate) fn known(&self, holders: &Holders) {
        let weak: Weak<Shared> = Arc::downgrade(&self.0);
        holders.add(weak);
    }

    /// Registers a flush. It ends with [`Flush::end`], or, without having been served, when it is dropped.
    pub(crate) fn begin(&self) -> Flush {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next;
        state.next += 1;
        state.running.push(number);
        Flush { flushes: self.clone(), number }
    }

    /// Records the outcome of a flush, and ends the requests whose outcome is known now.
    fn end(&self, number: u64, ended: Option<(DetachedRequest, Result<(), Errno>)>) {
        let (mut failing, mut done, mut report) = (Vec::new(), Vec::new(), None);
        {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            let written = self.0.written.load(Ordering::Acquire);
            let together = written || self.0.recovered.load(Ordering::Relaxed);
            let assumed = self.0.assumed.load(Ordering::Acquire);
            state.running.retain(|running| *running != number);
            match ended {
                Some((request, Ok(()))) if number < state.failing_before => failing.push((request, Errno::EIO)),
                Some((request, Ok(()))) => {
                    let before = state.next;
                    state.succeeded.push((before, request));
                }
                Some((request, Err(errno))) => {
                    failing.push((request, errno));
                    if together {
                        state.failed = true;
                        state.failed_assumed |= assumed;
                        state.failing_before = state.next;
                        let waiting = std::mem::take(&mut state.succeeded);
                        failing.extend(waiting.into_iter().map(|(_, request)| (request, Errno::EIO)));
                    }
                }
                // It was not served, or has ended before.
                None => {}
            }
            let oldest = state.running.iter().min().copied().unwrap_or(u64::MAX);
            let has_failed = (written && state.failed) || (assumed && state.failed_assumed);
            for (before, request) in std::mem::take(&mut state.succeeded) {
                if has_failed {
                    failing.push((request, Errno::EIO));
                } else if before <= oldest || !together {
                    done.push(request);
                } else {
                    state.succeeded.push((before, request));
                }
            }
            if let Some((request, errno)) = failing.first().filter(|_| has_failed && !state.reported) {
                report = Some((request.device(), *errno));
                state.reported = true;
            }
        }
        // After the lock is released.
        if let Some((device, errno)) = report {
            log::error!(
                "ublkb{}: a flush failed ({}): writes to its extents may be lost, and every flush fails from now on",
                device.0,
                errno.known().desc()
            );
        }
        failing.into_iter().for_each(|(request, errno)| request.fail(errno));
        done.into_iter().for_each(DetachedRequest::complete);
    }
}

/// At the end of a stop's time, flushes that wait for others fail like requests that Python holds.
impl Revoke for Shared {
    fn revoke(&self, _: Python<'_>) -> bool {
        let waiting = std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).succeeded);
        let found = !waiting.is_empty();
        waiting.into_iter().for_each(|(_, request)| request.fail(Errno::EIO));
        found
    }
}

/// Flush in progress.
#[derive(Debug)]
pub(crate) struct Flush {
    flushes: Flushes,
    number: u64,
}

impl Flush {
    /// Ends the request, at once or when the outcome of concurrent flushes is known.
    pub(crate) fn end(self, request: DetachedRequest, result: Result<(), Errno>) {
        self.flushes.end(self.number, Some((request, result)));
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        self.flushes.end(self.number, None);
    }
}
