// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests: tokens that must be spent.
//!
//! A request owns its tag and its memory. Every way to end it consumes it; dropping it, also while a
//! panic unwinds, fails it with `EIO`. So a fetched tag is committed exactly once on every path: one
//! forgotten commit would hang whoever waits for the block device, until a reboot.
//!
//! The `unsafe` blocks here rest on invariant 3 of `memory.rs`: while a request exists, its buffer is
//! the server's, and `&self`/`&mut self` order the accesses.

mod durability;
mod op;
mod pieces;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

pub use self::durability::fdatasync;
pub(crate) use self::durability::{Durability, Sync as FileSync, WriteBack, is_uncached};
pub use self::op::Op;
pub use self::pieces::{FilePiece, FileRange, Keep, OpenFile, Pieces};
use crate::data::shared::{SharedPlace, SharedTable};
use crate::data::{Access, DataMovement};
use crate::driver::{CharDevice, RequestPlace};
use crate::engine::{Inbox, QueueCore, Return};
use crate::errno::RawErrno;
use crate::error::errno_of;
use crate::memory::{Descriptor, IoBuffer};
use crate::params::Integrity;
use crate::uapi;
use crate::units::{DeviceId, QueueId, Sectors, Tag};

/// What the requests of a queue have in common.
#[derive(Debug)]
pub struct RequestContext {
    pub(crate) device: DeviceId,
    pub(crate) queue: QueueId,
    pub(crate) data: DataMovement,
    pub(crate) access: Access,
    pub(crate) shared: Arc<SharedTable>,
    /// How files that the user has opened are synced.
    pub(crate) sync: FileSync,
    pub(crate) integrity: Option<Integrity>,
    pub(crate) file: Arc<dyn CharDevice>,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Bytes done, 0 for operations without data, or a negative errno.
    pub(crate) result: i32,
    /// Where a zone append landed.
    pub(crate) zone_sector: u64,
}

impl Answer {
    pub(crate) fn new(result: i32) -> Self {
        Answer { result, zone_sector: 0 }
    }

    /// A failure. The block layer takes an errno that it does not know for `EIO`, and so does this: kernels may come
    /// to mean something by it.
    pub(crate) fn error(errno: impl Into<RawErrno>) -> Self {
        Answer::new(-(errno.into().known() as i32))
    }
}

/// A request for the engine to carry out on files.
#[derive(Debug)]
pub struct FileRequest {
    pub(crate) op: Op,
    pub(crate) descriptor: Descriptor,
    pub(crate) pieces: Pieces,
    pub(crate) keep: Option<Keep>,
    /// The client's memory, if the data is there.
    pub(crate) shared: Option<SharedPlace>,
    pub(crate) durability: Durability,
}

/// Where a request is, and so how it gets back to the driver. Not to be implemented elsewhere.
pub trait Home {
    #[doc(hidden)]
    fn context(&self) -> &RequestContext;
    /// Memory for a request that has none.
    #[doc(hidden)]
    fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>>;
    /// The counterpart, for memory that was only a copy.
    #[doc(hidden)]
    fn put_memory(&self, memory: Arc<IoBuffer>);
    #[doc(hidden)]
    fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer);
    #[doc(hidden)]
    fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest);
}

/// On the thread of its queue.
#[derive(Clone, Copy, Debug)]
pub struct OnQueue<'q>(&'q QueueCore);

impl Home for OnQueue<'_> {
    fn context(&self) -> &RequestContext {
        self.0.context()
    }

    fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        self.0.take_memory(len)
    }

    fn put_memory(&self, memory: Arc<IoBuffer>) {
        self.0.put_memory(memory);
    }

    fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        self.0.commit(tag, buffer, answer);
    }

    fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest) {
        self.0.forward(tag, buffer, request);
    }
}

/// Anywhere. The queue's thread hears of the request's end through its mailbox, and commits it.
#[derive(Debug)]
pub struct Anywhere {
    context: Arc<RequestContext>,
    inbox: Arc<Inbox>,
    /// The queue's index among those of its thread.
    queue: u32,
}

