// SPDX-License-Identifier: MIT OR Apache-2.0

//! The files that extents are stored in, each duplicated once for all of its extents.
//!
//! A file is known by its open file description: two opens of one file stay two, because the kernel reports lost writes
//! once to each, and because on some file systems different files have the same number.
//!
//! When a process closes any of its descriptors of a file, the kernel drops the process's POSIX locks on the file
//! (`fcntl(2)`). So the duplicate of a file on which the process has such a lock stays open until the process has none.

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd::getpid;

use crate::errno::Errno;
use crate::file_system::has_unique_inodes;
use crate::fork::PerProcess;
use crate::process::read_text;

/// Length up to which the list of all locks comes in one piece, so that none is skipped: a read ends where a page is full.
const WHOLE_LIST: usize = 2048;

/// Numbers that distinguish files on most file systems: device, inode, and how it was opened.
type Identity = (u64, u64, i32);

/// A file that extents are stored in.
#[derive(Clone, Debug)]
pub struct SharedFile {
    /// A descriptor of our own.
    pub file: Arc<OwnedFd>,
    /// Whether it is open for reading.
    pub readable: bool,
    /// Whether it is open for writing.
    pub writable: bool,
}

/// A duplicate of a file's descriptor, so that the owner may close the original: one for all that are open in the same way.
///
/// # Errors
///
/// `ESPIPE` for what is neither a regular file nor a block device, `EINVAL` for `O_APPEND`, by which writes go to the
/// file's end, and `O_PATH`; the errors of the kernel for a bad descriptor.
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
    static FILES: PerProcess<Files> = PerProcess::new();
    let stat = fstat(&file)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(Errno::ESPIPE);
    }
    let identity = (stat.st_dev, stat.st_ino, flags.bits());
    let mut files = FILES.lock();
    let numbers_are_unique = || has_unique_inodes(&file);
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

/// Returns whether two descriptors are copies of each other. `None` if the kernel does not report it (`CONFIG_KCMP`, seccomp).
fn is_same_description(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> Option<bool> {
    const KCMP_FILE: libc::c_long = 0;
    let pid = libc::c_long::from(std::process::id() as i32);
    let (one, other) = (libc::c_long::from(one.as_raw_fd()), libc::c_long::from(other.as_raw_fd()));
    // SAFETY: compares two descriptors, which are open as long as they are borrowed, and touches no memory.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) };
    (order >= 0).then_some(order == 0)
}

/// Returns whether this process has a POSIX lock on a file, by any open file description. True if that is unknown, without
/// /proc.
fn has_posix_lock(file: impl AsFd) -> bool {
    let file = file.as_fd();
    if let Some(answer) = is_first_lock_own(file) {
        return answer;
    }
    let (Ok(info), Ok(stat)) = (read_text(info_of(file.as_raw_fd())), fstat(file)) else { return true };
    if shows_posix_lock(&info, None) {
        return true;
    }
    // Locks show the number that the kernel itself uses, which may be another one than that of `fstat`. Since Linux 5.14.
    let number = info
        .lines()
        .find_map(|line| line.strip_prefix("ino:"))
        .map_or(stat.st_ino.to_string(), |ino| ino.trim().into());
    is_listed(&number).or_else(|| is_locked_by_any(&number)).unwrap_or(true)
}

/// Returns whether it is known that the kernel itself keeps the locks of a file, so that a question about them waits for no
/// server. That is so for other file systems, too. Neither does this function wait for a server, as `fstatfs` may, nor read
/// the list of all mounts.
fn has_local_locks(file: BorrowedFd<'_>) -> bool {
    let Ok(stat) = fstat(file) else { return false };
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    // A block device's locks are never those of the file system that has its node. Only files in memory have seals.
    kind == SFlag::S_IFBLK || fcntl(file, FcntlArg::F_GET_SEALS).is_ok() || is_on_local_disk(stat.st_dev)
}

/// Returns whether a device number is that of an ext4 or XFS file system. These have a directory in sysfs for each one that
/// is mounted, with the name of its block device.
fn is_on_local_disk(number: u64) -> bool {
    let (major, minor) = (libc::major(number), libc::minor(number));
    let Ok(device) = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")) else { return false };
    let Some(name) = device.file_name() else { return false };
    ["ext4", "xfs"].iter().any(|kind| Path::new("/sys/fs").join(kind).join(name).is_dir())
}

/// Returns whether the first lock on a file is one of this process; false without any lock, the usual case, which takes one
/// system call. `None` if it is another's, or if the file system would have to ask a server.
fn is_first_lock_own(file: BorrowedFd<'_>) -> Option<bool> {
    if !has_local_locks(file) {
        return None;
    }
    // Asked for as a lock of an open file, which those of processes conflict with, also those of this one.
    let mut lock =
        libc::flock { l_type: libc::F_WRLCK as _, l_whence: libc::SEEK_SET as _, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).ok()?;
    if i32::from(lock.l_type) == libc::F_UNLCK {
        return Some(false);
    }
    (lock.l_pid == getpid().as_raw()).then_some(true)
}

fn info_of(descriptor: impl std::fmt::Display) -> String {
    format!("/proc/self/fdinfo/{descriptor}")
}

/// Returns whether the list of all locks has one of this process on an inode. `None` if that is unknown: each read of the list
/// goes on at the n-th lock, and skips some if other processes have released earlier ones meanwhile.
fn is_listed(inode: &str) -> Option<bool> {
    // Its processes have the numbers of that /proc.
    let process = std::fs::read_link("/proc/self").ok()?;
    let mut list = File::open("/proc/locks").ok()?;
    let (mut text, mut buffer, mut reads) = (Vec::new(), vec![0; 1 << 16], 0);
    loop {
        match list.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => text.extend_from_slice(&buffer[..len]),
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return None,
        }
        reads += 1;
    }
    let text = String::from_utf8_lossy(&text);
    let found = text.lines().any(|lock| is_posix_lock(lock, Some(&process.to_string_lossy()), Some(inode)));
    (found || reads <= 1 && text.len() <= WHOLE_LIST).then_some(found)
}

