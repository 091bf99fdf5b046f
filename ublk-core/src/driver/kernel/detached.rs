// SPDX-License-Identifier: MIT OR Apache-2.0

//! Control commands that wait for requests, sent by a process of their own.
//!
//! STOP_DEV, and START_DEV with its partition scan, wait uninterruptibly for requests that the server
//! has to finish. Sent by the server itself they are a trap: io_uring runs them in a worker of the
//! sending task, and a task that dies waits for its workers before it closes its files. A server that
//! is killed while a handler hangs would never close `/dev/ublkcN`, so the driver would never fail the
//! hanging request, so the worker would never end: unkillable until a reboot. A helper process holds no
//! `/dev/ublkcN`; when the server dies, the driver fails what it held and the helper's command ends.
//!
//! The helper is a fork, because a library knows no program to execute. Its parent may have threads, so
//! it restricts itself to system calls and to memory allocation, which the C library keeps working in a
//! forked child; it takes no locks of this program and never returns.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. Between `fork` and `_exit` the child calls only async-signal-safe functions, io_uring's set-up
//!    (system calls and `malloc`) and nothing that unwinds.
//! 2. The command's payload is shared memory, mapped at the same place in the helper, which keeps its
//!    mapping until the command has ended, whatever the parent does with its own.

use std::io::{self, Read};
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use super::super::{ControlCommand, ControlFailure};
use crate::memory::SharedBytes;

/// How often the waiting parent asks whether to give up.
const SLICE: Duration = Duration::from_millis(100);
/// How long a helper that was killed may take to end.
const GRACE: Duration = Duration::from_secs(1);
/// How long the reserved pipe may be another command's.
const RESERVE_PATIENCE: Duration = Duration::from_secs(5);
/// How long one may take to end that has reported.
const EXIT: Duration = Duration::from_millis(200);
/// Where the child keeps the control device and the pipe; it closes all other descriptors.
const CONTROL: i32 = 0;
const REPORT: i32 = 1;

/// What the child writes: its pid when it begins, then how the command ended.
const BEGUN: i32 = 0;
const ENDED: i32 = 1;
const FAILED: i32 = 2;
const MESSAGE: usize = 8;

type Pipe = (OwnedFd, OwnedFd);

/// What helpers need, and what is left of them.
#[derive(Debug, Default)]
pub(super) struct Helpers {
    /// A pipe for the case that a process has no descriptors left: a device could not even be removed then.
    pipe: Mutex<Option<Pipe>>,
    /// Helpers that have not ended yet. Where this process is init, or a subreaper, they are its children, and stay
    /// zombies until it has collected them.
    left: Mutex<Vec<Pid>>,
}