impl Home for Anywhere {
    fn context(&self) -> &RequestContext {
        &self.context
    }

    fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        IoBuffer::new(len).map(Arc::new)
    }

    fn put_memory(&self, _: Arc<IoBuffer>) {}

    fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        self.inbox.returned(self.queue, tag, buffer, Return::Ended(answer));
    }

    fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest) {
        self.inbox.returned(self.queue, tag, buffer, Return::Forward(Box::new(request)));
    }
}

/// A request on the thread of its queue, for the time of a handler's call.
pub type Request<'q> = RequestOf<OnQueue<'q>>;

/// A request that can go to any thread, stay there for any time, and be ended from there. Made by
/// [`Request::detach`].
///
/// Each must be ended before its device can stop: [`Device::stop`](crate::Device::stop) waits for them.
pub type DetachedRequest = RequestOf<Anywhere>;

/// One request of the block layer, owned by whoever holds this: a [`Request`] or a [`DetachedRequest`].
#[must_use = "dropping a request fails it with EIO"]
pub struct RequestOf<H: Home> {
    home: H,
    tag: Tag,
    op: Op,
    descriptor: Descriptor,
    /// The memory that holds its data; none if the data is left where it is.
    buffer: Option<Arc<IoBuffer>>,
    /// Where its data is in memory that the client shares; `buffer` is a copy then.
    shared: Option<SharedPlace>,
    spent: bool,
}

impl<H: Home> fmt::Debug for RequestOf<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("device", &self.device().0)
            .field("queue", &self.queue().0)
            .field("tag", &self.tag.0)
            .field("op", &self.op)
            .field("offset", &self.offset())
            .field("len", &self.len())
            .finish()
    }
}

impl<H: Home> fmt::Display for RequestOf<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (op, len, offset) = (self.op.name(), self.len(), self.offset());
        write!(f, "{op} of {len} bytes at {offset}, ublkb{} queue {} tag {}", self.device(), self.queue(), self.tag)
    }
}

impl<'q> Request<'q> {
    /// Takes over a tag that the server owns, and its buffer. What cannot be served is failed at once.
    pub(crate) fn adopt(core: &'q QueueCore, tag: Tag) -> Option<Self> {
        let descriptor = core.descriptor(tag);
        if descriptor.op_flags & uapi::UBLK_IO_F_SHMEM_ZC != 0 {
            return Self::adopt_shared(core, tag, descriptor);
        }
        let buffer = core.take_buffer(tag);
        let Some(op) = Op::decode(descriptor.op_flags) else {
            log::warn!("{}: unknown operation {:#x}", core.name(tag), descriptor.op_flags & 0xff);
            core.commit(tag, buffer, Answer::error(Errno::EOPNOTSUPP));
            return None;
        };
        core.arrived(tag, op, op.len(&descriptor));
        if let Some(Err(errno)) = (op == Op::Flush).then(|| core.context().sync.write_back.check()) {
            // Also if its handler does not forward it: what was lost is nothing that it knows of.
            core.commit(tag, buffer, Answer::error(errno));
            return None;
        }
        // What was left from the tag's last request may be too short, where tags have no buffers of their own.
        let keeps = core.context().data == DataMovement::Copy || !op.fills();
        let buffer = buffer.filter(|buffer| keeps || buffer.len() as u64 >= op.len(&descriptor));
        let mut request = RequestOf { home: OnQueue(core), tag, op, descriptor, buffer, shared: None, spent: false };
        if let Some(buffer) = request.buffer.as_ref().filter(|buffer| request.data_len() > buffer.len()) {
            log::error!("{request:?} is longer than its buffer of {} bytes", buffer.len());
            request.fail(Errno::EIO);
            return None;
        }
        let context = core.context();
        // The driver copies a read's data from memory that it is told with the commit.
        let needs_memory = context.access == Access::Bytes || context.data == DataMovement::GetData && op.fills();
        if needs_memory && let Err(errno) = request.load() {
            request.fail(errno);
            return None;
        }
        Some(request)
    }

