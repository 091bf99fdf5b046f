// SPDX-License-Identifier: MIT OR Apache-2.0

//! Distinguishing a device from a later one with the same number.

use std::fs;
use std::os::unix::fs::MetadataExt;

use serde::{Deserialize, Serialize};

use crate::units::DeviceId;

/// A number that a later device with the same id does not have: the inode of its directory in sysfs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(super) struct Instance(u64);

impl From<u64> for Instance {
    /// The instance with the number that [`Driver::instance`](crate::driver::Driver::instance) returns.
    fn from(number: u64) -> Self {
        Instance(number)
    }
}

impl Instance {
    /// The instance of the device that has this id now.
    pub(super) fn of(id: DeviceId) -> Option<Self> {
        fs::metadata(format!("/sys/class/ublk-char/ublkc{id}/")).ok().map(|metadata| Instance(metadata.ino()))
    }
}
