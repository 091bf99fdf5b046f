// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory for requests that have no buffer of their own, kept warm between them.

use std::io;
use std::sync::Arc;

use crate::memory::{IoBuffer, PAGE_SIZE};

/// Most bytes that a pool keeps for later.
const KEPT: usize = 16 << 20;
/// Sizes are a page times a power of two; beyond the longest request there are none.
const CLASSES: usize = 14;

/// Buffers of one thread, by size.
#[derive(Debug, Default)]
pub(crate) struct BufferPool {
    free: [Vec<Arc<IoBuffer>>; CLASSES],
    kept: usize,
}

impl BufferPool {
    fn class(len: usize) -> usize {
        len.div_ceil(PAGE_SIZE).max(1).next_power_of_two().ilog2() as usize
    }

    /// Returns a buffer of at least `len` bytes, with the contents that its last user left.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn take(&mut self, len: usize) -> io::Result<Arc<IoBuffer>> {
        let class = Self::class(len);
        match self.free.get_mut(class).and_then(Vec::pop) {
            Some(buffer) => {
                self.kept -= buffer.len();
                Ok(buffer)
            }
            None => IoBuffer::new(PAGE_SIZE << class).map(Arc::new),
        }
    }

    /// Takes a buffer back. One that another holder has too is theirs from now on.
    pub(crate) fn put(&mut self, mut buffer: Arc<IoBuffer>) {
        let len = buffer.len();
        let class = Self::class(len);
        // Not by its count: all accesses of a holder happen before its drop, and so before this; and there is no weak holder,
        // which could come back.
        if Arc::get_mut(&mut buffer).is_some()
            && PAGE_SIZE << class == len
            && self.kept + len <= KEPT
            && let Some(free) = self.free.get_mut(class)
        {
            self.kept += len;
            free.push(buffer);
        }
    }

    /// Gives all that is kept back to the system.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_that_came_back_is_used_again() {
        let mut pool = BufferPool::default();
        let first = pool.take(5000).unwrap();
        assert_eq!(first.len(), 8192);
        let address = first.as_ptr();
        pool.put(first);
        assert_eq!(pool.take(8192).unwrap().as_ptr(), address);
        assert_eq!(pool.kept, 0);
    }

    #[test]
    fn a_buffer_that_is_still_held_is_not_used_again() {
        let mut pool = BufferPool::default();
        let buffer = pool.take(1).unwrap();
        let held = buffer.clone();
        pool.put(buffer);
        assert_ne!(pool.take(1).unwrap().as_ptr(), held.as_ptr());
    }

    #[test]
    fn a_buffer_that_has_a_weak_holder_is_not_used_again() {
        let mut pool = BufferPool::default();
        let buffer = pool.take(1).unwrap();
        let weak = Arc::downgrade(&buffer);
        pool.put(buffer);
        assert_eq!((pool.kept, weak.upgrade().is_none()), (0, true));
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut pool = BufferPool::default();
        let buffers: Vec<_> = (0..40).map(|_| pool.take(1 << 20).unwrap()).collect();
        buffers.into_iter().for_each(|buffer| pool.put(buffer));
        assert_eq!(pool.kept, KEPT);
        pool.clear();
        assert_eq!(pool.kept, 0);
    }
}
