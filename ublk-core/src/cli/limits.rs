// SPDX-License-Identifier: MIT OR Apache-2.0

//! The limits of a disk in `ublk list`. Lengths are in bytes.

use serde::Serialize;

use crate::params::{Checksum, Integrity, Operations, Params, SegmentLimits, ZonedLimits};

/// The limits of a disk as JSON. What the disk does not have is null, what has no limit is 0.
#[derive(Debug, Serialize)]
pub(super) struct Limits {
    io_min: u32,
    io_opt: u32,
    chunk_size: u64,
    virt_boundary_mask: u64,
    dma_alignment: Option<u32>,
    segments: Option<Segments>,
    discard_limits: Option<Discard>,
    zoned: Option<Zoned>,
    integrity: Option<Metadata>,
}

#[derive(Debug, Serialize)]
struct Segments {
    boundary_mask: u64,
    max_size: u32,
    max_count: u16,
}

#[derive(Debug, Serialize)]
struct Discard {
    granularity: u32,
    alignment: u32,
    max_discard: u64,
    max_write_zeroes: u64,
}

#[derive(Debug, Serialize)]
struct Zoned {
    max_open: u32,
    max_active: u32,
    max_append: u32,
}

#[derive(Debug, Serialize)]
struct Metadata {
    metadata_size: u8,
    interval: u32,
    checksum: &'static str,
    pi_offset: u8,
    tag_size: u8,
    verified: bool,
    reference_tag: bool,
    max_segments: u16,
}

impl Limits {
    pub(super) fn of(params: &Params) -> Self {
        let discards = params.operations.intersects(Operations::DISCARD | Operations::WRITE_ZEROES);
        let bytes = |operation, sectors: u32| {
            if params.operations.contains(operation) { u64::from(sectors) << 9 } else { 0 }
        };
        Limits {
            io_min: params.io_min,
            io_opt: params.io_opt,
            chunk_size: params.chunk_size.into(),
            virt_boundary_mask: params.virt_boundary_mask,
            dma_alignment: params.dma_alignment,
            segments: params.segments.map(|SegmentLimits { boundary_mask, max_size, max_count }| Segments {
                boundary_mask,
                max_size,
                max_count,
            }),
            discard_limits: discards.then(|| Discard {
                granularity: params.discard.granularity,
                alignment: params.discard.alignment,
                max_discard: bytes(Operations::DISCARD, params.discard.max_discard_sectors),
                max_write_zeroes: bytes(Operations::WRITE_ZEROES, params.discard.max_write_zeroes_sectors),
            }),
            zoned: params.zoned.map(|ZonedLimits { max_open, max_active, max_append_bytes }| Zoned {
                max_open,
                max_active,
                max_append: max_append_bytes,
            }),
            integrity: params.integrity.map(metadata),
        }
    }

    /// Describes what differs from an ordinary disk.
    pub(super) fn describe(&self, physical_block_size: u32) -> Vec<String> {
        let mut parts = Vec::new();
        let mut add = |wanted: bool, text: String| {
            if wanted {
                parts.push(text);
            }
        };
        add(self.io_min != physical_block_size, format!("io_min {}", self.io_min));
        add(self.io_opt != 0, format!("io_opt {}", self.io_opt));
        add(self.chunk_size != 0 && self.zoned.is_none(), format!("chunk size {}", self.chunk_size));
        add(self.virt_boundary_mask != 0, format!("virt boundary mask {:#x}", self.virt_boundary_mask));
        if let Some(alignment) = self.dma_alignment {
            add(true, format!("DMA alignment {alignment}"));
        }
        if let Some(segments) = &self.segments {
            add(segments.max_count != 0, format!("at most {} segments", segments.max_count));
            add(segments.max_size != 0, format!("segments of at most {} bytes", segments.max_size));
            add(segments.boundary_mask != 0, format!("segment boundary mask {:#x}", segments.boundary_mask));
        }
        if let Some(zoned) = &self.zoned {
            let limit = |limit: u32| if limit == 0 { "any number".to_owned() } else { limit.to_string() };
            add(true, format!("zones of {} bytes", self.chunk_size));
            add(true, format!("{} open and {} active", limit(zoned.max_open), limit(zoned.max_active)));
        }
        if let Some(metadata) = &self.integrity {
            let Metadata { metadata_size, interval, checksum, .. } = metadata;
            add(true, format!("{metadata_size} bytes of metadata per {interval}, checksum {checksum}"));
        }
        parts
    }
}

fn metadata(integrity: Integrity) -> Metadata {
    let Integrity { metadata_size, pi_offset, checksum, tag_size, interval, verified, reference_tag, max_segments } =
        integrity;
    let checksum = match checksum {
        Checksum::None => "none",
        Checksum::Ip => "ip",
        Checksum::Crc16T10Dif => "crc16-t10dif",
        Checksum::Crc64Nvme => "crc64-nvme",
    };
    Metadata { metadata_size, interval, checksum, pi_offset, tag_size, verified, reference_tag, max_segments }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ordinary_disk_has_no_description() {
        let limits = Limits::of(&Params::new(1 << 30, 512));
        assert!(limits.describe(512).is_empty());
        assert!(limits.discard_limits.is_none());
    }

    #[test]
    fn unusual_limits_are_described() {
        let mut params = Params::new(1 << 30, 4096);
        params.chunk_size = 1 << 20;
        params.zoned = Some(ZonedLimits { max_open: 3, max_active: 0, max_append_bytes: 65536 });
        params.segments = Some(SegmentLimits { max_count: 32, ..SegmentLimits::default() });
        params.dma_alignment = Some(512);
        params.integrity = Some(Integrity {
            metadata_size: 8,
            pi_offset: 0,
            checksum: Checksum::Ip,
            tag_size: 0,
            interval: 512,
            verified: true,
            reference_tag: false,
            max_segments: 0,
        });
        let text = Limits::of(&params).describe(4096).join(", ");
        assert_eq!(
            text,
            "DMA alignment 512, at most 32 segments, zones of 1048576 bytes, 3 open and any number active, \
             8 bytes of metadata per 512, checksum ip"
        );
    }
}
