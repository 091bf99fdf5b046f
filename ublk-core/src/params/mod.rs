// SPDX-License-Identifier: MIT OR Apache-2.0

//! Typed device parameters.
//!
//! * [`limits`] — those that only some disks have: memory, segments, zones, integrity.
//! * [`encode`] — their form as `struct ublk_params`.
//!
//! The rules of [`Params::validate`] are the driver's own (Linux 7.3, the strictest so far), checked
//! here first so that a mistake is named instead of answered with `EINVAL`.

mod encode;
mod limits;

use bitflags::bitflags;

pub use self::limits::{Checksum, Integrity, SegmentLimits, ZonedLimits};
use crate::error::{Error, Parameter, Result};

bitflags! {
    /// Operations that a target supports besides reads. What is missing here is not advertised, and the kernel
    /// then never sends it:
    ///
    /// * without `WRITE` the disk is read-only;
    /// * without `FLUSH` the disk counts as write-through: `fsync` on it sends nothing;
    /// * without `FUA` the block layer follows such a write by a flush;
    /// * without `DISCARD`, `blkdiscard` and `fstrim` fail with `EOPNOTSUPP`;
    /// * without `WRITE_ZEROES` the block layer writes pages of zeros.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Operations: u32 {
        /// Writes; without it the disk is read-only.
        const WRITE = 1;
        /// Flush: everything acknowledged before it must survive a crash after it.
        const FLUSH = 1 << 1;
        /// Forced unit access: a write that is durable when it is acknowledged. Needs `FLUSH`.
        const FUA = 1 << 2;
        /// Discard: the range's content is no longer needed.
        const DISCARD = 1 << 3;
        /// Write zeroes without sending them.
        const WRITE_ZEROES = 1 << 4;
    }
}

/// Limits of discard and write-zeroes requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiscardLimits {
    /// Smallest unit that a discard can free, in bytes.
    pub granularity: u32,
    /// Where on the disk the first such unit begins, in bytes.
    pub alignment: u32,
    /// Longest discard in sectors.
    pub max_discard_sectors: u32,
    /// Longest write-zeroes in sectors.
    pub max_write_zeroes_sectors: u32,
}

/// The shape of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Params {
    /// Capacity in bytes, a multiple of the logical block size.
    pub size: u64,
    /// Smallest addressable unit in bytes: a power of two from 512 to the page size.
    pub logical_block_size: u32,
    /// Smallest unit that is written without read-modify-write, in bytes: a power of two, at least
    /// the logical block size.
    pub physical_block_size: u32,
    /// Preferred smallest request in bytes, a power of two.
    pub io_min: u32,
    /// Preferred request for streaming in bytes, a power of two, or 0 for no preference.
    pub io_opt: u32,
    /// Longest read or write in bytes: from a page to what one request's buffer holds.
    pub max_io_bytes: u32,
    /// What the target can do.
    pub operations: Operations,
    /// The disk refuses writes even if the target could do them.
    pub read_only: bool,
    /// The disk is reported as rotational, which changes what schedulers and file systems assume.
    pub rotational: bool,
    /// Limits of discard and write-zeroes, used for those of the two that `operations` holds.
    pub discard: DiscardLimits,
    /// No request crosses a multiple of this many bytes: a multiple of the logical block size, or 0 for no
    /// such limit. On a zoned disk the size of a zone, a power of two.
    pub chunk_size: u32,
    /// Within a request, memory may only break at multiples of this mask plus one: 0 for any position, a power of
    /// two minus one, at least 511.
    pub virt_boundary_mask: u64,
    /// What the addresses of clients' memory have to be a multiple of, in bytes: a power of two from 2 to the
    /// page size. By default the driver's, 4. Linux 6.15.
    pub dma_alignment: Option<u32>,
    /// How many pieces a request's memory may have, and how large. Linux 6.15.
    pub segments: Option<SegmentLimits>,
    /// Zones. Linux 6.6.
    pub zoned: Option<ZonedLimits>,
    /// Integrity metadata with each block. Linux 7.0.
    pub integrity: Option<Integrity>,
}

/// Longest read or write by default.
pub const DEFAULT_MAX_IO_BYTES: u32 = 512 << 10;

/// Longest read or write in bytes that a device can be created for.
pub const MAX_IO_BYTES: u32 = 32 << 20;

/// The driver limits a logical block to a page.
const PAGE_SIZE: u32 = 4096;
/// Shifts of sizes other than the logical block may not exceed this (7.3 checks it, 6.12 does not).
const MAX_SHIFT: u32 = 28;

impl Params {
    /// A disk of `size` bytes with blocks of `logical_block_size`, everything else by default: read
    /// and write, no write cache, no discard.
    pub fn new(size: u64, logical_block_size: u32) -> Self {
        Params {
            size,
            logical_block_size,
            physical_block_size: logical_block_size,
            io_min: logical_block_size,
            io_opt: 0,
            max_io_bytes: DEFAULT_MAX_IO_BYTES,
            operations: Operations::WRITE,
            read_only: false,
            rotational: false,
            discard: DiscardLimits {
                granularity: logical_block_size,
                alignment: 0,
                max_discard_sectors: u32::MAX >> 9,
                max_write_zeroes_sectors: u32::MAX >> 9,
            },
            chunk_size: 0,
            virt_boundary_mask: 0,
            dma_alignment: None,
            segments: None,
            zoned: None,
            integrity: None,
        }
    }

