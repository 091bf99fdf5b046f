// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a device's queues have done: counts, bytes, errors and latencies per operation.
//!
//! Always on, because it costs next to nothing: a queue notes each request that ends in a list of its own,
//! and adds the list to what others can see once per round of its thread, under one lock that nobody else
//! holds but for a look. The clock is read twice per round.
//!
//! A request's latency is the time from the wake-up that brought it to the submission of the commit that
//! ended it: what the server took, without the block layer's share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;

use crate::request::Op;

/// Digits of a latency that are kept.
const DIGITS: u8 = 2;

/// What has been done by one operation.
#[derive(Clone, Debug, Default)]
struct Counters {
    requests: u64,
    bytes: u64,
    errors: u64,
    /// In nanoseconds; made with the first request.
    latency: Option<Histogram<u32>>,
}

/// A request that has ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ended {
    pub(crate) op: Op,
    pub(crate) bytes: u64,
    pub(crate) failed: bool,
    /// When it came, in nanoseconds of the queue's clock.
    pub(crate) came: u64,
}

/// What one queue, or a thread's share of it, has done.
#[derive(Debug, Default)]
pub(crate) struct QueueStats(Mutex<BTreeMap<Op, Counters>>);

impl QueueStats {
    /// Adds requests that were handed over for submission at `now`.
    pub(crate) fn add(&self, ended: &mut Vec<Ended>, now: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Ended { op, bytes, failed, came } in ended.drain(..) {
            let counters = all.entry(op).or_default();
            counters.requests += 1;
            if failed {
                counters.errors += 1;
            } else {
                counters.bytes += bytes;
            }
            let latency = match &mut counters.latency {
                Some(latency) => latency,
                // Two digits are always possible.
                none => match Histogram::new(DIGITS) {
                    Ok(new) => none.insert(new),
                    Err(_) => continue,
                },
            };
            // It grows to whatever 64 bits can be; without memory for that, a latency is lost.
            if let Err(error) = latency.record(now.saturating_sub(came).max(1)) {
                log::debug!("noting a latency: {error}");
            }
        }
    }
}

/// The queues of one device.
#[derive(Clone, Debug, Default)]
pub(crate) struct DeviceCounters(Arc<Mutex<Vec<NumberedStats>>>);

/// A queue's number, and what it, or one of its threads, has done.
type NumberedStats = (u16, Arc<QueueStats>);

impl DeviceCounters {
    /// A place for what a queue, or one of its threads, will do.
    pub(crate) fn queue(&self, queue: u16) -> Arc<QueueStats> {
        let stats = Arc::new(QueueStats::default());
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push((queue, stats.clone()));
        stats
    }

    /// What has been done so far.
    pub(crate) fn snapshot(&self) -> DeviceStats {
        let mut queues: BTreeMap<u16, BTreeMap<Op, Counters>> = BTreeMap::new();
        for (queue, stats) in self.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let merged = queues.entry(*queue).or_default();
            for (op, counters) in stats.0.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                merged.entry(*op).or_default().merge(counters);
            }
        }
        let mut total: BTreeMap<Op, Counters> = BTreeMap::new();
        for counters in queues.values() {
            counters.iter().for_each(|(op, counters)| total.entry(*op).or_default().merge(counters));
        }
        let summary = |all: &BTreeMap<Op, Counters>| all.iter().map(|(op, c)| (*op, c.summary())).collect();
        DeviceStats { total: summary(&total), queues: queues.iter().map(|(q, all)| (*q, summary(all))).collect() }
    }
}

impl Counters {
    fn merge(&mut self, other: &Counters) {
        self.requests += other.requests;
        self.bytes += other.bytes;
        self.errors += other.errors;
        match (&mut self.latency, &other.latency) {
            (Some(mine), Some(theirs)) => {
                if let Err(error) = mine.add(theirs) {
                    log::error!("merging latencies: {error}");
                }
            }
            (none @ None, Some(theirs)) => *none = Some(theirs.clone()),
            (_, None) => {}
        }
    }

    fn summary(&self) -> OpStats {
        let at = |quantile: f64| self.latency.as_ref().map_or(0, |latency| latency.value_at_quantile(quantile));
        OpStats {
            requests: self.requests,
            bytes: self.bytes,
            errors: self.errors,
            latency_ns: Latency {
                min: self.latency.as_ref().map_or(0, |latency| latency.min()),
                mean: self.latency.as_ref().map_or(0, |latency| latency.mean() as u64),
                p50: at(0.5),
                p90: at(0.9),
                p99: at(0.99),
                p99_9: at(0.999),
                max: self.latency.as_ref().map_or(0, |latency| latency.max()),
            },
        }
    }
}

/// What a device has done since its server took it over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceStats {
    /// All queues together.
    pub total: BTreeMap<Op, OpStats>,
    /// Each queue that had requests, by its number.
    pub queues: BTreeMap<u16, BTreeMap<Op, OpStats>>,
}

/// What has been done by one operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub struct OpStats {
    /// Requests that ended.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that failed.
    pub errors: u64,
    /// How long the server took, in nanoseconds, exact to two digits.
    pub latency_ns: Latency,
}

/// A distribution of times, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
#[allow(missing_docs, reason = "their names say all")]
pub struct Latency {
    pub min: u64,
    pub mean: u64,
    pub p50: u64,
    pub p90: u64,
    pub p99: u64,
    pub p99_9: u64,
    pub max: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_added_up_and_errors_move_no_bytes() {
        let device = DeviceCounters::default();
        for (queue, op, failed) in
            [(0, Op::Read, false), (1, Op::Read, false), (1, Op::Read, true), (1, Op::Flush, false)]
        {
            let bytes = if op == Op::Read { 4096 } else { 0 };
            device.queue(queue).add(&mut vec![Ended { op, bytes, failed, came: 1000 }], 3000);
        }
        let stats = device.snapshot();
        let read = stats.total[&Op::Read];
        assert_eq!((read.requests, read.bytes, read.errors), (3, 8192, 1));
        assert_eq!(stats.queues[&0].len(), 1);
        assert_eq!(stats.queues[&1][&Op::Flush].requests, 1);
    }

    #[test]
    fn latencies_are_exact_to_two_digits() {
        let device = DeviceCounters::default();
        let mut ended: Vec<_> = (1..=1000)
            .map(|n| Ended { op: Op::Write, bytes: 512, failed: false, came: 10_000_000 - n * 1000 })
            .collect();
        device.queue(0).add(&mut ended, 10_000_000);
        assert!(ended.is_empty());
        let latency = device.snapshot().total[&Op::Write].latency_ns;
        let near = |value: u64, expected: u64| value.abs_diff(expected) <= expected / 64;
        assert!(near(latency.min, 1_000) && near(latency.p50, 500_000) && near(latency.max, 1_000_000), "{latency:?}");
        assert!(near(latency.p99, 990_000) && near(latency.mean, 500_500), "{latency:?}");
    }

    #[test]
    fn a_device_that_did_nothing_holds_no_histogram() {
        let device = DeviceCounters::default();
        let queue = device.queue(3);
        assert!(queue.0.lock().unwrap().is_empty());
        assert_eq!(device.snapshot().total.len(), 0);
    }
}
