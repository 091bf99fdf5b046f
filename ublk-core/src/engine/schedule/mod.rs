// SPDX-License-Identifier: MIT OR Apache-2.0

//! When finished requests are submitted, in which order queues are served, and when a thread sleeps.
//!
//! * [`pace`] — when finished requests are submitted before the end of their batch.
//! * [`coalescing`] — whether a thread sleeps, so that it handles several requests per wake-up.
//!
//! Handlers influence this in one way only: [`Requests::serve_fast`](crate::Requests::serve_fast).

mod coalescing;
mod pace;

use std::io;
use std::time::Duration;

use self::coalescing::Coalescing;
pub(super) use self::pace::{Pace, clock};

/// The schedule of one thread.
#[derive(Debug, Default)]
pub(super) struct Schedule {
    coalescing: Coalescing,
}

impl Schedule {
    /// Sets the coalescing windows of the thread's queues.
    pub(super) fn set_windows(&mut self, windows: impl Iterator<Item = Duration>) {
        if self.coalescing.set_windows(windows) {
            exact_timers();
        }
    }

    /// Notes that requests have arrived or were carried out in this round.
    pub(super) fn note(&mut self, requests: usize) {
        self.coalescing.note(requests);
    }

    /// Ends a round. Returns how long to sleep, if at all.
    pub(super) fn end_round(&mut self) -> Option<Duration> {
        self.coalescing.end_round()
    }

    /// Orders queues for a round: the slow ones are served last, so that they keep no other one waiting.
    pub(super) fn order(queues: &mut [u32], is_slow: impl Fn(u32) -> bool) {
        if queues.len() > 1 {
            queues.sort_by_key(|queue| is_slow(*queue));
        }
    }
}

/// Makes this thread's sleeps end on time: by default the kernel adds up to 50 µs.
fn exact_timers() {
    // SAFETY: this prctl takes a number of nanoseconds and concerns the calling thread only.
    let result = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
    if result != 0 {
        log::debug!("PR_SET_TIMERSLACK: {}", io::Error::last_os_error());
    }
}
