// SPDX-License-Identifier: MIT OR Apache-2.0

//! Windows: the parts of a client's run that are measured.
//!
//! A run begins with a warm-up. The windows follow without a pause, so that the client's requests in flight never change.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use super::marks::Marks;
use super::work::{Observer, Work};

/// Longest warm-up.
const MAX_WARM_UP: Duration = Duration::from_secs(1);
/// Latencies from here on count as this.
const MAX_LATENCY_NS: u64 = 3_600_000_000_000;
/// Latencies are recorded with this many digits.
const DIGITS: u8 = 3;

/// Observer of a client's run, which determines its end.
pub(super) trait Meter {
    /// Whether requests need the time of their submission.
    const CLOCKED: bool;

    /// Returns the time, which will be passed to [`completed`](Self::completed). Called before requests are submitted, if
    /// `CLOCKED`.
    fn clock(&self) -> u64;

    /// A wait has ended.
    fn waited(&mut self);

    /// A request has completed, which was submitted at a time. Called between [`waited`](Self::waited) and
    /// [`taken`](Self::taken).
    fn completed(&mut self, submitted: u64) -> ControlFlow<()>;

    /// Called when all completions of a wait were taken.
    fn taken(&mut self) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }
}

/// Length of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Amount {
    Time(Duration),
    Requests(u64),
}

impl Amount {
    /// Length of the warm-up before windows of this length, with `depth` requests in flight.
    fn warm_up(self, depth: u32) -> Self {
        match self {
            Amount::Time(window) => Amount::Time((window / 2).min(MAX_WARM_UP)),
            Amount::Requests(window) => Amount::Requests((window / 2).max(depth.into())),
        }
    }
}

/// A measured window.
#[derive(Debug)]
pub(super) struct Interval {
    pub(super) requests: u64,
    pub(super) duration: Duration,
    /// In nanoseconds.
    pub(super) latencies: Histogram<u64>,
    /// What the processes did meanwhile.
    pub(super) work: Work,
}

/// Meter of rates and latencies.
///
/// The clock is read twice per system call. A latency begins before the system call that submits the request, and ends after
/// the one that waited for it.
pub(super) struct Clocked<'o> {
    amount: Amount,
    /// Length of the current window, or of the warm-up.
    current: Amount,
    origin: Instant,
    /// When the last wait ended, in nanoseconds since `origin`.
    now: u64,
    /// The same for the begin of the current window.
    begin: u64,
    requests: u64,
    observer: &'o dyn Observer,
    work_before: Work,
    /// Histograms of the windows to come, the next one last, created in advance.
    ahead: Vec<Histogram<u64>>,
    /// That of the current window, `None` in the warm-up.
    latencies: Option<Histogram<u64>>,
    intervals: Vec<Interval>,
}

impl std::fmt::Debug for Clocked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clocked").field("requests", &self.requests).finish_non_exhaustive()
    }
}

impl<'o> Clocked<'o> {
    pub(super) fn new(amount: Amount, windows: u32, depth: u32, observer: &'o dyn Observer) -> Self {
        let mut histogram = Histogram::new_with_bounds(1, MAX_LATENCY_NS, DIGITS).expect("the bounds are valid");
        histogram.auto(false);
        Clocked {
            amount,
            current: amount.warm_up(depth),
            origin: Instant::now(),
            now: 0,
            begin: 0,
            requests: 0,
            observer,
            work_before: Work::default(),
            ahead: vec![histogram; windows as usize],
            latencies: None,
            intervals: Vec::with_capacity(windows as usize),
        }
    }

    /// The windows that are complete.
    pub(super) fn into_intervals(self) -> Vec<Interval> {
        self.intervals
    }

