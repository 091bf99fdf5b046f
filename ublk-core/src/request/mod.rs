// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests: tokens that must be spent.
//!
//! A request owns its tag and its memory. Every way to end it consumes it; dropping it, also while a panic unwinds, fails it
//! with `EIO`. So a fetched tag is committed exactly once on every path: one forgotten commit would hang the clients of the
//! block device until a reboot.
//!
//! The `unsafe` blocks here rest on invariant 3 of `memory.rs` (while a request exists, its buffer is the server's, and
//! `&self`/`&mut self` order the accesses) and on the invariant of [`detached`].
//!
//! * [`adopt`] — turns a tag into a request.
//! * [`data`] — the request's bytes and integrity metadata.
//! * [`forward`] — hands the request to the engine, for a file.
//! * [`end`] — the other ways to end a request.
//! * [`detached`] — requests that leave the thread of their queue.
//! * [`requests`] — the requests of one wake-up.

mod adopt;
mod data;
mod detached;
mod durability;
mod end;
mod forward;
mod op;
mod pieces;
mod requests;

use std::fmt;
use std::io;
use std::sync::Arc;

pub(crate) use self::data::memory_or_abort;
pub use self::detached::DetachedRequest;
use self::detached::Mailbox;
pub use self::durability::fdatasync;
pub(crate) use self::durability::{Durability, Sync as FileSync, WriteBack, is_uncached};
pub use self::op::Op;
pub use self::pieces::{FilePiece, FileRange, KeepAlive, OpenFile, Pieces};
pub use self::requests::{Remaining, Requests};
use crate::data::shared::{SharedRange, SharedTable};
use crate::data::{Access, DataMovement};
use crate::driver::CharDevice;
use crate::engine::QueueCore;
use crate::errno::Errno;
use crate::fork::Maker;
use crate::memory::{Descriptor, IoBuffer};
use crate::params::Integrity;
use crate::uapi;
use crate::units::{DeviceId, QueueId, Sectors, Tag};

/// Context that the requests of a queue share.
#[derive(Debug)]
pub(crate) struct RequestContext {
    /// The process that serves them.
    pub(crate) maker: Maker,
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

/// Outcome of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Bytes done, 0 for operations without data, or a negative errno.
    pub(crate) result: i32,
    /// Sector that a zone append has written to.
    pub(crate) zone_sector: u64,
}

impl Answer {
    pub(crate) fn new(result: i32) -> Self {
        Answer { result, zone_sector: 0 }
    }

    /// A failure. The block layer takes an errno that it does not know for `EIO`, and so does this, since later kernels may
    /// give it a meaning.
    pub(crate) fn error(errno: impl Into<Errno>) -> Self {
        Answer::new(-errno.into().known().get())
    }
}

/// A request for the engine to carry out on files.
#[derive(Debug)]
pub(crate) struct FileRequest {
    pub(crate) op: Op,
    pub(crate) descriptor: Descriptor,
    pub(crate) pieces: Pieces,
    pub(crate) keep_alive: Option<KeepAlive>,
    /// The client's memory, if the data is there.
    pub(crate) shared: Option<SharedRange>,
    pub(crate) durability: Durability,
}

/// Way by which a request returns to the driver.
#[derive(Debug)]
enum Route<'q> {
    /// Directly, on the thread of its queue.
    Queue(&'q QueueCore),
    /// By the inbox of that thread.
    Mailbox(Mailbox),
}

impl Route<'_> {
    fn context(&self) -> &RequestContext {
        match self {
            Route::Queue(core) => core.context(),
            Route::Mailbox(mailbox) => mailbox.context(),
        }
    }

    /// Allocates memory for a request that has none.
    fn take_memory(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        match self {
            Route::Queue(core) => core.take_memory(len),
            Route::Mailbox(_) => IoBuffer::new(len).map(Arc::new),
        }
    }

    /// Frees memory that was only a copy.
    fn put_memory(&self, memory: Arc<IoBuffer>) {
        if let Route::Queue(core) = self {
            core.put_memory(memory);
        }
    }

    fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        match self {
            Route::Queue(core) => core.commit(tag, buffer, answer),
            Route::Mailbox(mailbox) => mailbox.commit(tag, buffer, answer),
        }
    }

    fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest) {
        match self {
            Route::Queue(core) => core.forward(tag, buffer, request),
            Route::Mailbox(mailbox) => mailbox.forward(tag, buffer, request),
        }
    }
}

/// A request of the block layer.
///
/// Handlers get it on the thread of its queue, for the time of one call. One that takes longer is
/// [detached](Request::detach). A request cannot be sent to another thread otherwise:
///
/// ```compile_fail,E0277
/// fn send<T: Send>() {}
///
/// send::<ublk_core::DetachedRequest>();
/// send::<ublk_core::Request<'static>>();
/// ```
#[must_use = "dropping a request fails it with EIO"]
pub struct Request<'q> {
    route: Route<'q>,
    tag: Tag,
    op: Op,
    descriptor: Descriptor,
    /// The memory that holds its data; `None` if the data was not brought into this process.
    buffer: Option<Arc<IoBuffer>>,
    /// Set if its data is in memory that the client shares; `buffer` is a copy then.
    shared: Option<SharedRange>,
    spent: bool,
}

impl fmt::Debug for Request<'_> {
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

impl fmt::Display for Request<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (op, len, offset) = (self.op.name(), self.len(), self.offset());
        write!(f, "{op} of {len} bytes at {offset}, ublkb{} queue {} tag {}", self.device(), self.queue(), self.tag)
    }
}

impl Request<'_> {
    /// Returns the operation.
    pub fn op(&self) -> Op {
        self.op
    }

    /// Returns the first byte on the disk; 0 for operations without a range, whose position the kernel leaves undefined.
    pub fn offset(&self) -> u64 {
        match self.op {
            Op::Flush | Op::ZoneResetAll => 0,
            _ => Sectors(self.descriptor.start_sector).bytes(),
        }
    }

    /// Returns the length in bytes: of the range on the disk, or of the report for [`Op::ReportZones`]. 0 for operations
    /// without a range.
    pub fn len(&self) -> u64 {
        self.op.len(&self.descriptor)
    }

    /// Returns whether the request covers no bytes, for example because it is a flush.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns whether this write must be durable before it is acknowledged. Only disks that advertise it get such writes:
    /// [`Operations::FUA`](crate::Operations::FUA).
    pub fn force_unit_access(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_FUA != 0
    }

    /// Returns whether zeroed space must stay allocated.
    pub fn no_unmap(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_NOUNMAP != 0
    }

    /// Returns whether the request carries integrity metadata, for [`read_integrity`](Request::read_integrity) and
    /// [`write_integrity`](Request::write_integrity).
    pub fn has_integrity(&self) -> bool {
        self.descriptor.op_flags & uapi::UBLK_IO_F_INTEGRITY != 0
    }

    /// Returns the tag.
    pub fn tag(&self) -> Tag {
        self.tag
    }

    /// Returns the queue that delivered the request.
    pub fn queue(&self) -> QueueId {
        self.route.context().queue
    }

    /// Returns the device that the request is for.
    pub fn device(&self) -> DeviceId {
        self.route.context().device
    }

    fn data_len(&self) -> usize {
        if self.op.has_data() { self.len() as usize } else { 0 }
    }
}

impl Drop for Request<'_> {
    fn drop(&mut self) {
        if !self.spent {
            log::error!("{self} was dropped by its handler without an answer; failing it with EIO");
            self.commit(Answer::error(Errno::EIO));
        }
    }
}
