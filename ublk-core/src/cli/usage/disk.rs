// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a disk is used, as far as /proc and /sys show it.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::processes::OpenFile;
use super::{exclusive, mounts, processes};
use crate::process::read_text;

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

/// How a disk is used, as far as this process may look.
#[derive(Debug)]
pub(super) struct VisibleUsage {
    pub(super) usage: Option<Usage>,
    /// What could not be looked at.
    pub(super) unknown: Option<String>,
}

/// Returns whether a disk is not in use, as far as that can be determined: if anything is unknown, it counts as in use.
pub(in crate::cli) fn is_surely_unused(disk: &Path) -> bool {
    let visible = visible_usage(Path::new("/proc"), disk);
    processes::sees_all_processes()
        && visible.is_ok_and(|visible| visible.usage.is_none() && visible.unknown.is_none())
        // May take until the timeout, if the disk's server hangs.
        && exclusive::is_claimed(disk, exclusive::OPEN_TIMEOUT).is_ok_and(|is_claimed| !is_claimed)
}

/// Returns how a disk is used, as far as /proc and /sys show it.
pub(super) fn visible_usage(proc: &Path, disk: &Path) -> io::Result<VisibleUsage> {
    let nodes = nodes(disk);
    let sys = Path::new("/sys");
    let numbers: Vec<(u64, &PathBuf)> = nodes.iter().filter_map(|node| Some((number_of(sys, node)?, node))).collect();
    let (mut claims, mut unknown) = mounts::find(proc, &nodes, &numbers)?;
    let numbers: Vec<u64> = numbers.iter().map(|(number, _)| *number).collect();
    let mut add = |(users, not_known): (Vec<String>, Option<String>)| {
        claims.extend(users);
        unknown = unknown.take().or(not_known);
    };
    add(swaps(proc, &nodes, &numbers)?);
    add(kernel_users(sys, &nodes, &numbers));
    add(nvme_namespaces(sys, &nodes, &numbers));
    let processes = processes::find(proc, &numbers)?;
    add((processes.users, processes.unknown));
    let openers = processes.openers;
    let usage = if claims.is_empty() {
        (!openers.is_empty()).then(|| Usage::Open(openers.join(", ")))
    } else {
        claims.extend(openers);
        Some(Usage::Claimed(claims.join(", ")))
    };
    Ok(VisibleUsage { usage, unknown })
}

