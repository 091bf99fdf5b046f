// SPDX-License-Identifier: MIT OR Apache-2.0

//! The files that a disk is stored in, as the state file records them.

use std::fmt::Display;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Parameter, Result};
use crate::identity::FileIdentity;

/// A file or directory, and what distinguishes it from a later one with its name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct BackingFile {
    path: PathBuf,
    #[serde(flatten)]
    identity: FileIdentity,
}

impl BackingFile {
    /// Identifies the file that has a name now. `None` if its file system does not keep the inode numbers of files.
    pub(super) fn find(path: &Path) -> io::Result<Option<Self>> {
        Ok(FileIdentity::find(path)?.map(|identity| BackingFile { path: path.to_owned(), identity }))
    }
}

/// Checks that the files have not been replaced since they were `recorded`. A file that was not recorded (by an older
/// version, or because it has no identity) passes.
pub(super) fn check(files: &[PathBuf], recorded: &[BackingFile]) -> Result<()> {
    let check = |path: &PathBuf| {
        let Some(recorded) = recorded.iter().find(|file| file.path == *path) else { return Ok(()) };
        let found = BackingFile::find(path).map_err(|e| Error::file("open", path, &e))?;
        let is_same = found.is_some_and(|found| found.identity.is(&recorded.identity));
        if is_same { Ok(()) } else { Err(replaced(path.display())) }
    };
    files.iter().try_for_each(check)
}

/// Checks that the process `pid` has the files open, as far as this process may look. Directories are not checked.
pub(super) fn check_open(files: &[PathBuf], pid: i32) -> Result<()> {
    let replaced_file = files.iter().find(|path| is_open_in(pid, path) == Some(false));
    replaced_file.map_or(Ok(()), |path| Err(replaced(path.display())))
}

/// Names the file in an error of a recovery that refuses it.
pub(super) fn explain(error: Error, files: &[PathBuf]) -> Error {
    match (&error, files) {
        (Error::Mismatch { parameter: Parameter::BackingFile, .. }, [_, ..]) => {
            // The driver knows one identity of all files.
            let names: Vec<_> = files.iter().map(|path| path.display().to_string()).collect();
            replaced(names.join(" or "))
        }
        _ => error,
    }
}

fn replaced(path: impl Display) -> Error {
    let reason = "not the file that the disk is stored in: another one has taken its name, its file system was mounted again, \
                  or the block device was deactivated or unplugged. Move the disk's file back to this name. If this is the \
                  same file, or if it is to replace the disk's data (unmount the disk first), serve it with \
                  `ublk recover --accept-replaced`";
    Error::mismatch(Parameter::CommandLine("file"), path, reason)
}

/// Returns whether a process has the file open that has a name now. `None` if that is unknown.
fn is_open_in(pid: i32, path: &Path) -> Option<bool> {
    let named = fs::metadata(path).ok().filter(|named| !named.is_dir())?;
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.flatten();
    Some(open.into_iter().any(|fd| fs::metadata(fd.path()).is_ok_and(|open| is_same(&open, &named))))
}

/// Returns whether both are the same file, which at least one process has open.
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
        let recorded = [BackingFile::find(&path).unwrap().unwrap()];
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
    fn a_refused_recovery_names_the_file() {
        let files = ["/disks/a.img".into(), "/disks/a.img.integrity".into()];
        let refusal = || Error::mismatch(Parameter::BackingFile, "another one", "not the same");
        let message = explain(refusal(), &files).to_string();
        assert!(
            message.contains("/disks/a.img or /disks/a.img.integrity:") && message.contains("--accept-replaced"),
            "{message}"
        );
        let other = || Error::mismatch(Parameter::Size, 1, "has 2 bytes");
        assert_eq!(explain(other(), &files).to_string(), other().to_string());
    }

    #[test]
    fn the_state_file_of_an_earlier_version_is_read() {
        let json =
            r#"{"path": "/d", "block_device": null, "file_system": 5, "inode": 7, "created": {"secs": 1, "nanos": 2}}"#;
        let file: BackingFile = serde_json::from_str(json).unwrap();
        assert_eq!(serde_json::to_value(&file).unwrap(), serde_json::from_str::<serde_json::Value>(json).unwrap());
    }
}
