// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a device's queues report to the device.

use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::{Error, Result};

/// Shared by a device and its queues.
#[derive(Debug)]
pub(crate) struct QueueEvents {
    state: Mutex<EventState>,
    changed: Condvar,
    /// Readable from the moment the device begins to end, for event loops.
    ending: EventFd,
}

#[derive(Debug, Default)]
struct EventState {
    open: usize,
    stopping: bool,
    /// Waits for handlers are to end now.
    expedited: bool,
    failure: Option<Error>,
    /// Of the queues that are open, once each.
    threads: Vec<ThreadId>,
}

impl QueueEvents {
    pub(crate) fn new() -> Result<Self> {
        let ending = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::Ring { errno: errno.into(), hint: "cannot create an eventfd".into() })?;
        Ok(QueueEvents { state: Mutex::default(), changed: Condvar::new(), ending })
    }

    fn state(&self) -> MutexGuard<'_, EventState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue is about to be opened.
    pub(crate) fn opening(self: &Arc<Self>) -> OpenQueue {
        self.state().open += 1;
        OpenQueue(self.clone())
    }

    /// This thread begins to serve a queue; to be undone by [`left`](Self::left) on the same thread.
    pub(crate) fn entered(&self) {
        self.state().threads.push(std::thread::current().id());
    }

    /// This thread serves a queue no more.
    pub(crate) fn left(&self) {
        let here = std::thread::current().id();
        let mut state = self.state();
        if let Some(at) = state.threads.iter().position(|thread| *thread == here) {
            state.threads.swap_remove(at);
        }
    }

    /// Whether the calling thread serves one of the queues.
    pub(crate) fn is_served_here(&self) -> bool {
        self.state().threads.contains(&std::thread::current().id())
    }

    /// A queue is closed, or was not opened after all.
    fn closed(&self) {
        let mut state = self.state();
        state.open = state.open.saturating_sub(1);
        if state.open == 0 {
            state.stopping = true;
        }
        self.notify(state);
    }

    /// The driver takes tags away: the device is being stopped.
    pub(crate) fn stopping(&self) {
        let mut state = self.state();
        if !state.stopping {
            state.stopping = true;
            self.notify(state);
        }
    }

    /// A queue cannot go on.
    pub(crate) fn failed(&self, error: Error) {
        let mut state = self.state();
        state.failure.get_or_insert(error);
        state.stopping = true;
        self.notify(state);
    }

    fn notify(&self, state: MutexGuard<'_, EventState>) {
        let ending = state.stopping;
        drop(state);
        self.changed.notify_all();
        if ending && let Err(errno) = self.ending.write(1) {
            log::error!("cannot signal the end of a device: {errno}");
        }
    }

    /// Whether the device has begun to end.
    pub(crate) fn is_ending(&self) -> bool {
        self.state().stopping
    }

    /// The first failure, if there was one; later calls return nothing.
    pub(crate) fn take_failure(&self) -> Option<Error> {
        self.state().failure.take()
    }

    /// How many queues are open.
    pub(crate) fn open_queues(&self) -> usize {
        self.state().open
    }

    /// Waits until no queue is open; false if that took longer than `timeout`.
    pub(crate) fn wait_all_closed(&self, timeout: Duration) -> bool {
        self.wait(Some(timeout), |state| state.open == 0)
    }

    /// Ends waits for handlers: those of a stop that is under way, and of later ones.
    pub(crate) fn expedite(&self) {
        self.state().expedited = true;
        self.changed.notify_all();
    }

    /// Whether waits for handlers are to end.
    pub(crate) fn is_expedited(&self) -> bool {
        self.state().expedited
    }

    /// Waits until no queue is open; false if that took longer than `timeout`, or is not to be waited for.
    pub(crate) fn wait_all_closed_or_expedited(&self, timeout: Duration) -> bool {
        self.wait(Some(timeout), |state| state.open == 0 || state.expedited) && self.open_queues() == 0
    }

    /// Waits until the device begins to end; false if that took longer than `timeout`.
    pub(crate) fn wait_ending(&self, timeout: Option<Duration>) -> bool {
        self.wait(timeout, |state| state.stopping)
    }

    fn wait(&self, timeout: Option<Duration>, done: impl Fn(&EventState) -> bool) -> bool {
        // A time that no clock reaches is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state();
        while !done(&state) {
            state = match deadline {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }
}

/// A queue that counts as open until this is dropped, whatever goes wrong with it.
#[derive(Debug)]
pub(crate) struct OpenQueue(Arc<QueueEvents>);

impl OpenQueue {
    /// Whether it counts as open there.
    pub(super) fn is_of(&self, events: &Arc<QueueEvents>) -> bool {
        Arc::ptr_eq(&self.0, events)
    }
}

impl Deref for OpenQueue {
    type Target = QueueEvents;

    fn deref(&self) -> &QueueEvents {
        &self.0
    }
}

impl Drop for OpenQueue {
    fn drop(&mut self) {
        self.0.closed();
    }
}

impl AsFd for QueueEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ending.as_fd()
    }
}
