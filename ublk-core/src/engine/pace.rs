// SPDX-License-Identifier: MIT OR Apache-2.0

//! When finished requests are submitted before their batch is done; and the clocks.

use std::cell::Cell;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_getres, clock_gettime};

/// The monotonic clock in nanoseconds.
pub(super) fn clock() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC)
}

fn nanoseconds(clock: ClockId) -> u64 {
    clock_gettime(clock).map_or(0, whole_nanoseconds)
}

fn whole_nanoseconds(time: TimeSpec) -> u64 {
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// When a queue begins with requests that came at `came`: others of its thread may have taken their time since. The
/// clock is looked at only if there was a tick.
pub(super) fn begin_after(came: u64) -> u64 {
    begin(came, tick(), clock)
}

fn begin(came: u64, tick: u64, clock: impl FnOnce() -> u64) -> u64 {
    if tick > came { clock() } else { came }
}

/// Decides when the finished requests of a batch are submitted before its end.
///
/// Fast handlers get one system call per batch, or one per tick of the coarse clock. Once a request took long, each one
/// is submitted before the next is begun: the next might take long again. That is over when some were fast in a row,
/// so that a processor that was away for a moment, which looks the same, costs some system calls and not
/// thousands.
///
/// Times are nanoseconds of the monotonic clock. It is looked at exactly where a batch begins and ends, and between its
/// requests only if there was a tick.
#[derive(Debug)]
pub(super) struct Pace {
    /// The time between two ticks.
    resolution: u64,
    /// The handler has taken a request of this batch.
    begun: Cell<bool>,
    /// When the batch began, or it was last time to submit.
    submitted: Cell<u64>,
    /// The latest time at which the last request can have been handed out. It is exact for the first one of a batch and for
    /// the first one behind a tick.
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
    /// A request that took this many nanoseconds is slow.
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

    /// A batch is there, or the handler begins with it only now.
    pub(super) fn begin(&self, now: u64) {
        self.begun.set(false);
        self.submitted.set(now);
        self.stepped.set(now);
    }

    /// The handler is done with the batch; submitting is its thread's next step anyway. `now` is the time, if it is
    /// known.
    pub(super) fn end(&self, now: Option<u64>) {
        if !self.begun.replace(false) {
            return;
        }
        match now {
            Some(now) => self.ended(now),
            None => drop(self.step(tick(), clock)),
        }
    }

    /// The handler takes the next request; whether to submit now what is done.
    pub(super) fn next(&self) -> bool {
        // What is done before the first one, by other queues of the thread too, need not wait if it can be foreseen to be
        // slow.
        if self.begun.replace(true) { self.step(tick(), clock) } else { self.is_slow() }
    }

    /// Whether one of the last requests was slow.
    pub(super) fn is_slow(&self) -> bool {
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

/// The last tick of the monotonic clock in nanoseconds: a few milliseconds old at most, and nearly free to read.
fn tick() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Between two ticks, as where CONFIG_HZ is 100.
    const TICK: u64 = ms(10);

    const fn ms(millis: u64) -> u64 {
        millis * 1_000_000
    }

    /// A request ends at `now` and the next is taken.
    fn step(pace: &Pace, now: u64) -> bool {
        pace.step(now / TICK * TICK, || now)
    }

    #[test]
    fn a_fast_batch_is_not_submitted_in_pieces() {
        let pace = Pace::with_resolution(TICK);
        pace.begin(ms(102));
        for _ in 0..1000 {
            assert!(!step(&pace, ms(102)));
        }
    }

    #[test]
    fn before_the_first_request_is_submitted_only_if_the_last_ones_were_slow() {
        let pace = Pace::default();
        pace.begin(0);
        assert!(!pace.next());
        pace.eager.set(Pace::MEMORY);
        pace.begin(0);
        assert!(pace.next());
    }

    #[test]
    fn a_batch_that_takes_long_is_submitted_with_every_tick_and_no_request_of_it_is_slow() {
        let pace = Pace::with_resolution(TICK);
        pace.begin(ms(102));
        for now in 103..150 {
            assert_eq!(step(&pace, ms(now)), ms(now).is_multiple_of(TICK), "at {now} ms");
        }
    }

    #[test]
    fn behind_a_slow_request_each_one_is_submitted_on_its_own() {
        let pace = Pace::with_resolution(TICK);
        let one_request_each = |begin, end| {
            pace.begin(ms(begin));
            step(&pace, ms(end))
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
        pace.begin(ms(106));
        // 4 ms by the ticks.
        assert!(step(&pace, ms(114)));
        assert!(pace.is_slow());
    }

    #[test]
    fn a_request_that_may_have_begun_just_before_the_tick_is_not_slow() {
        let pace = Pace::with_resolution(TICK);
        pace.begin(ms(100));
        step(&pace, ms(101));
        // Handed out before 110, for all that is known.
        step(&pace, ms(114));
        assert!(!pace.is_slow());
        step(&pace, ms(119));
        step(&pace, ms(125));
        assert!(pace.is_slow(), "it ran from 120 at the latest");
    }

    #[test]
    fn the_last_request_of_a_batch_counts_too() {
        let pace = Pace::default();
        // Behind the last tick: nobody may judge by that one.
        let begin = clock();
        let one_request = |took| {
            pace.begin(begin);
            assert_eq!(pace.next(), pace.is_slow());
            pace.end(Some(begin + took));
            pace.eager.get()
        };
        assert_eq!(one_request(Pace::SLOW), Pace::MEMORY);
        assert_eq!(one_request(Pace::SLOW - 1), Pace::MEMORY - 1);
        pace.end(Some(begin + ms(100)));
        assert_eq!(pace.eager.get(), Pace::MEMORY - 1, "nothing was handed out since");
    }

    #[test]
    fn a_slow_queue_does_not_make_the_next_one_slow() {
        let pace = Pace::with_resolution(TICK);
        // Both came at 102, and the other one took until 152.
        let now = begin(ms(102), ms(150), || ms(152));
        assert_eq!(now, ms(152));
        pace.begin(now);
        assert!(!step(&pace, ms(152)));
        assert!(!pace.is_slow());
        assert_eq!(begin(ms(102), ms(100), || panic!("no tick")), ms(102));
    }

    #[test]
    fn waiting_before_the_first_request_is_not_slowness() {
        let pace = Pace::with_resolution(TICK);
        pace.begin(ms(100));
        // The interpreter is there.
        pace.begin(ms(900));
        assert!(!step(&pace, ms(900)));
    }
}
