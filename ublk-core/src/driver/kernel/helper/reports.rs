// SPDX-License-Identifier: MIT OR Apache-2.0

//! Reports of a helper process to its parent, through a pipe.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::driver::ControlFailure;
use crate::driver::kernel::after_cancelling;
use crate::memory::SharedBytes;
use crate::process::Pidfd;

/// Interval in which the waiting parent checks whether to give up.
const SLICE: Duration = Duration::from_millis(100);
/// Time limit for the end of a helper that was killed.
const GRACE: Duration = Duration::from_secs(1);

/// Kinds of reports, in the pipe.
const BEGUN: i32 = 0;
const ENDED: i32 = 1;
const FAILED: i32 = 2;
const MESSAGE: usize = 8;

/// Decision, made once, whether the helper begins the command or its parent gives it up. On a loaded machine a helper may be
/// scheduled only after its parent has given up.
#[derive(Debug)]
pub(super) struct Gate(SharedBytes);

impl Gate {
    const OPEN: u32 = 0;
    const ENTERED: u32 = 1;
    const CLOSED: u32 = 2;

    pub(super) fn new() -> io::Result<Self> {
        SharedBytes::new(&Self::OPEN.to_ne_bytes()).map(Gate)
    }

    /// Begins the command. Returns false if the parent has given it up.
    pub(super) fn enter(&self) -> bool {
        self.decide(Self::ENTERED)
    }

    /// Gives the command up. Returns false if it has begun.
    fn close(&self) -> bool {
        self.decide(Self::CLOSED)
    }

    fn decide(&self, state: u32) -> bool {
        let word = self.0.word();
        word.is_some_and(|word| word.compare_exchange(Self::OPEN, state, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }
}

/// Receiving end of a helper's reports, in the parent.
#[derive(Debug)]
pub(super) struct Reports {
    pipe: File,
    gate: Gate,
    /// Pid of the helper, once that has begun.
    helper: Option<Pid>,
    /// Descriptor of the helper, which stays valid if its pid is reused.
    pidfd: Option<Pidfd>,
    /// Whether the helper has reported how the command ended, which is the last thing that it does.
    over: bool,
}

/// Report of a helper: its pid when it begins, then how the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Report {
    Begun(Pid),
    Ended(i32),
    Failed(i32),
}

impl Report {
    pub(super) fn encode(self) -> [u8; MESSAGE] {
        let (kind, value) = match self {
            Report::Begun(pid) => (BEGUN, pid.as_raw()),
            Report::Ended(result) => (ENDED, result),
            Report::Failed(number) => (FAILED, number),
        };
        let mut message = [0; MESSAGE];
        message[..4].copy_from_slice(&kind.to_ne_bytes());
        message[4..].copy_from_slice(&value.to_ne_bytes());
        message
    }

    fn decode(message: [u8; MESSAGE]) -> Self {
        let [a, b, c, d, e, f, g, h] = message;
        let value = i32::from_ne_bytes([e, f, g, h]);
        match i32::from_ne_bytes([a, b, c, d]) {
            BEGUN => Report::Begun(Pid::from_raw(value)),
            ENDED => Report::Ended(value),
            _ => Report::Failed(value),
        }
    }
}

impl Reports {
    pub(super) fn new(pipe: File, gate: Gate) -> Self {
        Reports { pipe, gate, helper: None, pidfd: None, over: false }
    }

    /// Closes the pipe. Returns the helper, if it has begun, and whether it is about to exit.
    pub(super) fn close(self) -> (Option<Pid>, bool) {
        (self.helper, self.over || self.has_ended())
    }

    /// Waits for the outcome of the command.
    pub(super) fn receive(&mut self, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<i32, ControlFailure> {
        let deadline = crate::driver::deadline(timeout);
        let failure = loop {
            let now = Instant::now();
            match self.next(deadline.saturating_duration_since(now).min(SLICE)) {
                Ok(Some(report)) => match self.note(report) {
                    Some(outcome) => return outcome,
                    None => continue,
                },
                Ok(None) if give_up() => break ControlFailure::GaveUp,
                Ok(None) if now >= deadline => break ControlFailure::Timeout,
                Ok(None) => {}
                Err(error) => return Err(ControlFailure::Io(error)),
            }
        };
        if self.gate.close() {
            // The helper finds the gate closed, and exits.
            return Err(failure);
        }
        self.kill();
        // The command may have been carried out before: a new device would be left that no program knows of.
        let deadline = Instant::now() + GRACE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next(left).map(|report| report.map(|report| self.note(report))) {
                Ok(Some(Some(outcome))) => return after_cancelling(outcome?, failure),
                // Its first report was not read yet.
                Ok(Some(None)) => self.kill(),
                // Interrupted by a signal.
                Ok(None) if !left.is_zero() => {}
                Ok(None) | Err(_) => return Err(failure),
            }
        }
    }

