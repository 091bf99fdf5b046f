// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whether a thread lets requests gather before it looks for them, as network cards do with their interrupts.

use std::time::Duration;

/// One thread's decision, anew in every round.
#[derive(Debug, Default)]
pub(super) struct Coalescing {
    /// How long requests may gather; zero for not at all.
    window: Duration,
    /// Requests that came or were carried out in this round.
    news: usize,
    /// Rounds with a single request that do not end it yet.
    left: u8,
}

impl Coalescing {
    /// So many rounds in a row with a single request show that there is nothing to gather.
    const PATIENCE: u8 = 4;

    /// What each queue of the thread allows: the shortest time is taken. True if there was none before.
    pub(super) fn agree(&mut self, wishes: impl Iterator<Item = Duration>) -> bool {
        let before = std::mem::replace(&mut self.window, wishes.min().unwrap_or_default());
        before.is_zero() && !self.window.is_zero()
    }

    /// So many requests came or were carried out.
    pub(super) fn note(&mut self, news: usize) {
        self.news += news;
    }

    /// How long to sleep at the end of a round, if at all: a client that sends one request at a time does not wait.
    pub(super) fn end_round(&mut self) -> Option<Duration> {
        match std::mem::take(&mut self.news) {
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
    fn requests_gather_only_behind_a_round_with_several() {
        let mut coalescing = Coalescing::default();
        assert!(coalescing.agree([WINDOW].into_iter()));
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
    fn a_queue_that_does_not_want_it_spares_its_thread() {
        let mut coalescing = Coalescing::default();
        assert!(coalescing.agree([WINDOW * 2, WINDOW].into_iter()));
        coalescing.note(8);
        assert_eq!(coalescing.end_round(), Some(WINDOW));
        assert!(!coalescing.agree([WINDOW, Duration::ZERO].into_iter()));
        coalescing.note(8);
        assert_eq!(coalescing.end_round(), None);
        assert!(!coalescing.agree(std::iter::empty()));
    }
}