/// Returns whether any descriptor of this process shows a lock on an inode: the one by which it was locked is still open,
/// because a close would have dropped the lock. This takes longer than to look at the list of all locks, and misses none.
fn is_locked_by_any(inode: &str) -> Option<bool> {
    for descriptor in std::fs::read_dir("/proc/self/fdinfo").ok()? {
        match read_text(descriptor.ok()?.path()) {
            Ok(info) if shows_posix_lock(&info, Some(inode)) => return Some(true),
            Ok(_) => {}
            // Another thread has closed it.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(_) => return None,
        }
    }
    Some(false)
}

/// Returns whether a descriptor's information shows a POSIX lock by it, on this inode.
fn shows_posix_lock(info: &str, inode: Option<&str>) -> bool {
    info.lines().any(|line| line.strip_prefix("lock:").is_some_and(|lock| is_posix_lock(lock, None, inode)))
}

/// Returns whether a line like `1: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF` is of a POSIX lock, of this process and inode.
fn is_posix_lock(line: &str, process: Option<&str>, inode: Option<&str>) -> bool {
    let mut words = line.split_whitespace().skip(1);
    let (kind, owner, file) = (words.next(), words.nth(2), words.next());
    kind == Some("POSIX")
        && (process.is_none() || owner == process)
        && (inode.is_none() || file.and_then(|file| file.rsplit(':').next()) == inode)
}

/// A file of zeros, for ranges of a disk that are stored in no file.
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

    /// A database has many locks. Each read of the list of all locks continues at the n-th one.
    #[test]
    fn a_lock_is_found_while_other_processes_unlock() {
        use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
        use nix::unistd::{ForkResult, Pid, fork};
        let (locked, busy) = (tempfile::NamedTempFile::new().unwrap(), tempfile::tempfile().unwrap());
        let other = locked.reopen().unwrap();
        let lock = |file: &File, kind: i32, start: i64| {
            // SAFETY: plain numbers, for which zeros are valid.
            let mut lock: libc::flock = unsafe { std::mem::zeroed() };
            (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) = (kind as _, libc::SEEK_SET as _, start, 1);
            fcntl(file, FcntlArg::F_SETLK(&lock))
        };
        // The kernel has a list for each CPU, in which the newest lock is the first.
        let allowed = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let mut one = CpuSet::new();
        one.set((0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap()).unwrap()).unwrap();
        sched_setaffinity(Pid::from_raw(0), &one).unwrap();
        lock(locked.as_file(), libc::F_WRLCK, 0).unwrap();
        // SAFETY: the child makes system calls only, until it is killed.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Child => loop {
                // The test may end without killing it.
                let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
                for kind in [libc::F_WRLCK, libc::F_UNLCK] {
                    for at in 0..200 {
                        let _ = lock(&busy, kind, 2 * at);
                    }
                }
            },
            ForkResult::Parent { child } => child,
        };
        let (began, mut passes, mut missed) = (std::time::Instant::now(), 0, 0);
        while began.elapsed() < std::time::Duration::from_secs(2) {
            passes += 1;
            missed += usize::from(!has_posix_lock(&other));
        }
        nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL).unwrap();
        nix::sys::wait::waitpid(child, None).unwrap();
        assert_eq!(missed, 0, "of {passes}");
    }

    #[test]
    fn files_in_memory_have_local_locks_and_those_of_proc_may_not() {
        let memory = memfd_create(c"ublk-test", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(has_local_locks(memory.as_fd()));
        assert!(!has_local_locks(File::open("/proc/self/status").unwrap().as_fd()));
    }

    #[test]
    fn a_file_without_a_lock_needs_no_search() {
        let (locked, free) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        if !has_local_locks(free.as_fd()) {
            return;
        }
        assert_eq!(is_first_lock_own(free.as_fd()), Some(false));
        // SAFETY: plain numbers, for which zeros are valid.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence, lock.l_start) = (libc::F_WRLCK as _, libc::SEEK_SET as _, 1 << 40);
        fcntl(&locked, FcntlArg::F_SETLK(&lock)).unwrap();
        assert_eq!(is_first_lock_own(locked.as_fd()), Some(true));
        lock.l_type = libc::F_UNLCK as _;
        fcntl(&locked, FcntlArg::F_SETLK(&lock)).unwrap();
        assert_eq!(is_first_lock_own(locked.as_fd()), Some(false));
    }

    #[test]
    fn locks_are_known_by_kind_process_and_inode() {
        let is_own = |line| is_posix_lock(line, Some("1234"), Some("5678"));
        assert!(is_own("1: POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF"));
        for other in [
            "1: OFDLCK ADVISORY  WRITE -1 08:02:5678 0 EOF",
            "1: FLOCK  ADVISORY  WRITE 1234 08:02:5678 0 EOF",
            "1: POSIX  ADVISORY  READ  1235 08:02:5678 0 EOF",
            "1: POSIX  ADVISORY  WRITE 1234 08:02:56789 0 EOF",
            "1: -> POSIX  ADVISORY  WRITE 1234 08:02:5678 0 EOF",
            "",
        ] {
            assert!(!is_own(other), "{other}");
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
