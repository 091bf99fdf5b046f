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
///
/// Times are nanoseconds of the monotonic clock, exact where somebody has looked at it anyway, and of its last tick
/// where not. A tick is behind an exact time only if there was one since.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// The handler has taken a request of this batch.
    begun: Cell<bool>,
    /// When the batch began, or it was last time to submit.
    submitted: Cell<u64>,
    /// When the last request was handed out.
    stepped: Cell<u64>,
    /// How many more requests are submitted on their own, if all of them are fast.
    eager: Cell<u16>,
}

impl Pace {
    /// A request that took this many nanoseconds is slow.
    const SLOW: u64 = 5_000_000;
    /// Fast requests in a row after which a slow one is forgotten.
    const MEMORY: u16 = 64;

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
            Some(now) if now.saturating_sub(self.stepped.get()) < Self::SLOW => self.was_fast(),
            _ => drop(self.step(tick())),
        }
    }

    /// The handler takes the next request; whether to submit now what is done.
    pub(super) fn next(&self) -> bool {
        // What is done before the first one, by other queues of the thread too, need not wait if it can be foreseen to be
        // slow.
        if self.begun.replace(true) { self.step(tick()) } else { self.is_slow() }
    }

    /// Whether one of the last requests was slow.
    pub(super) fn is_slow(&self) -> bool {
        self.eager.get() != 0
    }

    fn step(&self, now: u64) -> bool {
        if now.saturating_sub(self.stepped.get()) >= Self::SLOW {
            self.eager.set(Self::MEMORY);
        } else {
            self.was_fast();
        }
        self.stepped.set(now);
        let late = self.is_slow() || now > self.submitted.get();
        if late {
            self.submitted.set(now);
        }
        late
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

    const fn ms(millis: u64) -> u64 {
        millis * 1_000_000
    }

    #[test]
    fn a_fast_batch_is_not_submitted_in_pieces() {
        let pace = Pace::default();
        pace.begin(ms(100));
        for _ in 0..1000 {
            assert!(!pace.step(ms(100)));
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
    fn a_batch_that_takes_long_is_submitted_with_every_tick() {
        let pace = Pace::default();
        // Between two ticks.
        pace.begin(ms(102));
        assert!(!pace.step(ms(100)));
        assert!(pace.step(ms(104)));
        assert!(!pace.step(ms(104)));
    }

    #[test]
    fn behind_a_slow_request_each_one_is_submitted_on_its_own() {
        let pace = Pace::default();
        let one_request_each = |begin, end| {
            pace.begin(ms(begin));
            pace.step(ms(end))
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
    fn the_last_request_of_a_batch_counts_too() {
        let pace = Pace::default();
        // The clock cannot be set: it is asked again about what seems slow, and that began long ago.
        let begin = tick() - ms(100);
        let one_request = |took| {
            pace.begin(begin);
            assert_eq!(pace.next(), pace.is_slow());
            pace.end(Some(begin + took));
            pace.eager.get()
        };
        assert_eq!(one_request(ms(100)), Pace::MEMORY);
        assert_eq!(one_request(0), Pace::MEMORY - 1);
        pace.end(Some(begin + ms(100)));
        assert_eq!(pace.eager.get(), Pace::MEMORY - 1, "nothing was handed out since");
    }

    #[test]
    fn waiting_before_the_first_request_is_not_slowness() {
        let pace = Pace::default();
        pace.begin(ms(100));
        // The interpreter is there.
        pace.begin(ms(900));
        assert!(!pace.step(ms(900)));
    }
}
