// SPDX-License-Identifier: MIT OR Apache-2.0

//! The control commands: number, time limit, and what their failures mean.

use std::time::Duration;

use super::{COMMAND_TIMEOUT, DRAIN_TIMEOUT};
use crate::errno::Errno;
use crate::uapi;

/// A control command.
#[derive(Debug)]
pub(super) struct Command {
    /// Name in the UAPI.
    pub(super) name: &'static str,
    /// ioctl-encoded number.
    pub(super) op: u32,
    /// It waits for requests, or takes a lock of the driver that is held by a command that does.
    pub(super) may_block: bool,
    /// Time limit, unless the caller sets one.
    pub(super) timeout: Duration,
    /// The likely cause of a time-out.
    pub(super) slow: &'static str,
    /// The likely causes of errnos.
    refusals: &'static [(Errno, &'static str)],
}

impl Command {
    /// A command that has no reason to wait.
    const fn new(name: &'static str, op: u32) -> Self {
        let slow = "the driver does not answer";
        Command { name, op, may_block: false, timeout: COMMAND_TIMEOUT, slow, refusals: &[] }
    }

    /// The command may wait for a lock.
    const fn may_block(self) -> Self {
        Command { may_block: true, ..self }
    }

    /// The command waits for requests or for a server.
    const fn waits(self) -> Self {
        Command { may_block: true, timeout: DRAIN_TIMEOUT, ..self }
    }

    const fn slow(self, slow: &'static str) -> Self {
        Command { slow, ..self }
    }

    const fn refusals(self, refusals: &'static [(Errno, &'static str)]) -> Self {
        Command { refusals, ..self }
    }

    /// The likely cause of an errno; empty if there is none.
    pub(super) fn hint(&self, errno: Errno) -> &'static str {
        let own = self.refusals.iter().find(|(refused, _)| *refused == errno);
        own.map_or_else(|| general_hint(errno), |(_, hint)| hint)
    }
}

/// The likely cause of an errno of any command.
fn general_hint(errno: Errno) -> &'static str {
    match errno {
        Errno::EPERM | Errno::EACCES => NEEDS_ROOT,
        Errno::ENODEV => "there is no such device",
        Errno::EOPNOTSUPP => "the driver does not know this command",
        Errno::EINTR => "interrupted",
        _ => "",
    }
}

const NEEDS_ROOT: &str = "needs root (CAP_SYS_ADMIN)";
const SINCE_6_16: &str = "needs Linux 6.16 or newer";
const NO_FEATURES: &str = "the driver is older than Linux 6.5";
const NO_SHARED_MEMORY: &str = "the device was created without shared memory (Linux 7.1)";
const NOT_PINNED: &str = "the pages cannot be pinned (`ulimit -l`?)";
const NOT_FETCHED: &str = "the server has not fetched all tags, or does not answer the partition scan";
const NOT_FINISHED: &str = "requests are in flight that the server does not finish";

pub(super) const GET_FEATURES: Command = Command::new("GET_FEATURES", uapi::UBLK_U_CMD_GET_FEATURES).refusals(&[
    (Errno::EOPNOTSUPP, NO_FEATURES),
    (Errno::ENODEV, NO_FEATURES),
    (Errno::EINVAL, NO_FEATURES),
    (Errno::EPERM, NO_FEATURES),
]);

pub(super) const ADD_DEV: Command = Command::new("ADD_DEV", uapi::UBLK_U_CMD_ADD_DEV).may_block().refusals(&[
    (Errno::EEXIST, "the id is in use (`ublk list` shows the devices)"),
    (
        Errno::EINVAL,
        "the driver refuses this combination; Linux's driver (7.3) does not support batches with a queue depth of 1",
    ),
    (Errno::EPERM, NEEDS_ROOT),
    (
        Errno::EACCES,
        "the limit of unprivileged devices is reached (module parameters ublks_max and, per user, ublks_max_per_user)",
    ),
    (Errno::ENOMEM, "not enough memory for that many queues and tags (`ulimit -l`, for a user's device?)"),
]);

pub(super) const SET_PARAMS: Command = Command::new("SET_PARAMS", uapi::UBLK_U_CMD_SET_PARAMS).may_block();

pub(super) const GET_PARAMS: Command = Command::new("GET_PARAMS", uapi::UBLK_U_CMD_GET_PARAMS).may_block();

