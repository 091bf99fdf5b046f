// SPDX-License-Identifier: MIT OR Apache-2.0

//! Messages to a ring thread: queues to open or abandon, and requests that come back from other threads.

use std::iter::StepBy;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::events::{OpenQueue, QueueEvents};
use super::guard::drop_guarded;
use crate::data::shared::SharedTable;
use crate::data::{Access, DataMovement};
use crate::driver::{CharDevice, Waker};
use crate::error::{Error, Result};
use crate::fork::Maker;
use crate::memory::IoBuffer;
use crate::placement::CpuSet;
use crate::request::{Answer, FileRequest, FileSync};
use crate::stats::QueueStats;
use crate::target::{QueueInfo, Target};
use crate::units::{DeviceId, QueueId, Tag};

/// Everything that a ring thread needs to serve a queue, or its share of one.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    pub(crate) info: QueueInfo,
    /// The tags that the thread serves.
    pub(crate) tags: StepBy<Range<u16>>,
    pub(crate) data: DataMovement,
    /// Commits in batches.
    pub(crate) batch: bool,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) file: Arc<dyn CharDevice>,
    pub(crate) shared: Arc<SharedTable>,
    /// How files that the user has opened are synced.
    pub(crate) sync: FileSync,
    pub(crate) access: Access,
    pub(crate) events: OpenQueue,
    pub(crate) stats: Arc<QueueStats>,
    /// CPUs to serve the queue on; `None` for any.
    pub(crate) cpus: Option<CpuSet>,
    /// Coalescing window; zero disables coalescing.
    pub(crate) coalescing: Duration,
}

/// What happens to a device whose queues are abandoned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Successor {
    /// It gets another server, but only after files have finished what this server requested.
    Server,
    /// It is deleted.
    None,
}

/// An order to a ring thread.
#[derive(Debug)]
pub(super) enum Message {
    /// Open a queue and serve it.
    Open { setup: Box<QueueSetup>, reply: Sender<Result<()>> },
    /// Abandon the queues that report to `events`, whose commands do not end.
    Abandon { events: Arc<QueueEvents>, successor: Successor },
}

/// A request that comes back to the thread of its queue.
#[derive(Debug)]
pub(super) struct Returned {
    /// The queue's index among those of the thread.
    pub(super) queue: u32,
    pub(super) tag: Tag,
    pub(super) buffer: Option<Arc<IoBuffer>>,
    pub(super) reason: Return,
}

/// Why a request comes back.
#[derive(Debug)]
pub(crate) enum Return {
    /// It has ended.
    Ended(Answer),
    /// The engine is to carry it out on a file.
    Forward(Box<FileRequest>),
    /// Its sync counts now, or has failed because another one has.
    Synced,
}

/// The inbox of one ring thread.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    /// The process of the thread.
    maker: Maker,
    state: Mutex<InboxState>,
    /// Set after anything is put in, before the thread is woken, so that the thread can check without locking.
    filled: AtomicBool,
    waker: OnceLock<Arc<dyn Waker>>,
}

#[derive(Debug, Default)]
struct InboxState {
    messages: Vec<Message>,
    returned: Vec<Returned>,
    /// Number of queues that the thread serves or has been asked to serve.
    load: usize,
    /// The thread has ended or is about to.
    closed: bool,
}

