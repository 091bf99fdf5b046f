// SPDX-License-Identifier: MIT OR Apache-2.0

//! The client: one thread with one io_uring, which keeps a job's number of requests in flight.
//!
//! After each wait, all completions are taken, and the requests that replace them are submitted by the system call that waits
//! again. What is measured is up to a [`Meter`].
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. The buffer of slot `n` is the `stride` bytes at `n * stride` of the client's one mapping, which has a slot for each
//!    request that the job allows in flight. No reference to its bytes exists after [`Slots::new`].
//! 2. A slot has at most one request in flight. The mapping is freed only when none is in flight, and leaked otherwise
//!    ([`Slots`]).
//! 3. The ring holds a reference to the disk's file, which is its registered file 0, and from submission on to the file that
//!    it polls.

use std::io;
use std::marker::PhantomData;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::types::SubmitArgs;
use io_uring::{CompletionQueue, IoUring, SubmissionQueue, Submitter, opcode, types};

use super::job::Job;
use super::requests::{Request, Requests, SEED};
use super::windows::Meter;
use crate::driver::kernel::ring_error;
use crate::errno::Errno;
use crate::error::errno_of;
use crate::memory::{IoBuffer, PAGE_SIZE};

/// `user_data` of the poll that ends a run; requests have the number of their slot.
const INTERRUPT: u64 = u64::MAX;
/// The disk's place among the registered files.
const DISK: types::Fixed = types::Fixed(0);
/// Time limit for requests in flight after a failure or an interrupt.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a run ended early.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The descriptor of interrupts became readable.
    Interrupted,
    /// A request failed or was short, or the ring failed.
    Failed(String),
}

/// A request in flight.
#[derive(Clone, Copy, Debug, Default)]
struct Slot {
    request: Request,
    /// When it was submitted, in the units of the meter.
    submitted: u64,
}

/// A client of one disk, for one job.
pub(super) struct Client<'d> {
    ring: IoUring,
    slots: Slots,
    /// Time limit for requests in flight after a failure or an interrupt.
    drain_timeout: Duration,
    _disk: PhantomData<BorrowedFd<'d>>,
}

impl std::fmt::Debug for Client<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("in_flight", &self.slots.in_flight).finish_non_exhaustive()
    }
}

impl<'d> Client<'d> {
    /// Creates a client for a disk of `disk_size` bytes. Its run ends early when `interrupts` is readable.
    pub(super) fn new(
        disk: BorrowedFd<'d>,
        disk_size: u64,
        job: Job,
        interrupts: BorrowedFd<'_>,
    ) -> Result<Self, String> {
        let requests = Requests::new(job, disk_size)
            .ok_or_else(|| format!("the disk ({disk_size} bytes) is smaller than a request of {job}"))?;
        let slots = Slots::new(job, requests).map_err(|e| format!("allocating buffers: {e}"))?;
        // One more for the poll.
        let mut ring = create_ring(job.depth + 1).map_err(|e| ring_error(&e).to_string())?;
        ring.submitter()
            .register_files(&[disk.as_raw_fd()])
            .map_err(|e| format!("registering the disk with io_uring: {e}"))?;
        let poll = opcode::PollAdd::new(types::Fd(interrupts.as_raw_fd()), libc::POLLIN as u32);
        // SAFETY: (3); it names no memory.
        let pushed = unsafe { ring.submission().push(&poll.build().user_data(INTERRUPT)) };
        pushed
            .map_err(io::Error::other)
            .and_then(|()| ring.submit())
            .map_err(|e| format!("polling for signals: {e}"))?;
        Ok(Client { ring, slots, drain_timeout: DRAIN_TIMEOUT, _disk: PhantomData })
    }

    /// Sends requests until the meter has enough, and waits for those in flight.
    ///
    /// # Errors
    ///
    /// If a request fails or is short, or if the run is interrupted. Requests in flight then have some seconds to end.
    pub(super) fn run<M: Meter>(&mut self, meter: &mut M) -> Result<(), Stop> {
        let measured = self.measure(meter);
        let drained = self.drain(measured.is_err());
        measured.and(drained)
    }

