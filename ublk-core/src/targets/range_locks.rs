// SPDX-License-Identifier: MIT OR Apache-2.0

//! Locks on ranges of a disk, for targets that keep two things consistent, such as data and its metadata.
//!
//! The thread of a queue never waits for a lock: a request whose range is locked goes to a separate thread, which serves it
//! in its turn. A thread that holds a lock never waits for another, so there are no deadlocks. Locks are granted in the
//! order of the requests, so neither readers nor writers starve.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::request::{Op, Request};

/// A disk whose requests are served under locks.
pub(super) trait Locked: Send + Sync + 'static {
    /// Serves a request. The lock on its range is held.
    fn serve(&self, request: &mut Request<'_>) -> std::result::Result<(), Errno>;
}

/// Locks on ranges of one disk, shared by all its queues.
#[derive(Debug, Default)]
pub(super) struct RangeLocks(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Notified when the thread may have work.
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    /// Locks that are held or waited for, in the order of the requests.
    locks: Vec<Lock>,
    /// Number of the next lock.
    next: u64,
    has_thread: bool,
    /// The owner was dropped: the thread ends after the last job.
    closed: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("locks", &self.locks.len()).finish_non_exhaustive()
    }
}

type Job = Box<dyn FnOnce(Held) + Send>;

struct Lock {
    number: u64,
    range: Range<u64>,
    exclusive: bool,
    /// The job that waits for the lock. `None` if it is held.
    job: Option<Job>,
}

impl Lock {
    fn conflicts(&self, range: &Range<u64>, exclusive: bool) -> bool {
        (self.exclusive || exclusive) && self.range.start < range.end && range.start < self.range.end
    }
}

/// A lock that is held until this is dropped.
#[derive(Debug)]
pub(super) struct Held {
    shared: Arc<Shared>,
    number: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut queue = self.shared.lock();
        queue.locks.retain(|lock| lock.number != self.number);
        let waited_for = queue.locks.iter().any(|lock| lock.job.is_some());
        drop(queue);
        if waited_for {
            self.shared.changed.notify_one();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    fn add(&mut self, range: Range<u64>, exclusive: bool, job: Option<Job>) -> u64 {
        let number = self.next;
        self.next += 1;
        self.locks.push(Lock { number, range, exclusive, job });
        number
    }

    /// Takes the first job whose lock is free.
    fn take_job(&mut self) -> Option<(u64, Job)> {
        let can_run = |index: &usize| {
            let lock = &self.locks[*index];
            let is_free = || !self.locks[..*index].iter().any(|other| other.conflicts(&lock.range, lock.exclusive));
            lock.job.is_some() && is_free()
        };
        let index = (0..self.locks.len()).find(can_run)?;
        let lock = &mut self.locks[index];
        Some((lock.number, lock.job.take()?))
    }
}

impl RangeLocks {
    /// Starts the thread, unless it is running.
    pub(super) fn start(&self) -> Result<()> {
        let mut queue = self.0.lock();
        if !queue.has_thread {
            let shared = self.0.clone();
            let thread = thread::Builder::new().name("ublk-ranges".into()).spawn(move || run_jobs(&shared));
            thread.map_err(|source| Error::Target { context: "starting a thread".into(), source })?;
            queue.has_thread = true;
        }
        Ok(())
    }

    /// Takes a lock, unless it conflicts with one that is held or was requested earlier.
    fn try_lock(&self, range: Range<u64>, exclusive: bool) -> Option<Held> {
        let mut queue = self.0.lock();
        if queue.locks.iter().any(|lock| lock.conflicts(&range, exclusive)) {
            return None;
        }
        let number = queue.add(range, exclusive, None);
        Some(Held { shared: self.0.clone(), number })
    }

    /// Runs a job on the separate thread when its lock is free.
    fn when_free(&self, range: Range<u64>, exclusive: bool, job: Job) {
        self.0.lock().add(range, exclusive, Some(job));
        self.0.changed.notify_one();
    }