    /// Takes over a tag whose data is in memory that the client shares. The tag's own buffer stays where it
    /// is.
    fn adopt_shared(core: &'q QueueCore, tag: Tag, descriptor: Descriptor) -> Option<Self> {
        let Some(op) = Op::decode(descriptor.op_flags) else {
            core.commit(tag, None, Answer::error(Errno::EOPNOTSUPP));
            return None;
        };
        core.arrived(tag, op, op.len(&descriptor));
        let shared = core.context().shared.find(descriptor.address, op.len(&descriptor) as usize);
        if shared.is_none() {
            log::error!("{}: shared memory {:#x} is not known here", core.name(tag), descriptor.address);
            core.commit(tag, None, Answer::error(Errno::EIO));
            return None;
        }
        let mut request = RequestOf { home: OnQueue(core), tag, op, descriptor, buffer: None, shared, spent: false };
        if core.context().access == Access::Bytes
            && let Err(errno) = request.load()
        {
            request.fail(errno);
            return None;
        }
        Some(request)
    }

    /// Makes the request independent of its queue's thread.
    pub fn detach(mut self) -> DetachedRequest {
        let (context, inbox, queue) = self.home.0.address();
        self.spent = true;
        RequestOf {
            home: Anywhere { context, inbox, queue },
            tag: self.tag,
            op: self.op,
            descriptor: self.descriptor,
            buffer: self.buffer.take(),
            shared: self.shared.take(),
            spent: false,
        }
    }
}

impl<H: Home> RequestOf<H> {
    /// The operation.
    pub fn op(&self) -> Op {
        self.op
    }

    /// First byte on the disk; 0 for operations on no particular place, whose position the kernel leaves
    /// undefined.
    pub fn offset(&self) -> u64 {
        match self.op {
            Op::Flush | Op::ZoneResetAll => 0,
            _ => Sectors(self.descriptor.start_sector).bytes(),
        }
    }

    /// Length in bytes: of the range on the disk, or of the report for [`Op::ReportZones`]. 0 for
    /// operations on no particular place.
    pub fn len(&self) -> u64 {
        self.op.len(&self.descriptor)
    }

    /// Whether the request covers no bytes, as a flush.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether this write must be durable before it is acknowledged. Sent only to disks that advertise
    /// [`Operations::FUA`](crate::Operations::FUA).
    pub fn force_unit_access(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_FUA != 0
    }

    /// Whether zeroed space must stay allocated.
    pub fn no_unmap(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_NOUNMAP != 0
    }

    /// Whether the request carries integrity metadata, to be had by
    /// [`read_integrity`](RequestOf::read_integrity) and [`write_integrity`](RequestOf::write_integrity).
    pub fn has_integrity(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_INTEGRITY != 0
    }

    /// The request's tag.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// The queue that the request came through.
    pub fn queue(&self) -> QueueId {
        self.home.context().queue
    }

    /// The device that the request is for.
    pub fn device(&self) -> DeviceId {
        self.home.context().device
    }

    fn data_len(&self) -> usize {
        if self.op.has_data() { self.len() as usize } else { 0 }
    }

    /// Lets the engine do the request on a file, on the queue's own ring: reads and writes move data
    /// between the request and the file, flush becomes `fdatasync`, discard punches a hole, write-zeroes zeroes
    /// the range. Changes with [FUA](RequestOf::force_unit_access) are durable when they end. Short transfers are
    /// continued; the end of the file inside the range is an `EIO`. Operations on zones fail with
    /// `EOPNOTSUPP`.
    ///
    /// Where the device's [data movement](DataMovement) is without copies, the file reads and writes the
    /// request's own pages, unless the request was [loaded](RequestOf::load) before.
    ///
    /// Once a sync has failed, of whatever file, every flush of the device fails with `EIO` until it has a new server,
    /// whether it is forwarded or not: writes may be lost, and the kernel does not report that again. The exception is a
    /// block device that is open for direct I/O, where the next flush covers the same writes.
    ///
    /// Nothing else may sync the file by the same open file description: not another device, nor the program, by this
    /// [`File`](std::fs::File) or a duplicate of it. The kernel reports lost writes once to each description. What takes
    /// the error fails, and this device's flushes succeed without the writes. Devices that share a file open it once
    /// each.
    pub fn forward(mut self, file: FileRange) {
        let pieces = Pieces::from(FilePiece { file, len: self.len() });
        let durability = self.durability(&pieces);
        self.send(pieces, None, durability);
    }