impl Inbox {
    fn state(&self) -> MutexGuard<'_, InboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_waker(&self, waker: Arc<dyn Waker>) {
        assert!(self.waker.set(waker).is_ok(), "a thread makes one ring");
    }

    /// Returns whether the thread has ended.
    pub(super) fn is_closed(&self) -> bool {
        self.state().closed
    }

    /// Returns how many queues the thread serves or has been asked to serve.
    pub(super) fn load(&self) -> usize {
        self.state().load
    }

    /// Sends a message. Returns it as the error if the thread has ended.
    pub(super) fn post(&self, message: Message) -> Result<(), Message> {
        let mut state = self.state();
        if state.closed {
            return Err(message);
        }
        if matches!(message, Message::Open { .. }) {
            state.load += 1;
        }
        state.messages.push(message);
        self.filled.store(true, Ordering::Release);
        drop(state);
        // A thread that has no waker yet reads its messages before it first waits.
        if let Some(waker) = self.waker.get() {
            waker.wake();
        }
        Ok(())
    }

    /// Returns whether there is anything to take.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Takes all messages, and moves all requests to the end of `returned`.
    pub(super) fn take(&self, returned: &mut Vec<Returned>) -> Vec<Message> {
        let mut state = self.state();
        self.filled.store(false, Ordering::Relaxed);
        returned.append(&mut state.returned);
        std::mem::take(&mut state.messages)
    }

    /// Returns a request to the thread; see [`Inbox::return_all`].
    pub(super) fn returned(&self, queue: u32, tag: Tag, buffer: Option<Arc<IoBuffer>>, reason: Return) {
        self.return_all(std::iter::once(Returned { queue, tag, buffer, reason }));
    }

    /// Returns requests to the thread. If the thread has ended, its queues were abandoned before, and the requests are
    /// dropped with the files that they were to be forwarded to. In a forked child they are copies of the parent's, and left
    /// alone with its lock and its eventfd.
    pub(super) fn return_all(&self, requests: impl Iterator<Item = Returned>) {
        if !self.maker.is_here() {
            return requests.for_each(std::mem::forget);
        }
        let mut state = self.state();
        if state.closed {
            drop(state);
            requests.for_each(|request| {
                log::debug!("late answer to a request whose thread has ended: tag {}", request.tag);
            });
            return;
        }
        let was_empty = state.returned.is_empty();
        state.returned.extend(requests);
        self.filled.store(true, Ordering::Release);
        drop(state);
        // The thread takes all of them at once: if there was one before, it is awake or being woken.
        if was_empty && let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    /// Notes that a queue is closed.
    pub(super) fn unload(&self) {
        self.state().load -= 1;
    }

    /// Closes the inbox if it has no messages. Returns whether it is closed.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        state.closed = state.messages.is_empty();
        let late = if state.closed { std::mem::take(&mut state.returned) } else { Vec::new() };
        let closed = state.closed;
        // Dropping a request runs user code: without the lock.
        drop(state);
        drop(late);
        closed
    }

    /// Closes the inbox and refuses everything in it.
    pub(super) fn refuse(&self, error: &dyn Fn(DeviceId, QueueId) -> Error) {
        let (messages, late) = {
            let mut state = self.state();
            state.closed = true;
            (std::mem::take(&mut state.messages), std::mem::take(&mut state.returned))
        };
        drop(late);
        for message in messages {
            if let Message::Open { setup, reply } = message {
                let QueueSetup { info, target, events, file, .. } = *setup;
                drop(file);
                drop_guarded(target, || format!("the target of ublkb{}", info.device));
                drop(events);
                let _ = reply.send(Err(error(info.device, info.queue)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::memory::Descriptor;
    use crate::request::{Durability, FilePiece, FileRange, FileRequest, Op};

    fn forwarded(file: &Arc<File>) -> Return {
        let descriptor = Descriptor { op_flags: 0, nr_sectors: 8, start_sector: 0, address: 0 };
        let pieces = FilePiece { file: FileRange::new(file, 0), len: 4096 }.into();
        let durability = Durability::default();
        Return::Forward(Box::new(FileRequest {
            op: Op::Read,
            descriptor,
            pieces,
            keep_alive: None,
            shared: None,
            durability,
        }))
    }

    #[test]
    fn a_closed_inbox_drops_returned_requests() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        for early in [true, false] {
            let inbox = Inbox::default();
            if early {
                inbox.returned(0, Tag(0), None, forwarded(&file));
            }
            inbox.refuse(&|device, queue| Error::Queue { device, queue, reason: "a test".into() });
            if !early {
                inbox.returned(0, Tag(0), None, forwarded(&file));
            }
            assert_eq!(Arc::strong_count(&file), 1, "early: {early}");
            let inbox = Inbox::default();
            if early {
                inbox.returned(0, Tag(0), None, forwarded(&file));
            }
            assert!(inbox.close_if_empty());
            if !early {
                inbox.returned(0, Tag(0), None, forwarded(&file));
            }
            assert_eq!(Arc::strong_count(&file), 1, "early: {early}");
        }
    }
}
