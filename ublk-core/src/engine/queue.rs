// SPDX-License-Identifier: MIT OR Apache-2.0

//! One queue of one device, as its ring thread sees it.

use std::cell::{Cell, RefCell};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::time::{ClockId, clock_gettime};

use super::events::QueueEvents;
use super::tags::{Event, TagTable};
use super::transfer::{Next, Transfer, ZEROS_LEN};
use crate::driver::{CharDevice, Completion, FileSlot, Operation, Ring, Submission};
use crate::error::{Error, Result};
use crate::memory::{Descriptor, DescriptorMap, IoBuffer};
use crate::request::{FileRange, Op, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};
use crate::units::{DeviceId, QueueId, Tag};

/// The ring, shared by the queues of its thread.
pub(crate) type SharedRing = Rc<RefCell<Box<dyn Ring>>>;

/// All that a ring thread needs to begin serving a queue.
#[derive(Debug)]
pub(crate) struct QueueSetup {
    pub(crate) info: QueueInfo,
    pub(crate) target: Arc<dyn Target>,
    pub(crate) file: Arc<dyn CharDevice>,
    pub(crate) events: Arc<QueueEvents>,
}

/// `user_data` of a submission: what it was, which of the thread's queues, which tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cookie {
    kind: Kind,
    pub(crate) queue: u32,
    tag: Tag,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Fetch = 1,
    Commit = 2,
    Transfer = 3,
}

impl Cookie {
    fn encode(self) -> u64 {
        (self.kind as u64) << 56 | u64::from(self.queue) << 16 | u64::from(self.tag.0)
    }

    pub(crate) fn decode(user_data: u64) -> Option<Self> {
        let kind = match user_data >> 56 {
            1 => Kind::Fetch,
            2 => Kind::Commit,
            3 => Kind::Transfer,
            _ => return None,
        };
        Some(Cookie { kind, queue: (user_data >> 16) as u32, tag: Tag(user_data as u16) })
    }
}

/// The part of a queue that requests refer to.
pub(crate) struct QueueCore {
    info: QueueInfo,
    /// The queue's place among those of its thread.
    place: u32,
    ring: SharedRing,
    slot: FileSlot,
    descriptors: DescriptorMap,
    tags: RefCell<TagTable>,
    /// Each tag's buffer; `None` while a request holds it.
    buffers: RefCell<Vec<Option<Arc<IoBuffer>>>>,
    transfers: RefCell<Vec<Option<Transfer>>>,
    zeros: Rc<IoBuffer>,
    pace: Pace,
    /// Set when the ring itself failed.
    broken: RefCell<Option<io::Error>>,
}

impl std::fmt::Debug for QueueCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueCore").field("info", &self.info).field("tags", &self.tags).finish_non_exhaustive()
    }
}

/// Decides when the finished requests of a batch are submitted before its end.
///
/// Fast handlers get one system call per batch. Once a request took long, each one is submitted before
/// the next is begun, for a while: the next might take long again.
#[derive(Debug, Default)]
struct Pace {
    /// The handler has taken its first request. Before that it may wait for an interpreter, say, which
    /// is not the requests' slowness.
    begun: Cell<bool>,
    /// Something was queued since the last submission.
    unsubmitted: Cell<bool>,
    /// When the batch began or something of it was last submitted.
    submitted: Cell<Tick>,
    /// When the last request was handed out.
    stepped: Cell<Tick>,
    /// Until when each request is submitted on its own.
    eager_until: Cell<Tick>,
}

impl Pace {
    /// A request that took this long is slow.
    const SLOW: Duration = Duration::from_millis(5);
    /// How long a slow request is remembered.
    const MEMORY: Duration = Duration::from_secs(10);

    /// A batch is there; the last one was submitted.
    fn begin(&self) {
        self.begun.set(false);
        self.unsubmitted.set(false);
    }

    /// The handler is done with a request and takes the next; whether to submit now.
    fn step(&self, now: Tick) -> bool {
        if !self.begun.replace(true) {
            self.submitted.set(now);
            self.stepped.set(now);
            return false;
        }
        if now.0.saturating_sub(self.stepped.get().0) >= Self::SLOW {
            self.eager_until.set(Tick(now.0 + Self::MEMORY));
        }
        self.stepped.set(now);
        let late = now < self.eager_until.get() || now != self.submitted.get();
        if late && self.unsubmitted.replace(false) {
            self.submitted.set(now);
            return true;
        }
        false
    }
}

