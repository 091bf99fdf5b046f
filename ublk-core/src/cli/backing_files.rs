// SPDX-License-Identifier: MIT OR Apache-2.0

//! Identity of the files that a disk is stored in. A name can become another file's while the disk is in use, by a restore
//! or a copy that ends with a rename, and the disk's next server must not serve that file.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Parameter, Result};

/// A file or directory, and what distinguishes it from a later one with its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BackingFile {
    path: PathBuf,
    /// Number of a block device. Its node's own numbers do not matter.
    block_device: Option<u64>,
    /// Number of the file system's device. It may change when the file system is mounted again.
    file_system: u64,
    inode: u64,
    /// When the file was created, since 1970, if the file system records it: numbers of inodes are used again.
    created: Option<Duration>,
}

impl BackingFile {
    /// Identifies the file that has a name now.
    pub(super) fn find(path: &Path) -> io::Result<Self> {
        let found = fs::metadata(path)?;
        let is_block = found.file_type().is_block_device();
        Ok(BackingFile {
            path: path.to_owned(),
            block_device: is_block.then(|| found.rdev()),
            file_system: found.dev(),
            inode: found.ino(),
            created: found.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()),
        })
    }

    /// Whether both are the same file.
    fn is(&self, other: &Self) -> bool {
        match (self.block_device, other.block_device) {
            (Some(one), Some(other)) => one == other,
            (None, None) => {
                let same_age = self.created.is_none() || other.created.is_none() || self.created == other.created;
                (self.file_system, self.inode) == (other.file_system, other.inode) && same_age
            }
            _ => false,
        }
    }
}

/// Checks that the files have not been replaced since they were `recorded`. A file that was not recorded (by an older
/// version) passes.
pub(super) fn check(files: &[PathBuf], recorded: &[BackingFile]) -> Result<()> {
    let check = |path: &PathBuf| {
        let Some(recorded) = recorded.iter().find(|file| file.path == *path) else { return Ok(()) };
        let found = BackingFile::find(path).map_err(|e| Error::file("open", path, &e))?;
        if found.is(recorded) { Ok(()) } else { Err(replaced(path)) }
    };
    files.iter().try_for_each(check)
}

/// Checks that the process `pid` has the files open, as far as this process may look. Directories are not checked.
pub(super) fn check_open(files: &[PathBuf], pid: i32) -> Result<()> {
    let replaced_file = files.iter().find(|path| is_open_in(pid, path) == Some(false));
    replaced_file.map_or(Ok(()), |path| Err(replaced(path)))
}

fn replaced(path: &Path) -> Error {
    let reason = "not the file that the disk is stored in: another one has taken its name, or its file system was mounted \
                  again. Move the disk's file back to this name. If this is the same file, or if it is to replace the \
                  disk's data (unmount the disk first), serve it with `ublk recover --accept-replaced`";
    Error::mismatch(Parameter::CommandLine("file"), path.display(), reason)
}

/// Whether a process has the file open that has a name now. `None` if that is unknown.
fn is_open_in(pid: i32, path: &Path) -> Option<bool> {
    let named = fs::metadata(path).ok().filter(|named| !named.is_dir())?;
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    Some(open.into_iter().any(|fd| fs::metadata(fd.path()).is_ok_and(|open| is_same(&open, &named))))
}

/// Whether both are the same file, which at least one process has open.
pub(super) fn is_same(one: &Metadata, other: &Metadata) -> bool {
    let is_block = |metadata: &Metadata| metadata.file_type().is_block_device();
    match (is_block(one), is_block(other)) {
        (true, true) => one.rdev() == other.rdev(),
        (false, false) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) -> fs::File {
        let file = fs::File::create(path).unwrap();
        file.set_len(4096).unwrap();
        file
    }

    #[test]
    fn a_file_that_replaced_the_recorded_one_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        let file = write(&path);
        let (files, own) = ([path.clone()], std::process::id() as i32);
        let recorded = [BackingFile::find(&path).unwrap()];
        // A restart, or another path to the same file.
        let recorded: [BackingFile; 1] = serde_json::from_str(&serde_json::to_string(&recorded).unwrap()).unwrap();
        let checks = || [check(&files, &recorded), check_open(&files, own)];
        checks().into_iter().for_each(Result::unwrap);
        fs::rename(&path, directory.path().join("old.img")).unwrap();
        std::os::unix::fs::symlink("old.img", &path).unwrap();
        checks().into_iter().for_each(Result::unwrap);
        write(&directory.path().join("new.img"));
        fs::rename(directory.path().join("new.img"), &path).unwrap();
        for refused in checks() {
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("disk.img") && message.contains("--accept-replaced"), "{message}");
        }
        check(&files, &[]).unwrap();
        drop(file);
        fs::remove_file(&path).unwrap();
        assert!(check(&files, &recorded).unwrap_err().to_string().contains("No such file"));
    }

    #[test]
    fn a_number_that_is_used_again_is_another_file() {
        let file = BackingFile::find(Path::new("/proc/self/exe")).unwrap();
        let other = |created| BackingFile { created, ..file.clone() };
        let (old, new) = (other(Some(Duration::from_secs(1))), other(Some(Duration::from_nanos(1_000_000_001))));
        assert!(!new.is(&old) && new.is(&new) && new.is(&other(None)));
        assert!(!file.is(&BackingFile { file_system: file.file_system + 1, ..file.clone() }));
    }

    #[test]
    fn a_block_device_is_known_by_its_number() {
        let node = |inode, number| BackingFile {
            path: "/dev/sdb".into(),
            block_device: Some(number),
            file_system: 5,
            inode,
            created: None,
        };
        assert!(node(1, 7).is(&node(2, 7)) && !node(1, 7).is(&node(1, 8)));
        assert!(!node(1, 7).is(&BackingFile { block_device: None, ..node(1, 7) }));
    }
}
