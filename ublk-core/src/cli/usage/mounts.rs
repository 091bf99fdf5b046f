// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mounts of a disk in all namespaces.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::processes::{self, file_system, statx};
use crate::process::read_text;

/// How often to look at the processes again if some exit while their mounts are read.
const MAX_PASSES: u32 = 5;

/// Finds mounts of a disk and its partitions in all namespaces that processes are in. `numbers` are the device numbers of
/// the `nodes`. Also returns what could not be looked at.
pub(super) fn find(
    proc: &Path,
    nodes: &[PathBuf],
    numbers: &[(u64, &PathBuf)],
) -> io::Result<(Vec<String>, Option<String>)> {
    let numbers: Vec<_> = numbers.iter().map(|(number, node)| (as_mountinfo(*number), *node)).collect();
    let mut found = Vec::new();
    let mut add = |table: &str| {
        for line in table.lines() {
            // ID, parent's ID, device, root, mount point, options, optional fields, "-", type, source, options.
            let mut fields = line.split(' ');
            let (Some(device), Some(mount_point)) = (fields.nth(2), fields.nth(1)) else { continue };
            let source = fields.skip_while(|field| *field != "-").nth(2).unwrap_or_default();
            let by_number = numbers.iter().find(|(number, _)| number == device).map(|(_, node)| *node);
            // Some file systems (btrfs) have a number of their own.
            let node = by_number.or_else(|| nodes.iter().find(|node| node.as_os_str() == source));
            found.extend(node.map(|node| format!("{} mounted at {mount_point}", node.display())));
        }
    };
    let own = proc.join("self");
    add(&fs::read_to_string(own.join("mountinfo"))?);
    let mut unknown = None;
    let mut note = |process: &Path, error: &io::Error| {
        unknown.get_or_insert_with(|| format!("mounts of process {}: {error}", process.display()));
    };
    let mut read: HashSet<_> = view(&own)?.into_iter().collect();
    for _ in 0..MAX_PASSES {
        let mut missed = Vec::new();
        let processes = processes::directories(proc)?;
        for process in processes.iter().flat_map(|process| processes::threads(process)) {
            // Dead threads have no view.
            let view = view(&process).unwrap_or_else(|error| {
                note(&process, &error);
                None
            });
            let Some(view) = view.filter(|view| view.1.is_none() || !read.contains(view)) else { continue };
            match read_text(process.join("mountinfo")) {
                Ok(table) => {
                    add(&table);
                    read.insert(view);
                }
                Err(error) if processes::is_refused(&error, &process) => note(&process, &error),
                // The process has exited meanwhile.
                Err(_) => missed.push(view),
            }
        }
        // Another process may have the same view, one that was read before or that was created after the listing.
        let is_known =
            |view: &View| read.contains(view) || view.1.is_none() && read.iter().any(|known| known.0 == view.0);
        if missed.iter().all(is_known) {
            found.sort();
            found.dedup();
            return Ok((found, unknown));
        }
    }
    Err(io::Error::other("processes exit before their mounts are read"))
}

/// What determines which mounts a process sees: its namespace, and its root, if that is known.
type View = (PathBuf, Option<(u64, u64, u64)>);

/// Returns a thread's view. `None` if it has ended.
///
/// # Errors
///
/// If this process may not look.
fn view(process: &Path) -> io::Result<Option<View>> {
    let namespace = match fs::read_link(process.join("ns/mnt")) {
        Ok(namespace) => namespace,
        Err(error) if processes::is_refused(&error, process) => return Err(error),
        Err(_) => return Ok(None),
    };
    let root = statx(&process.join("root")).ok();
    let mount = root.filter(|root| root.stx_mask & libc::STATX_MNT_ID != 0);
    Ok(Some((namespace, mount.map(|root| (root.stx_mnt_id, file_system(&root), root.stx_ino)))))
}

/// A device number as in `mountinfo`.
fn as_mountinfo(device: u64) -> String {
    format!("{}:{}", nix::sys::stat::major(device), nix::sys::stat::minor(device))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn mounts_are_known_by_the_number_of_their_device() {
        let proc = tempfile::tempdir().unwrap();
        fs::create_dir_all(proc.path().join("self/ns")).unwrap();
        // A file system that is named by a path in another root.
        let number = fs::metadata("/dev/null").unwrap().rdev();
        let table = format!("40 22 {} / /srv rw - ext4 /dev/root rw\n", as_mountinfo(number));
        fs::write(proc.path().join("self/mountinfo"), table).unwrap();
        let nodes = ["/dev/null".into()];
        let (found, unknown) = find(proc.path(), &nodes, &[(number, &nodes[0])]).unwrap();
        assert_eq!((found, unknown), (vec!["/dev/null mounted at /srv".to_owned()], None));
    }
}