/// The kernel's coarse clock: a few milliseconds exact, and nearly free to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
struct Tick(Duration);

impl Tick {
    fn now() -> Self {
        Tick(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from))
    }
}

impl QueueCore {
    pub(crate) fn device(&self) -> DeviceId {
        self.info.device
    }

    pub(crate) fn queue(&self) -> QueueId {
        self.info.queue
    }

    pub(crate) fn name(&self, tag: Tag) -> String {
        format!("ublkb{} queue {} tag {tag}", self.info.device, self.info.queue)
    }

    pub(crate) fn descriptor(&self, tag: Tag) -> Descriptor {
        self.descriptors.read(tag)
    }

    pub(crate) fn take_buffer(&self, tag: Tag) -> Arc<IoBuffer> {
        self.buffers.borrow_mut()[tag.index()].take().expect("an owned tag has its buffer")
    }

    fn put_buffer(&self, tag: Tag, buffer: Arc<IoBuffer>) -> u64 {
        let address = buffer.user_address();
        self.buffers.borrow_mut()[tag.index()] = Some(buffer);
        address
    }

    /// Lends the tag to the driver for the first time.
    fn fetch(&self, tag: Tag) {
        let address = self.buffers.borrow()[tag.index()].as_ref().expect("an idle tag has its buffer").user_address();
        self.tags.borrow_mut().fetch(tag);
        let operation = Operation::Fetch { file: self.slot, queue: self.info.queue, tag, address };
        self.push(Kind::Fetch, tag, operation);
    }

    /// Finishes the tag's request and lends the tag again.
    pub(crate) fn commit(&self, tag: Tag, buffer: Arc<IoBuffer>, result: i32) {
        let address = self.put_buffer(tag, buffer);
        self.tags.borrow_mut().commit(tag);
        let operation = Operation::Commit { file: self.slot, queue: self.info.queue, tag, result, address };
        self.push(Kind::Commit, tag, operation);
    }

    /// Carries the request out on a file.
    pub(crate) fn forward(&self, tag: Tag, buffer: Arc<IoBuffer>, op: Op, descriptor: Descriptor, file: FileRange) {
        self.put_buffer(tag, buffer);
        let transfer = Transfer::new(op, &descriptor, file);
        self.transfers.borrow_mut()[tag.index()] = Some(transfer);
        self.push_transfer(tag, &transfer);
    }

    fn push_transfer(&self, tag: Tag, transfer: &Transfer) {
        let data = self.buffers.borrow()[tag.index()].as_ref().map_or(0, |b| b.user_address());
        self.push(Kind::Transfer, tag, transfer.operation(data, self.zeros.user_address()));
    }

    fn push(&self, kind: Kind, tag: Tag, operation: Operation) {
        let user_data = Cookie { kind, queue: self.place, tag }.encode();
        if let Err(error) = self.ring.borrow_mut().push(Submission { user_data, operation }) {
            self.broken.borrow_mut().get_or_insert(error);
        }
        self.pace.unsubmitted.set(true);
    }

    /// Submits finished requests if the handler is slow, so that nobody waits for a whole batch.
    pub(crate) fn submit_if_late(&self) {
        if self.pace.step(Tick::now())
            && let Err(error) = self.ring.borrow_mut().submit()
        {
            self.broken.borrow_mut().get_or_insert(error);
        }
    }
}

/// One queue and its handler.
pub(crate) struct Queue {
    // Before `core`: a handler may hold buffers.
    handler: Box<dyn QueueHandler>,
    core: QueueCore,
    /// Tags that the server owns and the handler has not seen.
    ready: Vec<Tag>,
    file: Arc<dyn CharDevice>,
    events: Arc<QueueEvents>,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue").field("core", &self.core).field("ready", &self.ready).finish_non_exhaustive()
    }
}

