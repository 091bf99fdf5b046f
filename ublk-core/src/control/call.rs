// SPDX-License-Identifier: MIT OR Apache-2.0

//! A control command with its arguments, and how it is sent.

use std::time::{Duration, Instant};

use super::commands::{self, Command};
use super::{Control, STATE_POLL};
use crate::driver::{ControlCommand, ControlFailure};
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::uapi::Features;
use crate::units::DeviceId;

/// Time for which a device may outlive its node.
const NODE_TIMEOUT: Duration = Duration::from_millis(200);

/// A command with its arguments.
pub(super) struct Call<'c> {
    control: &'c Control,
    command: &'static Command,
    id: Option<DeviceId>,
    data: u64,
    payload: Vec<u8>,
    /// The device is identified by the path of its char device, too.
    by_path: bool,
    timeout: Duration,
    give_up: &'c dyn Fn() -> bool,
}

impl<'c> Call<'c> {
    /// Prepares a command without arguments, with its own time limit.
    pub(super) fn new(control: &'c Control, command: &'static Command, id: Option<DeviceId>) -> Self {
        Call {
            control,
            command,
            id,
            data: 0,
            payload: Vec::new(),
            by_path: false,
            timeout: command.timeout,
            give_up: &|| false,
        }
    }

    /// Sets the inline argument.
    pub(super) fn data(self, data: u64) -> Self {
        Call { data, ..self }
    }

    /// Sets the bytes that the driver reads and may write.
    pub(super) fn payload(self, payload: Vec<u8>) -> Self {
        Call { payload, ..self }
    }

    /// Adds the path of the char device.
    pub(super) fn path(self) -> Self {
        Call { by_path: true, ..self }
    }

    /// Sets the time limit.
    pub(super) fn within(self, timeout: Duration) -> Self {
        Call { timeout, ..self }
    }

    /// Ends the wait once `give_up` returns true.
    pub(super) fn unless(self, give_up: &'c dyn Fn() -> bool) -> Self {
        Call { give_up, ..self }
    }

    /// Runs a command without a reply.
    pub(super) fn run(self) -> Result<()> {
        self.result().map(drop)
    }

    /// Runs a command and returns its reply.
    pub(super) fn reply(self) -> Result<Vec<u8>> {
        self.result().map(|(_, reply)| reply)
    }

    /// Runs a command and returns its result and reply. It is repeated with the char device's path if the device requires
    /// that.
    ///
    /// An unprivileged device admits any process that may open its char device, but only to commands that name it by path,
    /// even for root. A privileged device takes the path for the command's argument. A number may belong to another kind of
    /// device than before, so that every command is tried without a path first: an unprivileged device refuses that before
    /// it does anything else.
    pub(super) fn result(self) -> Result<(i32, Vec<u8>)> {
        let Some(id) = self.id.filter(|_| !self.by_path && self.command.op != commands::ADD_DEV.op) else {
            return self.send();
        };
        let with_path = Call { payload: self.payload.clone(), by_path: true, ..self };
        match self.send() {
            Err(Error::Control { errno: Errno::EINVAL, .. })
                if with_path.control.info(id)?.features.contains(Features::UNPRIVILEGED_DEV) =>
            {
                with_path.send()
            }
            other => other,
        }
    }

    /// Sends the command once: as it is, without a path unless it has [one](Call::path).
    pub(super) fn send(self) -> Result<(i32, Vec<u8>)> {
        let Call { control, command, id, data, mut payload, by_path, timeout, give_up } = self;
        let name = command.name;
        log::debug!("{name} {id:?} data {data}");
        let path = id.filter(|_| by_path).map(char_path).unwrap_or_default();
        payload.splice(..0, path.bytes());
        let message = ControlCommand {
            name,
            op: command.op,
            dev_id: id.map_or(u32::MAX, |id| id.0),
            data,
            payload,
            path_len: path.len() as u16,
            may_block: command.may_block,
        };
        let refused =
            |errno: Errno, hint: &str| Error::Control { command: name, device: id, errno, hint: hint.to_owned() };
        // SAFETY: the only command with an address in its payload is REG_BUF, of a `SharedMemory`, whose bytes are only
        // clients' data.
        match unsafe { control.driver.control(message, timeout, give_up) } {
            Ok((result, mut reply)) => {
                reply.drain(..path.len());
                Ok((result, reply))
            }
            Err(ControlFailure::Refused(Errno::ENOENT)) if by_path && id.is_some_and(|id| is_gone(control, id)) => {
                Err(refused(Errno::ENODEV, command.hint(Errno::ENODEV)))
            }
            Err(ControlFailure::Refused(errno)) => Err(refused(errno, command.hint(errno))),
            Err(ControlFailure::GaveUp) => {
                Err(refused(Errno::ECANCELED, "a queue of the device failed, or the device was stopped"))
            }
            Err(ControlFailure::Io(e)) => Err(refused(crate::error::errno_of(&e), "the command could not be sent")),
            Err(ControlFailure::Timeout) => Err(Error::Timeout {
                waiting_for: id.map_or(name.to_owned(), |id| format!("{name} on device {id}")),
                waited: timeout,
                hint: command.slow.to_owned(),
            }),
        }
    }
}

/// The path by which a command names a device, with a terminating zero.
fn char_path(id: DeviceId) -> String {
    format!("/dev/ublkc{id}\0")
}

/// Returns whether a device that a command did not find by its path is deleted: its node disappears a moment before the
/// device, but may also be missing for another reason.
fn is_gone(control: &Control, id: DeviceId) -> bool {
    let deadline = Instant::now() + NODE_TIMEOUT;
    loop {
        match control.driver.device_ids() {
            Ok(ids) if !ids.contains(&id) => return true,
            Ok(_) if Instant::now() < deadline => std::thread::sleep(STATE_POLL),
            _ => return false,
        }
    }
}
