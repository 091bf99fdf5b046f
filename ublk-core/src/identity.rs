// SPDX-License-Identifier: MIT OR Apache-2.0

//! Identity of the files that a disk is stored in. A name can become another file's while the disk is in use, by a restore
//! or a copy that ends with a rename, and the disk's next server must not serve the new one.
//!
//! Two files are the same if device, inode and, where both are known, times of creation are equal. Two block devices are the
//! same if their numbers and, where both are known, the sequence numbers of their disks are equal: the number of a loop
//! device or of a logical volume becomes another one's as soon as it is free.
//!
//! Files on [file systems](crate::file_system) that change the inode numbers of files have no identity.

use std::fs::{File, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::sys::statfs::{FsType, fstatfs};

use crate::file_system;

/// Identity of a file: distinguishes it from a later one with the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct FileIdentity {
    /// Number of a block device. Its node's own numbers do not matter.
    block_device: Option<u64>,
    /// Sequence number of a block device's disk. Since Linux 5.15.
    #[cfg_attr(feature = "cli", serde(default, skip_serializing_if = "Option::is_none"))]
    disk_sequence: Option<u64>,
    /// Number of the file system's device. It may change when the file system is mounted again.
    file_system: u64,
    inode: u64,
    /// When the file was created, since 1970, if the file system records it: numbers of inodes are used again.
    created: Option<Duration>,
}

impl FileIdentity {
    /// Returns the identity of an open file. `None` if it has none or cannot be determined.
    fn of(file: &File) -> Option<Self> {
        Self::new(&file.metadata().ok()?, fstatfs(file).ok().map(|found| found.filesystem_type()))
    }

    /// Returns the identity of the file that has a name now. `None` if it has none.
    #[cfg(feature = "cli")]
    pub(crate) fn find(path: &Path) -> std::io::Result<Option<Self>> {
        let kind = nix::sys::statfs::statfs(path).ok().map(|found| found.filesystem_type());
        Ok(Self::new(&std::fs::metadata(path)?, kind))
    }

    fn new(metadata: &Metadata, file_system: Option<FsType>) -> Option<Self> {
        let is_block = metadata.file_type().is_block_device();
        if !is_block && file_system.is_some_and(|kind| !file_system::has_lasting_inodes(kind)) {
            return None;
        }
        Some(FileIdentity {
            block_device: is_block.then(|| metadata.rdev()),
            disk_sequence: if is_block { disk_sequence("/sys".as_ref(), metadata.rdev()) } else { None },
            file_system: metadata.dev(),
            inode: metadata.ino(),
            created: metadata.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()),
        })
    }

    /// Returns whether both are the same file.
    #[cfg(feature = "cli")]
    pub(crate) fn is(&self, other: &Self) -> bool {
        fn may_equal<T: PartialEq>(one: &Option<T>, other: &Option<T>) -> bool {
            one.is_none() || other.is_none() || one == other
        }
        match (self.block_device, other.block_device) {
            (Some(one), Some(number)) => one == number && may_equal(&self.disk_sequence, &other.disk_sequence),
            (None, None) => {
                let same_age = may_equal(&self.created, &other.created);
                (self.file_system, self.inode) == (other.file_system, other.inode) && same_age
            }
            _ => false,
        }
    }
}

/// Returns the sequence number of a block device's disk: that of a later disk with the same number is greater, and so it is
/// after a loop device was given another file. `None` before Linux 5.15, or without `sysfs`.
fn disk_sequence(sysfs: &Path, number: u64) -> Option<u64> {
    let (major, minor) = (nix::sys::stat::major(number), nix::sys::stat::minor(number));
    let device = sysfs.join(format!("dev/block/{major}:{minor}"));
    // A partition has that of its disk.
    let read = |name: &str| std::fs::read_to_string(device.join(name)).ok()?.trim().parse().ok();
    read("diskseq").or_else(|| read("../diskseq"))
}

/// Identity of what a disk is stored in, in 48 bits: of two hashes, which the driver keeps with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackingIdentity {
    /// Of the numbers that the file has.
    file: u32,
    /// Of its time of creation, or of the sequence number of its disk; 0 if that is unknown.
    age: u32,
}

