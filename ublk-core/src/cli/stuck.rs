// SPDX-License-Identifier: MIT OR Apache-2.0

//! How `ublk del --force` ends a device whose server does not let go of it.
//!
//! STOP_DEV waits for the requests that the server has. A server that hangs, or that waits for its own disk (a thread
//! of it reads the disk, and the handler that should answer is that thread or waits for it), never ends them. Then the
//! server is killed, and the driver fails what it had.
//!
//! A thread that sleeps uninterruptibly in a read of its own disk cannot die before that read ends, and the driver
//! learns of the server's end only when all of its threads have died. This project's driver aborts the requests of a
//! server that is dying when it is asked to stop the device. Linux's own driver (up to 7.3) does not: it aborts them
//! when the last thread closes the char device, which does not happen. Such a server and its device stay until the
//! machine is started anew, and all that this can do is to say so.

use std::fs;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use super::holders::{self, has_open};
use super::{Failure, Outcome};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::process;
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// How long a server may take to end its requests before it is killed.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the driver may take to notice that a killed server is gone; Linux 6.12 takes up to 30 s.
const NOTICE: Duration = Duration::from_secs(40);

/// Stops a device. Kills its server if it does not end its requests in time, unless that would take another disk from its
/// users which is not to be removed as well.
pub(super) fn stop(control: &Control, id: DeviceId, removed_too: &dyn Fn(DeviceId) -> bool) -> Outcome {
    let pid = control.info(id)?.pid;
    // Before anything is waited for: the number may be another process's after that.
    let server = Server::find(id, pid);
    let waited = match control.stop_within(id, PATIENCE) {
        Err(error @ Error::Timeout { .. }) => error,
        // Its server may well have been quicker.
        Err(error) if error.errno() == crate::Errno::ENODEV => return Ok(()),
        other => return other.map_err(Failure::from),
    };
    let Some(server) = server else { return Err(waited.into()) };
    let others = others(control, id, pid)?;
    let in_use =
        |other: &DeviceId| !removed_too(*other) && !holders::looks_unused(&control.driver().block_path(*other));
    let in_use: Vec<_> = others.iter().copied().filter(in_use).collect();
    if !in_use.is_empty() {
        return Err(Failure::Text(format!("{waited}; {}", refusal(id, pid, &in_use))));
    }
    for other in others.iter().filter(|other| !removed_too(**other)) {
        eprintln!("ublk: device {other}, which is not in use, also loses its server, process {pid}");
    }
    let cycle = server.cycle(id);
    eprintln!(
        "ublk: {waited}; killing its server, process {pid}{}",
        if cycle.is_empty() { String::new() } else { format!(" ({cycle})") }
    );
    server.kill()?;
    match control.stop_within(id, NOTICE) {
        Err(Error::Timeout { .. }) if process::is_alive(pid) => Err(Failure::Text(format!(
            "device {id} does not stop: process {pid} cannot be killed: {}. With Linux's own driver only a reboot ends this \
             (this project's driver does not have the problem)",
            if cycle.is_empty() { "one of its threads waits in the kernel".to_owned() } else { cycle }
        ))),
        Err(error) if error.errno() == crate::Errno::ENODEV => Ok(()),
        other => other.map_err(Failure::from),
    }
}

/// The other devices of a server.
fn others(control: &Control, id: DeviceId, pid: i32) -> Result<Vec<DeviceId>> {
    let ids = control.driver().device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))?;
    // Another user's, which cannot be looked at, is not of a server that this user may kill, or root may look.
    let is_its = |other: &DeviceId| {
        *other != id && control.info(*other).is_ok_and(|info| info.pid == pid && info.state == DeviceState::Live)
    };
    Ok(ids.into_iter().filter(is_its).collect())
}

/// Why a server of other disks is not killed, and what to do.
fn refusal(id: DeviceId, pid: i32, others: &[DeviceId]) -> String {
    let list =
        |each: &dyn Fn(&DeviceId) -> String, between: &str| others.iter().map(each).collect::<Vec<_>>().join(between);
    format!(
        "its server, process {pid}, is not killed, because it also serves {}, in use. End their use first, or remove them \
         as well: `ublk del --force -n {id} {}`",
        list(&|other| format!("/dev/ublkb{other}"), ", "),
        list(&|other| format!("-n {other}"), " "),
    )
}

/// A process that has a device's char device open.
struct Server {
    pid: i32,
    process: OwnedFd,
}

impl Server {
    /// Finds a device's server, unless the number is not that of a process which has the char device open.
    fn find(id: DeviceId, pid: i32) -> Option<Self> {
        if pid <= 0 || pid as u32 == std::process::id() {
            return None;
        }
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel has just made this descriptor, and nothing else has it.
        let process = unsafe { OwnedFd::from_raw_fd(fd) };
        // After the descriptor was had, which therefore is of the process that is looked at.
        let number = fs::metadata(format!("/dev/ublkc{id}")).ok()?.rdev();
        has_open(pid, |file| file.char_device() == Some(number)).then_some(Server { pid, process })
    }

    /// Says so if the server has its own disk open, and may wait for itself.
    fn cycle(&self, id: DeviceId) -> String {
        let Ok(disk) = fs::metadata(format!("/dev/ublkb{id}")) else { return String::new() };
        let waits = has_open(self.pid, |file| file.block_device() == Some(disk.rdev()));
        if waits { format!("it has its own disk /dev/ublkb{id} open, and waits for itself") } else { String::new() }
    }

    fn kill(&self) -> Outcome {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open as long as `self` lives, and no information comes with the signal.
        let sent =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.process.as_raw_fd(), libc::SIGKILL, none, 0) };
        let error = std::io::Error::last_os_error();
        if sent == 0 || error.raw_os_error() == Some(libc::ESRCH) {
            return Ok(());
        }
        Err(Failure::Text(format!("killing process {}: {error}", self.pid)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::targets::Null;
    use crate::{DeviceOptions, Server as Devices};

    #[test]
    fn the_other_devices_of_a_server_are_found() {
        let driver = FakeDriver::new();
        let server = Devices::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let start = || server.start(Arc::new(Null::new(1 << 20, 512).unwrap()), &DeviceOptions::default()).unwrap();
        let devices = [start(), start(), start()];
        let pid = std::process::id() as i32;
        let others = |id| others(server.control(), id, pid).unwrap();
        assert_eq!(others(devices[1].id()), [devices[0].id(), devices[2].id()]);
        devices[0].stop().unwrap();
        server.control().stop(devices[2].id()).unwrap();
        assert_eq!(others(devices[1].id()), [], "one is gone, the other has no disk");
        assert_eq!(super::others(server.control(), devices[1].id(), pid + 1).unwrap(), []);
    }

    #[test]
    fn a_refusal_names_the_disks_and_the_command() {
        let said = refusal(DeviceId(3), 77, &[DeviceId(4), DeviceId(6)]);
        assert!(said.contains("process 77") && said.contains("/dev/ublkb4, /dev/ublkb6"), "{said}");
        assert!(said.contains("`ublk del --force -n 3 -n 4 -n 6`"), "{said}");
    }
}
