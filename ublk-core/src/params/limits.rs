// SPDX-License-Identifier: MIT OR Apache-2.0

//! Limits that only some disks have.

use super::{PAGE_SIZE, Params};
use crate::error::{Error, Parameter, Result};
use crate::uapi::{ublk_param_integrity, ublk_param_segment};

/// Limits on the number and size of the pieces of a request's memory. 0 is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SegmentLimits {
    /// No piece crosses a multiple of this mask plus one: a power of two minus one, from 4095 to 2^63 - 1.
    pub boundary_mask: u64,
    /// Longest piece in bytes, at least 4096.
    pub max_size: u32,
    /// Most pieces.
    pub max_count: u16,
}

impl SegmentLimits {
    /// Sets the [number of pieces](field@Self::max_count).
    pub fn max_count(self, max_count: u16) -> Self {
        SegmentLimits { max_count, ..self }
    }

    /// The widest mask that the driver takes: it wants its successor to be a power of two.
    const NO_BOUNDARY: u64 = u64::MAX >> 1;

    /// The driver has no "no limit", and the block layer takes a 0 for a narrow one.
    pub(super) fn encode(self, out: &mut ublk_param_segment) {
        let or = |value: u64, none: u64| if value == 0 { none } else { value };
        out.seg_boundary_mask = or(self.boundary_mask, Self::NO_BOUNDARY);
        out.max_segment_size = or(self.max_size.into(), u32::MAX.into()) as u32;
        out.max_segments = or(self.max_count.into(), u16::MAX.into()) as u16;
    }

    pub(super) fn decode(raw: &ublk_param_segment) -> Self {
        let unless = |value: u64, none: u64| if value == none { 0 } else { value };
        SegmentLimits {
            boundary_mask: unless(raw.seg_boundary_mask, Self::NO_BOUNDARY),
            max_size: unless(raw.max_segment_size.into(), u32::MAX.into()) as u32,
            max_count: unless(raw.max_segments.into(), u16::MAX.into()) as u16,
        }
    }

    fn validate(&self) -> Result<()> {
        let mask = self.boundary_mask;
        if mask != 0 && !is_mask(mask, 4095) {
            let rule = "must be a power of two minus one, from 4095 to 2^63 - 1";
            return Err(Error::invalid(Parameter::SegmentBoundaryMask, mask, rule));
        }
        if self.max_size != 0 && self.max_size < PAGE_SIZE {
            return Err(Error::invalid(
                Parameter::MaxSegmentSize,
                self.max_size,
                format!("at least {PAGE_SIZE} bytes"),
            ));
        }
        Ok(())
    }
}

/// Returns whether it is a power of two minus one, at least `least`.
fn is_mask(mask: u64, least: u64) -> bool {
    mask >= least && mask.checked_add(1).is_some_and(u64::is_power_of_two)
}

/// Limits of a zoned disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ZonedLimits {
    /// Most open zones; 0 for no limit.
    pub max_open: u32,
    /// Most active zones, open or closed; 0 for no limit.
    pub max_active: u32,
    /// Longest zone append in bytes.
    pub max_append_bytes: u32,
}

impl ZonedLimits {
    /// No limits of open and active zones, and zone appends of at most `max_append_bytes`.
    pub fn new(max_append_bytes: u32) -> Self {
        ZonedLimits { max_open: 0, max_active: 0, max_append_bytes }
    }
}

/// Kind of checksum of a block's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    /// Nothing: opaque metadata.
    #[default]
    None,
    /// The Internet checksum, in 8 bytes of protection information.
    Ip,
    /// CRC-16 of T10 DIF, in 8 bytes.
    Crc16T10Dif,
    /// CRC-64 of NVMe, in 16 bytes.
    Crc64Nvme,
}

impl Checksum {
    /// Numbers of `linux/fs.h`.
    const ALL: [(Checksum, u8); 4] =
        [(Checksum::None, 0), (Checksum::Ip, 1), (Checksum::Crc16T10Dif, 2), (Checksum::Crc64Nvme, 4)];

    fn number(self) -> u8 {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, number)| *number)
    }

    fn of_number(number: u8) -> Self {
        Self::ALL.iter().find(|(_, n)| *n == number).map_or(Checksum::None, |(kind, _)| *kind)
    }

    /// Bytes of protection information.
    pub fn tuple_size(self) -> u8 {
        match self {
            Checksum::None => 0,
            Checksum::Ip | Checksum::Crc16T10Dif => 8,
            Checksum::Crc64Nvme => 16,
        }
    }
}

/// Integrity metadata that travels with each block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Integrity {
    /// Bytes of metadata for each interval.
    pub metadata_size: u8,
    /// Offset of the protection information in those.
    pub pi_offset: u8,
    /// What guards the data.
    pub checksum: Checksum,
    /// Bytes of the application's tag.
    pub tag_size: u8,
    /// Bytes of data that share metadata: a power of two from 512 to the logical block size.
    pub interval: u32,
    /// The block layer checks and makes protection information (`LBMD_PI_CAP_INTEGRITY`).
    pub verified: bool,
    /// The information holds the block's number (`LBMD_PI_CAP_REFTAG`).
    pub reference_tag: bool,
    /// Most pieces of metadata of a request; 0 for no limit.
    pub max_segments: u16,
}

