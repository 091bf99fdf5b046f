// SPDX-License-Identifier: MIT OR Apache-2.0

//! The part of a queue that its requests refer to: tags, memory, and the way to the driver.

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::accounting::Accounting;
use super::batch::{After, CommitBatch, Element, Tail};
use super::buffers::Buffers;
use super::cookie::Kind;
use super::forward::{End, Forwarding};
use super::inbox::Inbox;
use super::io::{QueueIo, SharedRing};
use super::schedule::Pace;
use super::tags::TagTable;
use super::transfer::Transfer;
use crate::data::DataMovement;
use crate::driver::{Completion, Elements, Operation};
use crate::errno::Errno;
use crate::memory::{Descriptor, DescriptorMap, IoBuffer};
use crate::request::{Answer, FileRequest, Op, RequestContext};
use crate::stats::QueueStats;
use crate::target::QueueInfo;
use crate::units::Tag;

/// What a thread gives to each of its queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ThreadParts<'a> {
    /// The queue's index among those of the thread.
    pub(super) index: u32,
    pub(super) ring: &'a SharedRing,
    pub(super) inbox: &'a Arc<Inbox>,
    pub(super) zeros: &'a Rc<IoBuffer>,
}

/// Whether the driver delivers batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deliveries {
    /// Not requested.
    None,
    /// Until further notice.
    Running,
    /// No longer.
    Ended,
}

/// What a queue's requests refer to.
pub(crate) struct QueueCore {
    pub(super) info: QueueInfo,
    io: QueueIo,
    inbox: Arc<Inbox>,
    descriptors: DescriptorMap,
    pub(super) tags: RefCell<TagTable>,
    forwarding: Forwarding,
    batch: Option<RefCell<CommitBatch>>,
    pub(super) deliveries: Cell<Deliveries>,
    pub(super) pace: Pace,
    pub(super) accounting: Accounting,
    /// Requests have arrived since idle memory was last given back.
    pub(super) warm: Cell<bool>,
}

impl std::fmt::Debug for QueueCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueCore").field("info", &self.info).field("tags", &self.tags).finish_non_exhaustive()
    }
}

impl QueueCore {
    /// Allocates the per-queue state. On failure, also returns which step failed.
    pub(super) fn new(
        info: QueueInfo,
        context: RequestContext,
        batch: bool,
        stats: Arc<QueueStats>,
        thread: &ThreadParts<'_>,
    ) -> Result<Self, (String, io::Error)> {
        let ThreadParts { index, ring, inbox, zeros } = *thread;
        let depth = info.depth;
        let descriptors = context.file.map_descriptors(info.queue, depth);
        let descriptors = descriptors.map_err(|e| ("mapping the descriptors".to_owned(), e))?;
        let buffers = if context.data == DataMovement::Copy {
            Buffers::with_buffers(depth, info.max_io_bytes as usize)
                .map_err(|e| (format!("{depth} buffers of {} bytes", info.max_io_bytes), e))?
        } else {
            Buffers::new(depth)
        };
        let tail = match context.data {
            DataMovement::Copy => Tail::Address,
            _ if info.zoned => Tail::ZoneSector,
            _ => Tail::Nothing,
        };
        let registers = context.data == DataMovement::AutoRegister;
        Ok(QueueCore {
            info,
            io: QueueIo::new(context, depth, index, ring, buffers)?,
            inbox: inbox.clone(),
            descriptors,
            tags: RefCell::new(TagTable::new(depth)),
            forwarding: Forwarding::new(depth, inbox.clone(), zeros.clone()),
            batch: batch.then(|| RefCell::new(CommitBatch::new(tail, registers))),
            deliveries: Cell::new(Deliveries::None),
            pace: Pace::default(),
            accounting: Accounting::new(stats, depth),
            warm: Cell::new(false),
        })
    }

    pub(crate) fn context(&self) -> &RequestContext {
        &self.io.context
    }

    /// What a request needs to return from another thread: its context, and the queue's inbox and index there.
    pub(crate) fn address(&self) -> (Arc<RequestContext>, Arc<Inbox>, u32) {
        (self.io.context.clone(), self.inbox.clone(), self.io.index)
    }

    /// The name of a tag in messages.
    pub(crate) fn name(&self, tag: Tag) -> String {
        self.io.name(tag)
    }

    pub(crate) fn descriptor(&self, tag: Tag) -> Descriptor {
        self.descriptors.read(tag)
    }

    /// Notes that a request of this round is handed out.
    pub(crate) fn arrived(&self, tag: Tag, op: Op, bytes: u64) {
        self.warm.set(true);
        self.accounting.arrived(tag, op, bytes);
    }

    /// Takes the tag's buffer, if it has one.
    pub(crate) fn take_buffer(&self, tag: Tag) -> Option<Arc<IoBuffer>> {
        self.io.buffers.take(tag)
    }

