// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add -t null`.

use std::path::Path;
use std::sync::Arc;

use super::kind::{self, DiskArgs, Kind, Sizes};
use crate::data::Access;
use crate::error::Result;
use crate::params::{Operations, Params};
use crate::target::Target;
use crate::targets::Null;

pub(super) const KIND: Kind = Kind::new::<Options>("null", "Accept every request and store nothing");

/// Size of the disk, unless `--size` is given.
const DEFAULT_SIZE: u64 = 250 << 30;

#[derive(Debug, clap::Args)]
#[group(skip)]
struct Options {}

impl kind::Options for Options {
    fn create(&self, disk: &DiskArgs, size: Option<u64>) -> Result<Arc<dyn Target>> {
        let mut params = Params::new(size.or(disk.size).unwrap_or(DEFAULT_SIZE), disk.block_size());
        params.operations = Operations::all();
        Ok(Arc::new(Null::with_params(disk.apply(params)?)?))
    }

    /// The target stores nothing, so it takes the existing disk's parameters.
    fn reopen(&self, _: &DiskArgs, existing: &Params) -> Result<Arc<dyn Target>> {
        Ok(Arc::new(Null::with_params(*existing)?))
    }

    fn inspect(&self, _: &DiskArgs, _: &Params) -> Result<Option<(Params, Access)>> {
        Ok(None)
    }

    fn is_volatile(&self, _: &DiskArgs) -> bool {
        false
    }

    fn sizes(&self, _: &DiskArgs, _: Option<&Path>, _: u64) -> Result<Sizes> {
        Ok(Sizes { max: u64::MAX, default: None })
    }
}
