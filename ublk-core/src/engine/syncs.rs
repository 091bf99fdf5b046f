// SPDX-License-Identifier: MIT OR Apache-2.0

//! Order among the syncs of an open file.
//!
//! The kernel reports an error of write-back once to each open file description. Of several syncs on the same one, any
//! may take it, and the others succeed although their data is lost. One that has taken it was in flight when the
//! others looked. So a sync that succeeds counts only when all that were in flight at that moment have ended: has one
//! of them failed, so have they all. They may be those of other queues, on other threads.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::inbox::{Inbox, Return};
use crate::units::Tag;

/// The syncs of what shares an open file description.
#[derive(Debug, Default)]
pub(crate) struct SyncOrder(Mutex<SyncState>);

#[derive(Debug, Default)]
struct SyncState {
    /// Number of the next sync.
    next: u64,
    /// Numbers of those in flight.
    running: Vec<u64>,
    waiting: Vec<Waiting>,
}

/// A sync that has succeeded and waits for those with smaller numbers.
#[derive(Debug)]
struct Waiting {
    before: u64,
    waiter: Waiter,
}

/// The request whose sync has succeeded.
#[derive(Clone, Debug)]
pub(crate) struct Waiter {
    pub(super) inbox: Arc<Inbox>,
    /// The queue's index among those of its thread.
    pub(super) queue: u32,
    pub(super) tag: Tag,
}

impl SyncOrder {
    fn state(&self) -> MutexGuard<'_, SyncState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a sync begins.
    pub(super) fn begin(self: &Arc<Self>) -> Running {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        state.running.push(number);
        Running { order: self.clone(), number }
    }

    /// Notes that a sync has ended. Returns false if it has succeeded while others are in flight: `waiter` is then notified
    /// once they have ended.
    fn end(&self, number: u64, succeeded: Option<&Waiter>) -> bool {
        let mut state = self.state();
        state.running.retain(|running| *running != number);
        let oldest = state.running.iter().copied().min().unwrap_or(u64::MAX);
        let counts = oldest == u64::MAX;
        if let Some(waiter) = succeeded.filter(|_| !counts) {
            let before = state.next;
            state.waiting.push(Waiting { before, waiter: waiter.clone() });
        }
        let settled: Vec<_> = state.waiting.extract_if(.., |sync| sync.before <= oldest).collect();
        drop(state);
        for Waiting { waiter: Waiter { inbox, queue, tag }, .. } in settled {
            inbox.returned(queue, tag, None, Return::Synced);
        }
        counts
    }
}

/// A sync that is in flight. What its failure means has to be noted before this is dropped.
#[derive(Debug)]
pub(crate) struct Running {
    order: Arc<SyncOrder>,
    number: u64,
}

impl Running {
    /// Ends a sync that has succeeded. Returns whether it counts; if not, `waiter` gets [`Return::Synced`] once it does.
    pub(super) fn succeeded(self, waiter: &Waiter) -> bool {
        // Dropping it ends it once more, which changes nothing.
        self.order.end(self.number, Some(waiter))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.order.end(self.number, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiters(count: u16) -> (Arc<Inbox>, Vec<Waiter>) {
        let inbox = Arc::new(Inbox::default());
        let waiter = |tag| Waiter { inbox: inbox.clone(), queue: 0, tag: Tag(tag) };
        let all = (0..count).map(waiter).collect();
        (inbox, all)
    }

    fn settled(inbox: &Inbox) -> Vec<u16> {
        let mut returned = Vec::new();
        inbox.take(&mut returned);
        returned.iter().map(|returned| returned.tag.0).collect()
    }

    #[test]
    fn a_sync_alone_counts_at_once() {
        let (inbox, waiters) = waiters(1);
        let order = Arc::new(SyncOrder::default());
        for _ in 0..2 {
            assert!(order.begin().succeeded(&waiters[0]));
            assert_eq!(settled(&inbox), [0; 0]);
        }
    }

    #[test]
    fn a_sync_counts_when_concurrent_ones_have_ended() {
        let (inbox, waiters) = waiters(4);
        let order = Arc::new(SyncOrder::default());
        let [first, second, third] = [(); 3].map(|()| order.begin());
        assert!(!second.succeeded(&waiters[1]));
        // The second does not wait for what begins later.
        let fourth = order.begin();
        assert_eq!(settled(&inbox), [0; 0]);
        drop(first);
        assert_eq!(settled(&inbox), [0; 0], "the third may have taken its error");
        assert!(!third.succeeded(&waiters[2]));
        assert_eq!(settled(&inbox), [1], "the third waits for the fourth");
        assert!(fourth.succeeded(&waiters[3]));
        assert_eq!(settled(&inbox), [2]);
    }
}
