// SPDX-License-Identifier: MIT OR Apache-2.0

//! Commits that are collected and sent as one command (`BATCH_IO`), without any I/O.
//!
//! The driver reads an array of elements when the command is submitted, and returns how many bytes of it were processed.
//! It stops at the first element that it refuses: after a short result the rest is sent again, and an errno is that of
//! the first element.

use crate::driver::Elements;
use crate::errno::Errno;
use crate::uapi;
use crate::units::Tag;

/// What follows an element's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tail {
    Nothing,
    /// The tag's buffer.
    Address,
    /// Where a zone append landed.
    ZoneSector,
}

impl Tail {
    fn stride(self) -> usize {
        match self {
            Tail::Nothing => 8,
            Tail::Address | Tail::ZoneSector => 16,
        }
    }

    fn flags(self) -> u16 {
        match self {
            Tail::Nothing => 0,
            Tail::Address => uapi::UBLK_BATCH_F_HAS_BUF_ADDR,
            Tail::ZoneSector => uapi::UBLK_BATCH_F_HAS_ZONE_LBA,
        }
    }
}

/// One element before it is encoded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Element {
    pub(super) tag: Tag,
    /// Index for the driver to register the next request's pages at; 0 if it does not.
    pub(super) register: u16,
    pub(super) result: i32,
    /// What the array's [`Tail`] says.
    pub(super) tail: u64,
}

/// An array that the driver may read: it is not moved until its command has completed.
#[derive(Debug, Default)]
struct Array {
    bytes: Vec<u8>,
    /// Bytes that the driver has processed.
    done: usize,
    busy: bool,
}

/// What to do after an array's command has completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum After {
    /// Nothing: all of it is done.
    Done,
    /// Send the rest.
    Resend(Elements),
}

/// The commits of one queue: those of the next array, and arrays in flight.
#[derive(Debug)]
pub(super) struct CommitBatch {
    tail: Tail,
    flags: u16,
    /// The next array.
    collected: Vec<u8>,
    arrays: Vec<Array>,
    busy: usize,
}

impl CommitBatch {
    /// `registers`: the elements say where pages are to be registered.
    pub(super) fn new(tail: Tail, registers: bool) -> Self {
        let fallback = if registers { uapi::UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK } else { 0 };
        CommitBatch { tail, flags: tail.flags() | fallback, collected: Vec::new(), arrays: Vec::new(), busy: 0 }
    }