pub(super) const START_DEV: Command =
    Command::new("START_DEV", uapi::UBLK_U_CMD_START_DEV).waits().slow(NOT_FETCHED).refusals(&[
        (Errno::EEXIST, "the device is already started, or a process still has its previous disk open"),
        (Errno::EBUSY, "the device was stopped while its server still had it open"),
    ]);

pub(super) const STOP_DEV: Command = Command::new("STOP_DEV", uapi::UBLK_U_CMD_STOP_DEV).waits().slow(NOT_FINISHED);

pub(super) const TRY_STOP_DEV: Command = Command::new("TRY_STOP_DEV", uapi::UBLK_U_CMD_TRY_STOP_DEV)
    .waits()
    .slow(NOT_FINISHED)
    .refusals(&[(Errno::EBUSY, "the disk is open or mounted"), (Errno::EOPNOTSUPP, "needs Linux 7.0 or newer")]);

pub(super) const DEL_DEV: Command = Command::new("DEL_DEV", uapi::UBLK_U_CMD_DEL_DEV).waits().slow(
    "requests are not finished, a process still has the ublkc node open or mapped, or another DEL_DEV waits for that",
);

pub(super) const DEL_DEV_ASYNC: Command = Command::new("DEL_DEV_ASYNC", uapi::UBLK_U_CMD_DEL_DEV_ASYNC)
    .waits()
    .refusals(&[(Errno::EINVAL, "Linux's driver does not support this for an unprivileged device: omit --async")]);

pub(super) const QUIESCE_DEV: Command =
    Command::new("QUIESCE_DEV", uapi::UBLK_U_CMD_QUIESCE_DEV).may_block().refusals(&[(Errno::EOPNOTSUPP, SINCE_6_16)]);

pub(super) const START_USER_RECOVERY: Command =
    Command::new("START_USER_RECOVERY", uapi::UBLK_U_CMD_START_USER_RECOVERY).may_block().refusals(&[
        (Errno::EINVAL, "the device was created without recovery"),
        (Errno::EBUSY, "the device still has a server, or a process still has it open"),
    ]);

pub(super) const END_USER_RECOVERY: Command = Command::new("END_USER_RECOVERY", uapi::UBLK_U_CMD_END_USER_RECOVERY)
    .waits()
    .slow(NOT_FETCHED)
    .refusals(&[(Errno::EBUSY, "the device is not waiting for a server")]);

pub(super) const REG_BUF: Command = Command::new("REG_BUF", uapi::UBLK_U_CMD_REG_BUF).waits().refusals(&[
    (Errno::EOPNOTSUPP, NO_SHARED_MEMORY),
    (Errno::EEXIST, "some of these pages are already registered"),
    (Errno::EFAULT, NOT_PINNED),
    (Errno::ENOMEM, NOT_PINNED),
]);

pub(super) const UNREG_BUF: Command = Command::new("UNREG_BUF", uapi::UBLK_U_CMD_UNREG_BUF).waits().refusals(&[
    (Errno::EOPNOTSUPP, NO_SHARED_MEMORY),
    (Errno::ENOENT, "no shared memory is registered with this index"),
]);

pub(super) const UPDATE_SIZE: Command = Command::new("UPDATE_SIZE", uapi::UBLK_U_CMD_UPDATE_SIZE)
    .may_block()
    .refusals(&[(Errno::EOPNOTSUPP, SINCE_6_16), (Errno::ENODEV, "there is no such device, or it has no disk")]);

pub(super) const GET_DEV_INFO2: Command = Command::new("GET_DEV_INFO2", uapi::UBLK_U_CMD_GET_DEV_INFO2)
    .refusals(&[(Errno::ENOENT, "its node in /dev, which identifies an unprivileged device, is missing")]);

pub(super) const GET_QUEUE_AFFINITY: Command = Command::new("GET_QUEUE_AFFINITY", uapi::UBLK_U_CMD_GET_QUEUE_AFFINITY);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_explains_its_own_errnos_before_general_ones() {
        assert!(START_USER_RECOVERY.hint(Errno::EBUSY).contains("still has a server"));
        assert_eq!(STOP_DEV.hint(Errno::EPERM), NEEDS_ROOT);
        assert_eq!(STOP_DEV.hint(Errno::EDOM), "");
    }
}