    fn measure<M: Meter>(&mut self, meter: &mut M) -> Result<(), Stop> {
        let Client { ring, slots, .. } = self;
        let (submitter, mut submissions, mut completions) = ring.split();
        for slot in 0..slots.count() {
            slots.queue(slot, &mut submissions)?;
        }
        loop {
            if M::CLOCKED {
                slots.stamp(meter.clock());
            }
            slots.queued.clear();
            enter(&submitter, &mut submissions, &mut completions)?;
            meter.waited();
            for completion in &mut completions {
                if completion.user_data() == INTERRUPT {
                    return Err(Stop::Interrupted);
                }
                let slot = completion.user_data() as u32;
                let submitted = slots.complete(slot, completion.result())?;
                if meter.completed(submitted).is_break() {
                    return Ok(());
                }
                slots.queue(slot, &mut submissions)?;
            }
            if meter.taken().is_break() {
                return Ok(());
            }
        }
    }

    /// Waits for the requests in flight, for a limited time if `limited` or after an interrupt.
    fn drain(&mut self, limited: bool) -> Result<(), Stop> {
        let mut outcome = Ok(());
        let mut deadline = limited.then(|| Instant::now() + self.drain_timeout);
        loop {
            for completion in self.ring.completion() {
                if completion.user_data() == INTERRUPT {
                    deadline = deadline.or_else(|| Some(Instant::now() + self.drain_timeout));
                    outcome = outcome.and(Err(Stop::Interrupted));
                } else {
                    let slot = completion.user_data() as u32;
                    outcome = outcome.and(self.slots.complete(slot, completion.result()).map(|_| ()));
                }
            }
            if self.slots.in_flight == 0 {
                return outcome;
            }
            let waited = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.ring.submit_and_wait(1),
                // The disk hangs.
                Some(left) if left.is_zero() => return outcome,
                Some(left) => {
                    self.ring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&types::Timespec::from(left)))
                }
            };
            match waited {
                Err(error) if !is_transient(&error) => return outcome.and(Err(enter_failed(&error))),
                _ => {}
            }
        }
    }

    /// Returns whether all requests have ended.
    #[cfg(test)]
    fn is_idle(&self) -> bool {
        self.slots.in_flight == 0
    }
}

/// The requests of a client, with their buffers.
struct Slots {
    buffers: ManuallyDrop<IoBuffer>,
    stride: usize,
    /// Size of a request in bytes.
    size: u32,
    slots: Vec<Slot>,
    /// Slots whose requests are queued and not submitted.
    queued: Vec<u32>,
    in_flight: usize,
    requests: Requests,
}

impl Slots {
    fn new(job: Job, requests: Requests) -> io::Result<Self> {
        let depth = job.depth as usize;
        let stride = (job.size as usize).next_multiple_of(PAGE_SIZE);
        let buffers = IoBuffer::new(stride * depth)?;
        // Data that does not compress. This also allocates the pages.
        // SAFETY: (1), (2): no request is in flight, and the slice ends here.
        fastrand::Rng::with_seed(SEED).fill(unsafe { buffers.bytes_mut(stride * depth) });
        Ok(Slots {
            buffers: ManuallyDrop::new(buffers),
            stride,
            size: job.size,
            slots: vec![Slot::default(); depth],
            queued: Vec::with_capacity(depth),
            in_flight: 0,
            requests,
        })
    }

