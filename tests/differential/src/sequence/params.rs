// SPDX-License-Identifier: MIT OR Apache-2.0

//! Parameters of disks, right and wrong.

use anyhow::{Result, bail};

use super::control::Command;
use super::{Device, Sequence};
use crate::agent::Place;
use ublk_test_common::random::Random;
use ublk_test_common::uapi::*;

/// Zone size of zoned devices, in sectors.
pub(super) const ZONE: u32 = 256;

/// What can be wrong with parameters.
const FAULTS: &[&str] = &[
    "no-basic",
    "no-types",
    "lbs-small",
    "lbs-big",
    "pbs-small",
    "pbs-big",
    "io-min-big",
    "io-opt-big",
    "max-sectors-big",
    "max-sectors-small",
    "granularity-0",
    "discard-segments",
    "devt",
    "zoned-flip",
    "append-0",
    "open-zones",
    "active-zones",
    "chunk",
    "dma-big",
    "dma-mask",
    "segment-mask",
    "segment-mask-small",
    "segment-size",
    "segment-0",
    "integrity-flip",
    "integrity-flags",
    "integrity-csum",
    "integrity-size",
    "integrity-reftag",
    "integrity-offset",
    "integrity-interval",
    "unknown-type",
    "len-0",
    "len-8",
    "params-len-0",
    "params-len-more",
    "params-len-short",
    "long",
    "nowhere",
    "fault",
];

/// Parameters that every rule allows.
pub(super) fn valid(random: &mut Random, device: &Device) -> ublk_params {
    let zoned = device.has(UBLK_F_ZONED);
    let shift = if random.chance(60) { 9 } else { random.pick(&[9, 10, 11, 12]) };
    let most = (device.buffer >> 9).max(8);
    let mut params = ublk_params {
        len: size_of::<ublk_params>() as u32,
        types: UBLK_PARAM_TYPE_BASIC,
        basic: ublk_param_basic {
            attrs: random.pick(&[0, 0, 4, 4, 12, 12, 1, 2, 8, 13, 15]),
            logical_bs_shift: shift,
            physical_bs_shift: random.pick(&[shift, shift, 12, 13]),
            io_opt_shift: random.pick(&[12, 12, 9, 16, 0]),
            io_min_shift: random.pick(&[shift, 12, 9, 0]),
            max_sectors: if random.chance(60) { most } else { most.min(random.pick(&[8, 16, 24, 128])) },
            chunk_sectors: if zoned { ZONE } else { random.pick(&[0, 0, 0, 0, 128, 256]) },
            dev_sectors: random.pick(&[2048, 4096, 8192]),
            virt_boundary_mask: random.pick(&[0, 0, 0, 0, 4095]),
        },
        ..Default::default()
    };
    if random.chance(40) {
        params.types |= UBLK_PARAM_TYPE_DISCARD;
        let most = random.pick(&[0, 64, 1024, 8192]);
        params.discard = ublk_param_discard {
            discard_alignment: 0,
            discard_granularity: random.pick(&[4096, 512 << (shift - 9)]),
            max_discard_sectors: most,
            max_write_zeroes_sectors: random.pick(&[0, 64, 1024]),
            max_discard_segments: u16::from(most != 0),
            reserved0: 0,
        };
    }
    if zoned {
        params.types |= UBLK_PARAM_TYPE_ZONED;
        params.zoned = ublk_param_zoned {
            max_open_zones: random.pick(&[0, 2]),
            max_active_zones: random.pick(&[0, 4]),
            max_zone_append_sectors: random.pick(&[8, 64, params.basic.max_sectors]),
            ..Default::default()
        };
    }
    if random.chance(20) {
        params.types |= UBLK_PARAM_TYPE_DMA_ALIGN;
        params.dma.alignment = random.pick(&[0, 3, 511, 4095]);
    }
    if random.chance(15) {
        params.types |= UBLK_PARAM_TYPE_SEGMENT;
        params.seg = ublk_param_segment {
            seg_boundary_mask: random.pick(&[4095, 0xffff, u64::from(u32::MAX)]),
            max_segment_size: random.pick(&[4096, 65536, u32::MAX]),
            // Enough for all that is sent as one request, whatever pages it is in.
            max_segments: random.pick(&[256, 1024, 65535]),
            ..Default::default()
        };
    }
    if device.has(UBLK_F_INTEGRITY) && random.chance(85) {
        params.types |= UBLK_PARAM_TYPE_INTEGRITY;
        let csum = random.pick(&[0u8, 1, 2, 4]);
        let tuple = [0, 8, 8, 0, 16][usize::from(csum)];
        let size = random.pick(&[16u8, 32, 64]);
        params.integrity = ublk_param_integrity {
            flags: if csum == 0 { 0 } else { random.pick(&[0, 1, 3]) },
            max_integrity_segments: random.pick(&[0, 16]),
            interval_exp: random.pick(&[9, shift]),
            metadata_size: size,
            pi_offset: random.pick(&[0, size - tuple]),
            csum_type: csum,
            tag_size: random.pick(&[0, 2]),
            ..Default::default()
        };
    }
    params
}

