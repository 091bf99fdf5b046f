// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integrity metadata: storage, and verification of the protection information of T10 and NVMe.
//!
//! The protection information of an interval is a guard (a checksum of the data and of the preceding metadata), an
//! application tag, and a reference tag (the interval's number). All are big-endian. An application tag of all ones means
//! that there is no protection information; unwritten intervals have such a tag. The block layer sends all zeros if it is
//! configured not to generate protection information (`write_generate` in sysfs).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::files::punch_hole;
use super::range_locks::RangeLocks;
use super::sparse::Sparse;
use crate::errno::Errno;
use crate::error::errno_of;
use crate::identity::BackingIdentity;
use crate::params::{Checksum, Integrity};
use crate::request::{Request, WriteBack};

/// Why metadata does not match its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mismatch {
    Guard { interval: u64, found: u64, computed: u64 },
    Reference { interval: u64, found: u64 },
}

/// Storage of metadata. It is inverted, so that unwritten metadata is all ones.
#[derive(Debug)]
enum Storage {
    Memory(Sparse),
    File(File),
}

impl Storage {
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let file = match self {
            Storage::Memory(bytes) => {
                bytes.read(offset, into);
                return Ok(());
            }
            Storage::File(file) => file,
        };
        let mut done = 0;
        while done < into.len() {
            match file.read_at(&mut into[done..], offset + done as u64) {
                // After the end of the file there are zeros, as in a hole.
                Ok(0) => {
                    into[done..].fill(0);
                    break;
                }
                Ok(len) => done += len,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        match self {
            Storage::Memory(bytes) => bytes.write(offset, from),
            Storage::File(file) => file.write_all_at(from, offset)?,
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        let file = match self {
            Storage::Memory(bytes) => {
                bytes.zero(offset, len);
                return Ok(());
            }
            Storage::File(file) => file,
        };
        match punch_hole(file, offset, len) {
            Err(Errno::EOPNOTSUPP) => {
                let zeros = [0; 4096];
                let mut parts = (0..len).step_by(zeros.len());
                parts.try_for_each(|at| {
                    let part = (len - at).min(zeros.len() as u64) as usize;
                    file.write_all_at(&zeros[..part], offset + at)
                })
            }
            other => Ok(other?),
        }
    }
}

/// The metadata of a whole disk.
#[derive(Debug)]
pub(super) struct Metadata {
    integrity: Integrity,
    storage: Storage,
    locks: RangeLocks,
}

impl Metadata {
    /// Creates storage in memory for a disk of `size` bytes. `None` if it is too large.
    pub(super) fn in_memory(integrity: Integrity, size: u64) -> Option<Self> {
        let storage = Storage::Memory(Sparse::new(integrity.bytes_for(size))?);
        Some(Metadata { integrity, storage, locks: RangeLocks::default() })
    }

    /// Uses a file as the storage.
    pub(super) fn in_file(integrity: Integrity, file: File) -> Self {
        Metadata { integrity, storage: Storage::File(file), locks: RangeLocks::default() }
    }

    /// Returns the identity of the file. `None` if the metadata is in memory.
    pub(super) fn backing(&self) -> Option<BackingIdentity> {
        match &self.storage {
            Storage::Memory(_) => None,
            Storage::File(file) => BackingIdentity::of(file),
        }
    }

    /// Locks that keep the metadata of a range consistent with its data.
    pub(super) fn locks(&self) -> &RangeLocks {
        &self.locks
    }

    /// Returns a write's metadata, if it has any.
    ///
    /// # Errors
    ///
    /// `EILSEQ` if it does not match the write's data.
    pub(super) fn of_write(&self, request: &Request<'_>) -> Result<Option<Vec<u8>>, Errno> {
        if !request.has_integrity() {
            return Ok(None);
        }
        let mut bytes = vec![0; self.integrity.bytes_for(request.len()) as usize];
        request.read_integrity(0, &mut bytes)?;
        check(&self.integrity, request.offset(), request.data(), &bytes).map_err(|mismatch| {
            log::warn!("{request:?}: {mismatch:?}");
            Errno::EILSEQ
        })?;
        Ok(Some(bytes))
    }

    /// Stores the metadata of the range that begins at `offset` on the disk.
    pub(super) fn put(&self, offset: u64, metadata: &[u8]) -> Result<(), Errno> {
        let bytes: Vec<u8> = metadata.iter().map(|byte| !byte).collect();
        self.storage.write(self.integrity.bytes_for(offset), &bytes).map_err(failed)
    }

    /// Removes the metadata of a range, like [`forget`](Metadata::forget), before new metadata is stored.
    pub(super) fn blank(&self, offset: u64, len: u64) -> Result<(), Errno> {
        let zeros = vec![0; self.integrity.bytes_for(len) as usize];
        self.storage.write(self.integrity.bytes_for(offset), &zeros).map_err(failed)
    }

    /// Returns the metadata of the range that begins at `offset` on the disk.
    ///
    /// # Errors
    ///
    /// `EILSEQ` if it does not match the range's data.
    pub(super) fn check(&self, offset: u64, data: &[u8]) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; self.integrity.bytes_for(data.len() as u64) as usize];
        self.storage.read(self.integrity.bytes_for(offset), &mut bytes).map_err(failed)?;
        invert(&mut bytes);
        check(&self.integrity, offset, data, &bytes).map_err(|mismatch| {
            log::warn!("metadata of {} bytes at {offset}: {mismatch:?}", data.len());
            Errno::EILSEQ
        })?;
        Ok(bytes)
    }

