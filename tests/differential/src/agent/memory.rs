// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory of the agents that the kernel gets addresses of. It is never given back: the agent's end
//! does that, when nothing of it can be in use any more.

use std::io;
use std::ptr;

use super::Place;

const PAGE: usize = 4096;

/// A mapping with an inaccessible page behind it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    start: usize,
    len: usize,
}

impl Memory {
    /// As many bytes, rounded up to pages.
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let len = len.max(1).next_multiple_of(PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), len + PAGE, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: all but the last page of the mapping just made.
        if unsafe { libc::mprotect(at, len, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Memory { start: at as usize, len })
    }

    /// The address of a part.
    pub(crate) fn address(&self, offset: usize) -> u64 {
        (self.start + offset.min(self.len)) as u64
    }

    /// The offset of an address, if it is in here.
    pub(crate) fn offset_of(&self, address: u64) -> Option<usize> {
        (address as usize).checked_sub(self.start).filter(|offset| *offset < self.len)
    }

    /// A part, which no other thread may read meanwhile.
    #[allow(clippy::mut_from_ref)]
    pub(crate) fn part(&self, offset: usize, len: usize) -> &mut [u8] {
        let offset = offset.min(self.len);
        let len = len.min(self.len - offset);
        // SAFETY: within the mapping, which is never unmapped. The kernel may write to it at the same
        // time if a driver is wrong, which shows as a wrong checksum.
        unsafe { std::slice::from_raw_parts_mut((self.start + offset) as *mut u8, len) }
    }

    /// Puts bytes at a place; their address.
    pub(crate) fn put(&self, place: Place, bytes: &[u8]) -> u64 {
        let offset = match place {
            Place::Nowhere => return 0,
            Place::Fault => return self.address(self.len),
            Place::Roomy => 0,
            Place::Tight => self.len - bytes.len().min(self.len),
        };
        let part = self.part(offset, bytes.len());
        part.copy_from_slice(&bytes[..part.len()]);
        self.address(offset)
    }
}
