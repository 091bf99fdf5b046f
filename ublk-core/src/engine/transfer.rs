// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that the engine carries out on a file, step by step: short transfers continue, and zeroing
//! that the file cannot do natively becomes writes of zeros.

use std::os::fd::RawFd;

use super::syncs::Running;
use crate::driver::{Memory, Operation};
use crate::errno::Errno;
use crate::memory::Descriptor;
use crate::request::{Durability, FileSync, KeepAlive, Op, Pieces, WriteBack};
use crate::uapi;
use crate::units::Sectors;

/// Length of the shared run of zeros that stands in for missing `fallocate` support.
pub(crate) const ZEROS_LEN: u32 = 64 << 10;

/// How often an interrupted operation is tried again before the interruption counts as its failure.
const MAX_RETRIES: u8 = 16;

/// What a transfer does at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
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
#[derive(Debug)]
pub(crate) struct Transfer {
    /// The first is at work.
    pieces: Pieces,
    /// Dropped when the last piece has been read or written.
    keep_alive: Option<KeepAlive>,
    step: Step,
    len: u64,
    /// The request carries data.
    has_data: bool,
    /// A sync follows what is done to the file, or to each of several.
    sync_after: bool,
    /// The sync at work is followed by pieces in other files.
    between_files: bool,
    /// The sync at work.
    running: Option<Running>,
    durability: Durability,
    /// Bytes of the whole that were done before the piece at work.
    before: u64,
    /// Bytes of the piece at work.
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

impl Step {
    /// How an operation begins; `None` for those that files do not have.
    pub(crate) fn first(op: Op, flags: u32) -> Option<Self> {
        let flag = |bit: u32| flags & bit != 0;
        Some(match op {
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
        })
    }
}

impl Transfer {
    /// A request's transfer from its first step on.
    pub(crate) fn new(step: Step, descriptor: &Descriptor, pieces: Pieces, keep_alive: Option<KeepAlive>) -> Self {
        let len = Sectors(u64::from(descriptor.nr_sectors)).bytes();
        let has_data = matches!(step, Step::Read | Step::Write { .. });
        let changes_ranges = matches!(step, Step::Punch { .. } | Step::ZeroRange | Step::WriteZeros);
        let sync_after = changes_ranges && descriptor.op_flags & uapi::UBLK_IO_F_FUA != 0;
        let durability = Durability::default();
        Transfer {
            pieces,
            keep_alive,
            step,
            len,
            has_data,
            sync_after,
            between_files: false,
            running: None,
            durability,
            before: 0,
            done: 0,
            retries: 0,
        }
    }

    /// Says how a transfer that has not begun becomes durable.
    pub(crate) fn durably(mut self, durability: Durability) -> Self {
        match &mut self.step {
            Step::Write { durable } => {
                *durable |= durability.at_once;
                if durability.sync.as_ref().is_some_and(|sync| sync.buffered) {
                    self.sync_after = std::mem::take(durable);
                }
            }
            Step::Punch { .. } | Step::ZeroRange | Step::WriteZeros => self.sync_after |= durability.at_once,
            Step::Read | Step::SyncData => {}
        }
        self.durability = durability;
        self
    }

    /// What has to know of the outcome of the operation at work, if that is a sync.
    pub(crate) fn syncing(&self) -> Option<&WriteBack> {
        let sync = self.durability.sync.as_ref().filter(|_| self.step == Step::SyncData)?;
        Some(&sync.write_back)
    }

    /// Notes that the operation at work begins.
    pub(crate) fn begin(&mut self) {
        let sync = self.durability.sync.as_ref().filter(|_| self.step == Step::SyncData);
        self.running = sync.map(|sync| sync.order.begin());
    }

    /// The sync that was at work, if it was one whose failure is to be remembered.
    pub(crate) fn take_running(&mut self) -> Option<Running> {
        self.running.take()
    }

    /// The result to commit on success: bytes for operations with data, 0 for the others.
    pub(crate) fn data_len(&self) -> i32 {
        if self.has_data { self.len as i32 } else { 0 }
    }

    /// Notes the result of the operation at work after the queue was given up. The kernel does not report the error of
    /// a sync again, not even to the flush that the next server gets in place of this one.
    pub(crate) fn ended_late(self, result: i32) {
        if let (Some(write_back), Err(errno)) = (self.syncing(), Errno::check(result)) {
            write_back.fail(errno.known());
        }
    }

