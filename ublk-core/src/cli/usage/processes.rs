// SPDX-License-Identifier: MIT OR Apache-2.0

//! Open files of processes, as /proc shows them.

use crate::process::read_text;
use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Names of udev's processes: systemd's and eudev's.
const UDEV: [&str; 3] = ["systemd-udevd", "(udev-worker)", "udevd"];
/// How often to look for new processes. Each pass takes only as long as those that were created during the last one.
const MAX_PASSES: u32 = 20;

/// Returns whether /proc shows all processes of the machine, with their files and mounts: this process is root in the first pid
/// namespace, and may look at the processes of other users.
pub(in crate::cli) fn sees_all_processes() -> bool {
    /// `PROC_PID_INIT_INO` of `linux/nsfs.h`.
    const FIRST: &str = "pid:[4026531836]";
    let namespace = fs::read_link("/proc/self/ns/pid");
    nix::unistd::geteuid().is_root()
        && namespace.is_ok_and(|namespace| namespace.as_os_str() == FIRST)
        && read_text("/proc/thread-self/status").is_ok_and(|status| can_look_at_others(&status))
}

/// Returns whether a process's status has `CAP_SYS_PTRACE`. A service with a bounding set, or a container, has not.
fn can_look_at_others(status: &str) -> bool {
    const CAP_SYS_PTRACE: u32 = 19;
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_some_and(|mask| mask & 1 << CAP_SYS_PTRACE != 0)
}

/// Lists the directories of processes in /proc.
pub(super) fn directories(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(proc)?.collect::<io::Result<Vec<_>>>()?;
    let is_number = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
    Ok(entries.into_iter().filter(is_number).map(|entry| entry.path()).collect())
}

/// Lists the directories of a process's threads. The files and mounts of a process whose first thread has ended are those of
/// the others.
pub(super) fn threads(process: &Path) -> Vec<PathBuf> {
    let threads = directories(&process.join("task")).unwrap_or_default();
    if threads.is_empty() { vec![process.to_owned()] } else { threads }
}

/// Processes that use a disk.
#[derive(Debug, Default)]
pub(super) struct Processes {
    /// Those that use a file system on it.
    pub(super) users: Vec<String>,
    /// Those that have it open. udev is not among them: it inspects each disk that changes, and does not mind if that goes
    /// away.
    pub(super) openers: Vec<String>,
    /// What could not be looked at.
    pub(super) unknown: Option<String>,
}

/// Finds the processes that use a disk, with the numbers of the disk and its partitions.
pub(super) fn find(proc: &Path, numbers: &[u64]) -> io::Result<Processes> {
    let mut found = Processes::default();
    let is_complete = each_process(proc, |process| {
        let command = || read_text(process.join("comm")).unwrap_or_default().trim_end().to_owned();
        let name = process.file_name().unwrap_or_default().display().to_string();
        let (mut is_user, mut is_opener) = (false, false);
        let looked = each_file(process, |file| {
            is_user |= numbers.contains(&file.file_system);
            is_opener |= file.block_device().is_some_and(|number| numbers.contains(&number));
            is_user && is_opener
        });
        if is_user {
            found.users.push(format!("file system in use by process {name}, {}", command()));
        }
        if is_opener {
            let command = command();
            if !UDEV.contains(&&*command) {
                found.openers.push(format!("open in process {name}, {command}"));
            }
        }
        if let Err(error) = looked {
            found.unknown.get_or_insert_with(|| format!("files of process {name}: {error}"));
        }
        false
    })?;
    if !is_complete {
        found.unknown.get_or_insert_with(|| "too many new processes".into());
    }
    Ok(found)
}

/// Returns whether any process has a file open for which `matches` returns true, as far as this process may look.
pub(in crate::cli) fn has_opener(matches: impl Fn(&OpenFile) -> bool) -> io::Result<bool> {
    let mut found = false;
    each_process(Path::new("/proc"), |process| {
        let _ = each_file(process, |file| {
            found |= matches(file);
            found
        });
        found
    })?;
    Ok(found)
}

