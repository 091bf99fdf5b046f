// SPDX-License-Identifier: MIT OR Apache-2.0

//! The requests of one wake-up.

use std::time::Duration;

use super::Request;
use crate::engine::QueueCore;
use crate::units::Tag;

/// The requests of one wake-up, in the order in which they arrived.
///
/// Between requests, the engine reads a clock and submits finished requests if the handler is slow.
///
/// Requests that the handler leaves in here fail with `EIO`.
#[derive(Debug)]
pub struct Requests<'q> {
    core: &'q QueueCore,
    tags: std::vec::Drain<'q, Tag>,
}

impl<'q> Requests<'q> {
    pub(crate) fn new(core: &'q QueueCore, tags: &'q mut Vec<Tag>) -> Self {
        Requests { core, tags: tags.drain(..) }
    }

    /// Serves all requests with `serve`, which must take next to no time for each, and returns those that it gives back.
    ///
    /// This is for handlers that complete or forward their requests at once: no clock is read between them. If `serve` gives
    /// requests back, all others are submitted before this returns, so that the handler may wait, for example for an
    /// interpreter, before it takes the first one.
    pub fn serve_fast(mut self, serve: impl FnMut(Request<'q>) -> Option<Request<'q>>) -> Remaining<'q> {
        let core = self.core;
        let requests: Vec<_> = std::iter::from_fn(|| self.adopt_next()).filter_map(serve).collect();
        if !requests.is_empty() {
            core.submit_done();
        }
        Remaining { core, requests: requests.into_iter() }
    }

    /// Returns when the handler took the last request, as a time of `CLOCK_MONOTONIC`, without reading a clock. It is at most
    /// one tick of the kernel too early, which is a few milliseconds. Not meaningful before the first request of a wake-up.
    pub fn taken_at(&self) -> Duration {
        self.core.taken_at()
    }

    fn adopt_next(&mut self) -> Option<Request<'q>> {
        self.tags.by_ref().find_map(|tag| Request::adopt(self.core, tag))
    }
}

impl<'q> Iterator for Requests<'q> {
    type Item = Request<'q>;

    fn next(&mut self) -> Option<Request<'q>> {
        // After the last one all of them are submitted anyway.
        if !self.tags.as_slice().is_empty() {
            self.core.submit_if_slow();
        }
        self.adopt_next()
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (0, Some(self.tags.len()))
    }
}

impl Drop for Requests<'_> {
    fn drop(&mut self) {
        for tag in self.tags.by_ref() {
            drop(Request::adopt(self.core, tag));
        }
    }
}

/// Requests that were left by [`Requests::serve_fast`], in the order in which they arrived.
///
/// Requests that the handler leaves in here fail with `EIO`.
#[derive(Debug)]
pub struct Remaining<'q> {
    core: &'q QueueCore,
    requests: std::vec::IntoIter<Request<'q>>,
}

impl<'q> Iterator for Remaining<'q> {
    type Item = Request<'q>;

    fn next(&mut self) -> Option<Request<'q>> {
        let request = self.requests.next();
        if request.is_some() {
            self.core.submit_if_slow();
        }
        request
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.requests.size_hint()
    }
}

impl ExactSizeIterator for Remaining<'_> {}
