// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where the bytes of a forwarded request are stored, and values to keep alive until they have been moved.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::engine::drop_guarded;
use crate::extents::Flight;

/// A file that requests are forwarded to. Each of them keeps it open.
#[derive(Clone, Debug)]
pub struct OpenFile(Handle);

#[derive(Clone, Debug)]
enum Handle {
    File(Arc<File>),
    Descriptor(Arc<OwnedFd>),
}

impl AsFd for OpenFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.0 {
            Handle::File(file) => file.as_fd(),
            Handle::Descriptor(fd) => fd.as_fd(),
        }
    }
}

impl From<Arc<File>> for OpenFile {
    fn from(file: Arc<File>) -> Self {
        OpenFile(Handle::File(file))
    }
}

impl From<&Arc<File>> for OpenFile {
    fn from(file: &Arc<File>) -> Self {
        file.clone().into()
    }
}

impl From<Arc<OwnedFd>> for OpenFile {
    fn from(fd: Arc<OwnedFd>) -> Self {
        OpenFile(Handle::Descriptor(fd))
    }
}

impl From<&Arc<OwnedFd>> for OpenFile {
    fn from(fd: &Arc<OwnedFd>) -> Self {
        fd.clone().into()
    }
}

/// The part of a file that stores a request's range; see [`Request::forward`](crate::Request::forward).
#[derive(Clone, Debug)]
pub struct FileRange {
    /// The file.
    pub file: OpenFile,
    /// Where in the file the request's first byte is stored.
    pub offset: u64,
}

impl FileRange {
    /// The part of a file from `offset` on.
    pub fn new(file: impl Into<OpenFile>, offset: u64) -> Self {
        FileRange { file: file.into(), offset }
    }
}

/// A part of a request that is stored in a file.
#[derive(Clone, Debug)]
pub struct FilePiece {
    /// Where its first byte is stored.
    pub file: FileRange,
    /// Its length in bytes.
    pub len: u64,
}

impl FilePiece {
    /// The descriptor, for the ring. It stays open as long as the piece.
    pub(crate) fn raw_fd(&self) -> RawFd {
        self.file.file.as_fd().as_raw_fd()
    }
}

/// The pieces of a request, one after the other; see [`Request::forward_pieces`](crate::Request::forward_pieces). A single
/// one needs no allocation.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// The current piece; `None` only if the pieces are refused.
    first: Option<FilePiece>,
    /// Later ones, the last one first.
    rest: Vec<FilePiece>,
}

impl Pieces {
    /// `first`, and after that `rest`, in order.
    pub(crate) fn new(first: FilePiece, mut rest: Vec<FilePiece>) -> Self {
        rest.reverse();
        Pieces { first: Some(first), rest }
    }

    /// The current piece.
    pub(crate) fn first(&self) -> &FilePiece {
        self.first.as_ref().expect("pieces without a length are refused")
    }

    /// Returns whether the next piece is in another file.
    pub(crate) fn file_changes(&self) -> bool {
        self.rest.last().is_some_and(|next| next.raw_fd() != self.first().raw_fd())
    }

    /// Advances to the next piece. Returns false if there is none.
    pub(crate) fn advance(&mut self) -> bool {
        let next = self.rest.pop();
        let more = next.is_some();
        if more {
            self.first = next;
        }
        more
    }

    /// The total length; `None` if one is empty, or with an overflow.
    pub(crate) fn len(&self) -> Option<u64> {
        let add = |sum: u64, piece: &FilePiece| sum.checked_add(piece.len).filter(|_| piece.len != 0);
        self.rest.iter().try_fold(add(0, self.first.as_ref()?)?, add)
    }

    /// Returns all pieces, in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &FilePiece> {
        self.first.iter().chain(self.rest.iter().rev())
    }
}

impl From<FilePiece> for Pieces {
    fn from(piece: FilePiece) -> Self {
        Pieces { first: Some(piece), rest: Vec::new() }
    }
}

impl From<Vec<FilePiece>> for Pieces {
    fn from(mut pieces: Vec<FilePiece>) -> Self {
        pieces.reverse();
        Pieces { first: pieces.pop(), rest: pieces }
    }
}

/// A value that is dropped when a [forwarded](crate::Request::forward_pieces) request no longer needs it: not before its
/// last piece has been read or written.
#[derive(Debug)]
pub struct KeepAlive(#[expect(dead_code, reason = "it is there to be dropped")] Kept);

#[derive(Debug)]
enum Kept {
    /// The request's place in an [`ExtentMap`](crate::extents::ExtentMap).
    Flight(#[expect(dead_code, reason = "as above")] Flight),
    /// Any other value.
    Other(#[expect(dead_code, reason = "as above")] Guarded),
}

/// A value of the user's, dropped on the thread of a queue.
struct Guarded(Option<Box<dyn Any + Send>>);

impl fmt::Debug for Guarded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Any")
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        drop_guarded(self.0.take(), || "the value kept alive for a forwarded request".to_owned());
    }
}

impl From<Flight> for KeepAlive {
    fn from(flight: Flight) -> Self {
        KeepAlive(Kept::Flight(flight))
    }
}

impl From<Box<dyn Any + Send>> for KeepAlive {
    fn from(any: Box<dyn Any + Send>) -> Self {
        KeepAlive(Kept::Other(Guarded(Some(any))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(offset: u64, len: u64) -> FilePiece {
        let file = Arc::new(File::open("/dev/null").unwrap());
        FilePiece { file: FileRange::new(file, offset), len }
    }

    fn offsets(mut pieces: Pieces) -> Vec<u64> {
        let mut seen = vec![pieces.first().file.offset];
        while pieces.advance() {
            seen.push(pieces.first().file.offset);
        }
        seen
    }

    #[test]
    fn pieces_come_in_the_order_in_which_they_were_given() {
        let all = vec![piece(1, 10), piece(2, 20), piece(3, 30)];
        let pieces = Pieces::from(all.clone());
        assert_eq!(pieces.len(), Some(60));
        assert_eq!(pieces.iter().map(|piece| piece.file.offset).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(offsets(pieces), [1, 2, 3]);
        assert_eq!(offsets(Pieces::new(all[0].clone(), all[1..].to_vec())), [1, 2, 3]);
    }

    #[test]
    fn a_piece_without_a_length_leaves_the_whole_without_one() {
        assert_eq!(Pieces::from(Vec::new()).len(), None);
        assert_eq!(Pieces::from(vec![piece(1, 10), piece(2, 0)]).len(), None);
        assert_eq!(Pieces::from(vec![piece(1, 10), piece(2, u64::MAX)]).len(), None);
    }

    #[test]
    fn pieces_keep_their_files_open_until_they_are_done() {
        let file = Arc::new(File::open("/dev/null").unwrap());
        let first = FilePiece { file: FileRange::new(&file, 0), len: 1 };
        let mut pieces = Pieces::from(vec![first, piece(1, 1)]);
        assert_eq!(Arc::strong_count(&file), 2);
        assert!(pieces.advance());
        assert_eq!(Arc::strong_count(&file), 1);
    }
}
