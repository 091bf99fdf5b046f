// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests of either kind: on the thread of their queue, or detached from it.

use std::fmt::Debug;

use ublk_core::{DetachedRequest, Request};

/// Request that methods are called for, whichever thread it is on.
pub(crate) trait AnyRequest<'q>: Into<Request<'q>> + Debug {
    fn get(&self) -> &Request<'q>;
    fn get_mut(&mut self) -> &mut Request<'q>;
}

impl<'q> AnyRequest<'q> for Request<'q> {
    fn get(&self) -> &Request<'q> {
        self
    }

    fn get_mut(&mut self) -> &mut Request<'q> {
        self
    }
}

impl AnyRequest<'static> for DetachedRequest {
    fn get(&self) -> &Request<'static> {
        self
    }

    fn get_mut(&mut self) -> &mut Request<'static> {
        self
    }
}
