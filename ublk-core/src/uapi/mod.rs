// SPDX-License-Identifier: MIT OR Apache-2.0

//! The driver's numbers and layouts, generated from `kmod/include/uapi/linux/ublk_cmd.h`, and typed
//! views of them. No other module writes down a number of the kernel's.

#[rustfmt::skip]
mod bindings;
pub(crate) mod wire;

pub(crate) use bindings::*;

use bitflags::bitflags;

use crate::error::{Error, Result};

bitflags! {
    /// Features of a driver or a device: `UBLK_F_*`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Manual registration of request buffers for zero copy.
        const SUPPORT_ZERO_COPY = UBLK_F_SUPPORT_ZERO_COPY;
        /// Requests are delivered by task work; always on.
        const URING_CMD_COMP_IN_TASK = UBLK_F_URING_CMD_COMP_IN_TASK;
        /// Writes come in two steps, so that the buffer can be chosen late.
        const NEED_GET_DATA = UBLK_F_NEED_GET_DATA;
        /// The device survives its server; requests wait for the next one.
        const USER_RECOVERY = UBLK_F_USER_RECOVERY;
        /// Requests that the dead server held are sent again.
        const USER_RECOVERY_REISSUE = UBLK_F_USER_RECOVERY_REISSUE;
        /// Devices of ordinary users.
        const UNPRIVILEGED_DEV = UBLK_F_UNPRIVILEGED_DEV;
        /// ioctl-encoded command numbers; always on.
        const CMD_IOCTL_ENCODE = UBLK_F_CMD_IOCTL_ENCODE;
        /// Data moves by pread and pwrite on the char device.
        const USER_COPY = UBLK_F_USER_COPY;
        /// Zoned devices.
        const ZONED = UBLK_F_ZONED;
        /// Requests fail while there is no server.
        const USER_RECOVERY_FAIL_IO = UBLK_F_USER_RECOVERY_FAIL_IO;
        /// The size can change while the device is in use.
        const UPDATE_SIZE = UBLK_F_UPDATE_SIZE;
        /// Request buffers are registered by the driver.
        const AUTO_BUF_REG = UBLK_F_AUTO_BUF_REG;
        /// The server can be quiesced while the device is in use.
        const QUIESCE = UBLK_F_QUIESCE;
        /// Each tag may have a thread of its own.
        const PER_IO_DAEMON = UBLK_F_PER_IO_DAEMON;
        /// Buffers can be registered from any thread.
        const BUF_REG_OFF_DAEMON = UBLK_F_BUF_REG_OFF_DAEMON;
        /// Many tags per command, from any thread.
        const BATCH_IO = UBLK_F_BATCH_IO;
        /// Integrity metadata.
        const INTEGRITY = UBLK_F_INTEGRITY;
        /// A device in use can refuse to be stopped.
        const SAFE_STOP_DEV = UBLK_F_SAFE_STOP_DEV;
        /// No partition scan when the disk appears.
        const NO_AUTO_PART_SCAN = UBLK_F_NO_AUTO_PART_SCAN;
        /// Memory shared with the client takes the place of copying.
        const SHMEM_ZC = UBLK_F_SHMEM_ZC;
        /// Descriptors of a chosen size.
        const IO_DESC_SIZE = UBLK_F_IO_DESC_SIZE;
    }
}

impl Features {
    /// First kernel whose driver has each feature at work.
    const SINCE: &[(Features, &str)] = &[
        (Features::SUPPORT_ZERO_COPY, "6.15"),
        (Features::URING_CMD_COMP_IN_TASK, "6.0"),
        (Features::NEED_GET_DATA, "6.0"),
        (Features::USER_RECOVERY, "6.1"),
        (Features::USER_RECOVERY_REISSUE, "6.1"),
        (Features::UNPRIVILEGED_DEV, "6.3"),
        (Features::CMD_IOCTL_ENCODE, "6.4"),
        (Features::USER_COPY, "6.5"),
        (Features::ZONED, "6.6"),
        (Features::USER_RECOVERY_FAIL_IO, "6.13"),
        (Features::UPDATE_SIZE, "6.16"),
        (Features::AUTO_BUF_REG, "6.16"),
        (Features::QUIESCE, "6.16"),
        (Features::PER_IO_DAEMON, "6.16"),
        (Features::BUF_REG_OFF_DAEMON, "6.17"),
        (Features::BATCH_IO, "7.0"),
        (Features::INTEGRITY, "7.0"),
        (Features::SAFE_STOP_DEV, "7.0"),
        (Features::NO_AUTO_PART_SCAN, "7.0"),
        (Features::SHMEM_ZC, "7.1"),
        (Features::IO_DESC_SIZE, "7.3"),
    ];

    /// Checks that these features include all of `needed`.
    ///
    /// # Errors
    ///
    /// [`Error::Unsupported`] for the newest one that is missing.
    pub(crate) fn require(self, needed: Features) -> Result<()> {
        // The newest: a kernel with that has the others too.
        match needed.difference(self).iter().last() {
            None => Ok(()),
            Some(missing) => Err(Error::Unsupported {
                feature: missing.name().unwrap_or("a feature without a name"),
                since: missing.since().unwrap_or("?"),
            }),
        }
    }

    /// The name of one feature, or `None` for several, none or unknown bits.
    pub fn name(self) -> Option<&'static str> {
        Self::all().iter_names().find(|(_, flag)| *flag == self).map(|(name, _)| name)
    }

    /// First kernel that has this feature, for a single known one.
    pub fn since(self) -> Option<&'static str> {
        Self::SINCE.iter().find(|(flag, _)| *flag == self).map(|(_, since)| *since)
    }
}

/// State of a device as the driver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DeviceState {
    /// No disk: not started, or stopped, or its server died.
    Dead,
    /// The disk is there and served.
    Live,
    /// The server is gone and requests wait for the next one.
    Quiesced,
    /// The server is gone and requests fail until the next one comes.
    FailIo,
    /// A state that this crate does not know.
    Unknown(u16),
}

impl DeviceState {
    pub(crate) fn decode(raw: u16) -> Self {
        match raw {
            UBLK_S_DEV_DEAD => DeviceState::Dead,
            UBLK_S_DEV_LIVE => DeviceState::Live,
            UBLK_S_DEV_QUIESCED => DeviceState::Quiesced,
            UBLK_S_DEV_FAIL_IO => DeviceState::FailIo,
            other => DeviceState::Unknown(other),
        }
    }

    /// The state's name in capitals.
    pub fn name(self) -> &'static str {
        match self {
            DeviceState::Dead => "DEAD",
            DeviceState::Live => "LIVE",
            DeviceState::Quiesced => "QUIESCED",
            DeviceState::FailIo => "FAIL_IO",
            DeviceState::Unknown(_) => "UNKNOWN",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_a_name_and_a_kernel() {
        assert_eq!(Features::all().bits().count_ones() as usize, Features::SINCE.len());
        for flag in Features::all() {
            assert!(flag.name().is_some() && flag.since().is_some(), "{flag:?}");
        }
        assert_eq!(Features::from_bits_retain(1 << 40).name(), None);
    }
}
