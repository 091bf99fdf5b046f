// SPDX-License-Identifier: MIT OR Apache-2.0

//! An `io_uring` into which any bytes can be put.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use io_uring::squeue::{Entry, Entry128};
use io_uring::{IoUring, cqueue, types};
use serde::{Deserialize, Serialize};

/// `IORING_OP_URING_CMD`
pub(crate) const URING_CMD: u8 = io_uring::opcode::UringCmd16::CODE;
/// `IORING_OP_READ_FIXED`
pub(crate) const READ_FIXED: u8 = io_uring::opcode::ReadFixed::CODE;
/// `IORING_OP_WRITE_FIXED`
pub(crate) const WRITE_FIXED: u8 = io_uring::opcode::WriteFixed::CODE;
/// `IORING_OP_ASYNC_CANCEL`
pub(crate) const ASYNC_CANCEL: u8 = io_uring::opcode::AsyncCancel::CODE;
/// `IOSQE_BUFFER_SELECT`
pub(crate) const BUFFER_SELECT: u8 = 1 << 5;
/// `IORING_URING_CMD_MULTISHOT`
pub(crate) const MULTISHOT: u32 = 1 << 1;
/// `IORING_CQE_F_MORE`
pub(crate) const MORE: u32 = 1 << 1;

/// A submission queue entry as its fields lie in memory; the kernel judges it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sqe {
    pub(crate) opcode: u8,
    pub(crate) flags: u8,
    pub(crate) fd: RawFd,
    /// `off`, or `cmd_op` in the lower half.
    pub(crate) offset: u64,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) op_flags: u32,
    pub(crate) user_data: u64,
    /// `buf_index` or `buf_group`.
    pub(crate) buffer: u16,
    /// The payload from byte 48 on.
    pub(crate) payload: Vec<u8>,
}

impl Sqe {
    fn bytes(&self) -> [u8; 128] {
        let mut bytes = [0; 128];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &[self.opcode, self.flags]);
        put(4, &self.fd.to_ne_bytes());
        put(8, &self.offset.to_ne_bytes());
        put(16, &self.addr.to_ne_bytes());
        put(24, &self.len.to_ne_bytes());
        put(28, &self.op_flags.to_ne_bytes());
        put(32, &self.user_data.to_ne_bytes());
        put(40, &self.buffer.to_ne_bytes());
        put(48, &self.payload[..self.payload.len().min(80)]);
        bytes
    }
}

/// A completion queue entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cqe {
    pub(crate) user_data: u64,
    pub(crate) result: i32,
    pub(crate) flags: u32,
}

/// A ring with entries of 64 or of 128 bytes.
pub(crate) enum Ring {
    /// 64 bytes
    Narrow(IoUring<Entry, cqueue::Entry>),
    /// 128 bytes: `IORING_SETUP_SQE128`
    Wide(IoUring<Entry128, cqueue::Entry>),
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Ring::Narrow(_)) { "Narrow" } else { "Wide" })
    }
}

impl Ring {
    /// A ring whose completions also count up `event`.
    pub(crate) fn new(entries: u32, wide: bool, event: RawFd) -> io::Result<Self> {
        let ring = if wide {
            Ring::Wide(IoUring::<Entry128, cqueue::Entry>::builder().setup_cqsize(entries * 8).build(entries)?)
        } else {
            Ring::Narrow(IoUring::<Entry, cqueue::Entry>::builder().setup_cqsize(entries * 8).build(entries)?)
        };
        ring.submitter().register_eventfd(event)?;
        Ok(ring)
    }

    /// The ring's registrations and system calls.
    pub(crate) fn submitter(&self) -> io_uring::Submitter<'_> {
        match self {
            Ring::Narrow(ring) => ring.submitter(),
            Ring::Wide(ring) => ring.submitter(),
        }
    }

    /// Hands one entry to the kernel.
    pub(crate) fn submit(&mut self, sqe: &Sqe) -> io::Result<()> {
        let bytes = sqe.bytes();
        let full = || io::Error::other("the submission queue is full");
        match self {
            Ring::Narrow(ring) => {
                let mut half = [0; 64];
                half.copy_from_slice(&bytes[..64]);
                // SAFETY: Entry is a C structure of plain integers and unions of them.
                let entry: Entry = unsafe { std::mem::transmute(half) };
                // SAFETY: whatever the entry refers to is memory of this program that lives until it ends, or
                // an address that is meant to be wrong.
                unsafe { ring.submission().push(&entry) }.map_err(|_| full())?;
            }
            Ring::Wide(ring) => {
                // SAFETY: as above; the second half is an array.
                let entry: Entry128 = unsafe { std::mem::transmute(bytes) };
                // SAFETY: as above.
                unsafe { ring.submission().push(&entry) }.map_err(|_| full())?;
            }
        }
        loop {
            match self.submitter().submit() {
                Ok(_) => return Ok(()),
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes all completions that are there.
    pub(crate) fn take(&mut self) -> Vec<Cqe> {
        let convert =
            |entry: cqueue::Entry| Cqe { user_data: entry.user_data(), result: entry.result(), flags: entry.flags() };
        match self {
            Ring::Narrow(ring) => ring.completion().map(convert).collect(),
            Ring::Wide(ring) => ring.completion().map(convert).collect(),
        }
    }

    /// Sleeps until there is a completion, or `limit` is over.
    pub(crate) fn wait(&mut self, limit: Duration) -> io::Result<()> {
        let limit = types::Timespec::from(limit);
        let arguments = types::SubmitArgs::new().timespec(&limit);
        match self.submitter().submit_with_args(1, &arguments) {
            Ok(_) => Ok(()),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Ring::Narrow(ring) => ring.as_raw_fd(),
            Ring::Wide(ring) => ring.as_raw_fd(),
        }
    }
}
