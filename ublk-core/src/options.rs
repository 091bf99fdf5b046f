// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a device is made.

use crate::data::DataMovement;
use crate::error::{Error, Result};
use crate::uapi::{Features, UBLK_MAX_NR_QUEUES, UBLK_MAX_QUEUE_DEPTH};
use crate::units::DeviceId;

/// How a device is made.
#[derive(Clone, Copy, Debug)]
pub struct DeviceOptions {
    /// The id, or `None` for the lowest free one.
    pub id: Option<DeviceId>,
    /// Hardware queues, 1 to 4096. The driver makes no more of them than there are CPUs.
    pub queues: u32,
    /// Requests per queue, 1 to 4096.
    pub depth: u32,
    /// How data moves; by default what fits the target best among what the driver offers.
    pub data: Option<DataMovement>,
    /// Whether tags go to and from the driver in batches (`BATCH_IO`, 7.0); by default where the driver
    /// has it, but not with `recovery`: Linux's driver (7.3) fails requests of a batch device whose server was
    /// asked to leave, instead of holding them. Nor with a depth of 1, which that driver refuses (`EINVAL`). The
    /// one of this project holds them, and takes any depth.
    pub batch: Option<bool>,
    /// Threads that share each queue, every one with tags of its own (`PER_IO_DAEMON`, 6.16), from 1 to
    /// the queue depth. With more than one there are no batches.
    pub threads_per_queue: u32,
    /// What becomes of the device when its server is gone; without it, it goes too.
    pub recovery: Option<Recovery>,
    /// Whether clients can share memory with the server: [`Device::share_memory`](crate::Device::share_memory).
    /// Linux 7.1.
    pub shared_memory: bool,
    /// Whether the kernel looks for partitions when the disk appears. Without, Linux 7.0 is needed.
    pub partition_scan: bool,
}

/// What becomes of a device whose server is gone, until [`Server::recover`](crate::Server::recover) gives it
/// another one. The disk stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recovery {
    /// Requests that the server held fail, others wait for the next server. Linux 6.1.
    Queue,
    /// All requests wait, and those that the server held are sent again: they may be carried out twice.
    /// Linux 6.1.
    Reissue,
    /// All requests fail until the next server comes. Linux 6.13.
    FailIo,
}

impl Recovery {
    /// All there are.
    pub const ALL: [Recovery; 3] = [Recovery::Queue, Recovery::Reissue, Recovery::FailIo];

    /// Its name on command lines and in lists.
    pub fn name(self) -> &'static str {
        match self {
            Recovery::Queue => "queue",
            Recovery::Reissue => "reissue",
            Recovery::FailIo => "fail-io",
        }
    }

    pub(crate) fn features(self) -> Features {
        Features::USER_RECOVERY
            | match self {
                Recovery::Queue => Features::empty(),
                Recovery::Reissue => Features::USER_RECOVERY_REISSUE,
                Recovery::FailIo => Features::USER_RECOVERY_FAIL_IO,
            }
    }

    /// What a device with these features was made for.
    pub fn of(features: Features) -> Option<Self> {
        let has = |feature| features.contains(feature);
        match () {
            () if !has(Features::USER_RECOVERY) => None,
            () if has(Features::USER_RECOVERY_REISSUE) => Some(Recovery::Reissue),
            () if has(Features::USER_RECOVERY_FAIL_IO) => Some(Recovery::FailIo),
            () => Some(Recovery::Queue),
        }
    }
}

impl Default for DeviceOptions {
    fn default() -> Self {
        DeviceOptions {
            id: None,
            queues: 1,
            depth: 128,
            data: None,
            batch: None,
            threads_per_queue: 1,
            recovery: None,
            shared_memory: false,
            partition_scan: true,
        }
    }
}

impl DeviceOptions {
    /// Checks the limits, as [`Server::add`](crate::Server::add) does.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`].
    pub fn validate(&self) -> Result<()> {
        self.checked().map(drop)
    }

    /// Checks the limits and gives queues and depth in the driver's type.
    pub(crate) fn checked(&self) -> Result<(u16, u16)> {
        let limited = |name, value: u32, limit: u16| match u16::try_from(value) {
            Ok(fits) if (1..=limit).contains(&fits) => Ok(fits),
            _ => Err(Error::invalid(name, value, format!("must be from 1 to {limit}"))),
        };
        if let Some(id) = self.id.filter(|id| *id > DeviceId::MAX) {
            return Err(Error::invalid("device id", id, format!("must be from 0 to {}", DeviceId::MAX)));
        }
        if self.shared_memory && self.recovery.is_some() {
            let rule = "cannot be combined with recovery: a new server cannot learn which memory was registered";
            return Err(Error::invalid("shared memory", true, rule));
        }
        Ok((
            limited("queues", self.queues, UBLK_MAX_NR_QUEUES)?,
            limited("queue depth", self.depth, UBLK_MAX_QUEUE_DEPTH)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_way_of_recovery_is_told_from_the_features_that_it_asks_for() {
        assert_eq!(Recovery::of(Features::CMD_IOCTL_ENCODE), None);
        for recovery in Recovery::ALL {
            assert_eq!(Recovery::of(recovery.features() | Features::CMD_IOCTL_ENCODE), Some(recovery));
        }
    }
}
