// SPDX-License-Identifier: MIT OR Apache-2.0

//! A server in the background whose failures reach whoever started it.
//!
//! The parent starts this program again with a pipe, and waits until the child says through it that
//! the device can be used, or why not. Until then the child's standard error is the parent's; after
//! that it is a log file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{chdir, dup2_stderr, dup2_stdout, pipe2, setsid};

use super::run_dir::RunDir;
use super::serve::Signals;
use super::{Failure, Host, Outcome, state};
use crate::device::Device;
use crate::units::DeviceId;

/// The hidden flag that makes a process the child.
pub(super) const REPORT_FLAG: &str = "report-fd";

/// Prints the paths of a foreground server's disks, until a signal comes or a device ends, which the server has to see to.
pub(super) fn print_paths(devices: &[Device], signals: &Signals) -> Outcome {
    let paths = devices.iter().map(|device| format!("{}\n", device.path().display())).collect();
    super::printed(write_beside(std::io::stdout(), paths, &interruptions(devices, signals)))
}

/// What a server must not miss while it waits for something else.
fn interruptions<'s>(devices: &'s [Device], signals: &'s Signals) -> Vec<BorrowedFd<'s>> {
    std::iter::once(signals.as_fd()).chain(devices.iter().map(AsFd::as_fd)).collect()
}

/// Writes text on a thread of its own, until that is done or one of `others` can be read: a pipe may be full, and its
/// reader may never read. The thread then goes on by itself.
fn write_beside(mut out: impl Write + Send + 'static, text: String, others: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::Builder::new().name("ublk-output".into()).spawn(move || {
        let _ = sender.send(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
        drop(writer);
    })?;
    let fds = std::iter::once(reader.as_fd()).chain(others.iter().copied());
    let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) if fds[0].any() == Some(true) => {
                return receiver.recv().unwrap_or_else(|_| Err(std::io::Error::other("the thread that writes failed")));
            }
            Ok(_) => return Ok(()),
        }
    }
}

/// A command line without what [`parent`] has added to it.
pub(super) fn without_report(arguments: &[OsString]) -> Vec<OsString> {
    let flag = format!("--{REPORT_FLAG}");
    let mut words = arguments.iter();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if *word == *flag {
            words.next();
        } else {
            kept.push(word.clone());
        }
    }
    kept
}

/// What becomes of devices whose paths cannot be printed, as where standard output is a file on a full disk. A reader that
/// has gone away wants no paths, which is no failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Devices {
    /// They are new, and removed again.
    Made,
    /// They were there before, and are in use.
    Found,
}

/// Starts the child and waits for its word.
pub(super) fn parent(arguments: &[OsString], host: &Host, kind: Devices) -> Outcome {
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("starting the server: {what}: {e}"));
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed("pipe", &e))?;
    // The child finds the pipe by its number.
    fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| failed("pipe", &e))?;
    let Some((program, before)) = host.relaunch.split_first() else {
        return Err(Failure::Text("starting the server: no program given".into()));
    };
    let mut child = Command::new(program)
        .args(before)
        .args(arguments)
        .arg(format!("--{REPORT_FLAG}"))
        .arg(writer.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .map_err(|e| failed(&program.to_string_lossy(), &e))?;
    drop(writer);
    let mut report = String::new();
    File::from(reader).read_to_string(&mut report).map_err(|e| failed("reading its report", &e))?;
    match report.split_once(' ') {
        Some(("ok", devices)) => {
            let devices: Vec<_> = devices.lines().filter_map(|device| device.split_once(' ')).collect();
            let paths: String = devices.iter().map(|(_, path)| format!("{path}\n")).collect();
            super::print(&paths).inspect_err(|_| {
                if kind == Devices::Made {
                    devices.iter().for_each(|(id, _)| remove(id));
                }
            })
        }
        Some(("error", message)) => {
            // It has nothing left to do but to end; do not leave it to init to collect.
            let _ = child.wait();
            Err(Failure::Text(message.to_owned()))
        }
        _ => {
            let status = child.wait().map_err(|e| failed("waiting for it", &e))?;
            Err(Failure::Text(format!("the server exited before the device was ready ({})", describe(status))))
        }
    }
}

/// Removes a device whose path could not be printed.
fn remove(id: &str) {
    let removed = id.parse().map_err(|_| format!("no device id: {id:?}")).and_then(|id| {
        let instance = state::instance(DeviceId(id));
        let removed = super::control().and_then(|control| control.remove(DeviceId(id)));
        state::remove(DeviceId(id), instance);
        removed.map_err(|error| error.to_string())
    });
    if let Err(message) = removed {
        eprintln!("ublk: removing the device: {message}");
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (_, Some(signal)) => format!("killed by signal {signal}"),
        _ => "unknown status".to_owned(),
    }
}

