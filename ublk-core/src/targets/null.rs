// SPDX-License-Identifier: MIT OR Apache-2.0

//! `null`: accepts all requests and stores nothing. Reads return what the buffer contains.

use std::sync::Arc;

use crate::error::Result;
use crate::params::{Operations, Params};
use crate::request::Requests;
use crate::target::{QueueHandler, QueueInfo, Target};

/// A disk that does nothing, for measuring the overhead of requests.
#[derive(Clone, Copy, Debug)]
pub struct Null {
    params: Params,
}

impl Null {
    /// Creates a null disk of `size` bytes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`](crate::Error::InvalidValue) if the size or the block size is invalid.
    pub fn new(size: u64, logical_block_size: u32) -> Result<Self> {
        let mut params = Params::new(size, logical_block_size);
        params.operations = Operations::all();
        Self::with_params(params)
    }

    /// Creates a null disk with any parameters.
    ///
    /// # Errors
    ///
    /// As [`Null::new`].
    pub fn with_params(params: Params) -> Result<Self> {
        params.validate()?;
        Ok(Null { params })
    }
}

impl Target for Null {
    fn kind(&self) -> &str {
        "null"
    }

    fn params(&self) -> Params {
        self.params
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(NullQueue))
    }
}

struct NullQueue;

impl QueueHandler for NullQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.serve_fast(|request| {
            request.complete();
            None
        });
    }
}