    /// How the request becomes durable in files that the caller has opened.
    fn durability(&self, pieces: &Pieces) -> Durability {
        let syncs = self.op == Op::Flush || self.force_unit_access() && self.op.changes();
        if !syncs || pieces.iter().all(|piece| is_uncached(&piece.file.file)) {
            return Durability::default();
        }
        Durability { at_once: false, sync: Some(self.home.context().sync.clone()) }
    }

    /// As [`forward`](RequestOf::forward), with a say in how the request becomes durable.
    pub(crate) fn forward_durably(mut self, file: FileRange, durability: &Durability) {
        let piece = FilePiece { file, len: self.len() };
        let syncs = self.op == Op::Flush || self.op.changes() && (durability.at_once || self.force_unit_access());
        // The others need no share in what the queues have in common.
        self.send(piece.into(), None, if syncs { durability.clone() } else { Durability::default() });
    }

    /// As [`forward`](RequestOf::forward), for a read or write whose bytes lie in several places, one after the other.
    /// `keep` is dropped when the last of them has been read or written.
    ///
    /// Nothing but this device may sync the files by the same open file descriptions, as with
    /// [`forward`](RequestOf::forward).
    ///
    /// Fails the request with `EIO` unless the pieces have its length, and with `EOPNOTSUPP` if it is no read or write.
    pub fn forward_pieces(mut self, pieces: impl Into<Pieces>, keep: impl Into<Keep>) {
        if !matches!(self.op, Op::Read | Op::Write) {
            return self.fail(Errno::EOPNOTSUPP);
        }
        let pieces = pieces.into();
        if pieces.len() != Some(self.len()) {
            log::error!("{self:?}: cannot be forwarded to {pieces:?}");
            return self.fail(Errno::EIO);
        }
        let durability = self.durability(&pieces);
        self.send(pieces, Some(keep.into()), durability);
    }

    fn send(&mut self, pieces: Pieces, keep: Option<Keep>, durability: Durability) {
        self.spent = true;
        let shared = self.shared.take();
        let request = FileRequest { op: self.op, descriptor: self.descriptor, pieces, keep, shared, durability };
        self.home.forward(self.tag, self.buffer.take(), request);
    }

    /// Brings the request's data to memory of this process, where it is not there already: a write's data
    /// is copied, a read gets memory to be filled. Handlers of targets with [`Access::Bytes`] get their
    /// requests loaded.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or what the driver says to the copy. The request is still to be ended.
    pub fn load(&mut self) -> Result<(), Errno> {
        if self.buffer.is_some() || !self.op.has_data() {
            return Ok(());
        }
        let len = self.data_len();
        let failed = |what: &str, e: &io::Error| {
            log::error!("{self:?}: {what}: {e}");
            errno_of(e)
        };
        let buffer = self.home.take_memory(len).map_err(|e| failed("memory for its data", &e))?;
        if !self.op.fills() {
            // SAFETY: memory.rs (3): nobody else knows this buffer yet, or uses it any more.
            let bytes = unsafe { buffer.bytes_mut(len) };
            self.copy_out(0, bytes).map_err(|e| failed("copying its data", &e))?;
        }
        self.buffer = Some(buffer);
        Ok(())
    }

    /// A write's data, or what a read's memory holds so far. Empty for operations without data.
    ///
    /// # Panics
    ///
    /// If the request has no memory here: its target said that it does not look at bytes, and did not
    /// [`load`](RequestOf::load) them.
    pub fn data(&self) -> &[u8] {
        match self.data_len() {
            0 => &[],
            // SAFETY: memory.rs (3): this request owns the buffer; `&self` excludes `data_mut`.
            len => unsafe { self.buffer().bytes(len) },
        }
    }

