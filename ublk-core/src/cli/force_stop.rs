// SPDX-License-Identifier: MIT OR Apache-2.0

//! Stopping a device for `ublk del --force`, whose server may have to be killed.
//!
//! STOP_DEV waits for the requests that the server has. A server that hangs, or that waits for its own disk (one of its
//! threads reads the disk, and the handler for that read runs on the same thread or waits for it), never completes them.
//! Such a server is killed, and the driver fails its requests.
//!
//! A thread that sleeps uninterruptibly in a read of its own disk cannot exit before that read completes, and the driver
//! notices the end of a server only when all its threads have exited. On STOP_DEV, this project's driver aborts the
//! requests of a server that is exiting. Linux's own driver (up to 7.3) aborts them when the last thread closes the char
//! device, which does not happen. Such a server and its device stay until the next reboot; this module only reports them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::failure::{Failure, Outcome};
use super::usage::{has_open, is_surely_unused};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::process::{self, Pidfd};
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// How long a server may take to complete its requests before it is killed.
const COMPLETION_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the driver may take to notice that a killed server has exited. Linux 6.12 takes up to 30 s.
const EXIT_TIMEOUT: Duration = Duration::from_secs(40);

/// Stops a device. Kills its server if it does not complete its requests in time, unless the server also serves other disks
/// in use. Disks for which `removed_too` returns true do not count. Leaves a later device alone that is not this `instance`.
pub(super) fn force_stop(
    control: &Control,
    (id, instance): (DeviceId, Option<u64>),
    removed_too: &dyn Fn(DeviceId) -> bool,
) -> Outcome {
    control.require_instance("STOP_DEV", id, instance)?;
    let pid = control.info(id)?.pid;
    // Before any wait, after which the number may be another process's.
    let server = Server::find(id, pid);
    // Finding it takes a while.
    if !control.is_instance(id, instance) {
        return Ok(());
    }
    let waited = match control.stop_within(id, COMPLETION_TIMEOUT) {
        Err(error @ Error::Timeout { .. }) => error,
        // Its server may have deleted it already.
        Err(error) if error.errno() == crate::Errno::ENODEV => return Ok(()),
        other => return other.map_err(Failure::from),
    };
    let Some(server) = server else { return Err(waited.into()) };
    let others = others(control, id, pid)?;
    let in_use = |other: &DeviceId| !removed_too(*other) && !is_surely_unused(&control.block_path(*other));
    let in_use: Vec<_> = others.iter().copied().filter(in_use).collect();
    if !in_use.is_empty() {
        return Err(Failure::Text(format!("{waited}; {}", refusal(id, pid, &in_use))));
    }
    for other in others.iter().filter(|other| !removed_too(**other)) {
        eprintln!("ublk: device {other}, which is not in use, also loses its server, process {pid}");
    }
    let cycle = server.cycle(id);
    // It has deleted the device at last, and serves others.
    if !control.is_instance(id, instance) {
        return Ok(());
    }
    eprintln!(
        "ublk: {waited}; killing its server, process {pid}{}",
        if cycle.is_empty() { String::new() } else { format!(" ({cycle})") }
    );
    server.kill()?;
    if !control.is_instance(id, instance) {
        return Ok(());
    }
    match control.stop_within(id, EXIT_TIMEOUT) {
        Err(Error::Timeout { .. }) if process::is_alive(pid) => Err(Failure::Text(format!(
            "device {id} does not stop: process {pid} cannot be killed: {}. With Linux's own driver only a reboot ends this \
             (this project's driver does not have the problem)",
            if cycle.is_empty() { "one of its threads waits in the kernel".to_owned() } else { cycle }
        ))),
        Err(error) if error.errno() == crate::Errno::ENODEV => Ok(()),
        other => other.map_err(Failure::from),
    }
}

/// Returns the other devices of a server.
fn others(control: &Control, id: DeviceId, pid: i32) -> Result<Vec<DeviceId>> {
    let ids = control.device_ids()?;
    // Only root may kill servers of other users, and root can query all devices.
    let is_its = |other: &DeviceId| {
        *other != id && control.info(*other).is_ok_and(|info| info.pid == pid && info.state == DeviceState::Live)
    };
    Ok(ids.into_iter().filter(is_its).collect())
}

/// Explains why a server of other disks is not killed, and what to do.
fn refusal(id: DeviceId, pid: i32, others: &[DeviceId]) -> String {
    let list =
        |each: &dyn Fn(&DeviceId) -> String, between: &str| others.iter().map(each).collect::<Vec<_>>().join(between);
    format!(
        "its server, process {pid}, is not killed, because it also serves {}, which is or may be in use. End their use first, or remove them \
         as well: `ublk del --force -n {id} {}`",
        list(&|other| format!("/dev/ublkb{other}"), ", "),
        list(&|other| format!("-n {other}"), " "),
    )
}

/// A process that has a device's char device open.
struct Server {
    pid: i32,
    process: Pidfd,
}

impl Server {
    /// Finds a device's server. `None` if the process with this number does not have the char device open.
    fn find(id: DeviceId, pid: i32) -> Option<Self> {
        if pid <= 0 || pid as u32 == std::process::id() {
            return None;
        }
        let process = Pidfd::open(pid)?;
        // After the descriptor was opened, which therefore belongs to the process that is checked.
        let number = fs::metadata(format!("/dev/ublkc{id}")).ok()?.rdev();
        has_open(pid, |file| file.char_device() == Some(number)).then_some(Server { pid, process })
    }

    /// Describes a server that has its own disk open, and may wait for itself. Otherwise empty.
    fn cycle(&self, id: DeviceId) -> String {
        let Ok(disk) = fs::metadata(format!("/dev/ublkb{id}")) else { return String::new() };
        let waits = has_open(self.pid, |file| file.block_device() == Some(disk.rdev()));
        if waits { format!("it has its own disk /dev/ublkb{id} open, and waits for itself") } else { String::new() }
    }

    fn kill(&self) -> Outcome {
        self.process.kill().map_err(|error| Failure::Text(format!("killing process {}: {error}", self.pid)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DeviceOptions;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{null_disk, server};

    #[test]
    fn other_devices_of_a_server_are_found() {
        let driver = FakeDriver::new();
        let server = server(&driver);
        let start = || server.start(null_disk(), &DeviceOptions::default()).unwrap();
        let devices = [start(), start(), start()];
        let pid = std::process::id() as i32;
        let others = |id| others(server.control(), id, pid).unwrap();
        assert_eq!(others(devices[1].id()), [devices[0].id(), devices[2].id()]);
        devices[0].stop().unwrap();
        server.control().stop(devices[2].id()).unwrap();
        assert_eq!(others(devices[1].id()), [], "one is deleted, the other has no disk");
        assert_eq!(super::others(server.control(), devices[1].id(), pid + 1).unwrap(), []);
    }

    #[test]
    fn a_refusal_names_the_disks_and_the_command() {
        let text = refusal(DeviceId(3), 77, &[DeviceId(4), DeviceId(6)]);
        assert!(text.contains("process 77") && text.contains("/dev/ublkb4, /dev/ublkb6"), "{text}");
        assert!(text.contains("`ublk del --force -n 3 -n 4 -n 6`"), "{text}");
    }
}
