// SPDX-License-Identifier: MIT OR Apache-2.0

//! Stopping a device that is not in use.

use std::path::Path;
use std::time::{Duration, Instant};

use super::disk::{self, Usage, VisibleUsage};
use super::{exclusive, processes};
use crate::control::Control;
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};
use crate::units::DeviceId;

/// Time that udev gets to inspect a disk after its last use.
const UDEV_TIMEOUT: Duration = Duration::from_secs(5);
const UDEV_RETRY: Duration = Duration::from_millis(20);

/// Outcome of [`stop_unused`].
#[derive(Debug)]
pub(in crate::cli) enum StopOutcome {
    Stopped,
    /// The device is not in use, or has no disk, and was not stopped. Before Linux 7.0 the driver does not report use, and a
    /// use that begins after the check goes unnoticed.
    NotUsed,
    InUse(Usage),
}

/// Which process checks how a disk is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum Observer {
    /// The disk's server. It must not open the disk itself: an open may wait for requests, and a server that waits for
    /// itself cannot be ended. Another process does it, for a limited time.
    Server,
    /// Another process.
    Other,
}

/// Stops a device that is not in use, atomically if the driver can (Linux 7.0), until `give_up`, which is polled meanwhile,
/// returns true. Leaves a later device alone that is not this `instance`.
///
/// # Errors
///
/// If the use cannot be determined. If a command got no answer, the device may have been stopped.
pub(in crate::cli) fn stop_unused(
    control: &Control,
    (id, instance): (DeviceId, Option<u64>),
    observer: Observer,
    give_up: &dyn Fn() -> bool,
) -> Result<StopOutcome> {
    let info = control.info(id)?;
    if info.state == DeviceState::Dead {
        return Ok(StopOutcome::NotUsed);
    }
    let path = control.block_path(id);
    if !info.features.contains(Features::SAFE_STOP_DEV) {
        return Ok(usage_of(&path, observer)?.map_or(StopOutcome::NotUsed, StopOutcome::InUse));
    }
    let deadline = Instant::now() + UDEV_TIMEOUT;
    loop {
        if !control.is_instance(id, instance) {
            return Ok(StopOutcome::Stopped);
        }
        match control.try_stop_unless(id, give_up) {
            // ENODEV: another process has stopped it.
            Err(Error::Control { errno: crate::Errno::ENODEV, .. }) | Ok(()) => return Ok(StopOutcome::Stopped),
            Err(Error::Control { errno: crate::Errno::EBUSY, .. }) => {}
            Err(error) => return Err(error),
        }
        // If no user is visible, it is most likely udev.
        match usage_of(&path, observer) {
            Ok(Some(usage)) => return Ok(StopOutcome::InUse(usage)),
            Err(error) if observer == Observer::Other => return Err(error),
            _ if Instant::now() >= deadline || give_up() => return Ok(StopOutcome::InUse(Usage::Open("open".into()))),
            _ => std::thread::sleep(UDEV_RETRY),
        }
    }
}

/// Determines how a disk is used. `None` if it is not.
fn usage_of(disk: &Path, observer: Observer) -> Result<Option<Usage>> {
    let failed = |e| Error::file("find the users of", disk, &e);
    let sees_all = processes::sees_all_processes();
    let VisibleUsage { usage, unknown } = disk::visible_usage(Path::new("/proc"), disk).map_err(failed)?;
    if usage.is_some() {
        return Ok(usage);
    }
    // A process that is not visible may have the disk open, and nothing else would show that. An administrator who deletes
    // the disk knows, a server that gets a signal does not.
    let unknown = unknown.or_else(|| (!sees_all).then(|| "this process does not see all processes".into()));
    if let (Observer::Server, Some(what)) = (observer, unknown) {
        return Err(Error::File {
            operation: "find the users of",
            path: disk.to_owned(),
            errno: crate::Errno::EPERM,
            hint: what,
        });
    }
    // Most users inside the kernel claim a disk, and some of them are not listed in any file: a file system's log on another
    // disk, LIO, zram.
    let claimed = exclusive::is_claimed(disk, exclusive::OPEN_TIMEOUT).map_err(failed)?;
    Ok(claimed.then(|| Usage::Claimed("mounted or claimed".into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Users inside the kernel may not be listed in any file, and would be found only by opening the disk.
    #[test]
    fn a_server_does_not_know_the_use_of_a_disk_that_cannot_be_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("loop");
        std::os::unix::fs::symlink(&path, &path).unwrap();
        usage_of(&path, Observer::Server).unwrap_err();
        usage_of(&path, Observer::Other).unwrap_err();
        assert!(!disk::is_surely_unused(&path));
    }
}