    /// Verifies a read's data, and adds the metadata if the request has room for it.
    ///
    /// # Errors
    ///
    /// `EILSEQ` if they do not match.
    pub(super) fn read(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let bytes = self.check(request.offset(), request.data())?;
        if request.has_integrity() { request.write_integrity(0, &bytes) } else { Ok(()) }
    }

    /// Removes the metadata of a range that is discarded or zeroed.
    pub(super) fn forget(&self, offset: u64, len: u64) -> Result<(), Errno> {
        self.storage.zero(self.integrity.bytes_for(offset), self.integrity.bytes_for(len)).map_err(failed)
    }

    /// Makes all metadata written so far durable.
    pub(super) fn sync(&self, write_back: &WriteBack) -> Result<(), Errno> {
        match &self.storage {
            Storage::Memory(_) => Ok(()),
            Storage::File(file) => write_back.sync(file),
        }
    }
}

fn failed(error: io::Error) -> Errno {
    log::error!("integrity metadata: {error}");
    errno_of(&error)
}

fn invert(bytes: &mut [u8]) {
    bytes.iter_mut().for_each(|byte| *byte = !*byte);
}

/// Verifies the metadata of a range that begins at `offset` on the disk.
fn check(integrity: &Integrity, offset: u64, data: &[u8], metadata: &[u8]) -> Result<(), Mismatch> {
    let first = offset / u64::from(integrity.interval);
    let intervals = data.chunks_exact(integrity.interval as usize);
    let each = intervals.zip(metadata.chunks_exact(integrity.metadata_size.into()));
    each.zip(first..).try_for_each(|((data, metadata), interval)| check_one(integrity, interval, data, metadata))
}

fn check_one(integrity: &Integrity, interval: u64, data: &[u8], metadata: &[u8]) -> Result<(), Mismatch> {
    let (before, tuple) = metadata.split_at(integrity.pi_offset.into());
    let number = |bytes: &[u8]| bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    let (guard, application, reference) = match integrity.checksum {
        Checksum::None => return Ok(()),
        Checksum::Ip | Checksum::Crc16T10Dif => (number(&tuple[..2]), &tuple[2..4], &tuple[4..8]),
        Checksum::Crc64Nvme => (number(&tuple[..8]), &tuple[8..10], &tuple[10..16]),
    };
    // Without reference tags, a tuple counts as absent only if that part is all ones, too.
    let is_absent = application == [0xff; 2] && (integrity.reference_tag || reference.iter().all(|b| *b == 0xff));
    if is_absent || tuple[..integrity.checksum.tuple_size().into()].iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let computed = match integrity.checksum {
        Checksum::None => guard,
        // Older kernels, which could not split intervals, compute this guard from the preceding metadata alone, if any.
        Checksum::Ip if !before.is_empty() && guard == u64::from(internet(&[], before)) => guard,
        Checksum::Ip => u64::from(internet(data, before)),
        Checksum::Crc16T10Dif => u64::from(crc16(crc16(0, data), before)),
        Checksum::Crc64Nvme => crc64(crc64(0, data), before),
    };
    if guard != computed {
        return Err(Mismatch::Guard { interval, found: guard, computed });
    }
    let expected = interval & (u64::MAX >> (64 - 8 * reference.len()));
    if integrity.reference_tag && number(reference) != expected {
        return Err(Mismatch::Reference { interval, found: number(reference) });
    }
    Ok(())
}