    /// Gives up a transfer whose ring is about to be closed, so that its end will not be known. The kernel has the file for as
    /// long as it works on it, but what was to be kept until then is kept for good.
    pub(crate) fn abandon(self) {
        if let Some(write_back) = self.syncing().filter(|_| self.running.is_some()) {
            // It may be the one that takes an error.
            write_back.fail(Errno::ECANCELED);
        }
        std::mem::forget(self.keep_alive);
    }

    /// How far the piece at work has come: the file, and the byte in it.
    pub(crate) fn position(&self) -> (RawFd, u64) {
        let piece = self.pieces.first();
        (piece.raw_fd(), piece.file.offset + self.done)
    }

    /// The next operation. `data` is the request's memory, `zeros` [`ZEROS_LEN`] bytes of zeros.
    pub(crate) fn operation(&self, data: Memory, zeros: u64) -> Operation {
        let (fd, at) = self.position();
        let (offset, left) = (at - self.done, self.pieces.first().len - self.done);
        let data = data.skip(self.before + self.done);
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let zero = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        match self.step {
            Step::Read => Operation::Read { fd, memory: data, len: left as u32, offset: at },
            Step::Write { durable } => Operation::Write { fd, memory: data, len: left as u32, offset: at, durable },
            Step::SyncData => {
                Operation::SyncData { fd: self.durability.sync.as_ref().and_then(FileSync::raw_fd).unwrap_or(fd) }
            }
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
        let count = match Errno::check(result) {
            Ok(count) => count,
            Err(errno) => return self.failed(errno),
        };
        self.retries = 0;
        match self.step {
            Step::SyncData if std::mem::take(&mut self.between_files) => {
                self.step = Step::Write { durable: false };
                self.advance()
            }
            Step::SyncData => Next::Finished(Ok(())),
            Step::Punch { .. } | Step::ZeroRange => self.changed(),
            Step::Read | Step::Write { .. } | Step::WriteZeros => {
                self.done += u64::from(count);
                if self.done >= self.pieces.first().len {
                    self.next_part()
                } else if count == 0 {
                    // The file is shorter than the disk that it backs, or the file system is confused.
                    Next::Finished(Err(Errno::EIO))
                } else {
                    Next::Continue
                }
            }
        }
    }

    /// Goes on with the sync of what is done to the file.
    fn changed(&mut self) -> Next {
        if !std::mem::take(&mut self.sync_after) {
            return Next::Finished(Ok(()));
        }
        self.step = Step::SyncData;
        Next::Continue
    }

    /// Goes on with the next piece, or first with the sync of a file that has no more of them.
    fn next_part(&mut self) -> Next {
        if self.sync_after && self.pieces.file_changes() {
            self.between_files = true;
            self.step = Step::SyncData;
            return Next::Continue;
        }
        self.advance()
    }

    fn advance(&mut self) -> Next {
        let done = self.pieces.first().len;
        if !self.pieces.advance() {
            self.keep_alive = None;
            return self.changed();
        }
        self.before += done;
        self.done = 0;
        Next::Continue
    }

    fn failed(&mut self, errno: Errno) -> Next {
        match (errno.known(), self.step) {
            // A sync is never repeated, see `fdatasync`; those of io_uring are not interrupted by signals. A durable
            // write includes one.
            (_, Step::SyncData | Step::Write { durable: true }) => Next::Finished(Err(errno)),
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
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::sync::{Arc, OnceLock};

    use super::*;
    use crate::request::{FilePiece, FileRange};

    fn file() -> &'static Arc<File> {
        static FILE: OnceLock<Arc<File>> = OnceLock::new();
        FILE.get_or_init(|| Arc::new(File::open("/dev/null").unwrap()))
    }

    fn fd() -> RawFd {
        file().as_raw_fd()
    }

    fn transfer(op: Op, flags: u32, sectors: u32) -> Transfer {
        let descriptor = Descriptor { op_flags: flags, nr_sectors: sectors, start_sector: 0, address: 0 };
        let step = Step::first(op, flags).expect("files have the operation");
        Transfer::new(
            step,
            &descriptor,
            FilePiece { file: FileRange::new(file(), 1 << 20), len: op.len(&descriptor) }.into(),
            None,
        )
    }

    #[test]
    fn pieces_follow_one_another_and_what_they_need_is_kept_until_the_last_one_is_done() {
        let descriptor = Descriptor { op_flags: 0, nr_sectors: 8, start_sector: 0, address: 0 };
        let other = Arc::new(File::open("/dev/null").unwrap());
        let piece = |file, offset, len| FilePiece { file: FileRange::new(file, offset), len };
        let kept = Arc::new(());
        let pieces = vec![piece(file(), 100, 1000), piece(&other, 200, 3096)].into();
        let (first, second) = (fd(), other.as_raw_fd());
        let keep_alive = KeepAlive::from(Box::new(kept.clone()) as Box<dyn std::any::Any + Send>);
        let mut write = Transfer::new(Step::Write { durable: false }, &descriptor, pieces, Some(keep_alive));
        let mut expect = |fd, at: u64, len, offset, done, next| {
            let memory = Memory::At(0x1000 + at);
            let expected = Operation::Write { fd, memory, len, offset, durable: false };
            assert_eq!(write.operation(Memory::At(0x1000), 0), expected);
            assert_eq!(write.completed(done), next);
        };
        expect(first, 0, 1000, 100, 600, Next::Continue);
        expect(first, 600, 400, 700, 400, Next::Continue);
        expect(second, 1000, 3096, 200, 96, Next::Continue);
        assert_eq!(Arc::strong_count(&kept), 2);
        expect(second, 1096, 3000, 296, 3000, Next::Finished(Ok(())));
        assert_eq!(Arc::strong_count(&kept), 1);
    }

    #[test]
    fn a_short_read_continues_where_it_stopped() {
        let mut read = transfer(Op::Read, 0, 8);
        assert_eq!(read.completed(1000), Next::Continue);
        let expected =
            Operation::Read { fd: fd(), memory: Memory::At(0x1000 + 1000), len: 3096, offset: (1 << 20) + 1000 };
        assert_eq!(read.operation(Memory::At(0x1000), 0), expected);
        let registered = Memory::Registered { index: 7, offset: 1000 };
        let expected = Operation::Read { fd: fd(), memory: registered, len: 3096, offset: (1 << 20) + 1000 };
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
    fn a_change_of_a_range_with_fua_is_synced() {
        for (op, flags) in [(Op::Discard, 0), (Op::WriteZeroes, 0), (Op::WriteZeroes, uapi::UBLK_IO_F_NOUNMAP)] {
            let mut change = transfer(op, flags | uapi::UBLK_IO_F_FUA, 8);
            assert_eq!(change.completed(0), Next::Continue, "{op:?}");
            assert_eq!(change.operation(Memory::At(0), 0), Operation::SyncData { fd: fd() });
            assert_eq!(change.completed(0), Next::Finished(Ok(())));
            assert_eq!(transfer(op, flags, 8).completed(0), Next::Finished(Ok(())), "{op:?}");
        }
    }

    #[test]
    fn zeros_that_are_written_are_synced_once() {
        let mut zero = transfer(Op::WriteZeroes, uapi::UBLK_IO_F_FUA | uapi::UBLK_IO_F_NOUNMAP, 256);
        assert_eq!(zero.completed(-libc::EOPNOTSUPP), Next::Continue);
        assert_eq!(zero.completed(ZEROS_LEN as i32), Next::Continue);
        assert!(matches!(zero.operation(Memory::At(0), 0), Operation::Write { .. }));
        assert_eq!(zero.completed(ZEROS_LEN as i32), Next::Continue);
        assert_eq!(zero.operation(Memory::At(0), 0), Operation::SyncData { fd: fd() });
        assert_eq!(zero.completed(0), Next::Finished(Ok(())));
    }

    #[test]
    fn without_a_write_cache_each_change_is_durable() {
        let for_syncs = Arc::new(File::open("/dev/null").unwrap());
        let at_once = |buffered| {
            let write_back = Arc::new(WriteBack::new("test"));
            let file = Some((&for_syncs).into());
            let sync = FileSync { file, buffered, write_back, order: Arc::default() };
            Durability { at_once: true, sync: Some(sync) }
        };
        let write = transfer(Op::Write, 0, 8).durably(Durability { at_once: true, sync: None });
        assert!(matches!(write.operation(Memory::At(0), 0), Operation::Write { durable: true, .. }));
        let mut direct = transfer(Op::Write, 0, 8).durably(at_once(false));
        assert!(matches!(direct.operation(Memory::At(0), 0), Operation::Write { durable: true, .. }));
        assert_eq!(direct.completed(4096), Next::Finished(Ok(())));
        for (op, done) in [(Op::Write, 4096), (Op::Discard, 0), (Op::WriteZeroes, 0)] {
            let mut change = transfer(op, 0, 8).durably(at_once(true));
            assert!(change.syncing().is_none());
            assert_eq!(change.completed(done), Next::Continue, "{op:?}");
            assert_eq!(change.operation(Memory::At(0), 0), Operation::SyncData { fd: for_syncs.as_raw_fd() });
            assert!(change.syncing().is_some());
            assert_eq!(change.completed(0), Next::Finished(Ok(())));
            assert_eq!(change.data_len(), done);
        }
    }

    #[test]
    fn each_file_of_a_durable_write_is_synced() {
        let descriptor = Descriptor { op_flags: uapi::UBLK_IO_F_FUA, nr_sectors: 8, start_sector: 0, address: 0 };
        let other = Arc::new(File::open("/dev/null").unwrap());
        let piece = |file, len| FilePiece { file: FileRange::new(file, 0), len };
        let pieces = vec![piece(file(), 512), piece(file(), 512), piece(&other, 1024), piece(file(), 2048)].into();
        let durability = Durability { at_once: false, sync: Some(FileSync::of_device("test")) };
        let mut write = Transfer::new(Step::Write { durable: true }, &descriptor, pieces, None).durably(durability);
        let mut seen = Vec::new();
        loop {
            let (fd, count) = match write.operation(Memory::At(0), 0) {
                Operation::Write { fd, len, durable: false, .. } => (fd, len as i32),
                Operation::SyncData { fd } => (fd, 0),
                other => panic!("{other:?}"),
            };
            seen.push((fd, count));
            if write.completed(count) != Next::Continue {
                break;
            }
        }
        let (one, two) = (fd(), other.as_raw_fd());
        assert_eq!(seen, [(one, 512), (one, 512), (one, 0), (two, 1024), (two, 0), (one, 2048), (one, 0)]);
    }

    #[test]
    fn zeroing_falls_back_from_hole_to_range_to_writes() {
        let refused = -Errno::EOPNOTSUPP.get();
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
                Operation::Write { fd: fd(), memory: Memory::At(0x7000), len: ZEROS_LEN, offset: at, durable: false };
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
    fn an_interrupted_hole_is_punched_again() {
        // `fallocate` brings -ERESTARTSYS as it is.
        for interrupted in [-libc::EINTR, -512] {
            let mut discard = transfer(Op::Discard, 0, 8);
            assert_eq!(discard.completed(interrupted), Next::Continue);
            assert_eq!(discard.completed(0), Next::Finished(Ok(())));
        }
        let mut discard = transfer(Op::Discard, 0, 8);
        let last = (0..=MAX_RETRIES).map(|_| discard.completed(-512)).last();
        assert!(matches!(last, Some(Next::Finished(Err(_)))), "{last:?}");
    }

    #[test]
    fn what_syncs_is_not_repeated() {
        for errno in [libc::EINTR, libc::EAGAIN, 512] {
            let failed = Next::Finished(Err(Errno::new(errno).unwrap()));
            assert_eq!(transfer(Op::Flush, 0, 0).completed(-errno), failed);
            assert_eq!(transfer(Op::Write, uapi::UBLK_IO_F_FUA, 8).completed(-errno), failed);
            let mut discard = transfer(Op::Discard, uapi::UBLK_IO_F_FUA, 8);
            assert_eq!(discard.completed(-errno), Next::Continue, "the hole is no sync");
            assert_eq!(discard.completed(0), Next::Continue);
            assert_eq!(discard.completed(-errno), failed);
        }
    }

    #[test]
    fn an_unknown_errno_fails_every_step() {
        for op in [Op::Read, Op::Write, Op::Flush, Op::Discard, Op::WriteZeroes] {
            let next = transfer(op, 0, 8).completed(-503);
            assert_eq!(next, Next::Finished(Err(Errno::new(503).unwrap())), "{op:?}");
        }
    }

    #[test]
    fn a_refused_discard_fails_as_such() {
        let mut discard = transfer(Op::Discard, 0, 8);
        let refused = -Errno::EOPNOTSUPP.get();
        assert_eq!(discard.completed(refused), Next::Finished(Err(Errno::EOPNOTSUPP)));
    }
}