    /// Adds a commit to the next array.
    pub(super) fn add(&mut self, element: Element) {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&element.tag.0.to_ne_bytes());
        bytes[2..4].copy_from_slice(&element.register.to_ne_bytes());
        bytes[4..8].copy_from_slice(&element.result.to_ne_bytes());
        bytes[8..].copy_from_slice(&element.tail.to_ne_bytes());
        // Two lengths that the compiler knows, instead of one that it does not.
        match self.tail {
            Tail::Nothing => self.collected.extend_from_slice(&bytes[..8]),
            Tail::Address | Tail::ZoneSector => self.collected.extend_from_slice(&bytes),
        }
    }

    /// Returns the collected commits as an array to send: its number and its elements.
    pub(super) fn take(&mut self) -> Option<(u16, Elements)> {
        if self.collected.is_empty() {
            return None;
        }
        let number = self.arrays.iter().position(|array| !array.busy).unwrap_or_else(|| {
            self.arrays.push(Array::default());
            self.arrays.len() - 1
        });
        let array = &mut self.arrays[number];
        array.bytes.clear();
        // The array's old memory is reused for the next one.
        std::mem::swap(&mut array.bytes, &mut self.collected);
        array.done = 0;
        array.busy = true;
        self.busy += 1;
        Some((number as u16, self.elements(number)))
    }

    fn elements(&self, number: usize) -> Elements {
        let array = &self.arrays[number];
        let left = &array.bytes[array.done..];
        Elements {
            address: left.as_ptr() as u64,
            count: (left.len() / self.tail.stride()) as u16,
            stride: self.tail.stride() as u8,
            flags: self.flags,
        }
    }

    /// Takes the result of an array's command. The tag is the one that was refused, if one was.
    pub(super) fn completed(&mut self, number: u16, result: i32) -> (After, Option<(Tag, Errno)>) {
        let stride = self.tail.stride();
        let array = &mut self.arrays[usize::from(number)];
        assert!(array.busy, "an array that was not sent has completed");
        let left = array.bytes.len() - array.done;
        let refused = match Errno::check(result) {
            Err(errno) => {
                let first = array.done;
                array.done += stride;
                Some((Tag(u16::from_ne_bytes([array.bytes[first], array.bytes[first + 1]])), errno))
            }
            Ok(done) => {
                // Whole elements, and no more than were sent.
                array.done += (done as usize).min(left) / stride * stride;
                None
            }
        };
        if array.done == array.bytes.len() {
            array.busy = false;
            self.busy -= 1;
            (After::Done, refused)
        } else {
            (After::Resend(self.elements(usize::from(number))), refused)
        }
    }

    /// Frees an array that was sent by another command.
    pub(super) fn forget(&mut self, number: u16) {
        let array = &mut self.arrays[usize::from(number)];
        assert!(array.busy, "an array that was not sent has completed");
        array.busy = false;
        self.busy -= 1;
    }

    /// Returns whether no commit is collected or in flight.
    pub(super) fn is_idle(&self) -> bool {
        self.collected.is_empty() && self.busy == 0
    }

    /// Leaks the arrays, which the driver may still read.
    pub(super) fn leak(&mut self) {
        std::mem::forget(std::mem::take(&mut self.arrays));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn element(tag: u16) -> Element {
        Element { tag: Tag(tag), register: 0, result: 512, tail: 0xabcd }
    }

    fn batch(tags: u16) -> (CommitBatch, u16, Elements) {
        let mut batch = CommitBatch::new(Tail::Address, false);
        (0..tags).for_each(|tag| batch.add(element(tag)));
        let (number, elements) = batch.take().unwrap();
        (batch, number, elements)
    }

    #[test]
    fn elements_are_laid_out_as_the_uapi_says() {
        let (batch, _, elements) = batch(2);
        assert_eq!((elements.count, elements.stride, elements.flags), (2, 16, uapi::UBLK_BATCH_F_HAS_BUF_ADDR));
        let bytes = &batch.arrays[0].bytes;
        assert_eq!(bytes[16..24], [1, 0, 0, 0, 0, 2, 0, 0]);
        assert_eq!(bytes[24..32], 0xabcdu64.to_ne_bytes());
    }

    #[test]
    fn without_commits_there_is_no_array() {
        assert!(CommitBatch::new(Tail::Nothing, true).take().is_none());
    }

    #[test]
    fn a_short_answer_is_followed_by_the_rest() {
        let (mut batch, number, all) = batch(5);
        let (After::Resend(rest), None) = batch.completed(number, 32) else { panic!() };
        assert_eq!((rest.address, rest.count), (all.address + 32, 3));
        assert_eq!(batch.completed(number, 48), (After::Done, None));
        assert!(batch.is_idle());
    }

    #[test]
    fn a_refused_element_is_named_and_passed_over() {
        let (mut batch, number, all) = batch(3);
        assert!(matches!(batch.completed(number, 16), (After::Resend(_), None)));
        let (After::Resend(rest), refused) = batch.completed(number, -Errno::EINVAL.get()) else { panic!() };
        assert_eq!(refused, Some((Tag(1), Errno::EINVAL)));
        assert_eq!((rest.address, rest.count), (all.address + 32, 1));
        assert_eq!(batch.completed(number, -Errno::EBUSY.get()), (After::Done, Some((Tag(2), Errno::EBUSY))));
    }

    #[test]
    fn an_array_is_not_reused_while_its_command_is_in_flight() {
        let (mut batch, first, elements) = batch(1);
        batch.add(element(9));
        let (second, others) = batch.take().unwrap();
        assert_ne!(first, second);
        assert_ne!(elements.address, others.address);
        assert_eq!(batch.completed(first, 16), (After::Done, None));
        batch.add(element(3));
        assert_eq!(batch.take().unwrap().0, first);
    }
}
