// SPDX-License-Identifier: MIT OR Apache-2.0

//! Options of `ublk add` for the attributes and limits of a disk.

use clap::ValueEnum;

use crate::cli::size;
use crate::error::{Error, Parameter, Result};
use crate::params::{Checksum, Integrity, Operations, Params};

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Switch {
    On,
    Off,
}

/// Checksum of the protection information; as [`Checksum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Guard {
    None,
    Ip,
    #[value(name = "crc16-t10dif")]
    Crc16T10Dif,
    #[value(name = "crc64-nvme")]
    Crc64Nvme,
}

#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Shape of the disk")]
#[group(skip)]
pub(super) struct Args {
    /// Physical block size
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    physical_block_size: Option<u32>,
    /// Maximum size of a read or write [default: 512K]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    max_io: Option<u32>,
    /// Preferred minimum request size [default: the physical block size]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    io_min: Option<u32>,
    /// Preferred request size for streaming
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    io_opt: Option<u32>,
    /// Split requests at multiples of this size, e.g. a RAID stripe
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    chunk_size: Option<u32>,
    /// Required alignment of clients' buffers [default: 4] (Linux 6.15)
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    dma_alignment: Option<u32>,
    /// Maximum number of memory segments in a request (Linux 6.15)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    max_segments: Option<u16>,
    /// Maximum size of a memory segment (Linux 6.15)
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    max_segment_size: Option<u32>,
    /// Boundary, a power of two, that no memory segment may cross (Linux 6.15)
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    segment_boundary: Option<u64>,
    /// Boundary, a power of two, at which all inner segments of a request start and end; 0 for none
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    virt_boundary: Option<u64>,
    /// Smallest unit that a discard can free
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    discard_granularity: Option<u32>,
    /// Offset of the first discard unit on the disk [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    discard_alignment: Option<u32>,
    /// Maximum size of a discard; 0 disables discards
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    max_discard: Option<u64>,
    /// Maximum size of a write-zeroes request; 0 disables them
    #[arg(long, value_name = "BYTES", value_parser = size::parse)]
    max_write_zeroes: Option<u64>,
    /// Report a volatile write cache, so that fsync sends a flush [default: as the target needs]
    #[arg(long, value_enum, value_name = "SWITCH")]
    write_cache: Option<Switch>,
    /// Accept FUA writes, which are durable when acknowledged; needs a write cache [default: as the target supports]
    #[arg(long, value_enum, value_name = "SWITCH")]
    fua: Option<Switch>,
    /// Store integrity metadata with each block, protected by this checksum (mem, file; Linux 7.0)
    #[arg(long, value_enum, value_name = "CHECKSUM")]
    integrity: Option<Guard>,
    /// Metadata bytes per interval [default: the size of the protection information, or 8 without]
    #[arg(long, value_name = "BYTES", requires = "integrity")]
    metadata_size: Option<u8>,
    /// Offset of the protection information in the metadata
    #[arg(long, value_name = "BYTES", default_value_t = 0, requires = "integrity")]
    pi_offset: u8,
    /// Data bytes per interval [default: the logical block size]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32, requires = "integrity")]
    integrity_interval: Option<u32>,
    /// Omit the reference tag (block number) from the protection information
    #[arg(long, requires = "integrity")]
    no_reference_tag: bool,
    /// Report the disk as rotational
    #[arg(long)]
    rotational: bool,
}

impl Args {
    /// Returns a target's parameters as changed by the command line.
    pub(super) fn apply(&self, mut params: Params) -> Result<Params> {
        if let Some(bytes) = self.physical_block_size {
            params.physical_block_size = bytes;
            params.io_min = bytes;
        }
        params.io_min = self.io_min.unwrap_or(params.io_min);
        params.io_opt = self.io_opt.unwrap_or(params.io_opt);
        params.max_io_bytes = self.max_io.unwrap_or(params.max_io_bytes);
        params.chunk_size =
            whole_sectors(Parameter::ChunkSize, self.chunk_size.map(u64::from))?.map_or(params.chunk_size, |s| s << 9);
        params.dma_alignment = self.dma_alignment.or(params.dma_alignment);
        match self.virt_boundary {
            None => {}
            Some(0) => params.virt_boundary_mask = 0,
            Some(bytes) => params.virt_boundary_mask = mask(Parameter::CommandLine("virt boundary"), bytes, 512)?,
        }
        self.segments(&mut params)?;
        self.discards(&mut params)?;
        match self.write_cache {
            Some(Switch::On) => params.operations |= Operations::FLUSH,
            // Without a cache, each write is durable when it completes.
            Some(Switch::Off) => params.operations -= Operations::FLUSH | Operations::FUA,
            None => {}
        }
        match self.fua {
            Some(Switch::On) => params.operations |= Operations::FUA,
            Some(Switch::Off) => params.operations -= Operations::FUA,
            None => {}
        }
        params.integrity = self.integrity(params.logical_block_size).or(params.integrity);
        params.rotational |= self.rotational;
        Ok(params)
    }

    /// Returns whether the command line asks for integrity metadata.
    pub(super) fn has_integrity(&self) -> bool {
        self.integrity.is_some()
    }

    fn integrity(&self, block: u32) -> Option<Integrity> {
        let checksum = match self.integrity? {
            Guard::None => Checksum::None,
            Guard::Ip => Checksum::Ip,
            Guard::Crc16T10Dif => Checksum::Crc16T10Dif,
            Guard::Crc64Nvme => Checksum::Crc64Nvme,
        };
        let needed = self.pi_offset.saturating_add(checksum.tuple_size());
        let guarded = checksum != Checksum::None;
        Some(Integrity {
            metadata_size: self.metadata_size.unwrap_or(if needed == 0 { 8 } else { needed }),
            pi_offset: self.pi_offset,
            checksum,
            tag_size: if guarded { 2 } else { 0 },
            interval: self.integrity_interval.unwrap_or(block),
            verified: guarded,
            reference_tag: guarded && !self.no_reference_tag,
            max_segments: 0,
        })
    }