    /// Where a read's data goes. The bytes left unwritten hold data of earlier requests of this
    /// device, unless they were [cleared](RequestOf::clear).
    ///
    /// # Panics
    ///
    /// As [`data`](RequestOf::data).
    pub fn data_mut(&mut self) -> &mut [u8] {
        match self.data_len() {
            0 => &mut [],
            // SAFETY: memory.rs (3): this request owns the buffer, and `&mut self` is exclusive.
            len => unsafe { self.buffer().bytes_mut(len) },
        }
    }

    /// Clears the memory that a read's data goes to, if it is here: the client gets zeros for bytes that the handler leaves
    /// unwritten, and not what an earlier request left there. The stand-in driver can have it
    /// [poisoned](crate::driver::fake::FakeDriver::poison_reads) instead.
    ///
    /// That takes 63 ns for 4 KiB and 7 µs for 512 KiB, where copying takes 52 ns and 19 µs (on one host). Finding unwritten
    /// bytes afterwards instead would have to know what was there, and a pattern may be data.
    pub fn clear(&mut self) {
        if self.op.fills() && self.buffer.is_some() {
            let byte = self.home.context().file.unwritten_byte();
            self.data_mut().fill(byte);
        }
    }

    /// Copies what a write carries, from its byte `at` on, whatever the device's data movement. Different
    /// requests can be copied on different threads at once.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the range is not the request's; what the driver says to the copy.
    pub fn read_data(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.check_range(at, into.len())?;
        if self.buffer.is_some() {
            into.copy_from_slice(&self.data()[at as usize..][..into.len()]);
            return Ok(());
        }
        self.copy_out(at, into).map_err(|e| self.copy_failed(&e))
    }

    /// Fills a part of a read, from its byte `at` on, whatever the device's data movement.
    ///
    /// # Errors
    ///
    /// As [`read_data`](RequestOf::read_data).
    pub fn write_data(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.check_range(at, from.len())?;
        if self.buffer.is_some() {
            self.data_mut()[at as usize..][..from.len()].copy_from_slice(from);
            return Ok(());
        }
        self.copy_in(at, from).map_err(|e| self.copy_failed(&e))
    }

    /// Copies data from where the client has it.
    fn copy_out(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.shared {
            Some(shared) => shared.read(at as usize, into),
            None => self.home.context().file.copy_from_request(self.place(at, false), into),
        }
    }

    /// Copies data to where the client expects it.
    fn copy_in(&self, at: u64, from: &[u8]) -> io::Result<()> {
        match &self.shared {
            Some(shared) => shared.write(at as usize, from),
            None => self.home.context().file.copy_to_request(self.place(at, false), from),
        }
    }

    /// Copies a write's integrity metadata from its byte `at` on (7.0).
    ///
    /// # Errors
    ///
    /// `EINVAL` if the request carries none, or not in this range; what the driver says to the copy.
    pub fn read_integrity(&self, at: u64, into: &mut [u8]) -> Result<(), Errno> {
        self.check_integrity_range(at, into.len())?;
        let place = self.place(at, true);
        self.home.context().file.copy_from_request(place, into).map_err(|e| self.copy_failed(&e))
    }

    /// Fills a read's integrity metadata (7.0).
    ///
    /// # Errors
    ///
    /// As [`read_integrity`](RequestOf::read_integrity).
    pub fn write_integrity(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.check_integrity_range(at, from.len())?;
        let place = self.place(at, true);
        self.home.context().file.copy_to_request(place, from).map_err(|e| self.copy_failed(&e))
    }

    fn place(&self, offset: u64, integrity: bool) -> RequestPlace {
        RequestPlace { queue: self.queue(), tag: self.tag, offset, integrity }
    }

