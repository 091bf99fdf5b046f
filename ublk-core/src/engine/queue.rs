// SPDX-License-Identifier: MIT OR Apache-2.0

//! One queue of one device, as its ring thread sees it.

use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::cookie::{Cookie, Kind};
use super::core::{Deliveries, QueueCore, ThreadParts};
use super::events::{OpenQueue, QueueEvents};
use super::guard::{drop_guarded, guarded};
use super::inbox::{QueueSetup, Return, Successor};
use super::tags::Event;
use super::transfer::{Transfer, ZEROS_LEN};
use crate::driver::Completion;
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::fork::Maker;
use crate::memory::IoBuffer;
use crate::placement::CpuSet;
use crate::request::{Answer, RequestContext, Requests};
use crate::target::{QueueHandler, QueueInfo};
use crate::uapi;
use crate::units::Tag;

/// One queue and its handler.
pub(crate) struct Queue {
    // Before `core`: a handler may hold buffers.
    handler: Handler,
    core: QueueCore,
    /// Tags with requests that the handler has not been given yet.
    ready: Vec<Tag>,
    cpus: Option<CpuSet>,
    coalescing: Duration,
    /// Set once the queue serves no more, and waits until it can be closed.
    abandoned: Option<Successor>,
    // Last: the device may be deleted, or get another server, once this is dropped.
    events: OpenQueue,
}

/// A handler whose panics while it is dropped are caught.
struct Handler {
    inner: Option<Box<dyn QueueHandler>>,
    info: QueueInfo,
}

impl Drop for Handler {
    fn drop(&mut self) {
        let QueueInfo { device, queue, .. } = self.info;
        drop_guarded(self.inner.take(), || format!("the handler of ublkb{device} queue {queue}"));
    }
}

