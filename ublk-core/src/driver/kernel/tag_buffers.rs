// SPDX-License-Identifier: MIT OR Apache-2.0

//! The buffers in which the driver delivers the tags of `FETCH_IO_CMDS`: one group of provided buffers
//! per ring, shared by all its queues.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. `entries` is a page-aligned mapping of `COUNT` buffer entries, and stays mapped until the ring is
//!    gone: [`KernelRing`](super::ring::KernelRing) drops its ring first.
//! 2. A buffer belongs to the kernel from the moment the tail passes its entry until a completion names
//!    it, and to this process from then until it is provided again.

use std::io;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::Submitter;
use io_uring::types::BufRingEntry;

use crate::memory::Region;
use crate::units::Tag;

/// Number of buffers in the group, a power of two. When all are in use, the driver keeps the tags and ends the command.
const COUNT: u16 = 256;
/// Bytes of a buffer: the driver puts at most 128 tags into one.
const BYTES: usize = 128 * size_of::<u16>();

/// The group.
#[derive(Debug)]
pub(super) struct TagBuffers {
    entries: Region,
    buffers: Region,
    /// Entries provided so far.
    tail: u16,
}

impl TagBuffers {
    /// The group's number in its ring.
    pub(super) const GROUP: u16 = 0;

    /// Creates the group and registers it with the ring.
    pub(super) fn register(submitter: &Submitter<'_>) -> io::Result<Self> {
        let entries = Region::anonymous(usize::from(COUNT) * size_of::<BufRingEntry>())?;
        let buffers = Region::anonymous(usize::from(COUNT) * BYTES)?;
        let mut group = TagBuffers { entries, buffers, tail: 0 };
        (0..COUNT).for_each(|buffer| group.provide(buffer));
        // SAFETY: (1).
        unsafe { submitter.register_buf_ring_with_flags(group.entries.address() as u64, COUNT, Self::GROUP, 0) }?;
        Ok(group)
    }

    /// Gives a buffer to the kernel.
    fn provide(&mut self, buffer: u16) {
        let base = self.entries.address().cast::<BufRingEntry>();
        let address = self.buffers.address() as u64 + u64::from(buffer) * BYTES as u64;
        // SAFETY: (1): the masked index is inside the array; (2): the kernel does not look at the entry before
        // the tail passes it. The tail shares the first entry's last two bytes, which the setters leave alone.
        unsafe {
            let entry = &mut *base.add(usize::from(self.tail & (COUNT - 1)));
            entry.set_addr(address);
            entry.set_len(BYTES as u32);
            entry.set_bid(buffer);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: (1): the tail is in the first entry, aligned; the kernel reads it with acquire ordering.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }

    /// Reads the tags of a buffer that a completion named, and provides it again.
    pub(super) fn take(&mut self, buffer: u16, bytes: usize, into: &mut Vec<Tag>) {
        assert!(buffer < COUNT && bytes <= BYTES, "the kernel named buffer {buffer} with {bytes} bytes");
        // SAFETY: (2): the completion gave the buffer to this process; the assertion bounds the range.
        let first = unsafe { self.buffers.address().add(usize::from(buffer) * BYTES) }.cast::<u16>();
        // SAFETY: as above; buffers are aligned to their size.
        into.extend((0..bytes / size_of::<u16>()).map(|i| Tag(unsafe { first.add(i).read() })));
        self.provide(buffer);
    }
}
