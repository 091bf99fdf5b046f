// SPDX-License-Identifier: MIT OR Apache-2.0

//! Submission queue entries of a ring thread: how each [`Operation`] is laid out for the kernel.
//!
//! Invariant that the `unsafe` blocks of this file refer to:
//!
//! 1. An [`Entry`] is the kernel's submission queue entry: 64 bytes of plain numbers.

use std::os::fd::RawFd;

use io_uring::squeue::Entry;
use io_uring::{opcode, types};

use super::super::{Elements, FileSlot, Memory, Operation};
use super::tag_buffers::TagBuffers;
use crate::uapi::{self, ublk_batch_io, ublksrv_io_cmd};
use crate::units::{QueueId, Tag};

/// Marks a [`FileSlot`] that is a descriptor's number.
pub(super) const PLAIN: u32 = 1 << 31;

/// `IORING_URING_CMD_MULTISHOT` (Linux 6.18) and `IOSQE_BUFFER_SELECT`, and the positions of flags and buffer group in the
/// entry, from `linux/io_uring.h`.
const MULTISHOT: u32 = 1 << 1;
const BUFFER_SELECT: u8 = 1 << 5;
const FLAGS_AT: usize = 1;
const COMMAND_FLAGS_AT: usize = 28;
const GROUP_AT: usize = 40;

/// Builds the entry for an operation. The ring must have its [`TagBuffers`] before it submits an [`Operation::FetchBatch`].
pub(super) fn entry(operation: Operation) -> Entry {
    match operation {
        Operation::Fetch { file, queue, tag, address, register } => {
            io_command(file, uapi::UBLK_U_IO_FETCH_REQ, io_argument(queue, tag, 0, address), register)
        }
        Operation::Commit { file, queue, tag, result, address, register } => {
            let argument = io_argument(queue, tag, result, address);
            io_command(file, uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ, argument, register)
        }
        Operation::GetData { file, queue, tag, address } => {
            io_command(file, uapi::UBLK_U_IO_NEED_GET_DATA, io_argument(queue, tag, 0, address), None)
        }
        Operation::Register { file, queue, tag, index } => {
            let argument = io_argument(queue, tag, 0, u64::from(index));
            io_command(file, uapi::UBLK_U_IO_REGISTER_IO_BUF, argument, None)
        }
        Operation::Unregister { file, queue, tag, index } => {
            let argument = io_argument(queue, tag, 0, u64::from(index));
            io_command(file, uapi::UBLK_U_IO_UNREGISTER_IO_BUF, argument, None)
        }
        Operation::Prepare { file, queue, elements } => {
            batch_command(file, uapi::UBLK_U_IO_PREP_IO_CMDS, queue, elements)
        }
        Operation::CommitBatch { file, queue, elements } => {
            batch_command(file, uapi::UBLK_U_IO_COMMIT_IO_CMDS, queue, elements)
        }
        Operation::FetchBatch { file, queue } => {
            let tags = Elements { address: 0, count: 0, stride: size_of::<u16>() as u8, flags: 0 };
            multishot(batch_command(file, uapi::UBLK_U_IO_FETCH_IO_CMDS, queue, tags))
        }
        Operation::Read { fd, memory, len, offset } => match memory {
            Memory::At(address) => opcode::Read::new(types::Fd(fd), address as *mut u8, len).offset(offset).build(),
            Memory::Registered { index, offset: at } => {
                opcode::ReadFixed::new(types::Fd(fd), at as *mut u8, len, index).offset(offset).build()
            }
        },
        Operation::Write { fd, memory, len, offset, durable } => {
            let flags = if durable { libc::RWF_DSYNC } else { 0 };
            match memory {
                Memory::At(address) => {
                    opcode::Write::new(types::Fd(fd), address as *const u8, len).offset(offset).rw_flags(flags).build()
                }
                Memory::Registered { index, offset: at } => {
                    opcode::WriteFixed::new(types::Fd(fd), at as *const u8, len, index)
                        .offset(offset)
                        .rw_flags(flags)
                        .build()
                }
            }
        }
        Operation::SyncData { fd } => opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build(),
        Operation::Allocate { fd, mode, offset, len } => {
            opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build()
        }
    }
}