/// Why a queue was not opened.
#[derive(Debug)]
pub(super) struct OpenFailure {
    pub(super) error: Error,
    /// Fetches of it may be with the driver: completions may still arrive for its index.
    pub(super) fetched: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("core", &self.core).field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Queue {
    /// Sets a queue up and fetches all its tags.
    pub(super) fn open(setup: QueueSetup, thread: &ThreadParts<'_>) -> Result<Self, OpenFailure> {
        let (info, target) = (setup.info, setup.target);
        let refused = |what: &str, e: &dyn std::fmt::Display| Error::Queue {
            device: info.device,
            queue: info.queue,
            reason: format!("{what}: {e}"),
        };
        let not_fetched = |error| OpenFailure { error, fetched: false };
        let opened = guarded(|| target.clone().open_queue(&info));
        // This may be the last reference, if the device was abandoned meanwhile.
        drop_guarded(target, || format!("the target of ublkb{}", info.device));
        let opened = opened.unwrap_or_else(|panic| Err(refused("the target panicked", &panic)));
        let handler = Handler { inner: Some(opened.map_err(not_fetched)?), info };
        let context = RequestContext {
            maker: Maker::here(),
            device: info.device,
            queue: info.queue,
            data: setup.data,
            access: setup.access,
            shared: setup.shared,
            sync: setup.sync,
            integrity: info.integrity,
            file: setup.file,
        };
        let core = QueueCore::new(info, context, setup.batch, setup.stats, thread).map_err(|(what, source)| {
            let context = format!("queue {} of device {}: {what}", info.queue, info.device);
            not_fetched(Error::Target { context, source })
        })?;
        let queue = Queue {
            handler,
            core,
            ready: Vec::with_capacity(usize::from(info.depth)),
            cpus: setup.cpus,
            coalescing: setup.coalescing,
            abandoned: None,
            events: setup.events,
        };
        queue.core.fetch_all(setup.tags);
        // Now, not with the next wait: once the queue is open the device may be stopped, and on drivers before Linux 7.3
        // a fetch that arrives after that would wait for ever.
        queue.core.submit();
        if let Some(error) = queue.take_ring_failure() {
            queue.core.leak_memory();
            queue.core.leave_ring();
            let context = format!("queue {} of device {}: submitting its fetches", info.queue, info.device);
            return Err(OpenFailure { error: Error::Target { context, source: error }, fetched: true });
        }
        queue.events.entered();
        Ok(queue)
    }

    /// Takes a completion that belongs to this queue.
    pub(super) fn completed(&mut self, cookie: Cookie, completion: Completion) {
        let (tag, result) = (cookie.tag, completion.result);
        if self.abandoned.is_some() {
            return self.core.completed_late(cookie.kind, completion);
        }
        match cookie.kind {
            // Again if the driver could not copy the data: it has taken the request back, and asks once more.
            Kind::Fetch | Kind::Commit | Kind::GetData if result == uapi::UBLK_IO_RES_NEED_GET_DATA => {
                self.core.get_data(tag);
            }
            Kind::Fetch => {
                let event = self.core.tags.borrow_mut().completed(tag, result, false);
                self.happened(tag, event, "FETCH_REQ");
            }
            Kind::GetData => {
                self.core.got_data(tag);
                let event = self.core.tags.borrow_mut().completed(tag, result, false);
                self.happened(tag, event, "NEED_GET_DATA");
            }
            Kind::Commit => {
                let event = self.core.tags.borrow_mut().completed(tag, result, true);
                self.happened(tag, event, "COMMIT_AND_FETCH_REQ");
            }
            Kind::Prepare => {
                if let Err(errno) = self.core.prepared(tag, result) {
                    self.fail(format!("the driver refused PREP_IO_CMDS: {errno}"));
                }
            }
            Kind::FetchBatch => self.delivered(completion),
            Kind::CommitBatch => {
                if let Some((tag, errno)) = self.core.batch_completed(tag, result) {
                    let event = self.core.tags.borrow_mut().commit_refused(tag, errno);
                    self.happened(tag, event, "COMMIT_IO_CMDS");
                }
                self.core.end_deliveries_if_idle();
            }
            Kind::Transfer => self.core.transfer_completed(tag, result),
            Kind::Unregister => {
                if let Err(errno) = Errno::check(result) {
                    self.fail(format!("the pages of tag {tag} were not removed from the ring's table: {errno}"));
                }
            }
        }
    }

    fn happened(&mut self, tag: Tag, event: Event, command: &str) {
        match event {
            Event::Request => self.ready.push(tag),
            Event::Gone => self.events.stopping(),
            Event::CommitRefused(errno) => {
                log::error!(
                    "{}: the driver refused to commit the result: {errno}; failing the request",
                    self.core.name(tag)
                );
                let buffer = self.core.take_buffer(tag);
                self.core.commit(tag, buffer, Answer::error(Errno::EIO));
            }
            Event::Lost(errno) => {
                self.fail(format!("the driver refused {command} of tag {tag}: {errno}"));
            }
        }
    }

    /// Takes the tags that a batch delivers.
    fn delivered(&mut self, completion: Completion) {
        let from = self.ready.len();
        self.core.take_tags(completion, &mut self.ready);
        let mut wrong = None;
        let mut tags = self.core.tags.borrow_mut();
        let mut at = from;
        while let Some(tag) = self.ready.get(at).copied() {
            if tags.delivered(tag) {
                at += 1;
            } else {
                wrong = Some(self.ready.remove(at));
            }
        }
        drop(tags);
        if let Some(tag) = wrong {
            self.fail(format!("the driver delivered tag {tag}, which it did not have"));
        }
        if completion.more {
            return;
        }
        match Errno::check(completion.result) {
            Ok(_) => self.core.fetch_batch(),
            // The buffers were all in use for a moment.
            Err(Errno::ENOBUFS) => self.core.fetch_batch(),
            Err(errno) => {
                self.core.deliveries.set(Deliveries::Ended);
                self.core.end_deliveries_if_idle();
                if errno == Errno::ENODEV {
                    self.events.stopping();
                } else {
                    self.fail(format!("the driver refused FETCH_IO_CMDS: {errno}"));
                }
            }
        }
    }

    /// Takes back a request from another thread.
    pub(super) fn returned(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, reason: Return) {
        if self.abandoned.is_some() {
            log::debug!("{}: late answer to a request of an abandoned queue", self.core.name(tag));
            return;
        }
        match reason {
            Return::Ended(answer) => self.core.commit(tag, buffer, answer),
            Return::Forward(request) => self.core.forward(tag, buffer, *request),
            Return::Synced => self.core.sync_counts(tag),
        }
    }

    /// Returns whether one of the last requests was slow.
    pub(super) fn is_slow(&self) -> bool {
        self.core.pace.is_slow()
    }

    /// Returns how many requests the handler has not been given yet.
    pub(super) fn waiting(&self) -> usize {
        self.ready.len()
    }

    /// The coalescing window; zero if coalescing is disabled.
    pub(super) fn coalescing(&self) -> Duration {
        self.coalescing
    }

    /// Calls the handler with the requests, which arrived at `arrived`.
    pub(super) fn serve(&mut self, arrived: u64) {
        self.core.accounting.begin_round(arrived);
        let Queue { handler, core, ready, .. } = self;
        let Some(handler) = &mut handler.inner else { return };
        if let Err(panic) = guarded(|| handler.handle(Requests::new(core, ready))) {
            log::error!(
                "ublkb{} queue {}: the handler panicked: {}; what it has not ended fails with EIO, the device keeps running",
                self.core.info.device,
                self.core.info.queue,
                panic
            );
        }
    }

    /// Queues commits for submission, before the handler is called again.
    pub(super) fn flush_done(&self) {
        self.core.flush();
    }

    /// Queues commits for submission, which follows now.
    pub(super) fn flush(&self) {
        self.core.flush();
        self.core.pace.end(self.core.accounting.publish());
    }

    /// Returns whether the queue can be closed: nothing refers to it any more, or it was abandoned and what its device waits
    /// for is done.
    pub(super) fn is_over(&self) -> bool {
        match self.abandoned {
            None => self.core.drained(),
            Some(successor) => self.core.is_released(successor == Successor::Server),
        }
    }

    /// Returns whether it was abandoned.
    pub(super) fn is_abandoned(&self) -> bool {
        self.abandoned.is_some()
    }

    /// Returns whether it holds memory that a burst of requests has used.
    pub(super) fn is_warm(&self) -> bool {
        self.abandoned.is_none() && self.core.warm.get()
    }

    /// Gives the memory of idle tags back to the system. The driver must not be working on this ring.
    pub(super) fn cool(&self) {
        self.core.cool();
    }

    /// Returns the ring's failure, if an operation of this queue has found it; later calls return nothing.
    pub(super) fn take_ring_failure(&self) -> Option<io::Error> {
        self.core.take_ring_failure()
    }

    /// Reports a failure that ends the device.
    pub(crate) fn fail(&self, reason: String) {
        let info = self.core.info;
        log::error!("ublkb{} queue {}: {reason}", info.device, info.queue);
        self.events.failed(Error::Queue { device: info.device, queue: info.queue, reason });
    }

    /// The CPUs to serve it on; `None` for any.
    pub(super) fn cpus(&self) -> Option<CpuSet> {
        self.cpus
    }

    /// Whether the queue belongs to the server whose queues report to `events`.
    pub(super) fn reports_to(&self, events: &Arc<QueueEvents>) -> bool {
        self.events.is_of(events)
    }

    /// Abandons the queue: nothing of it reaches the driver or a file any more except what is queued, and it can be closed
    /// once it [is over](Queue::is_over). A second call only changes the successor.
    pub(super) fn abandon(&mut self, successor: Successor) {
        if self.abandoned.replace(successor).is_some() {
            return;
        }
        self.ready.clear();
        self.core.flush();
        self.core.unregister_all();
        self.core.submit();
        let (armed, owned) = (self.core.tags.borrow().armed(), self.core.tags.borrow().owned());
        let in_flight = self.core.transfers_in_flight();
        self.fail(format!(
            "abandoned with {armed} tags fetched and {owned} requests unfinished, {in_flight} of them in flight on files"
        ));
    }

    /// Closes a queue that is over. If it was abandoned, memory that the driver or a file may still use is leaked, and the
    /// transfers in flight are returned, to be dropped when they end.
    pub(super) fn close(self) -> Vec<(Tag, Transfer)> {
        let Queue { handler, core, events, abandoned, .. } = self;
        drop(handler);
        let transfers = if abandoned.is_some() { core.leak_memory() } else { Vec::new() };
        core.leave_ring();
        drop(core);
        events.left();
        drop(events);
        transfers
    }

    /// Abandons and closes the queue of a thread whose ring has failed and is about to be closed. The kernel closes a ring's
    /// files when all its operations have ended, so that what files still do keeps the device from its next server.
    pub(super) fn close_without_ring(mut self) {
        self.abandon(Successor::Server);
        let Queue { handler, core, events, .. } = self;
        drop(handler);
        let in_flight = core.transfers_in_flight();
        core.leak_memory().into_iter().for_each(|(_, transfer)| transfer.abandon());
        if in_flight == 0 {
            core.leave_ring();
        }
        drop(core);
        events.left();
        drop(events);
    }
}

/// Allocates the zeros that are written where a file has no `fallocate`; one buffer per thread.
pub(crate) fn shared_zeros() -> io::Result<Rc<IoBuffer>> {
    IoBuffer::new(ZEROS_LEN as usize).map(Rc::new)
}
