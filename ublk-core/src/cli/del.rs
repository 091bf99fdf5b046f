// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk del`.
//!
//! What becomes of a disk in use is decided by how it is used. One that is mounted, swapped to, part of another block
//! device or opened exclusively is never removed without `--force`: its data would be lost. One that processes merely
//! have open is refused to a person at a terminal, who may have mistaken the number, and to those who ask for that with
//! `--unused`. Scripts remove it, and its users get errors: this is what scripts that were written for the reference
//! tool (ublksrv's `ublk`), such as blktests, rely on.

use std::fs;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::holders::{self, Asker, Stop};
use super::state::State;
use super::{Failure, Outcome, state, station, stuck};
use crate::control::{Control, Removal};
use crate::error::{Error, Result};
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// How long a server may take from making a device to opening it; a user's device waits for udev for ten seconds.
const MAKING_PATIENCE: Duration = Duration::from_secs(12);
/// How often a device that may be in the making is looked at.
const MAKING_RETRY: Duration = Duration::from_millis(200);

#[derive(Debug, Default, clap::Args)]
#[group(skip)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["ids", "all", "dead"]))]
pub(super) struct Args {
    /// Device number; may be repeated
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    ids: Vec<u32>,
    /// Remove all devices
    #[arg(short, long)]
    all: bool,
    /// Remove devices whose server has exited, except recoverable ones
    #[arg(long)]
    dead: bool,
    /// Also remove disks that are mounted or in use, whose users get I/O errors, and kill a server that does not release its
    /// device, unless it serves other disks in use
    #[arg(short, long)]
    force: bool,
    /// Also refuse disks that a process has open (the default at a terminal); mounted disks are always refused
    #[arg(long, conflicts_with = "force")]
    unused: bool,
    /// Return without waiting until the device numbers are free again
    #[arg(long = "async")]
    no_wait: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let control = super::control()?;
    let chosen = if args.ids.is_empty() {
        chosen(&control, args)?
    } else {
        args.ids.iter().copied().map(DeviceId).map(|id| (id, None)).collect()
    };
    let mut outcome = Ok(());
    for (id, instance) in chosen {
        // Its number is another device's by now.
        if args.dead && state::instance(id) != instance {
            continue;
        }
        match remove(&control, id, args) {
            Ok(()) => {}
            // It went away by itself.
            Err(Failure::Error(error)) if args.ids.is_empty() && error.errno() == crate::Errno::ENODEV => {}
            // The others are removed all the same.
            Err(failure) => {
                match failure {
                    Failure::Error(error) => eprintln!("ublk: {error}"),
                    Failure::Text(text) => eprintln!("ublk: {text}"),
                    Failure::Reported => {}
                }
                outcome = Err(Failure::Reported);
            }
        }
    }
    station::sweep_all();
    outcome
}

fn remove(control: &Control, id: DeviceId, args: &Args) -> Outcome {
    let instance = state::instance(id);
    let stopped = if args.force {
        // The user has named the others, too.
        stuck::stop(control, id, &|other| args.all || args.ids.contains(&other.0))?;
        true
    } else {
        stop_unless_in_use(control, id, args.unused || is_typed())?
    };
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
            eprintln!(
                "ublk: device {id} is deleted, but a process still has it open; its number becomes free when it is closed"
            );
        }
    }
    state::remove(id, instance);
    Ok(())
}

/// Whether a person has typed the command, and sees what it says. Scripts that are started at a terminal inherit it as
/// their input, too, but those of test suites (blktests) collect what is said.
fn is_typed() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Refuses to go on with a device in use, and names the users. Where the driver can, this stops the device in the same
/// moment, and returns true.
fn stop_unless_in_use(control: &Control, id: DeviceId, refuse_open: bool) -> std::result::Result<bool, Failure> {
    match holders::stop_unused(control, id, Asker::Other)? {
        Stop::Done => Ok(true),
        Stop::NotUsed => Ok(false),
        Stop::Open(who) if !refuse_open => {
            eprintln!("ublk: removing device {id} although it is in use ({who})");
            Ok(false)
        }
        Stop::Open(who) | Stop::Claimed(who) => {
            Err(Failure::Text(format!("device {id} is in use ({who}); use `ublk del --force` to remove it anyway")))
        }
    }
}

/// All devices, or all without a server; each with its instance.
fn chosen(control: &Control, args: &Args) -> Result<Vec<(DeviceId, Option<u64>)>> {
    let ids = control.driver().device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))?;
    let mut chosen = Vec::new();
    for id in ids {
        // Before the look, so that a later device of the same number is told from this one.
        let instance = state::instance(id);
        // A device with a state was served once: it is not in the making.
        let was_served = matches!(State::find(id), Ok(Some(_)));
        let patience = if was_served { Duration::ZERO } else { MAKING_PATIENCE };
        if !args.dead || is_dead(control, id, (args.force, patience), &Opener::find)? {
            chosen.push((id, instance));
        }
    }
    Ok(chosen)
}

