// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pull interface, for programs with threads or an event loop of their own: they take requests out of queues.
//!
//! [`pull`](crate::pull()) creates a target and a [`PullQueue`] per hardware queue. Any thread may take requests out of a
//! queue, read or fill their data and end them, in any order. No knowledge of io_uring is needed; the data is copied in
//! parallel if the driver has `USER_COPY` (6.5). A thread that ends several requests in a row sends their ends together
//! ([`corked`]). With the feature `tokio`, tasks await requests (`AsyncPullQueue`).
//!
//! ```no_run
//! use std::sync::Arc;
//! use ublk_core::{DeviceOptions, Op, Params, Server, pull};
//!
//! # fn main() -> ublk_core::Result<()> {
//! let (target, queues) = pull(Params::new(1 << 30, 512), 1)?;
//! for queue in queues {
//!     std::thread::spawn(move || {
//!         while let Some(batch) = queue.next_batch(64) {
//!             for mut request in batch {
//!                 let result = match request.op() {
//!                     Op::Read => request.write_data(0, &vec![0; request.len() as usize]),
//!                     _ => Ok(()),
//!                 };
//!                 request.finish(result);
//!             }
//!         }
//!     });
//! }
//! let device = Server::new()?.start(target, &DeviceOptions::default())?;
//! device.wait(None);
//! device.stop()
//! # }
//! ```

#[cfg(feature = "tokio")]
mod tokio;

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

#[cfg(feature = "tokio")]
pub use self::tokio::AsyncPullQueue;
use crate::data::Access;
pub use crate::engine::{corked, uncork_if_slow};
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result};
use crate::fork::Maker;
use crate::params::Params;
use crate::request::{DetachedRequest, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};
use crate::uapi::UBLK_MAX_NR_QUEUES as MAX_QUEUES;
use crate::units::QueueId;

/// Creates a target whose requests are taken out of the returned queues, one for each hardware queue. Consumers copy data by
/// [`read_data`](crate::Request::read_data) and [`write_data`](crate::Request::write_data).
///
/// Consumers should run before the device starts: before Linux 7.0 that includes the partition scan. The driver creates at
/// most as many queues as there are CPUs; further ones end at once.
///
/// # Errors
///
/// [`Error::InvalidValue`] for an impossible shape or number of queues.
pub fn pull(params: Params, queues: u32) -> Result<(Arc<dyn Target>, Vec<PullQueue>)> {
    pull_with("pull", params, Access::Copies, queues)
}

/// Like [`pull`](crate::pull()), with a name and with another use of the data.
///
/// # Errors
///
/// As [`pull`](crate::pull()).
pub fn pull_with(
    kind: impl Into<String>,
    params: Params,
    access: Access,
    queues: u32,
) -> Result<(Arc<dyn Target>, Vec<PullQueue>)> {
    params.validate()?;
    let (senders, queues) = channels(queues)?;
    Ok((Arc::new(PullTarget { kind: kind.into(), params, access, senders }), queues))
}

/// Creates queues for a target that sends some of its requests there, and serves others by itself.
///
/// # Errors
///
/// [`Error::InvalidValue`] for an impossible number of queues.
pub fn channels(queues: u32) -> Result<(PullSenders, Vec<PullQueue>)> {
    if !(1..=u32::from(MAX_QUEUES)).contains(&queues) {
        return Err(Error::invalid(Parameter::Queues, queues, format!("must be from 1 to {MAX_QUEUES}")));
    }
    let shared = (0..queues).map(|_| Shared::new().map(Arc::new)).collect::<Result<Vec<_>>>()?;
    let queues = shared.iter().map(|shared| PullQueue(shared.clone())).collect();
    Ok((PullSenders(shared), queues))
}

/// The sending ends of [`PullQueue`]s, one for each hardware queue; part of a target.
///
/// The server holds its target until all queues are open. When this is dropped, those that are not open end.
#[derive(Debug)]
pub struct PullSenders(Vec<Arc<Shared>>);

