// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks that the command creates and removes.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::helper::{self, NoResult, Program, wait_for};
use crate::control::Control;
use crate::units::DeviceId;

/// Time limit of a server for creating its disk, and for removing it.
const SERVER_TIMEOUT: Duration = Duration::from_secs(60);

/// Why there is no disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NotCreated {
    Interrupted,
    /// It is not available here, with the reason.
    Absent(String),
}

impl From<String> for NotCreated {
    fn from(reason: String) -> Self {
        NotCreated::Absent(reason)
    }
}

/// A disk that exists as long as this does.
#[derive(Debug)]
pub(super) struct Created {
    pub(super) path: PathBuf,
    removal: Option<Removal>,
}

/// Way in which a disk is removed.
#[derive(Debug)]
enum Removal {
    /// Its server removes it when it gets a signal. If it does not, a program does.
    Server { server: Program, otherwise: Vec<OsString>, device: Option<UblkDevice> },
    /// A program removes it.
    Program { argv: Vec<OsString>, device: Option<UblkDevice> },
}

/// A ublk device, and what distinguishes it from later ones of its number.
#[derive(Clone, Copy, Debug)]
struct UblkDevice {
    id: DeviceId,
    instance: Option<u64>,
}

impl UblkDevice {
    /// Returns the device with this disk; `None` for other disks.
    fn of(disk: &Path) -> Option<Self> {
        let id = DeviceId(disk.to_str()?.strip_prefix("/dev/ublkb")?.parse().ok()?);
        Some(UblkDevice { id, instance: Control::open().ok().and_then(|control| control.instance(id)) })
    }

    /// Returns whether another device has the number by now.
    fn has_followed(self) -> bool {
        Control::open().is_ok_and(|control| !control.is_instance(self.id, self.instance))
    }
}

impl Created {
    /// Starts a server that prints the path of its disk, serves it, and removes it at SIGTERM. `remove` is the program that
    /// removes a device by force; the device's number is appended.
    pub(super) fn by_server(
        argv: &[OsString],
        remove: &[OsString],
        interrupts: BorrowedFd<'_>,
    ) -> Result<Self, NotCreated> {
        let mut server = Program::start(argv)?;
        let ready = wait_for(Some(interrupts), SERVER_TIMEOUT, || {
            server.first_line().map(Ok).or_else(|| server.status().map(Err))
        });
        // Until its path is known, there is no other way to remove the disk.
        let mut created = Created {
            path: PathBuf::new(),
            removal: Some(Removal::Server { server, otherwise: Vec::new(), device: None }),
        };
        let Some(Removal::Server { server, otherwise, device }) = &mut created.removal else {
            unreachable!("set above")
        };
        match ready {
            Ok(Ok(path)) => {
                let number = path.strip_prefix("/dev/ublkb").unwrap_or_default();
                *otherwise = [remove, &[number.into()]].concat();
                *device = UblkDevice::of(path.as_ref());
                created.path = path.into();
                Ok(created)
            }
            Ok(Err(status)) => {
                let reason = server.describe(status);
                created.removal = None;
                Err(NotCreated::Absent(reason))
            }
            Err(NoResult::Interrupted) => Err(NotCreated::Interrupted),
            Err(NoResult::TimedOut) => {
                Err(NotCreated::Absent(format!("the server was not ready within {} s", SERVER_TIMEOUT.as_secs())))
            }
        }
    }

    /// Takes over a disk that a program has created and another one removes.
    pub(super) fn by_program(path: PathBuf, remove: Vec<OsString>) -> Self {
        let device = UblkDevice::of(&path);
        Created { path, removal: Some(Removal::Program { argv: remove, device }) }
    }

    /// Creates a loop device for a file.
    pub(super) fn loop_device(file: &Path) -> Result<Self, NotCreated> {
        let argv = ["losetup".as_ref(), "--find".as_ref(), "--show".as_ref(), file.as_os_str()];
        let path = helper::run(&argv)?.trim().to_owned();
        let remove = ["losetup", "--detach", &path].map(OsString::from).into();
        Ok(Self::by_program(path.into(), remove))
    }

    /// The process that serves the disk, if this has started it.
    pub(super) fn server(&self) -> Option<i32> {
        match &self.removal {
            Some(Removal::Server { server, .. }) => Some(server.pid()),
            _ => None,
        }
    }

    /// Removes the disk. Dropping it does the same and logs an error.
    pub(super) fn remove(mut self) -> Result<(), String> {
        self.remove_once()
    }

