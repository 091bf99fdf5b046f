// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which queue is served by which thread.
//!
//! A pool has a limit of threads. A queue goes to a thread of its own while the limit allows, and to
//! the least loaded one after that; a thread ends when its last queue is closed. So one process can
//! serve any number of devices on a handful of threads.

use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::guard::drop_guarded;
use super::queue::QueueSetup;
use super::ring_thread;
use crate::driver::{Driver, Waker};
use crate::error::{Error, Result};
use crate::memory::IoBuffer;
use crate::request::Return;
use crate::units::{DeviceId, QueueId, Tag};

/// Starts the threads that serve queues. A language binding uses this to make threads that its
/// runtime knows.
pub trait Spawn: Send + Sync + Debug {
    /// Runs `body` on a new thread called `name`.
    ///
    /// # Errors
    ///
    /// Whatever kept the thread from starting. The device is not made then, also if the thread runs after
    /// all.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<()>;
}

/// Plain threads of the standard library.
#[derive(Debug)]
pub struct StdSpawn;

impl Spawn for StdSpawn {
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        std::thread::Builder::new().name(name).spawn(body).map(drop)
    }
}

/// What becomes of a device whose queues are given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Successor {
    /// Another server: not before files have done what this one has asked them for.
    Server,
    /// It is deleted.
    None,
}

/// What a ring thread is asked to do.
#[derive(Debug)]
pub(super) enum Message {
    /// Begin to serve a queue.
    Open { setup: Box<QueueSetup>, reply: Sender<Result<()>> },
    /// Give up the queues of a device whose commands do not end.
    Abandon { device: DeviceId, successor: Successor },
}

/// A request that comes back from elsewhere.
#[derive(Debug)]
pub(super) struct Returned {
    /// The queue's place.
    pub(super) place: u32,
    pub(super) tag: Tag,
    pub(super) buffer: Option<Arc<IoBuffer>>,
    pub(super) what: Return,
}

/// Messages to one ring thread.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    state: Mutex<InboxState>,
    /// Set behind whatever is put in, before the thread is woken: it need not look without.
    filled: AtomicBool,
    waker: OnceLock<Arc<dyn Waker>>,
}

#[derive(Debug, Default)]
struct InboxState {
    messages: Vec<Message>,
    returned: Vec<Returned>,
    /// Queues that the thread serves or was asked to.
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

    /// Leaves a message; gives it back if the thread has ended.
    fn post(&self, message: Message) -> Result<(), Message> {
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

    /// Whether something has come.
    pub(super) fn is_filled(&self) -> bool {
        self.filled.load(Ordering::Acquire)
    }

    /// Takes what has come: messages, and requests, which go to the end of `returned`.
    pub(super) fn take(&self, returned: &mut Vec<Returned>) -> Vec<Message> {
        let mut state = self.state();
        self.filled.store(false, Ordering::Relaxed);
        returned.append(&mut state.returned);
        std::mem::take(&mut state.messages)
    }

    /// Gives back a request. If the thread has ended, its queues were given up before, and the request is dropped with
    /// the files that it was to be forwarded to.
    pub(crate) fn returned(&self, place: u32, tag: Tag, buffer: Option<Arc<IoBuffer>>, what: Return) {
        let mut state = self.state();
        if state.closed {
            drop(state);
            log::debug!("late answer to a request whose thread has ended: tag {tag}");
            return;
        }
        state.returned.push(Returned { place, tag, buffer, what });
        self.filled.store(true, Ordering::Release);
        let first = state.returned.len() == 1;
        drop(state);
        // The thread takes all at once: it is awake, or about to be, if there was one before.
        if first && let Some(waker) = self.waker.get() {
            waker.wake();
        }
    }

    /// A queue is closed.
    pub(super) fn unload(&self) {
        self.state().load -= 1;
    }

    /// Ends the inbox if nobody wants anything; true if it has ended.
    pub(super) fn close_if_empty(&self) -> bool {
        let mut state = self.state();
        state.closed = state.messages.is_empty();
        let late = if state.closed { std::mem::take(&mut state.returned) } else { Vec::new() };
        let closed = state.closed;
        // To drop one is to run what was to be kept for it.
        drop(state);
        drop(late);
        closed
    }

    /// Ends the inbox and refuses whatever is in it.
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

/// The threads of one server.
#[derive(Debug)]
pub(crate) struct ThreadPool {
    driver: Arc<dyn Driver>,
    spawn: Arc<dyn Spawn>,
    limit: usize,
    threads: Mutex<Vec<Arc<Inbox>>>,
}

impl ThreadPool {
    pub(crate) fn new(driver: Arc<dyn Driver>, spawn: Arc<dyn Spawn>, limit: usize) -> Self {
        ThreadPool { driver, spawn, limit: limit.max(1), threads: Mutex::default() }
    }

    /// Finds a thread for the queue. The receiver tells whether the queue is open.
    ///
    /// After an error, the queue has told its device that it is closed, or will.
    pub(crate) fn open(&self, setup: QueueSetup) -> io::Result<Receiver<Result<()>>> {
        let (reply, opened) = channel();
        let mut message = Message::Open { setup: Box::new(setup), reply };
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        threads.retain(|inbox| !inbox.state().closed);
        if threads.len() >= self.limit {
            // Each is looked at once: other threads change it meanwhile, and no sort stands that.
            threads.sort_by_cached_key(|inbox| inbox.state().load);
            for inbox in threads.iter() {
                match inbox.post(message) {
                    Ok(()) => return Ok(opened),
                    Err(back) => message = back,
                }
            }
        }
        let Message::Open { setup, .. } = &message else { unreachable!("made above") };
        // The kernel keeps 15 characters of a thread's name.
        let name = format!("ublk{}q{}", setup.info.device, setup.info.queue);
        let inbox = Arc::new(Inbox::default());
        if inbox.post(message).is_err() {
            unreachable!("a new inbox is open");
        }
        let (driver, theirs) = (self.driver.clone(), inbox.clone());
        let spawned = self.spawn.spawn(name, Box::new(move || ring_thread::run(&*driver, &theirs)));
        match spawned {
            Ok(()) => threads.push(inbox),
            // If the thread runs in spite of the error, it has the message, and closes the queue when the
            // device is stopped; else the message is still here.
            Err(_) => inbox.refuse(&|device, queue| {
                let reason = "its thread was not started".to_owned();
                Error::Queue { device, queue, reason }
            }),
        }
        spawned.map(|()| opened)
    }

    /// Has all threads give up a device's queues.
    pub(crate) fn abandon(&self, device: DeviceId, successor: Successor) {
        for inbox in self.threads.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            // A thread that has ended has no queues.
            let _ = inbox.post(Message::Abandon { device, successor });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::memory::Descriptor;
    use crate::request::{Durability, Errand, FilePiece, FileRange, Op};

    fn forwarded(file: &Arc<File>) -> Return {
        let descriptor = Descriptor { op_flags: 0, nr_sectors: 8, start_sector: 0, address: 0 };
        let pieces = FilePiece { file: FileRange::new(file, 0), len: 4096 }.into();
        let durability = Durability::default();
        Return::Forward(Box::new(Errand { op: Op::Read, descriptor, pieces, keep: None, shared: None, durability }))
    }

    #[test]
    fn a_closed_inbox_keeps_nothing_that_comes_back() {
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
