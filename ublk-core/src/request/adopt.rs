// SPDX-License-Identifier: MIT OR Apache-2.0

//! From a tag that the server owns to a request.

use super::{Answer, Op, Request, Route};
use crate::data::{Access, DataMovement};
use crate::engine::QueueCore;
use crate::errno::Errno;
use crate::memory::Descriptor;
use crate::uapi;
use crate::units::Tag;

impl<'q> Request<'q> {
    /// Takes over a tag that the server owns, and its buffer. A request that cannot be served is failed at once.
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
            // Even if its handler does not forward it: the handler does not know about the lost writes.
            core.commit(tag, buffer, Answer::error(errno));
            return None;
        }
        // Where tags have no buffers of their own, one that is left from the tag's last request may be too short.
        let keeps = core.context().data == DataMovement::Copy || !op.fills();
        let buffer = buffer.filter(|buffer| keeps || buffer.len() as u64 >= op.len(&descriptor));
        let mut request =
            Request { route: Route::Queue(core), tag, op, descriptor, buffer, shared: None, spent: false };
        if let Some(buffer) = request.buffer.as_ref().filter(|buffer| request.data_len() > buffer.len()) {
            log::error!("{request:?} is longer than its buffer of {} bytes", buffer.len());
            request.fail(Errno::EIO);
            return None;
        }
        let context = core.context();
        // The driver copies a read's data from memory that is named by the commit.
        let needs_memory = context.access == Access::Bytes || context.data == DataMovement::GetData && op.fills();
        if needs_memory && let Err(errno) = request.load() {
            request.fail(errno);
            return None;
        }
        Some(request)
    }

    /// Takes over a tag whose data is in memory that the client shares. The tag keeps its own buffer.
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
        let mut request =
            Request { route: Route::Queue(core), tag, op, descriptor, buffer: None, shared, spent: false };
        if core.context().access == Access::Bytes
            && let Err(errno) = request.load()
        {
            request.fail(errno);
            return None;
        }
        Some(request)
    }
}
