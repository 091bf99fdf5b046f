// SPDX-License-Identifier: MIT OR Apache-2.0

//! The files that extents lie in, each duplicated once however many extents there are.
//!
//! A file is known by its open file description: two opens of one file stay two, because the kernel reports lost writes
//! once to each, and because on some file systems different files have the same number.
//!
//! When a process closes any of its descriptors of a file, the kernel drops the process's POSIX locks on the file
//! (`fcntl(2)`). So the duplicate of a file on which the process has such a lock stays open until the process has none.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, fstatfs};

use crate::errno::Errno;

/// What distinguishes files on most file systems: device, inode, and how it was opened.
type Identity = (u64, u64, i32);

/// `V9FS_MAGIC` of `linux/magic.h`.
const V9FS_MAGIC: FsType = FsType(0x0102_1997);

/// A file that extents lie in.
#[derive(Clone, Debug)]
pub struct SharedFile {
    /// A descriptor of our own.
    pub file: Arc<OwnedFd>,
    /// Whether it is open for reading.
    pub readable: bool,
    /// Whether it is open for writing.
    pub writable: bool,
}

/// A descriptor of our own for a file, so that its owner may close his: one for all that are open in the same way.
///
/// # Errors
///
/// `ESPIPE` for what is neither a regular file nor a block device, `EINVAL` for `O_APPEND`, by which writes go to the
/// file's end, and `O_PATH`; what the kernel says to a bad descriptor.
pub fn shared(file: impl AsFd) -> Result<SharedFile, Errno> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    if flags.intersects(OFlag::O_APPEND | OFlag::O_PATH) {
        return Err(Errno::EINVAL);
    }
    let mode = flags & OFlag::O_ACCMODE;
    let (readable, writable) = (mode != OFlag::O_WRONLY, mode != OFlag::O_RDONLY);
    own(file, flags, is_same_description).map(|file| SharedFile { file, readable, writable })
}

/// The duplicates that exist.
#[derive(Debug, Default)]
struct Files {
    by_identity: HashMap<Identity, Vec<Weak<OwnedFd>>>,
    /// Duplicates whose close would drop locks of this process.
    locked: Vec<Arc<OwnedFd>>,
}

impl Files {
    /// Forgets the duplicates that are closed, and closes those that no longer have to stay open.
    fn collect(&mut self) {
        self.locked.retain(|file| Arc::strong_count(file) > 1 || has_posix_lock(file));
        self.by_identity.retain(|_, files| {
            files.retain(|file| file.strong_count() != 0);
            !files.is_empty()
        });
    }
}

/// Compares two descriptors; see [`is_same_description`].
type Comparison = fn(BorrowedFd<'_>, BorrowedFd<'_>) -> Option<bool>;

fn own(file: impl AsFd, flags: OFlag, is_same: Comparison) -> Result<Arc<OwnedFd>, Errno> {
    static FILES: Mutex<Option<Files>> = Mutex::new(None);
    let stat = fstat(&file)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(Errno::ESPIPE);
    }
    let identity = (stat.st_dev, stat.st_ino, flags.bits());
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let files = files.get_or_insert_default();
    // The numbers of inodes are those of the file system's server, which may give several files the same one.
    let numbers_are_unique = || Ok(!matches!(fstatfs(&file)?.filesystem_type(), FUSE_SUPER_MAGIC | V9FS_MAGIC));
    for known in files.by_identity.get(&identity).into_iter().flatten().filter_map(Weak::upgrade) {
        // Where descriptions cannot be compared, a descriptor for each extent would be too many.
        if is_same(file.as_fd(), known.as_fd()).map_or_else(numbers_are_unique, Ok::<bool, Errno>)? {
            return Ok(known);
        }
    }
    files.collect();
    let own = file.as_fd().try_clone_to_owned().map_err(|e| crate::error::errno_of(&e))?;
    let own = Arc::new(own);
    if has_posix_lock(&own) {
        files.locked.push(own.clone());
    }
    files.by_identity.entry(identity).or_default().push(Arc::downgrade(&own));
    Ok(own)
}

