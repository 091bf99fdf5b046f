// SPDX-License-Identifier: MIT OR Apache-2.0

//! Properties of a backing file: its size, alignments for direct I/O, whether holes can be punched, and what a sync covers.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::statfs::{FUSE_SUPER_MAGIC, fstatfs};

use super::files::punch_hole;
use crate::errno::Errno;
use crate::error::{Error, Result, errno_of};
use crate::memory::{IoBuffer, PAGE_SIZE};

/// Returns the size of a regular file or block device in bytes.
#[cfg(feature = "cli")]
pub(crate) fn size(path: &Path) -> Result<u64> {
    let file = fs::File::open(path).map_err(|e| Error::file("open", path, &e))?;
    size_of(&file, path)
}

/// Returns the size of an open file in bytes; `path` is for the error.
pub(super) fn size_of(file: &fs::File, path: &Path) -> Result<u64> {
    io::Seek::seek(&mut &*file, io::SeekFrom::End(0)).map_err(|e| Error::file("find the size of", path, &e))
}

/// Returns whether a sync covers all writes to a file, through any open file description. Servers of FUSE file systems, such as
/// sshfs, may cache writes and their errors per open file.
pub(super) fn syncs_cover_the_file(file: &fs::File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() != FUSE_SUPER_MAGIC)
}

/// Returns the smallest block size for direct I/O on this file, determined by trying.
pub(super) fn direct_alignment(file: &fs::File, path: &Path, size: u64) -> Result<u32> {
    let buffer = IoBuffer::new(PAGE_SIZE).map_err(|e| Error::file("probe", path, &e))?;
    let mut last = Errno::EINVAL;
    for block in [512, 1024, 2048, 4096u32] {
        // The last block: a file may end within a block of its file system.
        let offset = (size.saturating_sub(1)) / u64::from(block) * u64::from(block);
        // SAFETY: memory.rs (3): nothing else refers to this buffer.
        let bytes = unsafe { buffer.bytes_mut(block as usize) };
        match file.read_at(bytes, offset) {
            Ok(_) => return Ok(block),
            Err(e) => last = errno_of(&e),
        }
    }
    Err(Error::File {
        operation: "read directly from",
        path: path.to_owned(),
        errno: last,
        hint: "direct I/O does not work with any block size up to a page; use buffered I/O".into(),
    })
}

/// Returns the memory alignment that direct I/O on this file needs, in bytes.
pub(super) fn memory_alignment(file: &fs::File) -> u32 {
    // Enough for all disks.
    const USUAL: u32 = 512;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is an empty C string, which with this flag means the descriptor itself; the kernel
    // fills the structure.
    let result = unsafe {
        libc::statx(file.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, found.as_mut_ptr())
    };
    // SAFETY: plain numbers, for which zeros are valid.
    let found = unsafe { found.assume_init() };
    let alignment = found.stx_dio_mem_align;
    let known = result == 0 && found.stx_mask & libc::STATX_DIOALIGN != 0 && alignment.is_power_of_two();
    if known { alignment.min(PAGE_SIZE as u32) } else { USUAL }
}

/// Returns whether holes can be punched.
pub(super) fn can_discard(file: &fs::File, is_block: bool, size: u64, rdev: u64) -> bool {
    if is_block {
        let (major, minor) = (nix::sys::stat::major(rdev), nix::sys::stat::minor(rdev));
        return block_device_can_discard(format!("/sys/dev/block/{major}:{minor}").as_ref());
    }
    // A hole after the end changes nothing, and shows whether the file system supports holes.
    let end = size.next_multiple_of(PAGE_SIZE as u64).min(i64::MAX as u64 - PAGE_SIZE as u64);
    punch_hole(file, end, PAGE_SIZE as u64).is_ok()
}

/// Returns whether holes can be punched in a block device with the sysfs directory `device`. The block layer implements them by
/// write-zeroes, and refuses them if the device only supports discard.
fn block_device_can_discard(device: &Path) -> bool {
    // A partition's directory has no queue; that of its disk has.
    ["queue", "../queue"].iter().any(|queue| {
        ["discard_max_bytes", "write_zeroes_max_bytes"].iter().all(|limit| {
            let bytes = fs::read_to_string(device.join(queue).join(limit));
            bytes.is_ok_and(|bytes| bytes.trim() != "0")
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_device_without_write_zeroes_cannot_discard() {
        let sys = tempfile::tempdir().unwrap();
        let (disk, partition) = (sys.path().join("sda"), sys.path().join("sda/sda1"));
        fs::create_dir_all(disk.join("queue")).unwrap();
        fs::create_dir(&partition).unwrap();
        for (discard, write_zeroes, can) in [("4096", "4096", true), ("4096", "0", false), ("0", "4096", false)] {
            fs::write(disk.join("queue/discard_max_bytes"), format!("{discard}\n")).unwrap();
            fs::write(disk.join("queue/write_zeroes_max_bytes"), format!("{write_zeroes}\n")).unwrap();
            assert_eq!(block_device_can_discard(&disk), can, "{discard} {write_zeroes}");
            assert_eq!(block_device_can_discard(&partition), can, "{discard} {write_zeroes}");
        }
    }
}
