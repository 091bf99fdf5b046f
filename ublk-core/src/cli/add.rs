// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::FromArgMatches;
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use super::background;
use super::backing_files;
use super::failure::{Failure, Outcome};
use super::host::Host;
use super::server::{self, Signals};
use super::state_file::CommandLine;
use super::target::{self, Kind, Switch};
use crate::control::{Control, DeviceInfo};
use crate::data::DataMovement;
use crate::device::Device;
use crate::error::{Error, Parameter, Result};
use crate::options::{DeviceOptions, Recovery};
use crate::placement::Cpus;
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// Meaning of `--recovery` without a value.
const DEFAULT_RECOVERY: Recovery = Recovery::Reissue;
/// Parser of `--recovery`.
fn recovery() -> impl TypedValueParser<Value = Recovery> {
    // For scripts that were written for the reference tool, whose option is `-r 1`.
    let named = |name: String| match name.as_str() {
        "1" => Some(DEFAULT_RECOVERY),
        name => Recovery::ALL.into_iter().find(|recovery| recovery.name() == name),
    };
    let value = |recovery: Recovery| {
        let value = PossibleValue::new(recovery.name());
        if recovery == DEFAULT_RECOVERY { value.alias("1") } else { value }
    };
    PossibleValuesParser::new(Recovery::ALL.map(value)).try_map(move |name| named(name).ok_or("unknown"))
}

/// Parser of `--cpus`.
fn cpus(text: &str) -> Result<Cpus> {
    match text {
        "off" => Ok(Cpus::Any),
        "auto" => Ok(Cpus::OfQueues),
        list => list.parse().map(Cpus::Only),
    }
}

/// Parser of `--data`.
fn movement() -> impl TypedValueParser<Value = DataMovement> {
    let named = |name: String| DataMovement::ALL.into_iter().find(|movement| movement.name() == name);
    PossibleValuesParser::new(DataMovement::ALL.map(DataMovement::name))
        .try_map(move |name| named(name).ok_or("unknown"))
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    target: target::Args,
    /// Device number [default: the lowest free one]
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: Option<u32>,
    /// Number of devices to create, all served by one process (null, mem)
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    count: u32,
    /// Number of hardware queues; the driver creates at most one per CPU
    #[arg(short, long, default_value_t = 1)]
    queues: u32,
    /// Requests in flight per queue, 1 to 4096
    #[arg(short, long, default_value_t = 128)]
    depth: u32,
    /// How data moves between clients and the server [default: the fastest that driver and target support]
    #[arg(long, value_name = "MOVEMENT", value_parser = movement())]
    data: Option<DataMovement>,
    /// Exchange requests with the driver in batches, which costs more for single requests [default: on where the driver
    /// supports it, except with --recovery or --depth 1]
    #[arg(long, value_enum, value_name = "SWITCH")]
    batch: Option<Switch>,
    /// Number of threads that serve each queue
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads_per_queue: u32,
    /// Keep the device when its server exits, for `ublk recover` and `ublk upgrade`, and queue, reissue or fail its
    /// requests meanwhile. Not available for disks in memory (mem, and zoned without --file)
    #[arg(short, long, value_name = "HOW", num_args = 0..=1, default_missing_value = "reissue", value_parser = recovery())]
    recovery: Option<Recovery>,
    /// File on tmpfs or hugetlbfs that clients map to do direct I/O without copying
    #[arg(long, value_name = "FILE")]
    shared_memory: Option<PathBuf>,
    /// Do not scan for partitions
    #[arg(long)]
    no_partition_scan: bool,
    /// Maximum number of threads that serve queues [default: one per CPU]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// CPUs to serve the queues on: `auto` for those that submit to each queue, a list like 0-3,8, or `off`
    #[arg(long, value_name = "CPUS", default_value = "off", value_parser = cpus)]
    cpus: Cpus,
    /// Coalesce requests: under load, wait up to N microseconds and handle what has arrived as one batch, for less work
    /// per request and more latency
    #[arg(long, value_name = "N", default_value_t = 0)]
    coalesce_usecs: u32,
    /// Lock the server's memory in RAM, for disks that hold swap or a root file system
    #[arg(long)]
    lock_memory: bool,
    /// Exempt the server from the OOM killer, for disks that hold swap or a root file system
    #[arg(long)]
    protect: bool,
    /// Serve in the foreground until SIGINT, SIGTERM, SIGHUP or deletion of the device
    #[arg(long)]
    foreground: bool,
    /// Log file of a background server [default: /run/ublk/ublkbN.log]
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    log: Option<PathBuf>,
    /// Descriptor on which a background server reports that it is ready
    #[arg(long = background::REPORT_OPTION, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    if let Some(report) = args.report {
        let line = CommandLine::new(&background::without_report(arguments))?;
        return background::run(report, args.log.as_deref(), |ready| args.serve(&line, None, ready));
    }
    if args.foreground {
        return args.serve(&CommandLine::new(arguments)?, None, server::print_paths);
    }
    background::start(arguments, host, background::Devices::New)
}

