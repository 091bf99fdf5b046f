// SPDX-License-Identifier: MIT OR Apache-2.0

//! The io_uring of a thread that serves queues.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. The addresses in a [`Submission`] point into memory that its sender keeps until the completion ([`Ring::push`]):
//!    the engine frees a queue's buffers only when no command of it is in flight, and otherwise leaks
//!    them.
//! 2. A ring is used by the thread that made it, as `IORING_SETUP_SINGLE_ISSUER` demands: [`Ring`] is
//!    not `Send`.
//! 3. The memory of [`WAKE_UPS`] is never freed and never read: only kernels write to it, for all rings of the process.

use std::cell::UnsafeCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::squeue::Entry;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::resource::{Resource, getrlimit};

use super::super::{CharDevice, Completion, FileSlot, Operation, Ring, Submission, Waker};
use super::entries::{self, PLAIN};
use super::tag_buffers::TagBuffers;
use super::{fixed_files_are_released, ring_error};
use crate::errno::Errno;
use crate::error::errno_of;
use crate::units::Tag;

/// Size of a ring thread's submission queue; more entries are submitted in portions.
const SUBMISSION_ENTRIES: u32 = 256;
/// Size of its completion queue; completions that do not fit wait in the kernel and cost another system call.
const COMPLETION_ENTRIES: u32 = 4096;
/// Places for char devices in a ring's file table, unless the limit of open files is lower.
///
/// Each device has one while it is in the ring: the kernel closes the files of a ring that is released only when all
/// operations of the ring have ended. So the driver does not consider a killed server gone, and admit the next one, while
/// operations on files that the killed one submitted are in progress.
const FILE_SLOTS: u32 = 8192;
/// Places in a ring's table of buffers: the most that io_uring allows.
const BUFFER_SLOTS: u16 = 16384;

/// `user_data` of the read of wake-ups and of the timer; no other submission may use them.
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;
/// Pause before a read of wake-ups that has failed is repeated.
const WAKE_PAUSE: Duration = Duration::from_millis(2);

/// Destination of reads of the wakers' events. Their value, the number of wake-ups, is not used. The kernel may write to it
/// until a ring is released, which is some time after it was closed.
struct WakeUps(UnsafeCell<u64>);

// SAFETY: (3): there is no access by this program.
unsafe impl Sync for WakeUps {}

static WAKE_UPS: WakeUps = WakeUps(UnsafeCell::new(0));

#[derive(Debug)]
struct EventWaker(EventFd);

impl Waker for EventWaker {
    fn wake(&self) {
        if let Err(errno) = self.0.write(1) {
            log::error!("cannot wake a ring thread: {errno}");
        }
    }
}

/// An io_uring with a table of char devices and a wake-up.
pub(super) struct KernelRing {
    uring: IoUring<Entry, cqueue::Entry>,
    waker: Arc<EventWaker>,
    /// Whether the ring reads the waker's event.
    wake_armed: bool,
    /// Whether the driver accesses buffers only inside this thread's own calls.
    defers_task_work: bool,
    /// Free places in the table of files.
    free_slots: Vec<u32>,
    /// Places of the devices' files by descriptor. `None` if commands name files by their places in the table; they name
    /// descriptors where the kernel [does not release](fixed_files_are_released) files that were named by place.
    by_descriptor: Option<HashMap<RawFd, Vec<u32>>>,
    /// Runs of free places in the table of buffers, by their beginning; `None` before the table is made.
    free_buffers: Option<Vec<(u16, u16)>>,
    /// Buffers in which the driver delivers batches of tags; registered with the first batch.
    tag_buffers: Option<TagBuffers>,
    /// Entries that found no room in the submission queue.
    backlog: VecDeque<Entry>,
    /// Number of prompt submissions since completions were last taken, which a wait has to exceed.
    prompt: usize,
    /// Time of the timer, which the kernel reads when the timer is submitted.
    timer: Box<types::Timespec>,
    timer_ended: bool,
}

