// SPDX-License-Identifier: MIT OR Apache-2.0

//! The signals that end a server, and how urgently they do.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::cli::failure::Failure;

/// Signals that end a server after its requests.
const ENDING: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// How long after the first signal another one ends the server at once.
pub(super) const SECOND_SIGNAL_DELAY: Duration = Duration::from_millis(500);
/// How long devices may take to end after that.
pub(super) const STOP_NOW_TIMEOUT: Duration = Duration::from_secs(1);

/// A descriptor that delivers the ending signals, which are blocked.
pub(in crate::cli) struct Signals(SignalFd);

impl Signals {
    /// Blocks the signals in this thread and in those created from now on.
    pub(in crate::cli) fn block() -> Result<Self, Failure> {
        let set: SigSet = ENDING.into_iter().collect();
        set.thread_block()
            .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
            .map(Signals)
            .map_err(|errno| Failure::Text(format!("blocking signals: {errno}")))
    }

    /// Takes the next signal, if one has arrived.
    pub(in crate::cli) fn next(&self) -> Option<Signal> {
        let info = self.0.read_signal().ok().flatten()?;
        Signal::try_from(info.ssi_signo as i32).ok()
    }
}

/// Becomes readable when a signal has arrived.
impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// What the server does about a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// End all devices after their requests.
    Stop,
    /// End the process soon, even if its devices are busy.
    StopNow,
    Ignore,
}

/// Progress of a shutdown that signals have asked for.
#[derive(Debug, Default)]
pub(super) struct Shutdown {
    first: Option<Instant>,
    second: Option<Instant>,
}

impl Shutdown {
    /// Takes a signal. One that follows immediately repeats the first: a process may get the same signal for itself and as
    /// a member of its group. So does SIGHUP, which service managers send with SIGTERM, and terminals when they are closed.
    pub(super) fn signal(&mut self, signal: Signal) -> Action {
        match (self.first, self.second) {
            (None, _) => {
                self.first = Some(Instant::now());
                Action::Stop
            }
            (Some(first), None) if signal != Signal::SIGHUP && first.elapsed() >= SECOND_SIGNAL_DELAY => {
                self.second = Some(Instant::now());
                Action::StopNow
            }
            _ => Action::Ignore,
        }
    }

    /// How long devices may still take to end. `None` without a limit.
    pub(super) fn remaining(&self) -> Option<Duration> {
        self.second.map(|second| STOP_NOW_TIMEOUT.saturating_sub(second.elapsed()))
    }

    /// Returns whether the time for the devices to end is over.
    pub(super) fn is_overdue(&self) -> bool {
        self.remaining().is_some_and(|remaining| remaining.is_zero())
    }
}
