// SPDX-License-Identifier: MIT OR Apache-2.0

//! Measures jobs on a disk.

use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};

use super::client::{Client, Stop};
use super::disk::Disk;
use super::document::JobResult;
use super::figures::{Summary, Window};
use super::job::{Job, Pattern};
use super::marks::Marks;
use super::perf::Scope;
use super::windows::{Amount, Clocked, Counted, Meter};
use super::work::Processes;

/// Method by which windows are measured.
#[derive(Debug)]
pub(super) struct Method {
    pub(super) amount: Amount,
    pub(super) windows: u32,
    /// Marks windows for an instruction counter, instead of measuring times.
    pub(super) marks: Option<Marks>,
    /// What hardware counters count.
    pub(super) counters: Option<Scope>,
}

/// Writes to all of a disk, so that no job measures the allocation of its storage.
pub(super) fn fill(disk: &Disk, interrupts: BorrowedFd<'_>) -> Result<(), Stop> {
    let mut client = Client::new(disk.file.as_fd(), disk.size, FILL, interrupts).map_err(Stop::Failed)?;
    client.run(&mut Countdown(disk.size / u64::from(FILL.size)))
}

/// The job that [`fill`] runs.
const FILL: Job = Job { pattern: Pattern::Write, size: 1 << 20, depth: 4 };

/// Ends a run after a number of requests.
struct Countdown(u64);

impl Meter for Countdown {
    const CLOCKED: bool = false;

    fn clock(&self) -> u64 {
        0
    }

    fn waited(&mut self) {}

    fn completed(&mut self, _submitted: u64) -> ControlFlow<()> {
        self.0 -= 1;
        if self.0 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

/// The command must end.
#[derive(Debug)]
pub(super) struct Interrupted;

impl Method {
    /// Runs a job on a disk. A failure is part of the result. The job ends early when `interrupts` is readable.
    pub(super) fn measure(
        &mut self,
        disk: &Disk,
        job: Job,
        interrupts: BorrowedFd<'_>,
    ) -> (JobResult, Result<(), Interrupted>) {
        let (windows, failed) = match disk.check(job) {
            Ok(()) => self.run(disk, job, interrupts),
            Err(reason) => (Vec::new(), Some(Stop::Failed(reason))),
        };
        let (failed, outcome) = match failed {
            None => (None, Ok(())),
            Some(Stop::Failed(reason)) => (Some(reason), Ok(())),
            Some(Stop::Interrupted) => (Some("interrupted".to_owned()), Err(Interrupted)),
        };
        let summary = Summary::of(&windows);
        (JobResult { job: job.to_string(), failed, windows, summary }, outcome)
    }

    fn run(&mut self, disk: &Disk, job: Job, interrupts: BorrowedFd<'_>) -> (Vec<Window>, Option<Stop>) {
        let mut client = match Client::new(disk.file.as_fd(), disk.size, job, interrupts) {
            Ok(client) => client,
            Err(reason) => return (Vec::new(), Some(Stop::Failed(reason))),
        };
        match (self.amount, &mut self.marks) {
            (Amount::Requests(requests), Some(marks)) => {
                let mut meter = Counted::new(requests, self.windows, job.depth, marks);
                let outcome = client.run(&mut meter);
                let windows = meter.complete().iter().map(|window| Window::marked(requests, *window)).collect();
                (windows, outcome.err())
            }
            (amount, _) => {
                let server = disk.server();
                let processes = Processes::new(server, self.counters);
                let mut meter = Clocked::new(amount, self.windows, job.depth, &processes);
                let outcome = client.run(&mut meter);
                let mut intervals = meter.into_intervals();
                if disk.server() != server {
                    log::warn!(
                        "{}: another process serves the disk now; {job} has no figures of its server",
                        disk.name
                    );
                    intervals.iter_mut().for_each(|interval| interval.work.forget_server(self.counters));
                }
                let windows = intervals.iter().map(|interval| Window::measured(interval, job.size)).collect();
                (windows, outcome.err())
            }
        }
    }
}
