// SPDX-License-Identifier: MIT OR Apache-2.0

//! Newtypes for the numbers that must not be mixed up: tags, queues, devices, sectors.

use std::fmt;

/// Number of a ublk device: the `N` of `/dev/ublkbN` and `/dev/ublkcN`, below 2^20.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceId(pub u32);

impl DeviceId {
    /// The driver keeps 2^20 minors, so the highest id is one below.
    pub const MAX: DeviceId = DeviceId((1 << 20) - 1);
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Index of a hardware queue of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct QueueId(pub u16);

impl fmt::Display for QueueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Slot of a request in its queue, below the queue depth. The driver reuses a tag as soon as its
/// request was committed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub u16);

impl Tag {
    pub(crate) fn index(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A position or length in units of 512 bytes, the block layer's unit whatever the device's logical
/// block size is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Sectors(pub u64);

impl Sectors {
    /// Bytes in a sector.
    pub const SIZE: u64 = 512;

    /// The same length in bytes; what 64 bits cannot hold becomes their maximum.
    pub fn bytes(self) -> u64 {
        self.0.saturating_mul(Self::SIZE)
    }

    /// Whole sectors in `bytes`; a remainder is dropped.
    pub fn from_bytes(bytes: u64) -> Self {
        Sectors(bytes / Self::SIZE)
    }
}
