// SPDX-License-Identifier: MIT OR Apache-2.0

//! The disk's content: a file in memory that outlives every server, with a page behind the disk's end in which
//! servers count.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};

/// fio's part of the disk, from its start.
pub(crate) const LOAD_BYTES: u64 = 24 << 20;
/// The witnesses' part, behind fio's.
pub(crate) const WITNESS_BYTES: u64 = 1 << 20;
/// All of the disk.
pub(crate) const DISK_BYTES: u64 = LOAD_BYTES + WITNESS_BYTES;

const FILE_BYTES: usize = DISK_BYTES as usize + 4096;

/// The file, mapped.
#[derive(Debug)]
pub(crate) struct Store {
    file: File,
    map: *mut u8,
}

// SAFETY: the mapping lives as long as the Store; what is done with it are copies and atomic operations.
unsafe impl Send for Store {}
// SAFETY: as above.
unsafe impl Sync for Store {}

impl Store {
    /// Opens the file, and makes it if need be.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("cannot open {}", path.display()))?;
        file.set_len(FILE_BYTES as u64).context("cannot size the store")?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel wants it.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), FILE_BYTES, prot, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        if map == libc::MAP_FAILED {
            return Err(io::Error::last_os_error()).context("cannot map the store");
        }
        Ok(Store { file, map: map.cast() })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Where a part of the disk is in memory, if the disk has it.
    pub(crate) fn place(&self, offset: u64, length: usize) -> Option<*mut u8> {
        let end = offset.checked_add(length as u64)?;
        // SAFETY: the offset is within the mapping.
        (end <= DISK_BYTES).then(|| unsafe { self.map.add(offset as usize) })
    }

    /// A copy of a part of the disk.
    pub(crate) fn read(&self, offset: u64, into: &mut [u8]) -> Result<()> {
        let from = self.place(offset, into.len()).context("beyond the end of the store")?;
        // SAFETY: `place` has checked the range. A server may write there meanwhile, which makes the copy's
        // content a mixture; the callers are aware of that.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
        Ok(())
    }

    fn counter(&self) -> &AtomicU64 {
        // SAFETY: the page behind the disk is part of the mapping, is aligned, and is used in this way only.
        unsafe { AtomicU64::from_ptr(self.map.add(DISK_BYTES as usize).cast()) }
    }

    /// A server counts a write to fio's part: only fio writes there.
    pub(crate) fn count(&self, offset: u64) {
        if offset < LOAD_BYTES {
            self.counter().fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Writes to fio's part so far.
    pub(crate) fn written(&self) -> u64 {
        self.counter().load(Ordering::Relaxed)
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the mapping is this Store's, and nothing refers to it any more.
        unsafe { libc::munmap(self.map.cast(), FILE_BYTES) };
    }
}
