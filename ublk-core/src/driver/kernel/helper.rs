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
//!    mapping until the command has ended, independently of the parent's mapping.

mod reports;

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::fcntl::OFlag;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

use self::reports::{Gate, Report, Reports};
use super::super::{ControlCommand, ControlFailure};
use crate::fork::PerProcess;
use crate::memory::SharedBytes;

/// Time to wait for the reserved pipe while another command uses it.
const RESERVE_PATIENCE: Duration = Duration::from_secs(5);
/// Time limit for the exit of a helper that has reported.
const EXIT: Duration = Duration::from_millis(200);
/// Descriptors of the control device and of the pipe in the child, which closes all others.
const CONTROL: i32 = 0;
const REPORT: i32 = 1;

type Pipe = (OwnedFd, OwnedFd);

/// Reserved pipe for helpers, and the helpers that have not exited.
#[derive(Debug, Default)]
pub(super) struct Helpers {
    /// Pipe for a process that has no free descriptors, which could not even remove a device otherwise.
    pipe: PerProcess<Option<Pipe>>,
    /// Helpers that have not exited yet. If this process is init or a subreaper, they are its children and remain zombies
    /// until it has waited for them.
    left: PerProcess<Vec<Pid>>,
}

impl Helpers {
    /// Returns a new pipe, or the reserved one. Waits for the latter if another thread's command uses it.
    fn pipe(&self) -> io::Result<Pipe> {
        let deadline = Instant::now() + RESERVE_PATIENCE;
        loop {
            let errno = match pipe2(OFlag::O_CLOEXEC) {
                Ok(pipe) => return Ok(pipe),
                Err(errno) => errno,
            };
            if let Some(pipe) = self.pipe.lock().take() {
                return Ok(pipe);
            }
            if Instant::now() >= deadline {
                return Err(errno.into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reserves a pipe, if there is none. Called at the beginning, and when a pipe was closed.
    pub(super) fn reserve(&self) {
        let mut slot = self.pipe.lock();
        if slot.is_none() {
            *slot = pipe2(OFlag::O_CLOEXEC).ok();
        }
    }

    /// Waits for a helper, and for earlier ones, as far as they are children of this process and have exited. A helper that
    /// `is_over` is about to exit, and is waited for up to [`EXIT`]: it may be stopped or traced.
    fn collect(&self, helper: Option<Pid>, is_over: bool) {
        let mut left = self.left.lock();
        left.retain(|pid| waitpid(*pid, Some(WaitPidFlag::WNOHANG)) == Ok(WaitStatus::StillAlive));
        let Some(helper) = helper else { return };
        let deadline = Instant::now() + if is_over { EXIT } else { Duration::ZERO };
        loop {
            match waitpid(helper, Some(WaitPidFlag::WNOHANG)) {
                Err(nix::errno::Errno::EINTR) => {}
                Ok(WaitStatus::StillAlive) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                Ok(WaitStatus::StillAlive) => return left.push(helper),
                // It is nearly always the child of another process.
                _ => return,
            }
        }
    }
}

/// Sends a command from a process of its own; otherwise like [`Driver::control`](super::super::Driver::control).
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
            // A second fork, so that this process need not wait for the helper, which may take long.
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
            // The program may have waited for it by another `wait`; it has exited either way.
            while waitpid(child, None) == Err(nix::errno::Errno::EINTR) {}
            let mut reports = Reports::new(reader.into(), gate);
            let result = reports.receive(timeout, give_up);
            let (helper, is_over) = reports.close();
            helpers.collect(helper, is_over);
            helpers.reserve();
            Ok((result?, payload.bytes().to_vec()))
        }
    }
}

/// Runs in the helper process: sends the command, and reports its outcome.
///
/// # Safety
///
/// Runs in a forked child (1).
unsafe fn helper(control: i32, report: i32, gate: &Gate, op: u32, header: [u8; 80]) -> ! {
    // SAFETY: (1): plain system calls on numbers. Above all, this closes our copies of `/dev/ublkcN` and of the
    // rings. That comes first: there may be no descriptor left otherwise. Then the two are moved away from the
    // numbers that they are to get before those are overwritten.
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
    let send = |report: Report| {
        let message = report.encode();
        // SAFETY: (1), and the buffer is ours. It does not matter if the pipe has no reader any more.
        unsafe { libc::write(REPORT, message.as_ptr().cast(), message.len()) };
    };
    if ready {
        // SAFETY: (1).
        send(Report::Begun(Pid::from_raw(unsafe { libc::getpid() })));
        // After the report: a parent that finds the gate entered also finds out which process to kill.
        if gate.enter() {
            match command(op, header) {
                Ok(result) => send(Report::Ended(result)),
                Err(error) => send(Report::Failed(error.raw_os_error().unwrap_or(libc::EIO))),
            }
        }
    } else {
        send(Report::Failed(nix::errno::Errno::last_raw()));
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
    use std::os::fd::AsFd;

    use super::*;

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
        assert_eq!(*helpers.left.lock(), [helper]);
        child.kill().unwrap();
        child.wait().unwrap();
        helpers.collect(None, false);
        assert_eq!(*helpers.left.lock(), []);
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
        let taken = helpers.pipe.lock().take();
        assert!(taken.is_some() && helpers.pipe.lock().is_none());
        helpers.reserve();
        assert!(helpers.pipe.lock().is_some());
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