impl std::fmt::Debug for KernelRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelRing").field("fd", &self.uring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl KernelRing {
    pub(super) fn new() -> io::Result<Self> {
        let mut builder = IoUring::<Entry, cqueue::Entry>::builder();
        // A forked child's mappings would keep the ring, and with it the char devices, open.
        builder.dontfork().setup_cqsize(COMPLETION_ENTRIES).setup_single_issuer();
        let (uring, defers_task_work) = match builder.clone().setup_defer_taskrun().build(SUBMISSION_ENTRIES) {
            // DEFER_TASKRUN came with Linux 6.1, SINGLE_ISSUER with 6.0.
            Err(e) if errno_of(&e) == Errno::EINVAL => {
                let built = builder.setup_coop_taskrun().build(SUBMISSION_ENTRIES);
                (built.map_err(|e| describe_ring_error(&e))?, false)
            }
            other => (other.map_err(|e| describe_ring_error(&e))?, true),
        };
        let slots = make_file_table(&uring)?;
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC)?;
        Ok(KernelRing {
            uring,
            waker: Arc::new(EventWaker(event)),
            wake_armed: false,
            defers_task_work,
            free_slots: (0..slots).rev().collect(),
            by_descriptor: (!fixed_files_are_released()).then(HashMap::new),
            free_buffers: None,
            tag_buffers: None,
            backlog: VecDeque::new(),
            prompt: 0,
            timer: Box::default(),
            timer_ended: false,
        })
    }

    fn push_entry(&mut self, entry: Entry) -> io::Result<()> {
        if !self.backlog.is_empty() || !self.queue(&entry) {
            self.backlog.push_back(entry);
            self.submit()?;
        }
        Ok(())
    }

    /// Queues the read of wake-ups, unless the ring has it.
    fn arm_wake(&mut self) -> io::Result<()> {
        if !self.wake_armed {
            let fd = types::Fd(self.waker.0.as_fd().as_raw_fd());
            // Not a poll: the event would have to be read afterwards by another system call.
            let entry = opcode::Read::new(fd, WAKE_UPS.0.get().cast(), 8).build().user_data(WAKE);
            self.push_entry(entry)?;
            self.wake_armed = true;
        }
        Ok(())
    }

    /// Puts an entry into the submission queue. Returns false if that is full.
    fn queue(&mut self, entry: &Entry) -> bool {
        // SAFETY: (1): the memory that the entry refers to outlives its completion.
        unsafe { self.uring.submission().push(entry) }.is_ok()
    }

    /// Submits once and waits for `want` completions. Returns how many entries the kernel took.
    fn enter(&mut self, want: usize) -> io::Result<usize> {
        match self.uring.submit_and_wait(want) {
            // Completions have to be taken first; the ring thread does that next.
            Err(e) if matches!(errno_of(&e), Errno::EBUSY | Errno::EAGAIN | Errno::EINTR) => Ok(0),
            other => other,
        }
    }
}

/// Registers the table of files. Returns the number of its places.
fn make_file_table(uring: &IoUring<Entry, cqueue::Entry>) -> io::Result<u32> {
    // The kernel makes none that is longer than the limit of open files.
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let slots = FILE_SLOTS.min(u32::try_from(limit).unwrap_or(FILE_SLOTS));
    uring.submitter().register_files_sparse(slots)?;
    Ok(slots)
}

fn describe_ring_error(source: &io::Error) -> io::Error {
    log::error!("{}", ring_error(source));
    errno_of(source).into()
}

// SAFETY: (1) to (3).
unsafe impl Ring for KernelRing {
    fn add_file(&mut self, file: &Arc<dyn CharDevice>) -> io::Result<FileSlot> {
        let slot = self.free_slots.pop().ok_or_else(|| {
            io::Error::other(
                "a ring's table of files is full (`ulimit -n` when it was made, and 8192 at most); use more threads",
            )
        })?;
        let fd = file.raw_fd();
        if let Err(e) = self.uring.submitter().register_files_update(slot, &[fd]) {
            self.free_slots.push(slot);
            return Err(e);
        }
        Ok(match &mut self.by_descriptor {
            Some(places) => {
                places.entry(fd).or_default().push(slot);
                FileSlot(fd as u32 | PLAIN)
            }
            None => FileSlot(slot),
        })
    }

    fn remove_file(&mut self, slot: FileSlot) -> io::Result<()> {
        let place = match &mut self.by_descriptor {
            Some(places) => places.get_mut(&((slot.0 & !PLAIN) as RawFd)).and_then(Vec::pop).ok_or(Errno::EBADF)?,
            None => slot.0,
        };
        self.uring.submitter().register_files_update(place, &[-1])?;
        self.free_slots.push(place);
        Ok(())
    }

    unsafe fn push(&mut self, submission: Submission) -> io::Result<()> {
        let batches = matches!(submission.operation, Operation::FetchBatch { .. });
        if batches && self.tag_buffers.is_none() {
            self.tag_buffers = Some(TagBuffers::register(&self.uring.submitter())?);
        }
        let entry = entries::entry(submission.operation);
        debug_assert!(submission.user_data < TIMER);
        self.prompt += usize::from(submission.prompt);
        self.push_entry(entry.user_data(submission.user_data))
    }

    fn submit(&mut self) -> io::Result<()> {
        if self.backlog.is_empty() && self.uring.submission().is_empty() {
            return Ok(());
        }
        loop {
            let taken = self.enter(0)?;
            while let Some(entry) = self.backlog.pop_front() {
                if !self.queue(&entry) {
                    self.backlog.push_front(entry);
                    break;
                }
            }
            if taken == 0 || self.uring.submission().is_empty() {
                return Ok(());
            }
        }
    }