impl Args {
    /// Parses a stored command line. Relative paths become absolute.
    pub(super) fn parse(line: &CommandLine) -> Result<Self, Failure> {
        let invalid =
            || Failure::Text(format!("the stored command line is not one of `ublk add`: {:?}", line.arguments()));
        // The first word, `add`, takes the place of the program's name.
        if line.arguments().first().is_none_or(|word| word != "add") {
            return Err(invalid());
        }
        let matches = <Self as clap::Args>::augment_args(clap::Command::new("add"))
            .try_get_matches_from(line.arguments())
            .map_err(|_| invalid())?;
        let mut args = Self::from_arg_matches(&matches).map_err(|_| invalid())?;
        args.resolve(line.directory());
        Ok(args)
    }

    /// Creates the device, or gives the device `existing` a new server, and serves it to its end.
    pub(super) fn serve(
        &self,
        line: &CommandLine,
        existing: Option<DeviceId>,
        ready: impl FnOnce(&[Device], &Signals) -> Outcome,
    ) -> Outcome {
        self.check()?;
        let options = server::Options {
            target: &self.target,
            device: DeviceOptions {
                id: self.id.map(DeviceId),
                queues: self.queues,
                depth: self.depth,
                data: self.data,
                batch: self.batch.map(|batch| batch == Switch::On),
                threads_per_queue: self.threads_per_queue,
                recovery: self.recovery,
                shared_memory: self.shared_memory.is_some(),
                partition_scan: !self.no_partition_scan,
            },
            count: self.count,
            shared_memory: self.shared_memory.as_ref(),
            threads: self.threads,
            cpus: self.cpus,
            coalescing: Duration::from_micros(self.coalesce_usecs.into()),
            lock_memory: self.lock_memory,
            protect: self.protect,
        };
        server::run(&options, line, existing, ready)
    }

    fn resolve(&mut self, directory: &Path) {
        self.target.resolve(directory);
        self.shared_memory = self.shared_memory.take().map(|file| directory.join(file));
        self.log = self.log.take().map(|log| directory.join(log));
    }

    /// Refuses options that cannot be combined.
    fn check(&self) -> Result<()> {
        if self.threads == Some(0) {
            return Err(Error::invalid(Parameter::CommandLine("threads"), 0, "must be at least 1"));
        }
        self.check_recovery()?;
        if self.count > 1 && (self.target.file().is_some() || self.id.is_some()) {
            return Err(Error::conflict(
                Parameter::CommandLine("count"),
                self.count,
                "cannot be combined with --file or --number",
            ));
        }
        if self.count > 1 && self.recovery.is_some() {
            return Err(Error::conflict(
                Parameter::CommandLine("count"),
                self.count,
                "cannot be combined with --recovery",
            ));
        }
        if self.shared_memory.is_some() && (self.recovery.is_some() || self.count > 1) {
            let rule = "cannot be combined with --recovery or --count";
            return Err(Error::conflict(Parameter::SharedMemory, true, rule));
        }
        Ok(())
    }

    /// Refuses to recover a disk whose data is in its server's memory: the next server would put an empty disk under a
    /// mounted file system.
    pub(super) fn check_recovery(&self) -> Result<()> {
        match self.recovery {
            Some(recovery) if self.target.is_volatile() => Err(Error::conflict(
                Parameter::Recovery,
                recovery.name(),
                "the disk's data is in the server's memory and is lost with it; use -t file, or -t zoned with --file",
            )),
            _ => Ok(()),
        }
    }

    /// Checks what can be checked of a device's next server while the last one is still running: whether its files are the
    /// same and can be opened, and whether the target fits the disk. `line` is where these options are from.
    pub(super) fn check_successor(&self, line: &CommandLine, control: &Control, info: &DeviceInfo) -> Result<()> {
        self.check_recovery()?;
        self.check_files(line)?;
        if line.files().is_empty() && info.state == DeviceState::Live {
            backing_files::check_open(&self.target.files(), info.pid)?;
        }
        if let Some(log) = &self.log {
            let opened = std::fs::OpenOptions::new().create(true).append(true).open(log);
            opened.map_err(|e| Error::file("open the log", log, &e))?;
        }
        self.target.check_reopen(control, info)
    }

