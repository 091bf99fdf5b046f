// SPDX-License-Identifier: MIT OR Apache-2.0

//! A request that the engine carries out on a file, and where its pages are meanwhile.

use std::sync::Arc;

use super::transfer::Transfer;
use crate::data::shared::SharedPlace;
use crate::memory::IoBuffer;
use crate::request::Op;

/// Where the bytes of a forwarded request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pages {
    /// It has none.
    Nowhere,
    /// In memory of this process.
    Copied,
    /// In the request's own pages, which the driver has registered at this place of the ring's table, and takes
    /// out with the commit.
    RegisteredByDriver(u16),
    /// To be registered at this place first.
    ToRegister(u16),
    /// Registered by the engine, which takes them out before the commit.
    Registered(u16),
}

/// One forwarded request.
#[derive(Debug)]
pub(super) struct Forwarded {
    pub(super) transfer: Transfer,
    pub(super) op: Op,
    pub(super) pages: Pages,
    /// The client's shared memory, if its data is there.
    pub(super) shared: Option<SharedPlace>,
    /// A copy of that, which the file reads and writes instead.
    pub(super) copy: Option<Arc<IoBuffer>>,
    /// Its sync has succeeded, and waits for others to end before it counts.
    pub(super) is_synced: bool,
}