    /// Serves a request under the lock of its range: immediately, or, if that is not free, on the separate thread.
    pub(super) fn serve<D: Locked>(&self, disk: &Arc<D>, mut request: Request<'_>) {
        let range = request.offset()..request.offset() + request.len();
        let exclusive = request.op() != Op::Read;
        if let Some(held) = self.try_lock(range.clone(), exclusive) {
            let result = disk.serve(&mut request);
            drop(held);
            return request.finish(result);
        }
        let (disk, mut request) = (disk.clone(), request.detach());
        let job = move |held| {
            let result = disk.serve(&mut request);
            drop(held);
            // Before the request completes, after which the device may stop and the next server needs its files.
            drop(disk);
            request.finish(result);
        };
        self.when_free(range, exclusive, Box::new(job));
    }
}

impl Drop for RangeLocks {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_one();
    }
}

fn run_jobs(shared: &Arc<Shared>) {
    let mut queue = shared.lock();
    loop {
        if let Some((number, job)) = queue.take_job() {
            drop(queue);
            let held = Held { shared: shared.clone(), number };
            if catch_unwind(AssertUnwindSafe(|| job(held))).is_err() {
                log::error!("the handler of a request that had waited for a lock panicked; the request fails with EIO");
            }
            queue = shared.lock();
        } else if queue.closed && queue.locks.iter().all(|lock| lock.job.is_none()) {
            return;
        } else {
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn locks() -> RangeLocks {
        let locks = RangeLocks::default();
        locks.start().unwrap();
        locks
    }

    #[test]
    fn only_overlapping_ranges_with_a_writer_conflict() {
        let locks = locks();
        let write = locks.try_lock(1000..2000, true).unwrap();
        assert!(locks.try_lock(1999..3000, true).is_none());
        assert!(locks.try_lock(0..1001, false).is_none());
        let beside = [locks.try_lock(2000..3000, true), locks.try_lock(0..1000, true), locks.try_lock(0..0, true)];
        assert!(beside.iter().all(Option::is_some), "a flush has no range");
        drop(beside);
        drop(write);
        let read = locks.try_lock(1000..2000, false).unwrap();
        assert!(locks.try_lock(1500..1600, false).is_some(), "readers share");
        assert!(locks.try_lock(1500..1600, true).is_none());
        drop(read);
        assert!(locks.try_lock(1500..1600, true).is_some());
    }

    #[test]
    fn waiting_requests_are_served_in_order() {
        let locks = locks();
        let (sender, served) = mpsc::channel();
        let job = |name: &'static str| {
            let sender = sender.clone();
            Box::new(move |held| {
                sender.send(name).unwrap();
                drop(held);
            }) as Job
        };
        let read = locks.try_lock(0..1000, false).unwrap();
        locks.when_free(500..600, true, job("write"));
        locks.when_free(0..1000, false, job("read after the write"));
        assert!(locks.try_lock(500..600, false).is_none(), "readers do not starve the writer");
        locks.when_free(2000..3000, true, job("elsewhere"));
        assert_eq!(served.recv().unwrap(), "elsewhere");
        drop(read);
        assert_eq!([served.recv().unwrap(), served.recv().unwrap()], ["write", "read after the write"]);
    }

    #[test]
    fn a_job_that_panics_releases_its_lock() {
        let locks = locks();
        let read = locks.try_lock(0..10, false).unwrap();
        locks.when_free(0..10, true, Box::new(|_held| panic!("a fault of the target")));
        let (sender, served) = mpsc::channel();
        locks.when_free(0..10, true, Box::new(move |_held| sender.send(()).unwrap()));
        drop(read);
        served.recv().unwrap();
    }

    #[test]
    fn the_thread_ends_after_the_last_job() {
        let locks = locks();
        let (sender, served) = mpsc::channel();
        let read = locks.try_lock(0..10, false).unwrap();
        let shared = Arc::downgrade(&locks.0);
        locks.when_free(0..10, true, Box::new(move |_held| sender.send(()).unwrap()));
        drop(locks);
        drop(read);
        served.recv().unwrap();
        while shared.strong_count() != 0 {
            thread::yield_now();
        }
    }
}