/// Whether a device has no server. One that waits for another server holds clients' requests, and counts only if
/// `waiting_too`.
///
/// A device whose server is just making it is DEAD, too, and has no pid. Servers open the char device at once, though; so
/// one that no process has open counts as dead when it is older than `patience`. `opener` looks for the process. The
/// device is opened as a probe, which admits one opener only and would keep out a server that starts at that moment, only
/// where that is not conclusive, and last.
///
/// Devices of other users, which cannot be looked at, and devices that go away meanwhile do not count.
fn is_dead(
    control: &Control,
    id: DeviceId,
    (waiting_too, patience): (bool, Duration),
    opener: &dyn Fn(DeviceId) -> Opener,
) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let info = match control.info(id) {
            Ok(info) => info,
            Err(error) if is_gone_or_anothers(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        match info.state {
            DeviceState::Live => return Ok(false),
            DeviceState::Dead => {
                let opener = opener(id);
                if opener == Opener::Process {
                    return Ok(false);
                }
                if Instant::now() >= deadline || age(id).is_some_and(|age| age >= patience) {
                    return Ok(opener == Opener::None || !is_open(control, id));
                }
                thread::sleep(MAKING_RETRY.min(patience));
            }
            _ => return Ok(waiting_too && !crate::process::is_alive(info.pid)),
        }
    }
}

/// Whether a process has a char device open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Opener {
    Process,
    None,
    /// There may be processes that this one does not see.
    Unknown,
}

impl Opener {
    /// Looks for the process that has a device open.
    fn find(id: DeviceId) -> Self {
        let Ok(node) = fs::metadata(format!("/dev/ublkc{id}")) else { return Opener::Unknown };
        match holders::has_opener(|file| file.char_device() == Some(node.rdev())) {
            Ok(true) => Opener::Process,
            Ok(false) if holders::sees_all_processes() => Opener::None,
            _ => Opener::Unknown,
        }
    }
}

/// Whether a char device is open, found by opening it.
fn is_open(control: &Control, id: DeviceId) -> bool {
    control.driver().open_char(id).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

fn is_gone_or_anothers(error: &Error) -> bool {
    use crate::Errno::{EACCES, ENODEV, ENOENT, EPERM};
    matches!(error.errno(), ENODEV | ENOENT | EACCES | EPERM)
}

/// How long ago a device was made: devtmpfs makes its node then.
fn age(id: DeviceId) -> Option<Duration> {
    let node = fs::symlink_metadata(format!("/dev/ublkc{id}")).ok()?;
    let made = node.created().or_else(|_| node.modified()).ok()?;
    SystemTime::now().duration_since(made).ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::target::Target;
    use crate::targets::Null;
    use crate::{DeviceOptions, Errno, Server};

    fn server(driver: &FakeDriver) -> Server {
        Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1)
    }

    fn null() -> Arc<dyn Target> {
        Arc::new(Null::new(1 << 20, 512).unwrap())
    }

    /// A device's server, which sees the stop, deletes it before the command does.
    #[test]
    fn a_server_that_is_quicker_is_no_failure() {
        for no_wait in [false, true] {
            let driver = FakeDriver::new();
            let server = server(&driver);
            let device = server.start(null(), &DeviceOptions::default()).unwrap();
            for command in ["STOP_DEV", "DEL_DEV", "DEL_DEV_ASYNC"] {
                driver.refuse_next(command, Errno::ENODEV);
            }
            let args = Args { ids: vec![0], no_wait, ..Args::default() };
            remove(server.control(), device.id(), &args).unwrap();
            // The refusals that were not used up are not the server's.
            while device.stop().is_err() {}
        }
    }

    #[test]
    fn a_device_that_was_never_there_is_one() {
        let server = server(&FakeDriver::new());
        for force in [false, true] {
            let args = Args { ids: vec![7], force, ..Args::default() };
            assert!(remove(server.control(), DeviceId(7), &args).is_err());
        }
    }

    #[test]
    fn a_device_in_the_making_is_not_dead() {
        let driver = FakeDriver::new();
        let server = server(&driver);
        let device = server.add(&null(), &DeviceOptions::default()).unwrap();
        let is_dead =
            |patience| is_dead(server.control(), device.id(), (false, patience), &|_| Opener::Unknown).unwrap();
        assert!(!is_dead(Duration::ZERO), "its server has it open from the beginning");
        device.go_live(null()).unwrap();
        assert!(!is_dead(Duration::ZERO));
        device.stop().unwrap();
        assert!(!is_dead(Duration::ZERO), "it is gone, which is no failure");
    }

    #[test]
    fn a_young_device_without_a_server_is_watched_for_a_while() {
        let driver = FakeDriver::new();
        let server = server(&driver);
        let control = server.control();
        let request = crate::control::AddRequest {
            id: None,
            queues: 1,
            depth: 1,
            max_io_bytes: 4096,
            features: crate::Features::empty(),
        };
        let id = control.add(&request).unwrap().id;
        let patience = Duration::from_millis(50);
        let openers = [(Opener::Unknown, true, 1), (Opener::None, true, 0), (Opener::Process, false, 0)];
        for (opener, dead, openings) in openers {
            let (started, before) = (Instant::now(), driver.char_openings());
            assert_eq!(is_dead(control, id, (false, patience), &|_| opener).unwrap(), dead, "{opener:?}");
            assert!(!dead || started.elapsed() >= patience, "{opener:?}");
            assert_eq!(driver.char_openings() - before, openings, "{opener:?}");
        }
        driver.refuse_next("GET_DEV_INFO2", Errno::EACCES);
        assert!(!is_dead(control, id, (false, Duration::ZERO), &|_| Opener::None).unwrap(), "another user's");
        control.remove(id).unwrap();
    }
}