    /// Sets the [physical block size](field@Self::physical_block_size).
    pub fn physical_block_size(self, physical_block_size: u32) -> Self {
        Params { physical_block_size, ..self }
    }

    /// Sets the [longest read or write](field@Self::max_io_bytes).
    pub fn max_io_bytes(self, max_io_bytes: u32) -> Self {
        Params { max_io_bytes, ..self }
    }

    /// Sets the [operations](field@Self::operations) that the target can do.
    pub fn operations(self, operations: Operations) -> Self {
        Params { operations, ..self }
    }

    /// Makes the disk [read-only](field@Self::read_only), or not.
    pub fn read_only(self, read_only: bool) -> Self {
        Params { read_only, ..self }
    }

    /// Makes the disk [rotational](field@Self::rotational), or not.
    pub fn rotational(self, rotational: bool) -> Self {
        Params { rotational, ..self }
    }

    /// Sets the [chunk size](field@Self::chunk_size).
    pub fn chunk_size(self, chunk_size: u32) -> Self {
        Params { chunk_size, ..self }
    }

    /// Checks what the driver would check, and what it does not.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] with the field, its value and the rule.
    pub fn validate(&self) -> Result<()> {
        let block = self.logical_block_size;
        if !block.is_power_of_two() || !(512..=PAGE_SIZE).contains(&block) {
            return Err(Error::invalid(
                Parameter::LogicalBlockSize,
                block,
                format!("must be a power of two from 512 to {PAGE_SIZE} bytes"),
            ));
        }
        if self.size == 0 {
            return Err(Error::invalid(Parameter::Size, 0, "must be at least one block"));
        }
        if !self.size.is_multiple_of(u64::from(block)) {
            return Err(Error::invalid(
                Parameter::Size,
                self.size,
                format!("not a multiple of the logical block size of {block} bytes"),
            ));
        }
        if self.size > i64::MAX as u64 {
            return Err(Error::invalid(
                Parameter::Size,
                self.size,
                format!("the kernel's limit is {} bytes", i64::MAX),
            ));
        }
        let physical = self.physical_block_size;
        if !physical.is_power_of_two() || physical < block || physical.ilog2() > MAX_SHIFT {
            return Err(Error::invalid(
                Parameter::PhysicalBlockSize,
                physical,
                format!("must be a power of two from the logical block size ({block}) to 2^{MAX_SHIFT} bytes"),
            ));
        }
        for (parameter, value, optional) in
            [(Parameter::IoMin, self.io_min, false), (Parameter::IoOpt, self.io_opt, true)]
        {
            if optional && value == 0 {
                continue;
            }
            if !value.is_power_of_two() || value < block || value.ilog2() > MAX_SHIFT {
                return Err(Error::invalid(
                    parameter,
                    value,
                    format!("must be a power of two from the logical block size ({block}) to 2^{MAX_SHIFT} bytes"),
                ));
            }
        }
        if self.max_io_bytes < PAGE_SIZE
            || self.max_io_bytes > MAX_IO_BYTES
            || !self.max_io_bytes.is_multiple_of(PAGE_SIZE)
        {
            return Err(Error::invalid(
                Parameter::MaxIoBytes,
                self.max_io_bytes,
                format!("must be a multiple of {PAGE_SIZE} of at most {} bytes", MAX_IO_BYTES),
            ));
        }
        if self.operations.contains(Operations::FUA) && !self.operations.contains(Operations::FLUSH) {
            return Err(Error::invalid(
                Parameter::Operations,
                format!("{:?}", self.operations),
                "FUA without FLUSH has no effect in the block layer",
            ));
        }
        if self.operations.intersects(Operations::DISCARD | Operations::WRITE_ZEROES) {
            if !self.operations.contains(Operations::WRITE) {
                return Err(Error::invalid(
                    Parameter::Operations,
                    format!("{:?}", self.operations),
                    "DISCARD and WRITE_ZEROES change data, so they need WRITE",
                ));
            }
            let granularity = self.discard.granularity;
            if granularity == 0 || !granularity.is_multiple_of(block) {
                return Err(Error::invalid(
                    Parameter::DiscardGranularity,
                    granularity,
                    format!("must be a multiple of the logical block size ({block})"),
                ));
            }
            let alignment = self.discard.alignment;
            if alignment >= granularity || !alignment.is_multiple_of(block) {
                return Err(Error::invalid(
                    Parameter::DiscardAlignment,
                    alignment,
                    format!("must be a multiple of the logical block size ({block}) and less than the granularity"),
                ));
            }
            for (parameter, operation, sectors) in [
                (Parameter::MaxDiscard, Operations::DISCARD, self.discard.max_discard_sectors),
                (Parameter::MaxWriteZeroes, Operations::WRITE_ZEROES, self.discard.max_write_zeroes_sectors),
            ] {
                if self.operations.contains(operation) && sectors < block >> 9 {
                    let bytes = u64::from(sectors) << 9;
                    return Err(Error::invalid(parameter, bytes, format!("must be at least a block ({block} bytes)")));
                }
            }
        }
        self.validate_limits()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::uapi;
    use proptest::prelude::*;

    fn refused(params: Params) -> String {
        params.validate().expect_err("must be refused").to_string()
    }

    #[test]
    fn block_sizes_are_powers_of_two_from_512_to_a_page() {
        for bad in [0, 1, 256, 513, 1000, 3072, 8192] {
            let message = refused(Params::new(1 << 20, bad));
            assert!(message.contains("logical block size") && message.contains(&bad.to_string()), "{message}");
        }
        for good in [512, 1024, 2048, 4096] {
            Params::new(1 << 20, good).validate().unwrap();
        }
    }

    #[test]
    fn a_size_is_whole_blocks_and_not_zero() {
        assert!(refused(Params::new(0, 512)).contains("at least one block"));
        assert!(refused(Params::new(1000, 512)).contains("multiple of the logical block size"));
        assert!(refused(Params::new(4096 + 512, 4096)).contains("multiple"));
        assert!(refused(Params::new(u64::MAX - 511, 512)).contains("limit"));
    }

    #[test]
    fn fua_needs_flush_and_discard_needs_write() {
        let mut params = Params::new(1 << 20, 512);
        params.operations = Operations::WRITE | Operations::FUA;
        assert!(refused(params).contains("FUA without FLUSH"));
        params.operations = Operations::DISCARD;
        assert!(refused(params).contains("need WRITE"));
    }

    #[test]
    fn what_is_not_offered_is_not_advertised() {
        let mut params = Params::new(1 << 20, 512);
        params.operations = Operations::empty();
        let raw = params.encode();
        assert_eq!(raw.basic.attrs, uapi::UBLK_ATTR_READ_ONLY);
        assert_eq!(raw.types, uapi::UBLK_PARAM_TYPE_BASIC);
        assert_eq!(raw.discard.max_discard_sectors, 0);
    }

    #[test]
    fn write_zeroes_alone_sends_no_discard_limit() {
        let mut params = Params::new(1 << 20, 512);
        params.operations = Operations::WRITE | Operations::WRITE_ZEROES;
        let raw = params.encode();
        assert_ne!(raw.types & uapi::UBLK_PARAM_TYPE_DISCARD, 0);
        assert_eq!((raw.discard.max_discard_sectors, raw.discard.max_discard_segments), (0, 0));
        assert_ne!(raw.discard.max_write_zeroes_sectors, 0);
        assert_eq!(raw.discard.discard_granularity, 512, "the driver refuses a granularity of 0");
    }

    #[test]
    fn discards_begin_and_end_with_blocks() {
        let change = |change: fn(&mut DiscardLimits)| {
            let mut params = Params::new(1 << 20, 4096);
            params.operations = Operations::all();
            params.discard.granularity = 16384;
            change(&mut params.discard);
            params
        };
        change(|discard| discard.alignment = 8192).validate().unwrap();
        assert!(refused(change(|discard| discard.alignment = 16384)).contains("discard alignment"));
        assert!(refused(change(|discard| discard.alignment = 512)).contains("discard alignment"));
        assert!(refused(change(|discard| discard.granularity = 512)).contains("discard granularity"));
        assert!(refused(change(|discard| discard.max_discard_sectors = 7)).contains("longest discard"));
        assert!(refused(change(|discard| discard.max_write_zeroes_sectors = 0)).contains("longest write of zeros"));
    }

    proptest! {
        #[test]
        fn encoding_is_undone_by_decoding(
            blocks in 1u64..1 << 40,
            shift in 9u32..=12,
            more in 0u32..=4,
            io_pages in 1u32..=1024,
            bits in 0u32..32,
            rotational: bool,
        ) {
            let block = 1u32 << shift;
            let mut params = Params::new(blocks << shift, block);
            params.physical_block_size = block << more;
            params.io_min = block << more;
            params.io_opt = if more == 0 { 0 } else { block << more };
            params.max_io_bytes = io_pages * PAGE_SIZE;
            params.rotational = rotational;
            params.operations = Operations::from_bits_truncate(bits);
            prop_assume!(params.validate().is_ok());
            let decoded = Params::decode(&params.encode());
            prop_assert_eq!(decoded.operations, params.operations);
            prop_assert_eq!(
                (decoded.size, decoded.logical_block_size, decoded.physical_block_size, decoded.io_min, decoded.io_opt,
                 decoded.max_io_bytes, decoded.rotational),
                (params.size, params.logical_block_size, params.physical_block_size, params.io_min, params.io_opt,
                 params.max_io_bytes, params.rotational)
            );
        }
    }
}
