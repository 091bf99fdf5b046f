// SPDX-License-Identifier: MIT OR Apache-2.0

//! Block devices in user space, on Linux's ublk.
//!
//! A [`BlockDevice`] is a disk of plain methods; a [`Target`] describes its disk and creates a [`QueueHandler`] per queue; a
//! [`Server`] creates the device and serves it on a few threads, each with one io_uring.
//!
//! ```no_run
//! use std::sync::Arc;
//! use ublk_core::targets::Mem;
//! use ublk_core::{DeviceOptions, Server};
//!
//! # fn main() -> ublk_core::Result<()> {
//! let server = Server::new()?;
//! let device = server.start(Arc::new(Mem::new(1 << 30, 512)?), &DeviceOptions::default())?;
//! println!("{}", device.path().display());
//! device.wait(None);
//! device.stop()
//! # }
//! ```
//!
//! The [guide] continues from here, with examples.
//!
//! The command ([`cli`]) uses the built-in [`targets`]. They implement [`Target`] and are served by a [`Server`], which uses
//! the engine. With the feature `fake`, [`fake`] has a stand-in for the kernel's driver, for tests in milliseconds and without
//! privileges.

mod block_device;
#[cfg(feature = "cli")]
pub mod cli;
pub mod control;
mod data;
mod device;
mod driver;
mod engine;
mod errno;
mod error;
pub mod extents;
mod file_system;
mod fork;
#[cfg(any(feature = "fake", all(doc, not(doctest))))]
#[doc = include_str!("guide.md")]
pub mod guide {}
mod identity;
mod memory;
mod options;
#[cfg(doctest)]
mod pages;
mod params;
pub mod placement;
mod plan;
pub mod pressure;
mod process;
pub mod pull;
mod request;
#[cfg(test)]
mod seccomp;
mod stats;
mod target;
pub mod targets;
#[cfg(test)]
mod test_support;
mod uapi;
mod units;

pub use block_device::BlockDevice;
pub use data::shared::SharedMemory;
pub use data::{Access, DataMovement};
pub use device::{Device, Ending, MAX_COALESCING, Server};
#[cfg(feature = "fake")]
pub use driver::fake;
pub use engine::{Spawn, StdSpawn};
pub use errno::Errno;
pub use error::{Error, Parameter, Result};
pub use fork::PerProcess;
pub use identity::BackingIdentity;
pub use memory::IoBuffer;
pub use options::{DeviceOptions, Recovery};
pub use params::{
    Checksum, DEFAULT_MAX_IO_BYTES, DiscardLimits, Integrity, MAX_IO_BYTES, Operations, Params, SegmentLimits,
    ZonedLimits,
};
pub use pull::pull;
pub use request::{
    DetachedRequest, FilePiece, FileRange, KeepAlive, Op, OpenFile, Pieces, Remaining, Request, Requests, fdatasync,
};
pub use stats::{DeviceStats, Latency, OpStats, StatsHandle};
pub use target::{QueueHandler, QueueInfo, Target};
pub use uapi::{DeviceState, Features};
pub use units::{DeviceId, QueueId, Sectors, Tag};
