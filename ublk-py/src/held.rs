// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that a method is handling, some of which a stop can [revoke](crate::holders).

use std::sync::{Arc, Mutex, PoisonError, Weak};

use pyo3::prelude::*;
use ublk_core::{DetachedRequest, Errno};

use crate::flushes::Flush;
use crate::holders::{Holders, Revoke};

/// Holder of a request while its method runs.
pub(crate) trait Hold<R> {
    /// Calls a method. Returns the request, or `None` if it was revoked meanwhile, and what the method returns.
    fn during<T>(&self, request: R, method: impl FnOnce() -> T) -> (Option<R>, T);
}

/// Holder of requests that stay on their queue's thread, where a stop cannot revoke them.
#[derive(Debug)]
pub(crate) struct Kept;

impl<R> Hold<R> for Kept {
    fn during<T>(&self, request: R, method: impl FnOnce() -> T) -> (Option<R>, T) {
        let returned = method();
        (Some(request), returned)
    }
}

/// Holder of a request that a stop can revoke while its method runs, and of its flush.
#[derive(Debug)]
pub(crate) struct Held<R>(Mutex<Option<(R, Option<Flush>)>>);

impl<R> Default for Held<R> {
    fn default() -> Self {
        Held(Mutex::new(None))
    }
}

impl<R> Hold<R> for Held<R> {
    fn during<T>(&self, request: R, method: impl FnOnce() -> T) -> (Option<R>, T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((request, None));
        let returned = method();
        (self.take_both().map(|(request, _)| request), returned)
    }
}

impl<R> Held<R> {
    fn take_both(&self) -> Option<(R, Option<Flush>)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Held<DetachedRequest> {
    /// Creates a holder and registers it with the holders of a device.
    pub(crate) fn known(holders: &Holders) -> Arc<Self> {
        let held = Arc::new(Held::default());
        let weak: Weak<Self> = Arc::downgrade(&held);
        holders.add(weak);
        held
    }

    pub(crate) fn put_flush(&self, request: DetachedRequest, flush: Flush) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((request, Some(flush)));
    }

    /// Returns the request and its flush; `None` if they were revoked.
    pub(crate) fn take_flush(&self) -> Option<(DetachedRequest, Flush)> {
        self.take_both().and_then(|(request, flush)| Some((request, flush?)))
    }
}

impl Revoke for Held<DetachedRequest> {
    fn revoke(&self, _: Python<'_>) -> bool {
        let Some((mut request, flush)) = self.take_both() else { return false };
        if request.op().has_data() {
            // The method may be using the memory.
            request.replace_buffer();
        }
        match flush {
            // The flush ends here, for those that wait for it: its method may never return.
            Some(flush) => flush.end(request, Err(Errno::EIO)),
            None => request.fail(Errno::EIO),
        }
        true
    }
}
