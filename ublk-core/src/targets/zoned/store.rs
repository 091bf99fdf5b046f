// SPDX-License-Identifier: MIT OR Apache-2.0

//! The data of zones: in memory, or in a directory with a file for each zone.
//!
//! The length of a sequential zone's file is its write pointer, so the pointers need no storage of their own. If a server
//! is killed or the machine crashes during a write, a file may end within a block. Such a block does not count: the write was
//! not acknowledged, or not flushed.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::FlockArg;

use super::super::files::{sync_directory, sync_name};
use super::super::sparse::Sparse;
use crate::error::{Error, Parameter, Result};
use crate::identity::BackingIdentity;
use crate::request::WriteBack;

/// The bytes of all zones.
#[derive(Debug)]
pub(super) enum Store {
    Memory(Sparse),
    Files(Files),
}

/// A file for each zone.
#[derive(Debug)]
pub(super) struct Files {
    zone_size: u64,
    files: Vec<File>,
    /// Zones with writes that may not be durable. Initially all of them, because the last server may have acknowledged writes
    /// that were not flushed.
    dirty: Mutex<Vec<bool>>,
    /// Zones whose file may extend beyond the write pointer, because a write failed or its server was killed.
    longer: Vec<AtomicBool>,
    /// Held during a flush. A second flush must not succeed before the first has made its writes durable.
    flushing: Mutex<()>,
    write_back: WriteBack,
    /// The directory, locked against a second server.
    directory: File,
}

impl Store {
    /// Returns the identity of the directory. Files in it that were replaced are not noticed.
    pub(super) fn backing(&self) -> Option<BackingIdentity> {
        match self {
            Store::Memory(_) => None,
            Store::Files(files) => BackingIdentity::of(&files.directory),
        }
    }
}

impl Files {
    /// Opens or creates the files of a disk. Also returns how many bytes are written to each sequential zone, in whole
    /// blocks.
    pub(super) fn open(
        directory: &Path,
        zone_size: u64,
        block: u32,
        conventional: usize,
        count: usize,
    ) -> Result<(Self, Vec<Option<u64>>)> {
        let is_new = !directory.exists();
        std::fs::create_dir_all(directory).map_err(|e| Error::file("create", directory, &e))?;
        let lock = File::open(directory).map_err(|e| Error::file("open", directory, &e))?;
        #[allow(deprecated, reason = "the replacement insists on owning the file")]
        nix::fcntl::flock(std::os::fd::AsRawFd::as_raw_fd(&lock), FlockArg::LockExclusiveNonblock).map_err(
            |errno| Error::File {
                operation: "lock",
                path: directory.to_owned(),
                errno: errno.into(),
                hint: "another server uses this directory".into(),
            },
        )?;
        let (mut files, mut written) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut longer = Vec::with_capacity(count);
        for index in 0..count {
            let is_conventional = index < conventional;
            let path = directory.join(name(index, is_conventional));
            let other = directory.join(name(index, !is_conventional));
            if other.exists() {
                let kind = if is_conventional { "sequential" } else { "conventional" };
                return Err(Error::mismatch(
                    Parameter::ConventionalZones,
                    conventional,
                    format!("zone {index} in {} is {kind}", directory.display()),
                ));
            }
            let (file, len) = open(&path).map_err(|e| Error::file("open", &path, &e))?;
            if len > zone_size {
                return Err(Error::mismatch(
                    Parameter::ZoneSize,
                    zone_size,
                    format!("{} has {len} bytes", path.display()),
                ));
            }
            if is_conventional {
                file.set_len(zone_size).map_err(|e| Error::file("enlarge", &path, &e))?;
            }
            let blocks = len / u64::from(block) * u64::from(block);
            let is_longer = !is_conventional && blocks != len;
            if is_longer {
                log::warn!(
                    "{} ends within a block, at byte {len}; setting its write pointer to {blocks}",
                    path.display()
                );
            }
            written.push((!is_conventional).then_some(blocks));
            longer.push(is_longer.into());
            files.push(file);
        }
        // A flush syncs the files, not their names.
        sync_directory(directory);
        if is_new {
            sync_name(directory);
        }
        let dirty = Mutex::new(vec![true; count]);
        let write_back = WriteBack::new(directory.display().to_string());
        let flushing = Mutex::default();
        Ok((Files { zone_size, files, dirty, longer, flushing, write_back, directory: lock }, written))
    }

