// SPDX-License-Identifier: MIT OR Apache-2.0

//! The loop around one ring: take messages and completions, call handlers, submit and wait, with one system call per round,
//! and a sleep if requests are coalesced.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::cookie::{Cookie, Kind};
use super::core::ThreadParts;
use super::guard::guarded;
use super::inbox::{Inbox, Message, Returned};
use super::io::SharedRing;
use super::queue::{Queue, shared_zeros};
use super::schedule::{Schedule, clock};
use super::transfer::Transfer;
use crate::driver::{Completion, Driver};
use crate::error::Error;
use crate::memory::IoBuffer;
use crate::placement::{CpuSet, ThreadAffinity};
use crate::pressure::memory_is_locked;
use crate::units::Tag;

/// Serves queues until the last one is closed.
pub(super) fn run(driver: &dyn Driver, inbox: &Arc<Inbox>) {
    become_io_flusher();
    let mut thread = match RingThread::new(driver, inbox) {
        Ok(thread) => thread,
        Err(error) => {
            return inbox.refuse(&|device, queue| Error::Target {
                context: format!("making the ring of queue {queue} of device {device}"),
                source: again(&error),
            });
        }
    };
    let reason = match guarded(|| thread.serve()) {
        Ok(Ok(())) => return,
        Ok(Err(error)) => format!("the ring failed: {error}"),
        Err(panic) => format!("the ring thread panicked: {panic}"),
    };
    log::error!("{reason}");
    thread.close_all(&reason);
    inbox.refuse(&|device, queue| Error::Queue { device, queue, reason: reason.clone() });
}

/// Copies an error.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

/// Marks this thread as part of a write-out path: memory reclaim on its behalf then never waits for a disk, which might be
/// the one served here. Since Linux 5.6; needs `CAP_SYS_RESOURCE`.
fn become_io_flusher() {
    /// From `linux/prctl.h`; the libc crate lacks it.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: this prctl takes plain numbers and changes a flag of the calling thread only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result != 0 {
        log::debug!("PR_SET_IO_FLUSHER: {}", io::Error::last_os_error());
    }
}

/// Time without requests after which memory is given back; up to twice as long.
const IDLE: Duration = Duration::from_secs(2);

/// Whether the thread is idle.
#[derive(Debug, Default)]
struct Idle {
    /// Requests have arrived since the timer was started.
    active: bool,
    timer_runs: bool,
}

#[derive(Debug)]
struct RingThread {
    inbox: Arc<Inbox>,
    /// The queues; their index is part of a submission's `user_data`.
    queues: Vec<Option<Queue>>,
    /// Indices of abandoned queues, which are not used again: completions may still arrive for them.
    retired: Vec<usize>,
    /// There may be abandoned queues that are not closed yet.
    has_abandoned: bool,
    /// Transfers in flight of abandoned queues, by the queue's index.
    transfers: HashMap<(u32, Tag), Transfer>,
    /// Indices of queues that got a completion in this round.
    touched: Vec<u32>,
    completions: Vec<Completion>,
    returned: Vec<Returned>,
    idle: Idle,
    schedule: Schedule,
    affinity: ThreadAffinity,
    zeros: Rc<IoBuffer>,
    // Last: closing it ends whatever the fields above still had in flight.
    ring: SharedRing,
}

