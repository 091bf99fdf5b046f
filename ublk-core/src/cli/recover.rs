// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk recover`.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use super::failure::{Failure, Outcome};
use super::host::Host;
use super::server::{self, Signals};
use super::state_file::{CommandLine, StateFile};
use super::target::{Kind, kind_parser};
use super::{add, background};
use crate::control::Control;
use crate::device::Device;
use crate::uapi::DeviceState;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// Kind of disk [default: as before]; needed only for a device that another program created
    #[arg(short = 't', long = "type", value_name = "KIND", value_parser = kind_parser())]
    kind: Option<&'static Kind>,
    /// Backing file or directory, as for `ublk add` [default: as before]
    #[arg(short, long, value_name = "PATH", requires = "kind")]
    file: Option<PathBuf>,
    /// Serve the files that have the stored names now, even if they have replaced the ones that the disk was stored in
    #[arg(long)]
    accept_replaced: bool,
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
    #[arg(long = background::REPORT_OPTION, value_name = "FD", hide = true)]
    report: Option<RawFd>,
}

pub(super) fn run(args: &Args, arguments: &[OsString], host: &Host) -> Outcome {
    let id = DeviceId(args.id);
    if args.check {
        let control = Control::open()?;
        let (line, add_args) = add_args(args)?;
        return Ok(add_args.check_successor(&line, &control, &control.info(id)?)?);
    }
    if let Some(report) = args.report {
        // By default, a device keeps its log. Without a state file, `recover` below fails and reports why.
        let stored = || add_args(args).ok()?.1.log().map(Path::to_owned);
        let log = args.log.clone().or_else(stored);
        return background::run(report, log.as_deref(), |ready| recover(args, ready));
    }
    if args.foreground {
        return recover(args, server::print_paths);
    }
    // Before a process is started.
    let (line, checked) = add_args(args)?;
    checked.check_recovery()?;
    checked.check_files(&line)?;
    log::debug!("starting a background server for device {id}");
    let recovered = background::start(arguments, host, background::Devices::Existing);
    recovered.map_err(|failure| if has_no_server(id) { with_remedy(failure, id, None) } else { failure })
}

/// Returns whether a device waits for a server.
fn has_no_server(id: DeviceId) -> bool {
    let state = Control::open().and_then(|control| control.info(id)).map(|info| info.state);
    matches!(state, Ok(DeviceState::Quiesced | DeviceState::FailIo))
}

fn recover(args: &Args, ready: impl FnOnce(&[Device], &Signals) -> Outcome) -> Outcome {
    let (line, add_args) = add_args(args)?;
    add_args.serve(&line, Some(DeviceId(args.id)), ready)
}

/// Returns the command line that created the device. For a device that another program created, it is made of this one's
/// options.
fn add_args(args: &Args) -> Result<(CommandLine, add::Args), Failure> {
    let id = DeviceId(args.id);
    let parsed = |line: CommandLine| {
        let line = if args.accept_replaced { line.accept_replaced() } else { line };
        add::Args::parse(&line).map(|args| (line, args))
    };
    let Some(kind) = args.kind else { return parsed(StateFile::load(id)?.command_line()) };
    let given = parsed(CommandLine::new(&add::words(kind, args.file.as_deref()))?)?;
    let Some(state) = StateFile::find(id)? else { return Ok(given) };
    // Another file under a disk in use is a mistake.
    let stored = parsed(state.command_line())?;
    match stored.1.difference(&given.1) {
        None => Ok(stored),
        Some(what) => Err(Failure::Text(format!("device {id} was created with another {what}: omit -t and -f"))),
    }
}

/// Adds to the failure of a new server how the device can be served again. `old` is the program of its last server, if that
/// was another one.
pub(super) fn with_remedy(failure: Failure, id: DeviceId, old: Option<PathBuf>) -> Failure {
    let reason = failure.message().unwrap_or_else(|| "the new server did not start".into());
    Failure::Text(format!("{reason}\nublk: {}", remedy(id, old)))
}

fn remedy(id: DeviceId, old: Option<PathBuf>) -> String {
    let old = old.map_or_else(String::new, |old| format!(" (its last server was {})", old.display()));
    format!(
        "device {id} has no server now, and its requests wait. When the cause is removed, `ublk recover -n {id}` serves it \
         again{old}; `ublk del --force -n {id}` fails the requests and removes it"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_remedy_names_the_command_and_the_old_program() {
        let text = remedy(DeviceId(7), Some("/usr/lib/ublk-1.0".into()));
        assert!(text.contains("`ublk recover -n 7`") && text.contains("/usr/lib/ublk-1.0"), "{text}");
        assert!(!remedy(DeviceId(7), None).contains("last server was"));
    }
}