/// Returns whether a process has a file open for which `matches` returns true, as far as this process may look.
pub(in crate::cli) fn has_open(pid: i32, matches: impl Fn(&OpenFile) -> bool) -> bool {
    let mut found = false;
    let _ = each_file(&Path::new("/proc").join(pid.to_string()), |file| {
        found |= matches(file);
        found
    });
    found
}

/// Calls `look` with each process, also with those that are created meanwhile, until it returns true. Returns whether there
/// are no others.
fn each_process(proc: &Path, mut look: impl FnMut(&Path) -> bool) -> io::Result<bool> {
    let mut known = HashSet::new();
    for _ in 0..MAX_PASSES {
        let new: Vec<_> = directories(proc)?.into_iter().filter(|process| !known.contains(process)).collect();
        if new.is_empty() || new.iter().any(|process| look(process)) {
            return Ok(true);
        }
        known.extend(new);
    }
    Ok(false)
}

/// Calls `look` with each open file of a process, and its directories and program, until it returns true.
///
/// # Errors
///
/// If this process may not look at all of them. Files that are closed meanwhile do not matter.
fn each_file(process: &Path, mut look: impl FnMut(&OpenFile) -> bool) -> io::Result<()> {
    let mut tables = Vec::new();
    let mut looked = Ok(());
    for thread in threads(process) {
        let mut visit = |path: &Path| match OpenFile::at(path) {
            Ok(file) => look(&file),
            Err(error) => {
                if looked.is_ok() && is_refused(&error, &thread) {
                    looked = Err(error);
                }
                false
            }
        };
        if ["cwd", "root", "exe"].iter().any(|link| visit(&thread.join(link))) {
            return Ok(());
        }
        let number = thread.file_name().and_then(|name| name.to_str()?.parse().ok());
        if number.is_some_and(|thread| tables.iter().any(|other| have_same_files(thread, *other))) {
            continue;
        }
        match fs::read_dir(thread.join("fd")) {
            Ok(files) => {
                if files.flatten().any(|fd| visit(&fd.path())) {
                    return Ok(());
                }
            }
            Err(error) if looked.is_ok() && is_refused(&error, &thread) => looked = Err(error),
            Err(_) => {}
        }
        tables.extend(number);
    }
    looked
}

/// Returns whether an error of a thread's file in /proc means that this process may not look at it. That of a thread that has
/// just ended is the same.
pub(super) fn is_refused(error: &io::Error, thread: &Path) -> bool {
    error.kind() == io::ErrorKind::PermissionDenied && thread.exists()
}

/// Returns whether two threads have the same table of open files. False as well if that is unknown.
fn have_same_files(one: i32, other: i32) -> bool {
    const KCMP_FILES: libc::c_long = 2;
    let [one, other] = [one, other].map(libc::c_long::from);
    // SAFETY: a system call without pointers.
    (unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) }) == 0
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
    /// The properties of the file that a path leads to.
    pub(super) fn at(path: &Path) -> io::Result<Self> {
        let found = statx(path).or_else(|error| match error.kind() {
            // A user's file system (FUSE) shows root its number only.
            io::ErrorKind::PermissionDenied => statx_of(path, 0),
            _ => Err(error),
        })?;
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
    statx_of(path, libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID)
}

