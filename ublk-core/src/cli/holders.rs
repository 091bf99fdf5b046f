// SPDX-License-Identifier: MIT OR Apache-2.0

//! Who uses a block device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Names the mounts and the processes that use a disk or its partitions, as far as they can be seen. udev is not
/// among them: it looks at each disk that changes, and does not mind if that goes.
pub(super) fn describe(disk: &Path) -> String {
    let nodes = nodes(disk);
    let mut found = mounts(&nodes);
    found.extend(swaps(&nodes));
    found.extend(stacked(&nodes));
    found.extend(processes(&nodes));
    found.join(", ")
}

/// Whether somebody has the disk for himself: a mount, or another exclusive user.
pub(super) fn is_claimed(disk: &Path) -> bool {
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

fn processes(nodes: &[PathBuf]) -> Vec<String> {
    let numbers: Vec<u64> = nodes.iter().filter_map(|node| fs::metadata(node).ok().map(|m| m.rdev())).collect();
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|b| b.is_ascii_digit())) else { continue };
        let descriptors = fs::read_dir(process.path().join("fd"));
        let has = descriptors.into_iter().flatten().flatten().any(|fd| {
            fs::metadata(fd.path()).is_ok_and(|m| m.file_type().is_block_device() && numbers.contains(&m.rdev()))
        });
        if has {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            if command.contains("udev") {
                continue;
            }
            found.push(format!("open in process {pid}, {}", command.trim_end()));
        }
    }
    found
}
