// SPDX-License-Identifier: MIT OR Apache-2.0

//! Jobs: which requests a client sends, and how many at a time.

use std::fmt;
use std::str::FromStr;

use crate::cli::size;

/// Maximum number of requests in flight.
const MAX_DEPTH: u32 = 4096;
/// Maximum size of a request in bytes, and its alignment.
const MAX_SIZE: u32 = 32 << 20;
const ALIGNMENT: u32 = 512;
/// Maximum size of all requests in flight in bytes, which is memory of the client.
const MAX_IN_FLIGHT: u64 = 1 << 30;

/// Which requests a job sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pattern {
    RandomRead,
    RandomWrite,
    Read,
    Write,
    /// Random requests, 70 % of them reads.
    Mixed,
}

impl Pattern {
    const ALL: [Pattern; 5] =
        [Pattern::RandomRead, Pattern::RandomWrite, Pattern::Read, Pattern::Write, Pattern::Mixed];

    fn name(self) -> &'static str {
        match self {
            Pattern::RandomRead => "randread",
            Pattern::RandomWrite => "randwrite",
            Pattern::Read => "read",
            Pattern::Write => "write",
            Pattern::Mixed => "mixed",
        }
    }

    /// Returns the percentage of reads among the requests.
    pub(super) fn read_percentage(self) -> u8 {
        match self {
            Pattern::RandomRead | Pattern::Read => 100,
            Pattern::RandomWrite | Pattern::Write => 0,
            Pattern::Mixed => 70,
        }
    }

    /// Returns whether offsets are random rather than ascending.
    pub(super) fn is_random(self) -> bool {
        matches!(self, Pattern::RandomRead | Pattern::RandomWrite | Pattern::Mixed)
    }
}

/// A job, written as `randread-4k-qd32`: pattern, size of a request, requests in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) pattern: Pattern,
    /// Size of each request in bytes.
    pub(super) size: u32,
    /// Requests in flight.
    pub(super) depth: u32,
}

impl Job {
    /// The jobs that run without `--job`.
    pub(super) const DEFAULT: [Job; 4] = [
        Job { pattern: Pattern::RandomRead, size: 4 << 10, depth: 1 },
        Job { pattern: Pattern::RandomRead, size: 4 << 10, depth: 32 },
        Job { pattern: Pattern::RandomWrite, size: 4 << 10, depth: 32 },
        Job { pattern: Pattern::Read, size: 128 << 10, depth: 32 },
    ];

    /// Returns whether the job sends writes.
    pub(super) fn writes(&self) -> bool {
        self.pattern.read_percentage() < 100
    }
}

impl FromStr for Job {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            let names = Pattern::ALL.map(Pattern::name).join("|");
            format!("{text:?} is not a job; jobs are named ({names})-SIZE-qdDEPTH, for example randread-4k-qd32")
        };
        let mut parts = text.splitn(3, '-');
        let (Some(pattern), Some(bytes), Some(depth)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        let pattern = Pattern::ALL.into_iter().find(|known| known.name() == pattern).ok_or_else(wrong)?;
        let depth: u32 = depth.strip_prefix("qd").and_then(|depth| depth.parse().ok()).ok_or_else(wrong)?;
        let size = size::parse_u32(bytes)?;
        if !(1..=MAX_DEPTH).contains(&depth) {
            return Err(format!("{text:?}: the depth must be from 1 to {MAX_DEPTH}"));
        }
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(ALIGNMENT) {
            return Err(format!("{text:?}: the size must be a multiple of {ALIGNMENT}, at most {}M", MAX_SIZE >> 20));
        }
        if u64::from(size) * u64::from(depth) > MAX_IN_FLIGHT {
            return Err(format!("{text:?}: more than {}M would be in flight", MAX_IN_FLIGHT >> 20));
        }
        Ok(Job { pattern, size, depth })
    }
}

impl fmt::Display for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-", self.pattern.name())?;
        match self.size {
            size if size.is_multiple_of(1 << 20) => write!(f, "{}m", size >> 20)?,
            size if size.is_multiple_of(1 << 10) => write!(f, "{}k", size >> 10)?,
            size => write!(f, "{size}")?,
        }
        write!(f, "-qd{}", self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_parsed_from_the_name_that_it_prints() {
        for name in ["randread-4k-qd1", "randwrite-512-qd4096", "read-128k-qd32", "write-1m-qd8", "mixed-4k-qd32"] {
            let job: Job = name.parse().unwrap();
            assert_eq!(job.to_string(), name);
        }
        let job: Job = "mixed-4096-qd32".parse().unwrap();
        assert_eq!(job, Job { pattern: Pattern::Mixed, size: 4096, depth: 32 });
        assert_eq!(job.to_string(), "mixed-4k-qd32");
    }

    #[test]
    fn names_that_are_no_jobs_are_refused() {
        for (name, reason) in [
            ("", "is not a job"),
            ("randread", "is not a job"),
            ("randread-4k", "is not a job"),
            ("trim-4k-qd1", "is not a job"),
            ("randread-4k-32", "is not a job"),
            ("randread-4k-qd1-x", "is not a job"),
            ("randread-4x-qd1", "not a size"),
            ("randread-0-qd1", "multiple of 512"),
            ("randread-4000-qd1", "multiple of 512"),
            ("randread-64m-qd1", "at most 32M"),
            ("randread-4k-qd0", "from 1 to 4096"),
            ("randread-4k-qd4097", "from 1 to 4096"),
            ("read-32m-qd64", "in flight"),
        ] {
            let error = name.parse::<Job>().unwrap_err();
            assert!(error.contains(reason), "{name}: {error}");
        }
    }

    #[test]
    fn only_reads_do_not_write() {
        let writes = |name: &str| name.parse::<Job>().unwrap().writes();
        assert!(!writes("randread-4k-qd1") && !writes("read-4k-qd1"));
        assert!(writes("randwrite-4k-qd1") && writes("write-4k-qd1") && writes("mixed-4k-qd1"));
    }
}
