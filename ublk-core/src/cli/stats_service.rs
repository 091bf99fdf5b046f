// SPDX-License-Identifier: MIT OR Apache-2.0

//! Answers to `ublk stat` from programs that are not this command: a thread that reads devices' statistics.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::station::{Report, Station};
use crate::stats::StatsHandle;
use crate::units::DeviceId;

type Devices = Arc<Mutex<BTreeMap<DeviceId, StatsHandle>>>;

/// Lets `ublk stat` ask this process for some devices. One of them in a process; its end ends that.
#[derive(Debug)]
pub struct StatsService {
    devices: Devices,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

fn lock(devices: &Devices) -> MutexGuard<'_, BTreeMap<DeviceId, StatsHandle>> {
    devices.lock().unwrap_or_else(PoisonError::into_inner)
}

impl StatsService {
    /// Makes the socket, for the user of this process only, and the thread.
    ///
    /// # Errors
    ///
    /// What keeps it from being made in `/run/ublk`: other users than root have no place there.
    pub fn start() -> io::Result<Self> {
        let station = Station::open()?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let devices = Devices::default();
        let (theirs, stopped) = (devices.clone(), stop.clone());
        let body = move || serve(station, &theirs, &stopped);
        let thread = Some(std::thread::Builder::new().name("ublk-stat".into()).spawn(body)?);
        Ok(StatsService { devices, stop, thread })
    }

    /// Answers for a device.
    pub fn add(&self, device: StatsHandle) {
        lock(&self.devices).insert(device.id(), device);
    }

    /// Answers for a device no more; tells whether none is left.
    pub fn remove(&self, id: DeviceId) -> bool {
        let mut devices = lock(&self.devices);
        devices.remove(&id);
        devices.is_empty()
    }
}

impl Drop for StatsService {
    fn drop(&mut self) {
        if self.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // It waits for nobody.
            let _ = thread.join();
        }
    }
}

fn serve(mut station: Station, devices: &Devices, stop: &EventFd) {
    loop {
        let patience = station.patience();
        let mut fds = [PollFd::new(station.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, patience) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return log::error!("waiting for connections of `ublk stat`: {errno}"),
        }
        if fds[1].any() == Some(true) {
            return;
        }
        station.answer_from(&|id| lock(devices).get(&id).map(|device| Report::of(&device.read())));
    }
}
