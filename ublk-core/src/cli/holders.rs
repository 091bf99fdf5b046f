// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who uses a block device, and stopping one that is not used.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};
use crate::units::DeviceId;

/// How long udev may take to look at a disk after its last use.
const UDEV_PATIENCE: Duration = Duration::from_secs(5);
const UDEV_RETRY: Duration = Duration::from_millis(20);

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
        Asker::Other => Ok(is_claimed(disk).then(|| Stop::Claimed("mounted or claimed".into()))),
    }
}

/// Whether no use of a disk shows. It is not opened, which may wait for a server that hangs.
pub(super) fn looks_unused(disk: &Path) -> bool {
    matches!(seen_use(Path::new("/proc"), disk), Ok(None))
}

/// How a disk is used, as far as that shows in /proc and /sys.
fn seen_use(proc: &Path, disk: &Path) -> io::Result<Option<Stop>> {
    let nodes = nodes(disk);
    let mut claims = mounts(proc, &nodes)?;
    claims.extend(swaps(proc, &nodes)?);
    claims.extend(stacked(Path::new("/sys"), &nodes));
    let processes = processes(proc, &nodes)?;
    if !claims.is_empty() {
        claims.extend(processes);
        return Ok(Some(Stop::Claimed(claims.join(", "))));
    }
    Ok((!processes.is_empty()).then(|| Stop::Open(processes.join(", "))))
}

/// Whether this process is root in the first namespace of processes, whose /proc shows the processes, and with them the
/// mounts, of all others.
pub(super) fn sees_all_processes() -> bool {
    /// `PROC_PID_INIT_INO` of `linux/nsfs.h`.
    const FIRST: &str = "pid:[4026531836]";
    let namespace = fs::read_link("/proc/self/ns/pid");
    nix::unistd::geteuid().is_root() && namespace.is_ok_and(|namespace| namespace.as_os_str() == FIRST)
}

/// Whether somebody has the disk for himself: a mount, or another exclusive user.
fn is_claimed(disk: &Path) -> bool {
    let opened = fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(disk);
    opened.is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
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

/// Mounts in all namespaces that processes are in.
fn mounts(proc: &Path, nodes: &[PathBuf]) -> io::Result<Vec<String>> {
    let numbers: Vec<(String, &PathBuf)> =
        nodes.iter().filter_map(|node| Some((number_of(fs::metadata(node).ok()?.rdev()), node))).collect();
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
    let mut namespaces: HashSet<_> = fs::read_link(own.join("ns/mnt")).into_iter().collect();
    for process in numbered(proc)? {
        // Those that go away meanwhile, and dead ones, have none.
        if fs::read_link(process.join("ns/mnt")).is_ok_and(|namespace| namespaces.insert(namespace)) {
            add(&fs::read_to_string(process.join("mountinfo")).unwrap_or_default());
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// A device's number as `mountinfo` has it.
fn number_of(device: u64) -> String {
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
/// and file systems of several devices, whose mounts name one of them.
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
        for system in entries(sys.join("fs/btrfs")) {
            if system.path().join("devices").join(name).exists() {
                found.push(format!("{} part of the btrfs {}", node.display(), system.file_name().display()));
            }
        }
    }
    found
}

/// Processes that have a disk open. udev is not among them: it looks at each disk that changes, and does not mind if that
/// goes.
fn processes(proc: &Path, nodes: &[PathBuf]) -> io::Result<Vec<String>> {
    let numbers: Vec<u64> = nodes.iter().filter_map(|node| fs::metadata(node).ok().map(|m| m.rdev())).collect();
    let mut found = Vec::new();
    for process in numbered(proc)? {
        let Some(pid) = process.file_name().and_then(|name| name.to_str()?.parse().ok()) else { continue };
        if has_open(pid, |m| m.file_type().is_block_device() && numbers.contains(&m.rdev())) {
            let command = fs::read_to_string(process.join("comm")).unwrap_or_default();
            if command.contains("udev") {
                continue;
            }
            found.push(format!("open in process {pid}, {}", command.trim_end()));
        }
    }
    Ok(found)
}

/// Whether any process has a node of a device open that is looked for.
pub(super) fn has_opener(wanted: impl Fn(&fs::Metadata) -> bool) -> io::Result<bool> {
    let processes = numbered(Path::new("/proc"))?;
    let pids = processes.iter().filter_map(|process| process.file_name()?.to_str()?.parse().ok());
    Ok(pids.into_iter().any(|pid| has_open(pid, &wanted)))
}

/// Whether a process has a node of a device open that is looked for. Files that are no nodes are not looked at: to ask
/// their file systems may take for ever, if those are on a server, or a disk, that does not answer.
pub(super) fn has_open(pid: i32, wanted: impl Fn(&fs::Metadata) -> bool) -> bool {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.map(|fd| fd.path()).any(|fd| {
        fs::read_link(&fd).is_ok_and(|target| is_node(&target)) && fs::metadata(fd).is_ok_and(|found| wanted(&found))
    })
}

/// Whether an open file looks like a node by its path, which may be one of another root or mount namespace.
fn is_node(path: &Path) -> bool {
    let in_dev = path.parent().is_some_and(|parent| parent.components().any(|part| part.as_os_str() == "dev"));
    in_dev || path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"ublk"))
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn only_nodes_are_looked_at() {
        let _file = tempfile::NamedTempFile::new().unwrap();
        let _node = fs::File::open("/dev/null").unwrap();
        let own = std::process::id() as i32;
        let (nodes, others) = (Cell::new(0), Cell::new(0));
        let found = has_open(own, |m| {
            let count = if m.file_type().is_char_device() { &nodes } else { &others };
            count.set(count.get() + 1);
            false
        });
        assert!(!found && nodes.get() > 0);
        assert_eq!(others.get(), 0, "a file's file system may not answer");
        let null = fs::metadata("/dev/null").unwrap().rdev();
        assert!(has_open(own, |m| m.rdev() == null));
        assert!(has_opener(|m| m.rdev() == null).unwrap());
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
        let number = number_of(fs::metadata("/dev/null").unwrap().rdev());
        let table = format!("40 22 {number} / /srv rw - ext4 /dev/root rw\n");
        fs::write(proc.path().join("self/mountinfo"), table).unwrap();
        assert_eq!(mounts(proc.path(), &["/dev/null".into()]).unwrap(), ["/dev/null mounted at /srv"]);
    }

    #[test]
    fn a_use_that_cannot_be_seen_is_no_absence_of_use() {
        let proc = tempfile::tempdir().unwrap();
        let disk = Path::new("/nonexistent/ublkb7");
        seen_use(proc.path(), disk).unwrap_err();
        seen_use(&proc.path().join("missing"), disk).unwrap_err();
    }

    #[test]
    fn nodes_are_known_by_their_paths() {
        for path in ["/dev/ublkb0", "/dev/ublkb0 (deleted)", "/dev/xvda", "/srv/root/dev/disk", "/ublkc3"] {
            assert!(is_node(path.as_ref()), "{path}");
        }
        for path in ["/mnt/nfs/disk.img", "/mnt/dev.img", "socket:[17]", "anon_inode:[io_uring]", "/"] {
            assert!(!is_node(path.as_ref()), "{path}");
        }
    }
}