/// Whether two descriptors are copies of each other. `None` if the kernel does not say (`CONFIG_KCMP`, seccomp).
fn is_same_description(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Option<bool> {
    const KCMP_FILE: libc::c_long = 0;
    let pid = libc::c_long::from(std::process::id() as i32);
    let (one, other) = (libc::c_long::from(one.as_raw_fd()), libc::c_long::from(other.as_raw_fd()));
    // SAFETY: compares two descriptors, which are open as long as they are borrowed, and touches no memory.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) };
    (order >= 0).then_some(order == 0)
}

/// Whether this process has a POSIX lock on a file, by whichever open of it. False if that is unknown, without /proc.
fn has_posix_lock(file: impl AsFd) -> bool {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", file.as_fd().as_raw_fd())).unwrap_or_default();
    if info.lines().any(|line| line.strip_prefix("lock:").is_some_and(|lock| is_posix_lock(lock, None))) {
        return true;
    }
    // Those by another open of the file are in the list of all locks. Its processes have the numbers of that /proc.
    let (Ok(process), Ok(stat)) = (std::fs::read_link("/proc/self"), fstat(&file)) else { return false };
    let owner = (process.to_string_lossy(), stat.st_ino.to_string());
    let locks = std::fs::read_to_string("/proc/locks").unwrap_or_default();
    locks.lines().any(|lock| is_posix_lock(lock, Some((&owner.0, &owner.1))))
}

/// Whether a line like `1: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF` is of a POSIX lock, of this process and inode.
fn is_posix_lock(line: &str, owner: Option<(&str, &str)>) -> bool {
    let mut words = line.split_whitespace().skip(1);
    words.next() == Some("POSIX")
        && owner.is_none_or(|(process, inode)| {
            words.nth(2) == Some(process) && words.next().and_then(|file| file.rsplit(':').next()) == Some(inode)
        })
}

/// A file that is all zeros, for ranges of a disk that lie nowhere.
///
/// # Errors
///
/// What the kernel says to another file in memory.
pub fn zeros() -> Result<Arc<OwnedFd>, Errno> {
    /// Longer than any disk.
    const LEN: u64 = 1 << 62;
    static FILE: OnceLock<Arc<OwnedFd>> = OnceLock::new();
    if let Some(file) = FILE.get() {
        return Ok(file.clone());
    }
    let file = File::from(memfd_create(c"ublk-zeros", MFdFlags::MFD_CLOEXEC)?);
    file.set_len(LEN).map_err(|e| crate::error::errno_of(&e))?;
    Ok(FILE.get_or_init(|| Arc::new(file.into())).clone())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_file_is_opened_once_however_often_it_is_shared() {
        let file = tempfile::tempfile().unwrap();
        let first = shared(&file).unwrap().file;
        let second = shared(file.try_clone().unwrap()).unwrap().file;
        assert!(Arc::ptr_eq(&first, &second));
        let other = shared(tempfile::tempfile().unwrap()).unwrap().file;
        assert!(!Arc::ptr_eq(&first, &other));
        drop(file);
        assert_eq!(File::from(first.try_clone().unwrap()).metadata().unwrap().len(), 0);
    }

    /// Lost writes are reported once to each. On FUSE these may even be different files.
    #[test]
    fn two_opens_of_a_file_stay_two() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let [one, other] = [(), ()].map(|()| file.reopen().unwrap());
        let own = |file: &File| shared(file).unwrap().file;
        let (first, second) = (own(&one), own(&other));
        if is_same_description(first.as_fd(), one.as_fd()).is_none() {
            return;
        }
        assert_eq!(is_same_description(second.as_fd(), other.as_fd()), Some(true));
        assert_eq!(is_same_description(first.as_fd(), second.as_fd()), Some(false));
        assert!(Arc::ptr_eq(&first, &own(&one.try_clone().unwrap())), "a copy of the first descriptor");
        assert!(Arc::ptr_eq(&second, &own(&other.try_clone().unwrap())), "a copy of the second descriptor");
    }

    #[test]
    fn files_are_known_by_number_if_the_kernel_cannot_compare() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let own = |file: &File| own(file, OFlag::O_RDWR, |_, _| None).unwrap();
        let first = own(file.as_file());
        assert!(Arc::ptr_eq(&first, &own(&file.reopen().unwrap())));
    }

    /// A program may lock a file so that no other program serves it.
    #[test]
    fn locks_of_the_program_outlive_an_extent() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let request = |kind: i32| {
            // SAFETY: plain numbers, for which zeros are valid.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            (lock.l_type, lock.l_whence) = (kind as _, libc::SEEK_SET as _);
            lock
        };
        fcntl(file.as_file(), FcntlArg::F_SETLK(&request(libc::F_WRLCK))).unwrap();
        let own = shared(file.as_file()).unwrap().file;
        assert!(has_posix_lock(&own));
        drop(own);
        drop(shared(tempfile::tempfile().unwrap()).unwrap());
        let own = OwnedFd::from(file.as_file().try_clone().unwrap());
        assert!(has_posix_lock(&own), "the extent has come and gone");
        fcntl(file.as_file(), FcntlArg::F_SETLK(&request(libc::F_UNLCK))).unwrap();
        assert!(!has_posix_lock(&own));
    }

    #[test]
    fn a_lock_by_another_open_of_a_file_outlives_an_extent() {
        let locked = tempfile::NamedTempFile::new().unwrap();
        let other = locked.reopen().unwrap();
        // SAFETY: plain numbers, for which zeros are valid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence) = (libc::F_WRLCK as _, libc::SEEK_SET as _);
        fcntl(locked.as_file(), FcntlArg::F_SETLK(&lock)).unwrap();
        drop(shared(&other).unwrap());
        assert!(has_posix_lock(locked.as_file()));
        lock.l_type = libc::F_UNLCK as _;
        fcntl(locked.as_file(), FcntlArg::F_SETLK(&lock)).unwrap();
        assert!(!has_posix_lock(locked.as_file()));
    }

    #[test]
    fn locks_are_known_by_kind_process_and_inode() {
        let own = Some(("1234", "5678"));
        assert!(is_posix_lock("1: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF", own));
        for other in [
            "1: OFDLCK ADVISORY  WRITE -1 08:02:5678 0 EOF",
            "1: FLOCK  ADVISORY  WRITE 1234 08:02:5678 0 EOF",
            "1: POSIX  ADVISORY  READ  1235 08:02:5678 0 EOF",
            "1: POSIX  ADVISORY  WRITE 1234 08:02:56789 0 EOF",
            "1: -> POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF",
            "",
        ] {
            assert!(!is_posix_lock(other, own), "{other}");
        }
    }

    #[test]
    fn what_cannot_be_read_at_an_offset_is_refused() {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_eq!(shared(pipe).unwrap_err(), Errno::ESPIPE);
    }

    #[test]
    fn how_a_file_is_open_decides_what_it_is_good_for() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let open = |options: &mut std::fs::OpenOptions| shared(options.open(file.path()).unwrap());
        let options = File::options;
        let read = open(options().read(true)).unwrap();
        assert_eq!((read.readable, read.writable), (true, false));
        let both = open(options().read(true).write(true)).unwrap();
        assert_eq!((both.readable, both.writable), (true, true));
        assert_eq!(open(options().read(true).append(true)).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn zeros_are_zeros_everywhere() {
        let file = File::from(zeros().unwrap().try_clone().unwrap());
        let mut bytes = [7; 4096];
        file.read_exact_at(&mut bytes, 1 << 61).unwrap();
        assert_eq!(bytes, [0; 4096]);
    }
}
