// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that leave the thread of their queue.
//!
//! Invariant of the `unsafe` blocks: a `Request<'static>` has its route by a mailbox. Queues hand out requests only for the
//! time of a handler's call, with a lifetime that is shorter than `'static` for every handler. So all of them were
//! [detached](Request::detach), and refer to nothing of a queue's thread.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use super::{Answer, FileRange, FileRequest, KeepAlive, Pieces, Request, RequestContext, Route};
use crate::engine::{Inbox, Return, send};
use crate::errno::Errno;
use crate::memory::IoBuffer;
use crate::units::Tag;

/// The way to the thread of a request's queue.
#[derive(Clone, Debug)]
pub(super) struct Mailbox {
    context: Arc<RequestContext>,
    inbox: Arc<Inbox>,
    /// The queue's index among those of its thread.
    queue: u32,
}

impl Mailbox {
    pub(super) fn context(&self) -> &RequestContext {
        &self.context
    }

    pub(super) fn commit(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, answer: Answer) {
        send(&self.inbox, self.queue, tag, buffer, Return::Ended(answer));
    }

    pub(super) fn forward(&self, tag: Tag, buffer: Option<Arc<IoBuffer>>, request: FileRequest) {
        send(&self.inbox, self.queue, tag, buffer, Return::Forward(Box::new(request)));
    }
}

/// A [`Request`] that can be sent to any thread and ended there at any time. Created by [`Request::detach`].
///
/// Its end goes to the thread of its queue, which commits it. [`Device::stop`](crate::Device::stop) waits until all detached
/// requests have ended.
#[must_use = "dropping a request fails it with EIO"]
pub struct DetachedRequest(Request<'static>);

// SAFETY: by the invariant above, it consists of what its route, a `Mailbox`, and its buffers are, all of which are `Send`.
unsafe impl Send for DetachedRequest {}

// SAFETY: as for `Send`; all of its parts are `Sync`.
unsafe impl Sync for DetachedRequest {}

/// What the implementations above rely on.
const _: () = {
    const fn is_send_and_sync<T: Send + Sync>() {}
    is_send_and_sync::<Mailbox>();
    is_send_and_sync::<Option<Arc<IoBuffer>>>();
    is_send_and_sync::<Option<crate::data::shared::SharedRange>>();
};

impl Request<'_> {
    /// Makes the request independent of its queue's thread.
    pub fn detach(mut self) -> DetachedRequest {
        self.spent = true;
        let mailbox = match &self.route {
            Route::Queue(core) => {
                let (context, inbox, queue) = core.address();
                Mailbox { context, inbox, queue }
            }
            Route::Mailbox(mailbox) => mailbox.clone(),
        };
        DetachedRequest(Request {
            route: Route::Mailbox(mailbox),
            tag: self.tag,
            op: self.op,
            descriptor: self.descriptor,
            buffer: self.buffer.take(),
            shared: self.shared.take(),
            spent: false,
        })
    }
}

impl DetachedRequest {
    // The methods with `&mut self` are repeated so that their arguments may use the request.

    /// See [`Request::load`].
    pub fn load(&mut self) -> Result<(), Errno> {
        self.0.load()
    }

    /// See [`Request::data_mut`].
    pub fn data_mut(&mut self) -> &mut [u8] {
        self.0.data_mut()
    }

    /// See [`Request::clear`].
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// See [`Request::write_data`].
    pub fn write_data(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.0.write_data(at, from)
    }

    /// See [`Request::write_integrity`].
    pub fn write_integrity(&mut self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.0.write_integrity(at, from)
    }

    /// See [`Request::replace_buffer`].
    pub fn replace_buffer(&mut self) {
        self.0.replace_buffer();
    }

    /// See [`Request::forward`].
    pub fn forward(self, file: FileRange) {
        self.0.forward(file);
    }

    /// See [`Request::forward_pieces`].
    pub fn forward_pieces(self, pieces: impl Into<Pieces>, keep_alive: impl Into<KeepAlive>) {
        self.0.forward_pieces(pieces, keep_alive);
    }

    /// See [`Request::complete`].
    pub fn complete(self) {
        self.0.complete();
    }

    /// See [`Request::complete_append`].
    pub fn complete_append(self, offset: u64) {
        self.0.complete_append(offset);
    }

    /// See [`Request::fail`].
    pub fn fail(self, errno: impl Into<Errno>) {
        self.0.fail(errno);
    }

    /// See [`Request::finish`].
    pub fn finish(self, result: Result<(), impl Into<Errno>>) {
        self.0.finish(result);
    }
}

impl Deref for DetachedRequest {
    type Target = Request<'static>;

    fn deref(&self) -> &Request<'static> {
        &self.0
    }
}

impl DerefMut for DetachedRequest {
    fn deref_mut(&mut self) -> &mut Request<'static> {
        &mut self.0
    }
}

/// Ties the request to the calling thread; it still ends by way of its queue's thread.
impl From<DetachedRequest> for Request<'static> {
    fn from(request: DetachedRequest) -> Self {
        request.0
    }
}

impl fmt::Debug for DetachedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for DetachedRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}
