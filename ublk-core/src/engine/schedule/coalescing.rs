// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whether a thread sleeps before it looks for requests, like a network card that coalesces interrupts.

use std::time::Duration;

/// The decision of one thread, made anew in every round.
#[derive(Debug, Default)]
pub(super) struct Coalescing {
    /// How long to sleep; zero disables coalescing.
    window: Duration,
    /// Requests that arrived or were carried out in this round.
    requests: usize,
    /// Rounds with a single request after which coalescing pauses.
    left: u8,
}

impl Coalescing {
    /// Rounds in a row with a single request after which coalescing pauses.
    const PATIENCE: u8 = 4;

    /// Sets the windows of the thread's queues; the shortest one applies. Returns whether there was none before.
    pub(super) fn set_windows(&mut self, windows: impl Iterator<Item = Duration>) -> bool {
        let before = std::mem::replace(&mut self.window, windows.min().unwrap_or_default());
        before.is_zero() && !self.window.is_zero()
    }

    /// Notes that requests have arrived or were carried out.
    pub(super) fn note(&mut self, requests: usize) {
        self.requests += requests;
    }

    /// Ends a round. Returns how long to sleep, if at all: a client that sends one request at a time does not wait.
    pub(super) fn end_round(&mut self) -> Option<Duration> {
        match std::mem::take(&mut self.requests) {
            0 => return None,
            1 => self.left = self.left.saturating_sub(1),
            _ => self.left = Self::PATIENCE,
        }
        (self.left != 0 && !self.window.is_zero()).then_some(self.window)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_micros(50);

    #[test]
    fn coalescing_follows_a_round_with_several_requests() {
        let mut coalescing = Coalescing::default();
        assert!(coalescing.set_windows([WINDOW].into_iter()));
        assert_eq!(coalescing.end_round(), None);
        coalescing.note(1);
        assert_eq!(coalescing.end_round(), None);
        coalescing.note(1);
        coalescing.note(1);
        assert_eq!(coalescing.end_round(), Some(WINDOW));
        assert_eq!(coalescing.end_round(), None);
        for _ in 1..Coalescing::PATIENCE {
            coalescing.note(1);
            assert_eq!(coalescing.end_round(), Some(WINDOW));
        }
        coalescing.note(1);
        assert_eq!(coalescing.end_round(), None);
    }

    #[test]
    fn a_queue_without_coalescing_disables_it_for_its_thread() {
        let mut coalescing = Coalescing::default();
        assert!(coalescing.set_windows([WINDOW * 2, WINDOW].into_iter()));
        coalescing.note(8);
        assert_eq!(coalescing.end_round(), Some(WINDOW));
        assert!(!coalescing.set_windows([WINDOW, Duration::ZERO].into_iter()));
        coalescing.note(8);
        assert_eq!(coalescing.end_round(), None);
        assert!(!coalescing.set_windows(std::iter::empty()));
    }
}
