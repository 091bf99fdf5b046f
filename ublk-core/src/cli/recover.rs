// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk recover`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::state::{Origin, State};
use super::target::Kind;
use super::{Failure, Host, Outcome, add, daemon, serve, upgrade};
use crate::uapi::DeviceState;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// Kind of disk [default: as before]; needed only for a device that another program created
    #[arg(short = 't', long = "type", value_name = "KIND", value_parser = Kind::parser())]
    kind: Option<&'static Kind>,
    /// Backing file or directory, as for `ublk add` [default: as before]
    #[arg(short, long, value_name = "PATH", requires = "kind")]
    file: Option<PathBuf>,
    /// Serve in the foreground until SIGINT, SIGTERM, SIGHUP or deletion of the device
    #[arg(long)]
    foreground: bool,
    /// Log file of a background server [default: as before]
    #[arg(long, value_name = "FILE", conflicts_with = "foreground")]
    log: Option<PathBuf>,
    /// Only check that this program can serve the device, even while another server does
    #[arg(long, hide = true)]
    check: bool,
    /// Descriptor on which a background server reports that it is ready
    #[arg(long = daemon::REPORT_FLAG, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    let id = DeviceId(args.id);
    if args.check {
        let control = super::control()?;
        return Ok(origin(args)?.add_args()?.check_successor(&control, &control.info(id)?)?);
    }
    if let Some(report) = args.report {
        // By default, a device keeps its log. Without a state there will be no server, and the reason is said there.
        let kept = || origin(args).and_then(|origin| origin.add_args()).ok()?.log().map(Path::to_owned);
        let log = args.log.clone().or_else(kept);
        return daemon::child(report, log.as_deref(), |ready| recover(args, ready));
    }
    if args.foreground {
        return recover(args, daemon::print_paths);
    }
    // Before a process is started for it.
    origin(args)?.add_args()?.check_recovery()?;
    log::debug!("starting a background server for device {id}");
    let recovered = daemon::parent(arguments, host, daemon::Devices::Found);
    recovered.map_err(|failure| if has_no_server(id) { upgrade::with_way_back(failure, id, None) } else { failure })
}

/// Whether a device waits for a server.
fn has_no_server(id: DeviceId) -> bool {
    let state = super::control().and_then(|control| control.info(id)).map(|info| info.state);
    matches!(state, Ok(DeviceState::Quiesced | DeviceState::FailIo))
}

fn recover(args: &Args, ready: impl FnOnce(&[crate::Device], &serve::Signals) -> Outcome) -> Outcome {
    let origin = origin(args)?;
    add::serve(&origin.add_args()?, &origin, Some(DeviceId(args.id)), ready)
}

/// The command line that made the device. One that another program has made is served as this command line says.
fn origin(args: &Args) -> Result<Origin, Failure> {
    let id = DeviceId(args.id);
    let Some(kind) = args.kind else { return State::load(id).map(|state| state.origin()) };
    let given = Origin::here(&add::words(kind, args.file.as_deref()))?;
    let Some(state) = State::find(id)? else { return Ok(given) };
    // Another file under a disk in use is never meant.
    let (made, given) = (state.add_args()?, given.add_args()?);
    match made.difference(&given) {
        None => Ok(state.origin()),
        Some(what) => Err(Failure::Text(format!("device {id} was created with another {what}: omit -t and -f"))),
    }
}
