// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whether a target can serve a disk that was made for another one.
//!
//! The block layer was given the disk's shape at START_DEV, and a recovery cannot change it: it continues to send the
//! requests that the first target could serve, and none besides. So the new target has to serve every request which
//! that shape allows, and must not rely on one that it does not cause.
//!
//! Everything in [`Params`] is compared, but for what only advises clients:
//!
//! * `physical_block_size`, `io_min`, `io_opt` and `rotational`: file systems and schedulers choose sizes and an order
//!   by them. The block layer holds no request to them, so a target never could rely on them.
//! * a larger `size`: there are no requests after the disk's end.
//! * operations besides FLUSH that only the target has: they are not sent. Without FUA in the disk, the block layer
//!   sends a flush after such a write, and without DISCARD or WRITE_ZEROES it does without or writes zeros.
//! * limits which are narrower in the disk than in the target, or which only the disk has.

use crate::data::{Access, DataMovement};
use crate::error::{Error, Parameter, Result};
use crate::identity::BackingIdentity;
use crate::params::{Integrity, Operations, Params};

/// Alignment of clients' memory that the driver requires by default.
const DEFAULT_DMA_ALIGNMENT: u32 = 4;

/// The DMA alignment that a target needs: its own, or that of the files which get the clients' memory.
pub(super) fn dma_alignment(target: &Params, access: Access, data: DataMovement) -> Option<u32> {
    let Access::Forwards { memory_alignment } = access else { return target.dma_alignment };
    if !data.is_zero_copy() {
        return target.dma_alignment;
    }
    let alignment = memory_alignment.max(target.dma_alignment.unwrap_or(1));
    Some(alignment).filter(|alignment| *alignment > DEFAULT_DMA_ALIGNMENT)
}

/// Checks that a target can serve a disk of the given shape, whose data moves by `data`.
///
/// # Errors
///
/// [`Error::Mismatch`] with the first value that does not fit, and what the disk has.
pub(super) fn check(target: &Params, access: Access, disk: &Params, data: DataMovement) -> Result<()> {
    check_kind(target, disk)?;
    if target.size < disk.size {
        return Err(refusal(Parameter::Size, target.size, format!("has {} bytes", disk.size)));
    }
    // Both are powers of two.
    at_most(Parameter::LogicalBlockSize, target.logical_block_size, disk.logical_block_size)?;
    check_operations(target, disk)?;
    at_least(Parameter::MaxIoBytes, target.max_io_bytes, disk.max_io_bytes)?;
    // A request that crosses no boundary of the disk's crosses none of the target's if those are among the disk's.
    let chunk = target.chunk_size;
    if chunk != 0 && (disk.chunk_size == 0 || !chunk.is_multiple_of(disk.chunk_size)) {
        return Err(refusal(Parameter::ChunkSize, chunk, format!("has {} (0 is no limit)", disk.chunk_size)));
    }
    // Masks are powers of two minus one, and 0 is no limit: the greater one is the stricter.
    at_most(Parameter::VirtBoundaryMask, target.virt_boundary_mask, disk.virt_boundary_mask)?;
    // A target without a value accepts any memory.
    let needed = dma_alignment(target, access, data).unwrap_or(1);
    at_most(Parameter::DmaAlignment, needed, disk.dma_alignment.unwrap_or(DEFAULT_DMA_ALIGNMENT))?;
    check_segments(target, disk)?;
    if disk.operations.contains(Operations::WRITE) {
        check_discards(target, disk)?;
    }
    check_zones(target, disk)?;
    match (target.integrity, disk.integrity) {
        (Some(target), Some(disk)) => check_integrity(&target, &disk),
        _ => Ok(()),
    }
}

/// Checks that a target is stored in what the disk is stored in, where both are known.
///
/// # Errors
///
/// [`Error::Mismatch`] of [`Parameter::BackingFile`].
pub(super) fn check_backing(target: Option<BackingIdentity>, disk: Option<BackingIdentity>) -> Result<()> {
    match (target, disk) {
        (Some(target), Some(disk)) if !target.is(disk) => Err(Error::mismatch(
            Parameter::BackingFile,
            "another one",
            "not what the disk is stored in: another file has taken its name, its file system was mounted \
             again, or a block device was deactivated or unplugged \
             (`Server::recover_replaced` accepts it)",
        )),
        _ => Ok(()),
    }
}

fn refusal(parameter: Parameter, value: impl ToString, disk: impl std::fmt::Display) -> Error {
    Error::mismatch(parameter, value, format!("the target does not match the disk, which {disk}"))
}

