// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who uses a block device, and stopping one that is not used.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::claim;
use crate::control::Control;
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};
use crate::units::DeviceId;

/// How long udev may take to look at a disk after its last use.
const UDEV_PATIENCE: Duration = Duration::from_secs(5);
const UDEV_RETRY: Duration = Duration::from_millis(20);
/// How long an open of a disk may take, which may wait for its server.
const CLAIM_PATIENCE: Duration = Duration::from_secs(5);
/// How often processes are looked at that go away while their mounts are read.
const MOST_PASSES: u32 = 5;

/// Outcome of [`stop_unused`].
#[derive(Debug)]
pub(super) enum Stop {
    /// The device is stopped.
    Done,
    /// It is not in use, or has no disk. Before Linux 7.0 the driver does not report this, and a use that begins after the
    /// look goes unnoticed.
    NotUsed,
    /// Processes have it open: these.
    Open(String),
    /// It is mounted, swapped to, part of another block device, or opened exclusively: by these.
    Claimed(String),
}

/// Who asks how a disk is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asker {
    /// The disk's server. It must not open the disk to find out: an open may wait for requests, and nothing could end a
    /// server that waits for itself.
    Server,
    /// Another process.
    Other,
}

/// Stops a device that is not in use, in the same moment if the driver can (Linux 7.0).
///
/// # Errors
///
/// Whatever keeps this from finding out: then the device may be in use. It may be stopped, though, if a command was not
/// answered.
pub(super) fn stop_unused(control: &Control, id: DeviceId, asker: Asker) -> Result<Stop> {
    let info = control.info(id)?;
    if info.state == DeviceState::Dead {
        return Ok(Stop::NotUsed);
    }
    let path = control.driver().block_path(id);
    if !info.features.contains(Features::SAFE_STOP_DEV) {
        return Ok(use_of(&path, asker)?.unwrap_or(Stop::NotUsed));
    }
    let deadline = Instant::now() + UDEV_PATIENCE;
    loop {
        match control.try_stop(id) {
            // Stopped meanwhile.
            Err(Error::Control { errno: crate::Errno::ENODEV, .. }) | Ok(()) => return Ok(Stop::Done),
            Err(Error::Control { errno: crate::Errno::EBUSY, .. }) => {}
            Err(error) => return Err(error),
        }
        // A user that cannot be seen is most likely udev.
        match use_of(&path, asker) {
            Ok(Some(used)) => return Ok(used),
            Err(error) if asker == Asker::Other => return Err(error),
            _ if Instant::now() >= deadline => return Ok(Stop::Open("open".into())),
            _ => std::thread::sleep(UDEV_RETRY),
        }
    }
}

/// How a disk is used, if it is.
fn use_of(disk: &Path, asker: Asker) -> Result<Option<Stop>> {
    let failed = |e| Error::file("find the users of", disk, &e);
    let (proc, is_whole) = (Path::new("/proc"), sees_all_processes());
    let seen = seen_use(proc, disk).map_err(failed)?;
    if seen.is_some() || asker == Asker::Server && is_whole {
        return Ok(seen);
    }
    match asker {
        // Users that this process does not see may have mounted it.
        Asker::Server => Err(Error::File {
            operation: "find the users of",
            path: disk.to_owned(),
            errno: crate::Errno::EPERM,
            hint: "this process does not see all processes of the machine".into(),
        }),
        Asker::Other => {
            let claimed = claim::is_claimed(disk, CLAIM_PATIENCE).map_err(failed)?;
            Ok(claimed.then(|| Stop::Claimed("mounted or claimed".into())))
        }
    }
}

/// Whether no use of a disk shows. It is not opened, which may wait for a server that hangs.
pub(super) fn looks_unused(disk: &Path) -> bool {
    matches!(seen_use(Path::new("/proc"), disk), Ok(None))
}

