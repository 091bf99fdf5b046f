// SPDX-License-Identifier: MIT OR Apache-2.0

//! Serving a file whose data is guarded by metadata in another one. Both are checked against each other with each
//! request, so its bytes pass through this process, on the queue's thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};

use super::protection::Metadata;
use crate::error::errno_of;
use crate::request::{Op, Request, Requests, WriteBack};
use crate::target::QueueHandler;

/// A queue of such a disk.
#[derive(Debug)]
pub(super) struct ProtectedQueue {
    pub(super) file: Arc<File>,
    pub(super) metadata: Arc<Metadata>,
    /// Without a write cache each change is durable when it ends.
    pub(super) at_once: bool,
    pub(super) write_back: Arc<WriteBack>,
}

impl ProtectedQueue {
    fn serve(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let (offset, len) = (request.offset(), request.len());
        let failed = |e: io::Error| errno_of(&e);
        match request.op() {
            Op::Read => {
                self.file.read_exact_at(request.data_mut(), offset).map_err(failed)?;
                self.metadata.read(request)
            }
            Op::Write => {
                self.metadata.write(request)?;
                self.file.write_all_at(request.data(), offset).map_err(failed)?;
                self.sync_if_durable(request)
            }
            Op::Flush => self.sync(),
            Op::Discard => {
                self.metadata.forget(offset, len)?;
                let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                fallocate(&*self.file, flags, offset as i64, len as i64)?;
                self.sync_if_durable(request)
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }

    fn sync(&self) -> Result<(), Errno> {
        self.write_back.sync(&self.file)?;
        self.metadata.sync(&self.write_back)
    }

    fn sync_if_durable(&self, request: &Request<'_>) -> Result<(), Errno> {
        if self.at_once || request.force_unit_access() { self.sync() } else { Ok(()) }
    }
}

impl QueueHandler for ProtectedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        for mut request in requests {
            let result = self.serve(&mut request);
            request.finish(result);
        }
    }
}