/// The Internet checksum (RFC 1071) of data of an even length, followed by more data.
fn internet(data: &[u8], then: &[u8]) -> u16 {
    let words = data
        .chunks(2)
        .chain(then.chunks(2))
        .map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let folded = words.fold(0u32, |sum, word| {
        let sum = sum + word;
        (sum & 0xffff) + (sum >> 16)
    });
    !(folded as u16)
}

/// CRC-16 of T10 DIF, continued from `crc`.
fn crc16(crc: u16, data: &[u8]) -> u16 {
    const POLYNOMIAL: u16 = 0x8bb7;
    const TABLE: [u16; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut value = (byte as u16) << 8;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 0x8000 == 0 { value << 1 } else { value << 1 ^ POLYNOMIAL };
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };
    data.iter().fold(crc, |crc, byte| crc << 8 ^ TABLE[usize::from((crc >> 8) as u8 ^ byte)])
}

/// CRC-64 of NVMe, continued from `crc`, initially 0.
fn crc64(crc: u64, data: &[u8]) -> u64 {
    /// Bits reversed.
    const POLYNOMIAL: u64 = 0x9a6c_9329_ac4b_c9b5;
    const TABLE: [u64; 256] = {
        let mut table = [0; 256];
        let mut byte = 0;
        while byte < 256 {
            let mut value = byte as u64;
            let mut bit = 0;
            while bit < 8 {
                value = if value & 1 == 0 { value >> 1 } else { value >> 1 ^ POLYNOMIAL };
                bit += 1;
            }
            table[byte] = value;
            byte += 1;
        }
        table
    };
    !data.iter().fold(!crc, |crc, byte| crc >> 8 ^ TABLE[usize::from(crc as u8 ^ byte)])
}

/// Data and metadata for tests.
#[cfg(test)]
pub(super) mod samples {
    use super::*;

    fn integrity(checksum: Checksum, pi_offset: u8) -> Integrity {
        Integrity {
            metadata_size: pi_offset + checksum.tuple_size().max(8),
            pi_offset,
            checksum,
            tag_size: 0,
            interval: 512,
            verified: true,
            reference_tag: checksum != Checksum::None,
            max_segments: 0,
        }
    }

    /// Number of the interval that the data begins with.
    pub(in super::super) const FIRST: u64 = 1000;

    /// Data of two intervals and its metadata.
    pub(in super::super) fn good(checksum: Checksum, pi_offset: u8) -> (Integrity, Vec<u8>, Vec<u8>) {
        let data: Vec<u8> = (0..1024u32).map(|n| (n * 7 / 4) as u8).collect();
        let mut metadata = Vec::new();
        for (interval, data) in (FIRST..).zip(data.chunks(512)) {
            let before = vec![0x5a; pi_offset.into()];
            metadata.extend(&before);
            match checksum {
                Checksum::None => metadata.extend([0; 8]),
                Checksum::Ip => metadata.extend(internet(data, &before).to_be_bytes()),
                Checksum::Crc16T10Dif => metadata.extend(crc16(crc16(0, data), &before).to_be_bytes()),
                Checksum::Crc64Nvme => metadata.extend(crc64(crc64(0, data), &before).to_be_bytes()),
            }
            match checksum {
                Checksum::None => {}
                Checksum::Crc64Nvme => {
                    metadata.extend([0, 7]);
                    metadata.extend(&interval.to_be_bytes()[2..]);
                }
                _ => {
                    metadata.extend([0, 7]);
                    metadata.extend(&interval.to_be_bytes()[4..]);
                }
            }
        }
        (integrity(checksum, pi_offset), data, metadata)
    }
}