    fn remove_once(&mut self) -> Result<(), String> {
        let removed = match self.removal.take() {
            None => Ok(()),
            Some(Removal::Program { argv, device }) => run_unless_followed(&argv, device),
            Some(Removal::Server { mut server, otherwise, device }) => {
                let force = || run_unless_followed(&otherwise, device);
                server.terminate();
                let outcome = match server.wait(SERVER_TIMEOUT) {
                    Some(status) if status.success() => Ok(()),
                    // One that was killed has removed nothing.
                    Some(status) => force().and_then(|()| Err(format!("its server ended early ({status})"))),
                    None => {
                        let forced = force();
                        server.kill();
                        forced.and(Err("its server did not remove it in time".to_owned()))
                    }
                };
                let messages = server.messages();
                if !messages.is_empty() {
                    log::warn!("server of {}: {messages}", self.path.display());
                }
                outcome
            }
        };
        removed.map_err(|reason| format!("removing {}: {reason}", self.path.display()))
    }
}

/// Removes a disk by a program, unless that is not known yet, or another device has the number by now.
fn run_unless_followed(program: &[OsString], device: Option<UblkDevice>) -> Result<(), String> {
    if program.is_empty() || device.is_some_and(UblkDevice::has_followed) {
        return Ok(());
    }
    helper::run(program).map(|_| ())
}

impl Drop for Created {
    fn drop(&mut self) {
        if let Err(message) = self.remove_once() {
            log::error!("{message}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, Write};
    use std::os::fd::AsFd;

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::super::helper::script;
    use super::*;

    /// A server that reports to a file that it was started, and removes the file at SIGTERM.
    fn server(file: &Path, path: &str) -> Vec<OsString> {
        let file = file.display();
        script(&format!("touch {file}; trap 'rm {file}; exit 0' TERM; {path}; while :; do sleep 0.01; done"))
    }

    #[test]
    fn a_server_removes_its_disk_when_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("served");
        let (reader, _writer) = io::pipe().unwrap();
        let created = Created::by_server(&server(&file, "echo /dev/ublkb7"), &[], reader.as_fd()).unwrap();
        assert_eq!(created.path, Path::new("/dev/ublkb7"));
        assert!(file.exists() && created.server().is_some());
        drop(created);
        assert!(!file.exists());
    }

    #[test]
    fn a_server_that_is_not_ready_yet_ends_when_interrupted() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("served");
        let (reader, mut writer) = io::pipe().unwrap();
        let starting = file.clone();
        let signal = std::thread::spawn(move || {
            while !starting.exists() {
                std::thread::sleep(Duration::from_millis(1));
            }
            // The shell sets its trap after it has created the file.
            std::thread::sleep(Duration::from_millis(100));
            writer.write_all(b"x").unwrap();
            writer
        });
        let outcome = Created::by_server(&server(&file, ":"), &[], reader.as_fd());
        assert_eq!(outcome.unwrap_err(), NotCreated::Interrupted);
        assert!(!file.exists());
        signal.join().unwrap();
    }

    #[test]
    fn the_disk_of_a_server_that_was_killed_is_removed_by_the_program() {
        let directory = tempfile::tempdir().unwrap();
        let removed = directory.path().join("removed");
        let (reader, _writer) = io::pipe().unwrap();
        let argv = script("echo /dev/ublkb7; while :; do sleep 0.01; done");
        let remove = script(&format!("touch {}", removed.display()));
        let created = Created::by_server(&argv, &remove, reader.as_fd()).unwrap();
        kill(Pid::from_raw(created.server().unwrap()), Signal::SIGKILL).unwrap();
        let error = created.remove().unwrap_err();
        assert!(removed.exists() && error.contains("its server ended early"), "{error}");
    }

    #[test]
    fn a_server_that_fails_is_absent_with_its_message() {
        let (reader, _writer) = io::pipe().unwrap();
        let outcome = Created::by_server(&script("echo 'ublk: no driver' >&2; exit 1"), &[], reader.as_fd());
        assert_eq!(outcome.unwrap_err(), NotCreated::Absent("no driver".into()));
    }

    #[test]
    fn a_disk_that_cannot_be_removed_is_reported() {
        let remove = script("echo busy >&2; exit 1");
        let error = Created::by_program("/dev/x".into(), remove).remove().unwrap_err();
        assert_eq!(error, "removing /dev/x: busy");
    }
}