impl PullSenders {
    /// Opens the sender for the handler of a hardware queue.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if there are fewer queues.
    pub fn open(&self, queue: QueueId) -> Result<PullSender> {
        let shared = self.0.get(usize::from(queue.0)).ok_or_else(|| {
            Error::mismatch(Parameter::Queues, queue.0 + 1, format!("the target was created for {}", self.0.len()))
        })?;
        shared.open();
        Ok(PullSender(shared.clone()))
    }
}

impl Drop for PullSenders {
    fn drop(&mut self) {
        self.0.iter().for_each(|shared| shared.never());
    }
}

/// Sends requests of a queue's handler to consumers. Dropping the last one ends the [`PullQueue`].
#[derive(Debug)]
pub struct PullSender(Arc<Shared>);

impl PullSender {
    /// Sends requests, and wakes consumers once.
    pub fn send(&self, requests: impl Iterator<Item = DetachedRequest>) {
        self.0.send(requests);
    }
}

impl Drop for PullSender {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A queue of requests of one hardware queue.
///
/// Its descriptor ([`AsFd`]) can be polled: it is readable while there are requests, and once the queue has ended. Dropping
/// the queue fails the requests in it, and later ones, with `EIO`.
#[derive(Debug)]
pub struct PullQueue(Arc<Shared>);

impl PullQueue {
    /// Waits for requests and takes all that are there, at most `max`, in the order in which they arrived. Returns `None` once
    /// the device has ended and no more requests will arrive. A `max` of 0 takes none and does not wait.
    ///
    /// Stopping a device waits for its requests, so keep taking them until this returns `None`.
    pub fn next_batch(&self, max: usize) -> Option<Vec<DetachedRequest>> {
        self.0.take(max, None).map(|batch| batch.unwrap_or_default())
    }

    /// Like [`next_batch`](PullQueue::next_batch), but returns an empty batch after `timeout`. With a time-out of zero it does
    /// not wait.
    pub fn next_batch_timeout(&self, max: usize, timeout: Duration) -> Option<Vec<DetachedRequest>> {
        self.0.take(max, Some(timeout)).map(|batch| batch.unwrap_or_default())
    }
}

impl AsFd for PullQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.watch();
        self.0.event.as_fd()
    }
}

impl AsRawFd for PullQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for PullQueue {
    fn drop(&mut self) {
        if !self.0.maker.is_here() {
            // The requests and the event are the parent's. Another thread of it may have had the lock at the fork.
            std::mem::forget(self.0.clone());
            return;
        }
        let mut state = self.0.state();
        state.unwanted = true;
        let left = std::mem::take(&mut state.requests);
        // Wakes pollers of a duplicate of the descriptor.
        let signalled = self.0.signal();
        // Each is failed by its own drop, which takes another lock.
        drop(state);
        complain(signalled);
        drop(left);
    }
}

/// Between a queue's thread and its consumers.
#[derive(Debug)]
struct Shared {
    state: Mutex<PullState>,
    changed: Condvar,
    /// Readable while there is something to take, or nothing will come any more, if it is watched.
    event: EventFd,
    /// The descriptor was asked for. Until then the event is left alone, which saves two system calls per wake-up.
    watched: AtomicBool,
    /// The process of the queue. A forked child's copy of it is not used.
    maker: Maker,
}

#[derive(Debug, Default)]
struct PullState {
    requests: VecDeque<DetachedRequest>,
    /// Open senders.
    senders: usize,
    /// A sender was opened, or never will be.
    opened: bool,
    /// The queue was dropped.
    unwanted: bool,
    /// Threads that wait for requests, or were woken and do not run yet.
    waiting: usize,
}

impl PullState {
    fn ended(&self) -> bool {
        self.opened && self.senders == 0
    }
}

impl Shared {
    fn new() -> Result<Self> {
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(|errno| Error::Ring { errno: errno.into(), hint: "cannot create an eventfd".into() })?;
        Ok(Shared {
            state: Mutex::default(),
            changed: Condvar::new(),
            event,
            watched: AtomicBool::new(false),
            maker: Maker::here(),
        })
    }

