// SPDX-License-Identifier: MIT OR Apache-2.0

//! The end of a served device: it is stopped and deleted, or left to its next server.

use crate::cli::failure::{Failure, Outcome};
use crate::cli::instance::Instance;
use crate::cli::state_file::StateFile;
use crate::cli::usage::{self, Observer, StopOutcome};
use crate::device::{Device, Ending};
use crate::error::Error;
use crate::uapi::{DeviceState, Features};

/// A device of this server.
#[derive(Debug)]
pub(super) struct Served {
    pub(super) device: Device,
}

impl Served {
    pub(super) fn new(device: Device) -> Self {
        Served { device }
    }

    /// Ends the device: because of a signal if `by_signal`, or else as another process has begun to. On failure the device
    /// must not be dropped, which would stop it again: the end of this process leaves a recoverable one to its next server.
    pub(super) fn end(&self, by_signal: bool) -> Outcome {
        let device = &self.device;
        // Its number may be another device's as soon as it begins to end.
        let (id, instance) = (device.id(), device.instance());
        let mut ending = if by_signal { stop_or_leave(device) } else { device.conclude() };
        if matches!(ending, Err(Error::Timeout { .. })) && device.recovery().is_none() {
            // Its requests may have been completed by now.
            ending = device.stop().map(|()| Ending::Deleted).or(ending);
        }
        if instance.is_some() && device.control().is_instance(id, instance) {
            // The device still exists, and its next server needs the state file.
            match &ending {
                Ok(_) => log::info!("another server has taken over device {id}"),
                Err(_) => log::error!("device {id} {}", self.remedy()),
            }
        } else {
            StateFile::remove(id, instance.map(Instance::from));
        }
        ending.map(drop).map_err(|error| {
            log::error!("{error}");
            Failure::Error(error)
        })
    }

    /// Logs what becomes of a device whose end is not awaited.
    pub(super) fn log_abandoned(&self) {
        log::error!("device {} {}", self.device.id(), self.remedy());
    }

    /// Describes what becomes of a device whose end is not awaited, or awaited in vain, and what to do about it.
    fn remedy(&self) -> String {
        let id = self.device.id();
        if self.device.recovery().is_some() {
            format!(
                "has no server any more: use `ublk recover -n {id}` to serve it, or `ublk del -n {id}` to remove it"
            )
        } else {
            format!("is dead: remove it with `ublk del -n {id}`")
        }
    }
}

/// Stops and deletes a device, unless it is recoverable and in use. Such a device is left, as if this process had been
/// killed: its disk is meant to outlive its server. If its use cannot be determined, it counts as in use. A shutdown that
/// ends servers before it unmounts their disks loses no data, but `umount` then waits for the next server. This takes as
/// long as the requests that the server has, at most 110 s.
fn stop_or_leave(device: &Device) -> crate::Result<Ending> {
    let id = device.id();
    if device.recovery().is_none() {
        return device.stop().map(|()| Ending::Deleted);
    }
    // While this is there, this process serves the device.
    let open = device.opened();
    if open.is_none() {
        return device.conclude();
    }
    let instance = device.instance();
    let usage = usage::stop_unused(device.control(), (id, instance), Observer::Server, &|| device.is_given_up());
    drop(open);
    let reason = match usage {
        Ok(StopOutcome::Stopped | StopOutcome::NotUsed) => return device.stop().map(|()| Ending::Deleted),
        // Another process may be deleting it. If that takes too long, this process completes it.
        Err(_) if has_no_disk(device) => return device.stop().map(|()| Ending::Deleted),
        Ok(StopOutcome::InUse(usage)) => format!("in use ({})", usage.users()),
        Err(error) => format!("perhaps in use ({error})"),
    };
    log::warn!(
        "device {id} is {reason} and now waits for a new server: use `ublk recover -n {id}` to serve it, or \
         `ublk del --force -n {id}` to remove it"
    );
    // Before Linux 6.16, the end of this process leaves it.
    if device.info().features.contains(Features::QUIESCE) {
        // Otherwise dropping it would delete it.
        device.leave().inspect_err(|_| device.abandon())?
    } else {
        device.abandon()
    }
    Ok(Ending::Left)
}

/// Returns whether a device was stopped, or is gone.
fn has_no_disk(device: &Device) -> bool {
    match device.control().info(device.id()) {
        Ok(info) => info.state == DeviceState::Dead,
        Err(error) => error.errno() == crate::Errno::ENODEV,
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tests::recoverable;
    use super::*;
    use crate::Errno;
    use crate::driver::Driver;
    use crate::driver::fake::FakeDriver;
    use crate::options::DeviceOptions;
    use crate::test_support::{null_disk, server};

    #[test]
    fn an_unused_recoverable_disk_is_deleted() {
        let driver = FakeDriver::new();
        assert_eq!(stop_or_leave(&recoverable(&driver)).unwrap(), Ending::Deleted);
        assert_eq!(driver.device_ids().unwrap(), []);
    }

    #[test]
    fn a_recoverable_disk_is_left_if_its_use_is_unknown() {
        let failures = [("TRY_STOP_DEV", Errno::EIO), ("TRY_STOP_DEV", Errno::EINTR), ("GET_DEV_INFO2", Errno::ENOMEM)];
        for (command, errno) in failures {
            let driver = FakeDriver::new();
            let device = recoverable(&driver);
            driver.refuse_next(command, errno);
            assert_eq!(stop_or_leave(&device).unwrap(), Ending::Left, "{command}: {errno}");
            let control = device.control().clone();
            assert_eq!(control.info(device.id()).unwrap().state, DeviceState::Quiesced);
            drop(device);
            assert_ne!(driver.device_ids().unwrap(), [], "{command}: {errno}");
        }
    }

    #[test]
    fn a_recoverable_disk_that_is_being_stopped_is_deleted() {
        let driver = FakeDriver::new();
        let device = recoverable(&driver);
        device.control().stop(device.id()).unwrap();
        assert_eq!(stop_or_leave(&device).unwrap(), Ending::Deleted);
    }

    #[test]
    fn a_signal_ends_no_device_that_another_server_has() {
        let driver = FakeDriver::new();
        let first = recoverable(&driver);
        let id = first.id();
        first.control().quiesce_until(id, Duration::from_secs(10)).unwrap();
        let second = server(&driver).recover(id, null_disk()).unwrap();
        assert_eq!(stop_or_leave(&first).unwrap(), Ending::Left);
        drop(first);
        assert_eq!(second.control().info(id).unwrap().state, DeviceState::Live);
        assert_eq!(driver.device_ids().unwrap(), [id]);
    }

    #[test]
    fn the_remedy_is_that_of_the_kind_of_device() {
        let driver = FakeDriver::new();
        let kept = Served::new(recoverable(&driver));
        assert!(kept.remedy().contains("`ublk recover -n 0`"), "{}", kept.remedy());
        let device = server(&driver).start(null_disk(), &DeviceOptions::default()).unwrap();
        assert_eq!(Served::new(device).remedy(), "is dead: remove it with `ublk del -n 1`");
    }

    /// At shutdown, servers may get SIGTERM before their disks are unmounted.
    #[test]
    fn a_disk_that_stays_in_use_is_left_soon() {
        let driver = FakeDriver::new();
        let device = recoverable(&driver);
        (0..10_000).for_each(|_| driver.refuse_next("TRY_STOP_DEV", Errno::EBUSY));
        let started = Instant::now();
        assert_eq!(stop_or_leave(&device).unwrap(), Ending::Left);
        assert!(started.elapsed() < Duration::from_secs(40), "{:?}", started.elapsed());
    }
}
