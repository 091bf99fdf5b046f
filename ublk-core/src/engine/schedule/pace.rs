// SPDX-License-Identifier: MIT OR Apache-2.0

//! When finished requests are submitted before the end of their batch; and the clocks.

use std::cell::Cell;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_getres, clock_gettime};

/// The monotonic clock in nanoseconds.
pub(in crate::engine) fn clock() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

/// The last tick of the monotonic clock in nanoseconds: a few milliseconds old at most, and nearly free to read.
fn tick() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, whole_nanoseconds)
}

fn whole_nanoseconds(time: TimeSpec) -> u64 {
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// Decides when the finished requests of a batch are submitted before its end.
///
/// With a fast handler, there is one system call per batch, or one per tick of the coarse clock. After a slow request, each
/// one is submitted before the next is begun, because the next one might be slow as well. That ends after some fast
/// ones in a row: a preempted thread looks the same, and must cost some system calls and not thousands.
///
/// Times are nanoseconds of the monotonic clock. It is read exactly when a handler takes the first request of a batch and
/// when the batch ends, and between requests only after a tick. What the handler waits for before it takes the first
/// request, an interpreter for example, does not count.
#[derive(Debug)]
pub(in crate::engine) struct Pace {
    /// The time between two ticks.
    resolution: u64,
    /// The handler has taken a request of this batch.
    begun: Cell<bool>,
    /// When the batch began, or the last time to submit.
    submitted: Cell<u64>,
    /// The latest time at which the last request can have been handed out. It is exact for the first one of a batch and for
    /// the first one after a tick.
    stepped: Cell<u64>,
    /// How many more requests are submitted on their own, if all of them are fast.
    eager: Cell<u16>,
}

impl Default for Pace {
    fn default() -> Self {
        let resolution = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, whole_nanoseconds);
        Pace::with_resolution(resolution)
    }
}

impl Pace {
    /// A request that takes at least this many nanoseconds is slow.
    const SLOW: u64 = 5_000_000;
    /// Fast requests in a row after which a slow one is forgotten.
    const MEMORY: u16 = 64;

    fn with_resolution(resolution: u64) -> Self {
        Pace {
            resolution,
            begun: Cell::default(),
            submitted: Cell::default(),
            stepped: Cell::default(),
            eager: Cell::default(),
        }
    }

    /// The handler takes the next request. Returns whether to submit finished ones first.
    pub(in crate::engine) fn next(&self) -> bool {
        self.next_at(tick, clock)
    }

    fn next_at(&self, tick: impl FnOnce() -> u64, clock: impl FnOnce() -> u64) -> bool {
        if self.begun.replace(true) {
            return self.step(tick(), clock);
        }
        let now = clock();
        self.submitted.set(now);
        self.stepped.set(now);
        // What was finished before the first one, by other queues of the thread too, need not wait if this one is expected
        // to be slow.
        self.is_slow()
    }

    /// When the handler took the last request: at most one tick too early.
    pub(in crate::engine) fn taken_at(&self) -> u64 {
        self.submitted.get()
    }

    /// The handler has returned, and its thread submits next anyway. `now` is the time, if the caller has read the clock.
    pub(in crate::engine) fn end(&self, now: Option<u64>) {
        if !self.begun.replace(false) {
            return;
        }
        match now {
            Some(now) => self.ended(now),
            None => drop(self.step(tick(), clock)),
        }
    }

    /// Returns whether one of the last requests was slow.
    pub(in crate::engine) fn is_slow(&self) -> bool {
        self.eager.get() != 0
    }

    fn step(&self, tick: u64, clock: impl FnOnce() -> u64) -> bool {
        let ticked = tick > self.submitted.get();
        if ticked {
            let now = clock();
            self.ended(now);
            self.stepped.set(now);
            self.submitted.set(now);
        } else {
            self.was_fast();
            self.stepped.set(tick + self.resolution);
        }
        ticked || self.is_slow()
    }

    /// The last request took until `now`.
    fn ended(&self, now: u64) {
        if now.saturating_sub(self.stepped.get()) >= Self::SLOW {
            self.eager.set(Self::MEMORY);
        } else {
            self.was_fast();
        }
    }

