// SPDX-License-Identifier: MIT OR Apache-2.0

//! The part of a queue that its requests refer to: tags, memory, and the way to the driver.

use std::cell::{Cell, RefCell};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use nix::errno::Errno;

use super::batch::{After, Batch, Element, Tail};
use super::cookie::{Cookie, Kind};
use super::forward::{Forwarded, Pages};
use super::pace::{Pace, clock};
use super::pool::Inbox;
use super::syncs::Waiter;
use super::tags::TagTable;
use super::transfer::{Next, Step, Transfer};
use crate::data::DataMovement;
use crate::data::pool::BufferPool;
use crate::data::shared::SharedPlace;
use crate::driver::{Completion, Elements, FileSlot, Memory, Operation, RequestPlace, Ring, Submission};
use crate::errno::RawErrno;
use crate::memory::{Descriptor, DescriptorMap, IoBuffer, PAGE_SIZE};
use crate::request::{Answer, Errand, Op, Origin, memory_or_abort};
use crate::stats::{Ended, QueueStats};
use crate::target::QueueInfo;
use crate::uapi;
use crate::units::Tag;

/// The ring, shared by the queues of its thread.
pub(crate) type SharedRing = Rc<RefCell<Box<dyn Ring>>>;

/// What a thread gives to each of its queues.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seat<'a> {
    /// The queue's place among those of the thread.
    pub(super) place: u32,
    pub(super) ring: &'a SharedRing,
    pub(super) inbox: &'a Arc<Inbox>,
    pub(super) zeros: &'a Rc<IoBuffer>,
}

/// Whether the driver delivers batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deliveries {
    /// Not asked to.
    None,
    /// Until further notice.
    Running,
    /// No more.
    Ended,
}

/// What the engine keeps of one tag.
#[derive(Debug, Default)]
struct Slot {
    /// The tag's buffer, where tags have some; `None` while a request holds it.
    buffer: Option<Arc<IoBuffer>>,
    /// The present request, until it ends for the first time.
    arrival: Option<Arrival>,
    /// The driver may be copying a write's data, outside of this thread's calls too.
    asked: bool,
}

/// What statistics want to know of a request.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    op: Op,
    bytes: u64,
    /// In nanoseconds of the queue's clock.
    at: u64,
}

/// What a queue's requests refer to.
pub(crate) struct QueueCore {
    pub(super) info: QueueInfo,
    origin: Arc<Origin>,
    /// The queue's place among those of its thread.
    place: u32,
    inbox: Arc<Inbox>,
    pub(super) ring: SharedRing,
    slot: FileSlot,
    descriptors: DescriptorMap,
    pub(super) tags: RefCell<TagTable>,
    slots: RefCell<Vec<Slot>>,
    /// Memory for requests without a buffer of their tag's.
    memory: RefCell<BufferPool>,
    /// Where in the ring's table of buffers the pages of tag 0 are registered.
    registered: Option<u16>,
    forwarded: RefCell<Vec<Option<Forwarded>>>,
    zeros: Rc<IoBuffer>,
    batch: Option<RefCell<Batch>>,
    pub(super) deliveries: Cell<Deliveries>,
    pub(super) pace: Pace,
    /// Requests came since idle memory was last given back.
    pub(super) warm: Cell<bool>,
    /// It was told that a file is shorter than what is said to lie there.
    end_is_logged: Cell<bool>,
    /// Set when the ring itself failed.
    pub(super) broken: RefCell<Option<io::Error>>,
    stats: Arc<QueueStats>,
    /// When the requests of this round came.
    pub(super) round: Cell<u64>,
    /// Requests that have ended in this round.
    ended: RefCell<Ended>,
}

impl std::fmt::Debug for QueueCore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QueueCore").field("info", &self.info).field("tags", &self.tags).finish_non_exhaustive()
    }
}