/// Refuses a need of the target's that is greater than the disk's.
fn at_most<T: Copy + PartialOrd + ToString + std::fmt::Display>(
    parameter: Parameter,
    target: T,
    disk: T,
) -> Result<()> {
    if target > disk { Err(refusal(parameter, target, format!("has {disk}"))) } else { Ok(()) }
}

/// Refuses a limit of the target's that is lower than the disk's.
fn at_least<T: Copy + PartialOrd + ToString + std::fmt::Display>(
    parameter: Parameter,
    target: T,
    disk: T,
) -> Result<()> {
    if target < disk { Err(refusal(parameter, target, format!("has {disk}"))) } else { Ok(()) }
}

/// Like [`at_least`] where 0 is no limit.
fn at_least_or_none(parameter: Parameter, target: u64, disk: u64) -> Result<()> {
    if target != 0 && (disk == 0 || target < disk) {
        return Err(refusal(parameter, target, format!("has {disk} (0 is no limit)")));
    }
    Ok(())
}

/// Zones and integrity metadata are there in both or in neither.
fn check_kind(target: &Params, disk: &Params) -> Result<()> {
    for (parameter, served, had) in [
        (Parameter::Zones, target.zoned.is_some(), disk.zoned.is_some()),
        (Parameter::Integrity, target.integrity.is_some(), disk.integrity.is_some()),
    ] {
        if served != had {
            return Err(refusal(parameter, served, format!("has {}", if had { "them" } else { "none" })));
        }
    }
    Ok(())
}

fn check_operations(target: &Params, disk: &Params) -> Result<()> {
    // A disk that refuses writes sends nothing that changes data, and needs no flush.
    let all = if disk.operations.contains(Operations::WRITE) { disk.operations } else { Operations::empty() };
    let mut served = target.operations;
    if target.read_only {
        served -= Operations::WRITE;
    }
    let missing = all.difference(served);
    if !missing.is_empty() {
        return Err(refusal(Parameter::Operations, format!("{served:?}"), format!("has {missing:?} too")));
    }
    // Clients of a disk without a write cache take each acknowledged write for durable, and no flush is ever sent.
    if served.contains(Operations::FLUSH) && !all.contains(Operations::FLUSH) && all.contains(Operations::WRITE) {
        return Err(refusal(
            Parameter::Operations,
            format!("{served:?}"),
            "has no write cache: no FLUSH would reach the target",
        ));
    }
    Ok(())
}

/// Lengths of discards and of writes of zeros; the units of discards.
fn check_discards(target: &Params, disk: &Params) -> Result<()> {
    if disk.operations.contains(Operations::DISCARD) {
        at_least(Parameter::MaxDiscard, target.discard.max_discard_sectors, disk.discard.max_discard_sectors)?;
        // The block layer splits discards at these units. Each of the disk's has to begin and end with a unit of the
        // target's.
        let (unit, start) = (target.discard.granularity, target.discard.alignment);
        if unit != 0 {
            if disk.discard.granularity == 0 || !disk.discard.granularity.is_multiple_of(unit) {
                let had = format!("has {}, which is no multiple", disk.discard.granularity);
                return Err(refusal(Parameter::DiscardGranularity, unit, had));
            }
            if disk.discard.alignment % unit != start % unit {
                return Err(refusal(Parameter::DiscardAlignment, start, format!("has {}", disk.discard.alignment)));
            }
        }
    }
    if disk.operations.contains(Operations::WRITE_ZEROES) {
        let longest = disk.discard.max_write_zeroes_sectors;
        at_least(Parameter::MaxWriteZeroes, target.discard.max_write_zeroes_sectors, longest)?;
    }
    Ok(())
}

/// Without limits of segments in the disk, the block layer's own are in force, which differ among kernels.
fn check_segments(target: &Params, disk: &Params) -> Result<()> {
    let (target, disk) = (target.segments.unwrap_or_default(), disk.segments.unwrap_or_default());
    at_least_or_none(Parameter::MaxSegments, target.max_count.into(), disk.max_count.into())?;
    at_least_or_none(Parameter::MaxSegmentSize, target.max_size.into(), disk.max_size.into())?;
    at_least_or_none(Parameter::SegmentBoundaryMask, target.boundary_mask, disk.boundary_mask)
}