    fn state(&self) -> MutexGuard<'_, PullState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns `None` at the end, `Some(None)` after the time-out.
    fn take(&self, max: usize, timeout: Option<Duration>) -> Option<Option<Vec<DetachedRequest>>> {
        if !self.maker.is_here() {
            return None;
        }
        // A time that no clock reaches is none.
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.state();
        loop {
            let count = state.requests.len().min(max);
            if count != 0 {
                let batch = state.requests.drain(..count).collect();
                if state.requests.is_empty() && !state.ended() && self.watched.load(Ordering::Relaxed) {
                    // Under the lock, so that it agrees with the queue.
                    let _ = self.event.read();
                }
                return Some(Some(batch));
            }
            if state.ended() && state.requests.is_empty() {
                return None;
            }
            if max == 0 {
                return Some(None);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Some(None);
            }
            state.waiting += 1;
            state = match left {
                Some(left) => self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
            state.waiting -= 1;
        }
    }

    /// Wakes all consumers, with the lock held. Check the result without the lock: a logger may wait for a consumer.
    fn signal(&self) -> Result<(), Errno> {
        self.changed.notify_all();
        self.signal_event()
    }

    /// Makes the event readable if it is watched, with the lock held.
    fn signal_event(&self) -> Result<(), Errno> {
        if self.watched.load(Ordering::Relaxed) {
            self.event.write(1)?;
        }
        Ok(())
    }

    /// Keeps the event up to date from now on.
    fn watch(&self) {
        if self.watched.load(Ordering::Relaxed) {
            return;
        }
        // `watched` changes under the lock, so that no change of the queue is missed.
        let state = self.state();
        let signalled = if self.watched.swap(true, Ordering::Relaxed) {
            Ok(())
        } else if !state.requests.is_empty() || state.ended() || state.unwanted {
            self.signal_event()
        } else {
            Ok(())
        };
        drop(state);
        complain(signalled);
    }

    fn send(&self, requests: impl Iterator<Item = DetachedRequest>) {
        // Not under the lock: loading their data takes a while, and may log errors.
        let requests: Vec<_> = requests.collect();
        let count = requests.len();
        let mut state = self.state();
        if state.unwanted {
            drop(state);
            return requests.into_iter().for_each(|request| request.fail(Errno::EIO));
        }
        state.requests.extend(requests);
        // All may have failed.
        let signalled = if count == 0 { Ok(()) } else { self.signal_event() };
        let waiting = state.waiting;
        drop(state);
        // No more of them than there are requests: the others would find nothing.
        if count >= waiting {
            self.changed.notify_all();
        } else {
            (0..count).for_each(|_| self.changed.notify_one());
        }
        complain(signalled);
    }

    fn open(&self) {
        let mut state = self.state();
        state.opened = true;
        state.senders += 1;
    }

    fn close(&self) {
        let mut state = self.state();
        state.senders -= 1;
        let signalled = if state.senders == 0 { self.signal() } else { Ok(()) };
        drop(state);
        complain(signalled);
    }

    /// Ends the queue if no sender was ever opened.
    fn never(&self) {
        let mut state = self.state();
        if !state.opened {
            state.opened = true;
            let signalled = self.signal();
            drop(state);
            complain(signalled);
        }
    }
}

fn complain(signalled: Result<(), Errno>) {
    if let Err(errno) = signalled {
        log::error!("signalling requests: {errno}");
    }
}

#[derive(Debug)]
struct PullTarget {
    kind: String,
    params: Params,
    access: Access,
    senders: PullSenders,
}

impl Target for PullTarget {
    fn kind(&self) -> &str {
        &self.kind
    }

    fn params(&self) -> Params {
        self.params
    }

    fn access(&self) -> Access {
        self.access
    }

    fn open_queue(self: Arc<Self>, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(PullHandler(self.senders.open(queue.queue)?)))
    }
}

struct PullHandler(PullSender);

