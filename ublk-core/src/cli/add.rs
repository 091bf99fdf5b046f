// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk add`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use super::{Failure, Host, Outcome, daemon, serve, size};
use crate::data::DataMovement;
use crate::device::{DeviceOptions, Server};
use crate::driver::kernel::KernelDriver;
use crate::engine::StdSpawn;
use crate::error::{Error, Result};
use crate::params::{Operations, Params};
use crate::target::Target;
use crate::targets::{File, FileOptions, Io, Mem, Null};
use crate::units::DeviceId;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// Accepts everything, stores nothing
    Null,
    /// A RAM disk
    Mem,
    /// A disk in a file or on another block device
    #[value(alias = "loop")]
    File,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum IoMode {
    /// Direct if the file system can
    Auto,
    /// O_DIRECT
    Direct,
    /// Through the page cache
    Buffered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// The possible values of `--data`.
fn movement() -> impl TypedValueParser<Value = DataMovement> {
    let named = |name: String| DataMovement::ALL.into_iter().find(|movement| movement.name() == name);
    PossibleValuesParser::new(DataMovement::ALL.map(DataMovement::name))
        .try_map(move |name| named(name).ok_or("unknown"))
}

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// What serves the device
    #[arg(short = 't', long = "type", value_enum)]
    kind: Kind,
    /// Backing file or block device (file)
    #[arg(short, long, value_name = "PATH", required_if_eq("kind", "file"))]
    file: Option<PathBuf>,
    /// Number of the device [default: the lowest free one]
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: Option<u32>,
    /// Hardware queues; the driver makes no more of them than there are CPUs
    #[arg(short, long, default_value_t = 1)]
    queues: u32,
    /// Requests per queue, 1 to 4096
    #[arg(short, long, default_value_t = 128)]
    depth: u32,
    /// Size, e.g. 512M [default: 250G for null, 1G for mem, all of the file for file]
    #[arg(short, long, value_parser = size::parse)]
    size: Option<u64>,
    /// Logical block size: a power of two from 512 to 4096 [default: 512, or what the file needs]
    #[arg(short, long, value_name = "BYTES", value_parser = size::parse_u32)]
    block_size: Option<u32>,
    /// Physical block size
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    physical_block_size: Option<u32>,
    /// Longest read or write [default: 512K]
    #[arg(long, value_name = "BYTES", value_parser = size::parse_u32)]
    max_io: Option<u32>,
    /// How data moves [default: what fits the target best among what the driver offers]
    #[arg(long, value_name = "MOVEMENT", value_parser = movement())]
    data: Option<DataMovement>,
    /// Whether requests go to and from the driver in batches [default: where the driver has them]
    #[arg(long, value_enum, value_name = "SWITCH")]
    batch: Option<Switch>,
    /// Threads that share each queue
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads_per_queue: u32,
    /// Refuse writes
    #[arg(short = 'o', long)]
    read_only: bool,
    /// Report the disk as rotational
    #[arg(long)]
    rotational: bool,
    /// How the backing file is accessed (file)
    #[arg(long, value_enum, default_value = "auto")]
    io: IoMode,
    /// Most threads that serve queues [default: one per CPU]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Serve in this process until SIGINT, SIGTERM, SIGHUP or the device's deletion
    #[arg(long)]
    foreground: bool,
    /// Where a server in the background writes its messages [default: /run/ublk/ublkbN.log]
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    log: Option<PathBuf>,
    /// Where a server in the background tells that it is ready
    #[arg(long = daemon::REPORT_FLAG, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    if let Some(report) = args.report {
        return daemon::child(report, args.log.as_deref(), |ready| serve(args, ready));
    }
    if args.foreground {
        return serve(args, |device| super::print(&format!("{}\n", device.path().display())));
    }
    daemon::parent(arguments, host)
}

/// Makes the device, calls `ready` when it can be used, and serves it to its end.
fn serve(args: &Args, ready: impl FnOnce(&crate::Device) -> Outcome) -> Outcome {
    // Before any thread is made: they inherit the mask.
    let signals = serve::Signals::block()?;
    let target = target(args)?;
    let threads = args.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    if threads == 0 {
        return Err(Error::invalid("threads", 0, "at least one is needed").into());
    }
    let server = Server::with(Arc::new(KernelDriver::open()?), Arc::new(StdSpawn), threads);
    let options = DeviceOptions {
        id: args.id.map(DeviceId),
        queues: args.queues,
        depth: args.depth,
        data: args.data,
        batch: args.batch.map(|batch| batch == Switch::On),
        threads_per_queue: args.threads_per_queue,
    };
    let device = server.start(target, &options)?;
    // On an error the device is dropped here, which stops and deletes it.
    ready(&device)?;
    signals.wait_with(&device)?;
    device.stop().map_err(Failure::from)
}

fn target(args: &Args) -> Result<Arc<dyn Target>> {
    if args.file.is_some() && args.kind != Kind::File {
        return Err(Error::invalid("file", args.file.as_deref().unwrap_or("".as_ref()).display(), "only for -t file"));
    }
    let block = args.block_size.unwrap_or(512);
    Ok(match args.kind {
        Kind::Null => {
            let mut params = Params::new(args.size.unwrap_or(250 << 30), block);
            params.operations = Operations::all();
            Arc::new(Null::with_params(shape(args, params))?)
        }
        Kind::Mem => {
            let mem = Mem::new(args.size.unwrap_or(1 << 30), block)?;
            Arc::new(Mem::with_params(shape(args, mem.params()))?)
        }
        Kind::File => {
            let options = FileOptions {
                io: match args.io {
                    IoMode::Auto => Io::Auto,
                    IoMode::Direct => Io::Direct,
                    IoMode::Buffered => Io::Buffered,
                },
                read_only: args.read_only,
                logical_block_size: args.block_size,
            };
            let file = File::open(args.file.as_deref().unwrap_or("".as_ref()), &options)?;
            let mut params = shape(args, file.params());
            params.size = args.size.unwrap_or(params.size);
            Arc::new(file.with_params(params)?)
        }
    })
}

/// Applies what the command line says about the disk.
fn shape(args: &Args, mut params: Params) -> Params {
    if let Some(bytes) = args.physical_block_size {
        params.physical_block_size = bytes;
        params.io_min = bytes;
    }
    params.max_io_bytes = args.max_io.unwrap_or(params.max_io_bytes);
    params.read_only |= args.read_only;
    params.rotational |= args.rotational;
    params
}
