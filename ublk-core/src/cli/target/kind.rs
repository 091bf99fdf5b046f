// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a kind of disk has to define.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::ArgMatches;

use super::shape;
use crate::cli::size;
use crate::data::Access;
use crate::error::Result;
use crate::params::Params;
use crate::target::Target;

/// Size of a disk in memory, unless `--size` is given.
pub(super) const DEFAULT_MEMORY_SIZE: u64 = 1 << 30;

/// A kind of disk: a value of `--type`, and the options that only this kind has.
#[derive(Debug)]
pub(in crate::cli) struct Kind {
    pub(super) name: &'static str,
    pub(super) about: &'static str,
    pub(super) alias: Option<&'static str>,
    pub(super) backing: Backing,
    pub(super) has_integrity: bool,
    pub(super) add_options: fn(clap::Command) -> clap::Command,
    pub(super) parse: fn(&ArgMatches) -> Result<Box<dyn Options>, clap::Error>,
}

/// Whether a kind of disk takes `--file`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    None,
    Optional,
    Required,
}

impl Kind {
    /// A kind without `--file` and `--integrity`, whose own options are `O`.
    pub(super) const fn new<O: Options + clap::Args + 'static>(name: &'static str, about: &'static str) -> Self {
        Kind {
            name,
            about,
            alias: None,
            backing: Backing::None,
            has_integrity: false,
            add_options: O::augment_args,
            parse: |matches| Ok(Box::new(O::from_arg_matches(matches)?)),
        }
    }

    /// Sets a second name, which the help text does not show.
    pub(super) const fn alias(mut self, alias: &'static str) -> Self {
        self.alias = Some(alias);
        self
    }

    /// Sets whether `--file` is accepted.
    pub(super) const fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Accepts `--integrity`.
    pub(super) const fn with_integrity(mut self) -> Self {
        self.has_integrity = true;
        self
    }

    /// Value of `--type`.
    pub(in crate::cli) fn name(&self) -> &'static str {
        self.name
    }

    /// All names that `--type` accepts.
    pub(super) fn names(&self) -> impl Iterator<Item = &'static str> {
        std::iter::once(self.name).chain(self.alias)
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// The options that only one kind of disk has, and what depends on them.
pub(super) trait Options: Debug + Send + Sync {
    /// Makes relative paths relative to another directory.
    fn resolve(&mut self, _directory: &Path) {}

    /// Lists the files that the disk is stored in.
    fn files(&self, disk: &DiskArgs) -> Vec<PathBuf> {
        disk.file.iter().cloned().collect()
    }

    /// Creates the target of a new disk, or of an existing one with the given size.
    fn create(&self, disk: &DiskArgs, size: Option<u64>) -> Result<Arc<dyn Target>>;

    /// Creates the target of an existing disk.
    fn reopen(&self, disk: &DiskArgs, existing: &Params) -> Result<Arc<dyn Target>> {
        self.create(disk, Some(existing.size))
    }

    /// Describes the target that [`Options::reopen`] would create. Another server may be using the files. `None` if the
    /// target fits any disk.
    fn inspect(&self, disk: &DiskArgs, existing: &Params) -> Result<Option<(Params, Access)>>;

    /// Returns whether the disk's data is in the server's memory, and lost when the server exits.
    fn is_volatile(&self, disk: &DiskArgs) -> bool;

    /// The sizes that the disk can be changed to. `backing` is a path of the file that the server has open.
    fn sizes(&self, disk: &DiskArgs, backing: Option<&Path>, current: u64) -> Result<Sizes>;
}

/// Sizes that a disk can be changed to, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) max: u64,
    /// The size to use without `--size`.
    pub(super) default: Option<u64>,
}

/// Options for disks of several kinds.
#[derive(Debug, clap::Args)]
#[group(skip)]
pub(super) struct DiskArgs {
    /// Backing file or block device (file), or directory with one file per zone (zoned)
    #[arg(short, long, value_name = "PATH")]
    pub(super) file: Option<PathBuf>,
    /// Size of the disk, e.g. 512M [default: 250G for null, 1G for mem and zoned, the file's size for file]
    #[arg(short, long, value_parser = size::parse)]
    pub(super) size: Option<u64>,
    /// Logical block size: a power of two from 512 to 4096 [default: 512, or that of the backing device]
    #[arg(short, long, value_name = "BYTES", value_parser = size::parse_u32)]
    pub(super) block_size: Option<u32>,
    /// Make the disk read-only
    #[arg(short = 'o', long)]
    pub(super) read_only: bool,
    #[command(flatten)]
    pub(super) shape: shape::Args,
}

impl DiskArgs {
    /// Returns a target's parameters as changed by the command line.
    pub(super) fn apply(&self, params: Params) -> Result<Params> {
        let mut params = self.shape.apply(params)?;
        params.read_only |= self.read_only;
        Ok(params)
    }

    /// The logical block size, 512 by default.
    pub(super) fn block_size(&self) -> u32 {
        self.block_size.unwrap_or(512)
    }
}
