// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests: tokens that must be spent.
//!
//! A [`Request`] owns its tag and the tag's buffer. Every way to end it consumes it; dropping it, also
//! while a panic unwinds, fails it with `EIO`. So a fetched tag is committed exactly once on every
//! path: one forgotten commit would hang whoever waits for the block device, until a reboot.
//!
//! The `unsafe` blocks here rest on invariant 3 of `memory.rs`: while a `Request` exists, its buffer is
//! the server's, and `&self`/`&mut self` order the accesses.

use std::fmt;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::engine::QueueCore;
use crate::memory::{Descriptor, IoBuffer};
use crate::uapi;
use crate::units::{DeviceId, QueueId, Sectors, Tag};

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Fill the buffer with what the disk holds.
    Read,
    /// Store the buffer.
    Write,
    /// Make everything acknowledged so far durable.
    Flush,
    /// The range's content is no longer needed; it may read as anything afterwards.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes,
}

impl Op {
    fn decode(op_flags: u32) -> Option<Self> {
        match op_flags as u8 {
            uapi::UBLK_IO_OP_READ => Some(Op::Read),
            uapi::UBLK_IO_OP_WRITE => Some(Op::Write),
            uapi::UBLK_IO_OP_FLUSH => Some(Op::Flush),
            uapi::UBLK_IO_OP_DISCARD => Some(Op::Discard),
            uapi::UBLK_IO_OP_WRITE_ZEROES => Some(Op::WriteZeroes),
            _ => None,
        }
    }

    /// Whether requests of this kind carry data.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write)
    }
}

/// How a file takes the place of a request's range; see [`Request::forward`].
///
/// The descriptor must stay open until the queue's handler is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// The file.
    pub fd: RawFd,
    /// Where in the file the request's first byte lies.
    pub offset: u64,
}

/// One request of the block layer, owned by whoever holds this.
#[must_use = "dropping a request fails it with EIO"]
pub struct Request<'q> {
    core: &'q QueueCore,
    tag: Tag,
    op: Op,
    descriptor: Descriptor,
    /// Taken when the request is spent.
    buffer: Option<Arc<IoBuffer>>,
}

impl fmt::Debug for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("device", &self.core.device().0)
            .field("queue", &self.core.queue().0)
            .field("tag", &self.tag.0)
            .field("op", &self.op)
            .field("offset", &self.offset())
            .field("len", &self.len())
            .finish()
    }
}

impl<'q> Request<'q> {
    /// Takes over a tag that the server owns, and its buffer. An operation that is not known here is
    /// failed at once.
    pub(crate) fn adopt(core: &'q QueueCore, tag: Tag) -> Option<Self> {
        let descriptor = core.descriptor(tag);
        let buffer = core.take_buffer(tag);
        let Some(op) = Op::decode(descriptor.op_flags) else {
            log::warn!("{}: unknown operation {:#x}", core.name(tag), descriptor.op_flags & 0xff);
            core.commit(tag, buffer, -(Errno::EOPNOTSUPP as i32));
            return None;
        };
        let request = Request { core, tag, op, descriptor, buffer: Some(buffer) };
        if op.has_data() && request.len() > request.buffer().len() as u64 {
            log::error!("{request:?} is longer than its buffer of {} bytes", request.buffer().len());
            request.fail(Errno::EIO);
            return None;
        }
        Some(request)
    }

    /// The operation.
    pub fn op(&self) -> Op {
        self.op
    }

    /// First byte on the disk; 0 for a flush, whose position the kernel leaves undefined.
    pub fn offset(&self) -> u64 {
        match self.op {
            Op::Flush => 0,
            _ => Sectors(self.descriptor.start_sector).bytes(),
        }
    }

