// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ways to end a request.

use super::{Answer, Op, Request};
use crate::errno::Errno;
use crate::units::Sectors;

impl Request<'_> {
    /// Completes the request in full. There is no partial success: drivers differ in how they handle it, and that of Linux 7.3
    /// takes a short write for a complete one.
    ///
    /// A zone append is ended by [`complete_append`](Request::complete_append); here it fails with `EIO`.
    pub fn complete(mut self) {
        if self.op == Op::ZoneAppend {
            log::error!("zone append {self:?} was completed without an offset; failing it with EIO");
            return self.commit(Answer::error(Errno::EIO));
        }
        let answer = self.filled();
        self.commit(answer);
    }

    /// Completes a zone append in full; its data was written at `offset` on the disk, in bytes.
    ///
    /// Any other request fails with `EIO`, as does an append whose offset is not a multiple of the sector size.
    pub fn complete_append(mut self, offset: u64) {
        if self.op != Op::ZoneAppend || !offset.is_multiple_of(Sectors::SIZE) {
            log::error!("{self:?} was completed as a zone append at {offset}, which it is not; failing it with EIO");
            return self.commit(Answer::error(Errno::EIO));
        }
        let result = self.data_len() as i32;
        self.commit(Answer { result, zone_sector: Sectors::from_bytes(offset).0 });
    }

    /// The answer to a request whose memory is filled: a read's data is copied to its pages, unless the driver does that.
    fn filled(&mut self) -> Answer {
        let copied = match &self.buffer {
            Some(buffer)
                if self.op.fills() && (self.shared.is_some() || !self.route.context().data.is_copied_by_driver()) =>
            {
                // SAFETY: memory.rs (3): this request owns the buffer.
                let bytes = unsafe { buffer.bytes(self.data_len()) };
                self.copy_in(0, bytes)
            }
            _ => Ok(()),
        };
        match copied {
            Ok(()) => Answer::new(self.data_len() as i32),
            Err(error) => {
                log::error!("{self:?}: copying its data: {error}");
                Answer::error(Errno::EIO)
            }
        }
    }

    /// Fails the request. Its client gets the errno if the block layer has a status for it, and `EIO` otherwise; see [`Errno`].
    pub fn fail(mut self, errno: impl Into<Errno>) {
        self.commit(Answer::error(errno));
    }

    /// Completes or fails the request.
    pub fn finish(self, result: Result<(), impl Into<Errno>>) {
        match result {
            Ok(()) => self.complete(),
            Err(errno) => self.fail(errno),
        }
    }

    pub(super) fn commit(&mut self, answer: Answer) {
        self.spent = true;
        let mut buffer = self.buffer.take();
        if self.shared.is_some()
            && let Some(copy) = buffer.take()
        {
            // The tag has kept its own memory.
            self.route.put_memory(copy);
        }
        self.route.commit(self.tag, buffer, answer);
    }
}
