// SPDX-License-Identifier: MIT OR Apache-2.0

//! The files that extents lie in, each opened once however many extents there are.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{SFlag, fstat};
use nix::sys::statfs::{FUSE_SUPER_MAGIC, FsType, fstatfs};

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
    own(file, flags).map(|file| SharedFile { file, readable, writable })
}

fn own(file: impl AsFd, flags: OFlag) -> Result<Arc<OwnedFd>, Errno> {
    // The numbers of inodes are those of the file system's server, which may give several files the same one.
    let numbers_are_unique = !matches!(fstatfs(&file)?.filesystem_type(), FUSE_SUPER_MAGIC | V9FS_MAGIC);
    own_if_unique(file, flags, numbers_are_unique)
}

fn own_if_unique(file: impl AsFd, flags: OFlag, numbers_are_unique: bool) -> Result<Arc<OwnedFd>, Errno> {
    static FILES: Mutex<Option<HashMap<Identity, Weak<OwnedFd>>>> = Mutex::new(None);
    let stat = fstat(&file)?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    if kind != SFlag::S_IFREG && kind != SFlag::S_IFBLK {
        return Err(Errno::ESPIPE);
    }
    let identity = (stat.st_dev, stat.st_ino, flags.bits());
    let mut files = FILES.lock().unwrap_or_else(PoisonError::into_inner);
    let files = files.get_or_insert_default();
    if let Some(known) = files.get(&identity).and_then(Weak::upgrade)
        && (numbers_are_unique || is_same_description(&file, &known))
    {
        return Ok(known);
    }
    files.retain(|_, file| file.strong_count() != 0);
    let own = file.as_fd().try_clone_to_owned().map_err(|e| crate::error::errno_of(&e))?;
    let own = Arc::new(own);
    files.insert(identity, Arc::downgrade(&own));
    Ok(own)
}

/// Whether two descriptors are copies of each other; false as well where the kernel does not say (`CONFIG_KCMP`).
fn is_same_description(one: impl AsFd, other: impl AsFd) -> bool {
    const KCMP_FILE: libc::c_long = 0;
    let (pid, fd) = (libc::c_long::from(std::process::id() as i32), |fd: &dyn AsFd| fd.as_fd().as_raw_fd());
    let (one, other) = (libc::c_long::from(fd(&one)), libc::c_long::from(fd(&other)));
    // SAFETY: compares two descriptors, which are open as long as they are borrowed, and touches no memory.
    (unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one, other) }) == 0
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

    #[test]
    fn files_with_one_number_are_known_by_their_descriptors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        // For all that is known of them on FUSE, these may be different files.
        let [one, other] = [(), ()].map(|()| file.reopen().unwrap());
        let own = |file: &File, unique| own_if_unique(file, OFlag::O_RDWR, unique).unwrap();
        let first = own(&one, false);
        assert!(Arc::ptr_eq(&first, &own(&one.try_clone().unwrap(), false)), "a copy of the same descriptor");
        assert!(Arc::ptr_eq(&first, &own(&other, true)));
        assert!(!Arc::ptr_eq(&first, &own(&other, false)));
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
