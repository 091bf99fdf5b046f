// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that the engine carries out on files.

use super::{Durability, FilePiece, FileRange, FileRequest, KeepAlive, Op, Pieces, Request, is_uncached};
use crate::errno::Errno;

impl Request<'_> {
    /// Lets the engine carry out the request on a file, on the queue's own ring. Reads and writes move data between the request
    /// and the file, a flush becomes `fdatasync`, a discard punches a hole, and write-zeroes zeroes the range. Changes with
    /// [FUA](Request::force_unit_access) are durable when they end. Short transfers are continued; the end of the file
    /// inside the range is an `EIO`. Operations on zones fail with `EOPNOTSUPP`.
    ///
    /// With a [data movement](crate::DataMovement) without copies, the file reads and writes the request's own pages, unless
    /// the request was [loaded](Request::load) before.
    ///
    /// Once a sync of any file has failed, every flush of the device fails with `EIO` until it has a new server, forwarded or
    /// not: writes may be lost, and the kernel does not report that again. The exception is a block device that is open for
    /// direct I/O, where the next flush covers the same writes.
    ///
    /// Nothing else may sync the file by the same open file description: neither another device nor the program, by this
    /// [`File`](std::fs::File) or a duplicate of it. The kernel reports lost writes once to each description: the sync that
    /// takes the error fails, and this device's flushes succeed without the writes. Devices that share a file open it once
    /// each.
    pub fn forward(mut self, file: FileRange) {
        let pieces = Pieces::from(FilePiece { file, len: self.len() });
        let durability = self.durability(&pieces);
        self.send(pieces, None, durability);
    }

    /// Returns how the request becomes durable in files that the caller has opened.
    fn durability(&self, pieces: &Pieces) -> Durability {
        let syncs = self.op == Op::Flush || self.force_unit_access() && self.op.changes();
        if !syncs || pieces.iter().all(|piece| is_uncached(&piece.file.file)) {
            return Durability::default();
        }
        Durability { at_once: false, sync: Some(self.route.context().sync.clone()) }
    }

    /// Like [`forward`](Request::forward), with a choice how the request becomes durable.
    pub(crate) fn forward_durably(mut self, file: FileRange, durability: &Durability) {
        let piece = FilePiece { file, len: self.len() };
        let syncs = self.op == Op::Flush || self.op.changes() && (durability.at_once || self.force_unit_access());
        // Other requests need no reference to the state that queues share.
        self.send(piece.into(), None, if syncs { durability.clone() } else { Durability::default() });
    }

    /// Like [`forward`](Request::forward), for a read or write whose bytes are stored in several pieces, one after the other.
    /// `keep_alive` is dropped when the last of them has been read or written.
    ///
    /// Nothing but this device may sync the files by the same open file descriptions, as with
    /// [`forward`](Request::forward).
    ///
    /// The request fails with `EIO` unless the pieces have its length, and with `EOPNOTSUPP` if it is neither a read nor a
    /// write.
    pub fn forward_pieces(mut self, pieces: impl Into<Pieces>, keep_alive: impl Into<KeepAlive>) {
        if !matches!(self.op, Op::Read | Op::Write) {
            return self.fail(Errno::EOPNOTSUPP);
        }
        let pieces = pieces.into();
        if pieces.len() != Some(self.len()) {
            log::error!("{self:?}: cannot be forwarded to {pieces:?}");
            return self.fail(Errno::EIO);
        }
        let durability = self.durability(&pieces);
        self.send(pieces, Some(keep_alive.into()), durability);
    }

    fn send(&mut self, pieces: Pieces, keep_alive: Option<KeepAlive>, durability: Durability) {
        self.spent = true;
        let shared = self.shared.take();
        let request = FileRequest { op: self.op, descriptor: self.descriptor, pieces, keep_alive, shared, durability };
        self.route.forward(self.tag, self.buffer.take(), request);
    }
}
