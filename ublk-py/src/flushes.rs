// SPDX-License-Identifier: MIT OR Apache-2.0

//! Flushes of a disk whose bytes the engine writes to the files of extents.
//!
//! The kernel reports an error of write-back once to each open file description, and counts the lost pages as clean.
//! The handlers of all queues sync the same descriptor, so that one flush takes the error, and those beside it and after
//! it succeed without what was lost. For a disk that has been written to through extents:
//!
//! 1. A flush that succeeds counts only when all that were under way at that moment have ended: has one of them failed,
//!    so have they all.
//! 2. Once a flush has failed, no later one succeeds: nothing says which writes were lost.
//!
//! Writes of the server that a device was recovered from count as well: they may still be dirty, and the error of their
//! write-back goes to the first flush here. A recovered disk with `map` was written to through extents, and one whose
//! handlers may return extents is assumed to have been until `write` returns without one. It is known to have been as soon
//! as a handler returns an extent, for a read too.
//!
//! Handlers that write by themselves know better what a failure means, and what can be tried again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::prelude::*;
use ublk_core::{DetachedRequest, Errno, Op, RawErrno};

use crate::held::{Holders, Revoke};

/// The flushes of a block device, shared by all queues and by all devices that serve it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Flushes(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// Whether writes have gone to extents.
    written: AtomicBool,
    /// Another server may have written to extents before.
    recovered: AtomicBool,
    /// It is assumed to have done so: `write` has not returned without an extent since.
    assumed: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// One has failed. It counts if writes have gone to extents.
    failed: bool,
    /// That is in the log.
    reported: bool,
    /// Number of the next one.
    next: u64,
    /// Numbers of those under way.
    running: Vec<u64>,
    /// Those that have succeeded and wait for all with smaller numbers.
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
            self.0.assumed.store(false, Ordering::Release);
        }
    }

    fn written(&self) {
        // Not to take the line from other queues each time.
        if !self.0.written.load(Ordering::Relaxed) {
            self.0.written.store(true, Ordering::Release);
        }
    }

    /// Has the holders of a device know those that wait.
    pub(crate) fn known(&self, holders: &Holders) {
        let weak: Weak<Shared> = Arc::downgrade(&self.0);
        holders.add(weak);
    }

    /// Notes that a flush begins. It ends with [`Flush::end`], or, unserved, by being dropped.
    pub(crate) fn begin(&self) -> Flush {
        let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
        let number = state.next;
        state.next += 1;
        state.running.push(number);
        Flush { flushes: self.clone(), number }
    }

    /// Takes the outcome of a flush, and ends the requests whose outcome is known now.
    fn end(&self, number: u64, ended: Option<(DetachedRequest, Result<(), RawErrno>)>) {
        let (mut failing, mut done, mut report) = (Vec::new(), Vec::new(), None);
        {
            let mut state = self.0.state.lock().unwrap_or_else(PoisonError::into_inner);
            let written = self.0.written.load(Ordering::Acquire) || self.0.assumed.load(Ordering::Acquire);
            state.running.retain(|running| *running != number);
            match ended {
                Some((request, Ok(()))) => {
                    let before = state.next;
                    state.succeeded.push((before, request));
                }
                Some((request, Err(errno))) => {
                    state.failed |= written || self.0.recovered.load(Ordering::Relaxed);
                    failing.push((request, errno));
                }
                // Unserved, or it has ended before.
                None => {}
            }
            let oldest = state.running.iter().min().copied().unwrap_or(u64::MAX);
            let has_failed = written && state.failed;
            for (before, request) in std::mem::take(&mut state.succeeded) {
                if has_failed {
                    failing.push((request, Errno::EIO.into()));
                } else if before <= oldest || !written {
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
        // Not under the lock.
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

/// Flushes that wait for others are failed at the end of a stop's time, as requests that Python has.
impl Revoke for Shared {
    fn revoke(&self, _: Python<'_>) -> bool {
        let waiting = std::mem::take(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner).succeeded);
        let found = !waiting.is_empty();
        waiting.into_iter().for_each(|(_, request)| request.fail(Errno::EIO));
        found
    }
}

/// A flush that is under way.
#[derive(Debug)]
pub(crate) struct Flush {
    flushes: Flushes,
    number: u64,
}

impl Flush {
    /// Ends its request, at once or when the outcome of those beside it is known.
    pub(crate) fn end(self, request: DetachedRequest, result: Result<(), RawErrno>) {
        self.flushes.end(self.number, Some((request, result)));
    }
}

impl Drop for Flush {
    fn drop(&mut self) {
        self.flushes.end(self.number, None);
    }
}