impl RingThread {
    fn new(driver: &dyn Driver, inbox: &Arc<Inbox>) -> io::Result<Self> {
        let ring = driver.new_ring()?;
        inbox.set_waker(ring.waker());
        Ok(RingThread {
            inbox: inbox.clone(),
            queues: Vec::new(),
            retired: Vec::new(),
            has_abandoned: false,
            transfers: HashMap::new(),
            touched: Vec::new(),
            completions: Vec::new(),
            returned: Vec::new(),
            idle: Idle::default(),
            schedule: Schedule::default(),
            affinity: ThreadAffinity::default(),
            zeros: shared_zeros()?,
            ring: Rc::new(RefCell::new(ring)),
        })
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut skipped = false;
        loop {
            if self.inbox.is_filled() {
                self.read_messages();
                self.take_back();
            }
            self.touch_abandoned();
            if self.queues.iter().all(Option::is_none) && self.inbox.close_if_empty() {
                // Closing the ring takes back the tags of abandoned queues: do not wait for files first.
                self.transfers.drain().for_each(|(_, transfer)| transfer.abandon());
                return Ok(());
            }
            self.serve_touched()?;
            self.watch_idleness()?;
            let has_completions = match self.schedule.end_round() {
                Some(window) => self.ring.borrow_mut().coalesce(window)?,
                None => false,
            };
            // Not twice in a row: only the wait makes the kernel deliver what comes from other threads.
            let skip = has_completions && !skipped;
            if !skip {
                self.ring.borrow_mut().wait()?;
            }
            skipped = skip;
            self.ring.borrow_mut().take_completions(&mut self.completions)?;
            self.dispatch();
            self.serve_touched()?;
        }
    }

    /// Takes back requests from other threads.
    fn take_back(&mut self) {
        for Returned { queue: index, tag, buffer, reason } in self.returned.drain(..) {
            let Some(queue) = self.queues.get(index as usize).and_then(Option::as_ref) else {
                log::debug!("late answer to a request of an abandoned queue: tag {tag}");
                continue;
            };
            queue.returned(tag, buffer, reason);
            touch(&mut self.touched, index);
        }
    }