/// A command whose parameters and length can be spoiled.
struct Draft {
    params: ublk_params,
    len: Option<u16>,
    place: Place,
}

fn spoil(random: &mut Random, case: &str, device: &Device, draft: &mut Draft) -> Result<()> {
    let params = &mut draft.params;
    match case {
        "no-basic" => params.types &= !UBLK_PARAM_TYPE_BASIC,
        "no-types" => params.types = 0,
        "lbs-small" => params.basic.logical_bs_shift = random.pick(&[0, 8]),
        "lbs-big" => {
            params.basic.logical_bs_shift = random.pick(&[13, 16, 255]);
            params.basic.physical_bs_shift = params.basic.logical_bs_shift;
        }
        "pbs-small" => params.basic.physical_bs_shift = params.basic.logical_bs_shift.saturating_sub(1),
        "pbs-big" => params.basic.physical_bs_shift = random.pick(&[29, 31, 64, 255]),
        "io-min-big" => params.basic.io_min_shift = random.pick(&[29, 31, 64, 255]),
        "io-opt-big" => params.basic.io_opt_shift = random.pick(&[29, 31, 64, 255]),
        "max-sectors-big" => params.basic.max_sectors = (device.buffer >> 9) + 1,
        "max-sectors-small" => params.basic.max_sectors = random.pick(&[0, 1, 7]),
        "granularity-0" => {
            params.types |= UBLK_PARAM_TYPE_DISCARD;
            params.discard.discard_granularity = 0;
        }
        "discard-segments" => {
            params.types |= UBLK_PARAM_TYPE_DISCARD;
            params.discard.discard_granularity = 4096;
            params.discard.max_discard_sectors = 64;
            params.discard.max_discard_segments = random.pick(&[0, 2, 65535]);
        }
        "devt" => {
            params.types |= UBLK_PARAM_TYPE_DEVT;
            params.devt.disk_major = random.pick(&[0, 1]);
        }
        "zoned-flip" => {
            params.types ^= UBLK_PARAM_TYPE_ZONED;
            params.zoned.max_zone_append_sectors = 8;
        }
        "append-0" => params.zoned.max_zone_append_sectors = 0,
        "open-zones" => params.zoned.max_open_zones = u32::MAX,
        "active-zones" => params.zoned.max_active_zones = 1000,
        "chunk" => params.basic.chunk_sectors = random.pick(&[3, 100, 0, 255]),
        "dma-big" => {
            params.types |= UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma.alignment = random.pick(&[4096, 8191, u32::MAX]);
        }
        "dma-mask" => {
            params.types |= UBLK_PARAM_TYPE_DMA_ALIGN;
            params.dma.alignment = random.pick(&[2, 510, 4094, 5]);
        }
        "segment-mask" | "segment-mask-small" | "segment-size" | "segment-0" => {
            params.types |= UBLK_PARAM_TYPE_SEGMENT;
            params.seg = ublk_param_segment {
                seg_boundary_mask: 4095,
                max_segment_size: 4096,
                max_segments: 256,
                ..Default::default()
            };
            match case {
                "segment-mask" => params.seg.seg_boundary_mask = random.pick(&[4096, 5000, 0xfffe]),
                "segment-mask-small" => params.seg.seg_boundary_mask = random.pick(&[0, 511, 2047]),
                "segment-size" => params.seg.max_segment_size = random.pick(&[1, 512, 4095]),
                _ => params.seg.max_segment_size = 0,
            }
        }
        "integrity-flip" => params.types ^= UBLK_PARAM_TYPE_INTEGRITY,
        "integrity-flags" | "integrity-csum" | "integrity-size" | "integrity-reftag" | "integrity-offset"
        | "integrity-interval" => {
            params.types |= UBLK_PARAM_TYPE_INTEGRITY;
            params.integrity.interval_exp = params.integrity.interval_exp.max(9);
            params.integrity.metadata_size = params.integrity.metadata_size.max(16);
            match case {
                "integrity-flags" => params.integrity.flags = random.pick(&[4, 0x8000_0000]),
                "integrity-csum" => params.integrity.csum_type = random.pick(&[3, 5, 255]),
                "integrity-size" => params.integrity.metadata_size = 0,
                "integrity-reftag" => {
                    params.integrity.flags = 2;
                    params.integrity.csum_type = 0;
                }
                "integrity-offset" => {
                    params.integrity.csum_type = 4;
                    params.integrity.pi_offset = params.integrity.metadata_size.saturating_sub(15);
                }
                _ => {
                    params.integrity.interval_exp =
                        random.pick(&[0, 8, params.basic.logical_bs_shift.saturating_add(1), 255])
                }
            }
        }
        "unknown-type" => params.types |= random.pick(&[1 << 7, 1 << 31]),
        "len-0" => draft.len = Some(0),
        "len-8" => draft.len = Some(8),
        "params-len-0" => params.len = 0,
        "params-len-more" => params.len += 1,
        "params-len-short" => params.len = random.pick(&[8, 12, 40, 60, 76, 108, 120, 136, 151]),
        "long" => {
            params.len = 200;
            draft.len = Some(200);
        }
        "nowhere" => draft.place = Place::Nowhere,
        "fault" => draft.place = Place::Fault,
        _ => bail!("no such fault: {case}"),
    }
    Ok(())
}

