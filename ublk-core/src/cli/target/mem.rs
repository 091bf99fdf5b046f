// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add -t mem`.

use std::path::Path;
use std::sync::Arc;

use super::kind::{self, DEFAULT_MEMORY_SIZE, DiskArgs, Kind, Sizes};
use crate::data::Access;
use crate::error::{Error, Parameter, Result};
use crate::params::Params;
use crate::target::Target;
use crate::targets::Mem;

pub(super) const KIND: Kind = Kind::new::<Options>("mem", "RAM disk").with_integrity();

#[derive(Debug, clap::Args)]
#[group(skip)]
struct Options {}

impl Options {
    fn size(disk: &DiskArgs) -> u64 {
        disk.size.unwrap_or(DEFAULT_MEMORY_SIZE)
    }
}

impl kind::Options for Options {
    fn create(&self, disk: &DiskArgs, _: Option<u64>) -> Result<Arc<dyn Target>> {
        let mem = Mem::new(Self::size(disk), disk.block_size())?;
        Ok(Arc::new(Mem::with_params(disk.apply(mem.params())?)?))
    }

    fn inspect(&self, _: &DiskArgs, _: &Params) -> Result<Option<(Params, Access)>> {
        Err(Error::conflict(Parameter::CommandLine("type"), "mem", "a disk in memory cannot be recovered"))
    }

    fn is_volatile(&self, _: &DiskArgs) -> bool {
        true
    }

    /// At most what the target was created with.
    fn sizes(&self, disk: &DiskArgs, _: Option<&Path>, _: u64) -> Result<Sizes> {
        Ok(Sizes { max: Self::size(disk), default: None })
    }
}
