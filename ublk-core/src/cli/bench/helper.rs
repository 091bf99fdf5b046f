// SPDX-License-Identifier: MIT OR Apache-2.0

//! Programs that the command starts: servers of disks, and those that create and remove disks.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

/// Time limit of a program that creates or removes a disk.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);
/// Interval in which a program is checked.
const INTERVAL: Duration = Duration::from_millis(10);
/// Maximum number of bytes of a program's output that are read.
const MAX_OUTPUT: usize = 64 << 10;

/// A running program.
///
/// Its output goes to files in memory: daemons that it starts may keep them open, and it never waits for a reader. It is in a
/// process group of its own: Ctrl-C at the terminal is for this command, which then ends it.
#[derive(Debug)]
pub(super) struct Program {
    name: String,
    child: Child,
    out: File,
    err: File,
}

impl Program {
    /// Starts a program.
    ///
    /// # Errors
    ///
    /// A message that names the program.
    pub(super) fn start(argv: &[OsString]) -> Result<Self, String> {
        let (program, arguments) = argv.split_first().ok_or("no program given")?;
        let name = program.to_string_lossy().into_owned();
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::NotFound => format!("{name} is not installed"),
            _ => format!("starting {name}: {e}"),
        };
        let (out, err) = (memory_file().map_err(failed)?, memory_file().map_err(failed)?);
        let mut command = Command::new(program);
        command
            .args(arguments)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(out.try_clone().map_err(failed)?)
            .stderr(err.try_clone().map_err(failed)?);
        // SAFETY: the closure makes one system call, which is async-signal-safe, and does not allocate.
        unsafe { command.pre_exec(unblock_signals) };
        let child = command.spawn().map_err(failed)?;
        Ok(Program { name, child, out, err })
    }

    /// The process's number.
    pub(super) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Returns the first line of the program's output, if it is complete.
    pub(super) fn first_line(&self) -> Option<String> {
        read(&self.out).split_once('\n').map(|(line, _)| line.to_owned())
    }

    /// Returns the program's messages, in one line.
    pub(super) fn messages(&self) -> String {
        read(&self.err).split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// Returns the status of the program if it has ended.
    pub(super) fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// Describes a program that ended with a status: its messages, or the status.
    pub(super) fn describe(&self, status: ExitStatus) -> String {
        let messages = self.messages();
        // Messages of this project's programs begin with its name.
        match messages.strip_prefix("ublk: ").unwrap_or(&messages) {
            "" => format!("{}: {status}", self.name),
            messages => messages.to_owned(),
        }
    }

    /// Waits for the end of the program, and returns its status. `None` after a time limit.
    pub(super) fn wait(&mut self, timeout: Duration) -> Option<ExitStatus> {
        wait_for(None, timeout, || self.status()).ok()
    }

    /// Asks the program to end.
    pub(super) fn terminate(&self) {
        let _ = kill(Pid::from_raw(self.pid()), Signal::SIGTERM);
    }

    /// Ends the program at once.
    pub(super) fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.wait(Duration::from_secs(1));
    }
}

/// Lets a program get the signals that this command has blocked for itself.
fn unblock_signals() -> io::Result<()> {
    Ok(SigSet::empty().thread_set_mask()?)
}

/// Runs a program to its end, and returns its output.
///
/// # Errors
///
/// A message, if it cannot be started, fails, or does not end in time.
pub(super) fn run(argv: &[impl AsRef<OsStr>]) -> Result<String, String> {
    let argv: Vec<OsString> = argv.iter().map(|word| word.as_ref().to_owned()).collect();
    let mut program = Program::start(&argv)?;
    match program.wait(COMMAND_TIMEOUT) {
        Some(status) if status.success() => Ok(read(&program.out)),
        Some(status) => Err(program.describe(status)),
        None => {
            program.kill();
            Err(format!("{} did not end within {} s", program.name, COMMAND_TIMEOUT.as_secs()))
        }
    }
}

/// Why a wait ended without a result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NoResult {
    Interrupted,
    TimedOut,
}

/// Calls `probe` until it has a result, `interrupts` is readable, or the time is over.
pub(super) fn wait_for<T>(
    interrupts: Option<BorrowedFd<'_>>,
    timeout: Duration,
    mut probe: impl FnMut() -> Option<T>,
) -> Result<T, NoResult> {
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(result) = probe() {
            return Ok(result);
        }
        if Instant::now() >= deadline {
            return Err(NoResult::TimedOut);
        }
        if is_readable(interrupts, INTERVAL) {
            return Err(NoResult::Interrupted);
        }
    }
}

/// Returns whether a descriptor is readable or becomes so within a time.
pub(super) fn is_readable(fd: Option<BorrowedFd<'_>>, within: Duration) -> bool {
    let mut fds: Vec<_> = fd.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    poll(&mut fds, PollTimeout::try_from(within).unwrap_or(PollTimeout::ZERO)).is_ok_and(|ready| ready > 0)
}

fn memory_file() -> io::Result<File> {
    Ok(memfd_create(c"ublk-bench", MFdFlags::MFD_CLOEXEC)?.into())
}

/// Reads the beginning of a file without moving its offset, which the program shares.
fn read(file: &File) -> String {
    let mut text = vec![0; MAX_OUTPUT];
    let len = file.read_at(&mut text, 0).unwrap_or(0);
    String::from_utf8_lossy(&text[..len]).into_owned()
}

/// The command line of a shell script.
#[cfg(test)]
pub(super) fn script(text: &str) -> Vec<OsString> {
    ["sh", "-c", text].map(OsString::from).into()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;

    use nix::sys::signal::SigmaskHow;

    use super::*;

    #[test]
    fn a_program_returns_its_output_or_its_messages() {
        assert_eq!(run(&script("echo /dev/x")), Ok("/dev/x\n".into()));
        assert_eq!(run(&script("echo ublk: no driver >&2; exit 1")), Err("no driver".into()));
        assert_eq!(run(&script("exit 3")), Err("sh: exit status: 3".into()));
        assert_eq!(run(&["ublk-bench-nonexistent"]), Err("ublk-bench-nonexistent is not installed".into()));
    }

    #[test]
    fn a_program_gets_the_signals_that_are_blocked_here() {
        let mut blocked = SigSet::empty();
        blocked.add(Signal::SIGTERM);
        let before = blocked.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap();
        let argv = script("echo ready; exec sleep 60");
        let mut program = Program::start(&argv).unwrap();
        before.thread_set_mask().unwrap();
        assert_eq!(wait_for(None, Duration::from_secs(60), || program.first_line()), Ok("ready".into()));
        program.terminate();
        assert_eq!(program.wait(Duration::from_secs(60)).unwrap().signal(), Some(libc::SIGTERM));
    }

    /// kublk and rublk leave a daemon, which may keep the command's output open.
    #[test]
    fn a_daemon_that_keeps_the_output_open_is_not_waited_for() {
        let started = Instant::now();
        let pid = run(&script("sleep 30 & echo $!")).unwrap().trim().parse().unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_wait_ends_with_a_result_an_interrupt_or_the_time() {
        let (reader, writer) = io::pipe().unwrap();
        let never = || None::<()>;
        assert_eq!(wait_for(Some(reader.as_fd()), Duration::from_secs(60), || Some(1)), Ok(1));
        assert_eq!(wait_for(Some(reader.as_fd()), Duration::from_millis(20), never), Err(NoResult::TimedOut));
        io::Write::write_all(&mut &writer, b"x").unwrap();
        assert_eq!(wait_for(Some(reader.as_fd()), Duration::from_secs(60), never), Err(NoResult::Interrupted));
    }
}
