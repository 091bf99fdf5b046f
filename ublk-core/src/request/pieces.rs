// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the bytes of a forwarded request lie, and what must stay until they have been moved.

use std::any::Any;
use std::fmt;
use std::os::fd::RawFd;

use crate::engine::drop_guarded;
use crate::extents::Flight;

/// How a file takes the place of a request's range; see [`RequestOf::forward`](crate::RequestOf::forward).
///
/// The descriptor must stay open until the queue's handler is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileRange {
    /// The file.
    pub fd: RawFd,
    /// Where in the file the request's first byte lies.
    pub offset: u64,
}

/// A part of a request that lies in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilePiece {
    /// Where its first byte lies.
    pub file: FileRange,
    /// Its length in bytes.
    pub len: u64,
}

/// Parts of a request, one after the other; see [`RequestOf::forward_pieces`](crate::RequestOf::forward_pieces).
/// One of them takes no memory of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pieces {
    first: FilePiece,
    /// The others, the last one first.
    rest: Vec<FilePiece>,
}

impl Pieces {
    /// What follows after `first`, in order.
    pub(crate) fn new(first: FilePiece, mut rest: Vec<FilePiece>) -> Self {
        rest.reverse();
        Pieces { first, rest }
    }

    /// The piece at work.
    pub(crate) fn first(&self) -> &FilePiece {
        &self.first
    }

    /// Goes on with the next piece; false if there is none.
    pub(crate) fn advance(&mut self) -> bool {
        let next = self.rest.pop();
        self.first = next.unwrap_or(self.first);
        next.is_some()
    }

    /// The length of all of them; `None` if one has none.
    pub(crate) fn len(&self) -> Option<u64> {
        let add = |sum: u64, piece: &FilePiece| sum.checked_add(piece.len).filter(|_| piece.len != 0);
        self.rest.iter().try_fold(add(0, &self.first)?, add)
    }

    /// All of them, in order.
    #[cfg(test)]
    pub(crate) fn iter(&self) -> impl Iterator<Item = &FilePiece> {
        std::iter::once(&self.first).chain(self.rest.iter().rev())
    }
}

impl From<FilePiece> for Pieces {
    fn from(piece: FilePiece) -> Self {
        Pieces { first: piece, rest: Vec::new() }
    }
}

impl From<Vec<FilePiece>> for Pieces {
    fn from(mut pieces: Vec<FilePiece>) -> Self {
        pieces.reverse();
        // No request has a length of nothing, so that this is refused.
        let first = pieces.pop().unwrap_or(FilePiece { file: FileRange { fd: -1, offset: 0 }, len: 0 });
        Pieces { first, rest: pieces }
    }
}

/// Something that must outlive a forwarded request, as the descriptors of its pieces.
#[derive(Debug)]
pub struct Keep(#[expect(dead_code, reason = "it is there to be dropped")] Kept);

#[derive(Debug)]
enum Kept {
    /// The request's place in an [`ExtentMap`](crate::extents::ExtentMap).
    Flight(#[expect(dead_code, reason = "as above")] Flight),
    /// Anything.
    Any(#[expect(dead_code, reason = "as above")] Anything),
}

/// A value of the user's, dropped on the thread of a queue.
struct Anything(Option<Box<dyn Any + Send>>);

impl fmt::Debug for Anything {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Any")
    }
}

impl Drop for Anything {
    fn drop(&mut self) {
        drop_guarded(self.0.take(), || "what was to be kept for a forwarded request".to_owned());
    }
}

impl From<Flight> for Keep {
    fn from(flight: Flight) -> Self {
        Keep(Kept::Flight(flight))
    }
}

impl From<Box<dyn Any + Send>> for Keep {
    fn from(any: Box<dyn Any + Send>) -> Self {
        Keep(Kept::Any(Anything(Some(any))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(fd: RawFd, len: u64) -> FilePiece {
        FilePiece { file: FileRange { fd, offset: 0 }, len }
    }

    #[test]
    fn pieces_come_in_the_order_in_which_they_were_given() {
        let all = vec![piece(1, 10), piece(2, 20), piece(3, 30)];
        let mut pieces = Pieces::from(all.clone());
        assert_eq!(pieces, Pieces::new(all[0], all[1..].to_vec()));
        assert_eq!(pieces.len(), Some(60));
        let mut seen = vec![*pieces.first()];
        while pieces.advance() {
            seen.push(*pieces.first());
        }
        assert_eq!(seen, all);
    }

    #[test]
    fn a_piece_without_a_length_leaves_the_whole_without_one() {
        assert_eq!(Pieces::from(Vec::new()).len(), None);
        assert_eq!(Pieces::from(vec![piece(1, 10), piece(2, 0)]).len(), None);
        assert_eq!(Pieces::from(vec![piece(1, 10), piece(2, u64::MAX)]).len(), None);
    }
}