    /// Length in bytes; 0 for a flush.
    pub fn len(&self) -> u64 {
        match self.op {
            Op::Flush => 0,
            _ => Sectors(u64::from(self.descriptor.nr_sectors)).bytes(),
        }
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

    /// The request's tag.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// The queue that the request came through.
    pub fn queue(&self) -> QueueId {
        self.core.queue()
    }

    /// The device that the request is for.
    pub fn device(&self) -> DeviceId {
        self.core.device()
    }

    fn data_len(&self) -> usize {
        if self.op.has_data() { self.len() as usize } else { 0 }
    }

    /// A write's data, or what a read's buffer holds so far. Empty for operations without data.
    pub fn data(&self) -> &[u8] {
        // SAFETY: memory.rs (3): this request owns the buffer; `&self` excludes `data_mut`.
        unsafe { self.buffer().bytes(self.data_len()) }
    }

    /// Where a read's data goes. The bytes left unwritten hold data of earlier requests of this
    /// device.
    pub fn data_mut(&mut self) -> &mut [u8] {
        let len = self.data_len();
        // SAFETY: memory.rs (3): this request owns the buffer, and `&mut self` is exclusive.
        unsafe { self.buffer().bytes_mut(len) }
    }

    /// The memory behind [`Request::data`], for bindings that hand it to another language. It is the
    /// tag's buffer: the next request of this tag will use it, unless it is [replaced].
    ///
    /// [replaced]: Request::replace_buffer
    pub fn buffer(&self) -> &Arc<IoBuffer> {
        self.buffer.as_ref().expect("a live request has its buffer")
    }

    /// Moves the tag to a fresh buffer and leaves the old one to whoever still holds it. A read's data
    /// is copied over first, because the driver takes it from the new buffer.
    ///
    /// There is no going back from here: others hold the old memory, and the driver needs an address for
    /// the tag's next request. Without memory this waits for some, and after ten seconds it ends the
    /// process, which the driver survives and silently mixed up data would not be.
    pub fn replace_buffer(&mut self) {
        let fresh = self.fresh_buffer();
        if self.op == Op::Read {
            // SAFETY: memory.rs (3): nobody else knows `fresh`, and the old buffer is this request's.
            unsafe { fresh.copy_from(self.buffer(), self.data_len()) };
        }
        self.buffer = Some(Arc::new(fresh));
    }

    fn fresh_buffer(&self) -> IoBuffer {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match IoBuffer::new(self.buffer().len()) {
                Ok(fresh) => return fresh,
                Err(error) if Instant::now() < deadline => {
                    log::warn!("{self:?}: no memory for a fresh buffer: {error}; waiting");
                    std::thread::sleep(Duration::from_millis(100));
                }
                Err(error) => {
                    log::error!("{self:?}: no memory for a fresh buffer: {error}; ending the process");
                    std::process::abort();
                }
            }
        }
    }

    /// Ends the request as done, in full. Partial success does not exist here: the driver's handling
    /// of it differs between kernels, and 7.3 takes a short write for a complete one.
    pub fn complete(mut self) {
        let result = self.data_len() as i32;
        self.commit(result);
    }

    /// Ends the request as failed.
    pub fn fail(mut self, errno: Errno) {
        self.commit(-(errno as i32));
    }

    /// Ends the request one way or the other.
    pub fn finish(self, result: Result<(), Errno>) {
        match result {
            Ok(()) => self.complete(),
            Err(errno) => self.fail(errno),
        }
    }

    /// Lets the engine do the request on a file, on the queue's own ring: reads and writes move data
    /// between the buffer and the file (durably for [FUA](Request::force_unit_access)), flush becomes
    /// `fdatasync`, discard punches a hole, write-zeroes zeroes the range. Short transfers are
    /// continued; the end of the file inside the range is an `EIO`.
    pub fn forward(mut self, file: FileRange) {
        let buffer = self.buffer.take().expect("a live request has its buffer");
        self.core.forward(self.tag, buffer, self.op, self.descriptor, file);
    }

    fn commit(&mut self, result: i32) {
        let buffer = self.buffer.take().expect("a live request has its buffer");
        self.core.commit(self.tag, buffer, result);
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if self.buffer.is_some() {
            log::error!("{self:?} was dropped by its handler; it fails with EIO");
            self.commit(-(Errno::EIO as i32));
        }
    }
}

/// The requests of one wake-up, in the order in which they arrived.
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
}

impl<'q> Iterator for Requests<'q> {
    type Item = Request<'q>;

    fn next(&mut self) -> Option<Request<'q>> {
        self.core.submit_if_late();
        self.tags.by_ref().find_map(|tag| Request::adopt(self.core, tag))
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