    /// Refuses files that have replaced those that `line` records.
    pub(super) fn check_files(&self, line: &CommandLine) -> Result<()> {
        backing_files::check(&self.target.files(), line.files())
    }

    /// Returns which part of the backing another command line gives differently.
    pub(super) fn difference(&self, other: &Self) -> Option<&'static str> {
        let real = |args: &Self| args.target.file().map(|file| file.canonicalize().unwrap_or_else(|_| file.to_owned()));
        if self.target.kind() != other.target.kind() {
            return Some("type");
        }
        (other.target.file().is_some() && real(self) != real(other)).then_some("file")
    }

    /// The options that describe the disk.
    pub(super) fn target(&self) -> &target::Args {
        &self.target
    }

    /// The log file that was given.
    pub(super) fn log(&self) -> Option<&Path> {
        self.log.as_deref()
    }
}

/// Returns a command line for serving a device that another program has created.
pub(super) fn words(kind: &Kind, file: Option<&Path>) -> Vec<OsString> {
    let mut words: Vec<OsString> = ["add", "-t", kind.name(), "--recovery"].into_iter().map(OsString::from).collect();
    words.extend(file.into_iter().flat_map(|file| ["-f".into(), file.into()]));
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::server;

    fn parse(line: &[&str]) -> Result<Args, Failure> {
        Args::parse(&CommandLine::new(&line.iter().map(OsString::from).collect::<Vec<_>>())?)
    }

    #[test]
    fn a_stored_command_line_is_parsed_with_absolute_paths() {
        let args = parse(&["add", "-t", "file", "-f", "disk.img", "--recovery", "--log", "disk.log"]).unwrap();
        let directory = std::env::current_dir().unwrap();
        assert_eq!(args.target().file(), Some(&*directory.join("disk.img")));
        assert_eq!(args.log(), Some(&*directory.join("disk.log")));
        for line in [&["list"][..], &["add"], &["add", "-t", "tape"], &[]] {
            assert!(parse(line).unwrap_err().message().unwrap().contains("not one of `ublk add`"), "{line:?}");
        }
    }

    #[test]
    fn a_disk_in_memory_is_not_recoverable() {
        for line in [&["add", "-t", "mem", "-r"][..], &["add", "-t", "zoned", "-r"]] {
            assert!(parse(line).unwrap().check().unwrap_err().to_string().contains("lost with it"), "{line:?}");
        }
        for line in [&["add", "-t", "null", "-r"][..], &["add", "-t", "zoned", "-f", "zones", "-r"]] {
            parse(line).unwrap().check().unwrap();
        }
    }

    /// A restore or a copy ends with a rename.
    #[test]
    fn a_file_that_took_the_disks_name_is_refused_while_the_server_runs() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("disk.img");
        let create = |path: &Path| std::fs::File::create(path).unwrap().set_len(1 << 20).unwrap();
        create(&image);
        let words = ["add", "-t", "file", "-f", image.to_str().unwrap(), "--recovery"].map(OsString::from);
        // A state file of an older version does not record the file.
        let line = CommandLine::new(&words).unwrap();
        let args = Args::parse(&line).unwrap();
        let device =
            server(&FakeDriver::new()).start(args.target.create().unwrap(), &DeviceOptions::default()).unwrap();
        let check = || {
            let info = device.control().info(device.id()).unwrap();
            args.check_successor(&line, device.control(), &info)
        };
        check().unwrap();
        create(&directory.path().join("restored.img"));
        std::fs::rename(directory.path().join("restored.img"), &image).unwrap();
        let message = check().unwrap_err().to_string();
        assert!(message.contains("another one has taken its name"), "{message}");
        device.stop().unwrap();
    }

    #[test]
    fn options_that_cannot_be_combined_are_refused() {
        for (line, message) in [
            (&["--count", "2", "-n", "7"][..], "count = 2: cannot be combined with --file or --number"),
            (&["--count", "2", "-r"], "count = 2: cannot be combined with --recovery"),
            (&["--count", "2", "--shared-memory", "m"], "shared memory = true: cannot be combined with --recovery or"),
            (&["--threads", "0"], "threads = 0: must be at least 1"),
        ] {
            let error = parse(&[&["add", "-t", "null"], line].concat()).unwrap().check().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
