// SPDX-License-Identifier: MIT OR Apache-2.0

//! When finished requests are submitted before their batch is done; and the clocks.

use std::cell::Cell;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The monotonic clock in nanoseconds.
pub(super) fn clock() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| Duration::from(now).as_nanos() as u64)
}

/// Decides when the finished requests of a batch are submitted before its end.
///
/// Fast handlers get one system call per batch. Once a request took long, each one is submitted before
/// the next is begun, for a while: the next might take long again.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The handler has taken its first request. Before that it may wait for an interpreter, say, which
    /// is not the requests' slowness.
    begun: Cell<bool>,
    /// Something was queued since the last submission.
    unsubmitted: Cell<bool>,
    /// When the batch began or something of it was last submitted.
    submitted: Cell<Tick>,
    /// When the last request was handed out.
    stepped: Cell<Tick>,
    /// Until when each request is submitted on its own.
    eager_until: Cell<Tick>,
}

impl Pace {
    /// A request that took this long is slow.
    const SLOW: Duration = Duration::from_millis(5);
    /// How long a slow request is remembered.
    const MEMORY: Duration = Duration::from_secs(10);

    /// A batch is there; the last one was submitted.
    pub(super) fn begin(&self) {
        self.begun.set(false);
        self.unsubmitted.set(false);
    }

    /// The handler is done with the batch; submitting is its thread's next step anyway.
    pub(super) fn end(&self) {
        self.step(Tick::now());
    }

    /// Something waits for the next submission.
    pub(super) fn queued(&self) {
        self.unsubmitted.set(true);
    }

    /// The handler is done with a request and takes the next; whether to submit now.
    pub(super) fn step(&self, now: Tick) -> bool {
        if !self.begun.replace(true) {
            self.submitted.set(now);
            self.stepped.set(now);
            return false;
        }
        if now.0.saturating_sub(self.stepped.get().0) >= Self::SLOW {
            self.eager_until.set(Tick(now.0 + Self::MEMORY));
        }
        self.stepped.set(now);
        let late = now < self.eager_until.get() || now != self.submitted.get();
        if late && self.unsubmitted.replace(false) {
            self.submitted.set(now);
            return true;
        }
        false
    }
}

/// The kernel's coarse clock: a few milliseconds exact, and nearly free to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd)]
pub(super) struct Tick(Duration);

impl Tick {
    pub(super) fn now() -> Self {
        Tick(clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(Duration::ZERO, Duration::from))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Tick {
        Tick(Duration::from_millis(millis))
    }

    #[test]
    fn a_fast_batch_is_not_submitted_in_pieces() {
        let pace = Pace::default();
        pace.begin();
        for _ in 0..1000 {
            assert!(!pace.step(at(100)));
            pace.unsubmitted.set(true);
        }
    }

    #[test]
    fn a_batch_that_takes_long_is_submitted_with_every_tick() {
        let pace = Pace::default();
        pace.begin();
        assert!(!pace.step(at(100)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(100)));
        assert!(pace.step(at(104)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(104)));
    }

    #[test]
    fn behind_a_slow_request_each_one_is_submitted_on_its_own() {
        let pace = Pace::default();
        let one_request_each = |begin, end| {
            pace.begin();
            pace.step(at(begin));
            pace.unsubmitted.set(true);
            pace.step(at(end))
        };
        assert!(one_request_each(100, 200));
        assert!(one_request_each(300, 300));
        assert!(!one_request_each(20_000, 20_000), "it is forgotten in the end");
    }

    #[test]
    fn waiting_before_the_first_request_is_not_slowness() {
        let pace = Pace::default();
        pace.begin();
        assert!(!pace.step(at(100)));
        pace.begin();
        assert!(!pace.step(at(900)));
        pace.unsubmitted.set(true);
        assert!(!pace.step(at(900)));
    }
}
