// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk del`.
//!
//! A disk that is mounted, used as swap, part of another block device or opened exclusively is never removed without
//! `--force`, because data would be lost. A disk that processes merely have open is not removed at a terminal, where the
//! number may be a typing error, and with `--unused`. In scripts it is removed, and its users get errors: scripts that were
//! written for the reference tool (ublksrv's `ublk`), such as blktests, rely on this.

use std::fs;
use std::io::IsTerminal;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use super::failure::{Failure, Outcome};
use super::force_stop::force_stop;
use super::instance::Instance;
use super::state_file::StateFile;
use super::stats::remove_stale_sockets;
use super::usage::{Observer, StopOutcome, Usage, has_opener, sees_all_processes, stop_unused};
use crate::control::{Control, Removal};
use crate::error::{Error, Result};
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// How long a server may take from creating a device to opening it. For a user's device, that waits up to ten seconds for udev.
const CREATION_TIMEOUT: Duration = Duration::from_secs(12);
/// How often to check a device that may be under construction.
const CREATION_RETRY: Duration = Duration::from_millis(200);

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
    let control = Control::open()?;
    let chosen = if args.ids.is_empty() {
        chosen(&control, args)?
    } else {
        args.ids.iter().copied().map(DeviceId).map(|id| (id, None)).collect()
    };
    let mut outcome = Ok(());
    for (id, instance) in chosen {
        // Its number is now that of another device.
        if !control.is_instance(id, instance) {
            continue;
        }
        match remove(&control, (id, instance.or_else(|| control.instance(id))), args) {
            Ok(()) => {}
            // It was deleted meanwhile.
            Err(Failure::Error(error)) if args.ids.is_empty() && error.errno() == crate::Errno::ENODEV => {}
            // Continue with the other devices.
            Err(failure) => {
                failure.report();
                outcome = Err(Failure::Reported);
            }
        }
    }
    remove_stale_sockets();
    outcome
}

/// Removes a device that is this `instance`. Its server, which notices the stop, deletes the device too, and its number may be
/// another device's at once.
fn remove(control: &Control, (id, instance): (DeviceId, Option<u64>), args: &Args) -> Outcome {
    let stopped = if args.force {
        force_stop(control, (id, instance), &|other| args.all || args.ids.contains(&other.0))?;
        true
    } else {
        stop_unless_in_use(control, (id, instance), args.unused || is_interactive())?
    };
    let removed = if args.no_wait {
        let stop = || control.require_instance("STOP_DEV", id, instance).and_then(|()| control.stop(id));
        let deleted = if stopped { Ok(()) } else { stop() };
        let delete = || control.require_instance("DEL_DEV_ASYNC", id, instance).and_then(|()| control.delete_async(id));
        deleted.and_then(|()| match delete() {
            // Its server, which notices the stop, may have deleted it already.
            Err(error) if error.errno() == crate::Errno::ENODEV => Ok(Removal::Complete),
            other => other.map(|()| Removal::Complete),
        })
    } else {
        control.remove_instance(id, instance)
    };
    match removed {
        // Its server has deleted it.
        Err(error) if (stopped || instance.is_some()) && error.errno() == crate::Errno::ENODEV => {}
        Err(error) => return Err(error.into()),
        Ok(Removal::Complete) => {}
        Ok(Removal::HeldOpen) => {
            eprintln!(
                "ublk: device {id} is deleted, but a process still has it open; its number becomes free when it is closed"
            );
        }
    }
    StateFile::remove(id, instance.map(Instance::from));
    Ok(())
}

/// Returns whether the command was typed at a terminal, and its messages are visible there. A script that is started at a
/// terminal inherits it as standard input, but scripts of test suites (blktests) capture standard error.
fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stderr().is_terminal()
}

/// Refuses a device in use, and names its users. If the driver can, this stops an unused device atomically and returns true.
fn stop_unless_in_use(
    control: &Control,
    (id, instance): (DeviceId, Option<u64>),
    refuse_open: bool,
) -> Result<bool, Failure> {
    match stop_unused(control, (id, instance), Observer::Other, &|| false)? {
        StopOutcome::Stopped => Ok(true),
        StopOutcome::NotUsed => Ok(false),
        StopOutcome::InUse(Usage::Open(users)) if !refuse_open => {
            eprintln!("ublk: removing device {id} although it is in use ({users})");
            Ok(false)
        }
        StopOutcome::InUse(usage) => Err(Failure::Text(format!(
            "device {id} is in use ({}); use `ublk del --force` to remove it anyway",
            usage.users()
        ))),
    }
}