impl Sequence<'_> {
    /// SET_PARAMS with as many things wrong.
    pub(super) fn set_params(&mut self, faults: u32) -> Result<Option<i32>> {
        let device = self.device()?.clone();
        let mut draft = Draft { params: valid(&mut self.random, &device), len: None, place: Place::Roomy };
        let mut cases = Vec::new();
        for _ in 0..faults {
            let case = self.random.pick(FAULTS);
            spoil(&mut self.random, case, &device, &mut draft)?;
            cases.push(case);
        }
        cases.sort_unstable();
        cases.dedup();
        let mut payload = draft.params.bytes();
        payload.resize(200, 0);
        let text: String = draft.params.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut command = Command::new("SET_PARAMS", device.id)
            .case(if cases.is_empty() { "ok".to_owned() } else { cases.join("+") })
            .user(device.owned)
            .payload(payload);
        command.len = Some(draft.len.unwrap_or(size_of::<ublk_params>() as u16));
        command.place = draft.place;
        command.said = format!("params={}", text.trim_end_matches('0'));
        let result = self.control(&command)?;
        if result == Some(0) {
            let whole = draft.params.len as usize >= size_of::<ublk_params>();
            let device = self.device_mut()?;
            device.params = draft.params;
            device.unchecked = faults > 0 && device.has(UBLK_F_ZONED);
            device.unsure = !whole;
        }
        Ok(result)
    }

    /// Asks the driver what the parameters are.
    pub(super) fn learn_params(&mut self) -> Result<()> {
        let id = self.device()?.id;
        let mut payload = vec![0; 152];
        payload[..4].copy_from_slice(&152u32.to_ne_bytes());
        let command = Command::new("GET_PARAMS", id).payload(payload);
        let (result, payload) = self.quietly(&command)?;
        if result == Some(0) {
            let device = self.device_mut()?;
            device.params = ublk_params::from_bytes(payload.get(..152).unwrap_or_default());
            device.unsure = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::State;

    fn device(flags: u64) -> Device {
        Device {
            id: 0,
            flags,
            queues: 1,
            depth: 1,
            buffer: 65536,
            stride: 24,
            state: State::Dead,
            params: ublk_params::default(),
            unsure: true,
            owned: false,
            stopping: false,
            quiesced: false,
            queue_of: [0; 2],
            unchecked: false,
        }
    }

    #[test]
    fn the_same_dice_give_the_same_parameters() {
        for number in 0..100 {
            let draw = || valid(&mut Random::new(5, number), &device(UBLK_F_INTEGRITY));
            assert_eq!(draw(), draw());
        }
    }

    #[test]
    fn right_parameters_keep_the_rules() {
        for number in 0..1000 {
            let device = device(if number % 3 == 0 { UBLK_F_ZONED } else { 0 });
            let params = valid(&mut Random::new(9, number), &device);
            let basic = params.basic;
            assert!((9..=12).contains(&basic.logical_bs_shift), "{basic:?}");
            assert!(basic.physical_bs_shift >= basic.logical_bs_shift, "{basic:?}");
            assert!((8..=128).contains(&basic.max_sectors), "{basic:?}");
            assert_eq!(params.types & UBLK_PARAM_TYPE_ZONED != 0, device.has(UBLK_F_ZONED));
            assert_eq!(params.types & UBLK_PARAM_TYPE_INTEGRITY, 0);
            if params.types & UBLK_PARAM_TYPE_DISCARD != 0 {
                assert_ne!(params.discard.discard_granularity, 0);
            }
        }
    }

    #[test]
    fn every_fault_is_known_and_goes_with_every_other() {
        let mut random = Random::new(1, 1);
        for first in FAULTS {
            for second in FAULTS {
                let device = device(0);
                let mut draft = Draft { params: valid(&mut random, &device), len: None, place: Place::Roomy };
                spoil(&mut random, first, &device, &mut draft).unwrap();
                spoil(&mut random, second, &device, &mut draft).unwrap();
            }
        }
        let mut draft = Draft { params: ublk_params::default(), len: None, place: Place::Roomy };
        assert!(spoil(&mut Random::new(1, 1), "none", &device(0), &mut draft).is_err());
    }
}
