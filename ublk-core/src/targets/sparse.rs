// SPDX-License-Identifier: MIT OR Apache-2.0

//! A byte array in memory that allocates only written ranges.

use std::sync::{Arc, PoisonError, RwLock};

/// Bytes that share a lock and are freed together. Large enough for few locks, small enough that queues rarely contend.
pub(super) const CHUNK: usize = 256 << 10;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// The array. Unwritten and zeroed ranges read as zeros.
#[derive(Clone, Debug)]
pub(super) struct Sparse(Arc<[Chunk]>);

impl Sparse {
    /// Creates an array of `size` bytes. `None` if the table of chunks alone would be too large.
    pub(super) fn new(size: u64) -> Option<Self> {
        let count = usize::try_from(size.div_ceil(CHUNK as u64))
            .ok()
            .filter(|count| count.checked_mul(size_of::<Chunk>()).is_some_and(|bytes| bytes < 1 << 32))?;
        Some(Sparse((0..count).map(|_| RwLock::new(None)).collect()))
    }

    /// Calls `each` for each chunk of a range, with the chunk, and the offset and length within it.
    fn chunks(&self, offset: u64, len: u64, mut each: impl FnMut(&Chunk, usize, usize)) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let within = (at % CHUNK as u64) as usize;
            let part = (CHUNK - within).min((end - at) as usize);
            each(&self.0[(at / CHUNK as u64) as usize], within, part);
            at += part as u64;
        }
    }

    pub(super) fn read(&self, offset: u64, into: &mut [u8]) {
        let mut left = &mut into[..];
        self.chunks(offset, left.len() as u64, |chunk, at, len| {
            let (part, rest) = std::mem::take(&mut left).split_at_mut(len);
            match &*chunk.read().unwrap_or_else(PoisonError::into_inner) {
                Some(bytes) => part.copy_from_slice(&bytes[at..at + len]),
                None => part.fill(0),
            }
            left = rest;
        });
    }

    pub(super) fn write(&self, offset: u64, from: &[u8]) {
        let mut left = from;
        self.chunks(offset, left.len() as u64, |chunk, at, len| {
            let (part, rest) = left.split_at(len);
            let mut bytes = chunk.write().unwrap_or_else(PoisonError::into_inner);
            let bytes = bytes.get_or_insert_with(|| vec![0; CHUNK].into_boxed_slice());
            bytes[at..at + len].copy_from_slice(part);
            left = rest;
        });
    }

    pub(super) fn zero(&self, offset: u64, len: u64) {
        self.chunks(offset, len, |chunk, at, len| {
            let mut bytes = chunk.write().unwrap_or_else(PoisonError::into_inner);
            if len == CHUNK {
                *bytes = None;
            } else if let Some(bytes) = &mut *bytes {
                bytes[at..at + len].fill(0);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn holds(sparse: &Sparse, chunk: usize) -> bool {
        sparse.0[chunk].read().unwrap().is_some()
    }

    #[test]
    fn unwritten_ranges_read_as_zeros_and_take_no_memory() {
        let sparse = Sparse::new(1 << 40).unwrap();
        let mut bytes = [1; 4096];
        sparse.read((1 << 40) - 4096, &mut bytes);
        assert_eq!(bytes, [0; 4096]);
        assert!((0..sparse.0.len()).all(|chunk| !holds(&sparse, chunk)));
    }

    #[test]
    fn zeroing_a_whole_chunk_frees_its_memory() {
        let sparse = Sparse::new(2 * CHUNK as u64).unwrap();
        sparse.write(0, &[7; 512]);
        assert!(holds(&sparse, 0));
        sparse.zero(0, CHUNK as u64);
        assert!(!holds(&sparse, 0));
    }

    proptest! {
        #[test]
        fn reads_see_the_last_writes_across_chunks(
            steps in prop::collection::vec((0u64..1536, 1u64..700, 0u8..=255), 1..24)
        ) {
            let size = 3 * CHUNK as u64;
            let sparse = Sparse::new(size).unwrap();
            let mut model = vec![0u8; size as usize];
            for (block, blocks, value) in steps {
                let offset = block * 512;
                let len = (blocks * 512).min(size - offset);
                let range = offset as usize..(offset + len) as usize;
                if value == 0 {
                    sparse.zero(offset, len);
                } else {
                    sparse.write(offset, &vec![value; len as usize]);
                }
                model[range].fill(value);
            }
            let mut bytes = vec![0; size as usize];
            sparse.read(0, &mut bytes);
            prop_assert!(bytes == model);
        }
    }
}
