// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which queue is served by which thread.
//!
//! A pool has a limit of threads. A queue goes to a thread of its own while the limit allows, and to
//! the least loaded one after that; a thread ends when its last queue is closed. So one process can
//! serve any number of devices on a handful of threads.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use super::events::QueueEvents;
use super::inbox::{Inbox, Message, QueueSetup, Successor};
use super::ring_thread;
use crate::driver::Driver;
use crate::error::{Error, Result};
use crate::fork::PerProcess;

/// Starts the threads that serve queues. A language binding implements this so that its runtime knows the threads.
pub trait Spawn: Send + Sync + Debug {
    /// Runs `body` on a new thread called `name`.
    ///
    /// # Errors
    ///
    /// Why the thread was not started. The device is not created then, even if the thread runs after all.
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<()>;
}

/// Starts plain threads of the standard library.
#[derive(Debug)]
pub struct StdSpawn;

impl Spawn for StdSpawn {
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        std::thread::Builder::new().name(name).spawn(body).map(drop)
    }
}

/// The threads of one server.
#[derive(Debug)]
pub(crate) struct ThreadPool {
    driver: Arc<dyn Driver>,
    spawn: Arc<dyn Spawn>,
    limit: usize,
    /// Inboxes of the threads of this process. A forked child has none of its parent's threads and starts its own.
    threads: PerProcess<Vec<Arc<Inbox>>>,
}

impl ThreadPool {
    pub(crate) fn new(driver: Arc<dyn Driver>, spawn: Arc<dyn Spawn>, limit: usize) -> Self {
        ThreadPool { driver, spawn, limit: limit.max(1), threads: PerProcess::new() }
    }

    /// Creates another pool with a different limit.
    pub(crate) fn with_limit(&self, limit: usize) -> Self {
        Self::new(self.driver.clone(), self.spawn.clone(), limit)
    }

    /// Creates another pool whose threads are started by `spawn`.
    pub(crate) fn with_spawn(&self, spawn: Arc<dyn Spawn>) -> Self {
        Self::new(self.driver.clone(), spawn, self.limit)
    }

    /// Opens a queue on a thread of the pool. The receiver gets the outcome.
    ///
    /// After an error, the queue counts as closed for its device, at once or as soon as its thread notices.
    pub(crate) fn open(&self, setup: QueueSetup) -> io::Result<Receiver<Result<()>>> {
        let (reply, opened) = channel();
        let mut message = Message::Open { setup: Box::new(setup), reply };
        let mut threads = self.threads.lock();
        threads.retain(|inbox| !inbox.is_closed());
        if threads.len() >= self.limit {
            // Cached: other threads change the load meanwhile, and a sort needs a consistent order.
            threads.sort_by_cached_key(|inbox| inbox.load());
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
            // If the thread runs in spite of the error, it has taken the message, and closes the queue when the device is
            // stopped. Otherwise the message is still in the inbox.
            Err(_) => inbox.refuse(&|device, queue| {
                let reason = "its thread was not started".to_owned();
                Error::Queue { device, queue, reason }
            }),
        }
        spawned.map(|()| opened)
    }

    /// Makes all threads abandon the queues that report to `events`: those of one server of a device, and not of the next one.
    pub(crate) fn abandon(&self, events: &Arc<QueueEvents>, successor: Successor) {
        for inbox in self.threads.lock().iter() {
            // A thread that has ended has no queues.
            let _ = inbox.post(Message::Abandon { events: events.clone(), successor });
        }
    }
}
