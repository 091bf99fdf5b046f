// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks to measure.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

use super::job::Job;
use crate::cli::failure::Failure;
use crate::control::Control;
use crate::errno::Errno;
use crate::error::errno_of;
use crate::process::read_text;
use crate::units::DeviceId;

/// Way in which a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Access {
    /// For writes, too.
    pub(super) write: bool,
    /// Refuse a disk that is in use.
    pub(super) unused: bool,
}

/// An open block device.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Size in bytes.
    pub(super) size: u64,
    /// Size of its logical blocks in bytes, a multiple of which each request must have.
    block_size: Option<u32>,
    /// The process that serves it, if this command has started it.
    pub(super) own_server: Option<i32>,
}

impl Disk {
    /// Opens a block device for direct I/O.
    pub(super) fn open(name: &str, path: &Path, access: Access) -> Result<Self, Failure> {
        let failed = |e: &std::io::Error| Failure::Text(format!("opening {}: {e}", path.display()));
        let metadata = std::fs::metadata(path).map_err(|e| failed(&e))?;
        if !metadata.file_type().is_block_device() {
            return Err(Failure::Text(format!("{} is not a block device", path.display())));
        }
        let flags = libc::O_DIRECT | if access.unused { libc::O_EXCL } else { 0 };
        let opened = OpenOptions::new().read(true).write(access.write).custom_flags(flags).open(path);
        let mut file = match opened {
            Err(e) if access.unused && errno_of(&e) == Errno::EBUSY => {
                return Err(Failure::Text(format!(
                    "{} is in use (mounted, swap, part of another device, or opened exclusively)",
                    path.display()
                )));
            }
            other => other.map_err(|e| failed(&e))?,
        };
        let size = file.seek(SeekFrom::End(0)).map_err(|e| failed(&e))?;
        let block_size = logical_block_size(metadata.rdev());
        Ok(Disk { name: name.to_owned(), path: path.to_owned(), file, size, block_size, own_server: None })
    }

    /// Returns the process that serves the disk now, if that is known. Upgrades and recoveries change it.
    pub(super) fn server(&self) -> Option<i32> {
        self.own_server.or_else(|| server_of(&self.path))
    }

    /// Returns the CPUs that the disk's server may use.
    pub(super) fn server_cpus(&self) -> Option<String> {
        let status = read_text(format!("/proc/{}/status", self.server()?)).ok()?;
        let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        Some(list.trim().to_owned())
    }

    /// Refuses a job whose requests the disk cannot serve.
    pub(super) fn check(&self, job: Job) -> Result<(), String> {
        match self.block_size {
            Some(block_size) if !job.size.is_multiple_of(block_size) => {
                Err(format!("requests of {} bytes are not multiples of the block size, {block_size}", job.size))
            }
            _ => Ok(()),
        }
    }
}

/// Returns the size of a device's logical blocks. A partition has that of its disk.
fn logical_block_size(device: u64) -> Option<u32> {
    let directory = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    ["queue", "../queue"]
        .iter()
        .find_map(|queue| std::fs::read_to_string(format!("{directory}/{queue}/logical_block_size")).ok())
        .and_then(|text| text.trim().parse().ok())
}

/// Returns the process that serves a disk, if it is a ublk device that this process may query.
fn server_of(path: &Path) -> Option<i32> {
    let path = path.canonicalize().ok()?;
    let id = path.file_name()?.to_str()?.strip_prefix("ublkb")?.parse().ok()?;
    let info = Control::open().ok()?.info(DeviceId(id)).ok()?;
    (info.pid > 0).then_some(info.pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const READ: Access = Access { write: false, unused: false };

    #[test]
    fn only_block_devices_are_opened() {
        for path in ["/dev/null", "/"] {
            let error = Disk::open("x", path.as_ref(), READ).unwrap_err().message().unwrap();
            assert!(error.ends_with("is not a block device"), "{error}");
        }
        let error = Disk::open("x", "/dev/nonexistent".as_ref(), READ).unwrap_err().message().unwrap();
        assert!(error.starts_with("opening /dev/nonexistent: No such file"), "{error}");
    }

    #[test]
    fn requests_smaller_than_a_block_are_refused() {
        let file = tempfile::tempfile().unwrap();
        let disk =
            Disk { name: "d".into(), path: "/d".into(), file, size: 1 << 20, block_size: Some(4096), own_server: None };
        disk.check("randread-4k-qd1".parse().unwrap()).unwrap();
        let error = disk.check("randread-512-qd1".parse().unwrap()).unwrap_err();
        assert_eq!(error, "requests of 512 bytes are not multiples of the block size, 4096");
    }
}
