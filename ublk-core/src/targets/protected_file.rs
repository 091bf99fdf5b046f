// SPDX-License-Identifier: MIT OR Apache-2.0

//! A file whose data is protected by metadata in another file. The metadata is verified with each request, so the data goes
//! through this process, on the queue's thread.
//!
//! A write changes both files, and may fail or be interrupted between them. So it first marks its blocks as blocks without
//! metadata: if it does not complete, they can be read without verification until they are written again. Other requests for
//! these blocks wait, so that a read returns data and metadata of the same write.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::files::punch_hole;
use super::protection::Metadata;
use super::range_locks::Locked;
use crate::errno::Errno;
use crate::error::errno_of;
use crate::request::{Op, Request, Requests, WriteBack};
use crate::target::QueueHandler;

/// A disk in a file with metadata in another one.
#[derive(Debug)]
pub(super) struct ProtectedFile {
    pub(super) file: Arc<File>,
    pub(super) metadata: Arc<Metadata>,
    /// Whether each change is durable when it completes, because there is no write cache.
    pub(super) at_once: bool,
    pub(super) write_back: Arc<WriteBack>,
}

fn failed(error: io::Error) -> Errno {
    errno_of(&error)
}

impl ProtectedFile {
    /// Writes data, and its metadata if it has some.
    fn write(&self, offset: u64, data: &[u8], metadata: Option<&[u8]>) -> Result<(), Errno> {
        self.metadata.blank(offset, data.len() as u64)?;
        self.file.write_all_at(data, offset).map_err(failed)?;
        match metadata {
            Some(metadata) => self.metadata.put(offset, metadata),
            None => Ok(()),
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

impl Locked for ProtectedFile {
    fn serve(&self, request: &mut Request<'_>) -> Result<(), Errno> {
        let (offset, len) = (request.offset(), request.len());
        match request.op() {
            Op::Read => {
                self.file.read_exact_at(request.data_mut(), offset).map_err(failed)?;
                self.metadata.read(request)
            }
            Op::Write => {
                let metadata = self.metadata.of_write(request)?;
                self.write(offset, request.data(), metadata.as_deref())?;
                self.sync_if_durable(request)
            }
            Op::Flush => self.sync(),
            Op::Discard => {
                self.metadata.forget(offset, len)?;
                punch_hole(&self.file, offset, len)?;
                self.sync_if_durable(request)
            }
            _ => Err(Errno::EOPNOTSUPP),
        }
    }
}

/// A queue of a [`ProtectedFile`].
#[derive(Debug)]
pub(super) struct ProtectedQueue(pub(super) Arc<ProtectedFile>);

impl QueueHandler for ProtectedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| self.0.metadata.locks().serve(&self.0, request));
    }
}

#[cfg(test)]
mod tests {
    use super::super::protection::samples;
    use super::*;
    use crate::params::Checksum;

    #[test]
    fn a_write_that_fails_leaves_its_blocks_readable() {
        let (integrity, data, tuples) = samples::good(Checksum::Crc16T10Dif, 0);
        let offset = samples::FIRST * 512;
        let backing = tempfile::NamedTempFile::new().unwrap();
        backing.as_file().set_len(1 << 20).unwrap();
        let mut disk = ProtectedFile {
            file: Arc::new(backing.reopen().unwrap()),
            metadata: Arc::new(Metadata::in_file(integrity, tempfile::tempfile().unwrap())),
            at_once: false,
            write_back: Arc::new(WriteBack::new("test")),
        };
        let read = |disk: &ProtectedFile| {
            let mut bytes = vec![0; data.len()];
            disk.file.read_exact_at(&mut bytes, offset).unwrap();
            disk.metadata.check(offset, &bytes).map(|_| bytes)
        };
        disk.write(offset, &data, Some(&tuples)).unwrap();
        assert_eq!(read(&disk).unwrap(), data);
        backing.as_file().write_all_at(&[0xff], offset + 5).unwrap();
        assert_eq!(read(&disk), Err(Errno::EILSEQ), "the metadata was written");

        backing.as_file().write_all_at(&data, offset).unwrap();
        // A read-only one, to which writes fail.
        disk.file = Arc::new(File::open(backing.path()).unwrap());
        let (_, other, tuples) = samples::good(Checksum::Crc16T10Dif, 8);
        assert_eq!(disk.write(offset, &other, Some(&tuples)), Err(Errno::EBADF));
        assert_eq!(read(&disk).unwrap(), data);
    }
}
