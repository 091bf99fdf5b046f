// SPDX-License-Identifier: MIT OR Apache-2.0

//! Identity of the files that a disk is stored in. A name can become another file's while the disk is in use, by a restore
//! or a copy that ends with a rename, and the disk's next server must not serve that file.
//!
//! Two files are the same if they are block devices with the same number, or if device, inode and, where both are known,
//! times of creation are equal.

use std::fs::Metadata;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::time::{Duration, SystemTime};

/// What distinguishes a file from a later one with its name.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub(crate) struct FileIdentity {
    /// Number of a block device. Its node's own numbers do not matter.
    block_device: Option<u64>,
    /// Number of the file system's device. It may change when the file system is mounted again.
    file_system: u64,
    inode: u64,
    /// When the file was created, since 1970, if the file system records it: numbers of inodes are used again.
    created: Option<Duration>,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        let is_block = metadata.file_type().is_block_device();
        FileIdentity {
            block_device: is_block.then(|| metadata.rdev()),
            file_system: metadata.dev(),
            inode: metadata.ino(),
            created: metadata.created().ok().and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok()),
        }
    }

    /// Whether both are the same file.
    #[cfg(feature = "cli")]
    pub(crate) fn is(&self, other: &Self) -> bool {
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

/// Identity of what a disk is stored in, in 48 bits: of two hashes, which the driver keeps with the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BackingIdentity {
    /// Of the numbers that the file has.
    file: u32,
    /// Of its time of creation; 0 if that is unknown.
    age: u32,
}

impl BackingIdentity {
    /// Distinguishes it from what other programs store.
    const MAGIC: u64 = 0xb1dd;
    const HASH_BITS: u32 = 24;
    const MASK: u64 = (1 << Self::HASH_BITS) - 1;

    /// Returns the identity of a file, directory or block device. To be sure that it is the one that is served, take
    /// the metadata of the open file.
    pub fn of(metadata: &Metadata) -> Self {
        Self::hash(&FileIdentity::of(metadata))
    }

    fn hash(file: &FileIdentity) -> Self {
        let (numbers, created) = match file.block_device {
            Some(number) => ([1, number, 0], None),
            None => ([0, file.file_system, file.inode], file.created),
        };
        let age = created.map_or(0, |time| hash(&[time.as_secs(), time.subsec_nanos().into()]).max(1));
        BackingIdentity { file: hash(&numbers), age }
    }

    /// Whether both are of the same file. Different files are taken for the same once in 2²⁴ times, or once in 2⁴⁸ times
    /// if their times of creation are known.
    pub fn is(self, other: Self) -> bool {
        self.file == other.file && (self.age == 0 || other.age == 0 || self.age == other.age)
    }

    /// As the driver keeps it.
    pub(crate) fn encode(self) -> u64 {
        Self::MAGIC << (2 * Self::HASH_BITS) | u64::from(self.file) << Self::HASH_BITS | u64::from(self.age)
    }

    /// `None` if the device was created by a program that stores something else.
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
        FileIdentity { block_device: None, file_system: 5, inode, created }
    }

    fn block(inode: u64, number: u64) -> FileIdentity {
        FileIdentity { block_device: Some(number), file_system: 5, inode, created: None }
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
            (block(1, 5), false),
        ] {
            let hashed = BackingIdentity::hash(&one).is(BackingIdentity::hash(&other));
            assert_eq!(hashed, same, "{other:?}");
            #[cfg(feature = "cli")]
            assert_eq!((one.is(&other), other.is(&one)), (same, same), "{other:?}");
        }
    }

    #[test]
    fn a_block_device_is_known_by_its_number() {
        for (other, same) in [(block(2, 7), true), (block(1, 8), false), (regular(1, None), false)] {
            assert_eq!(BackingIdentity::hash(&block(1, 7)).is(BackingIdentity::hash(&other)), same);
            #[cfg(feature = "cli")]
            assert_eq!(block(1, 7).is(&other), same);
        }
    }

    #[test]
    fn the_driver_keeps_it() {
        for file in [regular(1, None), regular(u64::MAX, Some(u64::MAX)), block(1, 7)] {
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
        assert_eq!(format!("{:x}", BackingIdentity::hash(&block(1, 0x801)).encode()), "b1dde90c2b000000");
    }
}
