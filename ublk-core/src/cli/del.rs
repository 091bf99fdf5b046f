// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk del`.

use std::thread;
use std::time::{Duration, Instant};

use super::{Failure, Outcome, holders, state, station};
use crate::control::{Control, Removal};
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};
use crate::units::DeviceId;

/// How long udev may take to look at a disk after its last use.
const UDEV_PATIENCE: Duration = Duration::from_secs(5);
const UDEV_RETRY: Duration = Duration::from_millis(20);

#[derive(Debug, clap::Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["ids", "all", "dead"]))]
pub(super) struct Args {
    /// Number of a device to remove; may be given several times
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    ids: Vec<u32>,
    /// Remove all devices
    #[arg(short, long)]
    all: bool,
    /// Remove the devices whose server is gone, but for those that wait for another one
    #[arg(long)]
    dead: bool,
    /// Remove devices that are open or mounted too: whoever uses them gets errors
    #[arg(short, long)]
    force: bool,
    /// Do not wait until the numbers are free again
    #[arg(long = "async")]
    no_wait: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let control = super::control()?;
    let ids =
        if args.ids.is_empty() { chosen(&control, args)? } else { args.ids.iter().copied().map(DeviceId).collect() };
    let mut outcome = Ok(());
    for id in ids {
        if let Err(failure) = remove(&control, id, args) {
            // The others are removed all the same.
            match failure {
                Failure::Error(error) => eprintln!("ublk: {error}"),
                Failure::Text(text) => eprintln!("ublk: {text}"),
                Failure::Reported => {}
            }
            outcome = Err(Failure::Reported);
        }
    }
    station::sweep_all();
    outcome
}

fn remove(control: &Control, id: DeviceId, args: &Args) -> Outcome {
    let instance = state::instance(id);
    if !args.force {
        refuse_if_in_use(control, id)?;
    }
    if args.no_wait {
        control.stop(id)?;
        match control.delete_async(id) {
            // Its server may well have been quicker, as it sees the stop.
            Err(error) if error.errno() != crate::Errno::ENODEV => return Err(error.into()),
            _ => {}
        }
    } else if control.remove(id)? == Removal::HeldOpen {
        eprintln!("ublk: device {id} is deleted, but somebody still holds it open; its id is free after that");
    }
    state::remove(id, instance);
    Ok(())
}

/// Stops a device that nobody uses. What uses it is named.
fn refuse_if_in_use(control: &Control, id: DeviceId) -> Outcome {
    let info = control.info(id)?;
    if info.state == DeviceState::Dead {
        return Ok(());
    }
    let path = control.driver().block_path(id);
    let in_use = |how: &str| {
        let who = holders::describe(&path);
        let who = if who.is_empty() { how.to_owned() } else { who };
        Failure::Text(format!("device {id} is in use ({who}); `ublk del --force` removes it all the same"))
    };
    if info.features.contains(Features::SAFE_STOP_DEV) {
        let deadline = Instant::now() + UDEV_PATIENCE;
        loop {
            match control.try_stop(id) {
                // Stopped meanwhile.
                Err(Error::Control { errno: crate::Errno::ENODEV, .. }) | Ok(()) => return Ok(()),
                Err(Error::Control { errno: crate::Errno::EBUSY, .. }) => {}
                Err(error) => return Err(error.into()),
            }
            // Whoever nobody can see is most likely udev.
            if Instant::now() >= deadline || !holders::describe(&path).is_empty() {
                return Err(in_use("open"));
            }
            thread::sleep(UDEV_RETRY);
        }
    }
    // Before Linux 7.0 the driver cannot tell; a moment's use may go unnoticed.
    if holders::is_claimed(&path) || !holders::describe(&path).is_empty() {
        return Err(in_use("mounted or claimed"));
    }
    Ok(())
}

/// All devices, or all without a server.
fn chosen(control: &Control, args: &Args) -> Result<Vec<DeviceId>> {
    let mut ids = control.driver().device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))?;
    if args.dead {
        let mut dead = Vec::new();
        for id in ids {
            if is_dead(control, id, args.force)? {
                dead.push(id);
            }
        }
        ids = dead;
    }
    Ok(ids)
}

/// Whether no server has the device. One that waits for another server holds somebody's requests.
fn is_dead(control: &Control, id: DeviceId, waiting_too: bool) -> Result<bool> {
    let info = control.info(id)?;
    Ok(match info.state {
        DeviceState::Live => false,
        // A server that is just starting has no pid yet, but the char device admits one opener only.
        DeviceState::Dead => !control.driver().open_char(id).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY)),
        _ => waiting_too && !(info.pid > 0 && std::path::Path::new(&format!("/proc/{}", info.pid)).exists()),
    })
}
