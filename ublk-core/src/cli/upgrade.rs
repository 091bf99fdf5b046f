// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk upgrade`.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::state::State;
use super::{Failure, Host, Outcome, daemon};
use crate::control::DRAIN_TIMEOUT;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Number of the device
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// The program of the new server [default: this one]
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
}

pub(super) fn run(args: &Args, host: &Host) -> Outcome {
    let id = DeviceId(args.id);
    let control = super::control()?;
    let mut host = host.clone();
    if let Some(program) = &args.program {
        check_program(program)?;
        host.relaunch = vec![program.clone().into()];
    }
    // All that can fail is to fail before the old server goes.
    control.require_quiesce(&control.info(id)?)?;
    State::load(id)?.add_args()?.check(control.params(id)?.params.size)?;
    control.quiesce_until(id, DRAIN_TIMEOUT)?;
    let recover = ["recover".into(), "-n".into(), id.to_string().into()];
    daemon::parent(&recover, &host, daemon::Devices::Found).map_err(|failure| {
        let why = match failure {
            Failure::Error(error) => error.to_string(),
            Failure::Text(text) => text,
            Failure::Reported => return Failure::Reported,
        };
        Failure::Text(format!(
            "{why}\nublk: device {id} has no server now, and its requests wait: `ublk recover -n {id}` serves it again, \
             `ublk del --force -n {id}` fails them"
        ))
    })
}

/// Whether a program can be the new server.
fn check_program(program: &std::path::Path) -> Outcome {
    let failed =
        |why: &dyn std::fmt::Display| Failure::Text(format!("{} cannot be the new server: {why}", program.display()));
    let status = Command::new(program)
        .args(["recover", "--help"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .map_err(|e| failed(&e))?;
    if status.success() { Ok(()) } else { Err(failed(&"it does not know `recover`")) }
}