impl Helpers {
    /// A new pipe, or the reserved one. If another thread's command has that, this waits for a while.
    fn pipe(&self) -> io::Result<Pipe> {
        let deadline = Instant::now() + RESERVE_PATIENCE;
        loop {
            let errno = match pipe2(OFlag::O_CLOEXEC) {
                Ok(pipe) => return Ok(pipe),
                Err(errno) => errno,
            };
            if let Some(pipe) = self.reserved().take() {
                return Ok(pipe);
            }
            if Instant::now() >= deadline {
                return Err(errno.into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// To be called when a pipe was closed, and once in the beginning.
    pub(super) fn reserve(&self) {
        let mut slot = self.reserved();
        if slot.is_none() {
            *slot = pipe2(OFlag::O_CLOEXEC).ok();
        }
    }

    fn reserved(&self) -> MutexGuard<'_, Option<Pipe>> {
        self.pipe.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Collects a helper, and all that are left, as far as they are this process's and have ended. One that `is_over` ends
    /// at once, and is waited for, but not for long: it may be stopped or traced.
    fn collect(&self, helper: Option<Pid>, is_over: bool) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.retain(|pid| waitpid(*pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive));
        let Some(helper) = helper else { return };
        let deadline = Instant::now() + if is_over { EXIT } else { Duration::ZERO };
        loop {
            match waitpid(helper, Some(WaitPidFlag::WNOHANG)) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(WaitStatus::StillAlive) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(WaitStatus::StillAlive) => return left.push(helper),
                // Another process collects it, nearly always.
                _ => return,
            }
        }
    }
}

/// Sends a command from a process of its own; as [`Driver::control`](super::super::Driver::control)
/// otherwise.
pub(super) fn control(
    device: BorrowedFd<'_>,
    helpers: &Helpers,
    command: &ControlCommand,
    timeout: Duration,
    give_up: &dyn Fn() -> bool,
) -> Result<(i32, Vec<u8>), ControlFailure> {
    let payload = SharedBytes::new(&command.payload).map_err(ControlFailure::Io)?;
    let (op, header) = (command.op, super::control_bytes(command, payload.bytes()));
    let gate = Gate::new().map_err(ControlFailure::Io)?;
    let (reader, writer) = helpers.pipe().map_err(ControlFailure::Io)?;
    let (control, report) = (device.as_raw_fd(), writer.as_raw_fd());
    // SAFETY: (1).
    match unsafe { fork() } {
        Err(errno) => {
            drop((reader, writer));
            helpers.reserve();
            Err(ControlFailure::Io(errno.into()))
        }
        Ok(ForkResult::Child) => {
            // A second fork, so that the helper need not be collected, however long it takes.
            // SAFETY: (1).
            if let Ok(ForkResult::Child) = unsafe { fork() } {
                // SAFETY: (1).
                unsafe { helper(control, report, &gate, op, header) };
            }
            // SAFETY: (1); `_exit` runs no handlers of the parent's.
            unsafe { libc::_exit(0) }
        }
        Ok(ForkResult::Parent { child }) => {
            drop(writer);
            // The program may have collected it by another `wait`; it has exited either way.
            while waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
            let mut reports = Reports { pipe: reader.into(), gate, helper: None, pidfd: None, over: false };
            let result = reports.receive(timeout, give_up);
            let (helper, is_over) = (reports.helper, reports.over || reports.has_ended());
            drop(reports);
            helpers.collect(helper, is_over);
            helpers.reserve();
            Ok((result?, payload.bytes().to_vec()))
        }
    }
}

/// Decides once between the helper, which begins the command, and its parent, which gives it up. On a loaded machine a
/// helper may be scheduled only after its parent has given up.
#[derive(Debug)]
struct Gate(SharedBytes);

impl Gate {
    const OPEN: u32 = 0;
    const ENTERED: u32 = 1;
    const CLOSED: u32 = 2;

    fn new() -> io::Result<Self> {
        SharedBytes::new(&Self::OPEN.to_ne_bytes()).map(Gate)
    }

    /// Begins the command. False if that is not wanted any more.
    fn enter(&self) -> bool {
        self.decide(Self::ENTERED)
    }

    /// Gives the command up. False if it has begun.
    fn close(&self) -> bool {
        self.decide(Self::CLOSED)
    }

    fn decide(&self, state: u32) -> bool {
        let word = self.0.word();
        word.is_some_and(|word| word.compare_exchange(Self::OPEN, state, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }
}

/// The parent's part: the helper's reports.
#[derive(Debug)]
struct Reports {
    pipe: std::fs::File,
    gate: Gate,
    /// Once it has begun.
    helper: Option<Pid>,
    /// The same, whatever process may have its number later.
    pidfd: Option<OwnedFd>,
    /// It has reported how the command ended, which is the last thing that it does.
    over: bool,
}

/// One thing that a helper reports.
#[derive(Debug, PartialEq, Eq)]
enum Report {
    Begun(Pid),
    Ended(i32),
    Failed(i32),
}

impl Reports {
    /// Waits for the outcome.
    fn receive(&mut self, timeout: Duration, give_up: &dyn Fn() -> bool) -> Result<i32, ControlFailure> {
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
            // The helper will find that out, and exit.
            return Err(failure);
        }
        self.kill();
        // It may have been done before: a device would be left that nothing knows of.
        let deadline = Instant::now() + GRACE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.next(left).map(|report| report.map(|report| self.note(report))) {
                Ok(Some(Some(outcome))) => return super::after_cancelling(outcome?, failure),
                // Its first report was not read yet.
                Ok(Some(None)) => self.kill(),
                // A signal.
                Ok(None) if !left.is_zero() => {}
                Ok(None) | Err(_) => return Err(failure),
            }
        }
    }

    /// Kills the helper, if it is known. A command that waits interruptibly ends with its process; any other ends by itself
    /// some day.
    fn kill(&self) {
        if let Some(pidfd) = &self.pidfd {
            kill(pidfd);
        }
    }

    /// Takes a report; the outcome, if it is that.
    fn note(&mut self, report: Report) -> Option<Result<i32, ControlFailure>> {
        self.over |= !matches!(report, Report::Begun(_));
        Some(match report {
            Report::Begun(pid) => {
                self.helper = Some(pid);
                let pidfd = pidfd_open(pid);
                // The number was the helper's all the time if it has its end of the pipe still open.
                self.pidfd = pidfd.filter(|_| !self.has_ended());
                return None;
            }
            Report::Ended(result) => ControlFailure::check(result),
            Report::Failed(number) => Err(ControlFailure::Io(io::Error::from_raw_os_error(number))),
        })
    }

    /// Waits for a report, at most so long. An error if none will come any more.
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
        let [kind, value] = decode(message);
        Ok(Some(match kind {
            BEGUN => Report::Begun(Pid::from_raw(value)),
            ENDED => Report::Ended(value),
            _ => Report::Failed(value),
        }))
    }

    /// Whether the helper has closed the pipe, with which it ends.
    fn has_ended(&self) -> bool {
        let mut fds = [PollFd::new(self.pipe.as_fd(), PollFlags::empty())];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        polled.is_ok() && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
    }
}

/// A descriptor of a process; none before Linux 5.3, or without a descriptor left.
fn pidfd_open(pid: Pid) -> Option<OwnedFd> {
    // SAFETY: the call takes numbers, and what it returns is a new descriptor that is this function's alone.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
        (fd >= 0).then(|| OwnedFd::from_raw_fd(fd as i32))
    }
}