    /// Ends the warm-up or a window, and begins the next one.
    fn boundary(&mut self) -> ControlFlow<()> {
        let work = self.observer.work();
        if let Some(latencies) = self.latencies.take() {
            self.intervals.push(Interval {
                requests: self.requests,
                duration: Duration::from_nanos(self.now - self.begin),
                latencies,
                work: work.since(&self.work_before),
            });
        }
        self.latencies = self.ahead.pop();
        self.current = self.amount;
        (self.begin, self.requests, self.work_before) = (self.now, 0, work);
        if self.latencies.is_some() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

impl Meter for Clocked<'_> {
    const CLOCKED: bool = true;

    fn clock(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn waited(&mut self) {
        self.now = self.clock();
    }

    fn completed(&mut self, submitted: u64) -> ControlFlow<()> {
        self.requests += 1;
        if let Some(latencies) = &mut self.latencies {
            latencies.saturating_record(self.now - submitted);
        }
        match self.current {
            Amount::Requests(count) if self.requests >= count => self.boundary(),
            _ => ControlFlow::Continue(()),
        }
    }

    fn taken(&mut self) -> ControlFlow<()> {
        match self.current {
            Amount::Time(length) if self.requests > 0 && u128::from(self.now - self.begin) >= length.as_nanos() => {
                self.boundary()
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

/// Meter that marks the begin and the end of windows of a number of requests, and reads no clock.
#[derive(Debug)]
pub(super) struct Counted<'m> {
    marks: &'m mut Marks,
    window: u64,
    /// Requests until the next mark.
    left: u64,
    /// Whether a window has begun and not ended.
    open: bool,
    windows: u32,
    /// Numbers of the windows that are complete, among all windows of the process.
    complete: Vec<u64>,
}

impl<'m> Counted<'m> {
    pub(super) fn new(requests: u64, windows: u32, depth: u32, marks: &'m mut Marks) -> Self {
        let left = match Amount::Requests(requests).warm_up(depth) {
            Amount::Requests(count) => count,
            Amount::Time(_) => unreachable!("the unit stays the same"),
        };
        let complete = Vec::with_capacity(windows as usize);
        Counted { marks, window: requests, left, open: false, windows, complete }
    }

    /// The windows that are complete.
    pub(super) fn complete(&self) -> &[u64] {
        &self.complete
    }
}

impl Meter for Counted<'_> {
    const CLOCKED: bool = false;

    fn clock(&self) -> u64 {
        0
    }

    fn waited(&mut self) {}

    fn completed(&mut self, _submitted: u64) -> ControlFlow<()> {
        self.left -= 1;
        if self.left > 0 {
            return ControlFlow::Continue(());
        }
        if self.open {
            self.marks.make();
            self.open = false;
            self.complete.push(self.marks.made() / 2 - 1);
            if self.complete.len() == self.windows as usize {
                return ControlFlow::Break(());
            }
        }
        self.left = self.window;
        self.open = true;
        self.marks.make();
        ControlFlow::Continue(())
    }
}

/// Ends a window that a failure has interrupted, so that the next one is not taken for its end.
impl Drop for Counted<'_> {
    fn drop(&mut self) {
        if self.open {
            self.marks.make();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// An observer that sees a microsecond of CPU time per call.
    #[derive(Debug, Default)]
    struct Calls(Cell<u64>);

    impl Observer for Calls {
        fn work(&self) -> Work {
            self.0.set(self.0.get() + 1);
            Work { client: Duration::from_micros(self.0.get()), ..Work::default() }
        }
    }

    /// Completes requests in batches until the meter has enough, and returns how many.
    fn drive(meter: &mut impl Meter, batch: u64) -> u64 {
        let mut completed = 0;
        loop {
            let submitted = meter.clock();
            meter.waited();
            for _ in 0..batch {
                completed += 1;
                if meter.completed(submitted).is_break() {
                    return completed;
                }
            }
            if meter.taken().is_break() {
                return completed;
            }
        }
    }

    #[test]
    fn windows_of_requests_have_exactly_as_many() {
        let calls = Calls::default();
        let mut meter = Clocked::new(Amount::Requests(100), 3, 8, &calls);
        assert_eq!(drive(&mut meter, 7), 50 + 3 * 100);
        let intervals = meter.into_intervals();
        assert_eq!(intervals.iter().map(|i| (i.requests, i.latencies.len())).collect::<Vec<_>>(), [(100, 100); 3]);
        assert!(intervals.iter().all(|i| i.work.client == Duration::from_micros(1)), "{intervals:?}");
    }

    #[test]
    fn windows_of_time_are_at_least_as_long() {
        let length = Duration::from_millis(5);
        let calls = Calls::default();
        let mut meter = Clocked::new(Amount::Time(length), 2, 4, &calls);
        drive(&mut meter, 4);
        let intervals = meter.into_intervals();
        assert_eq!(intervals.len(), 2);
        for interval in intervals {
            assert!(interval.duration >= length && interval.requests % 4 == 0 && interval.requests > 0);
            assert_eq!(interval.requests, interval.latencies.len());
        }
    }

    #[test]
    fn each_window_has_two_marks() {
        let mut marks = Marks::default();
        let mut meter = Counted::new(100, 3, 8, &mut marks);
        assert_eq!(drive(&mut meter, 7), 50 + 3 * 100);
        assert_eq!(meter.complete(), [0, 1, 2]);
        drop(meter);
        assert_eq!(marks.made(), 6);
    }

    #[test]
    fn a_window_that_is_interrupted_has_two_marks() {
        let mut marks = Marks::default();
        let mut meter = Counted::new(100, 2, 8, &mut marks);
        for _ in 0..160 {
            let _ = meter.completed(0);
        }
        assert_eq!(meter.complete(), [0]);
        drop(meter);
        assert_eq!(marks.made(), 4);
        let mut meter = Counted::new(10, 1, 1, &mut marks);
        drive(&mut meter, 1);
        assert_eq!(meter.complete(), [2], "numbers count all windows of the process");
    }

    #[test]
    fn a_warm_up_fills_the_queue() {
        assert_eq!(Amount::Requests(1).warm_up(32), Amount::Requests(32));
        assert_eq!(Amount::Time(Duration::from_secs(10)).warm_up(1), Amount::Time(Duration::from_secs(1)));
    }
}
