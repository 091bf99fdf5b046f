// SPDX-License-Identifier: MIT OR Apache-2.0

//! Statistics of a device's queues: counts, bytes, errors and latencies per operation.
//!
//! They are always on, because they cost little: a queue counts the requests that end in a list of its own, in which those
//! that arrived together are one entry, and adds the list to the published counters once per round of its thread, under a
//! lock that is otherwise held only by readers. The clock is read twice per round.
//!
//! A request's latency is the time from the wake-up that brought it to the submission of the commit that
//! ended it: what the server took, without the block layer's share.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use hdrhistogram::Histogram;

use crate::request::Op;
use crate::units::DeviceId;

/// Digits of a latency that are kept: it is exact to a sixteenth, and an operation's histogram takes 4 KiB.
const DIGITS: u8 = 1;

/// What has been done by one operation.
#[derive(Clone, Debug, Default)]
struct Counters {
    requests: u64,
    bytes: u64,
    errors: u64,
    /// In nanoseconds; made with the first request.
    latency: Option<Histogram<u64>>,
}

/// Requests of one operation that came together and have ended.
#[derive(Clone, Copy, Debug)]
struct Group {
    op: Op,
    /// When they came, in nanoseconds of the queue's clock; `None` for requests that have ended before, whose end
    /// the driver refused.
    came: Option<u64>,
    requests: u64,
    bytes: u64,
    errors: u64,
}

/// Requests that have ended in a round, before others can see it.
#[derive(Debug, Default)]
pub(crate) struct Ended(Vec<Group>);

impl Ended {
    /// A request ended, which covered so many bytes.
    #[inline]
    pub(crate) fn add(&mut self, op: Op, bytes: u64, failed: bool, came: Option<u64>) {
        let bytes = if failed { 0 } else { bytes };
        let errors = u64::from(failed);
        match self.0.last_mut() {
            // As nearly always: those of a round.
            Some(last) if last.op == op && last.came == came => {
                last.requests += 1;
                last.bytes += bytes;
                last.errors += errors;
            }
            _ => self.begin(Group { op, came, requests: 1, bytes, errors }),
        }
    }

