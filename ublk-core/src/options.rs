// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a device is created.

use std::str::FromStr;

use crate::data::DataMovement;
use crate::error::{Error, Parameter, Result};
use crate::uapi::{Features, UBLK_MAX_NR_QUEUES, UBLK_MAX_QUEUE_DEPTH};
use crate::units::DeviceId;

/// Options for the creation of a device.
///
/// ```
/// use ublk_core::{DeviceOptions, Recovery};
///
/// let options = DeviceOptions::new().queues(4).recovery(Recovery::Reissue);
/// ```
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct DeviceOptions {
    /// The id, or `None` for the lowest free one.
    pub id: Option<DeviceId>,
    /// Hardware queues, 1 to 4096. The driver creates at most as many as there are CPUs.
    pub queues: u32,
    /// Requests per queue, 1 to 4096.
    pub depth: u32,
    /// How data moves; by default what suits the target best among what the driver offers.
    pub data: Option<DataMovement>,
    /// Whether tags go to and from the driver in batches (`BATCH_IO`, 7.0). By default they do if the driver has it, unless
    /// the device is recoverable or its depth is 1: Linux's driver (7.3) fails the requests of a batch device whose server
    /// was asked to leave, instead of holding them, and refuses a depth of 1 (`EINVAL`). The driver of this project does
    /// neither.
    pub batch: Option<bool>,
    /// Threads that share each queue (`PER_IO_DAEMON`, 6.16), from 1 to the queue depth. They get the queue's tags in turn, so
    /// that they also share a load that does not fill the queue. With more than one there are no batches.
    pub threads_per_queue: u32,
    /// What happens to the device when its server exits; without it, the device is removed.
    pub recovery: Option<Recovery>,
    /// Whether clients can share memory with the server: [`Device::share_memory`](crate::Device::share_memory). Since
    /// Linux 7.1.
    pub shared_memory: bool,
    /// Whether the kernel looks for partitions when the disk appears. Disabling that needs Linux 7.0.
    pub partition_scan: bool,
}

/// What happens to a device whose server has exited, until [`Server::recover`](crate::Server::recover) gives it another one.
/// The disk stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Recovery {
    /// Requests that the server held fail, others wait for the next server. Since Linux 6.1.
    Queue,
    /// All requests wait, and those that the server held are sent again: they may be carried out twice. Since Linux 6.1.
    Reissue,
    /// All requests fail until there is another server. Since Linux 6.13.
    FailIo,
}

impl Recovery {
    /// All modes.
    pub const ALL: [Recovery; 3] = [Recovery::Queue, Recovery::Reissue, Recovery::FailIo];

    /// Returns its name on command lines and in lists.
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

    /// Returns how a device with these features can be recovered; `None` if it cannot.
    pub fn from_features(features: Features) -> Option<Self> {
        let has = |feature| features.contains(feature);
        match () {
            () if !has(Features::USER_RECOVERY) => None,
            () if has(Features::USER_RECOVERY_REISSUE) => Some(Recovery::Reissue),
            () if has(Features::USER_RECOVERY_FAIL_IO) => Some(Recovery::FailIo),
            () => Some(Recovery::Queue),
        }
    }
}

/// Parses a [name](Recovery::name).
impl FromStr for Recovery {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let names = || Self::ALL.map(Self::name).join(", ");
        let found = Self::ALL.into_iter().find(|recovery| recovery.name() == name);
        found.ok_or_else(|| Error::invalid(Parameter::Recovery, name, format!("must be one of {}", names())))
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
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the [id](field@Self::id).
    pub fn id(self, id: DeviceId) -> Self {
        DeviceOptions { id: Some(id), ..self }
    }

    /// Sets the number of [hardware queues](field@Self::queues).
    pub fn queues(self, queues: u32) -> Self {
        DeviceOptions { queues, ..self }
    }

    /// Sets the [number of requests per queue](field@Self::depth).
    pub fn depth(self, depth: u32) -> Self {
        DeviceOptions { depth, ..self }
    }

    /// Sets the [data movement](field@Self::data).
    pub fn data(self, data: DataMovement) -> Self {
        DeviceOptions { data: Some(data), ..self }
    }

    /// Enables or disables [batches](field@Self::batch).
    pub fn batch(self, batch: bool) -> Self {
        DeviceOptions { batch: Some(batch), ..self }
    }

    /// Sets the number of [threads per queue](field@Self::threads_per_queue).
    pub fn threads_per_queue(self, threads: u32) -> Self {
        DeviceOptions { threads_per_queue: threads, ..self }
    }

    /// Makes the device [recoverable](field@Self::recovery).
    pub fn recovery(self, recovery: Recovery) -> Self {
        DeviceOptions { recovery: Some(recovery), ..self }
    }

    /// Enables or disables [shared memory](field@Self::shared_memory).
    pub fn shared_memory(self, shared: bool) -> Self {
        DeviceOptions { shared_memory: shared, ..self }
    }

    /// Enables or disables the [partition scan](field@Self::partition_scan).
    pub fn partition_scan(self, scan: bool) -> Self {
        DeviceOptions { partition_scan: scan, ..self }
    }

    /// Checks the limits, as [`Server::add`](crate::Server::add) does.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`].
    pub fn validate(&self) -> Result<()> {
        self.checked().map(drop)
    }

    /// Checks the limits, and returns queues and depth in the driver's type.
    pub(crate) fn checked(&self) -> Result<(u16, u16)> {
        let limited = |parameter, value: u32, limit: u16| match u16::try_from(value) {
            Ok(fits) if (1..=limit).contains(&fits) => Ok(fits),
            _ => Err(Error::invalid(parameter, value, format!("must be from 1 to {limit}"))),
        };
        if let Some(id) = self.id.filter(|id| *id > DeviceId::MAX) {
            return Err(Error::invalid(Parameter::DeviceId, id, format!("must be from 0 to {}", DeviceId::MAX)));
        }
        if self.shared_memory && self.recovery.is_some() {
            let rule = "cannot be combined with recovery: a new server cannot learn which memory was registered";
            return Err(Error::conflict(Parameter::SharedMemory, true, rule));
        }
        Ok((
            limited(Parameter::Queues, self.queues, UBLK_MAX_NR_QUEUES)?,
            limited(Parameter::Depth, self.depth, UBLK_MAX_QUEUE_DEPTH)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recoveries_are_recognised_by_features_and_by_name() {
        assert_eq!(Recovery::from_features(Features::CMD_IOCTL_ENCODE), None);
        for recovery in Recovery::ALL {
            assert_eq!(Recovery::from_features(recovery.features() | Features::CMD_IOCTL_ENCODE), Some(recovery));
            assert_eq!(recovery.name().parse::<Recovery>().unwrap(), recovery);
        }
    }
}