fn kill(pidfd: &OwnedFd) {
    // SAFETY: the call takes numbers, and no information about the signal.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), libc::SIGKILL, 0, 0) };
}

fn encode(kind: i32, value: i32) -> [u8; MESSAGE] {
    let mut message = [0; MESSAGE];
    message[..4].copy_from_slice(&kind.to_ne_bytes());
    message[4..].copy_from_slice(&value.to_ne_bytes());
    message
}

fn decode(message: [u8; MESSAGE]) -> [i32; 2] {
    let [a, b, c, d, e, f, g, h] = message;
    [i32::from_ne_bytes([a, b, c, d]), i32::from_ne_bytes([e, f, g, h])]
}

/// The child's part.
///
/// # Safety
///
/// Runs in a forked child (1).
unsafe fn helper(control: i32, report: i32, gate: &Gate, op: u32, header: [u8; 80]) -> ! {
    // SAFETY: (1): plain system calls on numbers. Above all, this closes our copies of `/dev/ublkcN` and of the
    // rings. That comes first: there may be no descriptor left otherwise. Then the two are moved away from the
    // places that they shall have before those are overwritten.
    let ready = unsafe {
        libc::prctl(libc::PR_SET_NAME, c"ublk-control".as_ptr());
        let mut all = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
        let (low, high) = (control.min(report), control.max(report));
        let close = |first: i32, last: u32| libc::syscall(libc::SYS_close_range, first, last, 0);
        if low > 0 {
            close(0, low as u32 - 1);
        }
        if low + 1 < high {
            close(low + 1, high as u32 - 1);
        }
        close(high + 1, u32::MAX);
        let control = libc::fcntl(control, libc::F_DUPFD, 8);
        let report = libc::fcntl(report, libc::F_DUPFD, 8);
        libc::dup2(control, CONTROL) == CONTROL
            && libc::dup2(report, REPORT) == REPORT
            && close(REPORT + 1, u32::MAX) == 0
    };
    let tell = |kind: i32, value: i32| {
        let message = encode(kind, value);
        // SAFETY: (1), and the buffer is ours. It does not matter if the pipe has no reader any more.
        unsafe { libc::write(REPORT, message.as_ptr().cast(), MESSAGE) };
    };
    if ready {
        // SAFETY: (1).
        tell(BEGUN, unsafe { libc::getpid() });
        // After the report: a parent that finds the gate entered also finds out whom to kill.
        if gate.enter() {
            match command(op, header) {
                Ok(result) => tell(ENDED, result),
                Err(error) => tell(FAILED, error.raw_os_error().unwrap_or(libc::EIO)),
            }
        }
    } else {
        tell(FAILED, nix::errno::Errno::last_raw());
    }
    // SAFETY: (1).
    unsafe { libc::_exit(0) }
}