    /// Allocates memory for a request without a buffer.
    pub(crate) fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        self.io.buffers.take_pooled(len)
    }

    /// Frees such memory.
    pub(crate) fn put_memory(&self, memory: Arc<IoBuffer>) {
        self.io.buffers.put_pooled(memory);
    }

    /// Queues the first fetch of each tag.
    pub(super) fn fetch_all(&self, tags: impl Iterator<Item = u16>) {
        for tag in tags.map(Tag) {
            self.tags.borrow_mut().fetch(tag);
            self.queue_fetch(Kind::Fetch, tag, self.io.buffers.address(tag), Answer::new(0));
        }
        if let Some(batch) = &self.batch
            && let Some((number, elements)) = batch.borrow_mut().take()
        {
            let operation = Operation::Prepare { file: self.io.file, queue: self.info.queue, elements };
            self.io.push(Kind::Prepare, Tag(number), operation);
        }
    }

    /// Queues the next fetch of a tag, or adds it to the batch. As [`Kind::Commit`], it also ends the tag's request.
    fn queue_fetch(&self, kind: Kind, tag: Tag, address: u64, answer: Answer) {
        let auto = self.io.context.data == DataMovement::AutoRegister;
        let register = if auto { self.io.registered(tag) } else { None };
        if let Some(batch) = &self.batch {
            let tail = if address == 0 { answer.zone_sector } else { address };
            let register = register.unwrap_or(0);
            batch.borrow_mut().add(Element { tag, register, result: answer.result, tail });
            return;
        }
        let (file, queue) = (self.io.file, self.info.queue);
        let operation = match kind {
            Kind::Fetch => Operation::Fetch { file, queue, tag, address, register },
            _ => {
                let address = if address == 0 { answer.zone_sector } else { address };
                Operation::Commit { file, queue, tag, result: answer.result, address, register }
            }
        };
        self.io.push(kind, tag, operation);
    }

    /// Answers the driver's question where a write's data is to be copied to.
    pub(super) fn get_data(&self, tag: Tag) {
        let len = self.descriptor(tag).nr_sectors as usize * 512;
        let address = self.io.buffers.receive(tag, len, || self.name(tag));
        let operation = Operation::GetData { file: self.io.file, queue: self.info.queue, tag, address };
        self.io.push(Kind::GetData, tag, operation);
    }

    /// Notes that the driver has copied a write's data.
    pub(super) fn got_data(&self, tag: Tag) {
        self.io.buffers.received(tag);
    }

    /// The address to commit a request with that has no buffer here: that of the tag's own, which the tag has kept while
    /// the request was in shared memory. For a read the driver insists on one, even if it fails.
    fn address_without_buffer(&self, tag: Tag) -> u64 {
        let fills = Op::decode(self.descriptor(tag).op_flags).is_some_and(Op::fills);
        self.io.buffers.address_or_page(tag, fills, || self.name(tag))
    }

    /// Ends the tag's request and queues the tag's next fetch.
    pub(crate) fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        let address = match (self.io.context.data, buffer) {
            (DataMovement::Copy | DataMovement::GetData, None) => self.address_without_buffer(tag),
            (_, None) => 0,
            // The driver copies a read's data when it takes the commit. The buffer stays until then, and longer where tags
            // have buffers of their own.
            (DataMovement::Copy | DataMovement::GetData, Some(buffer)) => {
                let address = buffer.user_address();
                self.io.buffers.put(tag, buffer);
                address
            }
            (_, Some(buffer)) => {
                self.io.buffers.put_pooled(buffer);
                0
            }
        };
        self.tags.borrow_mut().commit(tag);
        self.accounting.ended(tag, answer.result < 0, || Op::decode(self.descriptor(tag).op_flags));
        self.queue_fetch(Kind::Commit, tag, address, answer);
    }

    /// Carries the request out on a file.
    pub(crate) fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest) {
        let end = self.forwarding.start(&self.io, tag, buffer, request);
        self.end_forwarded(tag, end);
    }

    /// Takes the result of a step of a forwarded request.
    pub(super) fn transfer_completed(&self, tag: Tag, result: i32) {
        let end = self.forwarding.completed(&self.io, tag, result);
        self.end_forwarded(tag, end);
    }

    /// Ends a request whose sync counts.
    pub(super) fn sync_counts(&self, tag: Tag) {
        let end = self.forwarding.sync_counts(&self.io, tag);
        self.end_forwarded(tag, end);
    }

    fn end_forwarded(&self, tag: Tag, end: Option<End>) {
        if let Some((buffer, answer)) = end {
            self.commit(tag, buffer, answer);
        }
    }

    /// Queues the commits of the current batch.
    pub(super) fn flush(&self) {
        if let Some(batch) = &self.batch {
            let taken = batch.borrow_mut().take();
            if let Some((number, elements)) = taken {
                self.commit_batch(number, elements);
            }
        }
    }

    fn commit_batch(&self, number: u16, elements: Elements) {
        let operation = Operation::CommitBatch { file: self.io.file, queue: self.info.queue, elements };
        // After the last delivery, it is this completion that drains the queue.
        let prompt = self.deliveries.get() == Deliveries::Running;
        self.io.push_with(Kind::CommitBatch, Tag(number), operation, prompt);
    }

    /// Asks the driver to deliver batches.
    pub(super) fn fetch_batch(&self) {
        self.deliveries.set(Deliveries::Running);
        let operation = Operation::FetchBatch { file: self.io.file, queue: self.info.queue };
        self.io.push(Kind::FetchBatch, Tag(0), operation);
    }

    /// Takes the result of the first fetch of all tags.
    pub(super) fn prepared(&self, number: Tag, result: i32) -> Result<(), Errno> {
        let Some(batch) = &self.batch else { return Ok(()) };
        batch.borrow_mut().forget(number.0);
        Errno::check(result).inspect_err(|_| self.tags.borrow_mut().deliveries_ended())?;
        self.fetch_batch();
        Ok(())
    }

    /// Takes the result of an array of commits. Returns the one that the driver has refused.
    pub(super) fn batch_completed(&self, number: Tag, result: i32) -> Option<(Tag, Errno)> {
        let batch = self.batch.as_ref()?;
        let (after, refused) = batch.borrow_mut().completed(number.0, result);
        if let After::Resend(elements) = after {
            self.commit_batch(number.0, elements);
        }
        refused
    }

    /// Takes the tags back once deliveries have ended and no commit is in flight.
    pub(super) fn end_deliveries_if_idle(&self) {
        if self.deliveries.get() == Deliveries::Ended && self.is_batch_idle() {
            self.tags.borrow_mut().deliveries_ended();
        }
    }

    fn is_batch_idle(&self) -> bool {
        self.batch.as_ref().is_none_or(|batch| batch.borrow().is_idle())
    }

    /// Submits finished requests if the handler is slow. To be called before a request is handed out.
    pub(crate) fn submit_if_slow(&self) {
        if self.pace.next() {
            self.submit_done();
        }
    }

    /// When the handler took the last request: at most one tick too early.
    pub(crate) fn taken_at(&self) -> Duration {
        Duration::from_nanos(self.pace.taken_at())
    }

    /// Submits finished requests, including those of other queues of the thread.
    pub(crate) fn submit_done(&self) {
        self.flush();
        self.accounting.publish();
        self.submit();
    }

    /// Submits what is queued in the ring.
    pub(super) fn submit(&self) {
        self.io.submit();
    }

    /// Returns the first failure of the ring; later calls return nothing.
    pub(super) fn take_ring_failure(&self) -> Option<io::Error> {
        self.io.take_failure()
    }

    /// Moves the tags that a completion delivered to the end of `into`.
    pub(super) fn take_tags(&self, completion: Completion, into: &mut Vec<Tag>) {
        self.io.take_tags(completion, into);
    }

    /// Takes a completion for an abandoned queue: it only ends what was in flight.
    pub(super) fn completed_late(&self, kind: Kind, completion: Completion) {
        match kind {
            Kind::Transfer => {
                self.forwarding.completed_late(&self.io, Tag(completion.user_data as u16), completion.result);
            }
            _ => self.io.take_tags(completion, &mut Vec::new()),
        }
    }

    /// Removes the pages of all requests that the server owns from the ring's table: the driver would wait for that for as
    /// long as the ring is open. What files do with them goes on.
    pub(super) fn unregister_all(&self) {
        let tags = (0..self.info.depth).map(Tag);
        tags.filter(|tag| self.tags.borrow().is_owned(*tag)).for_each(|tag| self.io.unregister(tag));
    }

    /// Returns how many requests wait for files.
    pub(super) fn transfers_in_flight(&self) -> usize {
        self.forwarding.in_flight()
    }

    /// Returns whether an abandoned queue can be closed: nothing that is queued in the ring names its files, and, if there
    /// will be another server, no file works for it.
    pub(super) fn is_released(&self, for_next_server: bool) -> bool {
        self.io.is_submitted() && (!for_next_server || self.transfers_in_flight() == 0)
    }

    /// Returns whether neither the driver nor the server holds anything of the queue.
    pub(super) fn drained(&self) -> bool {
        self.tags.borrow().drained() && self.deliveries.get() != Deliveries::Running && self.is_batch_idle()
    }

    /// Gives the memory of idle tags back to the system.
    pub(super) fn cool(&self) {
        if !self.is_batch_idle() {
            return;
        }
        let tags = self.tags.borrow();
        let keep_buffers = self.io.context.data == DataMovement::Copy;
        let left = self.io.buffers.give_back_idle(keep_buffers, |tag| tags.is_armed(tag));
        self.warm.set(left);
    }

    /// Removes the queue from the ring.
    pub(super) fn leave_ring(&self) {
        self.io.leave_ring(self.tags.borrow().drained());
    }

    /// Leaks the memory that the driver or a file may still use. Returns the transfers in flight.
    pub(super) fn leak_memory(&self) -> Vec<(Tag, Transfer)> {
        self.io.buffers.leak();
        if let Some(batch) = &self.batch {
            batch.borrow_mut().leak();
        }
        self.forwarding.leak()
    }
}
