// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a measurement costs: CPU time of the client and of the server, and hardware counters.

use std::time::Duration;

use nix::time::{ClockId, clock_getcpuclockid};
use nix::unistd::Pid;

use super::perf::{Counters, Scope};

/// Totals at some time, or the difference between two.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Work {
    /// CPU time of this process.
    pub(super) client: Duration,
    /// CPU time of the disk's server, if that is a process.
    pub(super) server: Option<Duration>,
    /// Hardware counters, if there are any.
    pub(super) instructions: Option<u64>,
    pub(super) cycles: Option<u64>,
}

impl Work {
    /// Removes what was measured of one server, if another one has served requests, too. Counters of the whole system remain.
    pub(super) fn forget_server(&mut self, counters: Option<Scope>) {
        self.server = None;
        if counters != Some(Scope::System) {
            (self.instructions, self.cycles) = (None, None);
        }
    }

    /// Returns what was added since an earlier reading.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let counted = |now: Option<u64>, then: Option<u64>| now.zip(then).map(|(now, then)| now.saturating_sub(then));
        Work {
            instructions: counted(self.instructions, earlier.instructions),
            cycles: counted(self.cycles, earlier.cycles),
            client: self.client.saturating_sub(earlier.client),
            server: self.server.zip(earlier.server).map(|(now, then)| now.saturating_sub(then)),
        }
    }
}

/// Reads totals at the boundaries of windows.
pub(super) trait Observer {
    /// Returns the totals so far.
    fn work(&self) -> Work;
}

/// This process, and that of the disk's server.
#[derive(Debug)]
pub(super) struct Processes {
    server: Option<ClockId>,
    counters: Option<Counters>,
}

impl Processes {
    /// Observes this process and a server, with hardware counters of a scope.
    pub(super) fn new(server: Option<i32>, scope: Option<Scope>) -> Self {
        // A thread of the server may end meanwhile.
        let counters = scope
            .and_then(|scope| Counters::open(scope, server).inspect_err(|e| log::warn!("hardware counters: {e}")).ok());
        Processes { server: server.and_then(|pid| clock_getcpuclockid(Pid::from_raw(pid)).ok()), counters }
    }
}

impl Observer for Processes {
    fn work(&self) -> Work {
        let read = |clock: ClockId| clock.now().ok().map(Duration::from);
        Work {
            client: read(ClockId::CLOCK_PROCESS_CPUTIME_ID).unwrap_or_default(),
            server: self.server.and_then(read),
            instructions: self.counters.as_ref().and_then(Counters::instructions),
            cycles: self.counters.as_ref().and_then(Counters::cycles),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_of_another_process_is_read() {
        let mut child = std::process::Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        let observer = Processes::new(Some(child.id() as i32), None);
        let before = observer.work();
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while observer.work().since(&before).server.unwrap() < Duration::from_millis(10) {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(observer.work().server, None, "a server that has exited has no CPU time");
    }

    #[test]
    fn counters_of_the_system_do_not_depend_on_the_server() {
        let work =
            Work { client: Duration::ZERO, server: Some(Duration::ZERO), instructions: Some(1), cycles: Some(1) };
        let without = |counters| {
            let mut work = work;
            work.forget_server(counters);
            (work.server, work.instructions, work.cycles)
        };
        assert_eq!(without(Some(Scope::System)), (None, Some(1), Some(1)));
        assert_eq!(without(Some(Scope::Processes)), (None, None, None));
    }

    #[test]
    fn a_disk_without_a_server_has_no_server_time() {
        let work = Processes::new(None, None).work();
        assert!(work.client > Duration::ZERO);
        assert_eq!(work.server, None);
    }
}