impl Queue {
    /// Sets a queue up and fetches all its tags.
    pub(crate) fn open(setup: QueueSetup, place: u32, ring: &SharedRing, zeros: &Rc<IoBuffer>) -> Result<Self> {
        let info = setup.info;
        let refused = |what: &str, e: &dyn std::fmt::Display| Error::Queue {
            device: info.device,
            queue: info.queue,
            reason: format!("{what}: {e}"),
        };
        let handler = catch_unwind(AssertUnwindSafe(|| setup.target.open_queue(&info)))
            .unwrap_or_else(|panic| Err(refused("the target panicked", &panic_text(&*panic))))?;
        let descriptors =
            setup.file.map_descriptors(info.queue, info.depth).map_err(|e| refused("mapping the descriptors", &e))?.0;
        let depth = usize::from(info.depth);
        let buffers = IoBuffer::many(depth, info.max_io_bytes as usize)
            .map_err(|e| refused(&format!("{depth} buffers of {} bytes", info.max_io_bytes), &e))?;
        let slot = ring.borrow_mut().add_file(&setup.file).map_err(|e| refused("adding the device to the ring", &e))?;
        let queue = Queue {
            handler,
            core: QueueCore {
                info,
                place,
                ring: ring.clone(),
                slot,
                descriptors,
                tags: RefCell::new(TagTable::new(info.depth)),
                buffers: RefCell::new(buffers.into_iter().map(|b| Some(Arc::new(b))).collect()),
                transfers: RefCell::new(vec![None; depth]),
                zeros: zeros.clone(),
                pace: Pace::default(),
                broken: RefCell::new(None),
            },
            ready: Vec::with_capacity(depth),
            file: setup.file,
            events: setup.events,
        };
        (0..info.depth).for_each(|tag| queue.core.fetch(Tag(tag)));
        // Now, not with the next wait: whoever hears that the queue is open may stop the device, and a
        // fetch that comes after that would wait for ever on drivers before Linux 7.3.
        if let Err(error) = ring.borrow_mut().submit() {
            queue.core.broken.borrow_mut().get_or_insert(error);
        }
        Ok(queue)
    }

    /// Takes a completion that belongs to this queue.
    pub(crate) fn completed(&mut self, cookie: Cookie, completion: Completion) {
        match cookie.kind {
            Kind::Fetch => self.command_completed(cookie.tag, completion.result, false),
            Kind::Commit => self.command_completed(cookie.tag, completion.result, true),
            Kind::Transfer => self.transfer_completed(cookie.tag, completion.result),
        }
    }

    fn command_completed(&mut self, tag: Tag, result: i32, was_commit: bool) {
        let event = self.core.tags.borrow_mut().completed(tag, result, was_commit);
        match event {
            Event::Request => self.ready.push(tag),
            Event::Gone => self.events.stopping(),
            Event::CommitRefused(errno) => {
                log::error!("{}: the driver refused the commit: {errno}; failing the request", self.core.name(tag));
                let buffer = self.core.take_buffer(tag);
                self.core.commit(tag, buffer, -(Errno::EIO as i32));
            }
            Event::Lost(errno) => {
                let command = if was_commit { "COMMIT_AND_FETCH_REQ" } else { "FETCH_REQ" };
                self.fail(format!("the driver refused {command} of tag {tag}: {errno}"));
            }
        }
    }

    fn transfer_completed(&mut self, tag: Tag, result: i32) {
        let mut slot = self.core.transfers.borrow_mut();
        let transfer = slot[tag.index()].as_mut().expect("a completed transfer was started");
        let next = transfer.completed(result);
        let transfer = *transfer;
        let outcome = match next {
            Next::Continue => None,
            Next::Finished(outcome) => {
                slot[tag.index()] = None;
                Some(outcome)
            }
        };
        drop(slot);
        match outcome {
            None => self.core.push_transfer(tag, &transfer),
            Some(outcome) => {
                let result = match outcome {
                    Ok(()) => transfer.data_len(),
                    Err(errno) => {
                        log::debug!("{}: {transfer:?}: {errno}", self.core.name(tag));
                        -(errno as i32)
                    }
                };
                let buffer = self.core.take_buffer(tag);
                self.core.commit(tag, buffer, result);
            }
        }
    }