fn statx_of(path: &Path, wanted: libc::c_uint) -> io::Result<libc::statx> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
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
            refuse(crate::Errno::EPERM),
            equals(libc::SYS_newfstatat as u32, 0, 3),
            load_argument(3),
            has(asked, 1, 0),
            refuse(crate::Errno::EPERM),
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
        let found = find(Path::new("/proc"), &[file.as_file().metadata().unwrap().dev()]).unwrap();
        let own = format!("file system in use by process {}, ", std::process::id());
        assert!(found.users.iter().any(|user| user.starts_with(&own)), "{found:?}");
        let found = find(Path::new("/proc"), &[nix::sys::stat::makedev(259, 0xfffff)]).unwrap();
        assert_eq!((found.users, found.openers), (vec![], vec![]));
    }

    /// Its main function has called `pthread_exit`.
    #[test]
    fn a_process_without_its_first_thread_has_files() {
        let wanted = Some(number("/dev/full"));
        let code = "import ctypes, os, sys, threading, time\n\
                    file = os.open('/dev/full', os.O_RDONLY)\n\
                    first = threading.main_thread().native_id\n\
                    def wait():\n\
                    \x20   while ') Z' not in open(f'/proc/self/task/{first}/stat').read(): time.sleep(.01)\n\
                    \x20   print(flush=True)\n\
                    \x20   time.sleep(600)\n\
                    threading.Thread(target=wait).start()\n\
                    ctypes.CDLL(None).syscall(60 if os.uname().machine == 'x86_64' else 93, 0)\n";
        let mut command = std::process::Command::new("python3");
        command.args(["-c", code]).stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let found = has_open(child.id() as i32, |file| file.char_device() == wanted);
        let any = has_opener(|file| file.char_device() == wanted);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found && any.unwrap());
    }

    #[test]
    fn files_that_this_process_may_not_look_at_are_unknown() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let privileged = "CapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n";
        assert!(can_look_at_others(privileged));
        assert!(!can_look_at_others(&privileged.replace("ffffffffff", "fffff7ffff")));
        assert!(!can_look_at_others(""));
        let own = fs::read_link("/proc/self/ns/pid").unwrap();
        // A thread that may not look at this process, which has more rights.
        let looked = std::thread::spawn(|| {
            let (mut header, mut sets) = ([0x2008_0522u32, 0], [0u32; 6]);
            // SAFETY: the structures of version 3, of this thread.
            let result = unsafe { libc::syscall(libc::SYS_capset, header.as_mut_ptr(), sets.as_mut_ptr()) };
            assert_eq!(result, 0);
            (find(Path::new("/proc"), &[nix::sys::stat::makedev(259, 0xfffff)]), sees_all_processes())
        });
        let (found, sees_all) = looked.join().unwrap();
        assert!(found.unwrap().unknown.is_some_and(|what| what.starts_with("files of process ")), "{own:?}");
        assert!(!sees_all);
    }

    #[test]
    fn only_udevs_own_processes_do_not_count() {
        let disk = fs::metadata("/dev/full").unwrap().rdev();
        let openers = |name: &str| {
            let proc = tempfile::tempdir().unwrap();
            let process = proc.path().join("17");
            fs::create_dir_all(process.join("fd")).unwrap();
            fs::write(process.join("comm"), format!("{name}\n")).unwrap();
            // A node of a block device cannot be made everywhere.
            let is_node = nix::sys::stat::mknod(
                &process.join("fd/3"),
                nix::sys::stat::SFlag::S_IFBLK,
                nix::sys::stat::Mode::S_IRUSR,
                disk,
            );
            is_node.map(|()| find(proc.path(), &[disk]).unwrap().openers.len())
        };
        for (name, expected) in
            [("(udev-worker)", 0), ("systemd-udevd", 0), ("udevd", 0), ("udevadm", 1), ("myudev", 1)]
        {
            let Ok(found) = openers(name) else { return };
            assert_eq!(found, expected, "{name}");
        }
    }

    #[test]
    fn processes_that_are_created_meanwhile_are_looked_at() {
        let proc = tempfile::tempdir().unwrap();
        let create = |number: u32| fs::create_dir(proc.path().join(number.to_string())).unwrap();
        create(1);
        let mut seen = 0;
        let is_complete = each_process(proc.path(), |_| {
            seen += 1;
            if seen < 5 {
                create(seen + 1);
            }
            false
        });
        assert_eq!((is_complete.unwrap(), seen), (true, 5));
        let is_complete = each_process(proc.path(), |_| {
            seen += 1;
            create(seen + 100);
            false
        });
        assert!(!is_complete.unwrap());
    }
}
