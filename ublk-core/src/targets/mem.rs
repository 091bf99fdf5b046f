// SPDX-License-Identifier: MIT OR Apache-2.0

//! `mem`: a RAM disk that takes memory only for what was written.

use std::sync::{Arc, PoisonError, RwLock};

use nix::errno::Errno;

use crate::error::{Error, Result};
use crate::params::{Operations, Params};
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// Bytes that share a lock and are given back together. Large enough for few locks, small enough that
/// queues seldom meet.
const CHUNK: usize = 256 << 10;

type Chunk = RwLock<Option<Box<[u8]>>>;

/// A RAM disk. Unwritten and discarded ranges read as zeros.
#[derive(Clone, Debug)]
pub struct Mem {
    params: Params,
    chunks: Arc<[Chunk]>,
}

impl Mem {
    /// A RAM disk of `size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] for an impossible size or block size.
    pub fn new(size: u64, logical_block_size: u32) -> Result<Self> {
        let mut params = Params::new(size, logical_block_size);
        // What was written is as durable as it ever gets: no flush.
        params.operations = Operations::WRITE | Operations::DISCARD | Operations::WRITE_ZEROES;
        Self::with_params(params)
    }

    /// A RAM disk of any shape.
    ///
    /// # Errors
    ///
    /// As [`Mem::new`].
    pub fn with_params(params: Params) -> Result<Self> {
        params.validate()?;
        let count = usize::try_from(params.size.div_ceil(CHUNK as u64))
            .ok()
            .filter(|count| count.checked_mul(size_of::<Chunk>()).is_some_and(|bytes| bytes < 1 << 32))
            .ok_or_else(|| Error::invalid("size", params.size, "too large for a RAM disk"))?;
        Ok(Mem { params, chunks: (0..count).map(|_| RwLock::new(None)).collect() })
    }

    /// Calls `each` with the chunks that a range touches: the chunk, where in it, and how much.
    fn chunks(&self, offset: u64, len: u64, mut each: impl FnMut(&Chunk, usize, usize)) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let within = (at % CHUNK as u64) as usize;
            let part = (CHUNK - within).min((end - at) as usize);
            each(&self.chunks[(at / CHUNK as u64) as usize], within, part);
            at += part as u64;
        }
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
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

    fn write(&self, offset: u64, from: &[u8]) {
        let mut left = from;
        self.chunks(offset, left.len() as u64, |chunk, at, len| {
            let (part, rest) = left.split_at(len);
            let mut bytes = chunk.write().unwrap_or_else(PoisonError::into_inner);
            let bytes = bytes.get_or_insert_with(|| vec![0; CHUNK].into_boxed_slice());
            bytes[at..at + len].copy_from_slice(part);
            left = rest;
        });
    }

    fn zero(&self, offset: u64, len: u64) {
        self.chunks(offset, len, |chunk, at, len| {
            let mut bytes = chunk.write().unwrap_or_else(PoisonError::into_inner);
            if len == CHUNK {
                *bytes = None;
            } else if let Some(bytes) = &mut *bytes {
                bytes[at..at + len].fill(0);
            }
        });
    }

    fn serve(&self, mut request: Request<'_>) {
        let (offset, len) = (request.offset(), request.len());
        match request.op() {
            Op::Read => self.read(offset, request.data_mut()),
            Op::Write => self.write(offset, request.data()),
            Op::Discard | Op::WriteZeroes => self.zero(offset, len),
            Op::Flush => {}
            _ => return request.fail(Errno::EOPNOTSUPP),
        }
        request.complete();
    }
}

impl Target for Mem {
    fn kind(&self) -> &str {
        "mem"
    }

    fn params(&self) -> Params {
        self.params
    }

    fn open_queue(&self, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(MemQueue(self.clone())))
    }
}

struct MemQueue(Mem);

impl QueueHandler for MemQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| self.0.serve(request));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_new_disk_reads_as_zeros_and_takes_no_memory() {
        let disk = Mem::new(1 << 40, 4096).unwrap();
        let mut bytes = [1; 4096];
        disk.read((1 << 40) - 4096, &mut bytes);
        assert_eq!(bytes, [0; 4096]);
        assert!(disk.chunks.iter().all(|c| c.read().unwrap().is_none()));
    }

    #[test]
    fn discarding_a_whole_chunk_gives_its_memory_back() {
        let disk = Mem::new(2 * CHUNK as u64, 512).unwrap();
        disk.write(0, &[7; 512]);
        disk.zero(0, CHUNK as u64);
        assert!(disk.chunks[0].read().unwrap().is_none());
    }

    proptest! {
        #[test]
        fn reads_see_the_last_writes_across_chunks(
            steps in prop::collection::vec((0u64..1536, 1u64..700, 0u8..=255), 1..24)
        ) {
            let size = 3 * CHUNK as u64;
            let disk = Mem::new(size, 512).unwrap();
            let mut model = vec![0u8; size as usize];
            for (block, blocks, value) in steps {
                let offset = block * 512;
                let len = (blocks * 512).min(size - offset);
                let range = offset as usize..(offset + len) as usize;
                if value == 0 {
                    disk.zero(offset, len);
                } else {
                    disk.write(offset, &vec![value; len as usize]);
                }
                model[range].fill(value);
            }
            let mut bytes = vec![0; size as usize];
            disk.read(0, &mut bytes);
            prop_assert!(bytes == model);
        }
    }
}
