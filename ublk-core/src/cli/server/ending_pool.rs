// SPDX-License-Identifier: MIT OR Apache-2.0

//! A pool of threads that end devices: one whose requests are not completed delays no other one, and the server handles
//! signals meanwhile.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::ending::Served;
use crate::cli::failure::{Failure, Outcome};
use crate::units::DeviceId;

/// Maximum number of devices that are ended at the same time. Each takes a thread, and processes for its commands.
const MAX_THREADS: usize = 32;

/// Threads that end devices.
#[derive(Debug)]
pub(super) struct EndingPool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    work: Mutex<Work>,
    /// Readable when a device has ended.
    event: EventFd,
}

#[derive(Debug, Default)]
struct Work {
    pending: VecDeque<Job>,
    threads: usize,
    ended: Vec<(DeviceId, Outcome)>,
}

#[derive(Debug)]
struct Job {
    served: Arc<Served>,
    by_signal: bool,
}

impl EndingPool {
    pub(super) fn new() -> Result<Self, Failure> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK);
        let event = event.map_err(|errno| Failure::Text(format!("creating an eventfd: {errno}")))?;
        Ok(EndingPool(Arc::new(Shared { work: Mutex::default(), event })))
    }

    /// Begins to end a device, as [`Served::end`] does.
    pub(super) fn submit(&self, served: Arc<Served>, by_signal: bool) {
        let mut work = self.0.lock();
        work.pending.push_back(Job { served, by_signal });
        if work.threads == MAX_THREADS {
            return;
        }
        work.threads += 1;
        drop(work);
        let shared = self.0.clone();
        if let Err(error) = thread::Builder::new().name("ublk-end".into()).spawn(move || shared.run()) {
            log::warn!("cannot start a thread: {error}; stopping devices one after the other");
            self.0.run();
        }
    }

    /// Takes the outcomes of the devices that have ended since the last call.
    pub(super) fn take_ended(&self) -> Vec<(DeviceId, Outcome)> {
        // First, so that a device that ends after the look makes the event readable again.
        let _ = self.0.event.read();
        std::mem::take(&mut self.0.lock().ended)
    }
}

/// Becomes readable when a device has ended.
impl AsFd for EndingPool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends devices until none is pending.
    fn run(&self) {
        loop {
            let mut work = self.lock();
            let Some(Job { served, by_signal }) = work.pending.pop_front() else {
                work.threads -= 1;
                return;
            };
            drop(work);
            let id = served.device.id();
            let ended = catch_unwind(AssertUnwindSafe(|| served.end(by_signal)));
            let outcome = ended.unwrap_or_else(|_| Err(Failure::Text(format!("ending device {id}: a panic"))));
            if outcome.is_err() {
                // Dropping it would stop it again.
                std::mem::forget(served);
            } else {
                drop(served);
            }
            self.lock().ended.push((id, outcome));
            let _ = self.event.write(1);
        }
    }
}
