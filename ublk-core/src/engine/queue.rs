// SPDX-License-Identifier: MIT OR Apache-2.0

//! One queue of one device, as its ring thread sees it.

use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::cookie::{Cookie, Kind};
use super::core::{Deliveries, QueueCore, Seat};
use super::events::OpenQueue;
use super::guard::{drop_guarded, guarded};
use super::pool::Successor;
use super::tags::Event;
use super::transfer::{Transfer, ZEROS_LEN};
use crate::data::shared::SharedTable;
use crate::data::{Access, DataMovement};
use crate::driver::{CharDevice, Completion};
use crate::errno::RawErrno;
use crate::error::{Error, Result};
use crate::memory::IoBuffer;
use crate::placement::CpuSet;
use crate::request::{Answer, FileSync, Origin, Requests, Return};
use crate::stats::QueueStats;
use crate::target::{QueueHandler, QueueInfo, Target};
use crate::uapi;
use crate::units::{DeviceId, Tag};

/// All that a ring thread needs to begin serving a queue, or its share of one.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    pub(crate) info: QueueInfo,
    /// The tags that are this thread's.
    pub(crate) tags: Range<u16>,
    pub(crate) data: DataMovement,
    /// Commits in batches.
    pub(crate) batch: bool,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) file: Arc<dyn CharDevice>,
    pub(crate) shared: Arc<SharedTable>,
    /// How files are synced that the user has opened.
    pub(crate) sync: FileSync,
    pub(crate) access: Access,
    pub(crate) events: OpenQueue,
    pub(crate) stats: Arc<QueueStats>,
    /// Where it wants to be served; `None` for anywhere.
    pub(crate) cpus: Option<CpuSet>,
    /// How long its requests may gather; zero for not at all.
    pub(crate) coalescing: Duration,
}

/// One queue and its handler.
pub(crate) struct Queue {
    // Before `core`: a handler may hold buffers.
    handler: Handler,
    core: QueueCore,
    /// Tags that the server owns and the handler has not seen.
    ready: Vec<Tag>,
    cpus: Option<CpuSet>,
    coalescing: Duration,
    /// It serves no more, and waits for what keeps it from being closed.
    given_up: Option<Successor>,
    // Last: the device may be deleted, or get another server, once this is gone.
    events: OpenQueue,
}

