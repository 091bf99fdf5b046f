// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ending devices, several at the same time: one whose requests do not end keeps no other one waiting, and the server
//! looks for signals meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{Served, end};
use crate::cli::{Failure, Outcome};
use crate::units::DeviceId;

/// Most devices that are ended at the same time. Each takes a thread, and processes for its commands.
const MOST: usize = 32;

/// Devices that are being ended.
#[derive(Debug)]
pub(super) struct Ends(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Readable when a device has ended.
    news: EventFd,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Job>,
    threads: usize,
    ended: Vec<(DeviceId, Outcome)>,
}

#[derive(Debug)]
struct Job {
    served: Arc<Served>,
    wanted: bool,
}

impl Ends {
    pub(super) fn new() -> Result<Self, Failure> {
        let news = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let news = news.map_err(|errno| Failure::Text(format!("creating an eventfd: {errno}")))?;
        Ok(Ends(Arc::new(Shared { state: Mutex::default(), news })))
    }

    /// Begins to end a device, as [`end`] does.
    pub(super) fn begin(&self, served: Arc<Served>, wanted: bool) {
        let mut state = self.0.state();
        state.waiting.push_back(Job { served, wanted });
        if state.threads == MOST {
            return;
        }
        state.threads += 1;
        drop(state);
        let shared = self.0.clone();
        if let Err(error) = thread::Builder::new().name("ublk-end".into()).spawn(move || shared.work()) {
            log::warn!("cannot start a thread: {error}; stopping devices one after the other");
            self.0.work();
        }
    }

    /// The devices that have ended since this was last asked.
    pub(super) fn take(&self) -> Vec<(DeviceId, Outcome)> {
        // Before the look: what ends after it is news.
        let _ = self.0.news.read();
        std::mem::take(&mut self.0.state().ended)
    }
}

/// Becomes readable when a device has ended.
impl AsFd for Ends {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.news.as_fd()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends devices until none waits.
    fn work(&self) {
        loop {
            let mut state = self.state();
            let Some(Job { served, wanted }) = state.waiting.pop_front() else {
                state.threads -= 1;
                return;
            };
            drop(state);
            let id = served.device.id();
            let ended = catch_unwind(AssertUnwindSafe(|| end(&served, wanted)));
            let outcome = ended.unwrap_or_else(|_| Err(Failure::Text(format!("ending device {id}: a panic"))));
            if outcome.is_err() {
                // To drop it would be to stop it once more.
                std::mem::forget(served);
            } else {
                drop(served);
            }
            self.state().ended.push((id, outcome));
            let _ = self.news.write(1);
        }
    }
}