    fn is_submitted(&mut self) -> bool {
        self.backlog.is_empty() && self.uring.submission().is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.arm_wake()?;
        if !self.backlog.is_empty() {
            self.submit()?;
        }
        // The kernel takes the rest once completions have been taken: do not sleep before that.
        let want = if self.backlog.is_empty() { self.prompt + 1 } else { 0 };
        self.enter(want).map(drop)
    }

    fn has_prompt(&self) -> bool {
        self.prompt != 0
    }

    fn coalesce(&mut self, window: Duration) -> io::Result<bool> {
        self.submit()?;
        let news = self.uring.completion().len() > self.prompt;
        if !news && self.backlog.is_empty() {
            std::thread::sleep(window);
        }
        Ok(news)
    }

    fn start_timer(&mut self, after: Duration) -> io::Result<()> {
        *self.timer = types::Timespec::from(after);
        let entry = opcode::Timeout::new(&raw const *self.timer).build().user_data(TIMER);
        self.push_entry(entry)
    }

    fn timer_ended(&mut self) -> bool {
        std::mem::take(&mut self.timer_ended)
    }

    fn is_quiet(&mut self) -> bool {
        // Entries that are not submitted yet name memory that the driver will access.
        self.defers_task_work
            && self.backlog.is_empty()
            && self.uring.submission().is_empty()
            && self.uring.completion().is_empty()
    }

    fn reserve_buffers(&mut self, count: u16) -> io::Result<u16> {
        if self.free_buffers.is_none() {
            self.uring.submitter().register_buffers_sparse(BUFFER_SLOTS.into())?;
        }
        let free = self.free_buffers.get_or_insert_with(|| vec![(0, BUFFER_SLOTS)]);
        let run = free.iter_mut().find(|(_, len)| *len >= count).ok_or_else(|| {
            io::Error::other(format!(
                "a ring has {BUFFER_SLOTS} places for registered buffers, and {count} in a row are not free; use more threads, or a smaller queue depth"
            ))
        })?;
        let first = run.0;
        *run = (run.0 + count, run.1 - count);
        Ok(first)
    }

    fn release_buffers(&mut self, first: u16, count: u16) {
        let Some(free) = &mut self.free_buffers else { return };
        free.push((first, count));
        free.sort_unstable();
        free.dedup_by(|next, run| {
            let adjacent = run.0 + run.1 == next.0;
            if adjacent {
                run.1 += next.1;
            }
            adjacent
        });
    }

    unsafe fn take_tags(&mut self, buffer: u16, bytes: usize, into: &mut Vec<Tag>) {
        if let Some(buffers) = &mut self.tag_buffers {
            buffers.take(buffer, bytes, into);
        }
    }

    fn take_completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        self.prompt = 0;
        let mut repeats_wake = false;
        for entry in self.uring.completion() {
            match entry.user_data() {
                WAKE => {
                    self.wake_armed = false;
                    if let Err(errno) = Errno::check(entry.result()) {
                        // Any other failure would be repeated forever.
                        if !is_transient(errno) {
                            return Err(errno.into());
                        }
                        log::debug!("reading a ring's wake-ups again: {errno}");
                        repeats_wake = true;
                    }
                }
                TIMER => self.timer_ended = true,
                user_data => into.push(Completion {
                    user_data,
                    result: entry.result(),
                    tags: cqueue::buffer_select(entry.flags()),
                    more: cqueue::more(entry.flags()),
                }),
            }
        }
        if repeats_wake {
            // The next wait submits the read again, which may fail at once.
            std::thread::sleep(WAKE_PAUSE);
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.waker.clone()
    }
}

/// Returns whether a read that has failed may succeed later.
fn is_transient(errno: Errno) -> bool {
    matches!(errno, Errno::EINTR | Errno::EAGAIN | Errno::ECANCELED | Errno::ENOMEM)
}

#[cfg(test)]
mod tests {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    use super::super::KernelCharDevice;
    use super::*;