/// From `linux/fs.h`.
const CAP_INTEGRITY: u32 = 1;
const CAP_REFERENCE_TAG: u32 = 2;

impl Integrity {
    /// `metadata_size` bytes of metadata for each `interval` bytes of data, without protection information.
    pub fn new(metadata_size: u8, interval: u32) -> Self {
        Integrity {
            metadata_size,
            pi_offset: 0,
            checksum: Checksum::None,
            tag_size: 0,
            interval,
            verified: false,
            reference_tag: false,
            max_segments: 0,
        }
    }

    pub(super) fn encode(&self, out: &mut ublk_param_integrity) {
        out.flags = if self.verified { CAP_INTEGRITY } else { 0 };
        out.flags |= if self.reference_tag { CAP_REFERENCE_TAG } else { 0 };
        out.max_integrity_segments = self.max_segments;
        out.interval_exp = self.interval.ilog2() as u8;
        out.metadata_size = self.metadata_size;
        out.pi_offset = self.pi_offset;
        out.csum_type = self.checksum.number();
        out.tag_size = self.tag_size;
    }

    pub(super) fn decode(raw: &ublk_param_integrity) -> Self {
        Integrity {
            metadata_size: raw.metadata_size,
            pi_offset: raw.pi_offset,
            checksum: Checksum::of_number(raw.csum_type),
            tag_size: raw.tag_size,
            interval: 1u32.checked_shl(raw.interval_exp.into()).unwrap_or(0),
            verified: raw.flags & CAP_INTEGRITY != 0,
            reference_tag: raw.flags & CAP_REFERENCE_TAG != 0,
            max_segments: raw.max_integrity_segments,
        }
    }

    /// Bytes of metadata of a request with so many bytes of data.
    pub fn bytes_for(&self, data: u64) -> u64 {
        data / u64::from(self.interval) * u64::from(self.metadata_size)
    }

    fn validate(&self, block: u32) -> Result<()> {
        if self.metadata_size == 0 {
            return Err(Error::invalid(Parameter::MetadataSize, 0, "must be at least one byte"));
        }
        let end = u16::from(self.pi_offset) + u16::from(self.checksum.tuple_size());
        if end > u16::from(self.metadata_size) {
            return Err(Error::invalid(
                Parameter::PiOffset,
                self.pi_offset,
                format!("with {} bytes it exceeds the metadata's {}", self.checksum.tuple_size(), self.metadata_size),
            ));
        }
        if !self.interval.is_power_of_two() || !(512..=block).contains(&self.interval) {
            let rule = format!("must be a power of two from 512 to the logical block size ({block})");
            return Err(Error::invalid(Parameter::IntegrityInterval, self.interval, rule));
        }
        if self.reference_tag && self.checksum == Checksum::None {
            return Err(Error::invalid(
                Parameter::ReferenceTag,
                true,
                "needs a checksum: it is part of the protection information",
            ));
        }
        Ok(())
    }
}

