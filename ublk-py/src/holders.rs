// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that Python holds, and that a stop revokes when its time is over.
//!
//! A request that was detached from its queue's thread can be failed from any thread, while a worker's method still handles
//! it or the program keeps it. Views of its memory stay valid for Python, and the tag gets fresh memory.

use std::fmt;
use std::sync::{Mutex, PoisonError, Weak};

use pyo3::prelude::*;

/// Object that may hold a request.
pub(crate) trait Revoke: Send + Sync + fmt::Debug {
    /// Fails the request; returns false if there is none.
    fn revoke(&self, py: Python<'_>) -> bool;
}

/// Objects that may hold requests of a device.
#[derive(Debug, Default)]
pub(crate) struct Holders(Mutex<Vec<Weak<dyn Revoke>>>);

/// Minimum number of holders before dead ones are removed.
const FEW: usize = 64;

impl Holders {
    pub(crate) fn add(&self, holder: Weak<dyn Revoke>) {
        let mut holders = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if holders.len() >= FEW && holders.len() == holders.capacity() {
            holders.retain(|holder| holder.strong_count() != 0);
            // Next time when there are twice as many.
            let room = holders.len();
            holders.reserve(room.max(FEW));
        }
        holders.push(holder);
    }

    /// Fails all requests; returns how many.
    pub(crate) fn revoke(&self, py: Python<'_>) -> usize {
        let holders = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        let revoked = holders.iter().filter_map(Weak::upgrade).filter(|holder| holder.revoke(py)).count();
        // Worker threads may hold other requests later.
        let mut now = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        now.extend(holders.into_iter().filter(|holder| holder.strong_count() != 0));
        revoked
    }
}
