// SPDX-License-Identifier: MIT OR Apache-2.0

//! `mem`: a RAM disk that allocates memory for written ranges only, optionally with integrity metadata.

use std::sync::Arc;

use super::protection::Metadata;
use super::range_locks::Locked;
use super::sparse::Sparse;
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result};
use crate::params::{Operations, Params};
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// A RAM disk. Unwritten and discarded ranges read as zeros.
#[derive(Clone, Debug)]
pub struct Mem {
    params: Params,
    bytes: Sparse,
    metadata: Option<Arc<Metadata>>,
}

impl Mem {
    /// Creates a RAM disk of `size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] if the size or the block size is invalid.
    pub fn new(size: u64, logical_block_size: u32) -> Result<Self> {
        let mut params = Params::new(size, logical_block_size);
        // A flush would make nothing more durable.
        params.operations = Operations::WRITE | Operations::DISCARD | Operations::WRITE_ZEROES;
        Self::with_params(params)
    }

    /// Creates a RAM disk with any parameters. [Integrity metadata](Params::integrity) is stored with the data and verified
    /// with each request. A mismatch fails the request with `EILSEQ`.
    ///
    /// # Errors
    ///
    /// As [`Mem::new`].
    pub fn with_params(params: Params) -> Result<Self> {
        params.validate()?;
        let too_large = || Error::invalid(Parameter::Size, params.size, "too large for a RAM disk");
        let bytes = Sparse::new(params.size).ok_or_else(too_large)?;
        let metadata = params
            .integrity
            .map(|integrity| Metadata::in_memory(integrity, params.size).map(Arc::new).ok_or_else(too_large));
        Ok(Mem { params, bytes, metadata: metadata.transpose()? })
    }

    fn serve(self: &Arc<Self>, mut request: Request<'_>) {
        match &self.metadata {
            Some(metadata) => metadata.locks().serve(self, request),
            None => {
                let result = self.carry_out(&mut request);
                request.finish(result);
            }
        }
    }

    fn carry_out(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let (offset, len, metadata) = (request.offset(), request.len(), self.metadata.as_ref());
        match request.op() {
            Op::Read => {
                self.bytes.read(offset, request.data_mut());
                metadata.map_or(Ok(()), |metadata| metadata.read(request))
            }
            Op::Write => {
                let tuples = metadata.map(|metadata| metadata.of_write(request)).transpose()?.flatten();
                self.bytes.write(offset, request.data());
                match (metadata, tuples) {
                    (None, _) => Ok(()),
                    (Some(metadata), Some(tuples)) => metadata.put(offset, &tuples),
                    (Some(metadata), None) => metadata.forget(offset, len),
                }
            }
            Op::Discard | Op::WriteZeroes => {
                self.bytes.zero(offset, len);
                metadata.map_or(Ok(()), |metadata| metadata.forget(offset, len))
            }
            Op::Flush => Ok(()),
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    /// Returns whether a request is within the disk. A device can be resized to more than its target's size.
    fn has(&self, request: &Request<'_>) -> bool {
        request.offset().checked_add(request.len()).is_some_and(|end| end <= self.params.size)
    }
}

impl Locked for Mem {
    fn serve(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        self.carry_out(request)
    }
}

impl Target for Mem {
    fn kind(&self) -> &str {
        "mem"
    }

    fn params(&self) -> Params {
        self.params
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        if let Some(metadata) = &self.metadata {
            metadata.locks().start()?;
        }
        Ok(Box::new(MemQueue(self)))
    }
}

struct MemQueue(Arc<Mem>);

impl QueueHandler for MemQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| {
            if self.0.has(&request) {
                self.0.serve(request);
            } else {
                log::error!("{request:?} exceeds the RAM disk's {} bytes", self.0.params.size);
                request.fail(Errno::EIO);
            }
        });
    }
}
