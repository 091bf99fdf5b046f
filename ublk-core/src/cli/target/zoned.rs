// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add -t zoned`.

use std::path::Path;
use std::sync::Arc;

use super::kind::{self, Backing, DEFAULT_MEMORY_SIZE, DiskArgs, Kind, Sizes};
use crate::cli::size;
use crate::data::Access;
use crate::error::{Error, Parameter, Result};
use crate::params::Params;
use crate::target::Target;
use crate::targets::{Zoned, ZonedOptions};

const ABOUT: &str = "Host-managed zoned disk, in memory or, with --file, in a directory";

pub(super) const KIND: Kind = Kind::new::<Options>("zoned", ABOUT).backing(Backing::Optional);

#[derive(Debug, clap::Args)]
#[group(skip)]
struct Options {
    /// Zone size, a power of two
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32, default_value = "64M")]
    zone_size: u32,
    /// Number of conventional zones at the start of the disk
    #[arg(long, value_name = "N", default_value_t = 0)]
    conventional_zones: u32,
    /// Maximum number of open zones; 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_open_zones: u32,
    /// Maximum number of active zones (open or closed); 0 for no limit
    #[arg(long, value_name = "N", default_value_t = 0)]
    max_active_zones: u32,
}

impl Options {
    /// The options and parameters of the target.
    fn zones(&self, disk: &DiskArgs, size: Option<u64>) -> Result<(ZonedOptions, Params)> {
        let options = ZonedOptions {
            size: size.or(disk.size).unwrap_or(DEFAULT_MEMORY_SIZE),
            zone_size: self.zone_size,
            conventional: self.conventional_zones,
            max_open: self.max_open_zones,
            max_active: self.max_active_zones,
            logical_block_size: disk.block_size.unwrap_or(4096),
            directory: disk.file.clone(),
        };
        let mut params = disk.apply(Zoned::shape(&options))?;
        params.chunk_size = self.zone_size;
        if let Some(zoned) = &mut params.zoned {
            zoned.max_append_bytes = zoned.max_append_bytes.min(params.max_io_bytes);
        }
        Ok((options, params))
    }
}

impl kind::Options for Options {
    fn create(&self, disk: &DiskArgs, size: Option<u64>) -> Result<Arc<dyn Target>> {
        let (options, params) = self.zones(disk, size)?;
        Ok(Arc::new(Zoned::with_params(&options, params)?))
    }

    fn inspect(&self, disk: &DiskArgs, existing: &Params) -> Result<Option<(Params, Access)>> {
        if let Some(directory) = &disk.file {
            std::fs::read_dir(directory).map_err(|e| Error::file("read", directory, &e))?;
        }
        Ok(Some((self.zones(disk, Some(existing.size))?.1, Access::Bytes)))
    }

    fn is_volatile(&self, disk: &DiskArgs) -> bool {
        disk.file.is_none()
    }

    fn sizes(&self, _: &DiskArgs, _: Option<&Path>, current: u64) -> Result<Sizes> {
        Err(Error::invalid(Parameter::Size, current, "a zoned disk cannot be resized"))
    }
}
