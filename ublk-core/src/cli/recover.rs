// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk recover`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::state::State;
use super::{Host, Outcome, add, daemon};
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Number of the device
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// Serve in this process until SIGINT, SIGTERM, SIGHUP or the device's deletion
    #[arg(long)]
    foreground: bool,
    /// Where a server in the background writes its messages [default: where the last one did]
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    log: Option<PathBuf>,
    /// Where a server in the background tells that it is ready
    #[arg(long = daemon::REPORT_FLAG, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    let id = DeviceId(args.id);
    if let Some(report) = args.report {
        // By default, a device keeps its log. Without a state there will be no server, and the reason is said there.
        let kept = || State::load(id).and_then(|state| state.add_args()).ok()?.log().map(Path::to_owned);
        let log = args.log.clone().or_else(kept);
        return daemon::child(report, log.as_deref(), |ready| recover(id, ready));
    }
    if args.foreground {
        return recover(id, daemon::print_paths);
    }
    daemon::parent(arguments, host, daemon::Devices::Found)
}

fn recover(id: DeviceId, ready: impl FnOnce(&[crate::Device]) -> Outcome) -> Outcome {
    let state = State::load(id)?;
    add::serve(&state.add_args()?, &state.origin(), Some(id), ready)
}
