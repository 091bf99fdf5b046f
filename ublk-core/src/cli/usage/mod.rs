// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a block device is used, and stopping one that is not.
//!
//! * `stop`: stops an unused device.
//! * `disk`: how a disk is used, as far as /proc and /sys show it; `mounts`: its mounts in all namespaces.
//! * `exclusive`: whether a disk is opened exclusively, found by opening it.
//! * `processes`: open files of processes.

mod disk;
mod exclusive;
mod mounts;
mod processes;
mod stop;

pub(super) use self::disk::{Usage, is_surely_unused};
pub(super) use self::processes::{has_open, has_opener, sees_all_processes};
pub(super) use self::stop::{Observer, StopOutcome, stop_unused};
