// SPDX-License-Identifier: MIT OR Apache-2.0

//! Order among the syncs of a queue.
//!
//! The kernel reports an error of write-back once to each open file description. Of several syncs on the same one, any
//! may take it, and the others succeed although their data is lost. One that has taken it was under way when the
//! others looked. So a sync that succeeds counts only when all that were under way at that moment have ended: has one
//! of them failed, so have they all.

use super::forward::Forwarded;
use crate::units::Tag;

/// The syncs of one queue.
#[derive(Debug, Default)]
pub(super) struct Syncs {
    /// Number of the next one.
    next: u64,
    /// Tag and number of those under way.
    running: Vec<(Tag, u64)>,
    succeeded: Vec<Succeeded>,
}

/// A sync that waits for those with smaller numbers.
#[derive(Debug)]
struct Succeeded {
    tag: Tag,
    before: u64,
    request: Forwarded,
}

impl Syncs {
    /// Notes that a sync begins.
    pub(super) fn begin(&mut self, tag: Tag) {
        self.running.push((tag, self.next));
        self.next += 1;
    }

    /// Notes that a sync has ended.
    pub(super) fn end(&mut self, tag: Tag) {
        self.running.retain(|(running, _)| *running != tag);
    }

    /// Takes a request whose sync has succeeded.
    pub(super) fn succeeded(&mut self, tag: Tag, request: Forwarded) {
        self.succeeded.push(Succeeded { tag, before: self.next, request });
    }

    /// Gives a request back whose sync counts, if there is one.
    pub(super) fn settled(&mut self) -> Option<(Tag, Forwarded)> {
        let oldest = self.running.iter().map(|(_, number)| *number).min().unwrap_or(u64::MAX);
        let index = self.succeeded.iter().position(|sync| sync.before <= oldest)?;
        let Succeeded { tag, request, .. } = self.succeeded.remove(index);
        Some((tag, request))
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::super::forward::Pages;
    use super::super::transfer::{Step, Transfer};
    use super::*;
    use crate::memory::Descriptor;
    use crate::request::{FilePiece, FileRange, Op};

    fn request() -> Forwarded {
        let descriptor = Descriptor { op_flags: 0, nr_sectors: 0, start_sector: 0, address: 0 };
        let piece = FilePiece { file: FileRange::new(Arc::new(File::open("/dev/null").unwrap()), 0), len: 0 };
        let transfer = Transfer::new(Step::SyncData, &descriptor, piece.into(), None);
        Forwarded { transfer, op: Op::Flush, pages: Pages::Nowhere, shared: None, copy: None }
    }

    fn settled(syncs: &mut Syncs) -> Vec<u16> {
        std::iter::from_fn(|| syncs.settled()).map(|(tag, _)| tag.0).collect()
    }

    #[test]
    fn a_sync_alone_counts_at_once() {
        let mut syncs = Syncs::default();
        syncs.begin(Tag(5));
        syncs.end(Tag(5));
        syncs.succeeded(Tag(5), request());
        assert_eq!(settled(&mut syncs), [5]);
    }

    #[test]
    fn a_sync_counts_when_those_beside_it_have_ended() {
        let mut syncs = Syncs::default();
        (0..3).for_each(|tag| syncs.begin(Tag(tag)));
        syncs.end(Tag(1));
        syncs.succeeded(Tag(1), request());
        // Tag 1 does not wait for what begins later.
        syncs.begin(Tag(3));
        assert_eq!(settled(&mut syncs), [0; 0]);
        syncs.end(Tag(0));
        assert_eq!(settled(&mut syncs), [0; 0], "tag 2 may have taken its error");
        syncs.end(Tag(2));
        syncs.succeeded(Tag(2), request());
        assert_eq!(settled(&mut syncs), [1], "tag 2 waits for tag 3");
        syncs.end(Tag(3));
        assert_eq!(settled(&mut syncs), [2]);
    }
}
