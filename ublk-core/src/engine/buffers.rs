// SPDX-License-Identifier: MIT OR Apache-2.0

//! The memory of a queue's requests: buffers that belong to tags, and a pool for requests without one.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use crate::data::pool::BufferPool;
use crate::memory::{IoBuffer, PAGE_SIZE};
use crate::request::memory_or_abort;
use crate::units::Tag;

/// The memory of one tag.
#[derive(Debug, Default)]
struct TagMemory {
    /// The tag's buffer; `None` while a request holds it, and where tags have none.
    buffer: Option<Arc<IoBuffer>>,
    /// The driver may be copying a write's data into the buffer, outside of this thread's calls too.
    receiving: bool,
}

/// The memory of one queue's requests.
#[derive(Debug)]
pub(super) struct Buffers {
    tags: RefCell<Vec<TagMemory>>,
    pool: RefCell<BufferPool>,
}

impl Buffers {
    /// Memory for `depth` tags, without buffers.
    pub(super) fn new(depth: u16) -> Self {
        let tags = (0..depth).map(|_| TagMemory::default()).collect();
        Buffers { tags: RefCell::new(tags), pool: RefCell::default() }
    }

    /// Memory for `depth` tags, with a buffer of `len` bytes each.
    pub(super) fn with_buffers(depth: u16, len: usize) -> io::Result<Self> {
        let buffers = IoBuffer::many(usize::from(depth), len)?.into_iter();
        let tags = buffers.map(|buffer| TagMemory { buffer: Some(Arc::new(buffer)), receiving: false }).collect();
        Ok(Buffers { tags: RefCell::new(tags), pool: RefCell::default() })
    }

    /// Takes the tag's buffer out, if it has one.
    pub(super) fn take(&self, tag: Tag) -> Option<Arc<IoBuffer>> {
        self.tags.borrow_mut()[tag.index()].buffer.take()
    }

    /// Makes a buffer the tag's own.
    pub(super) fn put(&self, tag: Tag, buffer: Arc<IoBuffer>) {
        self.tags.borrow_mut()[tag.index()].buffer = Some(buffer);
    }

    /// The address of the tag's buffer; 0 without one.
    pub(super) fn address(&self, tag: Tag) -> u64 {
        self.tags.borrow()[tag.index()].buffer.as_ref().map_or(0, |buffer| buffer.user_address())
    }

    /// The address of the tag's buffer. If it has none and `required` is set, a page is allocated.
    pub(super) fn address_or_page(&self, tag: Tag, required: bool, name: impl FnOnce() -> String) -> u64 {
        let mut tags = self.tags.borrow_mut();
        let buffer = &mut tags[tag.index()].buffer;
        if buffer.is_none() && required {
            *buffer = Some(Arc::new(memory_or_abort(PAGE_SIZE, &name())));
        }
        buffer.as_ref().map_or(0, |buffer| buffer.user_address())
    }

    /// Finds a buffer of at least `len` bytes for a write's data, makes it the tag's own and returns its address. The driver
    /// may write to it until [`received`](Self::received).
    pub(super) fn receive(&self, tag: Tag, len: usize, name: impl FnOnce() -> String) -> u64 {
        let mut tags = self.tags.borrow_mut();
        let memory = &mut tags[tag.index()];
        let fits = memory.buffer.take().filter(|buffer| buffer.len() >= len);
        let buffer = fits.unwrap_or_else(|| {
            let taken = self.pool.borrow_mut().take(len);
            taken.unwrap_or_else(|_| Arc::new(memory_or_abort(len, &name())))
        });
        let address = buffer.user_address();
        *memory = TagMemory { buffer: Some(buffer), receiving: true };
        address
    }

    /// Notes that the driver has copied a write's data.
    pub(super) fn received(&self, tag: Tag) {
        self.tags.borrow_mut()[tag.index()].receiving = false;
    }

    /// Takes memory from the pool.
    pub(super) fn take_pooled(&self, len: usize) -> io::Result<Arc<IoBuffer>> {
        self.pool.borrow_mut().take(len)
    }

    /// Puts memory into the pool.
    pub(super) fn put_pooled(&self, memory: Arc<IoBuffer>) {
        self.pool.borrow_mut().put(memory);
    }

    /// Gives the memory of idle tags back to the system. Tags keep their buffers' addresses if `keep_buffers` is set. Returns
    /// whether there is memory left to give back later.
    pub(super) fn give_back_idle(&self, keep_buffers: bool, is_armed: impl Fn(Tag) -> bool) -> bool {
        let mut left = false;
        self.pool.borrow_mut().clear();
        let mut tags = self.tags.borrow_mut();
        let mut idle = Vec::with_capacity(tags.len());
        for (tag, memory) in tags.iter_mut().enumerate() {
            if !is_armed(Tag(tag as u16)) || memory.receiving {
                // In use by a forwarded request, or by the driver for a write's data.
                left = true;
            } else if keep_buffers {
                idle.extend(memory.buffer.as_deref());
            } else {
                memory.buffer = None;
            }
        }
        IoBuffer::give_back_all(idle.into_iter());
        left
    }

    /// Leaks the buffers of all tags.
    pub(super) fn leak(&self) {
        std::mem::forget(self.tags.take());
    }
}