/// How a disk is used, as far as that shows in /proc and /sys.
fn seen_use(proc: &Path, disk: &Path) -> io::Result<Option<Stop>> {
    let nodes = nodes(disk);
    let sys = Path::new("/sys");
    let numbers: Vec<(u64, &PathBuf)> = nodes.iter().filter_map(|node| Some((number_of(sys, node)?, node))).collect();
    let mut claims = mounts(proc, &nodes, &numbers)?;
    claims.extend(swaps(proc, &nodes)?);
    claims.extend(stacked(sys, &nodes));
    let numbers: Vec<u64> = numbers.into_iter().map(|(number, _)| number).collect();
    let (users, openers) = processes(proc, &numbers)?;
    claims.extend(users);
    if !claims.is_empty() {
        claims.extend(openers);
        return Ok(Some(Stop::Claimed(claims.join(", "))));
    }
    Ok((!openers.is_empty()).then(|| Stop::Open(openers.join(", "))))
}

/// Whether this process is root in the first namespace of processes, whose /proc shows the processes, and with them the
/// mounts, of all others.
pub(super) fn sees_all_processes() -> bool {
    /// `PROC_PID_INIT_INO` of `linux/nsfs.h`.
    const FIRST: &str = "pid:[4026531836]";
    let namespace = fs::read_link("/proc/self/ns/pid");
    nix::unistd::geteuid().is_root() && namespace.is_ok_and(|namespace| namespace.as_os_str() == FIRST)
}

/// The disk and its partitions.
fn nodes(disk: &Path) -> Vec<PathBuf> {
    let mut nodes = vec![disk.to_owned()];
    let name = disk.file_name().unwrap_or_default();
    for entry in fs::read_dir(Path::new("/sys/block").join(name)).into_iter().flatten().flatten() {
        if entry.path().join("partition").exists() {
            nodes.push(disk.with_file_name(entry.file_name()));
        }
    }
    nodes
}

/// A block device's number.
fn number_of(sys: &Path, node: &Path) -> Option<u64> {
    let by_node = || Some(fs::metadata(node).ok()?.rdev());
    // Where the node is not, or not yet, or in another directory.
    let text = fs::read_to_string(sys.join("class/block").join(node.file_name()?).join("dev"));
    let by_system = || {
        let text = text.ok()?;
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
    };
    by_node().or_else(by_system)
}