impl Params {
    pub(super) fn validate_limits(&self) -> Result<()> {
        let block = self.logical_block_size;
        let chunk = self.chunk_size;
        if !chunk.is_multiple_of(block) {
            let rule = format!("must be a multiple of the logical block size ({block})");
            return Err(Error::invalid(Parameter::ChunkSize, chunk, rule));
        }
        let mask = self.virt_boundary_mask;
        if mask != 0 && !is_mask(mask, 511) {
            let rule = "must be a power of two minus one, from 511 to 2^63 - 1";
            return Err(Error::invalid(Parameter::VirtBoundaryMask, mask, rule));
        }
        // The block layer takes a mask of 0 for its own default, 511.
        if let Some(alignment) = self.dma_alignment
            && (!alignment.is_power_of_two() || !(2..=PAGE_SIZE).contains(&alignment))
        {
            let rule = format!("must be a power of two from 2 to {PAGE_SIZE} bytes");
            return Err(Error::invalid(Parameter::DmaAlignment, alignment, rule));
        }
        self.segments.map_or(Ok(()), |segments| segments.validate())?;
        if let Some(zoned) = self.zoned {
            if !chunk.is_power_of_two() {
                return Err(Error::invalid(Parameter::ZoneSize, chunk, "must be a power of two"));
            }
            let zones = self.size / u64::from(chunk);
            for (parameter, value) in
                [(Parameter::MaxOpenZones, zoned.max_open), (Parameter::MaxActiveZones, zoned.max_active)]
            {
                if u64::from(value) > zones {
                    return Err(Error::invalid(parameter, value, format!("the disk has {zones} zones")));
                }
            }
            if zoned.max_active != 0 && zoned.max_open > zoned.max_active {
                let rule = format!("open zones are active, of which there may be {}", zoned.max_active);
                return Err(Error::invalid(Parameter::MaxOpenZones, zoned.max_open, rule));
            }
            let append = zoned.max_append_bytes;
            if append == 0 || !append.is_multiple_of(block) {
                let rule = format!("must be a multiple of the logical block size ({block})");
                return Err(Error::invalid(Parameter::MaxZoneAppend, append, rule));
            }
        }
        self.integrity.map_or(Ok(()), |integrity| integrity.validate(block))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(change: impl FnOnce(&mut Params)) -> Params {
        let mut params = Params::new(64 << 20, 4096);
        change(&mut params);
        params
    }

    const PI: Integrity = Integrity {
        metadata_size: 16,
        pi_offset: 8,
        checksum: Checksum::Crc16T10Dif,
        tag_size: 2,
        interval: 4096,
        verified: true,
        reference_tag: true,
        max_segments: 0,
    };

    #[test]
    fn every_limit_survives_its_encoding() {
        let all = params(|p| {
            p.chunk_size = 1 << 20;
            p.virt_boundary_mask = 4095;
            p.dma_alignment = Some(512);
            p.segments = Some(SegmentLimits { boundary_mask: 65535, max_size: 8192, max_count: 7 });
            p.zoned = Some(ZonedLimits { max_open: 4, max_active: 8, max_append_bytes: 65536 });
            p.integrity = Some(PI);
            p.discard.alignment = 4096;
        });
        all.validate().unwrap();
        assert_eq!(Params::decode(&all.encode()).segments, all.segments);
        let back = Params::decode(&all.encode());
        assert_eq!((back.chunk_size, back.virt_boundary_mask), (all.chunk_size, all.virt_boundary_mask));
        assert_eq!((back.dma_alignment, back.zoned, back.integrity), (all.dma_alignment, all.zoned, all.integrity));
        assert_eq!(back.discard.alignment, 4096);
    }

    #[test]
    fn a_segment_limit_that_is_not_set_is_none_for_the_driver() {
        let one = params(|p| p.segments = Some(SegmentLimits { max_count: 32, ..SegmentLimits::default() }));
        one.validate().unwrap();
        let raw = one.encode().seg;
        assert_eq!((raw.max_segments, raw.max_segment_size), (32, u32::MAX));
        // What the driver wants of it.
        assert!((raw.seg_boundary_mask + 1).is_power_of_two() && raw.seg_boundary_mask >= 4095);
        assert_eq!(Params::decode(&one.encode()).segments, one.segments);
    }

    #[test]
    fn chunks_of_a_disk_without_zones_are_of_any_number_of_blocks() {
        params(|p| p.chunk_size = 192 << 10).validate().unwrap();
    }

    #[test]
    fn each_rule_names_its_field() {
        let zoned = ZonedLimits { max_open: 0, max_active: 0, max_append_bytes: 4096 };
        let segments = SegmentLimits::default();
        for (bad, words) in [
            (params(|p| p.chunk_size = 2048), "chunk size"),
            (params(|p| p.chunk_size = 4096 + 512), "chunk size"),
            (params(|p| p.virt_boundary_mask = 255), "virt boundary"),
            (params(|p| p.virt_boundary_mask = 4096), "virt boundary"),
            (params(|p| p.virt_boundary_mask = u64::MAX), "virt boundary"),
            (params(|p| p.dma_alignment = Some(0)), "DMA alignment"),
            (params(|p| p.dma_alignment = Some(1)), "DMA alignment"),
            (params(|p| p.dma_alignment = Some(3)), "DMA alignment"),
            (params(|p| p.dma_alignment = Some(8192)), "DMA alignment"),
            (params(|p| p.segments = Some(SegmentLimits { boundary_mask: 2047, ..segments })), "segment boundary"),
            (params(|p| p.segments = Some(SegmentLimits { boundary_mask: u64::MAX, ..segments })), "segment boundary"),
            (params(|p| p.segments = Some(SegmentLimits { max_size: 512, ..segments })), "maximum segment size"),
            (params(|p| p.zoned = Some(zoned)), "zone size"),
            (params(|p| (p.chunk_size, p.zoned) = (3 << 20, Some(zoned))), "zone size"),
            (
                params(|p| {
                    (p.chunk_size, p.zoned) = (1 << 20, Some(ZonedLimits { max_open: 5, max_active: 4, ..zoned }));
                }),
                "open zones",
            ),
            (
                params(|p| (p.chunk_size, p.zoned) = (1 << 20, Some(ZonedLimits { max_open: 65, ..zoned }))),
                "open zones",
            ),
            (
                params(|p| (p.chunk_size, p.zoned) = (1 << 20, Some(ZonedLimits { max_append_bytes: 0, ..zoned }))),
                "zone append",
            ),
            (params(|p| p.integrity = Some(Integrity { metadata_size: 0, ..PI })), "metadata size"),
            (params(|p| p.integrity = Some(Integrity { pi_offset: 9, ..PI })), "offset of the protection"),
            (params(|p| p.integrity = Some(Integrity { interval: 8192, ..PI })), "interval"),
            (params(|p| p.integrity = Some(Integrity { checksum: Checksum::None, ..PI })), "reference tag"),
        ] {
            let message = bad.validate().expect_err(words).to_string();
            assert!(message.contains(words), "{message}");
        }
    }
}
