// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that the engine carries out on a file, step by step: short transfers continue, and zeroing
//! that the file cannot do natively becomes writes of zeros.

use nix::errno::Errno;

use crate::driver::{Memory, Operation};
use crate::memory::Descriptor;
use crate::request::{FileRange, Op};
use crate::uapi;
use crate::units::Sectors;

/// Length of the shared run of zeros that stands in for missing `fallocate` support.
pub(crate) const ZEROS_LEN: u32 = 64 << 10;

/// How often an interrupted operation is tried again before the interruption counts as its failure.
const MAX_RETRIES: u8 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Read,
    Write {
        durable: bool,
    },
    SyncData,
    /// Free the range; it reads as zeros on files.
    Punch {
        zeroing: bool,
    },
    /// Zero the range and keep it allocated.
    ZeroRange,
    /// Zero the range by writing.
    WriteZeros,
}

/// The progress of one forwarded request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    file: FileRange,
    step: Step,
    len: u64,
    done: u64,
    /// Interruptions in a row.
    retries: u8,
}

/// What to do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Submit [`Transfer::operation`] again.
    Continue,
    /// The request is finished.
    Finished(Result<(), Errno>),
}

impl Transfer {
    /// `None` for operations that files do not have.
    pub(crate) fn new(op: Op, descriptor: &Descriptor, file: FileRange) -> Option<Self> {
        let flag = |bit: u32| descriptor.op_flags & bit != 0;
        let step = match op {
            Op::Read => Step::Read,
            Op::Write => Step::Write { durable: flag(uapi::UBLK_IO_F_FUA) },
            Op::Flush => Step::SyncData,
            Op::Discard => Step::Punch { zeroing: false },
            Op::WriteZeroes if flag(uapi::UBLK_IO_F_NOUNMAP) => Step::ZeroRange,
            Op::WriteZeroes => Step::Punch { zeroing: true },
            Op::ZoneOpen
            | Op::ZoneClose
            | Op::ZoneFinish
            | Op::ZoneAppend
            | Op::ZoneReset
            | Op::ZoneResetAll
            | Op::ReportZones => return None,
        };
        Some(Transfer { file, step, len: Sectors(u64::from(descriptor.nr_sectors)).bytes(), done: 0, retries: 0 })
    }

    /// The result to commit on success: bytes for operations with data, 0 for the others.
    pub(crate) fn data_len(&self) -> i32 {
        match self.step {
            Step::Read | Step::Write { .. } => self.len as i32,
            Step::SyncData | Step::Punch { .. } | Step::ZeroRange | Step::WriteZeros => 0,
        }
    }

    /// The next operation. `data` is the request's memory, `zeros` [`ZEROS_LEN`] bytes of zeros.
    pub(crate) fn operation(&self, data: Memory, zeros: u64) -> Operation {
        let FileRange { fd, offset } = self.file;
        let at = offset + self.done;
        let left = self.len - self.done;
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match self.step {
            Step::Read => Operation::Read { fd, memory: data.skip(self.done), len: left as u32, offset: at },
            Step::Write { durable } => {
                Operation::Write { fd, memory: data.skip(self.done), len: left as u32, offset: at, durable }
            }
            Step::SyncData => Operation::SyncData { fd },
            Step::Punch { .. } => Operation::Allocate { fd, mode: punch, offset, len: self.len },
            Step::ZeroRange => Operation::Allocate { fd, mode: zero, offset, len: self.len },
            Step::WriteZeros => {
                let len = left.min(u64::from(ZEROS_LEN)) as u32;
                Operation::Write { fd, memory: Memory::At(zeros), len, offset: at, durable: false }
            }
        }
    }

    /// Takes the result of the last operation.
    pub(crate) fn completed(&mut self, result: i32) -> Next {
        if result < 0 {
            return self.failed(Errno::from_raw(-result));
        }
        self.retries = 0;
        match self.step {
            Step::SyncData | Step::Punch { .. } | Step::ZeroRange => Next::Finished(Ok(())),
            Step::Read | Step::Write { .. } | Step::WriteZeros => {
                self.done += u64::from(result as u32);
                if self.done >= self.len {
                    Next::Finished(Ok(()))
                } else if result == 0 {
                    // The file is shorter than the disk that it backs, or the file system is confused.
                    Next::Finished(Err(Errno::EIO))
                } else {
                    Next::Continue
                }
            }
        }
    }

