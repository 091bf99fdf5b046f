// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a disk is used, as far as /proc and /sys show it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::{mounts, processes};

/// How a disk is used, with a description of its users.
#[derive(Debug)]
pub(in crate::cli) enum Usage {
    /// Processes have it open.
    Open(String),
    /// It is mounted, used as swap, part of another block device, or opened exclusively.
    Claimed(String),
}

impl Usage {
    /// Description of the users.
    pub(in crate::cli) fn users(&self) -> &str {
        match self {
            Usage::Open(users) | Usage::Claimed(users) => users,
        }
    }
}

/// Whether no use of a disk is visible. Does not open the disk, which may wait for a server that hangs.
pub(in crate::cli) fn seems_unused(disk: &Path) -> bool {
    matches!(visible_usage(Path::new("/proc"), disk), Ok(None))
}

/// Returns how a disk is used, as far as /proc and /sys show it.
pub(super) fn visible_usage(proc: &Path, disk: &Path) -> io::Result<Option<Usage>> {
    let nodes = nodes(disk);
    let sys = Path::new("/sys");
    let numbers: Vec<(u64, &PathBuf)> = nodes.iter().filter_map(|node| Some((number_of(sys, node)?, node))).collect();
    let mut claims = mounts::find(proc, &nodes, &numbers)?;
    claims.extend(swaps(proc, &nodes)?);
    claims.extend(kernel_users(sys, &nodes));
    let numbers: Vec<u64> = numbers.into_iter().map(|(number, _)| number).collect();
    let (users, openers) = processes::users_and_openers(proc, &numbers)?;
    claims.extend(users);
    if !claims.is_empty() {
        claims.extend(openers);
        return Ok(Some(Usage::Claimed(claims.join(", "))));
    }
    Ok((!openers.is_empty()).then(|| Usage::Open(openers.join(", "))))
}

/// Lists the nodes of a disk and its partitions.
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

/// Returns the number of a block device.
fn number_of(sys: &Path, node: &Path) -> Option<u64> {
    let by_node = || Some(fs::metadata(node).ok()?.rdev());
    // The node may not exist yet, or be in another directory.
    let text = fs::read_to_string(sys.join("class/block").join(node.file_name()?).join("dev"));
    let by_system = || {
        let text = text.ok()?;
        let (major, minor) = text.trim_end().split_once(':')?;
        Some(nix::sys::stat::makedev(major.parse().ok()?, minor.parse().ok()?))
    };
    by_node().or_else(by_system)
}

fn swaps(proc: &Path, nodes: &[PathBuf]) -> io::Result<Vec<String>> {
    let table = match fs::read_to_string(proc.join("swaps")) {
        // A kernel without swap.
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read?,
    };
    let areas = table.lines().filter_map(|line| line.split_whitespace().next());
    let ours = areas.filter(|area| nodes.iter().any(|node| node.as_os_str() == *area));
    Ok(ours.map(|area| format!("{area} used as swap")).collect())
}

/// Finds users of a disk inside the kernel: block devices on top, such as those of the device mapper, RAID and loop devices;
/// file systems of several devices, whose mounts name one of them; and file systems without a mount, because one that was
/// unmounted lazily exists as long as a file on it is open.
fn kernel_users(sys: &Path, nodes: &[PathBuf]) -> Vec<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_only_one_process_has_counts() {
        let disk = Path::new("/nonexistent/ublkb7");
        let mounted = "40 22 0:9 / /srv rw master:3 - btrfs /nonexistent/ublkb7 rw\n";
        // Each process has its root, and its mounts unless it exits.
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
            visible_usage(proc.path(), disk)
        };
        for (one, other) in [("17", "18"), ("18", "17")] {
            let seen = uses(&[(one, "b", Some("")), (other, "a", Some(mounted))]);
            assert!(matches!(seen, Ok(Some(Usage::Claimed(_)))), "the other process has another root: {seen:?}");
            let seen = uses(&[(one, "a", None), (other, "a", Some(""))]);
            assert!(matches!(seen, Ok(None)), "the mounts of that root are known: {seen:?}");
            let seen = uses(&[(one, "a", None), (other, "b", Some(""))]);
            assert!(seen.is_err(), "the mounts of that root are unknown: {seen:?}");
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
        assert!(visible_usage(proc.path(), disk).unwrap().is_none());
        process("18", "mnt:[2]", &format!("{own}40 22 0:9 / /srv rw master:3 - btrfs /nonexistent/ublkb7 rw\n"));
        let Some(Usage::Claimed(users)) = visible_usage(proc.path(), disk).unwrap() else { panic!() };
        assert_eq!(users, "/nonexistent/ublkb7 mounted at /srv");
    }

    #[test]
    fn loop_devices_and_members_of_a_btrfs_count() {
        let sys = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into(), "/nonexistent/ublkb7p1".into()];
        assert_eq!(kernel_users(sys.path(), &nodes), [""; 0]);
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("block/loop0/loop/backing_file", "/nonexistent/ublkb77\n");
        assert_eq!(kernel_users(sys.path(), &nodes), [""; 0]);
        write("block/loop1/loop/backing_file", "/nonexistent/ublkb7\n");
        write("fs/btrfs/0c2d/devices/ublkb7p1", "");
        assert_eq!(
            kernel_users(sys.path(), &nodes),
            ["/nonexistent/ublkb7 under loop1", "/nonexistent/ublkb7p1 part of the btrfs 0c2d"]
        );
    }

    #[test]
    fn an_unreadable_proc_is_an_error() {
        let proc = tempfile::tempdir().unwrap();
        let disk = Path::new("/nonexistent/ublkb7");
        visible_usage(proc.path(), disk).unwrap_err();
        visible_usage(&proc.path().join("missing"), disk).unwrap_err();
    }

    #[test]
    fn a_file_system_without_a_mount_counts() {
        let sys = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into(), "/nonexistent/ublkb7p1".into()];
        for path in ["fs/ext4/features", "fs/ext4/ublkb77", "fs/xfs/ublkb7p1", "class/block/ublkb7"] {
            fs::create_dir_all(sys.path().join(path)).unwrap();
        }
        assert_eq!(kernel_users(sys.path(), &nodes), ["/nonexistent/ublkb7p1 used by xfs"]);
        fs::write(sys.path().join("class/block/ublkb7/dev"), "259:7\n").unwrap();
        assert_eq!(number_of(sys.path(), &nodes[0]), Some(nix::sys::stat::makedev(259, 7)));
    }
}
