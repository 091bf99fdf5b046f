// SPDX-License-Identifier: MIT OR Apache-2.0

//! A queue's access to its ring and to the memory of its requests.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::buffers::Buffers;
use super::cookie::{Cookie, Kind};
use crate::driver::{Completion, FileSlot, Operation, RequestPlace, Ring, Submission};
use crate::request::RequestContext;
use crate::units::Tag;

/// The ring, shared by the queues of its thread.
pub(crate) type SharedRing = Rc<RefCell<Box<dyn Ring>>>;

/// What a queue moves data and commands with.
pub(super) struct QueueIo {
    pub(super) context: Arc<RequestContext>,
    /// The queue's index among those of its thread.
    pub(super) index: u32,
    depth: u16,
    ring: SharedRing,
    /// The char device in the ring's table of files.
    pub(super) file: FileSlot,
    /// Index of the first of the queue's `depth` entries in the ring's table of buffers, if it has any.
    registered: Option<u16>,
    pub(super) buffers: Buffers,
    /// The first failure of the ring.
    failure: RefCell<Option<io::Error>>,
}

impl QueueIo {
    /// Registers the queue with the ring. On failure, also returns the step that failed.
    pub(super) fn new(
        context: RequestContext,
        depth: u16,
        index: u32,
        ring: &SharedRing,
        buffers: Buffers,
    ) -> Result<Self, (String, io::Error)> {
        let registered = context
            .data
            .is_zero_copy()
            .then(|| ring.borrow_mut().reserve_buffers(depth))
            .transpose()
            .map_err(|e| ("reserving entries for registered buffers".to_owned(), e))?;
        let file = ring.borrow_mut().add_file(&context.file).map_err(|e| {
            if let Some(first) = registered {
                ring.borrow_mut().release_buffers(first, depth);
            }
            ("adding the device to the ring".to_owned(), e)
        })?;
        let (ring, failure) = (ring.clone(), RefCell::new(None));
        Ok(QueueIo { context: Arc::new(context), index, depth, ring, file, registered, buffers, failure })
    }

    /// The name of a tag in messages.
    pub(super) fn name(&self, tag: Tag) -> String {
        format!("ublkb{} queue {} tag {tag}", self.context.device, self.context.queue)
    }

    /// The data of a tag's request, to be copied through the char device.
    pub(super) fn request_place(&self, tag: Tag) -> RequestPlace {
        RequestPlace { queue: self.context.queue, tag, offset: 0, integrity: false }
    }

    /// The tag's entry in the ring's table of buffers, if the queue has entries.
    pub(super) fn registered(&self, tag: Tag) -> Option<u16> {
        self.registered.map(|first| first + tag.0)
    }

    /// Queues an operation for submission.
    pub(super) fn push(&self, kind: Kind, tag: Tag, operation: Operation) {
        self.push_with(kind, tag, operation, false);
    }

    /// Queues an operation whose completion ends a wait or, if it is [prompt](Submission::prompt), does not.
    pub(super) fn push_with(&self, kind: Kind, tag: Tag, operation: Operation, prompt: bool) {
        let user_data = Cookie { kind, queue: self.index, tag }.encode();
        // SAFETY: the addresses are those of the queue's buffers, of the clients' shared memory, of arrays of a batch and
        // of the thread's zeros. All of them are kept until neither the driver nor a file uses them, or leaked
        // (`QueueCore::leak_memory`). The descriptors are those of pieces, which a transfer keeps until it has ended.
        let pushed = unsafe { self.ring.borrow_mut().push(Submission { user_data, operation, prompt }) };
        if let Err(error) = pushed {
            self.ring_failed(error);
        }
    }

    /// Submits everything that is queued in the ring, including what other queues of the thread have queued.
    pub(super) fn submit(&self) {
        if let Err(error) = self.ring.borrow_mut().submit() {
            self.ring_failed(error);
        }
    }

    #[cold]
    fn ring_failed(&self, error: io::Error) {
        self.failure.borrow_mut().get_or_insert(error);
    }

    /// Returns the first failure of the ring; later calls return nothing.
    pub(super) fn take_failure(&self) -> Option<io::Error> {
        self.failure.borrow_mut().take()
    }

    /// Returns whether the kernel has taken everything that was queued in the ring.
    pub(super) fn is_submitted(&self) -> bool {
        self.ring.borrow_mut().is_submitted()
    }

    /// Moves the tags that a completion delivered to the end of `into`. Once for each completion.
    pub(super) fn take_tags(&self, completion: Completion, into: &mut Vec<Tag>) {
        if let Some(buffer) = completion.tags {
            let bytes = usize::try_from(completion.result).unwrap_or(0);
            // SAFETY: the buffer and its length are the completion's, which is used once.
            unsafe { self.ring.borrow_mut().take_tags(buffer, bytes, into) };
        }
    }

    /// Removes the pages of a tag's request from the ring's table of buffers.
    pub(super) fn unregister(&self, tag: Tag) {
        if let Some(index) = self.registered(tag) {
            let operation = Operation::Unregister { file: self.file, queue: self.context.queue, tag, index };
            self.push_with(Kind::Unregister, tag, operation, true);
        }
    }

    /// Removes the queue from the ring. `drained`: no entry of the table of buffers is in use.
    pub(super) fn leave_ring(&self, drained: bool) {
        let mut ring = self.ring.borrow_mut();
        if let Err(error) = ring.remove_file(self.file) {
            log::error!("ublkb{}: unregistering the char device from the ring: {error}", self.context.device);
        }
        if let Some(first) = self.registered.filter(|_| drained) {
            ring.release_buffers(first, self.depth);
        }
    }
}