    #[test]
    fn more_submissions_than_the_queue_holds_all_complete() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        let count = u64::from(SUBMISSION_ENTRIES) * 5;
        let fd = file.as_file().as_raw_fd();
        for user_data in 0..count {
            let submission = Submission { user_data, operation: Operation::SyncData { fd }, prompt: false };
            // SAFETY: no memory; the file is open until the end.
            unsafe { ring.push(submission) }.unwrap();
        }
        let mut completions = Vec::new();
        while (completions.len() as u64) < count {
            ring.wait().unwrap();
            ring.take_completions(&mut completions).unwrap();
        }
        let mut seen: Vec<u64> = completions.iter().map(|c| c.user_data).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
        assert!(completions.iter().all(|c| c.result == 0));
    }

    #[test]
    fn a_wake_up_from_another_thread_ends_a_wait() {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        for _ in 0..3 {
            let waker = ring.waker();
            let other = std::thread::spawn(move || waker.wake());
            let mut completions = Vec::new();
            ring.wait().unwrap();
            ring.take_completions(&mut completions).unwrap();
            other.join().unwrap();
            assert_eq!(completions, []);
        }
    }

    /// All devices of the thread end with its ring.
    #[test]
    fn a_wake_up_that_cannot_be_read_now_is_read_later() {
        const CANCEL: u64 = 1;
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        let mut completions = Vec::new();
        ring.arm_wake().unwrap();
        ring.push_entry(opcode::AsyncCancel::new(WAKE).build().user_data(CANCEL)).unwrap();
        let mut wait_for_the_read = || {
            ring.arm_wake().unwrap();
            while ring.wake_armed {
                ring.wait().unwrap();
                ring.take_completions(&mut completions).unwrap();
            }
            ring.waker()
        };
        wait_for_the_read().wake();
        wait_for_the_read();
        assert!(completions.iter().all(|completion| completion.user_data == CANCEL), "{completions:?}");
    }

    #[test]
    fn a_wake_up_that_can_never_be_read_is_a_failure() {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        let (_reader, writer) = std::io::pipe().unwrap();
        // SAFETY: replaces the event's descriptor, which the ring still owns, by one that cannot be read.
        let replaced = unsafe { libc::dup2(writer.as_raw_fd(), ring.waker.0.as_fd().as_raw_fd()) };
        assert!(replaced >= 0);
        ring.wait().unwrap();
        assert_eq!(ring.take_completions(&mut Vec::new()).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }

    #[test]
    fn the_timer_ends_a_wait_once() {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        ring.start_timer(Duration::from_millis(5)).unwrap();
        let mut completions = Vec::new();
        ring.wait().unwrap();
        ring.take_completions(&mut completions).unwrap();
        assert_eq!(completions, []);
        assert!(ring.timer_ended());
        assert!(!ring.timer_ended());
    }

    /// A ring that names files by place or by descriptor, whichever this kernel's is.
    fn ring_that_names(by_descriptor: bool) -> KernelRing {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        ring.by_descriptor = by_descriptor.then(HashMap::new);
        ring
    }

    /// A file in place of a char device, and a pipe's end that shows when the file is closed.
    fn device() -> (Arc<dyn CharDevice>, std::io::PipeReader) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Arc::new(KernelCharDevice(std::os::fd::OwnedFd::from(writer).into())), reader)
    }

    fn is_closed(reader: &std::io::PipeReader, within: u16) -> bool {
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(within)).unwrap() == 1
    }

    #[test]
    fn a_ring_holds_its_files_open_until_they_are_removed() {
        for by_descriptor in [false, true] {
            let mut ring = ring_that_names(by_descriptor);
            let ((first, reader), (second, other)) = (device(), device());
            // A device has several queues.
            let slots = [&first, &first, &second].map(|file| ring.add_file(file).unwrap());
            assert_eq!(slots[0].0 & PLAIN != 0, by_descriptor);
            drop((first, second));
            ring.remove_file(slots[0]).unwrap();
            assert!(!is_closed(&reader, 10), "it is in the ring for another queue");
            ring.remove_file(slots[1]).unwrap();
            assert!(is_closed(&reader, 30_000));
            assert!(!is_closed(&other, 10));
            drop(ring);
            assert!(is_closed(&other, 30_000), "the ring has closed it");
        }
    }

    #[test]
    fn a_device_that_has_no_place_in_the_ring_is_refused() {
        let mut ring = ring_that_names(true);
        let (file, _reader) = device();
        let places = ring.free_slots.len();
        let slots: Vec<_> = (0..places).map(|_| ring.add_file(&file).unwrap()).collect();
        assert!(ring.add_file(&file).unwrap_err().to_string().contains("use more threads"));
        ring.remove_file(slots[0]).unwrap();
        ring.add_file(&file).unwrap();
    }

    #[test]
    fn places_for_buffers_are_given_out_once_and_join_when_they_come_back() {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        let halves = [ring.reserve_buffers(8192).unwrap(), ring.reserve_buffers(8192).unwrap()];
        assert_eq!(halves, [0, 8192]);
        let error = ring.reserve_buffers(1).unwrap_err();
        assert!(error.to_string().contains("use more threads"), "{error}");
        ring.release_buffers(halves[1], 8192);
        ring.release_buffers(halves[0], 8192);
        assert_eq!(ring.reserve_buffers(BUFFER_SLOTS).unwrap(), 0);
    }
}