    fn check_range(&self, at: u64, len: usize) -> Result<(), Errno> {
        match at.checked_add(len as u64) {
            Some(end) if end <= self.data_len() as u64 => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    /// The driver checks an offset only after it has taken tag and queue from the same number, so that one beyond the
    /// request reaches another request's metadata.
    fn check_integrity_range(&self, at: u64, len: usize) -> Result<(), Errno> {
        let integrity = self.home.context().integrity.filter(|_| self.has_integrity());
        let there = integrity.map_or(0, |integrity| integrity.bytes_for(self.data_len() as u64));
        match at.checked_add(len as u64) {
            Some(end) if end <= there => Ok(()),
            _ => Err(Errno::EINVAL),
        }
    }

    fn copy_failed(&self, error: &io::Error) -> Errno {
        log::debug!("{self:?}: copying its data: {error}");
        errno_of(error)
    }

    /// The memory behind [`data`](RequestOf::data), for bindings that hand it to another language. Later
    /// requests will use it too, unless it is [replaced].
    ///
    /// # Panics
    ///
    /// As [`data`](RequestOf::data).
    ///
    /// [replaced]: RequestOf::replace_buffer
    pub fn buffer(&self) -> &Arc<IoBuffer> {
        self.buffer.as_ref().expect("the request's data is not in memory; `load` brings it there")
    }

    /// Moves the request to fresh memory and leaves the old one to whoever still holds it. The data is copied
    /// over first: the driver takes a read's from the new memory, and a write may still be [forwarded] or looked at.
    ///
    /// There is no going back from here: others hold the old memory, and the driver needs an address for
    /// the tag's next request. Without memory this waits for some, and after ten seconds it ends the
    /// process, which the driver survives and silently mixed up data would not be.
    ///
    /// [forwarded]: RequestOf::forward
    pub fn replace_buffer(&mut self) {
        let fresh = memory_or_abort(self.buffer().len(), &self);
        if self.op.has_data() {
            // SAFETY: memory.rs (3): nobody else knows `fresh`, and the old buffer is this request's.
            unsafe { fresh.copy_from(self.buffer(), self.data_len()) };
        }
        self.buffer = Some(Arc::new(fresh));
    }

    /// Ends the request as done, in full. Partial success does not exist here: the driver's handling
    /// of it differs between kernels, and 7.3 takes a short write for a complete one.
    ///
    /// A zone append is ended by [`complete_append`](RequestOf::complete_append); here it fails with `EIO`.
    pub fn complete(mut self) {
        if self.op == Op::ZoneAppend {
            log::error!("zone append {self:?} was completed without an offset; failing it with EIO");
            return self.commit(Answer::error(Errno::EIO));
        }
        let answer = self.filled();
        self.commit(answer);
    }

    /// Ends a zone append as done, in full; its data was written at `offset` on the disk, in bytes.
    ///
    /// Any other request fails with `EIO`, as does an append with an offset that is not whole sectors.
    pub fn complete_append(mut self, offset: u64) {
        if self.op != Op::ZoneAppend || !offset.is_multiple_of(Sectors::SIZE) {
            log::error!("{self:?} was completed as a zone append at {offset}, which it is not; failing it with EIO");
            return self.commit(Answer::error(Errno::EIO));
        }
        let result = self.data_len() as i32;
        self.commit(Answer { result, zone_sector: Sectors::from_bytes(offset).0 });
    }

    /// The answer to a request whose memory is as it shall be: a read's data goes to its pages, if it is
    /// not for the driver to bring it there.
    fn filled(&mut self) -> Answer {
        let copied = match &self.buffer {
            Some(buffer)
                if self.op.fills() && (self.shared.is_some() || !self.home.context().data.is_copied_by_driver()) =>
            {
                // SAFETY: memory.rs (3): this request owns the buffer.
                let bytes = unsafe { buffer.bytes(self.data_len()) };
                self.copy_in(0, bytes)
            }
            _ => Ok(()),
        };
        match copied {
            Ok(()) => Answer::new(self.data_len() as i32),
            Err(error) => {
                log::error!("{self:?}: copying its data: {error}");
                Answer::error(Errno::EIO)
            }
        }
    }

    /// Ends the request as failed. With an errno that the block layer does not know, its client sees `EIO`.
    pub fn fail(mut self, errno: impl Into<RawErrno>) {
        self.commit(Answer::error(errno));
    }

    /// Ends the request one way or the other.
    pub fn finish(self, result: Result<(), impl Into<RawErrno>>) {
        match result {
            Ok(()) => self.complete(),
            Err(errno) => self.fail(errno),
        }
    }

    fn commit(&mut self, answer: Answer) {
        self.spent = true;
        let mut buffer = self.buffer.take();
        if self.shared.is_some()
            && let Some(copy) = buffer.take()
        {
            // The tag's own memory, if it has some, is where it was.
            self.home.put_memory(copy);
        }
        self.home.commit(self.tag, buffer, answer);
    }
}

/// Memory that the driver must have. Waits for some, and after ten seconds ends the process.
pub(crate) fn memory_or_abort(len: usize, for_whom: &dyn fmt::Debug) -> IoBuffer {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match IoBuffer::new(len) {
            Ok(memory) => return memory,
            Err(error) if Instant::now() < deadline => {
                log::warn!("{for_whom:?}: cannot allocate a buffer: {error}; retrying");
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(error) => {
                log::error!("{for_whom:?}: cannot allocate a buffer: {error}; aborting the process");
                std::process::abort();
            }
        }
    }
}

impl<H: Home> Drop for RequestOf<H> {
    fn drop(&mut self) {
        if !self.spent {
            log::error!("{self} was dropped by its handler without an answer; failing it with EIO");
            self.commit(Answer::error(Errno::EIO));
        }
    }
}

/// The requests of one wake-up, in the order in which they arrived.
///
/// Between requests, the engine reads a clock and submits finished requests if the handler is slow.
///
/// Requests that the handler leaves in here fail with `EIO`.
#[derive(Debug)]
pub struct Requests<'q> {
    core: &'q QueueCore,
    tags: std::vec::Drain<'q, Tag>,
}

impl<'q> Requests<'q> {
    pub(crate) fn new(core: &'q QueueCore, tags: &'q mut Vec<Tag>) -> Self {
        Requests { core, tags: tags.drain(..) }
    }