    #[inline(never)]
    fn begin(&mut self, group: Group) {
        self.0.push(group);
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// What one queue, or a thread's share of it, has done.
#[derive(Debug, Default)]
pub(crate) struct QueueStats(Mutex<Table>);

/// What has been done by each operation, at the place of its number.
type Table = [Option<Box<Counters>>; Op::ALL.len()];

impl QueueStats {
    /// Adds requests that were handed over for submission at `now`.
    pub(crate) fn add(&self, ended: &mut Ended, now: u64) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for Group { op, came, requests, bytes, errors } in ended.0.drain(..) {
            let counters = all[op as usize].get_or_insert_default();
            counters.errors += errors;
            let Some(came) = came else { continue };
            counters.requests += requests;
            counters.bytes += bytes;
            let latency = match &mut counters.latency {
                Some(latency) => latency,
                // Two digits are always possible.
                none => match Histogram::new(DIGITS) {
                    Ok(new) => none.insert(new),
                    Err(_) => continue,
                },
            };
            // It grows to whatever 64 bits can be; without memory for that, a latency is lost.
            if let Err(error) = latency.record_n(now.saturating_sub(came).max(1), requests) {
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
            let done = stats.0.lock().unwrap_or_else(PoisonError::into_inner);
            for (op, counters) in Op::ALL.iter().zip(done.iter()) {
                if let Some(counters) = counters {
                    merged.entry(*op).or_default().merge(counters);
                }
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

/// A way to read a device's statistics that can outlive the device.
#[derive(Clone, Debug)]
pub struct StatsHandle {
    pub(crate) id: DeviceId,
    pub(crate) counters: DeviceCounters,
}

impl StatsHandle {
    /// The device.
    pub fn id(&self) -> DeviceId {
        self.id
    }

    /// What the device has done so far.
    pub fn read(&self) -> DeviceStats {
        self.counters.snapshot()
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
        let steps = self.latency.iter().flat_map(|latency| latency.iter_recorded());
        let buckets = steps.map(|step| (step.value_iterated_to(), step.count_at_value())).collect();
        OpStats { requests: self.requests, bytes: self.bytes, errors: self.errors, latency_ns: Latency::of(buckets) }
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "cli", derive(serde::Serialize, serde::Deserialize))]
pub struct OpStats {
    /// Requests that ended.
    pub requests: u64,
    /// Bytes of those that succeeded.
    pub bytes: u64,
    /// Requests that failed. One whose success the driver did not take is one of these as well.
    pub errors: u64,
    /// How long the server took, in nanoseconds.
    pub latency_ns: Latency,
}

impl OpStats {
    /// What has been done since an earlier look at the same.
    pub fn since(&self, earlier: &OpStats) -> OpStats {
        OpStats {
            requests: self.requests.saturating_sub(earlier.requests),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            errors: self.errors.saturating_sub(earlier.errors),
            latency_ns: self.latency_ns.since(&earlier.latency_ns),
        }
    }
}

/// A distribution of times, in nanoseconds, exact to a sixteenth.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    /// The histogram: times, in rising order, each with how many requests took so long.
    pub buckets: Vec<(u64, u64)>,
}

impl Latency {
    fn of(buckets: Vec<(u64, u64)>) -> Self {
        let total: u64 = buckets.iter().map(|(_, count)| count).sum();
        // The time that a share of the requests did not exceed.
        let at = |share: f64| {
            let mut left = (total as f64 * share).ceil() as u64;
            let found = buckets.iter().find(|(_, count)| {
                let here = left <= *count;
                left = left.saturating_sub(*count);
                here
            });
            found.or(buckets.last()).map_or(0, |(time, _)| *time)
        };
        let sum: u128 = buckets.iter().map(|(time, count)| u128::from(*time) * u128::from(*count)).sum();
        Latency {
            min: buckets.first().map_or(0, |(time, _)| *time),
            mean: (sum / u128::from(total.max(1))) as u64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: buckets.last().map_or(0, |(time, _)| *time),
            buckets,
        }
    }

    /// The times of requests that have ended since an earlier look at the same.
    pub fn since(&self, earlier: &Latency) -> Latency {
        let before: BTreeMap<u64, u64> = earlier.buckets.iter().copied().collect();
        let new = |(time, count): &(u64, u64)| (*time, count.saturating_sub(before.get(time).copied().unwrap_or(0)));
        Latency::of(self.buckets.iter().map(new).filter(|(_, count)| *count != 0).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(requests: impl IntoIterator<Item = (Op, u64, bool, Option<u64>)>) -> Ended {
        let mut ended = Ended::default();
        requests.into_iter().for_each(|(op, bytes, failed, came)| ended.add(op, bytes, failed, came));
        ended
    }

    #[test]
    fn queues_are_added_up_and_errors_move_no_bytes() {
        let device = DeviceCounters::default();
        for (queue, op, failed) in
            [(0, Op::Read, false), (1, Op::Read, false), (1, Op::Read, true), (1, Op::Flush, false)]
        {
            let bytes = if op == Op::Read { 4096 } else { 0 };
            device.queue(queue).add(&mut ended([(op, bytes, failed, Some(1000))]), 3000);
        }
        let stats = device.snapshot();
        let read = &stats.total[&Op::Read];
        assert_eq!((read.requests, read.bytes, read.errors), (3, 8192, 1));
        assert_eq!(stats.queues[&0].len(), 1);
        assert_eq!(stats.queues[&1][&Op::Flush].requests, 1);
    }

    #[test]
    fn latencies_are_exact_to_a_sixteenth() {
        let device = DeviceCounters::default();
        let mut ended = ended((1..=1000).map(|n| (Op::Write, 512, false, Some(10_000_000 - n * 1000))));
        device.queue(0).add(&mut ended, 10_000_000);
        assert!(ended.is_empty());
        let latency = &device.snapshot().total[&Op::Write].latency_ns;
        let near = |value: u64, expected: u64| value.abs_diff(expected) <= expected / 16;
        assert!(near(latency.min, 1_000) && near(latency.p50, 500_000) && near(latency.max, 1_000_000), "{latency:?}");
        assert!(near(latency.p99, 990_000) && near(latency.mean, 500_500), "{latency:?}");
    }

    #[test]
    fn a_difference_has_only_what_came_since() {
        let device = DeviceCounters::default();
        let queue = device.queue(0);
        let took = |time: u64, count| ended(vec![(Op::Read, 512, false, Some(1_000_000_000 - time)); count]);
        queue.add(&mut took(5_000_000, 100), 1_000_000_000);
        let before = device.snapshot().total[&Op::Read].clone();
        queue.add(&mut took(1_000, 10), 1_000_000_000);
        let now = device.snapshot().total[&Op::Read].clone();
        assert!(now.latency_ns.p50 > 4_000_000, "{now:?}");
        let new = now.since(&before);
        assert_eq!((new.requests, new.bytes), (10, 5120));
        assert_eq!(new.latency_ns.buckets.iter().map(|(_, count)| count).sum::<u64>(), 10);
        assert!(new.latency_ns.max < 1_100, "{new:?}");
        assert_eq!(now.since(&now), OpStats::default());
    }

    #[test]
    fn quantiles_are_those_of_all_requests() {
        let latency = Latency::of(vec![(10, 1), (20, 98), (30, 1)]);
        assert_eq!((latency.min, latency.p50, latency.p90, latency.p99, latency.p99_9), (10, 20, 20, 20, 30));
        assert_eq!((latency.max, latency.mean), (30, 20));
        assert_eq!(Latency::of(vec![]), Latency::default());
    }

    #[test]
    fn a_request_that_ends_again_only_fails() {
        let device = DeviceCounters::default();
        device.queue(0).add(&mut ended([(Op::Write, 512, false, Some(1000)), (Op::Write, 512, true, None)]), 3000);
        let write = device.snapshot().total[&Op::Write].clone();
        assert_eq!((write.requests, write.bytes, write.errors), (1, 512, 1));
        assert_eq!(write.latency_ns.buckets.len(), 1);
    }

    #[test]
    fn an_operations_histogram_is_small() {
        let mut histogram = Histogram::<u64>::new(DIGITS).unwrap();
        // A minute.
        histogram.record(60_000_000_000).unwrap();
        assert!(histogram.distinct_values() * size_of::<u64>() <= 5 << 10, "{}", histogram.distinct_values());
    }

    #[test]
    fn a_device_that_did_nothing_holds_no_histogram() {
        let device = DeviceCounters::default();
        let queue = device.queue(3);
        assert!(queue.0.lock().unwrap().iter().all(Option::is_none));
        assert_eq!(device.snapshot().total.len(), 0);
    }
}
