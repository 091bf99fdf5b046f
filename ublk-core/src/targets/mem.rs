// SPDX-License-Identifier: MIT OR Apache-2.0

//! `mem`: a RAM disk that takes memory only for what was written.

use nix::errno::Errno;

use super::sparse::Sparse;
use crate::error::{Error, Result};
use crate::params::{Operations, Params};
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// A RAM disk. Unwritten and discarded ranges read as zeros.
#[derive(Clone, Debug)]
pub struct Mem {
    params: Params,
    bytes: Sparse,
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
        let bytes =
            Sparse::new(params.size).ok_or_else(|| Error::invalid("size", params.size, "too large for a RAM disk"))?;
        Ok(Mem { params, bytes })
    }

    fn serve(&self, mut request: Request<'_>) {
        let (offset, len) = (request.offset(), request.len());
        match request.op() {
            Op::Read => self.bytes.read(offset, request.data_mut()),
            Op::Write => self.bytes.write(offset, request.data()),
            Op::Discard | Op::WriteZeroes => self.bytes.zero(offset, len),
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