impl QueueHandler for PullHandler {
    fn handle(&mut self, requests: Requests<'_>) {
        self.0.send(requests.map(Request::detach));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{server, until};
    use crate::{Device, DeviceOptions};

    /// A device with one queue, which the caller serves.
    pub(super) fn start(driver: &FakeDriver, depth: u32) -> (Device, PullQueue) {
        let (target, mut queues) = pull(Params::new(1 << 20, 512), 1).unwrap();
        let device = server(driver).start(target, &DeviceOptions::new().queues(1).depth(depth)).unwrap();
        (device, queues.remove(0))
    }

    fn is_readable(queue: &PullQueue, timeout: PollTimeout) -> bool {
        poll(&mut [PollFd::new(queue.as_fd(), PollFlags::POLLIN)], timeout).unwrap() == 1
    }

    #[test]
    fn a_descriptor_that_is_asked_for_late_shows_what_is_there() {
        let driver = FakeDriver::new();
        let (device, queue) = start(&driver, 4);
        let disk = driver.disk(device.id());
        let clients: Vec<_> = (0..2)
            .map(|n| {
                let disk = disk.clone();
                std::thread::spawn(move || disk.write(n * 512, &[1; 512]))
            })
            .collect();
        until("both requests", || queue.0.state().requests.len() == 2);
        assert!(is_readable(&queue, PollTimeout::ZERO));
        let first = queue.next_batch(1).unwrap();
        assert!(is_readable(&queue, PollTimeout::ZERO));
        let second = queue.next_batch(1).unwrap();
        assert!(!is_readable(&queue, PollTimeout::ZERO));
        first.into_iter().chain(second).for_each(DetachedRequest::complete);
        clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
        // And what comes later, up to the end.
        let client = std::thread::spawn(move || disk.read(0, 512).map(drop));
        assert!(is_readable(&queue, PollTimeout::from(60_000u16)));
        queue.next_batch(1).unwrap().into_iter().for_each(DetachedRequest::complete);
        client.join().unwrap().unwrap();
        device.stop().unwrap();
        assert!(is_readable(&queue, PollTimeout::ZERO));
        assert!(queue.next_batch(1).is_none());
    }

    #[test]
    fn a_forked_child_that_drops_a_queue_leaves_it_to_its_parent() {
        use nix::sys::wait::{WaitStatus, waitpid};
        use nix::unistd::{ForkResult, fork};
        let driver = FakeDriver::new();
        let (device, queue) = start(&driver, 4);
        let disk = driver.disk(device.id());
        let client = std::thread::spawn(move || disk.read(0, 512).map(drop));
        assert!(is_readable(&queue, PollTimeout::from(60_000u16)));
        let requests = queue.next_batch(1).unwrap();
        assert!(!is_readable(&queue, PollTimeout::ZERO));
        // SAFETY: the child drops its copy of the queue, which neither allocates nor takes a lock, and exits.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                drop(queue);
                // SAFETY: as above.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0))),
        }
        assert!(!is_readable(&queue, PollTimeout::ZERO));
        requests.into_iter().for_each(DetachedRequest::complete);
        client.join().unwrap().unwrap();
        device.stop().unwrap();
    }

    #[test]
    fn consumers_that_wait_serve_every_request_once() {
        const CLIENTS: u64 = 4;
        const EACH: u64 = 500;
        let driver = FakeDriver::new();
        let (device, queue) = start(&driver, 8);
        let disk = driver.disk(device.id());
        let (queue, served) = (Arc::new(queue), Arc::new(Mutex::new(BTreeSet::new())));
        // More than there are requests at a time, so that some always wait.
        let consumers: Vec<_> = (0..8)
            .map(|_| {
                let (queue, served) = (queue.clone(), served.clone());
                std::thread::spawn(move || {
                    while let Some(batch) = queue.next_batch(1) {
                        for request in batch {
                            assert!(served.lock().unwrap().insert(request.offset()));
                            request.complete();
                        }
                    }
                })
            })
            .collect();
        let clients: Vec<_> = (0..CLIENTS)
            .map(|client| {
                let disk = disk.clone();
                std::thread::spawn(move || (0..EACH).try_for_each(|n| disk.write((client * EACH + n) * 512, &[1; 512])))
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap().unwrap());
        device.stop().unwrap();
        consumers.into_iter().for_each(|consumer| consumer.join().unwrap());
        assert_eq!(served.lock().unwrap().len() as u64, CLIENTS * EACH);
    }
}
