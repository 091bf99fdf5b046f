// SPDX-License-Identifier: MIT OR Apache-2.0

//! Serving devices until a signal comes, or they end.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::holders::{self, Asker, Stop};
use super::station::Station;
use super::{Failure, Outcome, state};
use crate::device::{Device, Ending};
use crate::uapi::{DeviceState, Features};

/// Signals that end a server in an orderly way.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// The ending signals, taken out of their usual delivery.
pub(super) struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and in those made from now on.
    pub(super) fn block() -> Result<Self, Failure> {
        let set: SigSet = ENDING.into_iter().collect();
        set.thread_block()
            .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
            .map(Signals)
            .map_err(|errno| Failure::Text(format!("blocking signals: {errno}")))
    }
}

/// Lets this process have as many descriptors as it may: each device takes two, and the usual limit is 1,024.
pub(super) fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(now, most)| if now < most { setrlimit(Resource::RLIMIT_NOFILE, most, most) } else { Ok(()) });
    if let Err(errno) = raised {
        log::debug!("raising the limit of open files: {errno}");
    }
}

/// Serves devices to their end. A signal stops and deletes them all, but for those that can be recovered and are in use:
/// they are left to their next servers.
pub(super) fn run(signals: &Signals, devices: Vec<Device>) -> Outcome {
    // By now, because a device's number may be another one's as soon as it begins to end.
    let mut devices: Vec<_> = devices.into_iter().map(|device| (state::instance(device.id()), device)).collect();
    let mut station = Station::open().inspect_err(|error| log::warn!("`ublk stat` will not work: {error}")).ok();
    let mut outcome = Ok(());
    while !devices.is_empty() {
        let mut fds = vec![PollFd::new(signals.0.as_fd(), PollFlags::POLLIN)];
        fds.extend(devices.iter().map(|(_, device)| PollFd::new(device.as_fd(), PollFlags::POLLIN)));
        fds.extend(station.as_ref().map(|station| PollFd::new(station.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, station.as_ref().map_or(PollTimeout::NONE, Station::patience)) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Failure::Text(format!("waiting for the devices' end: {errno}"))),
        }
        let ready = |fd: &PollFd<'_>| fd.any() == Some(true);
        let ending: Vec<usize> = (0..devices.len()).rev().filter(|i| ready(&fds[i + 1])).collect();
        drop(fds);
        for i in ending {
            outcome = end(devices.swap_remove(i), false).and(outcome);
        }
        if let Ok(Some(signal)) = signals.0.read_signal() {
            log::info!("signal {} ends the server", signal.ssi_signo);
            return devices.into_iter().fold(outcome, |outcome, device| end(device, true).and(outcome));
        }
        if let Some(station) = &mut station {
            station.answer(devices.iter().map(|(_, device)| device));
        }
    }
    outcome
}

/// Ends a device: as a signal wants it to, or as another process has begun to.
fn end((instance, device): (Option<u64>, Device), wanted: bool) -> Outcome {
    let id = device.id();
    let ending = if wanted { stop_or_leave(&device) } else { device.conclude() };
    if ending.is_err() && !wanted && device.recovery().is_some() {
        // To drop it is to delete it. It has no other server's device, so that this process ends now, which
        // leaves it waiting for another one.
        std::mem::forget(device);
    } else {
        drop(device);
    }
    if instance.is_some() && state::instance(id) == instance {
        // Its next server needs its state. One that was to be stopped is without a server.
        match &ending {
            Ok(_) => log::info!("device {id} is left to another server"),
            Err(_) => log::error!("device {id} is left without a server: `ublk del -n {id}` removes it"),
        }
    } else {
        state::remove(id, instance);
    }
    ending.map(drop).map_err(|error| {
        log::error!("{error}");
        Failure::Error(error)
    })
}

/// Stops and deletes a device, unless it can be recovered and is in use: that one is left, as if this process had been
/// killed, because its users asked for a disk that outlives its server. Where that is not known for certain, it counts as
/// in use. A shut-down that ends servers before it unmounts their disks loses nothing, but `umount` waits for the next
/// server then. This takes as long as the requests that the server has, and 110 s at most.
fn stop_or_leave(device: &Device) -> crate::Result<Ending> {
    let id = device.id();
    if device.recovery().is_none() {
        return device.stop().map(|()| Ending::Deleted);
    }
    let who = match holders::stop_unused(device.control(), id, Asker::Server) {
        Ok(Stop::Done | Stop::NotUsed) => return device.stop().map(|()| Ending::Deleted),
        // Another process may be deleting it, and a stop that takes too long is for this to end.
        Err(_) if has_no_disk(device) => return device.stop().map(|()| Ending::Deleted),
        Ok(Stop::Open(who) | Stop::Claimed(who)) => format!("in use ({who})"),
        Err(error) => format!("perhaps in use ({error})"),
    };
    log::warn!(
        "device {id} is {who} and waits for another server now: `ublk recover -n {id}`, or `ublk del --force -n {id}` to \
         remove it"
    );
    // Before Linux 6.16 it is the end of this process that leaves it.
    if device.info().features.contains(Features::QUIESCE) {
        // Else it would be deleted when it is dropped.
        device.leave().inspect_err(|_| device.abandon())?
    } else {
        device.abandon()
    }
    Ok(Ending::Left)
}

/// Whether a device was stopped, or is gone.
fn has_no_disk(device: &Device) -> bool {
    match device.control().info(device.id()) {
        Ok(info) => info.state == DeviceState::Dead,
        Err(error) => error.errno() == crate::Errno::ENODEV,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::driver::Driver;
    use crate::driver::fake::FakeDriver;
    use crate::engine::StdSpawn;
    use crate::targets::Null;
    use crate::{DeviceOptions, Recovery, Server};

    fn recoverable(driver: &FakeDriver) -> Device {
        let server = Server::with(Arc::new(driver.clone()), Arc::new(StdSpawn), 1);
        let options = DeviceOptions { recovery: Some(Recovery::Queue), ..DeviceOptions::default() };
        server.start(Arc::new(Null::new(1 << 20, 512).unwrap()), &options).unwrap()
    }

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

    /// At shutdown, servers may get SIGTERM before their disks are unmounted.
    #[test]
    fn a_disk_that_stays_in_use_is_left_soon() {
        let driver = FakeDriver::new();
        let device = recoverable(&driver);
        (0..10_000).for_each(|_| driver.refuse_next("TRY_STOP_DEV", Errno::EBUSY));
        let began = std::time::Instant::now();
        assert_eq!(stop_or_leave(&device).unwrap(), Ending::Left);
        assert!(began.elapsed() < std::time::Duration::from_secs(40), "{:?}", began.elapsed());
    }
}
