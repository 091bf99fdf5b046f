// SPDX-License-Identifier: MIT OR Apache-2.0

//! How bytes move between the block layer's pages and the server: the ways, and their memory.
//!
//! * [`pool`] — memory for requests that have no buffer of their own.
//! * [`shared`] — memory that clients share.

pub(crate) mod pool;
pub(crate) mod shared;

use std::str::FromStr;

use crate::error::{Error, Parameter, Result};
use crate::uapi::Features;

/// Way in which a device's data moves.
///
/// | movement | copied by | idle memory | handlers see bytes | Linux |
/// |---|---|---|---|---|
/// | [`Copy`](DataMovement::Copy) | the driver, on the queue's thread | none; a burst's pages until the device is idle | yes | 6.0 |
/// | [`GetData`](DataMovement::GetData) | the driver, a step later for writes | the same, for requests in flight only | yes | 6.0 |
/// | [`UserCopy`](DataMovement::UserCopy) | the handler, on any thread | requests in flight | yes, by a copy | 6.5 |
/// | [`Register`](DataMovement::Register) | none: files read and write the request's pages | none | by a copy | 6.15 |
/// | [`AutoRegister`](DataMovement::AutoRegister) | none: as above, and the driver registers the pages | none | by a copy | 6.16 |
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DataMovement {
    /// Each tag has a buffer, and the driver copies to and from it.
    Copy,
    /// As `Copy`, but a write's buffer is asked for when there is a write (`NEED_GET_DATA`). One more
    /// round through the driver for each write.
    GetData,
    /// Nothing is copied by the driver; requests are read and written through the char device
    /// (`USER_COPY`).
    UserCopy,
    /// The engine registers the request's pages with its ring before it forwards the request to a file, and
    /// takes them out again (`SUPPORT_ZERO_COPY`).
    Register,
    /// The driver registers the pages (`AUTO_BUF_REG`). Where it cannot, the engine does as in `Register`.
    AutoRegister,
}

impl DataMovement {
    /// All ways, oldest first.
    pub const ALL: [DataMovement; 5] = [
        DataMovement::Copy,
        DataMovement::GetData,
        DataMovement::UserCopy,
        DataMovement::Register,
        DataMovement::AutoRegister,
    ];

    /// Returns its name on command lines and in lists.
    pub fn name(self) -> &'static str {
        match self {
            DataMovement::Copy => "copy",
            DataMovement::GetData => "get-data",
            DataMovement::UserCopy => "user-copy",
            DataMovement::Register => "zero-copy",
            DataMovement::AutoRegister => "auto-zero-copy",
        }
    }

    /// The features that a device needs for it. Where pages are registered, they include `USER_COPY`: a handler may need a
    /// request's bytes after all.
    pub(crate) fn features(self) -> Features {
        match self {
            DataMovement::Copy => Features::empty(),
            DataMovement::GetData => Features::NEED_GET_DATA,
            DataMovement::UserCopy => Features::USER_COPY,
            DataMovement::Register => Features::SUPPORT_ZERO_COPY | Features::USER_COPY,
            DataMovement::AutoRegister => Features::AUTO_BUF_REG | Features::SUPPORT_ZERO_COPY | Features::USER_COPY,
        }
    }

    /// Returns whether the driver copies between pages and buffers.
    pub(crate) fn is_copied_by_driver(self) -> bool {
        matches!(self, DataMovement::Copy | DataMovement::GetData)
    }

    /// Returns whether files can read and write a request's pages.
    pub(crate) fn is_zero_copy(self) -> bool {
        matches!(self, DataMovement::Register | DataMovement::AutoRegister)
    }
}

/// The data movement of a device with these features.
impl From<Features> for DataMovement {
    fn from(features: Features) -> Self {
        if features.contains(Features::AUTO_BUF_REG) {
            DataMovement::AutoRegister
        } else if features.contains(Features::SUPPORT_ZERO_COPY) {
            DataMovement::Register
        } else if features.contains(Features::USER_COPY) {
            DataMovement::UserCopy
        } else if features.contains(Features::NEED_GET_DATA) {
            DataMovement::GetData
        } else {
            DataMovement::Copy
        }
    }
}

/// Parses a [name](DataMovement::name).
impl FromStr for DataMovement {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|movement| movement.name() == name);
        found.ok_or_else(|| {
            Error::invalid(
                Parameter::DataMovement,
                name,
                format!("must be one of {}", Self::ALL.map(Self::name).join(", ")),
            )
        })
    }
}

impl std::fmt::Display for DataMovement {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// What a target does with the bytes of its requests; decides how they move unless the user does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Access {
    /// The handler looks at them: [`Request::data`](crate::Request::data) is there when it is called.
    #[default]
    Bytes,
    /// The handler, or a thread that it passes requests on to, copies them by
    /// [`Request::read_data`](crate::Request::read_data) and
    /// [`Request::write_data`](crate::Request::write_data).
    Copies,
    /// The handler only [forwards](crate::Request::forward) requests to files.
    Forwards {
        /// What those files demand of memory: a power of two, 512 for direct I/O on most disks.
        memory_alignment: u32,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn movements_are_recognised_by_features_and_by_name() {
        for movement in DataMovement::ALL {
            assert_eq!(DataMovement::from(movement.features() | Features::CMD_IOCTL_ENCODE), movement);
            assert_eq!(movement.name().parse::<DataMovement>().unwrap(), movement);
        }
        assert!("zero".parse::<DataMovement>().is_err());
    }
}