/// Encodes a `struct ublksrv_io_cmd`.
fn io_argument(queue: QueueId, tag: Tag, result: i32, address: u64) -> [u8; 16] {
    let mut bytes = [0; size_of::<ublksrv_io_cmd>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(ublksrv_io_cmd, q_id), &queue.0.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, tag), &tag.0.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, result), &result.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, anon_1), &address.to_ne_bytes());
    bytes
}

/// Encodes a `struct ublk_batch_io`.
fn batch_argument(queue: QueueId, elements: Elements) -> [u8; 16] {
    let mut bytes = [0; size_of::<ublk_batch_io>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(ublk_batch_io, q_id), &queue.0.to_ne_bytes());
    put(std::mem::offset_of!(ublk_batch_io, flags), &elements.flags.to_ne_bytes());
    put(std::mem::offset_of!(ublk_batch_io, nr_elem), &elements.count.to_ne_bytes());
    put(std::mem::offset_of!(ublk_batch_io, elem_bytes), &[elements.stride]);
    bytes
}

/// Builds a command for a char device. `register`, an index in the ring's table of buffers, becomes the driver's `struct
/// ublk_auto_buf_reg`, whose flag has a failure to register reported with the request.
fn io_command(file: FileSlot, op: u32, argument: [u8; 16], register: Option<u16>) -> Entry {
    let register = register.map(|index| u64::from(index) | u64::from(uapi::UBLK_AUTO_BUF_REG_FALLBACK) << 16);
    if file.0 & PLAIN == 0 {
        opcode::UringCmd16::new(types::Fixed(file.0), op).cmd(argument).addr(register).build()
    } else {
        opcode::UringCmd16::new(types::Fd((file.0 & !PLAIN) as RawFd), op).cmd(argument).addr(register).build()
    }
}

/// Builds a command of `BATCH_IO`.
fn batch_command(file: FileSlot, op: u32, queue: QueueId, elements: Elements) -> Entry {
    let argument = batch_argument(queue, elements);
    if file.0 & PLAIN == 0 {
        opcode::UringCmd16::new(types::Fixed(file.0), op).cmd(argument).addr(Some(elements.address)).build()
    } else {
        let fd = types::Fd((file.0 & !PLAIN) as RawFd);
        opcode::UringCmd16::new(fd, op).cmd(argument).addr(Some(elements.address)).build()
    }
}

/// Makes a command multishot: it completes repeatedly, into the buffers of [`TagBuffers`]. The io-uring crate cannot express
/// that.
fn multishot(entry: Entry) -> Entry {
    // SAFETY: (1), and the sizes agree, or this would not compile.
    let mut bytes: [u8; 64] = unsafe { std::mem::transmute(entry) };
    bytes[FLAGS_AT] |= BUFFER_SELECT;
    bytes[COMMAND_FLAGS_AT..COMMAND_FLAGS_AT + 4].copy_from_slice(&MULTISHOT.to_ne_bytes());
    bytes[GROUP_AT..GROUP_AT + 2].copy_from_slice(&TagBuffers::GROUP.to_ne_bytes());
    // SAFETY: as above.
    unsafe { std::mem::transmute(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_multishot_command_is_laid_out_as_the_kernel_reads_it() {
        let elements = Elements { address: 0, count: 0, stride: 2, flags: 0 };
        let entry = multishot(batch_command(FileSlot(5), uapi::UBLK_U_IO_FETCH_IO_CMDS, QueueId(0x0102), elements));
        // SAFETY: (1).
        let bytes: [u8; 64] = unsafe { std::mem::transmute(entry) };
        // A fixed file, and a buffer of the group.
        assert_eq!(bytes[1], 1 | BUFFER_SELECT);
        assert_eq!(bytes[4..8], 5u32.to_ne_bytes());
        assert_eq!(bytes[8..12], uapi::UBLK_U_IO_FETCH_IO_CMDS.to_ne_bytes());
        assert_eq!(bytes[28..32], MULTISHOT.to_ne_bytes());
        assert_eq!(bytes[48..56], [2, 1, 0, 0, 0, 0, 2, 0]);
    }
}