    fn failed(&mut self, errno: Errno) -> Next {
        match (errno, self.step) {
            (Errno::EINTR | Errno::EAGAIN, _) if self.retries < MAX_RETRIES => {
                self.retries += 1;
                Next::Continue
            }
            (Errno::EOPNOTSUPP | Errno::EINVAL, Step::Punch { zeroing: true }) => {
                self.step = Step::ZeroRange;
                Next::Continue
            }
            (Errno::EOPNOTSUPP | Errno::EINVAL, Step::ZeroRange) => {
                self.step = Step::WriteZeros;
                Next::Continue
            }
            _ => Next::Finished(Err(errno)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: FileRange = FileRange { fd: 3, offset: 1 << 20 };

    fn transfer(op: Op, flags: u32, sectors: u32) -> Transfer {
        let descriptor = Descriptor { op_flags: flags, nr_sectors: sectors, start_sector: 0, address: 0 };
        Transfer::new(op, &descriptor, FILE).expect("files have the operation")
    }

    #[test]
    fn a_short_read_continues_where_it_stopped() {
        let mut read = transfer(Op::Read, 0, 8);
        assert_eq!(read.completed(1000), Next::Continue);
        let expected =
            Operation::Read { fd: 3, memory: Memory::At(0x1000 + 1000), len: 3096, offset: (1 << 20) + 1000 };
        assert_eq!(read.operation(Memory::At(0x1000), 0), expected);
        let registered = Memory::Registered { index: 7, offset: 1000 };
        let expected = Operation::Read { fd: 3, memory: registered, len: 3096, offset: (1 << 20) + 1000 };
        assert_eq!(read.operation(Memory::Registered { index: 7, offset: 0 }, 0), expected);
        assert_eq!(read.completed(3096), Next::Finished(Ok(())));
    }

    #[test]
    fn the_end_of_the_file_inside_a_request_is_an_error() {
        let mut read = transfer(Op::Read, 0, 8);
        assert_eq!(read.completed(512), Next::Continue);
        assert_eq!(read.completed(0), Next::Finished(Err(Errno::EIO)));
    }

    #[test]
    fn fua_makes_the_write_durable() {
        let write = transfer(Op::Write, uapi::UBLK_IO_F_FUA, 1);
        assert!(matches!(write.operation(Memory::At(0), 0), Operation::Write { durable: true, .. }));
        let write = transfer(Op::Write, 0, 1);
        assert!(matches!(write.operation(Memory::At(0), 0), Operation::Write { durable: false, .. }));
    }

    #[test]
    fn zeroing_falls_back_from_hole_to_range_to_writes() {
        let refused = -(Errno::EOPNOTSUPP as i32);
        let mut zero = transfer(Op::WriteZeroes, 0, 256);
        let mode = |t: &Transfer| match t.operation(Memory::At(0), 0) {
            Operation::Allocate { mode, .. } => mode,
            other => panic!("{other:?}"),
        };
        assert_eq!(mode(&zero), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
        assert_eq!(zero.completed(refused), Next::Continue);
        assert_eq!(mode(&zero), libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE);
        assert_eq!(zero.completed(refused), Next::Continue);
        for step in 0..2u64 {
            let at = (1 << 20) + step * u64::from(ZEROS_LEN);
            let expected =
                Operation::Write { fd: 3, memory: Memory::At(0x7000), len: ZEROS_LEN, offset: at, durable: false };
            assert_eq!(zero.operation(Memory::At(0), 0x7000), expected);
            let next = zero.completed(ZEROS_LEN as i32);
            assert_eq!(next, if step == 0 { Next::Continue } else { Next::Finished(Ok(())) });
        }
    }

    #[test]
    fn zeroing_that_must_not_unmap_never_punches() {
        let zero = transfer(Op::WriteZeroes, uapi::UBLK_IO_F_NOUNMAP, 8);
        let Operation::Allocate { mode, .. } = zero.operation(Memory::At(0), 0) else { panic!() };
        assert_eq!(mode & libc::FALLOC_FL_PUNCH_HOLE, 0);
    }

    #[test]
    fn a_refused_discard_fails_as_such() {
        let mut discard = transfer(Op::Discard, 0, 8);
        let refused = -(Errno::EOPNOTSUPP as i32);
        assert_eq!(discard.completed(refused), Next::Finished(Err(Errno::EOPNOTSUPP)));
    }
}