    fn count(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Sets the time of submission of all queued requests.
    fn stamp(&mut self, now: u64) {
        for slot in &self.queued {
            self.slots[*slot as usize].submitted = now;
        }
    }

    /// Queues the next request in a free slot.
    fn queue(&mut self, slot: u32, submissions: &mut SubmissionQueue<'_, Entry>) -> Result<(), Stop> {
        let request = self.requests.next();
        let index = slot as usize;
        self.slots[index].request = request;
        let address = self.buffers.as_ptr().wrapping_add(index * self.stride);
        let entry = if request.write {
            opcode::Write::new(DISK, address, self.size).offset(request.offset).build()
        } else {
            opcode::Read::new(DISK, address, self.size).offset(request.offset).build()
        };
        // SAFETY: (1), (2), (3): `slots` has checked the index, and the slot is free.
        let pushed = unsafe { submissions.push(&entry.user_data(slot.into())) };
        pushed.map_err(|e| Stop::Failed(format!("io_uring: {e}")))?;
        self.in_flight += 1;
        self.queued.push(slot);
        Ok(())
    }

    /// Frees a slot whose request has completed with `result`, and returns when the request was submitted.
    fn complete(&mut self, slot: u32, result: i32) -> Result<u64, Stop> {
        self.in_flight -= 1;
        let Slot { request, submitted } = self.slots[slot as usize];
        if result == self.size as i32 {
            return Ok(submitted);
        }
        let reason = match Errno::check(result) {
            Err(errno) => errno.to_string(),
            Ok(bytes) => format!("ended after {bytes} bytes"),
        };
        let verb = if request.write { "write" } else { "read" };
        Err(Stop::Failed(format!("{verb} of {} bytes at offset {}: {reason}", self.size, request.offset)))
    }
}

impl Drop for Slots {
    fn drop(&mut self) {
        if self.in_flight == 0 {
            // SAFETY: (2): no request is in flight; `buffers` is not used again.
            unsafe { ManuallyDrop::drop(&mut self.buffers) };
        }
    }
}

/// Submits what is queued, and waits for a completion.
fn enter(
    submitter: &Submitter<'_>,
    submissions: &mut SubmissionQueue<'_, Entry>,
    completions: &mut CompletionQueue<'_>,
) -> Result<(), Stop> {
    submissions.sync();
    let waited = submitter.submit_and_wait(1);
    submissions.sync();
    completions.sync();
    match waited {
        Err(error) if !is_transient(&error) => Err(enter_failed(&error)),
        _ => Ok(()),
    }
}

fn enter_failed(error: &io::Error) -> Stop {
    Stop::Failed(format!("io_uring_enter: {error}"))
}

/// Returns whether a wait failed only because of a signal or its time limit, or because completions have to be taken first.
fn is_transient(error: &io::Error) -> bool {
    matches!(errno_of(error), Errno::EBUSY | Errno::EAGAIN | Errno::EINTR | Errno::ETIME)
}

/// Creates a ring in the cheapest mode that the kernel has.
fn create_ring(entries: u32) -> io::Result<IoUring> {
    let mut builder = IoUring::builder();
    builder.dontfork();
    // DEFER_TASKRUN came with Linux 6.1, SINGLE_ISSUER with 6.0, COOP_TASKRUN with 5.19.
    let modes = [
        builder.clone().setup_single_issuer().setup_coop_taskrun().setup_defer_taskrun().clone(),
        builder.clone().setup_single_issuer().setup_coop_taskrun().clone(),
        builder.clone().setup_coop_taskrun().clone(),
    ];
    for mode in modes {
        match mode.build(entries) {
            Err(error) if errno_of(&error) == Errno::EINVAL => {}
            other => return other,
        }
    }
    builder.build(entries)
}

impl Drop for Client<'_> {
    fn drop(&mut self) {
        if self.slots.in_flight == 0 {
            // Closing a ring takes effect later: without this, the disk would be in use for some time.
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::{PipeReader, Write};
    use std::ops::ControlFlow;
    use std::os::fd::AsFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    use super::*;

    const SIZE: u64 = 1 << 20;

    /// Ends a run after a number of requests.
    #[derive(Debug)]
    struct Count {
        left: u64,
        batches: u64,
    }

    impl Meter for Count {
        const CLOCKED: bool = true;

        fn clock(&self) -> u64 {
            self.batches
        }

        fn waited(&mut self) {
            self.batches += 1;
        }

        fn completed(&mut self, submitted: u64) -> ControlFlow<()> {
            assert!(submitted < self.batches, "it was submitted before this wait ended");
            self.left -= 1;
            if self.left == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        }
    }

    fn file(direct: bool) -> File {
        let flags = if direct { libc::O_DIRECT } else { 0 };
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        // Not every file system has direct I/O.
        let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(file.path());
        open(flags).or_else(|_| open(0)).unwrap()
    }

    /// A descriptor that is not readable before the writer is written to.
    fn interrupts() -> (PipeReader, io::PipeWriter) {
        io::pipe().unwrap()
    }

    fn run(file: &File, job: &str, count: u64) -> (Result<(), Stop>, bool) {
        let (reader, _writer) = interrupts();
        let mut client = Client::new(file.as_fd(), SIZE, job.parse().unwrap(), reader.as_fd()).unwrap();
        let outcome = client.run(&mut Count { left: count, batches: 1 });
        (outcome, client.is_idle())
    }

    #[test]
    fn all_requests_have_ended_after_a_run() {
        for direct in [false, true] {
            let file = file(direct);
            for job in ["randread-4k-qd1", "randread-4k-qd32", "write-128k-qd8", "mixed-4k-qd7", "read-4k-qd300"] {
                assert_eq!(run(&file, job, 1000), (Ok(()), true), "{job}");
            }
        }
    }

    #[test]
    fn writes_cover_the_disk_with_data() {
        let file = file(false);
        run(&file, "write-64k-qd4", SIZE / (64 << 10)).0.unwrap();
        let mut data = vec![0; SIZE as usize];
        file.read_exact_at(&mut data, 0).unwrap();
        assert!(data.chunks(4096).all(|page| page.iter().filter(|byte| **byte != 0).count() > 3000));
    }

    #[test]
    fn a_short_read_ends_the_run_with_an_error() {
        let file = file(false);
        file.set_len(SIZE / 2 + 512).unwrap();
        let (outcome, idle) = run(&file, "read-4k-qd1", 1000);
        let offset = SIZE / 2;
        let reason = format!("read of 4096 bytes at offset {offset}: ended after 512 bytes");
        assert_eq!((outcome, idle), (Err(Stop::Failed(reason)), true));
    }

    #[test]
    fn a_failed_write_ends_the_run_with_its_errno() {
        let (outcome, idle) = run(&OpenOptions::new().write(true).open("/dev/full").unwrap(), "write-4k-qd4", 1000);
        let Err(Stop::Failed(reason)) = outcome else { panic!("{outcome:?}") };
        assert!(reason.starts_with("write of 4096 bytes at offset 0: ") && reason.contains("ENOSPC"), "{reason}");
        assert!(idle);
    }

    #[test]
    fn an_interrupt_ends_a_run() {
        let file = file(false);
        let (reader, mut writer) = interrupts();
        let mut client = Client::new(file.as_fd(), SIZE, "randread-4k-qd4".parse().unwrap(), reader.as_fd()).unwrap();
        writer.write_all(b"x").unwrap();
        assert_eq!(client.run(&mut Count { left: u64::MAX, batches: 1 }), Err(Stop::Interrupted));
        assert!(client.is_idle());
    }

    /// A read of a pipe hangs until something is written.
    #[test]
    fn the_buffers_of_a_request_that_hangs_are_leaked() {
        let (pipe, mut writer) = io::pipe().unwrap();
        let (reader, mut interrupt) = interrupts();
        let mut client = Client::new(pipe.as_fd(), SIZE, "read-4k-qd1".parse().unwrap(), reader.as_fd()).unwrap();
        client.drain_timeout = Duration::from_millis(100);
        interrupt.write_all(b"x").unwrap();
        assert_eq!(client.run(&mut Count { left: 1, batches: 1 }), Err(Stop::Interrupted));
        assert!(!client.is_idle());
        let buffer = client.slots.buffers.as_ptr() as usize;
        drop(client);
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapped = maps.lines().filter_map(|line| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
        });
        assert!(mapped.into_iter().any(|range| range.contains(&buffer)), "{maps}");
        writer.write_all(&[0; 4096]).unwrap();
    }

    #[test]
    fn a_disk_smaller_than_a_request_is_refused() {
        let (reader, _writer) = interrupts();
        let file = file(false);
        let refused = Client::new(file.as_fd(), 4096, "read-128k-qd1".parse().unwrap(), reader.as_fd());
        assert!(refused.unwrap_err().contains("smaller than a request of read-128k-qd1"));
    }
}