impl QueueCore {
    /// Makes room for a queue's requests. An error comes with what it befell.
    pub(super) fn new(
        info: QueueInfo,
        origin: Origin,
        batch: bool,
        stats: Arc<QueueStats>,
        seat: &Seat<'_>,
    ) -> Result<Self, (String, io::Error)> {
        let Seat { place, ring, inbox, zeros } = *seat;
        let depth = usize::from(info.depth);
        let descriptors = origin.file.map_descriptors(info.queue, info.depth);
        let descriptors = descriptors.map_err(|e| ("mapping the descriptors".to_owned(), e))?.0;
        let mut slots: Vec<_> = (0..depth).map(|_| Slot::default()).collect();
        if origin.data == DataMovement::Copy {
            let buffers = IoBuffer::many(depth, info.max_io_bytes as usize)
                .map_err(|e| (format!("{depth} buffers of {} bytes", info.max_io_bytes), e))?;
            slots.iter_mut().zip(buffers).for_each(|(slot, buffer)| slot.buffer = Some(Arc::new(buffer)));
        }
        let zero_copy = origin.data.is_zero_copy();
        let registered = zero_copy
            .then(|| ring.borrow_mut().reserve_buffers(info.depth))
            .transpose()
            .map_err(|e| ("places for registered buffers".to_owned(), e))?;
        let slot = ring.borrow_mut().add_file(&origin.file).map_err(|e| {
            if let Some(first) = registered {
                ring.borrow_mut().release_buffers(first, info.depth);
            }
            ("adding the device to the ring".to_owned(), e)
        })?;
        let auto = origin.data == DataMovement::AutoRegister;
        let tail = match origin.data {
            DataMovement::Copy => Tail::Address,
            _ if info.zoned => Tail::ZoneSector,
            _ => Tail::Nothing,
        };
        Ok(QueueCore {
            info,
            origin: Arc::new(origin),
            place,
            inbox: inbox.clone(),
            ring: ring.clone(),
            slot,
            descriptors,
            tags: RefCell::new(TagTable::new(info.depth)),
            slots: RefCell::new(slots),
            memory: RefCell::default(),
            registered,
            forwarded: RefCell::new((0..depth).map(|_| None).collect()),
            zeros: zeros.clone(),
            batch: batch.then(|| RefCell::new(Batch::new(tail, auto))),
            deliveries: Cell::new(Deliveries::None),
            pace: Pace::default(),
            warm: Cell::new(false),
            end_is_logged: Cell::new(false),
            broken: RefCell::new(None),
            stats,
            round: Cell::new(0),
            ended: RefCell::default(),
        })
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What a request needs to find back from elsewhere.
    pub(crate) fn address(&self) -> (Arc<Origin>, Arc<Inbox>, u32) {
        (self.origin.clone(), self.inbox.clone(), self.place)
    }

    pub(crate) fn name(&self, tag: Tag) -> String {
        format!("ublkb{} queue {} tag {tag}", self.info.device, self.info.queue)
    }

    pub(crate) fn descriptor(&self, tag: Tag) -> Descriptor {
        self.descriptors.read(tag)
    }

    /// A request comes out of this round.
    pub(crate) fn arrived(&self, tag: Tag, op: Op, bytes: u64) {
        self.warm.set(true);
        self.slots.borrow_mut()[tag.index()].arrival = Some(Arrival { op, bytes, at: self.round.get() });
    }

    /// The tag's buffer, if tags have some.
    pub(crate) fn take_buffer(&self, tag: Tag) -> Option<Arc<IoBuffer>> {
        self.slots.borrow_mut()[tag.index()].buffer.take()
    }

    fn keep_buffer(&self, tag: Tag, buffer: Arc<IoBuffer>) {
        self.slots.borrow_mut()[tag.index()].buffer = Some(buffer);
    }

    /// Memory for a request without a buffer.
    pub(crate) fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        self.memory.borrow_mut().take(len)
    }

    /// Takes such memory back.
    pub(crate) fn put_memory(&self, memory: Arc<IoBuffer>) {
        self.memory.borrow_mut().put(memory);
    }

    /// Lends tags to the driver for the first time.
    pub(super) fn lend_all(&self, tags: Range<u16>) {
        for tag in tags.map(Tag) {
            self.tags.borrow_mut().fetch(tag);
            let address = self.slots.borrow()[tag.index()].buffer.as_ref().map_or(0, |b| b.user_address());
            self.lend(Kind::Fetch, tag, address, Answer::new(0));
        }
        if let Some(batch) = &self.batch
            && let Some((number, elements)) = batch.borrow_mut().take()
        {
            let operation = Operation::Prepare { file: self.slot, queue: self.info.queue, elements };
            self.push(Kind::Prepare, Tag(number), operation);
        }
    }