    fn at(&self, offset: u64) -> (usize, u64) {
        ((offset / self.zone_size) as usize, offset % self.zone_size)
    }

    /// Truncates a zone's file to its write pointer.
    fn truncate(&self, zone: usize, written: u64) -> io::Result<()> {
        self.longer[zone].store(true, Ordering::Relaxed);
        self.files[zone].set_len(written)?;
        self.longer[zone].store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Marks a zone as changed, and syncs it if the change has to be durable.
    fn changed(&self, zone: usize, durably: bool) -> io::Result<()> {
        self.dirty()[zone] = true;
        if durably { Ok(self.write_back.sync(&self.files[zone])?) } else { Ok(()) }
    }

    fn dirty(&self) -> std::sync::MutexGuard<'_, Vec<bool>> {
        self.dirty.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn name(index: usize, conventional: bool) -> PathBuf {
    format!("{}-{index:06}", if conventional { "cnv" } else { "seq" }).into()
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

impl Store {
    /// Reads bytes of one or more zones. Unwritten bytes are zeros.
    pub(super) fn read(&self, offset: u64, mut into: &mut [u8]) -> io::Result<()> {
        let files = match self {
            Store::Memory(sparse) => {
                sparse.read(offset, into);
                return Ok(());
            }
            Store::Files(files) => files,
        };
        let mut offset = offset;
        while !into.is_empty() {
            let (zone, at) = files.at(offset);
            let part = into.len().min((files.zone_size - at) as usize);
            let (now, rest) = into.split_at_mut(part);
            read_or_zeros(&files.files[zone], at, now)?;
            into = rest;
            offset += part as u64;
        }
        Ok(())
    }

    /// Returns whether a zone has these bytes.
    pub(super) fn holds(&self, offset: u64, bytes: &[u8]) -> io::Result<bool> {
        let mut found = vec![0; bytes.len()];
        self.read(offset, &mut found)?;
        Ok(found == bytes)
    }

    /// Truncates the file of a locked zone to its write pointer, if it may be longer.
    pub(super) fn trim(&self, zone: usize, written: u64) -> io::Result<()> {
        match self {
            Store::Files(files) if files.longer[zone].load(Ordering::Relaxed) => files.truncate(zone, written),
            _ => Ok(()),
        }
    }

    /// Removes what a failed write has left. If that fails, too, the next write does it.
    pub(super) fn undo(&self, zone: usize, written: u64) {
        if let Store::Files(files) = self
            && let Err(error) = files.truncate(zone, written)
        {
            log::error!("zoned: cannot truncate zone {zone} to {written} bytes after a failed write: {error}");
        }
    }

    /// Writes bytes of one zone.
    pub(super) fn write(&self, offset: u64, from: &[u8], durably: bool) -> io::Result<()> {
        match self {
            Store::Memory(sparse) => sparse.write(offset, from),
            Store::Files(files) => {
                let (zone, at) = files.at(offset);
                files.files[zone].write_all_at(from, at)?;
                files.changed(zone, durably)?;
            }
        }
        Ok(())
    }

    /// Empties a zone. To be followed by [`changed`](Store::changed).
    pub(super) fn clear(&self, zone: usize, zone_size: u64) -> io::Result<()> {
        match self {
            Store::Memory(sparse) => sparse.zero(zone as u64 * zone_size, zone_size),
            Store::Files(files) => files.truncate(zone, 0)?,
        }
        Ok(())
    }

    /// Moves a zone's write pointer to its end. To be followed by [`changed`](Store::changed).
    pub(super) fn fill(&self, zone: usize, zone_size: u64) -> io::Result<()> {
        if let Store::Files(files) = self {
            files.files[zone].set_len(zone_size)?;
        }
        Ok(())
    }

    /// Marks a zone as changed, and syncs it if the change has to be durable.
    pub(super) fn changed(&self, zone: usize, durably: bool) -> io::Result<()> {
        if let Store::Files(files) = self { files.changed(zone, durably) } else { Ok(()) }
    }

    /// Makes all acknowledged writes durable.
    pub(super) fn flush(&self) -> io::Result<()> {
        let Store::Files(files) = self else { return Ok(()) };
        let _one = files.flushing.lock().unwrap_or_else(PoisonError::into_inner);
        let dirty: Vec<usize> = {
            let mut dirty = files.dirty();
            let zones = (0..dirty.len()).filter(|zone| dirty[*zone]).collect();
            dirty.fill(false);
            zones
        };
        // Even if nothing is dirty: a durable write may have failed.
        files.write_back.check()?;
        // After a failure, all later flushes fail.
        dirty.into_iter().try_for_each(|zone| Ok(files.write_back.sync(&files.files[zone])?))
    }
}

/// Reads from a file, with zeros after its end.
fn read_or_zeros(file: &File, at: u64, into: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < into.len() {
        match file.read_at(&mut into[done..], at + done as u64) {
            Ok(0) => {
                into[done..].fill(0);
                return Ok(());
            }
            Ok(count) => done += count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZONE: u64 = 64 << 10;

    #[test]
    fn write_pointers_are_kept_in_the_files() {
        let directory = tempfile::tempdir().unwrap();
        let (files, written) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        assert_eq!(written, [None, Some(0), Some(0)]);
        let store = Store::Files(files);
        store.write(ZONE, &[7; 4096], false).unwrap();
        store.fill(2, ZONE).unwrap();
        store.flush().unwrap();
        let mut bytes = [1; 8192];
        store.read(2 * ZONE - 4096, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 8192], "a read may cross zones");
        drop(store);
        let (_, written) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        assert_eq!(written, [None, Some(4096), Some(ZONE)]);
    }

    #[test]
    fn a_new_server_flushes_writes_of_the_last_one() {
        let directory = tempfile::tempdir().unwrap();
        let (files, _) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        let store = Store::Files(files);
        store.write(ZONE, &[7; 4096], false).unwrap();
        // As if killed: nothing was flushed.
        drop(store);
        let (files, _) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        assert_eq!(files.dirty().to_vec(), [true; 3]);
        let store = Store::Files(files);
        store.flush().unwrap();
        let Store::Files(files) = store else { unreachable!() };
        assert_eq!(files.dirty().to_vec(), [false; 3]);
    }

    #[test]
    fn no_flush_succeeds_after_a_failed_sync() {
        let directory = tempfile::tempdir().unwrap();
        let (mut files, _) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        // Pipes cannot be synced.
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        let file = std::mem::replace(&mut files.files[1], pipe.into());
        assert_eq!(Store::Files(files).flush().unwrap_err().raw_os_error(), Some(libc::EINVAL));
        let (mut files, _) = Files::open(directory.path(), ZONE, 4096, 1, 3).unwrap();
        files.write_back.fail(crate::Errno::ENOSPC);
        files.files[1] = file;
        files.dirty().fill(false);
        let store = Store::Files(files);
        assert_eq!(store.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
        assert_eq!(store.write(ZONE, &[7; 4096], true).unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn a_file_that_ends_within_a_block_counts_in_whole_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let seq = directory.path().join(name(0, false));
        std::fs::write(&seq, [7; 10_000]).unwrap();
        let (files, written) = Files::open(directory.path(), ZONE, 4096, 0, 2).unwrap();
        assert_eq!(written, [Some(8192), Some(0)]);
        let store = Store::Files(files);
        assert_eq!(
            std::fs::metadata(&seq).unwrap().len(),
            10_000,
            "not truncated yet: another block size may use all of it"
        );
        store.trim(0, 8192).unwrap();
        assert_eq!(std::fs::metadata(&seq).unwrap().len(), 8192);
        store.trim(0, 4096).unwrap();
        assert_eq!(std::fs::metadata(&seq).unwrap().len(), 8192, "truncated only once");
    }

    #[test]
    fn a_directory_has_one_server_and_one_shape() {
        let directory = tempfile::tempdir().unwrap();
        let first = Files::open(directory.path(), ZONE, 4096, 1, 2).unwrap();
        let error = Files::open(directory.path(), ZONE, 4096, 1, 2).unwrap_err().to_string();
        assert!(error.contains("another server"), "{error}");
        drop(first);
        let error = Files::open(directory.path(), ZONE, 4096, 0, 2).unwrap_err().to_string();
        assert!(error.contains("conventional"), "{error}");
        let error = Files::open(directory.path(), ZONE / 2, 4096, 1, 2).unwrap_err().to_string();
        assert!(error.contains("zone size"), "{error}");
    }
}
