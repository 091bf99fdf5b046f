// SPDX-License-Identifier: MIT OR Apache-2.0

//! The traits that targets implement.

use std::fmt::Debug;
use std::sync::Arc;

use crate::data::Access;
use crate::error::Result;
use crate::identity::BackingIdentity;
use crate::params::{Integrity, Params};
use crate::request::Requests;
use crate::units::{DeviceId, QueueId};

/// A kind of disk.
///
/// The engine opens one [`QueueHandler`] per hardware queue and calls it on the thread that serves the queue. For a disk of
/// plain methods, implement [`BlockDevice`](crate::BlockDevice) instead.
pub trait Target: Send + Sync + Debug + 'static {
    /// Returns a short name for lists and messages.
    fn kind(&self) -> &str;

    /// Returns the disk's shape. Operations that its [`operations`](Params::operations) lack are not advertised.
    fn params(&self) -> Params;

    /// Returns what the target does with the bytes of requests, which determines how they move.
    fn access(&self) -> Access {
        Access::Bytes
    }

    /// Returns the identity of what the disk is stored in, taken from the open file. The driver keeps that of the target that
    /// the device was created for, so that a [recovery](crate::Server::recover) does not serve another file that has taken
    /// the name meanwhile. By default `None`, which is not compared.
    fn backing(&self) -> Option<BackingIdentity> {
        None
    }

    /// Creates the handler of one queue, on the thread that will serve it.
    ///
    /// # Errors
    ///
    /// With any error, the device does not start.
    fn open_queue(self: Arc<Self>, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>>;
}

/// Properties of a queue, for its handler.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QueueInfo {
    /// The device.
    pub device: DeviceId,
    /// The queue.
    pub queue: QueueId,
    /// Most requests in flight.
    pub depth: u16,
    /// Longest read or write in bytes.
    pub max_io_bytes: u32,
    /// Whether the disk has zones.
    pub zoned: bool,
    /// The integrity metadata of each block.
    pub integrity: Option<Integrity>,
}

impl QueueInfo {
    pub(crate) fn new(device: DeviceId, queue: QueueId, depth: u16, max_io_bytes: u32, zoned: bool) -> Self {
        QueueInfo { device, queue, depth, max_io_bytes, zoned, integrity: None }
    }
}

/// Serves the requests of one queue.
pub trait QueueHandler {
    /// Serves the requests of one wake-up. Each is ended by one of its consuming methods; one that is dropped or left in
    /// `requests` fails with `EIO`. If this panics, the current request and those that are left fail with `EIO`, and the
    /// handler is called again for later ones.
    ///
    /// Other queues of the same thread wait while this runs.
    fn handle(&mut self, requests: Requests<'_>);
}
