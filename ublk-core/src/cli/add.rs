// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};

use super::shape::Switch;
use super::state::{Origin, State};
use super::target::{self, Kind};
use super::{Failure, Host, Outcome, daemon, serve, state};
use crate::control::{Control, DeviceInfo};
use crate::data::DataMovement;
use crate::data::shared::SharedMemory;
use crate::device::{Device, DeviceOptions, Recovery, Server};
use crate::driver::kernel::KernelDriver;
use crate::engine::StdSpawn;
use crate::error::{Error, Result};
use crate::placement::Cpus;
use crate::pressure;
use crate::targets;
use crate::units::DeviceId;

/// What `--recovery` without a value means.
const DEFAULT_RECOVERY: Recovery = Recovery::Reissue;
/// The possible values of `--recovery`.
fn recovery() -> impl TypedValueParser<Value = Recovery> {
    // The reference tool's `-r 1` is this tool's `-r`.
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

/// Parses `--cpus`.
fn cpus(text: &str) -> Result<Cpus> {
    match text {
        "off" => Ok(Cpus::Any),
        "auto" => Ok(Cpus::OfQueues),
        list => list.parse().map(Cpus::Only),
    }
}

/// The possible values of `--data`.
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
    #[arg(long = daemon::REPORT_FLAG, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    if let Some(report) = args.report {
        let origin = Origin::here(&daemon::without_report(arguments))?;
        return daemon::child(report, args.log.as_deref(), |ready| serve(args, &origin, None, ready));
    }
    if args.foreground {
        return serve(args, &Origin::here(arguments)?, None, daemon::print_paths);
    }
    daemon::parent(arguments, host, daemon::Devices::Made)
}

/// Makes the device, or gives one that waits for a server a new one, calls `ready` when it can be used, and
/// serves it to its end. `origin` is for the device's next server.
pub(super) fn serve(
    args: &Args,
    origin: &Origin,
    waiting: Option<DeviceId>,
    ready: impl FnOnce(&[Device], &serve::Signals) -> Outcome,
) -> Outcome {
    // Before any thread is made: they inherit the mask.
    let signals = serve::Signals::block()?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    if threads == 0 {
        return Err(Error::invalid("threads", 0, "must be at least 1").into());
    }
    args.check()?;
    serve::raise_file_limit();
    if args.protect {
        pressure::refuse_oom_kill()?;
    }
    if args.lock_memory {
        pressure::lock_memory()?;
    }
    // A disk that is in use is served rather on other CPUs than not at all.
    let (cpus, fallback) = if waiting.is_some() { args.cpus.available() } else { (args.cpus, None) };
    if let Some(fallback) = fallback {
        log::warn!("{fallback}");
    }
    let server = Server::with(Arc::new(KernelDriver::open()?), Arc::new(StdSpawn), threads)
        .on_cpus(cpus)?
        .coalescing(Duration::from_micros(args.coalesce_usecs.into()))?;
    let options = DeviceOptions {
        id: args.id.map(DeviceId),
        queues: args.queues,
        depth: args.depth,
        data: args.data,
        batch: args.batch.map(|batch| batch == Switch::On),
        threads_per_queue: args.threads_per_queue,
        recovery: args.recovery,
        shared_memory: args.shared_memory.is_some(),
        partition_scan: !args.no_partition_scan,
    };
    let mut devices = Vec::new();
    // On an error the devices are dropped, which stops and deletes them.
    match waiting {
        None => {
            for _ in 0..args.count {
                devices.push(server.start(args.target.create()?, &options)?);
            }
        }
        Some(id) => {
            // The old server has the file for itself.
            server.wait_for_vacancy(id)?;
            let disk = server.control().params(id)?.params;
            devices.push(server.recover(id, args.target.reopen(&disk)?)?);
        }
    }
    for device in devices.iter().filter(|_| args.shared_memory.is_some()) {
        share(device, args.shared_memory.as_deref().unwrap_or("".as_ref()))?;
    }
    let reported = keep(&devices, origin, options.recovery.is_some()).and_then(|()| ready(&devices, &signals));
    if let Err(failure) = reported {
        forget(devices, waiting.is_some());
        return Err(failure);
    }
    serve::run(&signals, devices)
}

/// Lets clients of a device use a file's memory.
fn share(device: &Device, path: &Path) -> Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(|e| Error::file("open", path, &e))?;
    let len = targets::file_size(path)?;
    let memory = SharedMemory::map(&file, len, false).map_err(|e| Error::file("map", path, &e))?;
    device.share_memory(memory).map(drop)
}

/// Writes down what the devices' next servers need to know; for those that may have one, it must work.
fn keep(devices: &[Device], origin: &Origin, needed: bool) -> Outcome {
    for device in devices {
        match State::of(device, origin).and_then(|state| state.save(device.id())) {
            Err(failure) if needed => return Err(failure),
            Err(Failure::Text(why)) => log::warn!("{why}"),
            _ => {}
        }
    }
    Ok(())
}

/// Ends devices whose server could not report them. One that was there before is left as it was found.
fn forget(devices: Vec<Device>, found: bool) {
    for device in devices {
        let (id, instance) = (device.id(), state::instance(device.id()));
        if found {
            if let Err(error) = device.leave() {
                log::debug!("leaving device {id}: {error}");
                // To drop it is to delete it; the end of this process leaves it, too.
                std::mem::forget(device);
            }
        } else {
            drop(device);
            state::remove(id, instance);
        }
    }
}

impl Args {
    /// Makes relative paths relative to another directory.
    pub(super) fn resolve(&mut self, directory: &Path) {
        self.target.resolve(directory);
        self.shared_memory = self.shared_memory.take().map(|file| directory.join(file));
        self.log = self.log.take().map(|log| directory.join(log));
    }

    /// Refuses options that cannot be combined.
    fn check(&self) -> Result<()> {
        self.check_recovery()?;
        if self.count > 1 && (self.target.file().is_some() || self.id.is_some()) {
            return Err(Error::invalid("count", self.count, "cannot be combined with --file or --number"));
        }
        if self.count > 1 && self.recovery.is_some() {
            return Err(Error::invalid("count", self.count, "cannot be combined with --recovery"));
        }
        if self.shared_memory.is_some() && (self.recovery.is_some() || self.count > 1) {
            let rule = "cannot be combined with --recovery or --count";
            return Err(Error::invalid("shared memory", true, rule));
        }
        Ok(())
    }

    /// Refuses to recover a disk whose data is in its server's memory: the next server would put an empty disk under a
    /// mounted file system.
    pub(super) fn check_recovery(&self) -> Result<()> {
        match self.recovery {
            Some(recovery) if self.target.is_volatile() => Err(Error::invalid(
                "recovery",
                recovery.name(),
                "the disk's data is in the server's memory and is lost with it; use -t file, or -t zoned with --file",
            )),
            _ => Ok(()),
        }
    }

    /// Checks what can be checked of a device's next server while the last one is still running: whether its files can be
    /// opened, and whether the target fits the disk.
    pub(super) fn check_successor(&self, control: &Control, info: &DeviceInfo) -> Result<()> {
        self.check_recovery()?;
        if let Some(log) = &self.log {
            let opened = std::fs::OpenOptions::new().create(true).append(true).open(log);
            opened.map_err(|e| Error::file("open the log", log, &e))?;
        }
        self.target.check_reopen(control, info)
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