    /// Gives back memory that bursts of requests have used, once the thread has been idle for a while.
    fn watch_idleness(&mut self) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        if ring.timer_ended() {
            self.idle.timer_runs = false;
            // Between two waits the driver uses no buffer, and all its completions are known.
            if !self.idle.active && !memory_is_locked() {
                if ring.is_quiet() {
                    self.queues.iter().flatten().filter(|queue| queue.is_warm()).for_each(Queue::cool);
                }
                // Try again later what cannot be given back now.
                self.idle.active = self.queues.iter().flatten().any(Queue::is_warm);
            }
        }
        // The completion of a refused commit need not end the wait: the timer does.
        if self.idle.timer_runs || !self.idle.active && !ring.has_prompt() {
            return Ok(());
        }
        self.idle = Idle { active: false, timer_runs: true };
        ring.start_timer(IDLE)
    }

    fn read_messages(&mut self) {
        for message in self.inbox.take(&mut self.returned) {
            match message {
                Message::Open { setup, reply } => {
                    let free = |index: &usize| self.queues[*index].is_none() && !self.retired.contains(index);
                    let index = (0..self.queues.len()).find(free).unwrap_or(self.queues.len());
                    // Before its memory is allocated.
                    self.choose_cpus(Some(setup.cpus));
                    let (ring, inbox, zeros) = (&self.ring, &self.inbox, &self.zeros);
                    let result = Queue::open(*setup, &ThreadParts { index: index as u32, ring, inbox, zeros });
                    if index == self.queues.len() {
                        self.queues.push(None);
                    }
                    let result = match result {
                        Ok(queue) => {
                            self.queues[index] = Some(queue);
                            self.update_windows();
                            Ok(())
                        }
                        Err(failure) => {
                            if failure.fetched {
                                self.retired.push(index);
                            }
                            self.inbox.unload();
                            Err(failure.error)
                        }
                    };
                    // The caller may no longer wait; the outcome then shows in the device's events.
                    let _ = reply.send(result);
                }
                Message::Abandon { events, successor } => {
                    self.has_abandoned = true;
                    let queues = self.queues.iter_mut().flatten();
                    queues.filter(|queue| queue.reports_to(&events)).for_each(|queue| queue.abandon(successor));
                }
            }
        }
    }

    /// Marks abandoned queues as touched, so that they are closed as soon as they are over.
    fn touch_abandoned(&mut self) {
        if !std::mem::take(&mut self.has_abandoned) {
            return;
        }
        let mut ring = self.ring.borrow_mut();
        for (index, queue) in self.queues.iter().enumerate() {
            if queue.as_ref().is_some_and(Queue::is_abandoned) {
                self.has_abandoned = true;
                touch(&mut self.touched, index as u32);
                if !ring.is_submitted() {
                    // There may be no completion that shows when the kernel has taken everything.
                    ring.waker().wake();
                }
            }
        }
    }

    fn dispatch(&mut self) {
        for completion in self.completions.drain(..) {
            let cookie = Cookie::decode(completion.user_data);
            let queue = cookie.and_then(|c| self.queues.get_mut(c.queue as usize)?.as_mut().map(|q| (c, q)));
            let Some((cookie, queue)) = queue else {
                log::debug!("late completion of an abandoned queue: {completion:?}");
                if let Some(Cookie { kind: Kind::Transfer, queue, tag }) = cookie
                    && let Some(transfer) = self.transfers.remove(&(queue, tag))
                {
                    transfer.ended_late(completion.result);
                }
                if let (Some(buffer), Ok(bytes)) = (completion.tags, usize::try_from(completion.result)) {
                    // SAFETY: the buffer is the completion's, which is looked at once.
                    unsafe { self.ring.borrow_mut().take_tags(buffer, bytes, &mut Vec::new()) };
                }
                continue;
            };
            self.schedule.note(usize::from(cookie.kind == Kind::Transfer));
            queue.completed(cookie, completion);
            touch(&mut self.touched, cookie.queue);
        }
    }

    #[inline(always)]
    fn serve_touched(&mut self) -> io::Result<()> {
        if self.touched.is_empty() { Ok(()) } else { self.serve_some() }
    }

    fn serve_some(&mut self) -> io::Result<()> {
        let arrived = clock();
        let mut closed = false;
        let queues = &self.queues;
        Schedule::order(&mut self.touched, |index| queues[index as usize].as_ref().is_some_and(Queue::is_slow));
        for index in self.touched.drain(..) {
            let slot = &mut self.queues[index as usize];
            let Some(queue) = slot else { continue };
            if queue.waiting() != 0 {
                self.idle.active = true;
                self.schedule.note(queue.waiting());
                // First in the submission: the client can go on while files do what is submitted after it.
                queue.flush_done();
                queue.serve(arrived);
            }
            queue.flush();
            if let Some(error) = queue.take_ring_failure() {
                return Err(error);
            }
            if queue.is_over()
                && let Some(queue) = slot.take()
            {
                if queue.is_abandoned() {
                    self.retired.push(index as usize);
                }
                self.transfers.extend(queue.close().into_iter().map(|(tag, transfer)| ((index, tag), transfer)));
                self.inbox.unload();
                closed = true;
            }
        }
        if closed {
            self.choose_cpus(None);
            self.update_windows();
        }
        Ok(())
    }

    /// Updates the schedule after queues were opened or closed.
    fn update_windows(&mut self) {
        self.schedule.set_windows(self.queues.iter().flatten().map(Queue::coalescing));
    }

    /// Moves the thread to the CPUs of its queues, and of the one that is about to be opened.
    fn choose_cpus(&mut self, opening: Option<Option<CpuSet>>) {
        if opening == Some(None) && !self.affinity.is_pinned() {
            return;
        }
        let cpus = self.queues.iter().flatten().map(Queue::cpus).chain(opening);
        self.affinity.move_to(cpus);
    }

    /// Closes all queues of a thread that cannot go on.
    fn close_all(&mut self, reason: &str) {
        self.transfers.drain().for_each(|(_, transfer)| transfer.abandon());
        for queue in self.queues.drain(..).flatten() {
            queue.fail(reason.to_owned());
            queue.close_without_ring();
        }
    }
}

/// Notes that a queue got a completion.
fn touch(touched: &mut Vec<u32>, index: u32) {
    if touched.last() != Some(&index) && !touched.contains(&index) {
        touched.push(index);
    }
}
