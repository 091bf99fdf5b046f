// SPDX-License-Identifier: MIT OR Apache-2.0

//! Submission queue entries with the fields that ublk's commands use, some of which the `io-uring` crate keeps
//! to itself.

use std::io;

use io_uring::squeue::{Entry, Entry128};
use io_uring::{IoUring, cqueue, opcode};

/// `IOSQE_BUFFER_SELECT`
pub(crate) const BUFFER_SELECT: u8 = 1 << 5;
/// `IORING_URING_CMD_MULTISHOT`
pub(crate) const MULTISHOT: u32 = 1 << 1;

/// A ring for I/O commands.
pub(crate) type IoRing = IoUring<Entry, cqueue::Entry>;
/// A ring for control commands.
pub(crate) type ControlRing = IoUring<Entry128, cqueue::Entry>;

/// `struct io_uring_sqe` of a command for a driver.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Command {
    pub(crate) opcode: u8,
    pub(crate) flags: u8,
    pub(crate) ioprio: u16,
    pub(crate) fd: i32,
    pub(crate) op: u32,
    pub(crate) pad: u32,
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) command_flags: u32,
    pub(crate) user_data: u64,
    pub(crate) buf_group: u16,
    pub(crate) personality: u16,
    pub(crate) file_index: u32,
    pub(crate) payload: [u8; 16],
}

impl Command {
    /// The entry for the ring.
    pub(crate) fn entry(mut self) -> Entry {
        const { assert!(size_of::<Command>() == 64 && size_of::<Entry>() == 64) };
        self.opcode = opcode::UringCmd16::CODE;
        // SAFETY: both are the kernel's structure of 64 bytes, of integers without padding.
        unsafe { std::mem::transmute(self) }
    }
}

/// Puts an entry into the ring, which makes room by submitting what is there.
pub(crate) fn push(ring: &mut IoRing, entry: &Entry) -> io::Result<()> {
    if ring.submission().is_full() {
        ring.submit()?;
    }
    // SAFETY: the callers' entries refer to memory that lives as long as the process, or until their completion.
    unsafe { ring.submission().push(entry) }.map_err(|_| io::Error::other("the submission queue stays full"))
}

/// Submits, and waits for a completion.
pub(crate) fn enter(ring: &mut IoRing) -> io::Result<()> {
    match ring.submit_and_wait(1) {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY)) => Ok(()),
        Err(error) => Err(error),
    }
}
