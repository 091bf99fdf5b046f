// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a target implements.

use std::fmt::Debug;

use crate::data::Access;
use crate::error::Result;
use crate::params::{Integrity, Params};
use crate::request::Requests;
use crate::units::{DeviceId, QueueId};

/// Something that can be a disk.
///
/// The engine asks for one [`QueueHandler`] per hardware queue and calls it on the thread that serves
/// the queue.
pub trait Target: Send + Sync + Debug + 'static {
    /// A short name for lists and messages.
    fn kind(&self) -> &str;

    /// The disk's shape. What its [`operations`](Params::operations) lack is not advertised.
    fn params(&self) -> Params;

    /// What it does with the bytes of requests; decides how they move.
    fn access(&self) -> Access {
        Access::Bytes
    }

    /// Makes the handler of one queue, on the thread that will serve it.
    ///
    /// # Errors
    ///
    /// Any error ends the start of the device.
    fn open_queue(&self, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>>;
}

/// What a handler may want to know about its queue.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct QueueInfo {
    /// The device.
    pub device: DeviceId,
    /// The queue.
    pub queue: QueueId,
    /// How many requests can be out at a time.
    pub depth: u16,
    /// Longest read or write in bytes.
    pub max_io_bytes: u32,
    /// Whether the disk has zones.
    pub zoned: bool,
    /// The metadata that comes with each block.
    pub integrity: Option<Integrity>,
}

impl QueueInfo {
    pub(crate) fn new(device: DeviceId, queue: QueueId, depth: u16, max_io_bytes: u32, zoned: bool) -> Self {
        QueueInfo { device, queue, depth, max_io_bytes, zoned, integrity: None }
    }
}

/// Serves the requests of one queue.
pub trait QueueHandler {
    /// Takes the requests of one wake-up. Each ends by one of its consuming methods; whatever is
    /// dropped or left fails with `EIO`. A panic in here is caught: the request in hand and those
    /// left fail with `EIO`, and the handler is called again for the next ones.
    ///
    /// The thread serves other queues too: while this runs, they wait.
    fn handle(&mut self, requests: Requests<'_>);
}
