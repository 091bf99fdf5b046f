// SPDX-License-Identifier: MIT OR Apache-2.0

//! One queue of one device, as its ring thread sees it.

use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;

use super::cookie::{Cookie, Kind};
use super::core::{Deliveries, QueueCore, Seat};
use super::events::QueueEvents;
use super::tags::Event;
use super::transfer::ZEROS_LEN;
use crate::data::DataMovement;
use crate::data::shared::SharedTable;
use crate::driver::{CharDevice, Completion};
use crate::errno::RawErrno;
use crate::error::{Error, Result};
use crate::memory::IoBuffer;
use crate::placement::CpuSet;
use crate::request::{Answer, Origin, Requests, Return};
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
    pub(crate) events: Arc<QueueEvents>,
    pub(crate) stats: Arc<QueueStats>,
    /// Where it wants to be served; `None` for anywhere.
    pub(crate) cpus: Option<CpuSet>,
    /// How long its requests may gather; zero for not at all.
    pub(crate) coalescing: Duration,
}

/// One queue and its handler.
pub(crate) struct Queue {
    // Before `core`: a handler may hold buffers.
    handler: Box<dyn QueueHandler>,
    core: QueueCore,
    /// Tags that the server owns and the handler has not seen.
    ready: Vec<Tag>,
    events: Arc<QueueEvents>,
    cpus: Option<CpuSet>,
    coalescing: Duration,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("core", &self.core).field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Queue {
    /// Sets a queue up and lends all its tags to the driver.
    pub(crate) fn open(setup: QueueSetup, seat: &Seat<'_>) -> Result<Self> {
        let info = setup.info;
        let refused = |what: &str, e: &dyn std::fmt::Display| Error::Queue {
            device: info.device,
            queue: info.queue,
            reason: format!("{what}: {e}"),
        };
        let handler = catch_unwind(AssertUnwindSafe(|| setup.target.open_queue(&info)))
            .unwrap_or_else(|panic| Err(refused("the target panicked", &panic_text(&*panic))))?;
        let origin = Origin {
            device: info.device,
            queue: info.queue,
            data: setup.data,
            access: setup.target.access(),
            shared: setup.shared,
            integrity: info.integrity,
            file: setup.file,
        };
        let core =
            QueueCore::new(info, origin, setup.batch, setup.stats, seat).map_err(|(what, e)| refused(&what, &e))?;
        let queue = Queue {
            handler,
            core,
            ready: Vec::with_capacity(usize::from(info.depth)),
            events: setup.events,
            cpus: setup.cpus,
            coalescing: setup.coalescing,
        };
        queue.core.lend_all(setup.tags);
        // Now, not with the next wait: whoever hears that the queue is open may stop the device, and a
        // fetch that comes after that would wait for ever on drivers before Linux 7.3.
        queue.core.submit();
        if let Some(error) = queue.take_ring_failure() {
            queue.core.leak_memory();
            queue.core.leave_ring();
            return Err(refused("lending its tags to the driver", &error));
        }
        Ok(queue)
    }

    /// Takes a completion that belongs to this queue.
    pub(super) fn completed(&mut self, cookie: Cookie, completion: Completion) {
        let (tag, result) = (cookie.tag, completion.result);
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
                log::error!("{}: the driver refused the commit: {errno}; failing the request", self.core.name(tag));
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
            self.core.ring.borrow_mut().take_tags(buffer, bytes, &mut self.ready);
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
        match what {
            Return::Ended(answer) => self.core.commit(tag, buffer, answer),
            Return::Forward(errand) => self.core.forward(tag, buffer, *errand),
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

    /// Hands the requests that came to the handler; `now` is when they came.
    pub(crate) fn serve(&mut self, now: u64) {
        self.core.round.set(now);
        self.core.pace.begin(now);
        let Queue { handler, core, ready, .. } = self;
        let result = catch_unwind(AssertUnwindSafe(|| handler.handle(Requests::new(core, ready))));
        if let Err(panic) = result {
            log::error!(
                "ublkb{} queue {}: the handler panicked: {}; its request failed with EIO, the device lives on",
                self.core.info.device,
                self.core.info.queue,
                panic_text(&*panic)
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

    /// Whether nothing refers to the queue any more and it can be closed.
    pub(crate) fn drained(&self) -> bool {
        self.core.drained()
    }

    /// Whether memory is held that a burst has touched.
    pub(super) fn is_warm(&self) -> bool {
        self.core.warm.get()
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

    /// Closes a drained queue: the char device is closed when its last queue went.
    pub(crate) fn close(self) {
        debug_assert!(self.drained());
        let Queue { handler, core, events, .. } = self;
        drop_handler(handler, &core.info);
        core.leave_ring();
        drop(core);
        events.closed();
    }

    /// Gives a queue up whose commands did not end. What the driver may still refer to is leaked.
    pub(crate) fn abandon(self) {
        // What is queued names files and memory that may be others' soon.
        self.core.submit();
        let (armed, owned) = (self.core.tags.borrow().armed(), self.core.tags.borrow().owned());
        self.fail(format!("given up with {armed} tags at the driver and {owned} requests unfinished"));
        let Queue { handler, core, events, .. } = self;
        drop_handler(handler, &core.info);
        core.leak_memory();
        core.leave_ring();
        drop(core);
        events.closed();
    }
}

/// Drops a handler, whatever it does.
fn drop_handler(handler: Box<dyn QueueHandler>, info: &QueueInfo) {
    if catch_unwind(AssertUnwindSafe(|| drop(handler))).is_err() {
        log::error!("ublkb{} queue {}: the handler panicked while it was dropped", info.device, info.queue);
    }
}

/// The zeros that stand in for `fallocate`, one run per thread.
pub(crate) fn shared_zeros() -> io::Result<Rc<IoBuffer>> {
    IoBuffer::new(ZEROS_LEN as usize).map(Rc::new)
}

/// The message of a panic.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}