    /// Kills the helper, if it is known. A command that waits interruptibly ends with its process; any other ends when its wait
    /// is over.
    fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            // On failure, it has ended.
            let _ = pidfd.kill();
        }
    }

    /// Records a report. Returns the outcome, if the report has it.
    fn note(&mut self, report: Report) -> Option<Result<i32, ControlFailure>> {
        self.over |= !matches!(report, Report::Begun(_));
        Some(match report {
            Report::Begun(pid) => {
                self.helper = Some(pid);
                let pidfd = Pidfd::open(pid.as_raw());
                // The pid was not reused if the helper still has its end of the pipe open.
                self.pidfd = pidfd.filter(|_| !self.has_ended());
                return None;
            }
            Report::Ended(result) => ControlFailure::check(result),
            Report::Failed(number) => Err(ControlFailure::Io(io::Error::from_raw_os_error(number))),
        })
    }

    /// Waits for a report, at most `timeout`. Fails if no report can arrive any more.
    fn next(&mut self, timeout: Duration) -> io::Result<Option<Report>> {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(timeout).unwrap_or(PollTimeout::ZERO)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => return Ok(None),
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut message = [0; MESSAGE];
        self.pipe.read_exact(&mut message).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => io::Error::other("the helper process ended without an answer"),
            _ => error,
        })?;
        Ok(Some(Report::decode(message)))
    }

    /// Returns whether the helper has closed its end of the pipe, as it does by exiting.
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::empty())];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        polled.is_ok() && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::OFlag;
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
    use nix::unistd::pipe2;

    use super::*;

    fn pipe() -> (Reports, File) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let gate = Gate::new().unwrap();
        (Reports::new(reader.into(), gate), writer.into())
    }

    #[test]
    fn a_result_and_a_refusal_come_through() {
        use std::io::Write;
        for (value, expected) in [(7, Ok(7)), (-19, Err(crate::Errno::ENODEV))] {
            let (mut reports, mut writer) = pipe();
            writer.write_all(&Report::Ended(value).encode()).unwrap();
            let got = reports.receive(Duration::from_secs(5), &|| false);
            let got = got.map_err(|failure| match failure {
                ControlFailure::Refused(errno) => errno,
                other => panic!("{other:?}"),
            });
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn a_helper_that_says_nothing_is_a_time_out_and_one_that_dies_an_error() {
        let (mut reports, writer) = pipe();
        let got = reports.receive(Duration::from_millis(20), &|| false);
        assert!(matches!(got, Err(ControlFailure::Timeout)), "{got:?}");
        let got = reports.receive(Duration::from_secs(60), &|| true);
        assert!(matches!(got, Err(ControlFailure::GaveUp)), "{got:?}");
        drop(writer);
        let got = reports.receive(Duration::from_secs(5), &|| false);
        assert!(matches!(got, Err(ControlFailure::Io(_))), "{got:?}");
    }

    #[test]
    fn an_answer_that_comes_with_the_time_out_counts() {
        use std::io::Write;
        let (mut reports, mut writer) = pipe();
        assert!(reports.gate.enter());
        let late = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            writer.write_all(&Report::Ended(7).encode()).unwrap();
        });
        let got = reports.receive(Duration::from_millis(1), &|| false);
        late.join().unwrap();
        // On a machine that is busier than that the time-out stands.
        assert!(matches!(got, Ok(7) | Err(ControlFailure::Timeout)), "{got:?}");
    }

    #[test]
    fn a_signal_does_not_hide_an_answer_that_comes_with_the_time_out() {
        use std::io::Write;
        extern "C" fn nothing(_: i32) {}
        let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
        // SAFETY: the handler does nothing, and this signal is no other test's.
        unsafe { sigaction(Signal::SIGUSR2, &action) }.unwrap();
        let (mut reports, mut writer) = pipe();
        assert!(reports.gate.enter());
        // SAFETY: always possible.
        let waiting = unsafe { libc::pthread_self() };
        let late = std::thread::spawn(move || {
            for _ in 0..10 {
                std::thread::sleep(Duration::from_millis(10));
                // SAFETY: that thread waits for this one.
                unsafe { libc::pthread_kill(waiting, libc::SIGUSR2) };
            }
            writer.write_all(&Report::Ended(7).encode()).unwrap();
            // Open until the answer was read.
            writer
        });
        let began = Instant::now();
        let got = reports.receive(Duration::from_millis(1), &|| false);
        let waited = began.elapsed();
        drop(late.join().unwrap());
        // On a machine that is busier than that the time-out stands.
        let is_late = matches!(got, Err(ControlFailure::Timeout)) && waited >= GRACE;
        assert!(is_late || matches!(got, Ok(7)), "{got:?} after {waited:?}");
    }

    /// On a loaded machine.
    #[test]
    fn a_helper_that_begins_after_its_parent_gave_up_does_nothing() {
        let (mut reports, _writer) = pipe();
        let got = reports.receive(Duration::from_secs(60), &|| true);
        assert!(matches!(got, Err(ControlFailure::GaveUp)), "{got:?}");
        assert!(!reports.gate.enter());
    }

    #[test]
    fn a_helper_whose_report_is_read_late_is_killed() {
        use std::io::Write;
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let (mut reports, mut writer) = pipe();
        let begun = Report::Begun(Pid::from_raw(child.id() as i32)).encode();
        assert!(reports.gate.enter());
        // The report arrives after it was looked for.
        let give_up = || {
            (&mut &writer).write_all(&begun).unwrap();
            true
        };
        let got = reports.receive(Duration::from_secs(60), &give_up);
        assert!(matches!(got, Err(ControlFailure::GaveUp)), "{got:?}");
        writer.flush().unwrap();
        let status = child.wait().unwrap();
        assert!(!status.success(), "it slept for a minute: {status}");
    }

    #[test]
    fn a_helper_is_known_by_a_pidfd_only_while_it_has_its_pipe() {
        let own = Report::Begun(Pid::this());
        let (mut reports, writer) = pipe();
        assert!(reports.note(own).is_none() && reports.pidfd.is_some());
        drop(writer);
        // Other tests' helpers may have a copy of it for a moment.
        while !reports.has_ended() {
            std::thread::yield_now();
        }
        // The number may be another process's by now.
        assert!(reports.note(Report::Begun(Pid::this())).is_none() && reports.pidfd.is_none());
    }
}
