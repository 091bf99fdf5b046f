// SPDX-License-Identifier: MIT OR Apache-2.0

//! Waiting for a signal or for the device's end.

use std::os::fd::AsFd;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::Failure;
use crate::device::Device;

/// Signals that end a server in an orderly way.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    Signal,
    /// The device has begun to end.
    Device,
}

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

    /// Waits until a signal comes or the device begins to end.
    pub(super) fn wait_with(&self, device: &Device) -> Result<Why, Failure> {
        loop {
            let mut fds =
                [PollFd::new(self.0.as_fd(), PollFlags::POLLIN), PollFd::new(device.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[1].any() == Some(true) => return Ok(Why::Device),
                Ok(_) => {}
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Failure::Text(format!("waiting for the device's end: {errno}"))),
            }
            if let Ok(Some(signal)) = self.0.read_signal() {
                log::info!("signal {} ends {}", signal.ssi_signo, device.path().display());
                return Ok(Why::Signal);
            }
        }
    }
}