    fn segments(&self, params: &mut Params) -> Result<()> {
        if self.max_segments.is_none() && self.max_segment_size.is_none() && self.segment_boundary.is_none() {
            return Ok(());
        }
        let mut segments = params.segments.unwrap_or_default();
        segments.max_count = self.max_segments.unwrap_or(segments.max_count);
        if let Some(bytes) = self.max_segment_size {
            if bytes == 0 {
                return Err(Error::invalid(Parameter::MaxSegmentSize, bytes, "at least 4096 bytes"));
            }
            segments.max_size = bytes;
        }
        if let Some(bytes) = self.segment_boundary {
            segments.boundary_mask = mask(Parameter::CommandLine("segment boundary"), bytes, 4096)?;
        }
        params.segments = Some(segments);
        Ok(())
    }

    fn discards(&self, params: &mut Params) -> Result<()> {
        let discard = &mut params.discard;
        discard.granularity = self.discard_granularity.unwrap_or(discard.granularity);
        discard.alignment = self.discard_alignment.unwrap_or(discard.alignment);
        let limits = [
            (Parameter::MaxDiscard, Operations::DISCARD, self.max_discard, &mut discard.max_discard_sectors),
            (
                Parameter::MaxWriteZeroes,
                Operations::WRITE_ZEROES,
                self.max_write_zeroes,
                &mut discard.max_write_zeroes_sectors,
            ),
        ];
        for (parameter, operation, wish, limit) in limits {
            let Some(sectors) = whole_sectors(parameter, wish)? else { continue };
            if sectors == 0 {
                params.operations -= operation;
            } else if params.operations.contains(operation) {
                *limit = sectors;
            } else {
                return Err(Error::invalid(parameter, u64::from(sectors) << 9, "not supported by the target"));
            }
        }
        Ok(())
    }
}

/// Returns the mask of a boundary in bytes.
fn mask(parameter: Parameter, bytes: u64, least: u64) -> Result<u64> {
    if bytes.is_power_of_two() && bytes >= least {
        Ok(bytes - 1)
    } else {
        Err(Error::invalid(parameter, bytes, format!("must be a power of two of at least {least} bytes")))
    }
}

/// Converts bytes to sectors, which the driver counts in 32 bits.
fn whole_sectors(parameter: Parameter, bytes: Option<u64>) -> Result<Option<u32>> {
    let Some(bytes) = bytes else { return Ok(None) };
    if !bytes.is_multiple_of(512) {
        return Err(Error::invalid(parameter, bytes, "must be a multiple of 512 bytes"));
    }
    let sectors = u32::try_from(bytes >> 9).ok();
    let sectors = sectors.ok_or_else(|| Error::invalid(parameter, bytes, "the kernel's limit is 2^32 - 1 sectors"))?;
    Ok(Some(sectors))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk() -> Params {
        let mut params = Params::new(1 << 30, 512);
        params.operations = Operations::WRITE | Operations::DISCARD;
        params
    }

    #[test]
    fn a_limit_of_zero_disables_the_operation() {
        let args = Args { max_discard: Some(0), ..Args::default() };
        assert_eq!(args.apply(disk()).unwrap().operations, Operations::WRITE);
    }

    #[test]
    fn a_limit_of_an_unsupported_operation_is_refused() {
        let args = Args { max_write_zeroes: Some(1 << 20), ..Args::default() };
        assert!(args.apply(disk()).unwrap_err().to_string().contains("not supported by the target"));
    }

    #[test]
    fn lengths_are_whole_sectors_in_32_bits() {
        for bytes in [1000, 1 << 41] {
            let args = Args { max_discard: Some(bytes), ..Args::default() };
            assert!(args.apply(disk()).unwrap_err().to_string().starts_with("longest discard"));
        }
        let args = Args { chunk_size: Some(1000), ..Args::default() };
        assert!(args.apply(disk()).unwrap_err().to_string().starts_with("chunk size"));
    }

    #[test]
    fn boundaries_are_powers_of_two() {
        for bytes in [0, 2048, 12288] {
            let args = Args { segment_boundary: Some(bytes), ..Args::default() };
            let message = args.apply(disk()).unwrap_err().to_string();
            assert!(message.contains("segment boundary") && message.contains(&bytes.to_string()), "{message}");
        }
        let args = Args { segment_boundary: Some(8192), virt_boundary: Some(0), ..Args::default() };
        let params = args.apply(disk()).unwrap();
        assert_eq!((params.segments.unwrap().boundary_mask, params.virt_boundary_mask), (8191, 0));
    }

    #[test]
    fn fua_needs_a_write_cache() {
        let on = Args { write_cache: Some(Switch::On), fua: Some(Switch::On), ..Args::default() };
        let cached = on.apply(disk()).unwrap();
        cached.validate().unwrap();
        assert!(cached.operations.contains(Operations::FLUSH | Operations::FUA));
        let off = Args { write_cache: Some(Switch::Off), ..Args::default() };
        assert_eq!(off.apply(cached).unwrap().operations, disk().operations);
        let fua_alone = Args { fua: Some(Switch::On), ..Args::default() };
        assert!(fua_alone.apply(disk()).unwrap().validate().is_err());
    }
}
