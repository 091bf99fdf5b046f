// SPDX-License-Identifier: MIT OR Apache-2.0

//! Parameters as `struct ublk_params`, and back.

use super::{DiscardLimits, Integrity, Operations, Params, SegmentLimits, ZonedLimits};
use crate::error::{Error, Result};
use crate::uapi::{self, ublk_params};
use crate::units::Sectors;

/// Kinds of parameters that older drivers lack, with their names and first kernels.
const SINCE: [(u32, &str, &str); 4] = [
    (uapi::UBLK_PARAM_TYPE_ZONED, "parameters of zones", "6.6"),
    (uapi::UBLK_PARAM_TYPE_DMA_ALIGN, "a DMA alignment", "6.15"),
    (uapi::UBLK_PARAM_TYPE_SEGMENT, "limits of segments", "6.15"),
    (uapi::UBLK_PARAM_TYPE_INTEGRITY, "parameters of integrity metadata", "7.0"),
];

impl Params {
    /// Checks which kinds of parameters the driver has kept: it drops those that it does not know, silently.
    pub(crate) fn check_stored(&self, stored: &ublk_params) -> Result<()> {
        let dropped = self.encode().types & !stored.types;
        match SINCE.iter().find(|(kind, ..)| dropped & kind != 0) {
            Some(&(_, feature, since)) => Err(Error::Unsupported { feature, since }),
            None => Ok(()),
        }
    }

    /// The parameters for the driver.
    pub(crate) fn encode(&self) -> ublk_params {
        let mut out = ublk_params {
            len: size_of::<ublk_params>() as u32,
            types: uapi::UBLK_PARAM_TYPE_BASIC,
            ..Default::default()
        };
        let mut attrs = 0;
        if self.read_only || !self.operations.contains(Operations::WRITE) {
            attrs |= uapi::UBLK_ATTR_READ_ONLY;
        }
        if self.rotational {
            attrs |= uapi::UBLK_ATTR_ROTATIONAL;
        }
        if self.operations.contains(Operations::FLUSH) {
            attrs |= uapi::UBLK_ATTR_VOLATILE_CACHE;
        }
        if self.operations.contains(Operations::FUA) {
            attrs |= uapi::UBLK_ATTR_FUA;
        }
        let shift = |value: u32| if value == 0 { 0 } else { value.ilog2() as u8 };
        out.basic.attrs = attrs;
        out.basic.logical_bs_shift = shift(self.logical_block_size);
        out.basic.physical_bs_shift = shift(self.physical_block_size);
        out.basic.io_min_shift = shift(self.io_min);
        out.basic.io_opt_shift = shift(self.io_opt);
        out.basic.max_sectors = self.max_io_bytes >> 9;
        out.basic.dev_sectors = Sectors::from_bytes(self.size).0;
        if self.operations.intersects(Operations::DISCARD | Operations::WRITE_ZEROES) {
            out.types |= uapi::UBLK_PARAM_TYPE_DISCARD;
            out.discard.discard_granularity = self.discard.granularity;
            if self.operations.contains(Operations::DISCARD) {
                out.discard.max_discard_sectors = self.discard.max_discard_sectors;
                out.discard.max_discard_segments = 1;
            }
            if self.operations.contains(Operations::WRITE_ZEROES) {
                out.discard.max_write_zeroes_sectors = self.discard.max_write_zeroes_sectors;
            }
        }
        out.basic.chunk_sectors = self.chunk_size >> 9;
        out.basic.virt_boundary_mask = self.virt_boundary_mask;
        out.discard.discard_alignment = self.discard.alignment;
        if let Some(alignment) = self.dma_alignment {
            out.types |= uapi::UBLK_PARAM_TYPE_DMA_ALIGN;
            out.dma.alignment = alignment - 1;
        }
        if let Some(segments) = self.segments {
            out.types |= uapi::UBLK_PARAM_TYPE_SEGMENT;
            segments.encode(&mut out.seg);
        }
        if let Some(zoned) = self.zoned {
            out.types |= uapi::UBLK_PARAM_TYPE_ZONED;
            out.zoned.max_open_zones = zoned.max_open;
            out.zoned.max_active_zones = zoned.max_active;
            out.zoned.max_zone_append_sectors = zoned.max_append_bytes >> 9;
        }
        if let Some(integrity) = self.integrity {
            out.types |= uapi::UBLK_PARAM_TYPE_INTEGRITY;
            integrity.encode(&mut out.integrity);
        }
        out
    }

