// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk del`.

use super::{Failure, Outcome};
use crate::control::{Control, Removal};
use crate::error::{Error, Result};
use crate::uapi::DeviceState;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(super) struct Args {
    /// Number of a device to remove; may be given several times
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    ids: Vec<u32>,
    /// Remove all devices
    #[arg(short, long)]
    all: bool,
    /// Remove the devices whose server is gone
    #[arg(long)]
    dead: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let control = super::control()?;
    let ids = if args.ids.is_empty() {
        chosen(&control, args.dead)?
    } else {
        args.ids.iter().copied().map(DeviceId).collect()
    };
    let mut outcome = Ok(());
    for id in ids {
        match control.remove(id) {
            Ok(Removal::Complete) => {}
            Ok(Removal::HeldOpen) => {
                eprintln!("ublk: device {id} is deleted, but somebody still holds it open; its id is free after that");
            }
            Err(error) => {
                // The others are removed all the same.
                eprintln!("ublk: {error}");
                outcome = Err(Failure::Reported);
            }
        }
    }
    outcome
}

/// All devices, or all without a server.
fn chosen(control: &Control, dead_only: bool) -> Result<Vec<DeviceId>> {
    let mut ids = control.driver().device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))?;
    if dead_only {
        let mut dead = Vec::new();
        for id in ids {
            if !is_served(control, id)? {
                dead.push(id);
            }
        }
        ids = dead;
    }
    Ok(ids)
}

/// Whether a server has the device.
fn is_served(control: &Control, id: DeviceId) -> Result<bool> {
    let info = control.info(id)?;
    Ok(match info.state {
        DeviceState::Live => true,
        // A server that is just starting has no pid yet, but the char device admits one opener only.
        DeviceState::Dead => control.driver().open_char(id).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)),
        _ => info.pid > 0 && std::path::Path::new(&format!("/proc/{}", info.pid)).exists(),
    })
}