impl BackingIdentity {
    /// Distinguishes it from what other programs store.
    const MAGIC: u64 = 0xb1dd;
    const HASH_BITS: u32 = 24;
    const MASK: u64 = (1 << Self::HASH_BITS) - 1;

    /// Returns the identity of an open file, directory or block device. `None` if it cannot be determined, or if the file
    /// system does not keep the inode numbers of files: FAT, exFAT, SMB, 9P and FUSE.
    pub fn of(file: &File) -> Option<Self> {
        FileIdentity::of(file).as_ref().map(Self::hash)
    }

    /// Returns the identity of a disk that is stored in both files.
    pub fn and(self, other: Self) -> Self {
        let is_known = self.age != 0 && other.age != 0;
        let both = |one: u32, other: u32| hash(&[one.into(), other.into()]);
        BackingIdentity {
            file: both(self.file, other.file),
            age: if is_known { both(self.age, other.age).max(1) } else { 0 },
        }
    }

    fn hash(file: &FileIdentity) -> Self {
        let (numbers, age) = match file.block_device {
            Some(number) => ([1, number, 0], file.disk_sequence.map(|sequence| hash(&[sequence]))),
            None => (
                [0, file.file_system, file.inode],
                file.created.map(|time| hash(&[time.as_secs(), time.subsec_nanos().into()])),
            ),
        };
        BackingIdentity { file: hash(&numbers), age: age.map_or(0, |age| age.max(1)) }
    }

    /// Returns whether both are of the same file. Different files are taken for the same once in 2²⁴ times, or once in 2⁴⁸
    /// times if their times of creation or the sequence numbers of their disks are known.
    pub fn is(self, other: Self) -> bool {
        self.file == other.file && (self.age == 0 || other.age == 0 || self.age == other.age)
    }

    /// Returns the identity as the driver stores it.
    pub(crate) fn encode(self) -> u64 {
        Self::MAGIC << (2 * Self::HASH_BITS) | u64::from(self.file) << Self::HASH_BITS | u64::from(self.age)
    }

    /// Decodes what the driver stores. `None` if another program stored it.
    pub(crate) fn decode(word: u64) -> Option<Self> {
        (word >> (2 * Self::HASH_BITS) == Self::MAGIC).then_some(BackingIdentity {
            file: (word >> Self::HASH_BITS & Self::MASK) as u32,
            age: (word & Self::MASK) as u32,
        })
    }
}