    /// The parameters from the driver.
    pub(crate) fn decode(raw: &ublk_params) -> Self {
        let size_of_shift = |shift: u8| 1u32.checked_shl(u32::from(shift)).unwrap_or(0);
        let basic = &raw.basic;
        let has = |kind: u32| raw.types & kind != 0;
        let mut operations = Operations::empty();
        operations.set(Operations::WRITE, basic.attrs & uapi::UBLK_ATTR_READ_ONLY == 0);
        operations.set(Operations::FLUSH, basic.attrs & uapi::UBLK_ATTR_VOLATILE_CACHE != 0);
        operations.set(Operations::FUA, basic.attrs & uapi::UBLK_ATTR_FUA != 0);
        if raw.types & uapi::UBLK_PARAM_TYPE_DISCARD != 0 {
            operations.set(Operations::DISCARD, raw.discard.max_discard_sectors != 0);
            operations.set(Operations::WRITE_ZEROES, raw.discard.max_write_zeroes_sectors != 0);
        }
        Params {
            size: Sectors(basic.dev_sectors).bytes(),
            logical_block_size: size_of_shift(basic.logical_bs_shift),
            physical_block_size: size_of_shift(basic.physical_bs_shift),
            io_min: size_of_shift(basic.io_min_shift),
            io_opt: if basic.io_opt_shift == 0 { 0 } else { size_of_shift(basic.io_opt_shift) },
            max_io_bytes: basic.max_sectors << 9,
            operations,
            read_only: basic.attrs & uapi::UBLK_ATTR_READ_ONLY != 0,
            rotational: basic.attrs & uapi::UBLK_ATTR_ROTATIONAL != 0,
            discard: DiscardLimits {
                granularity: raw.discard.discard_granularity,
                alignment: raw.discard.discard_alignment,
                max_discard_sectors: raw.discard.max_discard_sectors,
                max_write_zeroes_sectors: raw.discard.max_write_zeroes_sectors,
            },
            chunk_size: basic.chunk_sectors << 9,
            virt_boundary_mask: basic.virt_boundary_mask,
            dma_alignment: has(uapi::UBLK_PARAM_TYPE_DMA_ALIGN).then(|| raw.dma.alignment.saturating_add(1)),
            segments: has(uapi::UBLK_PARAM_TYPE_SEGMENT).then(|| SegmentLimits::decode(&raw.seg)),
            zoned: has(uapi::UBLK_PARAM_TYPE_ZONED).then_some(ZonedLimits {
                max_open: raw.zoned.max_open_zones,
                max_active: raw.zoned.max_active_zones,
                max_append_bytes: raw.zoned.max_zone_append_sectors << 9,
            }),
            integrity: has(uapi::UBLK_PARAM_TYPE_INTEGRITY).then(|| Integrity::decode(&raw.integrity)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_of_parameters_that_the_driver_dropped_is_named() {
        let mut params = Params::new(1 << 20, 512);
        params.dma_alignment = Some(512);
        let mut stored = params.encode();
        params.check_stored(&stored).unwrap();
        stored.types = uapi::UBLK_PARAM_TYPE_BASIC;
        let error = params.check_stored(&stored).unwrap_err().to_string();
        assert!(error.contains("DMA alignment") && error.contains("6.15"), "{error}");
    }
}