fn check_zones(target: &Params, disk: &Params) -> Result<()> {
    let (Some(served), Some(had)) = (target.zoned, disk.zoned) else { return Ok(()) };
    if target.chunk_size != disk.chunk_size {
        return Err(refusal(Parameter::ZoneSize, target.chunk_size, format!("has zones of {} bytes", disk.chunk_size)));
    }
    at_least_or_none(Parameter::MaxOpenZones, served.max_open.into(), had.max_open.into())?;
    at_least_or_none(Parameter::MaxActiveZones, served.max_active.into(), had.max_active.into())?;
    at_least(Parameter::MaxZoneAppend, served.max_append_bytes, had.max_append_bytes)
}

/// The form of metadata is what clients compute and check, so that it has to be the same.
fn check_integrity(target: &Integrity, disk: &Integrity) -> Result<()> {
    let form = |integrity: &Integrity| Integrity { max_segments: 0, ..*integrity };
    if form(target) != form(disk) {
        return Err(refusal(Parameter::Integrity, format!("{:?}", form(target)), format!("has {:?}", form(disk))));
    }
    at_least_or_none(Parameter::MaxIntegritySegments, target.max_segments.into(), disk.max_segments.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Checksum, SegmentLimits, ZonedLimits};

    const ZONES: ZonedLimits = ZonedLimits { max_open: 4, max_active: 8, max_append_bytes: 65536 };
    const METADATA: Integrity = Integrity {
        metadata_size: 8,
        pi_offset: 0,
        checksum: Checksum::Crc16T10Dif,
        tag_size: 2,
        interval: 4096,
        verified: true,
        reference_tag: true,
        max_segments: 4,
    };

    /// A disk that limits everything.
    fn limited() -> Params {
        let mut params = Params::new(64 << 20, 4096);
        params.operations = Operations::all();
        params.max_io_bytes = 128 << 10;
        params.chunk_size = 1 << 20;
        params.virt_boundary_mask = 4095;
        params.dma_alignment = Some(512);
        params.segments = Some(SegmentLimits { boundary_mask: 65535, max_size: 8192, max_count: 7 });
        params.discard.granularity = 16384;
        params.discard.alignment = 8192;
        params.discard.max_discard_sectors = 4096;
        params.discard.max_write_zeroes_sectors = 2048;
        params.zoned = Some(ZONES);
        params.integrity = Some(METADATA);
        params.validate().expect("a disk that can be made");
        params
    }

    fn with(change: impl FnOnce(&mut Params)) -> Params {
        let mut params = limited();
        change(&mut params);
        params
    }

    fn fits(target: &Params, disk: &Params) -> Result<()> {
        check(target, Access::Bytes, disk, DataMovement::UserCopy)
    }

    type Change = fn(&mut Params);

    /// Changes of a target which the disk above would break.
    const DEMANDING: [(&str, Change); 22] = [
        ("zones", |p| p.zoned = None),
        ("integrity metadata", |p| p.integrity = None),
        ("size", |p| p.size -= 4096),
        ("operations", |p| p.operations -= Operations::FLUSH | Operations::FUA),
        ("operations", |p| p.operations -= Operations::DISCARD),
        ("operations", |p| p.read_only = true),
        ("maximum request size", |p| p.max_io_bytes = 4096),
        ("chunk size", |p| p.chunk_size = 1 << 19),
        ("virt boundary mask", |p| p.virt_boundary_mask = 8191),
        ("DMA alignment", |p| p.dma_alignment = Some(1024)),
        ("most segments", |p| p.segments.as_mut().unwrap().max_count = 6),
        ("maximum segment size", |p| p.segments.as_mut().unwrap().max_size = 4096),
        ("segment boundary mask", |p| p.segments.as_mut().unwrap().boundary_mask = 4095),
        ("longest discard", |p| p.discard.max_discard_sectors = 8),
        ("longest write of zeros", |p| p.discard.max_write_zeroes_sectors = 8),
        ("discard granularity", |p| p.discard.granularity = 32768),
        ("discard alignment", |p| p.discard.alignment = 4096),
        ("zone size", |p| p.chunk_size = 2 << 20),
        ("maximum open zones", |p| p.zoned.as_mut().unwrap().max_open = 3),
        ("maximum active zones", |p| p.zoned.as_mut().unwrap().max_active = 7),
        ("maximum zone append size", |p| p.zoned.as_mut().unwrap().max_append_bytes = 4096),
        ("integrity metadata", |p| p.integrity.as_mut().unwrap().interval = 512),
    ];

    #[test]
    fn each_value_that_does_not_fit_is_refused_by_name() {
        fits(&limited(), &limited()).unwrap();
        for (name, change) in DEMANDING {
            let error = fits(&with(change), &limited()).expect_err(name).to_string();
            assert!(error.starts_with(name), "{name}: {error}");
        }
    }

    #[test]
    fn limits_that_only_the_target_has_are_refused() {
        let mut disk = Params::new(64 << 20, 4096);
        disk.operations = Operations::all();
        let needs: [(&str, Change); 6] = [
            ("chunk size", |p| p.chunk_size = 1 << 20),
            ("virt boundary mask", |p| p.virt_boundary_mask = 4095),
            ("DMA alignment", |p| p.dma_alignment = Some(512)),
            ("most segments", |p| p.segments = Some(SegmentLimits { max_count: 100, ..Default::default() })),
            ("maximum segment size", |p| p.segments = Some(SegmentLimits { max_size: 1 << 20, ..Default::default() })),
            ("segment boundary", |p| {
                p.segments = Some(SegmentLimits { boundary_mask: u64::from(u32::MAX), ..Default::default() });
            }),
        ];
        for (name, change) in needs {
            let mut target = disk;
            change(&mut target);
            let error = fits(&target, &disk).expect_err(name).to_string();
            assert!(error.starts_with(name), "{name}: {error}");
            fits(&disk, &target).expect("a disk with limits suits a target without");
        }
    }

    #[test]
    fn a_write_cache_needs_a_disk_that_sends_flushes() {
        let mut disk = Params::new(1 << 20, 512);
        let mut cached = disk;
        cached.operations |= Operations::FLUSH | Operations::FUA;
        let error = fits(&cached, &disk).unwrap_err().to_string();
        assert!(error.contains("no write cache"), "{error}");
        // Nothing is written, so there is nothing to flush.
        disk.operations = Operations::empty();
        disk.read_only = true;
        fits(&cached, &disk).unwrap();
    }

    #[test]
    fn a_read_only_disk_suits_a_target_that_cannot_write() {
        let mut disk = limited();
        disk.read_only = true;
        disk.operations -= Operations::WRITE;
        let mut target = limited();
        target.operations = Operations::empty();
        fits(&target, &disk).unwrap();
    }

    #[test]
    fn advice_and_smaller_demands_fit() {
        let changes: [Change; 9] = [
            |p| p.physical_block_size = 8192,
            |p| (p.io_min, p.io_opt) = (8192, 65536),
            |p| p.rotational = true,
            |p| p.size *= 2,
            |p| p.max_io_bytes *= 2,
            |p| p.segments = None,
            |p| p.dma_alignment = None,
            |p| p.discard.granularity = 8192,
            |p| p.zoned = Some(ZonedLimits { max_open: 0, max_active: 0, ..ZONES }),
        ];
        for (n, change) in changes.into_iter().enumerate() {
            let mut target = with(change);
            target.discard.alignment %= target.discard.granularity;
            fits(&target, &limited()).unwrap_or_else(|error| panic!("{n}: {error}"));
        }
        let mut small_blocks = Params::new(1 << 20, 512);
        small_blocks.operations = Operations::WRITE;
        fits(&small_blocks, &Params::new(1 << 20, 4096)).unwrap();
        assert!(fits(&Params::new(1 << 20, 4096), &small_blocks).is_err());
    }

    #[test]
    fn a_disk_can_be_served_by_what_it_was_made_for() {
        for bits in 0..32 {
            for change in [|_: &mut Params| {}, |p: &mut Params| p.read_only = true] as [Change; 2] {
                let mut target = limited();
                (target.zoned, target.integrity) = (None, None);
                target.operations = Operations::from_bits_truncate(bits);
                change(&mut target);
                if target.validate().is_err() {
                    continue;
                }
                // As the driver gives it back.
                let disk = Params::decode(&target.encode());
                fits(&target, &disk).unwrap_or_else(|error| panic!("{:?}: {error}", target.operations));
            }
        }
    }

    #[test]
    fn files_that_get_clients_memory_need_its_alignment() {
        let forwards = Access::Forwards { memory_alignment: 512 };
        let mut disk = Params::new(1 << 20, 512);
        let check = |disk: &Params, data| check(&Params::new(1 << 20, 512), forwards, disk, data);
        check(&disk, DataMovement::UserCopy).unwrap();
        let error = check(&disk, DataMovement::AutoRegister).unwrap_err().to_string();
        assert!(error.starts_with("DMA alignment = 512"), "{error}");
        disk.dma_alignment = Some(512);
        check(&disk, DataMovement::AutoRegister).unwrap();
    }
}
