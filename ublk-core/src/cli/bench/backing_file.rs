// SPDX-License-Identifier: MIT OR Apache-2.0

//! The temporary file that disks are measured on.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::created::NotCreated;
use super::helper::is_readable;
use super::requests::SEED;

/// Bytes that are written at once.
const CHUNK: u64 = 1 << 20;

/// A file full of data, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct BackingFile(PathBuf);

impl BackingFile {
    /// Creates the file in a directory. Its blocks are allocated, so that no job measures their allocation.
    pub(super) fn create(directory: &Path, size: u64, interrupts: BorrowedFd<'_>) -> Result<Self, NotCreated> {
        let path = directory.join(format!("ublk-bench-{}.img", std::process::id()));
        let failed = |e: &io::Error| NotCreated::Absent(format!("creating {}: {e}", path.display()));
        // A link of that name is not followed.
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(|e| failed(&e))?;
        let created = BackingFile(path.clone());
        if fill(file, size, interrupts).map_err(|e| failed(&e))? {
            return Err(NotCreated::Interrupted);
        }
        Ok(created)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

/// Writes `size` bytes that do not compress. Returns true if it was interrupted.
fn fill(mut file: File, size: u64, interrupts: BorrowedFd<'_>) -> io::Result<bool> {
    let mut chunk = vec![0; CHUNK as usize];
    fastrand::Rng::with_seed(SEED).fill(&mut chunk);
    let mut left = size;
    while left > 0 {
        if is_readable(Some(interrupts), Duration::ZERO) {
            return Ok(true);
        }
        let len = left.min(CHUNK);
        file.write_all(&chunk[..len as usize])?;
        left -= len;
    }
    file.sync_all()?;
    Ok(false)
}

impl Drop for BackingFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            log::error!("removing {}: {error}", self.0.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_backing_file_is_full_of_data_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let (reader, mut writer) = io::pipe().unwrap();
        let file = BackingFile::create(directory.path(), CHUNK + 512, reader.as_fd()).unwrap();
        let data = fs::read(file.path()).unwrap();
        assert_eq!(data.len() as u64, CHUNK + 512);
        assert!(data.iter().filter(|byte| **byte != 0).count() > data.len() / 2);
        let path = file.path().to_owned();
        let second = BackingFile::create(directory.path(), 512, reader.as_fd()).unwrap_err();
        assert!(matches!(&second, NotCreated::Absent(reason) if reason.contains("File exists")), "{second:?}");
        drop(file);
        assert!(!path.exists());
        writer.write_all(b"x").unwrap();
        let interrupted = BackingFile::create(directory.path(), CHUNK, reader.as_fd()).unwrap_err();
        assert_eq!((interrupted, path.exists()), (NotCreated::Interrupted, false));
    }

    #[test]
    fn a_directory_without_space_or_rights_is_reported() {
        let (reader, _writer) = io::pipe().unwrap();
        let error = BackingFile::create("/proc".as_ref(), 512, reader.as_fd()).unwrap_err();
        assert!(matches!(&error, NotCreated::Absent(reason) if reason.starts_with("creating /proc/ublk-bench-")));
    }
}
