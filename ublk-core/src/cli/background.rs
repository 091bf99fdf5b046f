// SPDX-License-Identifier: MIT OR Apache-2.0

//! Servers in the background, whose failures to start are reported by the command.
//!
//! The command starts this program again with a pipe, and waits until that process reports through the pipe that the
//! device can be used, or why not. Until then, the server's standard error is that of the command; afterwards it is a log
//! file.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::unistd::{chdir, dup2_stderr, dup2_stdout, pipe2, setsid};

use super::failure::{Failure, Outcome};
use super::host::Host;
use super::instance::Instance;
use super::output::{print, write_interruptibly};
use super::run_dir::RunDir;
use super::server::{Signals, interrupts};
use super::state_file::StateFile;
use crate::control::Control;
use crate::device::Device;
use crate::units::DeviceId;

/// The hidden option that gives a background server the descriptor of its pipe.
pub(super) const REPORT_OPTION: &str = "report-fd";

/// Removes from a command line what [`start`] has added.
pub(super) fn without_report(arguments: &[OsString]) -> Vec<OsString> {
    let option = format!("--{REPORT_OPTION}");
    let mut words = arguments.iter();
    let mut rest = Vec::new();
    while let Some(word) = words.next() {
        if *word == *option {
            words.next();
        } else {
            rest.push(word.clone());
        }
    }
    rest
}

/// Whether the server's devices are removed if their paths cannot be printed, because standard output is a file on a full
/// disk, for example. A closed pipe is no failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Devices {
    /// They are new, and removed.
    New,
    /// They existed before and are in use.
    Existing,
}

/// Starts a server in the background, waits for its report, and prints the paths of its disks.
pub(super) fn start(arguments: &[OsString], host: &Host, kind: Devices) -> Outcome {
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("starting the server: {what}: {e}"));
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC).map_err(|e| failed("pipe", &e))?;
    // The server gets the pipe by its number.
    fcntl(&writer, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| failed("pipe", &e))?;
    let Some((program, before)) = host.relaunch.split_first() else {
        return Err(Failure::Text("starting the server: no program given".into()));
    };
    let mut child = Command::new(program)
        .args(before)
        .args(arguments)
        .arg(format!("--{REPORT_OPTION}"))
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
            print(&paths).inspect_err(|_| {
                if kind == Devices::New {
                    devices.iter().for_each(|(id, _)| remove(id));
                }
            })
        }
        Some(("error", message)) => {
            // It is about to exit: reap it here.
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
        let id = DeviceId(id);
        let removed = Control::open().and_then(|control| {
            let instance = control.instance(id);
            let removed = control.remove_instance(id, instance);
            StateFile::remove(id, instance.map(Instance::from));
            removed
        });
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

/// Runs a background server in this process, which [`start`] has started, and reports to the command.
pub(super) fn run(
    report: RawFd,
    log: Option<&Path>,
    serve: impl FnOnce(&mut dyn FnMut(&[Device], &Signals) -> Outcome) -> Outcome,
) -> Outcome {
    // SAFETY: `start` created this descriptor for this process alone and passed its number; nothing else in this process
    // knows it.
    let mut pipe = Some(File::from(unsafe { OwnedFd::from_raw_fd(report) }));
    if let Some(pipe) = &pipe {
        // Programs that the server starts must not keep the command waiting.
        let _ = fcntl(pipe, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
    }
    // Ctrl-C at the command's terminal is not for the server.
    let _ = setsid();
    let mut log_file = None;
    let mut ready = |devices: &[Device], signals: &Signals| {
        let (file, log) = LogFile::open(log, devices)?;
        log_file = Some(log);
        let pipe = pipe.take().ok_or(Failure::Reported)?;
        let lines: String = devices.iter().map(|d| format!("{} {}\n", d.id(), d.path().display())).collect();
        let reported = write_interruptibly(pipe, format!("ok {lines}"), &interrupts(devices, signals));
        // On failure the command has exited, and the device is not wanted.
        reported.map_err(|_| Failure::Reported)?;
        // Last, so that the command's user sees all messages up to here.
        let redirected = dup2_stdout(&file).and_then(|()| dup2_stderr(&file)).and_then(|()| chdir("/"));
        redirected.map_err(|e| Failure::Text(format!("detaching: {e}")))
    };
    let outcome = serve(&mut ready);
    let outcome = match (outcome, pipe) {
        (Err(failure), Some(mut pipe)) => {
            let Some(message) = failure.message() else { return Err(Failure::Reported) };
            match pipe.write_all(format!("error {message}").as_bytes()) {
                Ok(()) => Err(Failure::Reported),
                Err(_) => Err(Failure::Text(message)),
            }
        }
        (outcome, _) => outcome,
    };
    if let (Ok(()), Some(log)) = (&outcome, log_file) {
        log.remove_if_empty();
    }
    outcome
}

/// The file for a server's messages.
enum LogFile {
    /// In the runtime directory, named after the first device.
    Default(RunDir, String),
    /// The file that `--log` names.
    Named(PathBuf),
}

impl LogFile {
    fn open(named: Option<&Path>, devices: &[Device]) -> Result<(File, Self), Failure> {
        let failed =
            |path: &Path, e: &dyn std::fmt::Display| Failure::Text(format!("opening the log {}: {e}", path.display()));
        if let Some(path) = named {
            let file = OpenOptions::new().create(true).append(true).open(path).map_err(|e| failed(path, &e))?;
            return Ok((file, LogFile::Named(path.to_owned())));
        }
        let name = devices.first().map_or_else(|| "server.log".into(), |device| format!("ublkb{}.log", device.id()));
        let created =
            RunDir::create().map_err(|e| Failure::Text(format!("creating {}: {e}", RunDir::location().display())));
        let directory = created?;
        let file = directory.append(&name).map_err(|e| failed(&directory.path_of(&name), &e))?;
        Ok((file, LogFile::Default(directory, name)))
    }

    /// Removes the file of a server that logged nothing.
    fn remove_if_empty(self) {
        match self {
            LogFile::Default(directory, name) => {
                if directory.append(&name).and_then(|file| file.metadata()).is_ok_and(|m| m.len() == 0) {
                    let _ = directory.remove(&name);
                }
            }
            LogFile::Named(path) => {
                if fs::symlink_metadata(&path).is_ok_and(|m| m.is_file() && m.len() == 0) {
                    let _ = fs::remove_file(path);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_option_is_removed_with_its_value() {
        let line = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(without_report(&line("add -t mem --report-fd 7 -s 1G")), line("add -t mem -s 1G"));
        assert_eq!(without_report(&line("add -t mem")), line("add -t mem"));
    }
}