/// A handler that is dropped whatever it does.
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
    /// The driver may have tags of it: completions may still come for its place.
    pub(super) lent: bool,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("core", &self.core).field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Queue {
    /// Sets a queue up and lends all its tags to the driver.
    pub(super) fn open(setup: QueueSetup, seat: &Seat<'_>) -> Result<Self, OpenFailure> {
        let (info, target) = (setup.info, setup.target);
        let refused = |what: &str, e: &dyn std::fmt::Display| Error::Queue {
            device: info.device,
            queue: info.queue,
            reason: format!("{what}: {e}"),
        };
        let not_lent = |error| OpenFailure { error, lent: false };
        let opened = guarded(|| target.open_queue(&info));
        // This may be the last of it, if the device was given up meanwhile.
        drop_guarded(target, || format!("the target of ublkb{}", info.device));
        let opened = opened.unwrap_or_else(|panic| Err(refused("the target panicked", &panic)));
        let handler = Handler { inner: Some(opened.map_err(not_lent)?), info };
        let origin = Origin {
            device: info.device,
            queue: info.queue,
            data: setup.data,
            access: setup.access,
            shared: setup.shared,
            sync: setup.sync,
            integrity: info.integrity,
            file: setup.file,
        };
        let core = QueueCore::new(info, origin, setup.batch, setup.stats, seat).map_err(|(what, source)| {
            let context = format!("queue {} of device {}: {what}", info.queue, info.device);
            not_lent(Error::Target { context, source })
        })?;
        let queue = Queue {
            handler,
            core,
            ready: Vec::with_capacity(usize::from(info.depth)),
            cpus: setup.cpus,
            coalescing: setup.coalescing,
            given_up: None,
            events: setup.events,
        };
        queue.core.lend_all(setup.tags);
        // Now, not with the next wait: whoever hears that the queue is open may stop the device, and a
        // fetch that comes after that would wait for ever on drivers before Linux 7.3.
        queue.core.submit();
        if let Some(error) = queue.take_ring_failure() {
            queue.core.leak_memory();
            queue.core.leave_ring();
            let context = format!("queue {} of device {}: submitting its fetches", info.queue, info.device);
            return Err(OpenFailure { error: Error::Target { context, source: error }, lent: true });
        }
        queue.events.entered();
        Ok(queue)
    }

    /// Takes a completion that belongs to this queue.
    pub(super) fn completed(&mut self, cookie: Cookie, completion: Completion) {
        let (tag, result) = (cookie.tag, completion.result);
        if self.given_up.is_some() {
            return self.core.completed_late(cookie.kind, completion);
        }
        match cookie.kind {
            // Again if the driver could not copy the data: it has the request back, and asks anew.
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
                if let Err(errno) = RawErrno::check(result) {
                    self.fail(format!("the pages of tag {tag} do not leave the ring's table: {errno}"));
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

    /// Takes the tags that a batch brought.
    fn delivered(&mut self, completion: Completion) {
        let from = self.ready.len();
        if let Some(buffer) = completion.tags {
            let bytes = usize::try_from(completion.result).unwrap_or(0);
            // SAFETY: the buffer is the completion's, which is looked at once.
            unsafe { self.core.ring.borrow_mut().take_tags(buffer, bytes, &mut self.ready) };
        }
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
        match RawErrno::check(completion.result) {
            Ok(_) => self.core.fetch_batch(),
            // The buffers were all in use for a moment.
            Err(errno) if errno == Errno::ENOBUFS => self.core.fetch_batch(),
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

    /// Takes back a request that was elsewhere.
    pub(super) fn returned(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, what: Return) {
        if self.given_up.is_some() {
            log::debug!("{}: late answer to a request of an abandoned queue", self.core.name(tag));
            return;
        }
        match what {
            Return::Ended(answer) => self.core.commit(tag, buffer, answer),
            Return::Forward(errand) => self.core.forward(tag, buffer, *errand),
            Return::Synced => self.core.sync_counts(tag),
        }
    }

    /// Whether its handler took long for one of its last requests.
    pub(super) fn is_slow(&self) -> bool {
        self.core.pace.is_slow()
    }

    /// How many requests the handler has to do.
    pub(super) fn waiting(&self) -> usize {
        self.ready.len()
    }

    /// How long its requests may gather.
    pub(super) fn coalescing(&self) -> Duration {
        self.coalescing
    }

    /// Hands the requests to the handler that came at `came`; `now` is later if other queues were served first.
    pub(super) fn serve(&mut self, came: u64, now: u64) {
        self.core.round.set(came);
        self.core.pace.begin(now);
        let Queue { handler, core, ready, .. } = self;
        let Some(handler) = &mut handler.inner else { return };
        if let Err(panic) = guarded(|| handler.handle(Requests::new(core, ready))) {
            log::error!(
                "ublkb{} queue {}: the handler panicked: {}; its request fails with EIO, the device keeps running",
                self.core.info.device,
                self.core.info.queue,
                panic
            );
        }
    }

    /// Queues what is done, before the handler gets more to do.
    pub(super) fn flush_done(&self) {
        self.core.flush();
    }

    /// Queues what was gathered for the next submission, which follows now.
    pub(super) fn flush(&self) {
        self.core.flush();
        self.core.pace.end(self.core.count());
    }

    /// Whether the queue can be closed: nothing refers to it any more, or it was given up and what its device waits for
    /// is done.
    pub(super) fn is_over(&self) -> bool {
        match self.given_up {
            None => self.core.drained(),
            Some(successor) => self.core.is_released(successor == Successor::Server),
        }
    }

    /// Whether it was given up and not yet closed.
    pub(super) fn is_given_up(&self) -> bool {
        self.given_up.is_some()
    }

    /// Whether memory is held that a burst has touched.
    pub(super) fn is_warm(&self) -> bool {
        self.given_up.is_none() && self.core.warm.get()
    }

    /// Gives memory back that idle tags hold. The driver must not be at work on this ring.
    pub(super) fn cool(&self) {
        self.core.cool();
    }

    /// The ring's failure, if it failed under this queue.
    pub(crate) fn take_ring_failure(&self) -> Option<io::Error> {
        self.core.broken.borrow_mut().take()
    }

    /// Reports a failure that the device cannot live with.
    pub(crate) fn fail(&self, reason: String) {
        let info = self.core.info;
        log::error!("ublkb{} queue {}: {reason}", info.device, info.queue);
        self.events.failed(Error::Queue { device: info.device, queue: info.queue, reason });
    }

    /// Where it wants to be served.
    pub(super) fn cpus(&self) -> Option<CpuSet> {
        self.cpus
    }

    /// The device that the queue belongs to.
    pub(crate) fn device(&self) -> DeviceId {
        self.core.info.device
    }

    /// Gives the queue up: nothing of it reaches the driver or a file any more but what is queued, and it can be closed
    /// once it [is over](Queue::is_over). A second time may say that nothing comes next after all.
    pub(super) fn give_up(&mut self, successor: Successor) {
        if self.given_up.replace(successor).is_some() {
            return;
        }
        self.ready.clear();
        self.core.flush();
        self.core.unregister_all();
        self.core.submit();
        let (armed, owned) = (self.core.tags.borrow().armed(), self.core.tags.borrow().owned());
        let in_flight = self.core.transfers_in_flight();
        self.fail(format!(
            "given up with {armed} tags at the driver and {owned} requests unfinished, {in_flight} of them under way in files"
        ));
    }

    /// Closes a queue that is over. Of one that was given up, memory that the driver or a file may still refer to is
    /// leaked, and transfers that are on their way are returned, to be dropped when they end.
    pub(super) fn close(self) -> Vec<(Tag, Transfer)> {
        let Queue { handler, core, events, given_up, .. } = self;
        drop(handler);
        let transfers = if given_up.is_some() { core.leak_memory() } else { Vec::new() };
        core.leave_ring();
        drop(core);
        events.left();
        drop(events);
        transfers
    }

    /// Gives up the queue of a thread whose ring has failed and is about to be closed. The kernel closes a ring's files
    /// when all operations of it have ended, so that what files still do keeps the device from its next server.
    pub(super) fn abandon(mut self) {
        self.give_up(Successor::Server);
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

/// The zeros that stand in for `fallocate`, one run per thread.
pub(crate) fn shared_zeros() -> io::Result<Rc<IoBuffer>> {
    IoBuffer::new(ZEROS_LEN as usize).map(Rc::new)
}