    fn was_fast(&self) {
        self.eager.set(self.eager.get().saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between two ticks, as with CONFIG_HZ=100.
    const TICK: u64 = ms(10);

    const fn ms(millis: u64) -> u64 {
        millis * 1_000_000
    }

    /// A new batch, whose first request is taken at `now`.
    fn begin(pace: &Pace, now: u64) -> bool {
        pace.begun.set(false);
        pace.next_at(|| panic!("the first request does not need a tick"), || now)
    }

    /// A request ends at `now` and the next is taken.
    fn step(pace: &Pace, now: u64) -> bool {
        pace.next_at(|| now / TICK * TICK, || now)
    }

    #[test]
    fn a_fast_batch_is_not_submitted_in_pieces() {
        let pace = Pace::with_resolution(TICK);
        begin(&pace, ms(102));
        for _ in 0..1000 {
            assert!(!step(&pace, ms(102)));
        }
    }

    #[test]
    fn a_request_is_taken_at_most_a_tick_after_the_known_time() {
        let pace = Pace::with_resolution(TICK);
        begin(&pace, ms(102));
        assert_eq!(pace.taken_at(), ms(102));
        for now in 103..150 {
            step(&pace, ms(now));
            let late = ms(now) - pace.taken_at();
            assert!(late <= TICK, "{late} ns");
        }
    }

    #[test]
    fn after_slow_requests_a_submission_precedes_the_first() {
        let pace = Pace::with_resolution(TICK);
        assert!(!begin(&pace, 0));
        pace.eager.set(Pace::MEMORY);
        assert!(begin(&pace, 0));
    }

    #[test]
    fn a_long_batch_of_fast_requests_is_submitted_every_tick() {
        let pace = Pace::with_resolution(TICK);
        begin(&pace, ms(102));
        for now in 103..150 {
            assert_eq!(step(&pace, ms(now)), ms(now).is_multiple_of(TICK), "at {now} ms");
        }
    }

    #[test]
    fn after_a_slow_request_each_one_is_submitted_on_its_own() {
        let pace = Pace::with_resolution(TICK);
        let one_request_each = |from, to| {
            begin(&pace, ms(from));
            step(&pace, ms(to))
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
    fn the_first_request_of_a_batch_is_measured_exactly() {
        let pace = Pace::with_resolution(TICK);
        begin(&pace, ms(106));
        // 4 ms by the ticks.
        assert!(step(&pace, ms(114)));
        assert!(pace.is_slow());
    }

    #[test]
    fn a_request_that_may_have_begun_before_a_tick_is_not_slow() {
        let pace = Pace::with_resolution(TICK);
        begin(&pace, ms(100));
        step(&pace, ms(101));
        // Handed out before 110, as far as is known.
        step(&pace, ms(114));
        assert!(!pace.is_slow());
        step(&pace, ms(119));
        step(&pace, ms(125));
        assert!(pace.is_slow(), "it ran from 120 at the latest");
    }

    #[test]
    fn the_last_request_of_a_batch_counts_too() {
        let pace = Pace::with_resolution(TICK);
        let one_request = |took| {
            begin(&pace, ms(100));
            pace.end(Some(ms(100) + took));
            pace.eager.get()
        };
        assert_eq!(one_request(Pace::SLOW), Pace::MEMORY);
        assert_eq!(one_request(Pace::SLOW - 1), Pace::MEMORY - 1);
        pace.end(Some(ms(1000)));
        assert_eq!(pace.eager.get(), Pace::MEMORY - 1, "nothing was handed out since");
    }

    #[test]
    fn waiting_before_the_first_request_is_not_slowness() {
        let pace = Pace::with_resolution(TICK);
        step(&pace, ms(102));
        pace.end(Some(ms(102)));
        // Another queue of the thread, or an interpreter, took until now.
        assert!(!begin(&pace, ms(900)));
        assert!(!step(&pace, ms(900)));
        assert!(!pace.is_slow());
    }
}
