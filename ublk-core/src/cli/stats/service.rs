// SPDX-License-Identifier: MIT OR Apache-2.0

//! Statistics of devices that a program other than this command serves.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::protocol::Report;
use super::socket::StatsSocket;
use crate::stats::StatsHandle;
use crate::units::DeviceId;

type Devices = Arc<Mutex<BTreeMap<DeviceId, StatsHandle>>>;

/// A thread that answers `ublk stat` for devices of this process. At most one per process; dropping it ends the thread.
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
    /// Creates the socket, which only this process's user can connect to, and starts the thread.
    ///
    /// # Errors
    ///
    /// If the socket cannot be created in the runtime directory.
    pub fn start() -> io::Result<Self> {
        let socket = StatsSocket::open()?;
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let devices = Devices::default();
        let (of_thread, stopped) = (devices.clone(), stop.clone());
        let body = move || serve(socket, &of_thread, &stopped);
        let thread = Some(std::thread::Builder::new().name("ublk-stat".into()).spawn(body)?);
        Ok(StatsService { devices, stop, thread })
    }

    /// Adds a device.
    pub fn add(&self, device: StatsHandle) {
        lock(&self.devices).insert(device.id(), device);
    }

    /// Removes a device. Returns whether it was the last one.
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
            // The thread never blocks except in its poll.
            let _ = thread.join();
        }
    }
}

fn serve(mut socket: StatsSocket, devices: &Devices, stop: &EventFd) {
    loop {
        let timeout = socket.timeout();
        let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return log::error!("waiting for connections of `ublk stat`: {errno}"),
        }
        if fds[1].any() == Some(true) {
            return;
        }
        socket.serve_with(&|id| lock(devices).get(&id).map(|device| Report::new(&device.read())));
    }
}