    fn lend(&self, kind: Kind, tag: Tag, address: u64, answer: Answer) {
        let auto = self.origin.data == DataMovement::AutoRegister;
        let register = self.registered.filter(|_| auto).map(|first| first + tag.0);
        if let Some(batch) = &self.batch {
            let tail = if address == 0 { answer.zone_sector } else { address };
            let register = register.unwrap_or(0);
            batch.borrow_mut().gather(Element { tag, register, result: answer.result, tail });
            return;
        }
        let (file, queue) = (self.slot, self.info.queue);
        let operation = match kind {
            Kind::Fetch => Operation::Fetch { file, queue, tag, address, register },
            _ => {
                let address = if address == 0 { answer.zone_sector } else { address };
                Operation::Commit { file, queue, tag, result: answer.result, address, register }
            }
        };
        self.push(kind, tag, operation);
    }

    /// The driver wants to know where a write's data shall go.
    pub(super) fn get_data(&self, tag: Tag) {
        let len = self.descriptor(tag).nr_sectors as usize * 512;
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[tag.index()];
        let fits = slot.buffer.take().filter(|buffer| buffer.len() >= len);
        let buffer = fits.unwrap_or_else(|| {
            let taken = self.memory.borrow_mut().take(len);
            taken.unwrap_or_else(|_| Arc::new(memory_or_abort(len, &self.name(tag))))
        });
        let address = buffer.user_address();
        slot.buffer = Some(buffer);
        slot.asked = true;
        drop(slots);
        let operation = Operation::GetData { file: self.slot, queue: self.info.queue, tag, address };
        self.push(Kind::GetData, tag, operation);
    }

    /// The driver has answered where a write's data went.
    pub(super) fn got_data(&self, tag: Tag) {
        self.slots.borrow_mut()[tag.index()].asked = false;
    }

    /// The address to commit a request with that has no buffer here: the tag's own, which it has kept while the
    /// request was in shared memory. For a read the driver insists on one, also if it fails.
    fn address_without_buffer(&self, tag: Tag) -> u64 {
        let fills = Op::decode(self.descriptor(tag).op_flags).is_some_and(Op::fills);
        let mut slots = self.slots.borrow_mut();
        let buffer = &mut slots[tag.index()].buffer;
        if buffer.is_none() && fills {
            *buffer = Some(Arc::new(memory_or_abort(PAGE_SIZE, &self.name(tag))));
        }
        buffer.as_ref().map_or(0, |buffer| buffer.user_address())
    }

