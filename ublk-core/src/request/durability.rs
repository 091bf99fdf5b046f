// SPDX-License-Identifier: MIT OR Apache-2.0

//! When changes of a file are durable, and what a failed sync means for later ones.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow};

use super::OpenFile;
use crate::engine::SyncOrder;
use crate::errno::Errno;

/// Makes a file's data durable by one `fdatasync`, which is not repeated, even after `EINTR` or `EAGAIN`.
///
/// The kernel reports lost writes once to each open file description, with the errno that the file system chose. If that
/// is `EINTR`, [`File::sync_data`] repeats the sync, which then succeeds without what was lost. `EINTR` could also
/// come from a signal, before anything was lost, so signals are blocked during the call.
///
/// # Errors
///
/// That of `fdatasync`. Writes may be lost, and later syncs do not report that again.
pub fn fdatasync(file: impl AsFd) -> Result<(), Errno> {
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
    // SAFETY: the descriptor is open for as long as `file` is borrowed.
    let result = unsafe { libc::fdatasync(file.as_fd().as_raw_fd()) };
    let outcome = if result == 0 { Ok(()) } else { Err(Errno::from(&io::Error::last_os_error())) };
    if let Ok(before) = before {
        // It cannot fail: the mask is one that the thread had.
        let _ = before.thread_set_mask();
    }
    outcome
}

/// State of a disk's syncs: whether they can be trusted.
///
/// When a sync fails, writes are lost: the kernel reports the error once to each open file description and counts the
/// pages as clean from then on, so that a later sync succeeds without them. It does not report which writes they were, so
/// that no sync of the disk succeeds again until it has a new server. Until then its clients see every flush fail,
/// as with a disk that has failed.
#[derive(Debug)]
pub(crate) struct WriteBack {
    name: String,
    failed: AtomicBool,
    /// Held by [`WriteBack::sync`] until the outcome is known.
    syncing: Mutex<()>,
}

impl WriteBack {
    /// State of files that messages call `name`.
    pub(crate) fn new(name: impl Into<String>) -> Self {
        WriteBack { name: name.into(), failed: AtomicBool::new(false), syncing: Mutex::default() }
    }

    /// Fails with `EIO` once a sync has failed.
    pub(crate) fn check(&self) -> Result<(), Errno> {
        if self.failed.load(Ordering::Acquire) { Err(Errno::EIO) } else { Ok(()) }
    }

    /// Notes that a sync has failed.
    pub(crate) fn fail(&self, errno: Errno) {
        if !self.failed.swap(true, Ordering::AcqRel) {
            let name = &self.name;
            log::error!(
                "{name}: fdatasync: {errno}; writes may be lost; every further flush fails until the server is replaced"
            );
        }
    }

    /// Makes a file's data durable. One sync runs at a time: of two at once on the same open file, only one sees an
    /// error.
    pub(crate) fn sync(&self, file: &File) -> Result<(), Errno> {
        let _one = self.syncing.lock().unwrap_or_else(PoisonError::into_inner);
        self.check()?;
        fdatasync(file).map_err(|errno| {
            let errno = errno.known();
            self.fail(errno);
            errno
        })
    }
}

/// Way in which a request that is forwarded to a file becomes durable.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durability {
    /// Each change is durable when it is acknowledged, not only those with FUA: the disk has no write cache, and no
    /// flush will come.
    pub(crate) at_once: bool,
    /// How to sync a file whose data is in the page cache.
    pub(crate) sync: Option<Sync>,
}

/// A way to sync a file whose failures are remembered.
#[derive(Clone, Debug)]
pub(crate) struct Sync {
    /// An open file description that nothing else syncs but this queue, so that no other takes its errors. Without one, the
    /// description is synced that the data is written by.
    pub(crate) file: Option<OpenFile>,
    /// Whether data is written through the page cache. Then writes are synced by `fdatasync` too: `RWF_DSYNC` takes the
    /// errors of earlier writes, and a full file system would look like lost writes.
    pub(crate) buffered: bool,
    /// Shared by all queues of the disk.
    pub(crate) write_back: Arc<WriteBack>,
    /// Shared by all queues that sync the same description.
    pub(crate) order: Arc<SyncOrder>,
}

impl Sync {
    /// A way to sync any files that requests of a device are forwarded to, for all its queues.
    pub(crate) fn of_device(name: impl Into<String>) -> Self {
        Sync { file: None, buffered: true, write_back: Arc::new(WriteBack::new(name)), order: Arc::default() }
    }

    /// The descriptor, for the ring. It stays open as long as this.
    pub(crate) fn raw_fd(&self) -> Option<RawFd> {
        self.file.as_ref().map(|file| file.as_fd().as_raw_fd())
    }
}

/// Returns whether a file leaves nothing in the page cache: a block device that is open for direct I/O. Its writes report their
/// own errors, and a flush after one that failed covers the same writes.
pub(crate) fn is_uncached(file: impl AsFd) -> bool {
    let flags = fcntl(&file, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
    flags.contains(OFlag::O_DIRECT) && is_block_device(file.as_fd())
}

/// Does not ask the file's server, where it has one.
fn is_block_device(file: BorrowedFd<'_>) -> bool {
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is an empty C string, which with this flag means the descriptor itself; the kernel fills the
    // structure.
    let result = unsafe { libc::statx(file.as_raw_fd(), c"".as_ptr(), flags, libc::STATX_TYPE, found.as_mut_ptr()) };
    // SAFETY: plain numbers, for which zeros are a value too.
    let found = unsafe { found.assume_init() };
    result == 0 && u32::from(found.stx_mode) & libc::S_IFMT == libc::S_IFBLK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sync_that_fails_with_eintr_is_not_repeated() {
        use crate::seccomp::{allow, equals, filtered, load_number, refuse};
        let filter = vec![load_number(), equals(libc::SYS_fdatasync as u32, 0, 1), refuse(Errno::EINTR), allow()];
        let outcomes = filtered(filter, || {
            let file = tempfile::tempfile().unwrap();
            let write_back = WriteBack::new("test");
            [write_back.sync(&file), write_back.sync(&file)]
        });
        if let Some(outcomes) = outcomes {
            assert_eq!(outcomes, [Err(Errno::EINTR), Err(Errno::EIO)]);
        }
    }

    #[test]
    fn signals_are_blocked_only_during_a_sync() {
        let before = SigSet::thread_get_mask().unwrap();
        fdatasync(tempfile::tempfile().unwrap()).unwrap();
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(fdatasync(pipe), Err(Errno::EINVAL));
        assert_eq!(SigSet::thread_get_mask().unwrap(), before);
    }

    #[test]
    fn no_sync_succeeds_after_one_that_failed() {
        let write_back = WriteBack::new("test");
        let file = tempfile::tempfile().unwrap();
        write_back.sync(&file).unwrap();
        // Pipes cannot be synced.
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(write_back.sync(&pipe.into()), Err(Errno::EINVAL));
        assert_eq!(write_back.sync(&file), Err(Errno::EIO));
        assert_eq!(write_back.check(), Err(Errno::EIO));
    }
}
