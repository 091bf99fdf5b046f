// SPDX-License-Identifier: MIT OR Apache-2.0

//! Commands that wait for servers or for who uses the disk, sent by the server or by a process of their own.

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::say;
use crate::control::Control;
use crate::waiting::until;
use ublk_test_common::uapi::*;

/// The command that makes a device LIVE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Begin {
    /// `START_DEV`
    Start,
    /// `END_USER_RECOVERY`
    Recover,
}

impl Begin {
    /// For the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Begin::Start => "start",
            Begin::Recover => "recover",
        }
    }
}

/// Sends the command for the server `pid`.
pub(crate) fn begin(command: Begin, device: u32, pid: u32) -> Result<()> {
    let mut control = Control::open()?;
    say("command")?;
    match command {
        // A process that still has the previous disk open (udev, which inspects it) blocks the next one.
        Begin::Start => drop(until("START_DEV", || match control.simple(UBLK_U_CMD_START_DEV, device, pid.into()) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(None),
            Err(error) => Err(error).context("START_DEV"),
        })?),
        Begin::Recover => {
            control.simple(UBLK_U_CMD_END_USER_RECOVERY, device, pid.into()).context("END_USER_RECOVERY")?;
        }
    }
    say("live")
}

/// A command that takes the disk away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum End {
    /// `STOP_DEV`
    Stop,
    /// `DEL_DEV`
    Delete,
}

impl End {
    /// For the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            End::Stop => "stop",
            End::Delete => "delete",
        }
    }
}

/// Sends the command.
pub(crate) fn end(command: End, device: u32) -> Result<()> {
    let mut control = Control::open()?;
    say("command")?;
    let op = match command {
        End::Stop => UBLK_U_CMD_STOP_DEV,
        End::Delete => UBLK_U_CMD_DEL_DEV,
    };
    control.simple(op, device, 0).context("STOP_DEV or DEL_DEV")
}
