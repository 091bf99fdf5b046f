// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kinds of disk of `ublk add -t`, each in a file with its options and the constructor of its target.
//!
//! A new kind is a file like `null.rs`, and its constant in [`KINDS`]. `kind` has what such a file defines, `shape` the
//! options for the attributes and limits of any disk.

mod file;
mod kind;
mod mem;
mod null;
mod shape;
mod zoned;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgMatches, FromArgMatches};

pub(super) use self::kind::Kind;
use self::kind::{Backing, DiskArgs, Options, Sizes};
pub(super) use self::shape::Switch;
use crate::Errno;
use crate::control::{Control, DeviceInfo};
use crate::device::check_fit;
use crate::error::{Error, Parameter, Result};
use crate::params::Params;
use crate::target::Target;

/// All kinds of disk, in the order of the help text.
static KINDS: [&Kind; 4] = [&null::KIND, &mem::KIND, &file::KIND, &zoned::KIND];

/// How long to wait for a server that has exited to release its files.
const LOCK_TIMEOUT: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Parser of `--type`.
pub(super) fn kind_parser() -> impl TypedValueParser<Value = &'static Kind> {
    let value = |kind: &'static Kind| PossibleValue::new(kind.name).help(kind.about).aliases(kind.alias);
    let named = |name: String| {
        KINDS.into_iter().find(|kind| kind.names().any(|known| known == name)).ok_or("not a kind of disk")
    };
    PossibleValuesParser::new(KINDS.map(value)).try_map(named)
}

/// The options of `ublk add` that describe the disk.
#[derive(Debug)]
pub(super) struct Args {
    kind: &'static Kind,
    disk: DiskArgs,
    options: Box<dyn Options>,
}