    /// Finishes the tag's request and lends the tag again.
    pub(crate) fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        let address = match (self.origin.data, buffer) {
            (DataMovement::Copy | DataMovement::GetData, None) => self.address_without_buffer(tag),
            (_, None) => 0,
            // The driver copies a read's data when it takes the commit; until then, and where tags have
            // buffers of their own for longer, the buffer stays.
            (DataMovement::Copy | DataMovement::GetData, Some(buffer)) => {
                let address = buffer.user_address();
                self.keep_buffer(tag, buffer);
                address
            }
            (_, Some(buffer)) => {
                self.memory.borrow_mut().put(buffer);
                0
            }
        };
        self.tags.borrow_mut().commit(tag);
        self.note_end(tag, answer);
        self.lend(Kind::Commit, tag, address, answer);
    }

    /// Counts a request that ends.
    fn note_end(&self, tag: Tag, answer: Answer) {
        let failed = answer.result < 0;
        let mut ended = self.ended.borrow_mut();
        // Taken, so that a second end, after the driver has refused the first, is known as one.
        if let Some(Arrival { op, bytes, at }) = self.slots.borrow_mut()[tag.index()].arrival.take() {
            ended.add(op, bytes, failed, Some(at));
        } else if let Some(op) = Op::decode(self.descriptor(tag).op_flags) {
            ended.add(op, 0, failed, None);
        }
    }

    /// Makes the ends of this round public; they are about to be submitted. The time, if it was needed for that.
    pub(super) fn count(&self) -> Option<u64> {
        let mut ended = self.ended.borrow_mut();
        if ended.is_empty() {
            return None;
        }
        let now = clock();
        self.stats.add(&mut ended, now);
        Some(now)
    }

    /// The handler had to wait before it could take the first request.
    pub(crate) fn waited(&self) {
        self.pace.begin(clock());
    }

    /// Carries the request out on a file.
    pub(crate) fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, errand: Errand) {
        let Errand { op, descriptor, pieces, keep, shared, durability } = errand;
        // Where the client shares memory, the tag's own stays in its slot.
        let (copy, own) = if shared.is_some() { (buffer, None) } else { (None, buffer) };
        if let Some(Err(errno)) = durability.sync.as_ref().map(|sync| sync.write_back.check()) {
            return self.commit(tag, own, Answer::error(errno));
        }
        let Some(step) = Step::first(op, descriptor.op_flags) else {
            return self.commit(tag, own, Answer::error(Errno::EOPNOTSUPP));
        };
        let at = match (self.registered, &own) {
            _ if !op.has_data() => Pages::Nowhere,
            _ if shared.is_some() => Pages::Copied,
            (_, Some(_)) => Pages::Copied,
            (None, None) => match self.bring_data(tag, op, &descriptor) {
                Ok(memory) => {
                    self.keep_buffer(tag, memory);
                    Pages::Copied
                }
                Err(errno) => return self.commit(tag, None, Answer::error(errno)),
            },
            (Some(first), None) => {
                let index = first + tag.0;
                let by_driver = self.origin.data == DataMovement::AutoRegister
                    && descriptor.op_flags & uapi::UBLK_IO_F_NEED_REG_BUF == 0;
                if by_driver { Pages::RegisteredByDriver(index) } else { Pages::ToRegister(index) }
            }
        };
        if let Some(own) = own {
            self.keep_buffer(tag, own);
        }
        let transfer = Transfer::new(step, &descriptor, pieces, keep).durably(durability);
        let forwarded = &mut self.forwarded.borrow_mut()[tag.index()];
        let forwarded = forwarded.insert(Forwarded { transfer, op, pages: at, shared, copy, is_synced: false });
        self.push_transfer(tag, forwarded);
    }

    /// Memory for a request that is forwarded without any, with a write's data.
    fn bring_data(&self, tag: Tag, op: Op, descriptor: &Descriptor) -> Result<Arc<IoBuffer>, RawErrno> {
        let len = op.len(descriptor) as usize;
        let failed = |e: io::Error| {
            log::error!("{}: reading its data into memory: {e}", self.name(tag));
            RawErrno::from(&e)
        };
        let memory = self.take_memory(len).map_err(failed)?;
        if !op.fills() {
            // SAFETY: memory.rs (3): nobody else uses this buffer.
            let bytes = unsafe { memory.bytes_mut(len) };
            self.origin.file.copy_from_request(self.request_place(tag), bytes).map_err(failed)?;
        }
        Ok(memory)
    }

    fn request_place(&self, tag: Tag) -> RequestPlace {
        RequestPlace { queue: self.info.queue, tag, offset: 0, integrity: false }
    }

    fn push_transfer(&self, tag: Tag, forwarded: &mut Forwarded) {
        let memory = match forwarded.pages {
            Pages::ToRegister(index) => {
                let operation = Operation::Register { file: self.slot, queue: self.info.queue, tag, index };
                return self.push(Kind::Transfer, tag, operation);
            }
            Pages::RegisteredByDriver(index) | Pages::Registered(index) => Memory::Registered { index, offset: 0 },
            Pages::Copied | Pages::Nowhere => {
                let slots = self.slots.borrow();
                let shared = || forwarded.shared.as_ref().map(SharedPlace::user_address);
                let own = || slots[tag.index()].buffer.as_ref().map(|buffer| buffer.user_address());
                let copy = forwarded.copy.as_ref().map(|buffer| buffer.user_address());
                Memory::At(copy.or_else(shared).or_else(own).unwrap_or(0))
            }
        };
        forwarded.transfer.begin();
        self.push(Kind::Transfer, tag, forwarded.transfer.operation(memory, self.zeros.user_address()));
    }

    /// A step of a forwarded request is done.
    pub(super) fn transfer_completed(&self, tag: Tag, result: i32) {
        let mut all = self.forwarded.borrow_mut();
        let slot = &mut all[tag.index()];
        let forwarded = slot.as_mut().expect("a completed transfer was started");
        let running = forwarded.transfer.take_running();
        let next = match forwarded.pages {
            Pages::ToRegister(index) => match RawErrno::check(result) {
                Err(errno) => Next::Finished(Err(errno)),
                Ok(_) => {
                    forwarded.pages = Pages::Registered(index);
                    Next::Continue
                }
            },
            _ => forwarded.transfer.completed(result),
        };
        let outcome = match next {
            Next::Continue => return self.push_transfer(tag, forwarded),
            Next::Finished(outcome) => outcome,
        };
        if result == 0 && outcome.is_err() && !self.end_is_logged.replace(true) {
            let (fd, offset) = forwarded.transfer.position();
            log::error!(
                "{}: unexpected end of file on descriptor {fd} at offset {offset}; request failed (further occurrences on this \
                 queue are not logged)",
                self.name(tag)
            );
        }
        match (running, outcome) {
            (Some(running), Ok(())) => {
                forwarded.is_synced = true;
                let waiter = Waiter { inbox: self.inbox.clone(), place: self.place, tag };
                drop(all);
                if running.succeeded(&waiter) {
                    self.sync_counts(tag);
                }
            }
            (running, outcome) => {
                let Some(forwarded) = slot.take() else { return };
                drop(all);
                if let (Some(write_back), Err(errno)) = (forwarded.transfer.syncing(), outcome) {
                    write_back.fail(errno.known());
                }
                drop(running);
                self.end_transfer(tag, forwarded, outcome);
            }
        }
    }

    /// Ends a request whose sync counts: none of those that could have taken its error is under way any more.
    pub(super) fn sync_counts(&self, tag: Tag) {
        let forwarded = self.forwarded.borrow_mut()[tag.index()].take_if(|forwarded| forwarded.is_synced);
        let Some(forwarded) = forwarded else { return };
        let outcome = forwarded.transfer.syncing().map_or(Ok(()), |files| files.check().map_err(RawErrno::from));
        self.end_transfer(tag, forwarded, outcome);
    }

    fn end_transfer(&self, tag: Tag, mut forwarded: Forwarded, outcome: Result<(), RawErrno>) {
        let (buffer, answer) = self.transfer_finished(tag, &mut forwarded, outcome);
        self.commit(tag, buffer, answer);
    }

    /// What a forwarded request is to be committed with.
    fn transfer_finished(
        &self,
        tag: Tag,
        forwarded: &mut Forwarded,
        outcome: Result<(), RawErrno>,
    ) -> (Option<Arc<IoBuffer>>, Answer) {
        let Forwarded { transfer, op, pages, shared, copy, .. } = forwarded;
        if let Pages::Registered(index) = *pages {
            let operation = Operation::Unregister { file: self.slot, queue: self.info.queue, tag, index };
            self.push(Kind::Unregister, tag, operation);
        }
        if let Some(shared) = shared {
            // The tag's own buffer was not used.
            return (None, self.finished_shared(tag, transfer, *op, (shared, copy.take()), outcome));
        }
        let buffer = self.take_buffer(tag);
        let outcome = outcome.and_then(|()| match &buffer {
            Some(buffer) if op.fills() && !self.origin.data.is_copied_by_driver() => {
                // SAFETY: memory.rs (3): the server owns the request, and the file's data is in place.
                let bytes = unsafe { buffer.bytes(transfer.data_len() as usize) };
                let copied = self.origin.file.copy_to_request(self.request_place(tag), bytes);
                copied.map_err(|e| RawErrno::from(&e))
            }
            _ => Ok(()),
        });
        (buffer, self.answer_to(tag, transfer, outcome))
    }

    /// The same for a request in shared memory. Where its handler had a copy made, that is what the file has read to.
    fn finished_shared(
        &self,
        tag: Tag,
        transfer: &Transfer,
        op: Op,
        (shared, copy): (&SharedPlace, Option<Arc<IoBuffer>>),
        outcome: Result<(), RawErrno>,
    ) -> Answer {
        let outcome = outcome.and_then(|()| match &copy {
            Some(copy) if op.fills() => {
                // SAFETY: memory.rs (3): the server owns the request, and the file's data is in place.
                let bytes = unsafe { copy.bytes(transfer.data_len() as usize) };
                shared.write(0, bytes).map_err(|e| RawErrno::from(&e))
            }
            _ => Ok(()),
        });
        copy.into_iter().for_each(|copy| self.put_memory(copy));
        self.answer_to(tag, transfer, outcome)
    }

    fn answer_to(&self, tag: Tag, transfer: &Transfer, outcome: Result<(), RawErrno>) -> Answer {
        match outcome {
            Ok(()) => Answer::new(transfer.data_len()),
            Err(errno) => {
                log::debug!("{}: {transfer:?}: {errno}", self.name(tag));
                Answer::error(errno)
            }
        }
    }

    fn push(&self, kind: Kind, tag: Tag, operation: Operation) {
        let user_data = Cookie { kind, queue: self.place, tag }.encode();
        let prompt = match kind {
            // Behind the last delivery, it is this completion that drains the queue.
            Kind::CommitBatch => self.deliveries.get() == Deliveries::Running,
            Kind::Unregister => true,
            _ => false,
        };
        // SAFETY: the addresses are those of the queue's buffers, of the clients' shared memory, of arrays of a batch and of the
        // thread's zeros. All of them are kept until nothing is with the driver or a file, or leaked (`leak_memory`). The
        // descriptors are those of pieces, which a transfer keeps until it has ended.
        let pushed = unsafe { self.ring.borrow_mut().push(Submission { user_data, operation, prompt }) };
        if let Err(error) = pushed {
            self.ring_failed(error);
        }
    }

    #[cold]
    fn ring_failed(&self, error: io::Error) {
        self.broken.borrow_mut().get_or_insert(error);
    }

    /// Queues the commits that were gathered.
    pub(super) fn flush(&self) {
        if let Some(batch) = &self.batch {
            let taken = batch.borrow_mut().take();
            if let Some((number, elements)) = taken {
                self.commit_batch(number, elements);
            }
        }
    }

    fn commit_batch(&self, number: u16, elements: Elements) {
        let operation = Operation::CommitBatch { file: self.slot, queue: self.info.queue, elements };
        self.push(Kind::CommitBatch, Tag(number), operation);
    }

    /// Asks the driver to deliver batches.
    pub(super) fn fetch_batch(&self) {
        self.deliveries.set(Deliveries::Running);
        let operation = Operation::FetchBatch { file: self.slot, queue: self.info.queue };
        self.push(Kind::FetchBatch, Tag(0), operation);
    }

    /// The driver has taken the tags for the first time, or not.
    pub(super) fn prepared(&self, number: Tag, result: i32) -> Result<(), RawErrno> {
        let Some(batch) = &self.batch else { return Ok(()) };
        batch.borrow_mut().forget(number.0);
        RawErrno::check(result).inspect_err(|_| self.tags.borrow_mut().deliveries_ended())?;
        self.fetch_batch();
        Ok(())
    }

    /// The driver has dealt with an array of commits. One that it refused is returned.
    pub(super) fn batch_completed(&self, number: Tag, result: i32) -> Option<(Tag, RawErrno)> {
        let batch = self.batch.as_ref()?;
        let (after, refused) = batch.borrow_mut().completed(number.0, result);
        if let After::Resend(elements) = after {
            self.commit_batch(number.0, elements);
        }
        refused
    }

    /// Once deliveries have ended and no commit is under way, the driver has nothing of ours any more.
    pub(super) fn end_deliveries_if_idle(&self) {
        if self.deliveries.get() == Deliveries::Ended && self.batch.as_ref().is_none_or(|b| b.borrow().is_idle()) {
            self.tags.borrow_mut().deliveries_ended();
        }
    }

    /// Submits finished requests if the handler is slow, so that nobody waits for a whole batch.
    pub(crate) fn submit_if_late(&self) {
        if self.pace.next() {
            self.submit_done();
        }
    }

    /// Submits what is done, and what other queues of the thread have done.
    pub(crate) fn submit_done(&self) {
        self.flush();
        self.count();
        self.submit();
    }

    pub(super) fn submit(&self) {
        if let Err(error) = self.ring.borrow_mut().submit() {
            self.ring_failed(error);
        }
    }

    /// A completion for a queue that was given up: it only ends what was under way.
    pub(super) fn completed_late(&self, kind: Kind, completion: Completion) {
        match kind {
            Kind::Transfer => {
                let tag = Tag(completion.user_data as u16);
                let ended = self.forwarded.borrow_mut()[tag.index()].take();
                let Some(Forwarded { transfer, pages, .. }) = ended else { return };
                transfer.ended_late(completion.result);
                // Its pages may have got into the ring's table only now.
                if matches!(pages, Pages::ToRegister(_)) {
                    self.unregister(tag);
                }
            }
            _ => {
                if let (Some(buffer), Ok(bytes)) = (completion.tags, usize::try_from(completion.result)) {
                    // SAFETY: the buffer is the completion's, which is looked at once.
                    unsafe { self.ring.borrow_mut().take_tags(buffer, bytes, &mut Vec::new()) };
                }
            }
        }
    }

    /// Takes the pages of all requests out of the ring's table that the server has: the driver would wait for that for as
    /// long as the ring is open. What files do with them goes on.
    pub(super) fn unregister_all(&self) {
        let tags = (0..self.info.depth).map(Tag);
        tags.filter(|tag| self.tags.borrow().is_owned(*tag)).for_each(|tag| self.unregister(tag));
    }

    fn unregister(&self, tag: Tag) {
        if let Some(first) = self.registered {
            let index = first + tag.0;
            self.push(
                Kind::Unregister,
                tag,
                Operation::Unregister { file: self.slot, queue: self.info.queue, tag, index },
            );
        }
    }

    /// How many requests are under way in files.
    pub(super) fn transfers_in_flight(&self) -> usize {
        self.forwarded.borrow().iter().flatten().filter(|forwarded| !forwarded.is_synced).count()
    }

    /// Whether a queue that was given up can be closed: nothing that is queued in the ring names its files, and no file
    /// is at work for it, if there will be another server.
    pub(super) fn is_released(&self, for_next_server: bool) -> bool {
        self.ring.borrow_mut().is_submitted() && (!for_next_server || self.transfers_in_flight() == 0)
    }

    /// Whether neither side holds anything.
    pub(super) fn drained(&self) -> bool {
        self.tags.borrow().drained()
            && self.deliveries.get() != Deliveries::Running
            && self.batch.as_ref().is_none_or(|batch| batch.borrow().is_idle())
    }

    /// Gives the memory of idle tags back to the system.
    pub(super) fn cool(&self) {
        if self.batch.as_ref().is_some_and(|batch| !batch.borrow().is_idle()) {
            return;
        }
        self.warm.set(false);
        self.memory.borrow_mut().clear();
        let tags = self.tags.borrow();
        let mut slots = self.slots.borrow_mut();
        let mut idle = Vec::with_capacity(slots.len());
        for (tag, slot) in slots.iter_mut().enumerate() {
            if !tags.is_armed(Tag(tag as u16)) || slot.asked {
                // A forwarded request's, or one that a write's data is on the way to.
                self.warm.set(true);
            } else if self.origin.data == DataMovement::Copy {
                idle.extend(slot.buffer.as_deref());
            } else {
                slot.buffer = None;
            }
        }
        IoBuffer::give_back_all(idle.into_iter());
    }

    /// Takes what belongs to the queue out of the ring.
    pub(super) fn leave_ring(&self) {
        let mut ring = self.ring.borrow_mut();
        if let Err(error) = ring.remove_file(self.slot) {
            log::error!("ublkb{}: unregistering the char device from the ring: {error}", self.info.device);
        }
        if let Some(first) = self.registered
            && self.tags.borrow().drained()
        {
            ring.release_buffers(first, self.info.depth);
        }
    }

    /// Leaves memory that the driver or a file may still refer to where it is, for good. Transfers that are on their way,
    /// which keep their files open, are the caller's.
    ///
    /// Their flights ([`crate::extents`]) go on until they end: places that they read or write count as in use, and waiting
    /// for them may time out.
    pub(super) fn leak_memory(&self) -> Vec<(Tag, Transfer)> {
        std::mem::forget(self.slots.take());
        std::mem::forget(self.zeros.clone());
        if let Some(batch) = &self.batch {
            batch.borrow_mut().leak();
        }
        let transfer = |(tag, forwarded): (usize, Option<Forwarded>)| {
            // One that is synced waits for other requests, and for no completion.
            let Forwarded { transfer, shared, copy, .. } = forwarded.filter(|forwarded| !forwarded.is_synced)?;
            std::mem::forget((shared, copy));
            Some((Tag(tag as u16), transfer))
        };
        self.forwarded.take().into_iter().enumerate().filter_map(transfer).collect()
    }
}