/// The child's part: serve, and report.
pub(super) fn child(
    report: RawFd,
    log: Option<&Path>,
    serve: impl FnOnce(&mut dyn FnMut(&[Device], &Signals) -> Outcome) -> Outcome,
) -> Outcome {
    // SAFETY: the parent made this descriptor for this process alone and passed its number; nothing else in
    // this process knows it.
    let mut pipe = Some(File::from(unsafe { OwnedFd::from_raw_fd(report) }));
    if let Some(pipe) = &pipe {
        // Programs that this one may start must not hold up the parent.
        let _ = fcntl(pipe, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
    // Ctrl-C at the parent's terminal is not for the server.
    let _ = setsid();
    let mut place = None;
    let mut ready = |devices: &[Device], signals: &Signals| {
        let (file, log) = Log::open(log, devices)?;
        place = Some(log);
        let pipe = pipe.take().ok_or(Failure::Reported)?;
        // Nobody waits any more: the device is not wanted.
        let lines: String = devices.iter().map(|d| format!("{} {}\n", d.id(), d.path().display())).collect();
        let reported = write_beside(pipe, format!("ok {lines}"), &interruptions(devices, signals));
        reported.map_err(|_| Failure::Reported)?;
        // Last, so that everything above could still be seen by the caller.
        let redirected = dup2_stdout(&file).and_then(|()| dup2_stderr(&file)).and_then(|()| chdir("/"));
        redirected.map_err(|e| Failure::Text(format!("detaching: {e}")))
    };
    let outcome = serve(&mut ready);
    let outcome = match (outcome, pipe) {
        (Err(failure), Some(mut pipe)) => {
            let message = match failure {
                Failure::Error(error) => error.to_string(),
                Failure::Text(text) => text,
                Failure::Reported => return Err(Failure::Reported),
            };
            match pipe.write_all(format!("error {message}").as_bytes()) {
                Ok(()) => Err(Failure::Reported),
                Err(_) => Err(Failure::Text(message)),
            }
        }
        (outcome, _) => outcome,
    };
    if let (Ok(()), Some(log)) = (&outcome, place) {
        log.remove_if_empty();
    }
    outcome
}

/// Where the server's messages go.
enum Log {
    /// In the directory of logs: that of the first device is that of all.
    Default(RunDir, String),
    /// Where the command line wants them.
    Named(PathBuf),
}

impl Log {
    fn open(named: Option<&Path>, devices: &[Device]) -> Result<(File, Self), Failure> {
        let failed =
            |path: &Path, e: &dyn std::fmt::Display| Failure::Text(format!("opening the log {}: {e}", path.display()));
        if let Some(path) = named {
            let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| failed(path, &e))?;
            return Ok((file, Log::Named(path.to_owned())));
        }
        let name = devices.first().map_or_else(|| "server.log".into(), |device| format!("ublkb{}.log", device.id()));
        let made = RunDir::make().map_err(|e| Failure::Text(format!("creating {}: {e}", RunDir::place().display())));
        let directory = made?;
        let file = directory.append(&name).map_err(|e| failed(&directory.name(&name), &e))?;
        Ok((file, Log::Default(directory, name)))
    }

    /// A log without a line is only litter.
    fn remove_if_empty(self) {
        match self {
            Log::Default(directory, name) => {
                if directory.append(&name).and_then(|file| file.metadata()).is_ok_and(|m| m.len() == 0) {
                    let _ = directory.remove(&name);
                }
            }
            Log::Named(path) => {
                if fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() == 0) {
                    let _ = fs::remove_file(path);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// A signal, say, while standard output is a pipe that nothing reads.
    #[test]
    fn a_full_pipe_keeps_nothing_else_waiting() {
        let (_unread, full) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let text = "x".repeat(1 << 20);
        let (signal, mut sender) = std::os::unix::net::UnixStream::pair().unwrap();
        let (done, ended) = channel();
        std::thread::spawn(move || done.send(write_beside(File::from(full), text, &[signal.as_fd()])));
        assert!(ended.recv_timeout(Duration::from_millis(100)).is_err(), "nothing has come yet");
        sender.write_all(&[15]).unwrap();
        ended.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    }

    #[test]
    fn what_is_printed_arrives_or_fails() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        write_beside(writer, "/dev/ublkb7\n".into(), &[]).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "/dev/ublkb7\n");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        super::super::printed(write_beside(full, text.clone(), &[])).unwrap_err();
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        super::super::printed(write_beside(writer, text, &[])).unwrap();
    }
}