#[cfg(test)]
mod tests {
    use super::samples::good as sample;
    use super::*;

    /// The input for which values of checksums are published.
    const DIGITS: &[u8] = b"123456789";

    #[test]
    fn checksums_are_the_published_ones() {
        assert_eq!(crc16(0, DIGITS), 0xd0db);
        assert_eq!(crc64(0, DIGITS), 0xae8b_1486_0a79_9888);
        // The example of RFC 1071.
        let example = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(internet(&example, &[]), !0xddf2);
        assert_eq!(internet(&example[..2], &example[2..]), !0xddf2);
        assert_eq!(crc16(crc16(0, b"12345"), b"6789"), crc16(0, DIGITS));
        assert_eq!(crc64(crc64(0, b"12345"), b"6789"), crc64(0, DIGITS));
    }

    #[test]
    fn matching_metadata_passes_and_a_flipped_bit_does_not() {
        for checksum in [Checksum::Ip, Checksum::Crc16T10Dif, Checksum::Crc64Nvme] {
            for pi_offset in [0, 8] {
                let (integrity, data, metadata) = sample(checksum, pi_offset);
                check(&integrity, 1000 * 512, &data, &metadata).unwrap();
                let elsewhere = check(&integrity, 1001 * 512, &data, &metadata);
                assert!(matches!(elsewhere, Err(Mismatch::Reference { interval: 1001, found: 1000 })), "{elsewhere:?}");
                let mut wrong = data.clone();
                wrong[700] ^= 4;
                let found = check(&integrity, 1000 * 512, &wrong, &metadata);
                assert!(matches!(found, Err(Mismatch::Guard { interval: 1001, .. })), "{checksum:?}: {found:?}");
                let mut wrong = metadata.clone();
                wrong[usize::from(pi_offset)] ^= 1;
                assert!(check(&integrity, 1000 * 512, &data, &wrong).is_err(), "{checksum:?}");
            }
        }
    }

    #[test]
    fn storage_in_memory_and_in_a_file_is_equivalent() {
        let storages = [Storage::Memory(Sparse::new(1 << 20).unwrap()), Storage::File(tempfile::tempfile().unwrap())];
        for storage in storages {
            let read = |offset| {
                let mut bytes = [1; 8192];
                storage.read(offset, &mut bytes).unwrap();
                bytes
            };
            assert_eq!(read(1000), [0; 8192], "unwritten, and after the end of a file");
            storage.write(3000, &[7; 9000]).unwrap();
            assert_eq!(read(2000)[..2000], [[0; 1000], [7; 1000]].concat());
            assert_eq!(read(10_000)[1990..2010], [[7; 10], [0; 10]].concat());
            storage.zero(4001, 5000).unwrap();
            let around = read(3000);
            assert_eq!((around[1000], around[1001], around[6000], around[6001]), (7, 0, 0, 7));
        }
    }

    #[test]
    fn absent_protection_information_is_not_verified() {
        let (mut integrity, data, metadata) = sample(Checksum::Crc16T10Dif, 0);
        let nothing = vec![0xff; metadata.len()];
        check(&integrity, 0, &data, &nothing).unwrap();
        check(&integrity, 0, &data, &vec![0; metadata.len()]).unwrap();
        integrity.reference_tag = false;
        check(&integrity, 0, &data, &nothing).unwrap();
        // Without reference tags, the application tag alone does not mean absence.
        let mut half = nothing.clone();
        half[4..8].fill(0);
        assert!(check(&integrity, 0, &data, &half).is_err());
        check(&integrity, 5 * 512, &data, &metadata).unwrap();
        let (opaque, data, metadata) = sample(Checksum::None, 0);
        check(&opaque, 0, &data, &metadata).unwrap();
    }
}
