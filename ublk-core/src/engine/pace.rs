// SPDX-License-Identifier: MIT OR Apache-2.0

//! When finished requests are submitted before their batch is done; and the clocks.

use std::cell::Cell;

use nix::time::{ClockId, clock_gettime};

/// The monotonic clock in nanoseconds.
pub(super) fn clock() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, |now| now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// Decides when the finished requests of a batch are submitted before its end.
///
/// Fast handlers get one system call per batch, or one per tick of the coarse clock. Once a request took long, each one
/// is submitted before the next is begun: the next might take long again. That is over when some were fast in a row,
/// so that a processor that was away for a moment, which looks the same, costs some system calls and not
/// thousands.
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
    /// How many more requests are submitted on their own, if all of them are fast.
    eager: Cell<u16>,
}

impl Pace {
    /// A request that took this many nanoseconds is slow.
    const SLOW: u64 = 5_000_000;
    /// Fast requests in a row after which a slow one is forgotten.
    const MEMORY: u16 = 64;

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
            self.eager.set(Self::MEMORY);
        } else {
            self.eager.set(self.eager.get().saturating_sub(1));
        }
        self.stepped.set(now);
        let late = self.eager.get() != 0 || now != self.submitted.get();
        if late && self.unsubmitted.replace(false) {
            self.submitted.set(now);
            return true;
        }
        false
    }
}

/// The kernel's coarse clock in nanoseconds: a few milliseconds exact, and nearly free to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tick(u64);

impl Tick {
    pub(super) fn now() -> Self {
        Tick(nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: u64) -> Tick {
        Tick(millis * 1_000_000)
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
        for _ in 1..Pace::MEMORY {
            assert!(one_request_each(20_000, 20_000));
        }
        assert!(!one_request_each(20_000, 20_000), "it is forgotten in the end");
        assert!(one_request_each(30_000, 30_100));
        assert!(one_request_each(40_000, 40_000), "and the next one is remembered anew");
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
