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
    let stopped = !args.force && stop_unless_in_use(control, id)?;
    let removed = if args.no_wait {
        let deleted = if stopped { Ok(()) } else { control.stop(id) };
        deleted.and_then(|()| match control.delete_async(id) {
            // Its server may well have been quicker, as it sees the stop.
            Err(error) if error.errno() == crate::Errno::ENODEV => Ok(Removal::Complete),
            other => other.map(|()| Removal::Complete),
        })
    } else {
        control.remove(id)
    };
    match removed {
        // Its server again.
        Err(error) if stopped && error.errno() == crate::Errno::ENODEV => {}
        Err(error) => return Err(error.into()),
        Ok(Removal::Complete) => {}
        Ok(Removal::HeldOpen) => {
            eprintln!("ublk: device {id} is deleted, but somebody still holds it open; its id is free after that");
        }
    }
    state::remove(id, instance);
    Ok(())
}

/// Refuses to go on with a device that somebody uses, and names him. Where the driver can, it stops the
/// device in the same moment, and this says so.
fn stop_unless_in_use(control: &Control, id: DeviceId) -> std::result::Result<bool, Failure> {
    let info = control.info(id)?;
    if info.state == DeviceState::Dead {
        return Ok(false);
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
                Err(Error::Control { errno: crate::Errno::ENODEV, .. }) | Ok(()) => return Ok(true),
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
    Ok(false)
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::targets::Null;
    use crate::{DeviceOptions, Errno, Server};

    /// A device's server, which sees the stop, deletes it before the command does.
    #[test]
    fn a_server_that_is_quicker_is_no_failure() {
        for no_wait in [false, true] {
            let driver = FakeDriver::new();
            let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
            let device = server.start(Arc::new(Null::new(1 << 20, 512).unwrap()), &DeviceOptions::default()).unwrap();
            for command in ["STOP_DEV", "DEL_DEV", "DEL_DEV_ASYNC"] {
                driver.refuse_next(command, Errno::ENODEV);
            }
            let args = Args { ids: vec![0], all: false, dead: false, force: false, no_wait };
            remove(server.control(), device.id(), &args).unwrap();
            // The refusals that were not used up are not the server's.
            while device.stop().is_err() {}
        }
    }

    #[test]
    fn a_device_that_was_never_there_is_one() {
        let driver = FakeDriver::new();
        let server = Server::with(Arc::new(driver), Arc::new(StdSpawn), 1);
        for force in [false, true] {
            let args = Args { ids: vec![7], all: false, dead: false, force, no_wait: false };
            assert!(remove(server.control(), DeviceId(7), &args).is_err());
        }
    }
}