    /// Whether the handler has work to do.
    pub(crate) fn has_requests(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Hands the requests that came to the handler.
    pub(crate) fn serve(&mut self) {
        self.core.pace.begin();
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
        // The last request's time counts too; submitting is the ring thread's next step anyway.
        self.core.pace.step(Tick::now());
    }

    /// Whether nothing refers to the queue any more and it can be closed.
    pub(crate) fn drained(&self) -> bool {
        self.core.tags.borrow().drained()
    }

    /// The ring's failure, if it failed under this queue.
    pub(crate) fn take_ring_failure(&self) -> Option<io::Error> {
        self.core.broken.borrow_mut().take()
    }

    /// Reports a failure that the device cannot live with.
    pub(crate) fn fail(&self, reason: String) {
        log::error!("ublkb{} queue {}: {reason}", self.core.info.device, self.core.info.queue);
        self.events.failed(Error::Queue { device: self.core.info.device, queue: self.core.info.queue, reason });
    }

    /// The device that the queue belongs to.
    pub(crate) fn device(&self) -> DeviceId {
        self.core.info.device
    }

    /// Closes a drained queue: the char device is closed when its last queue went.
    pub(crate) fn close(self) {
        debug_assert!(self.drained());
        let Queue { handler, core, file, events, .. } = self;
        if catch_unwind(AssertUnwindSafe(|| drop(handler))).is_err() {
            log::error!(
                "ublkb{} queue {}: the handler panicked while it was dropped",
                core.info.device,
                core.info.queue
            );
        }
        if let Err(error) = core.ring.borrow_mut().remove_file(core.slot) {
            log::error!("ublkb{}: taking the char device out of the ring: {error}", core.info.device);
        }
        drop(core);
        drop(file);
        events.closed();
    }

    /// Gives a queue up whose commands did not end. What the driver may still refer to is leaked.
    pub(crate) fn abandon(self) {
        let (armed, owned) = (self.core.tags.borrow().armed(), self.core.tags.borrow().owned());
        self.fail(format!("given up with {armed} tags at the driver and {owned} requests unfinished"));
        let Queue { core, file, events, .. } = self;
        std::mem::forget(core.buffers.take());
        std::mem::forget(core.zeros.clone());
        if let Err(error) = core.ring.borrow_mut().remove_file(core.slot) {
            log::error!("ublkb{}: taking the char device out of the ring: {error}", core.info.device);
        }
        drop(core);
        drop(file);
        events.closed();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Tick {
        Tick(Duration::from_millis(millis))
    }

    #[test]
    fn a_fast_batch_is_not_submitted_in_pieces() {
        let pace = Pace::default();
        pace.begin();
        for _ in 0..1000 {
            assert!(!pace.step(at(100)));
            pace.unsubmitted.set(true);
        }
    }

    #[test]
    fn a_batch_that_takes_long_is_submitted_with_every_tick() {
        let pace = Pace::default();
        pace.begin();
        assert!(!pace.step(at(100)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(100)));
        assert!(pace.step(at(104)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(104)));
    }

    #[test]
    fn behind_a_slow_request_each_one_is_submitted_on_its_own() {
        let pace = Pace::default();
        let one_request_each = |begin, end| {
            pace.begin();
            pace.step(at(begin));
            pace.unsubmitted.set(true);
            pace.step(at(end))
        };
        assert!(one_request_each(100, 200));
        assert!(one_request_each(300, 300));
        assert!(!one_request_each(20_000, 20_000), "it is forgotten in the end");
    }

    #[test]
    fn waiting_before_the_first_request_is_not_slowness() {
        let pace = Pace::default();
        pace.begin();
        assert!(!pace.step(at(100)));
        pace.begin();
        assert!(!pace.step(at(900)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(900)));
    }

    #[test]
    fn a_cookie_survives_its_encoding() {
        for kind in [Kind::Fetch, Kind::Commit, Kind::Transfer] {
            let cookie = Cookie { kind, queue: u32::MAX, tag: Tag(4095) };
            assert_eq!(Cookie::decode(cookie.encode()), Some(cookie));
        }
        assert_eq!(Cookie::decode(u64::MAX), None);
    }
}