/// Mounts in all namespaces that processes are in.
fn mounts(proc: &Path, nodes: &[PathBuf], numbers: &[(u64, &PathBuf)]) -> io::Result<Vec<String>> {
    let numbers: Vec<_> = numbers.iter().map(|(number, node)| (as_mountinfo(*number), *node)).collect();
    let mut found = Vec::new();
    let mut add = |table: &str| {
        for line in table.lines() {
            // ID, parent's ID, device, root, place, options, optional fields, "-", type, source, options.
            let mut fields = line.split(' ');
            let (Some(device), Some(place)) = (fields.nth(2), fields.nth(1)) else { continue };
            let source = fields.skip_while(|field| *field != "-").nth(2).unwrap_or_default();
            let by_number = numbers.iter().find(|(number, _)| number == device).map(|(_, node)| *node);
            // Some file systems (btrfs) have a number of their own.
            let node = by_number.or_else(|| nodes.iter().find(|node| node.as_os_str() == source));
            found.extend(node.map(|node| format!("{} mounted at {place}", node.display())));
        }
    };
    let own = proc.join("self");
    add(&fs::read_to_string(own.join("mountinfo"))?);
    let mut read: HashSet<_> = view(&own).into_iter().collect();
    for _ in 0..MOST_PASSES {
        let mut missed = Vec::new();
        for process in numbered(proc)? {
            // Dead processes have none.
            let Some(view) = view(&process).filter(|view| view.1.is_none() || !read.contains(view)) else { continue };
            match fs::read_to_string(process.join("mountinfo")) {
                Ok(table) => {
                    add(&table);
                    read.insert(view);
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
                // It has gone meanwhile.
                Err(_) => missed.push(view),
            }
        }
        // Another process may see the same, which comes before it or was made after the look at all.
        let is_known =
            |view: &View| read.contains(view) || view.1.is_none() && read.iter().any(|known| known.0 == view.0);
        if missed.iter().all(is_known) {
            found.sort();
            found.dedup();
            return Ok(found);
        }
    }
    Err(io::Error::other("processes go away before their mounts are known"))
}

/// What decides which mounts a process sees: its namespace, and its root, if that is known.
type View = (PathBuf, Option<(u64, u64, u64)>);

fn view(process: &Path) -> Option<View> {
    let namespace = fs::read_link(process.join("ns/mnt")).ok()?;
    let root = look(&process.join("root")).ok();
    let mount = root.filter(|root| root.stx_mask & libc::STATX_MNT_ID != 0);
    Some((namespace, mount.map(|root| (root.stx_mnt_id, file_system(&root), root.stx_ino))))
}

/// A device's number as `mountinfo` has it.
fn as_mountinfo(device: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

/// The directories of processes.
fn numbered(proc: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(proc)?.collect::<io::Result<Vec<_>>>()?;
    let is_number = |entry: &fs::DirEntry| entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit);
    Ok(entries.into_iter().filter(is_number).map(|entry| entry.path()).collect())
}

fn swaps(proc: &Path, nodes: &[PathBuf]) -> io::Result<Vec<String>> {
    let table = match fs::read_to_string(proc.join("swaps")) {
        // A kernel without swap.
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let areas = table.lines().filter_map(|line| line.split_whitespace().next());
    let ours = areas.filter(|area| nodes.iter().any(|node| node.as_os_str() == *area));
    Ok(ours.map(|area| format!("{area} swapped to")).collect())
}

/// What the kernel has made of a disk: block devices on top, such as those of the device mapper, of RAID and loop devices,
/// file systems of several devices, whose mounts name one of them, and file systems without a mount: one that was
/// unmounted lazily is there as long as a file of it is open.
fn stacked(sys: &Path, nodes: &[PathBuf]) -> Vec<String> {
    let entries = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    let mut found = Vec::new();
    for node in nodes {
        let name = node.file_name().unwrap_or_default();
        for holder in entries(sys.join("class/block").join(name).join("holders")) {
            found.push(format!("{} part of {}", node.display(), holder.file_name().display()));
        }
        for device in entries(sys.join("block")) {
            let file = fs::read(device.path().join("loop/backing_file")).unwrap_or_default();
            if file.trim_ascii_end() == node.as_os_str().as_encoded_bytes() {
                found.push(format!("{} under {}", node.display(), device.file_name().display()));
            }
        }
        for kind in entries(sys.join("fs")) {
            // ext4, xfs, f2fs, erofs, and others.
            if kind.path().join(name).is_dir() {
                found.push(format!("{} used by {}", node.display(), kind.file_name().display()));
            }
        }
        for system in entries(sys.join("fs/btrfs")) {
            if system.path().join("devices").join(name).exists() {
                found.push(format!("{} part of the btrfs {}", node.display(), system.file_name().display()));
            }
        }
    }
    found
}

/// Processes that use a file system on a disk, and those that have the disk open. udev is not among the latter: it looks
/// at each disk that changes, and does not mind if that goes.
fn processes(proc: &Path, numbers: &[u64]) -> io::Result<(Vec<String>, Vec<String>)> {
    let (mut users, mut openers) = (Vec::new(), Vec::new());
    for process in numbered(proc)? {
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

/// Whether any process has a file open that is looked for.
pub(super) fn has_opener(wanted: impl Fn(&OpenFile) -> bool) -> io::Result<bool> {
    Ok(numbered(Path::new("/proc"))?.iter().any(|process| opens(process, &wanted)))
}

/// Whether a process has a file open that is looked for.
pub(super) fn has_open(pid: i32, wanted: impl Fn(&OpenFile) -> bool) -> bool {
    opens(&Path::new("/proc").join(pid.to_string()), wanted)
}

fn opens(process: &Path, wanted: impl Fn(&OpenFile) -> bool) -> bool {
    let files = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    files.into_iter().any(|fd| OpenFile::at(&fd.path()).is_ok_and(|file| wanted(&file)))
}

/// What is known of an open file.
#[derive(Debug)]
pub(super) struct OpenFile {
    /// Type and permissions.
    mode: u32,
    /// The device that it is a node of.
    number: u64,
    /// The device that its file system is on.
    file_system: u64,
}

impl OpenFile {
    fn at(path: &Path) -> io::Result<Self> {
        let found = look(path)?;
        Ok(OpenFile {
            mode: u32::from(found.stx_mode) & libc::S_IFMT,
            number: nix::sys::stat::makedev(found.stx_rdev_major.into(), found.stx_rdev_minor.into()),
            file_system: file_system(&found),
        })
    }

    /// The number of the block device, if it is one.
    pub(super) fn block_device(&self) -> Option<u64> {
        (self.mode == libc::S_IFBLK).then_some(self.number)
    }

    /// The number of the char device, if it is one.
    pub(super) fn char_device(&self) -> Option<u64> {
        (self.mode == libc::S_IFCHR).then_some(self.number)
    }
}

fn file_system(found: &libc::statx) -> u64 {
    nix::sys::stat::makedev(found.stx_dev_major.into(), found.stx_dev_minor.into())
}

/// Looks at a file without asking its file system's server, which may never answer: a file server, or a disk's own.
/// (9p without a cache asks all the same; that wait ends with this process.)
fn look(path: &Path) -> io::Result<libc::statx> {
    let path = std::ffi::CString::new(path.as_os_str().as_bytes())?;
    let mut found = std::mem::MaybeUninit::<libc::statx>::zeroed();
    let wanted = libc::STATX_TYPE | libc::STATX_INO | libc::STATX_MNT_ID;
    // SAFETY: the path is a C string, and the kernel fills the structure.
    let result =
        unsafe { libc::statx(libc::AT_FDCWD, path.as_ptr(), libc::AT_STATX_DONT_SYNC, wanted, found.as_mut_ptr()) };
    // SAFETY: plain numbers, for which zeros are a value too.
    if result == 0 { Ok(unsafe { found.assume_init() }) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
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

    /// Files may be on servers that do not answer.
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

    /// After `umount -l` nothing else shows.
    #[test]
    fn a_file_system_with_an_open_file_is_in_use() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (users, _) = processes(Path::new("/proc"), &[file.as_file().metadata().unwrap().dev()]).unwrap();
        let own = format!("file system in use by process {}, ", std::process::id());
        assert!(users.iter().any(|user| user.starts_with(&own)), "{users:?}");
        let (users, openers) = processes(Path::new("/proc"), &[nix::sys::stat::makedev(259, 0xfffff)]).unwrap();
        assert_eq!((users, openers), (vec![], vec![]));
    }

    #[test]
    fn mounts_count_that_only_one_process_shows() {
        let disk = Path::new("/nonexistent/ublkb7");
        let mounted = "40 22 0:9 / /srv rw master:3 - btrfs /nonexistent/ublkb7 rw\n";
        // Each process has its root, and its mounts unless it goes away.
        let uses = |processes: &[(&str, &str, Option<&str>)]| {
            let proc = tempfile::tempdir().unwrap();
            for (name, root, mounts) in [("self", "a", Some(""))].iter().chain(processes) {
                let process = proc.path().join(name);
                fs::create_dir_all(process.join("ns")).unwrap();
                fs::create_dir_all(proc.path().join(root)).unwrap();
                let namespace = if *name == "self" { "mnt:[1]" } else { "mnt:[2]" };
                std::os::unix::fs::symlink(namespace, process.join("ns/mnt")).unwrap();
                std::os::unix::fs::symlink(proc.path().join(root), process.join("root")).unwrap();
                mounts.iter().for_each(|mounts| fs::write(process.join("mountinfo"), mounts).unwrap());
            }
            seen_use(proc.path(), disk)
        };
        for (one, other) in [("17", "18"), ("18", "17")] {
            let seen = uses(&[(one, "b", Some("")), (other, "a", Some(mounted))]);
            assert!(matches!(seen, Ok(Some(Stop::Claimed(_)))), "the other one has another root: {seen:?}");
            let seen = uses(&[(one, "a", None), (other, "a", Some(""))]);
            assert!(matches!(seen, Ok(None)), "the namespace is known: {seen:?}");
            let seen = uses(&[(one, "a", None), (other, "b", Some(""))]);
            assert!(seen.is_err(), "it does not show: {seen:?}");
        }
    }

    #[test]
    fn mounts_of_all_namespaces_count() {
        let proc = tempfile::tempdir().unwrap();
        let disk = Path::new("/nonexistent/ublkb7");
        let process = |name: &str, namespace: &str, mounts: &str| {
            fs::create_dir_all(proc.path().join(name).join("ns")).unwrap();
            std::os::unix::fs::symlink(namespace, proc.path().join(name).join("ns/mnt")).unwrap();
            fs::write(proc.path().join(name).join("mountinfo"), mounts).unwrap();
        };
        let own = "22 1 8:1 / / rw,noatime shared:1 - ext4 /dev/sda1 rw\n";
        process("self", "mnt:[1]", own);
        process("17", "mnt:[1]", own);
        assert!(seen_use(proc.path(), disk).unwrap().is_none());
        process("18", "mnt:[2]", &format!("{own}40 22 0:9 / /srv rw master:3 - btrfs /nonexistent/ublkb7 rw\n"));
        let Some(Stop::Claimed(who)) = seen_use(proc.path(), disk).unwrap() else { panic!() };
        assert_eq!(who, "/nonexistent/ublkb7 mounted at /srv");
    }

    #[test]
    fn loop_devices_and_members_of_a_btrfs_count() {
        let sys = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into(), "/nonexistent/ublkb7p1".into()];
        assert_eq!(stacked(sys.path(), &nodes), [""; 0]);
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("block/loop0/loop/backing_file", "/nonexistent/ublkb77\n");
        assert_eq!(stacked(sys.path(), &nodes), [""; 0]);
        write("block/loop1/loop/backing_file", "/nonexistent/ublkb7\n");
        write("fs/btrfs/0c2d/devices/ublkb7p1", "");
        assert_eq!(
            stacked(sys.path(), &nodes),
            ["/nonexistent/ublkb7 under loop1", "/nonexistent/ublkb7p1 part of the btrfs 0c2d"]
        );
    }

    #[test]
    fn mounts_are_known_by_the_number_of_their_device() {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir_all(proc.path().join("self/ns")).unwrap();
        // A file system that is named by a path of another root.
        let number = number("/dev/null");
        let table = format!("40 22 {} / /srv rw - ext4 /dev/root rw\n", as_mountinfo(number));
        fs::write(proc.path().join("self/mountinfo"), table).unwrap();
        let nodes = ["/dev/null".into()];
        assert_eq!(mounts(proc.path(), &nodes, &[(number, &nodes[0])]).unwrap(), ["/dev/null mounted at /srv"]);
    }

    #[test]
    fn a_use_that_cannot_be_seen_is_no_absence_of_use() {
        let proc = tempfile::tempdir().unwrap();
        let disk = Path::new("/nonexistent/ublkb7");
        seen_use(proc.path(), disk).unwrap_err();
        seen_use(&proc.path().join("missing"), disk).unwrap_err();
    }

    #[test]
    fn a_file_system_without_a_mount_counts() {
        let sys = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into(), "/nonexistent/ublkb7p1".into()];
        for path in ["fs/ext4/features", "fs/ext4/ublkb77", "fs/xfs/ublkb7p1", "class/block/ublkb7"] {
            fs::create_dir_all(sys.path().join(path)).unwrap();
        }
        assert_eq!(stacked(sys.path(), &nodes), ["/nonexistent/ublkb7p1 used by xfs"]);
        fs::write(sys.path().join("class/block/ublkb7/dev"), "259:7\n").unwrap();
        assert_eq!(number_of(sys.path(), &nodes[0]), Some(nix::sys::stat::makedev(259, 7)));
    }
}