/// Returns whether a path that the kernel shows is one of a disk. It may be that of another node, for example in the /dev of a
/// container. `None` if that is unknown, because the path does not exist here.
fn is_path_of(path: &Path, nodes: &[PathBuf], numbers: &[u64]) -> Option<bool> {
    if nodes.iter().any(|node| node == path) {
        return Some(true);
    }
    let found = OpenFile::at(path).ok()?;
    Some(found.block_device().is_some_and(|number| numbers.contains(&number)))
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

/// Finds swap on a disk, and what could not be looked at.
fn swaps(proc: &Path, nodes: &[PathBuf], numbers: &[u64]) -> io::Result<(Vec<String>, Option<String>)> {
    let table = match read_text(proc.join("swaps")) {
        // A kernel without swap, or a /proc that does not show it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((Vec::new(), Some("swap".into()))),
        read => read?,
    };
    let (mut found, mut unknown) = (Vec::new(), None);
    for line in table.lines() {
        let mut fields = line.split_whitespace();
        let (Some(area), Some("partition")) = (fields.next(), fields.next()) else { continue };
        match is_path_of(Path::new(area), nodes, numbers) {
            Some(true) => found.push(format!("{area} used as swap")),
            Some(false) => {}
            None => unknown = Some(format!("the swap area {area}")),
        }
    }
    Ok((found, unknown))
}

/// Finds NVMe namespaces (over a network) on a disk, which opens it without a claim, and what could not be looked at.
fn nvme_namespaces(sys: &Path, nodes: &[PathBuf], numbers: &[u64]) -> (Vec<String>, Option<String>) {
    let entries = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    let (mut found, mut unknown) = (Vec::new(), None);
    if !sys.join("module/nvmet").exists() {
        return (found, unknown);
    }
    let subsystems = sys.join("kernel/config/nvmet/subsystems");
    if let Err(error) = fs::read_dir(&subsystems) {
        unknown = Some(format!("NVMe namespaces ({}): {error}", subsystems.display()));
    }
    for namespace in entries(subsystems).flat_map(|subsystem| entries(subsystem.path().join("namespaces"))) {
        let read = |name| fs::read_to_string(namespace.path().join(name));
        if read("enable").is_ok_and(|enabled| enabled.trim_end() == "0") {
            continue;
        }
        let path = read("device_path").unwrap_or_default();
        match is_path_of(Path::new(path.trim_end()), nodes, numbers) {
            Some(true) => found.push(format!("{} exported by nvmet", path.trim_end())),
            Some(false) => {}
            None => unknown = Some(format!("the NVMe namespace {}", namespace.path().display())),
        }
    }
    (found, unknown)
}

/// Finds users of a disk inside the kernel: block devices on top, such as those of the device mapper, RAID and loop devices;
/// file systems of several devices, whose mounts name one of them; and file systems without a mount, because one that was
/// unmounted lazily exists as long as a file on it is open. Also returns what could not be looked at.
fn kernel_users(sys: &Path, nodes: &[PathBuf], numbers: &[u64]) -> (Vec<String>, Option<String>) {
    let entries = |path: PathBuf| fs::read_dir(path).into_iter().flatten().flatten();
    let (mut found, mut unknown) = (Vec::new(), None);
    for device in entries(sys.join("block")) {
        let Ok(file) = fs::read(device.path().join("loop/backing_file")) else { continue };
        let path = PathBuf::from(OsStr::from_bytes(file.trim_ascii_end()));
        let name = device.file_name();
        let has_same_name = nodes.iter().any(|node| node.file_name() == path.file_name());
        // Other files may be on a file server that does not answer.
        if !has_same_name && !path.iter().any(|directory| directory == "dev") {
            continue;
        }
        match is_path_of(&path, nodes, numbers) {
            Some(true) => found.push(format!("{} under {}", path.display(), name.display())),
            // A file of another root, or one that was deleted.
            None if has_same_name => {
                unknown = Some(format!("the backing file {} of {}", path.display(), name.display()));
            }
            _ => {}
        }
    }
    for node in nodes {
        let name = node.file_name().unwrap_or_default();
        for holder in entries(sys.join("class/block").join(name).join("holders")) {
            found.push(format!("{} part of {}", node.display(), holder.file_name().display()));
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
    (found, unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The visible use, or an error if that is unknown.
    fn usage(proc: &Path, disk: &Path) -> io::Result<Option<Usage>> {
        fs::write(proc.join("swaps"), "Filename Type Size Used Priority\n")?;
        let visible = visible_usage(proc, disk)?;
        visible.unknown.map_or(Ok(visible.usage), |unknown| Err(io::Error::other(unknown)))
    }

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
            usage(proc.path(), disk)
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
        assert!(usage(proc.path(), disk).unwrap().is_none());
        process("18", "mnt:[2]", &format!("{own}40 22 0:9 / /srv rw master:3 - btrfs /nonexistent/ublkb7 rw\n"));
        let Some(Usage::Claimed(users)) = usage(proc.path(), disk).unwrap() else { panic!() };
        assert_eq!(users, "/nonexistent/ublkb7 mounted at /srv");
    }

    #[test]
    fn loop_devices_and_members_of_a_btrfs_count() {
        let sys = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into(), "/nonexistent/ublkb7p1".into()];
        assert_eq!(kernel_users(sys.path(), &nodes, &[]).0, [""; 0]);
        let write = |path: &str, text: &str| {
            let path = sys.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("block/loop0/loop/backing_file", "/nonexistent/ublkb77\n");
        assert_eq!(kernel_users(sys.path(), &nodes, &[]).0, [""; 0]);
        write("block/loop1/loop/backing_file", "/nonexistent/ublkb7\n");
        write("fs/btrfs/0c2d/devices/ublkb7p1", "");
        assert_eq!(
            kernel_users(sys.path(), &nodes, &[]).0,
            ["/nonexistent/ublkb7 under loop1", "/nonexistent/ublkb7p1 part of the btrfs 0c2d"]
        );
    }

    /// A chroot's or a container's /dev has nodes of its own.
    #[test]
    fn a_disk_with_another_node_counts() {
        let directory = tempfile::tempdir().unwrap();
        let number = nix::sys::stat::makedev(259, 0xffff7);
        let other = directory.path().join("dev/disk");
        fs::create_dir(directory.path().join("dev")).unwrap();
        let (block, mode) = (nix::sys::stat::SFlag::S_IFBLK, nix::sys::stat::Mode::S_IRUSR);
        if nix::sys::stat::mknod(&other, block, mode, number).is_err() {
            return;
        }
        let nodes = ["/nonexistent/ublkb7".into()];
        let write = |path: &str, text: String| {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let swaps = |kind: &str, number| {
            write("swaps", format!("Filename Type Size Used Priority\n{} {kind} 1048572 0 -2\n", other.display()));
            swaps(directory.path(), &nodes, &[number]).unwrap()
        };
        assert_eq!(swaps("partition", number).0.len(), 1);
        assert_eq!(swaps("partition", number + 1), (vec![], None));
        write("block/loop0/loop/backing_file", format!("{}\n", other.display()));
        assert_eq!(kernel_users(directory.path(), &nodes, &[number]).0, [format!("{} under loop0", other.display())]);
        assert_eq!(kernel_users(directory.path(), &nodes, &[number + 1]), (vec![], None));
        let namespace = "kernel/config/nvmet/subsystems/s/namespaces/1";
        write(&format!("{namespace}/device_path"), format!("{}\n", other.display()));
        write(&format!("{namespace}/enable"), "1\n".into());
        assert_eq!(nvme_namespaces(directory.path(), &nodes, &[number]), (vec![], None), "no such module");
        write("module/nvmet/refcnt", "1\n".into());
        assert_eq!(nvme_namespaces(directory.path(), &nodes, &[number]).0.len(), 1);
        assert_eq!(nvme_namespaces(directory.path(), &nodes, &[number + 1]), (vec![], None));
        write(&format!("{namespace}/enable"), "0\n".into());
        assert_eq!(nvme_namespaces(directory.path(), &nodes, &[number]), (vec![], None), "not enabled");
        fs::remove_dir_all(directory.path().join("kernel")).unwrap();
        assert!(nvme_namespaces(directory.path(), &nodes, &[number]).1.is_some(), "configfs is not mounted");
    }

    #[test]
    fn swap_that_cannot_be_looked_at_is_unknown() {
        let proc = tempfile::tempdir().unwrap();
        let nodes = ["/nonexistent/ublkb7".into()];
        let swaps = || swaps(proc.path(), &nodes, &[]).unwrap();
        assert!(swaps().1.is_some(), "no table");
        let write = |text: &str| fs::write(proc.path().join("swaps"), text).unwrap();
        write("Filename Type Size Used Priority\n/nonexistent/dev/ublkb7 partition 1048572 0 -2\n");
        assert!(swaps().1.is_some(), "a node of another root");
        write("Filename Type Size Used Priority\n/nonexistent/swapfile file 1048572 0 -2\n");
        assert_eq!(swaps(), (vec![], None));
        write("Filename Type Size Used Priority\n/nonexistent/ublkb7 partition 1048572 0 -2\n");
        assert_eq!(swaps().0, ["/nonexistent/ublkb7 used as swap"]);
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
        assert_eq!(kernel_users(sys.path(), &nodes, &[]).0, ["/nonexistent/ublkb7p1 used by xfs"]);
        fs::write(sys.path().join("class/block/ublkb7/dev"), "259:7\n").unwrap();
        assert_eq!(number_of(sys.path(), &nodes[0]), Some(nix::sys::stat::makedev(259, 7)));
    }
}
