// SPDX-License-Identifier: MIT OR Apache-2.0

//! Operations on files that the standard library lacks.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{FallocateFlags, fallocate};

use crate::errno::Errno;

/// Punches a hole in a file without changing its length.
pub(super) fn punch_hole(file: &File, offset: u64, len: u64) -> Result<(), Errno> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let range = i64::try_from(offset).and_then(|offset| Ok((offset, i64::try_from(len)?)));
    let (offset, len) = range.map_err(|_| Errno::EFBIG)?;
    uninterrupted(|| fallocate(file, flags, offset, len).map_err(Errno::from))
}

/// Repeats a system call while it fails with `EINTR`. `fallocate` is not restarted by the kernel, and is also interrupted by
/// the notifications that io_uring sends to a thread.
fn uninterrupted<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            ended => return ended,
        }
    }
}

/// Makes the names of files that were created in a directory durable, which syncing a file does not.
///
/// Not every file system can sync a directory, and not every user may open it. The disk works all the same, so a failure is
/// only logged.
pub(super) fn sync_directory(directory: &Path) {
    // Not `sync_all`, which repeats a sync after EINTR.
    if let Err(error) = File::open(directory).and_then(|directory| Ok(nix::unistd::fsync(&directory)?)) {
        log::warn!("cannot sync {}: {error}; files created in it may be missing after a crash", directory.display());
    }
}

/// Makes the name of a new file or directory durable.
pub(super) fn sync_name(path: &Path) {
    // A relative path of one word has an empty parent.
    match std::path::absolute(path) {
        Ok(path) => path.parent().into_iter().for_each(sync_directory),
        Err(error) => log::warn!("cannot find the directory of {}: {error}", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_call_is_repeated() {
        let mut answers = [Err(Errno::EINTR), Err(Errno::EINTR), Ok(7), Err(Errno::EIO)].into_iter();
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Ok(7));
        assert_eq!(uninterrupted(|| answers.next().unwrap()), Err(Errno::EIO));
    }

    #[test]
    fn a_hole_reads_as_zeros_and_keeps_the_length() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 8192], 0).unwrap();
        punch_hole(&file, 4096, 1 << 20).unwrap();
        let mut bytes = [1; 8192];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        assert_eq!(bytes, [[7; 4096], [0; 4096]].concat()[..]);
        assert_eq!(punch_hole(&file, u64::MAX, 1), Err(Errno::EFBIG));
    }

    #[test]
    fn names_without_a_directory_and_of_the_root_are_synced() {
        sync_name("file".as_ref());
        sync_name("/".as_ref());
    }
}