/// FNV-1a, folded. The next server may be another version of this program, so that it must never change.
fn hash(words: &[u64]) -> u32 {
    let bytes = words.iter().flat_map(|word| word.to_le_bytes());
    let hash = bytes
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
    ((hash ^ hash >> 24 ^ hash >> 48) & BackingIdentity::MASK) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regular(inode: u64, created: Option<u64>) -> FileIdentity {
        let created = created.map(Duration::from_nanos);
        FileIdentity { block_device: None, disk_sequence: None, file_system: 5, inode, created }
    }

    fn block(inode: u64, number: u64, disk_sequence: Option<u64>) -> FileIdentity {
        FileIdentity { block_device: Some(number), disk_sequence, file_system: 5, inode, created: None }
    }

    #[test]
    fn files_are_the_same_by_their_numbers_and_age() {
        let second = Some(1_000_000_000);
        let one = regular(1, second);
        for (other, same) in [
            (one.clone(), true),
            (regular(1, None), true),
            // The number of an inode is used again.
            (regular(1, Some(1_000_000_001)), false),
            (regular(2, second), false),
            (FileIdentity { file_system: 6, ..one.clone() }, false),
            (block(1, 5, None), false),
        ] {
            let hashed = BackingIdentity::hash(&one).is(BackingIdentity::hash(&other));
            assert_eq!(hashed, same, "{other:?}");
            #[cfg(feature = "cli")]
            assert_eq!((one.is(&other), other.is(&one)), (same, same), "{other:?}");
        }
    }

    /// A loop device or a logical volume may get the number of an earlier one.
    #[test]
    fn a_block_device_is_known_by_its_number_and_disk() {
        let one = block(1, 7, Some(20));
        for (other, same) in [
            (block(2, 7, Some(20)), true),
            (block(1, 7, Some(21)), false),
            (block(1, 7, None), true),
            (block(1, 8, Some(20)), false),
            (regular(1, None), false),
        ] {
            let hashed = BackingIdentity::hash(&one).is(BackingIdentity::hash(&other));
            assert_eq!(hashed, same, "{other:?}");
            #[cfg(feature = "cli")]
            assert_eq!((one.is(&other), other.is(&one)), (same, same), "{other:?}");
        }
    }

    #[test]
    fn a_partition_has_the_sequence_number_of_its_disk() {
        let sys = tempfile::tempdir().unwrap();
        let (devices, numbers) = (sys.path().join("devices/sda/sda1"), sys.path().join("dev/block"));
        std::fs::create_dir_all(&devices).unwrap();
        std::fs::create_dir_all(&numbers).unwrap();
        std::os::unix::fs::symlink("../../devices/sda", numbers.join("8:0")).unwrap();
        std::os::unix::fs::symlink("../../devices/sda/sda1", numbers.join("8:1")).unwrap();
        let find = |minor| disk_sequence(sys.path(), nix::sys::stat::makedev(8, minor));
        assert_eq!([0, 1, 2].map(find), [None; 3], "before Linux 5.15");
        std::fs::write(sys.path().join("devices/sda/diskseq"), "23\n").unwrap();
        assert_eq!([0, 1, 2].map(find), [Some(23), Some(23), None]);
    }

    /// FAT and others number an inode each time that it is read.
    #[test]
    fn a_file_whose_inode_may_change_has_no_identity() {
        let file = tempfile::tempfile().unwrap();
        let metadata = file.metadata().unwrap();
        assert!(FileIdentity::new(&metadata, None).is_some());
        assert!(FileIdentity::new(&metadata, Some(nix::sys::statfs::EXT4_SUPER_MAGIC)).is_some());
        assert_eq!(FileIdentity::new(&metadata, Some(nix::sys::statfs::MSDOS_SUPER_MAGIC)), None);
        assert!(BackingIdentity::of(&file).is_some(), "tests do not run on such a file system");
    }

    #[test]
    fn a_disk_in_two_files_has_the_identity_of_both() {
        let known = |inode| BackingIdentity::hash(&regular(inode, Some(1)));
        let [one, other, third] = [1, 2, 3].map(known);
        assert!(one.and(other).is(one.and(other)));
        for different in [one, other, one.and(third), third.and(other), other.and(one)] {
            assert!(!one.and(other).is(different));
        }
        let unknown = BackingIdentity::hash(&regular(2, None));
        assert!(one.and(other).is(one.and(unknown)));
    }

    #[test]
    fn the_driver_keeps_it() {
        for file in [regular(1, None), regular(u64::MAX, Some(u64::MAX)), block(1, 7, None), block(1, 7, Some(9))] {
            let identity = BackingIdentity::hash(&file);
            assert_eq!(BackingIdentity::decode(identity.encode()), Some(identity));
        }
        // Other programs store nothing, flags, or something of their own.
        assert_eq!([0, 0xffff, u64::MAX].map(BackingIdentity::decode), [None; 3]);
    }

    /// The next server may be another version.
    #[test]
    fn it_never_changes() {
        let identity = BackingIdentity::hash(&regular(12, Some(1_700_000_000_123_456_789)));
        assert_eq!(format!("{:x}", identity.encode()), "b1dd2d12f5b4e3e4");
        let block = |sequence| format!("{:x}", BackingIdentity::hash(&block(1, 0x801, sequence)).encode());
        assert_eq!([None, Some(9)].map(block), ["b1dde90c2b000000", "b1dde90c2bccb07b"]);
        let both = identity.and(identity).encode();
        assert_eq!(format!("{both:x}"), "b1dd0271a21cfef6");
    }
}
