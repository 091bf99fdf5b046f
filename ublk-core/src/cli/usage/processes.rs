// SPDX-License-Identifier: MIT OR Apache-2.0

//! Open files of processes, as /proc shows them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Whether /proc shows all processes of the machine, and with them all mounts: this process is root in the first pid
/// namespace.
pub(in crate::cli) fn sees_all_processes() -> bool {
    /// `PROC_PID_INIT_INO` of `linux/nsfs.h`.
    const FIRST: &str = "pid:[4026531836]";
    let namespace = fs::read_link("/proc/self/ns/pid");
    nix::unistd::geteuid().is_root() && namespace.is_ok_and(|namespace| namespace.as_os_str() == FIRST)
}

/// Lists the directories of processes in /proc.
pub(super) fn directories(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(proc)?.collect::<io::Result<Vec<_>>>()?;
    let is_number = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
    Ok(entries.into_iter().filter(is_number).map(|entry| entry.path()).collect())
}

/// Finds the processes that use a file system on a disk, and those that have the disk open, with the numbers of the disk and
/// its partitions. udev is not among the latter: it inspects each disk that changes, and does not mind if that goes away.
pub(super) fn users_and_openers(proc: &Path, numbers: &[u64]) -> io::Result<(Vec<String>, Vec<String>)> {
    let (mut users, mut openers) = (Vec::new(), Vec::new());
    for process in directories(proc)? {
        let command = || fs::read_to_string(process.join("comm")).unwrap_or_default().trim_end().to_owned();
        let name = process.file_name().unwrap_or_default().display().to_string();
        let is_used = |file: &OpenFile| numbers.contains(&file.file_system);
        if ["cwd", "root", "exe"].iter().any(|link| OpenFile::at(&process.join(link)).is_ok_and(|file| is_used(&file)))
            || opens(&process, is_used)
        {
            users.push(format!("file system in use by process {name}, {}", command()));
        }
        if opens(&process, |file| file.block_device().is_some_and(|number| numbers.contains(&number))) {
            let command = command();
            if !command.contains("udev") {
                openers.push(format!("open in process {name}, {command}"));
            }
        }
    }
    Ok((users, openers))
}

/// Whether any process has a file open for which `matches` returns true.
pub(in crate::cli) fn has_opener(matches: impl Fn(&OpenFile) -> bool) -> io::Result<bool> {
    Ok(directories(Path::new("/proc"))?.iter().any(|process| opens(process, &matches)))
}

/// Whether a process has a file open for which `matches` returns true.
pub(in crate::cli) fn has_open(pid: i32, matches: impl Fn(&OpenFile) -> bool) -> bool {
    opens(&Path::new("/proc").join(pid.to_string()), matches)
}

fn opens(process: &Path, matches: impl Fn(&OpenFile) -> bool) -> bool {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.into_iter().any(|fd| OpenFile::at(&fd.path()).is_ok_and(|file| matches(&file)))
}

/// Properties of an open file.
#[derive(Debug)]
pub(in crate::cli) struct OpenFile {
    /// File type.
    mode: u32,
    /// Number of the device, if the file is a device node.
    number: u64,
    /// Number of the device that holds the file system.
    file_system: u64,
}

impl OpenFile {
    fn at(path: &Path) -> io::Result<Self> {
        let found = statx(path)?;
        Ok(OpenFile {
            mode: u32::from(found.stx_mode) & libc::S_IFMT,
            number: nix::sys::stat::makedev(found.stx_rdev_major.into(), found.stx_rdev_minor.into()),
            file_system: file_system(&found),
        })
    }

    /// The number of the block device, if it is one.
    pub(in crate::cli) fn block_device(&self) -> Option<u64> {
        (self.mode == libc::S_IFBLK).then_some(self.number)
    }

    /// The number of the char device, if it is one.
    pub(in crate::cli) fn char_device(&self) -> Option<u64> {
        (self.mode == libc::S_IFCHR).then_some(self.number)
    }
}

/// Number of the device that holds a file's file system.
pub(super) fn file_system(found: &libc::statx) -> u64 {
    nix::sys::stat::makedev(found.stx_dev_major.into(), found.stx_dev_minor.into())
}

/// Returns a file's attributes without asking its file system's server, a file server or the disk's own, which may never
/// answer. (9p without a cache asks all the same; that wait ends with this process.)
pub(super) fn statx(path: &Path) -> io::Result<libc::statx> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let wanted = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
    // SAFETY: the path is a C string, and the kernel fills the structure.
    let result =
        unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, wanted, found.as_mut_ptr()) };
    // SAFETY: plain numbers, for which zeros are valid.
    if result == 0 { Ok(unsafe { found.assume_init() }) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn number(path: &str) -> u64 {
        fs::metadata(path).unwrap().rdev()
    }

    #[test]
    fn open_files_are_known_by_their_numbers() {
        let _node = fs::File::open("/dev/null").unwrap();
        let null = Some(number("/dev/null"));
        assert!(has_open(std::process::id() as i32, |file| file.char_device() == null));
        assert!(has_opener(|file| file.char_device() == null).unwrap());
        assert!(!has_opener(|file| file.block_device() == null).unwrap());
    }

    /// Files may be on file servers that do not answer.
    #[test]
    fn no_server_of_an_open_file_is_asked() {
        use crate::seccomp::{allow, equals, filtered, has, load_argument, load_number, refuse};
        let [asked, not_asked] = [libc::AT_EMPTY_PATH, libc::AT_STATX_DONT_SYNC].map(|flag| flag as u32);
        let filter = vec![
            load_number(),
            equals(libc::SYS_statx as u32, 0, 4),
            load_argument(2),
            has(not_asked, 0, 1),
            allow(),
            refuse(nix::errno::Errno::EPERM),
            equals(libc::SYS_newfstatat as u32, 0, 3),
            load_argument(3),
            has(asked, 1, 0),
            refuse(nix::errno::Errno::EPERM),
            allow(),
        ];
        let null = Some(number("/dev/null"));
        let _node = fs::File::open("/dev/null").unwrap();
        let found = filtered(filter, move || has_open(std::process::id() as i32, |file| file.char_device() == null));
        assert_ne!(found, Some(false));
    }

    /// After `umount -l` nothing else shows the use.
    #[test]
    fn a_file_system_with_an_open_file_is_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (users, _) = users_and_openers(Path::new("/proc"), &[file.as_file().metadata().unwrap().dev()]).unwrap();
        let own = format!("file system in use by process {}, ", std::process::id());
        assert!(users.iter().any(|user| user.starts_with(&own)), "{users:?}");
        let (users, openers) = users_and_openers(Path::new("/proc"), &[nix::sys::stat::makedev(259, 0xfffff)]).unwrap();
        assert_eq!((users, openers), (vec![], vec![]));
    }
}