/// Returns all devices, or all dead ones, each with its instance.
fn chosen(control: &Control, args: &Args) -> Result<Vec<(DeviceId, Option<u64>)>> {
    let mut chosen = Vec::new();
    for id in control.device_ids()? {
        // Before the check, to distinguish this device from a later one with the same number.
        let instance = control.instance(id);
        // A device with a state file has been served: it is not under construction.
        let was_served = matches!(StateFile::find(id), Ok(Some(_)));
        let timeout = if was_served { Duration::ZERO } else { CREATION_TIMEOUT };
        if !args.dead || is_dead(control, id, (args.force, timeout), &Opener::find)? {
            chosen.push((id, instance));
        }
    }
    Ok(chosen)
}

/// Returns whether a device has no server. A device that waits for another server holds requests of clients, and counts as dead
/// only if `waiting_too`.
///
/// A device that its server is just creating is in the state DEAD, too, and has no pid. But servers open the char device
/// immediately, so a device that no process has open counts as dead if it is older than `timeout`. `opener` searches for
/// that process. Only if that is inconclusive, and last, the char device is opened as a probe, because it admits one opener,
/// and the probe would make a server fail that starts at that moment.
///
/// Devices of other users, which cannot be queried, and devices that are deleted meanwhile do not count.
fn is_dead(
    control: &Control,
    id: DeviceId,
    (waiting_too, timeout): (bool, Duration),
    opener: &dyn Fn(DeviceId) -> Opener,
) -> Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let info = match control.info(id) {
            Ok(info) => info,
            Err(error) if is_gone_or_foreign(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        match info.state {
            DeviceState::Live => return Ok(false),
            DeviceState::Dead => {
                let opener = opener(id);
                if opener == Opener::Process {
                    return Ok(false);
                }
                if Instant::now() >= deadline || age(id).is_some_and(|age| age >= timeout) {
                    return Ok(opener == Opener::None || !is_open(control, id));
                }
                thread::sleep(CREATION_RETRY.min(timeout));
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
    /// Not all processes are visible.
    Unknown,
}

impl Opener {
    /// Searches for the process that has a device open.
    fn find(id: DeviceId) -> Self {
        let Ok(node) = fs::metadata(format!("/dev/ublkc{id}")) else { return Opener::Unknown };
        match has_opener(|file| file.char_device() == Some(node.rdev())) {
            Ok(true) => Opener::Process,
            Ok(false) if sees_all_processes() => Opener::None,
            _ => Opener::Unknown,
        }
    }
}

/// Returns whether a char device is open, determined by opening it.
fn is_open(control: &Control, id: DeviceId) -> bool {
    control.driver().open_char(id).is_err_and(|e| e.raw_os_error() == Some(libc::EBUSY))
}

fn is_gone_or_foreign(error: &Error) -> bool {
    use crate::Errno;
    matches!(error.errno(), Errno::ENODEV | Errno::ENOENT | Errno::EACCES | Errno::EPERM)
}

/// Age of a device: devtmpfs creates its node with it.
fn age(id: DeviceId) -> Option<Duration> {
    let node = fs::symlink_metadata(format!("/dev/ublkc{id}")).ok()?;
    let made = node.created().or_else(|_| node.modified()).ok()?;
    SystemTime::now().duration_since(made).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{null_disk, server};
    use crate::{DeviceOptions, Errno};

    /// A device's server, which notices the stop, deletes it before the command does.
    #[test]
    fn a_device_that_its_server_deletes_first_is_no_failure() {
        for no_wait in [false, true] {
            let driver = FakeDriver::new();
            let server = server(&driver);
            let device = server.start(null_disk(), &DeviceOptions::default()).unwrap();
            for command in ["STOP_DEV", "DEL_DEV", "DEL_DEV_ASYNC"] {
                driver.refuse_next(command, Errno::ENODEV);
            }
            let args = Args { ids: vec![0], no_wait, ..Args::default() };
            let control = server.control();
            remove(control, (device.id(), control.instance(device.id())), &args).unwrap();
            // Use up the remaining refusals.
            while device.stop().is_err() {}
        }
    }

    /// Its server deletes it when it is stopped, and another program gets the number.
    #[test]
    fn the_next_device_of_the_number_is_left_alone() {
        for (force, no_wait) in [(false, false), (false, true), (true, false), (true, true)] {
            let driver = FakeDriver::new();
            let first = server(&driver).start(null_disk(), &DeviceOptions::default()).unwrap();
            let (sender, receiver) = std::sync::mpsc::channel();
            let theirs = driver.clone();
            driver.after_next(if force { "STOP_DEV" } else { "TRY_STOP_DEV" }, move || {
                first.conclude().unwrap();
                sender.send(server(&theirs).start(null_disk(), &DeviceOptions::default()).unwrap()).unwrap();
            });
            let args = Args { ids: vec![0], force, no_wait, ..Args::default() };
            let control = server(&driver).control().clone();
            remove(&control, (DeviceId(0), control.instance(DeviceId(0))), &args).unwrap();
            is_untouched(&control, &receiver.recv().unwrap(), &format!("force {force}, async {no_wait}"));
        }
    }

    /// Between the look at the device and STOP_DEV, its server is searched for.
    #[test]
    fn a_device_that_follows_while_the_server_is_searched_is_left_alone() {
        let driver = FakeDriver::new();
        let first = server(&driver).start(null_disk(), &DeviceOptions::default()).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let theirs = driver.clone();
        let control = server(&driver).control().clone();
        let instance = control.instance(DeviceId(0));
        driver.after_next("GET_DEV_INFO2", move || {
            first.stop().unwrap();
            sender.send(server(&theirs).start(null_disk(), &DeviceOptions::default()).unwrap()).unwrap();
        });
        let args = Args { ids: vec![0], force: true, ..Args::default() };
        remove(&control, (DeviceId(0), instance), &args).unwrap();
        is_untouched(&control, &receiver.recv().unwrap(), "");
    }

    /// Checks that a device has the number of an earlier one and was not stopped, which its server may not have noticed yet.
    fn is_untouched(control: &Control, device: &crate::Device, context: &str) {
        assert_eq!(device.id(), DeviceId(0), "{context}");
        assert_eq!(control.info(device.id()).unwrap().state, DeviceState::Live, "{context}");
        assert_eq!(control.device_ids().unwrap(), [device.id()], "{context}");
    }

    #[test]
    fn a_device_that_does_not_exist_is_a_failure() {
        let server = server(&FakeDriver::new());
        for force in [false, true] {
            let args = Args { ids: vec![7], force, ..Args::default() };
            assert!(remove(server.control(), (DeviceId(7), None), &args).is_err());
        }
    }

    #[test]
    fn a_device_under_construction_is_not_dead() {
        let driver = FakeDriver::new();
        let server = server(&driver);
        let device = server.add(&null_disk(), &DeviceOptions::default()).unwrap();
        let is_dead =
            |patience| is_dead(server.control(), device.id(), (false, patience), &|_| Opener::Unknown).unwrap();
        assert!(!is_dead(Duration::ZERO), "its server has it open from the start");
        device.go_live(null_disk()).unwrap();
        assert!(!is_dead(Duration::ZERO));
        device.stop().unwrap();
        assert!(!is_dead(Duration::ZERO), "it is deleted, which is no failure");
    }

    #[test]
    fn a_new_device_without_a_server_is_checked_repeatedly() {
        let driver = FakeDriver::new();
        let server = server(&driver);
        let control = server.control();
        let request = crate::control::AddRequest {
            id: None,
            queues: 1,
            depth: 1,
            max_io_bytes: 4096,
            features: crate::Features::empty(),
            backing: None,
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
        assert!(!is_dead(control, id, (false, Duration::ZERO), &|_| Opener::None).unwrap(), "owned by another user");
        control.remove(id).unwrap();
    }
}