    /// Serves all requests with `serve`, which must take next to no time for each, and returns those that it gives back.
    ///
    /// This is for handlers that complete or forward their requests at once: no clock is read between them. If `serve` gives
    /// requests back, all others are submitted before this returns, so that the handler may wait, for example for an
    /// interpreter, before it takes the first one.
    pub fn serve_fast(mut self, serve: impl FnMut(Request<'q>) -> Option<Request<'q>>) -> Remaining<'q> {
        let core = self.core;
        let requests: Vec<_> = std::iter::from_fn(|| self.adopt_next()).filter_map(serve).collect();
        if !requests.is_empty() {
            core.submit_done();
        }
        Remaining { core, requests: requests.into_iter() }
    }

    fn adopt_next(&mut self) -> Option<Request<'q>> {
        self.tags.by_ref().find_map(|tag| Request::adopt(self.core, tag))
    }
}

impl<'q> Iterator for Requests<'q> {
    type Item = Request<'q>;

    fn next(&mut self) -> Option<Request<'q>> {
        // After the last one all of them are submitted anyway.
        if !self.tags.as_slice().is_empty() {
            self.core.submit_if_slow();
        }
        self.adopt_next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.tags.len()))
    }
}

impl Drop for Requests<'_> {
    fn drop(&mut self) {
        for tag in self.tags.by_ref() {
            drop(Request::adopt(self.core, tag));
        }
    }
}

/// Requests that were left by [`Requests::serve_fast`], in the order in which they arrived.
///
/// Requests that the handler leaves in here fail with `EIO`.
#[derive(Debug)]
pub struct Remaining<'q> {
    core: &'q QueueCore,
    requests: std::vec::IntoIter<Request<'q>>,
}

impl<'q> Iterator for Remaining<'q> {
    type Item = Request<'q>;

    fn next(&mut self) -> Option<Request<'q>> {
        let request = self.requests.next();
        if request.is_some() {
            self.core.submit_if_slow();
        }
        request
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.requests.size_hint()
    }
}

impl ExactSizeIterator for Remaining<'_> {}
