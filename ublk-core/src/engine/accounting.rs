// SPDX-License-Identifier: MIT OR Apache-2.0

//! Statistics of a queue's requests, from the round that they arrive in to the one that they end in.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::schedule::clock;
use crate::request::Op;
use crate::stats::{Ended, QueueStats};
use crate::units::Tag;

/// A request that has not ended yet.
#[derive(Clone, Copy, Debug)]
struct Arrival {
    op: Op,
    bytes: u64,
    /// In nanoseconds of the queue's clock.
    at: u64,
}

/// Counts the requests of one queue.
#[derive(Debug)]
pub(super) struct Accounting {
    stats: Arc<QueueStats>,
    /// When the requests of this round arrived.
    round: Cell<u64>,
    /// By tag: the request, until it ends for the first time.
    arrivals: RefCell<Vec<Option<Arrival>>>,
    /// Requests that have ended in this round.
    ended: RefCell<Ended>,
}

impl Accounting {
    pub(super) fn new(stats: Arc<QueueStats>, depth: u16) -> Self {
        let arrivals = RefCell::new(vec![None; usize::from(depth)]);
        Accounting { stats, round: Cell::new(0), arrivals, ended: RefCell::default() }
    }

    /// Begins a round with requests that arrived at `at`.
    pub(super) fn begin_round(&self, at: u64) {
        self.round.set(at);
    }

    /// Notes that a request of this round is handed out.
    pub(super) fn arrived(&self, tag: Tag, op: Op, bytes: u64) {
        self.arrivals.borrow_mut()[tag.index()] = Some(Arrival { op, bytes, at: self.round.get() });
    }

    /// Counts a request that ends. `op` is called for one that has ended before, which the driver has refused to commit.
    pub(super) fn ended(&self, tag: Tag, failed: bool, op: impl FnOnce() -> Option<Op>) {
        let mut ended = self.ended.borrow_mut();
        // Taken, so that a second end is known as one.
        if let Some(Arrival { op, bytes, at }) = self.arrivals.borrow_mut()[tag.index()].take() {
            ended.add(op, bytes, failed, Some(at));
        } else if let Some(op) = op() {
            ended.add(op, 0, failed, None);
        }
    }

    /// Publishes the requests that have ended in this round and are about to be submitted. Returns the time, if the clock
    /// was read for that.
    pub(super) fn publish(&self) -> Option<u64> {
        let mut ended = self.ended.borrow_mut();
        if ended.is_empty() {
            return None;
        }
        let now = clock();
        self.stats.add(&mut ended, now);
        Some(now)
    }
}
