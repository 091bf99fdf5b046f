// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is counted, a line of it per way of recovery, and all of it as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use crate::mode::Recovery;

/// The numbers of one way of recovery.
#[derive(Debug, Serialize)]
pub(crate) struct Tally {
    pub(crate) recovery: Recovery,
    pub(crate) rounds: u32,
    /// Setups that were run: recovery/data, queues, threads.
    pub(crate) setups: Vec<String>,
    /// Ends of servers, by what they were at.
    pub(crate) ends: BTreeMap<&'static str, u32>,
    /// Devices that were stopped or deleted instead of recovered.
    pub(crate) dropped: u32,
    /// Sessions of fio that came to their own end.
    pub(crate) sessions: u32,
    pub(crate) load_ios: u64,
    pub(crate) load_errors: u64,
    pub(crate) witness_ios: u64,
    pub(crate) witness_errors: u64,
    /// The longest wait of each kind, in milliseconds.
    pub(crate) slowest: BTreeMap<&'static str, u64>,
    pub(crate) seconds: u64,
    /// Why the driver cannot be tried in this way.
    pub(crate) skipped: Option<String>,
    pub(crate) failures: Vec<String>,
}

impl Tally {
    pub(crate) fn new(recovery: Recovery) -> Self {
        Tally {
            recovery,
            rounds: 0,
            setups: Vec::new(),
            ends: BTreeMap::new(),
            dropped: 0,
            sessions: 0,
            load_ios: 0,
            load_errors: 0,
            witness_ios: 0,
            witness_errors: 0,
            slowest: BTreeMap::new(),
            seconds: 0,
            skipped: None,
            failures: Vec::new(),
        }
    }

    /// Takes note of how long something took.
    pub(crate) fn took(&mut self, what: &'static str, time: Duration) {
        let slowest = self.slowest.entry(what).or_default();
        *slowest = (*slowest).max(time.as_millis() as u64);
    }

    pub(crate) fn end(&mut self, what: &'static str) {
        *self.ends.entry(what).or_default() += 1;
    }
}

impl std::fmt::Display for Tally {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:8}", self.recovery.name())?;
        if let Some(why) = &self.skipped {
            return write!(f, " skipped: {why}");
        }
        write!(f, " {} rounds in {} s; ends", self.rounds, self.seconds)?;
        for (what, count) in &self.ends {
            write!(f, " {what} {count}")?;
        }
        write!(
            f,
            "; dropped {}; fio {} sessions, {} I/Os, {} errors",
            self.dropped, self.sessions, self.load_ios, self.load_errors
        )?;
        write!(f, "; witnesses {} I/Os, {} errors", self.witness_ios, self.witness_errors)?;
        if let Some((what, time)) = self.slowest.iter().max_by_key(|(_, time)| **time) {
            write!(f, "; slowest: {what} {time} ms")?;
        }
        write!(f, "; {}", if self.failures.is_empty() { "good" } else { "FAILED" })
    }
}

/// All of a run.
#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    pub(crate) seed: u64,
    pub(crate) kernel: Option<String>,
    pub(crate) driver: Option<String>,
    pub(crate) features: u64,
    pub(crate) good: bool,
    pub(crate) modes: &'a [Tally],
}