/// Sends the command and waits for it.
fn command(op: u32, header: [u8; 80]) -> io::Result<i32> {
    let ring = IoUring::<Entry128, cqueue::Entry>::builder().build(2)?;
    // The process is about to end; dropping would only unmap.
    let mut ring = ManuallyDrop::new(ring);
    let entry = opcode::UringCmd80::new(types::Fd(CONTROL), op).cmd(header).build();
    // SAFETY: (2).
    unsafe { ring.submission().push(&entry) }.map_err(|_| io::Error::from_raw_os_error(libc::ENOSPC))?;
    loop {
        match ring.submit_and_wait(1) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
        if let Some(completion) = ring.completion().next() {
            return Ok(completion.result());
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

    use super::*;

    fn pipe() -> (Reports, std::fs::File) {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let gate = Gate::new().unwrap();
        (Reports { pipe: reader.into(), gate, helper: None, pidfd: None, over: false }, writer.into())
    }

    #[test]
    fn a_result_and_a_refusal_come_through() {
        use std::io::Write;
        for (value, expected) in [(7, Ok(7)), (-19, Err(crate::Errno::ENODEV))] {
            let (mut reports, mut writer) = pipe();
            writer.write_all(&encode(ENDED, value)).unwrap();
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
            writer.write_all(&encode(ENDED, 7)).unwrap();
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
            writer.write_all(&encode(ENDED, 7)).unwrap();
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

    /// `/dev/null` takes any command, or none on old kernels; without io_uring the helper fails earlier.
    #[test]
    fn a_forked_helper_sends_the_command() {
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").unwrap();
        let helpers = Helpers::default();
        let command = ControlCommand {
            name: "STOP_DEV",
            op: 0,
            dev_id: 0,
            data: 0,
            payload: vec![0; 8],
            path_len: 0,
            may_block: true,
        };
        let got = control(null.as_fd(), &helpers, &command, Duration::from_secs(600), &|| false);
        match &got {
            Ok(_) | Err(ControlFailure::Refused(_)) => {}
            // Not that it ended without an answer.
            Err(ControlFailure::Io(error)) => assert!(error.raw_os_error().is_some(), "{error}"),
            _ => panic!("{got:?}"),
        }
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
        let begun = encode(BEGUN, child.id() as i32);
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

    #[test]
    fn helpers_leave_no_zombies_to_a_subreaper() {
        let null = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the child makes system calls and allocates, which the C library makes work, and does not unwind.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                // SAFETY: as above.
                unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) };
                let helpers = Helpers::default();
                let sent = control(null.as_fd(), &helpers, &nothing(), Duration::from_secs(60), &|| false);
                let left = waitpid(None, Some(WaitPidFlag::WNOHANG));
                let clean = !matches!(sent, Err(ControlFailure::Timeout)) && left == Err(nix::errno::Errno::ECHILD);
                // SAFETY: as above.
                unsafe { libc::_exit(i32::from(!clean)) }
            }
            ForkResult::Parent { child } => assert_eq!(waitpid(child, None), Ok(WaitStatus::Exited(child, 0))),
        }
    }

    #[test]
    fn a_helper_that_is_stopped_does_not_hold_up_its_parent() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let helper = Pid::from_raw(child.id() as i32);
        let helpers = Helpers::default();
        let began = Instant::now();
        helpers.collect(Some(helper), true);
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        assert_eq!(*helpers.left.lock().unwrap(), [helper]);
        child.kill().unwrap();
        child.wait().unwrap();
        helpers.collect(None, false);
        assert_eq!(*helpers.left.lock().unwrap(), []);
    }

    fn nothing() -> ControlCommand {
        ControlCommand {
            name: "NOTHING",
            op: 1,
            dev_id: 0,
            data: 0,
            payload: vec![1, 2, 3],
            path_len: 0,
            may_block: true,
        }
    }

    #[test]
    fn a_reserved_pipe_is_there_once_and_can_be_had_again() {
        let helpers = Helpers::default();
        helpers.reserve();
        let taken = helpers.reserved().take();
        assert!(taken.is_some() && helpers.reserved().is_none());
        helpers.reserve();
        assert!(helpers.reserved().is_some());
    }

    #[test]
    fn a_helper_process_brings_the_kernels_answer() {
        // A command that the null device does not know; what counts is that the answer is the kernel's.
        let null = std::fs::File::open("/dev/null").unwrap();
        let got = control(null.as_fd(), &Helpers::default(), &nothing(), Duration::from_secs(20), &|| false);
        match got {
            // Without io_uring the set-up's error comes back instead.
            Ok(_) | Err(ControlFailure::Refused(_) | ControlFailure::Io(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}