/// The options of all kinds are accepted together: which kind it is, is itself an option.
impl clap::Args for Args {
    fn augment_args(command: clap::Command) -> clap::Command {
        let kind = clap::Arg::new("kind").short('t').long("type").value_name("KIND").required(true);
        let command = command.arg(kind.value_parser(kind_parser()).help("Kind of disk"));
        let with_file = KINDS.into_iter().filter(|kind| kind.backing == Backing::Required);
        let with_file: Vec<_> = with_file.flat_map(Kind::names).map(|name| ("kind", name)).collect();
        let command = DiskArgs::augment_args(command).mut_arg("file", |file| file.required_if_eq_any(with_file));
        let add_options = |command: clap::Command, kind: &&Kind| {
            (kind.add_options)(command.next_help_heading(format!("Options for -t {}", kind.name)))
        };
        KINDS.iter().fold(command, add_options).next_help_heading(None)
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Args {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let kind = *matches.get_one::<&'static Kind>("kind").unwrap_or(&KINDS[0]);
        Ok(Args { kind, disk: DiskArgs::from_arg_matches(matches)?, options: (kind.parse)(matches)? })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args {
    /// The kind of disk.
    pub(super) fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// Backing file, or directory of zones.
    pub(super) fn file(&self) -> Option<&Path> {
        self.disk.file.as_deref()
    }

    /// Lists the files that the disk is stored in: the backing file or directory, and the file for integrity metadata.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        self.options.files(&self.disk)
    }

    /// Returns whether the disk's data is lost when the server exits.
    pub(super) fn is_volatile(&self) -> bool {
        self.options.is_volatile(&self.disk)
    }

    /// Makes relative paths relative to another directory.
    pub(super) fn resolve(&mut self, directory: &Path) {
        self.disk.file = self.disk.file.take().map(|file| directory.join(file));
        self.options.resolve(directory);
    }

    /// Creates the target of a new disk.
    pub(super) fn create(&self) -> Result<Arc<dyn Target>> {
        self.check()?;
        self.options.create(&self.disk, None)
    }

    /// Creates the target of an existing disk. The driver may report the end of the last server a moment before the
    /// server's files are released, so this waits for them.
    pub(super) fn reopen(&self, existing: &Params) -> Result<Arc<dyn Target>> {
        self.check()?;
        let deadline = Instant::now() + LOCK_TIMEOUT;
        loop {
            match self.options.reopen(&self.disk, existing) {
                Err(Error::File { operation: "lock" | "open", errno: Errno::EWOULDBLOCK | Errno::EBUSY, .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(LOCK_RETRY);
                }
                result => return result,
            }
        }
    }

    /// Checks whether [`Args::reopen`] is going to succeed for a device that still has a server: whether the files can be
    /// opened, and whether the target fits the disk.
    pub(super) fn check_reopen(&self, control: &Control, info: &DeviceInfo) -> Result<()> {
        self.check()?;
        let existing = control.params(info.id)?.params;
        match self.options.inspect(&self.disk, &existing)? {
            Some((params, access)) => check_fit(&params, access, &existing, info.features),
            None => Ok(()),
        }
    }

    /// Returns the size that `ublk resize` sets: `wish`, or by default that of the backing file.
    ///
    /// # Errors
    ///
    /// If the disk cannot have that size.
    pub(super) fn new_size(&self, wish: Option<u64>, current: u64, backing: Option<&Path>) -> Result<u64> {
        let Sizes { max, default } = self.options.sizes(&self.disk, backing, current)?;
        match wish.or(default) {
            Some(bytes) if bytes > max => {
                Err(Error::invalid(Parameter::Size, bytes, format!("exceeds the backing store ({max} bytes)")))
            }
            Some(bytes) => Ok(bytes),
            None => {
                Err(Error::invalid(Parameter::Size, current, "--size is required unless the disk is stored in a file"))
            }
        }
    }

    /// Refuses options that this kind of disk does not have.
    fn check(&self) -> Result<()> {
        let list = |wanted: fn(&Kind) -> bool| {
            let names = KINDS.into_iter().filter(|kind| wanted(kind)).map(|kind| format!("-t {}", kind.name));
            names.collect::<Vec<_>>().join(" and ")
        };
        if let (Some(file), Backing::None) = (&self.disk.file, self.kind.backing) {
            let kinds = list(|kind| kind.backing != Backing::None);
            return Err(Error::conflict(Parameter::CommandLine("file"), file.display(), format!("only for {kinds}")));
        }
        if self.disk.shape.has_integrity() && !self.kind.has_integrity {
            let kinds = list(|kind| kind.has_integrity);
            return Err(Error::conflict(Parameter::Integrity, true, format!("only supported by {kinds}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Args as _;

    use super::*;

    /// Parses the options of `ublk add` that describe the disk.
    pub(super) fn parse(words: &[&str]) -> Result<Args, clap::Error> {
        let matches = Args::augment_args(clap::Command::new("add").no_binary_name(true)).try_get_matches_from(words)?;
        Args::from_arg_matches(&matches)
    }

    #[test]
    fn a_kind_is_found_by_name_and_by_alias() {
        for (name, kind) in [("null", "null"), ("mem", "mem"), ("file", "file"), ("loop", "file"), ("zoned", "zoned")] {
            assert_eq!(parse(&["-t", name, "-f", "disk.img"]).unwrap().kind().name(), kind);
        }
        assert!(parse(&["-t", "tape"]).unwrap_err().to_string().contains("null, mem, file, zoned"));
    }

    #[test]
    fn a_file_is_required_by_the_kind_under_all_its_names() {
        for name in ["file", "loop"] {
            assert!(parse(&["-t", name]).unwrap_err().to_string().contains("--file <PATH>"), "{name}");
        }
        for name in ["null", "mem", "zoned"] {
            parse(&["-t", name]).unwrap();
        }
    }

    #[test]
    fn options_of_another_kind_are_refused() {
        for (words, message) in [
            (&["-t", "mem", "-f", "disk.img"][..], "file = disk.img: only for -t file and -t zoned"),
            (&["-t", "null", "--integrity", "ip"], "integrity metadata = true: only supported by -t mem and -t file"),
        ] {
            assert_eq!(parse(words).unwrap().create().unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_disk_is_resized_within_its_backing_store() {
        let new_size = |words: &[&str], wish| parse(words).unwrap().new_size(wish, 1 << 20, None);
        assert_eq!(new_size(&["-t", "null"], Some(1 << 40)).unwrap(), 1 << 40);
        assert_eq!(new_size(&["-t", "mem", "-s", "1M"], Some(512)).unwrap(), 512);
        for (words, wish, message) in [
            (
                &["-t", "mem", "-s", "1M"][..],
                Some(2 << 20),
                "size = 2097152: exceeds the backing store (1048576 bytes)",
            ),
            (&["-t", "mem"], None, "size = 1048576: --size is required unless the disk is stored in a file"),
            (&["-t", "zoned"], Some(512), "size = 1048576: a zoned disk cannot be resized"),
        ] {
            assert_eq!(new_size(words, wish).unwrap_err().to_string(), message);
        }
    }
}
