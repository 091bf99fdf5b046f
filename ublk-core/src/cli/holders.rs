// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who uses a block device, and stopping one that is not used.

use std::fs;
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
    /// No use of it was seen, or it has no disk. Before Linux 7.0 the driver cannot tell; a moment's use goes unnoticed.
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
    /// server that waits for itself. Exclusive users that nothing else shows go unnoticed before Linux 7.0.
    Server,
    /// Another process.
    Other,
}

/// Stops a device that is not in use, in the same moment if the driver can (Linux 7.0).
pub(super) fn stop_unused(control: &Control, id: DeviceId, asker: Asker) -> Result<Stop> {
    let info = control.info(id)?;
    if info.state == DeviceState::Dead {
        return Ok(Stop::NotUsed);
    }
    let path = control.driver().block_path(id);
    if !info.features.contains(Features::SAFE_STOP_DEV) {
        return Ok(use_of(&path, asker).unwrap_or(Stop::NotUsed));
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
            Some(used) => return Ok(used),
            None if Instant::now() >= deadline => return Ok(Stop::Open("open".into())),
            None => std::thread::sleep(UDEV_RETRY),
        }
    }
}

/// How a disk is used, as far as that can be seen.
fn use_of(disk: &Path, asker: Asker) -> Option<Stop> {
    let nodes = nodes(disk);
    let mut claims = mounts(&nodes);
    claims.extend(swaps(&nodes));
    claims.extend(stacked(&nodes));
    let processes = processes(&nodes);
    // Mounts of other namespaces are not among those.
    if !claims.is_empty() || asker == Asker::Other && is_claimed(disk) {
        claims.extend(processes);
        let who = claims.join(", ");
        return Some(Stop::Claimed(if who.is_empty() { "mounted or claimed".into() } else { who }));
    }
    (!processes.is_empty()).then(|| Stop::Open(processes.join(", ")))
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

fn mounts(nodes: &[PathBuf]) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let place = rest.split(' ').next()?;
        nodes.iter().any(|node| node.as_os_str() == device).then(|| format!("{device} mounted at {place}"))
    };
    table.lines().filter_map(mount).collect()
}

fn swaps(nodes: &[PathBuf]) -> Vec<String> {
    let table = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let areas = table.lines().filter_map(|line| line.split_whitespace().next());
    areas
        .filter(|area| nodes.iter().any(|node| node.as_os_str() == *area))
        .map(|area| format!("{area} swapped to"))
        .collect()
}

/// Block devices on top, such as those of the device mapper and of RAID.
fn stacked(nodes: &[PathBuf]) -> Vec<String> {
    let mut found = Vec::new();
    for node in nodes {
        let name = node.file_name().unwrap_or_default();
        for holder in
            fs::read_dir(Path::new("/sys/class/block").join(name).join("holders")).into_iter().flatten().flatten()
        {
            found.push(format!("{} part of {}", node.display(), holder.file_name().display()));
        }
    }
    found
}

/// Processes that have a disk open. udev is not among them: it looks at each disk that changes, and does not mind if that
/// goes.
fn processes(nodes: &[PathBuf]) -> Vec<String> {
    let numbers: Vec<u64> = nodes.iter().filter_map(|node| fs::metadata(node).ok().map(|m| m.rdev())).collect();
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
        if has_open(pid, |m| m.file_type().is_block_device() && numbers.contains(&m.rdev())) {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            if command.contains("udev") {
                continue;
            }
            found.push(format!("open in process {pid}, {}", command.trim_end()));
        }
    }
    found
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
