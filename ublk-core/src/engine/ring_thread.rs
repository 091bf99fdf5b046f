// SPDX-License-Identifier: MIT OR Apache-2.0

//! The loop around one ring: take messages and completions, let handlers work, submit and wait, with
//! one system call per round, and a sleep where requests are to gather.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use super::coalescing::Coalescing;
use super::cookie::{Cookie, Kind};
use super::core::{Seat, SharedRing};
use super::guard::guarded;
use super::pace::{begin_after, clock};
use super::pool::{Inbox, Message, Returned};
use super::queue::{Queue, shared_zeros};
use super::transfer::Transfer;
use crate::driver::{Completion, Driver};
use crate::error::Error;
use crate::memory::IoBuffer;
use crate::placement::{CpuSet, ThreadPlace};
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
    thread.give_up(&reason);
    inbox.refuse(&|device, queue| Error::Queue { device, queue, reason: reason.clone() });
}

/// The same error once more.
fn again(error: &io::Error) -> io::Error {
    error.raw_os_error().map_or_else(|| io::Error::new(error.kind(), error.to_string()), io::Error::from_raw_os_error)
}

/// Tells the kernel that this thread is part of a write-out path: reclaim on its behalf then never
/// waits for a disk, which might be the one served here. Linux 5.6; needs `CAP_SYS_RESOURCE`.
fn become_io_flusher() {
    /// From `linux/prctl.h`; the libc crate lacks it.
    const PR_SET_IO_FLUSHER: libc::c_int = 57;
    // SAFETY: this prctl takes plain numbers and changes a flag of the calling thread only.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if result != 0 {
        log::debug!("PR_SET_IO_FLUSHER: {}", io::Error::last_os_error());
    }
}

/// Has this thread's sleeps end on time: by default the kernel adds up to 50 µs.
fn exact_timers() {
    // SAFETY: this prctl takes a number of nanoseconds and concerns the calling thread only.
    let result = unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
    if result != 0 {
        log::debug!("PR_SET_TIMERSLACK: {}", io::Error::last_os_error());
    }
}

/// How long nothing may happen before memory is given back: once at least, twice at most.
const IDLE: Duration = Duration::from_secs(2);

/// Whether requests come.
#[derive(Debug, Default)]
struct Idle {
    /// Some came since the timer was started.
    active: bool,
    timer_runs: bool,
}

#[derive(Debug)]
struct RingThread {
    inbox: Arc<Inbox>,
    /// The queues by place; the place is part of a submission's `user_data`.
    queues: Vec<Option<Queue>>,
    /// Places of queues that were given up: completions may still come for them, so nobody else may
    /// have them.
    retired: Vec<usize>,
    /// Queues were given up, and may not be closed yet.
    giving_up: bool,
    /// What files still do for such queues.
    transfers: HashMap<(u32, Tag), Transfer>,
    /// Places whose queue got a completion in this round.
    touched: Vec<u32>,
    completions: Vec<Completion>,
    returned: Vec<Returned>,
    idle: Idle,
    coalescing: Coalescing,
    thread_place: ThreadPlace,
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
            giving_up: false,
            transfers: HashMap::new(),
            touched: Vec::new(),
            completions: Vec::new(),
            returned: Vec::new(),
            idle: Idle::default(),
            coalescing: Coalescing::default(),
            thread_place: ThreadPlace::default(),
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
            self.touch_given_up();
            if self.queues.iter().all(Option::is_none) && self.inbox.close_if_empty() {
                // Closing the ring is what takes the tags of queues back that were given up: not to wait for a file.
                self.transfers.drain().for_each(|(_, transfer)| transfer.abandon());
                return Ok(());
            }
            self.serve_touched()?;
            self.watch_idleness()?;
            let news = match self.coalescing.end_round() {
                Some(window) => self.ring.borrow_mut().gather(window)?,
                None => false,
            };
            // Not twice in a row: nothing but the wait has the kernel hand over what came from elsewhere.
            let skip = news && !skipped;
            if !skip {
                self.ring.borrow_mut().wait()?;
            }
            skipped = skip;
            self.ring.borrow_mut().take_completions(&mut self.completions)?;
            self.dispatch();
            self.serve_touched()?;
        }
    }

    /// Takes back the requests that were on other threads.
    fn take_back(&mut self) {
        for Returned { place, tag, buffer, what } in self.returned.drain(..) {
            let Some(queue) = self.queues.get(place as usize).and_then(Option::as_ref) else {
                log::debug!("late answer to a request of an abandoned queue: tag {tag}");
                continue;
            };
            queue.returned(tag, buffer, what);
            touch(&mut self.touched, place);
        }
    }

    /// Gives memory back that bursts have touched, once nothing has happened for a while.
    fn watch_idleness(&mut self) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        if ring.timer_ended() {
            self.idle.timer_runs = false;
            // Between two waits the driver touches no buffer, and nothing that it did is unseen.
            if !self.idle.active && !memory_is_locked() {
                if ring.is_quiet() {
                    self.queues.iter().flatten().filter(|queue| queue.is_warm()).for_each(Queue::cool);
                }
                // What could not be given back now can be later.
                self.idle.active = self.queues.iter().flatten().any(Queue::is_warm);
            }
        }
        // A driver that refuses a commit says so in a completion that need not end the wait: the timer does.
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
                    let free = |place: &usize| self.queues[*place].is_none() && !self.retired.contains(place);
                    let place = (0..self.queues.len()).find(free).unwrap_or(self.queues.len());
                    // Before its memory is touched.
                    self.find_place(Some(setup.cpus));
                    let seat = Seat { place: place as u32, ring: &self.ring, inbox: &self.inbox, zeros: &self.zeros };
                    let result = Queue::open(*setup, &seat);
                    if place == self.queues.len() {
                        self.queues.push(None);
                    }
                    let result = match result {
                        Ok(queue) => {
                            self.queues[place] = Some(queue);
                            self.agree_on_coalescing();
                            Ok(())
                        }
                        Err(failure) => {
                            if failure.lent {
                                self.retired.push(place);
                            }
                            self.inbox.unload();
                            Err(failure.error)
                        }
                    };
                    // The caller may have given up; the outcome then shows in the device's events.
                    let _ = reply.send(result);
                }
                Message::Abandon { device, successor } => {
                    self.giving_up = true;
                    let queues = self.queues.iter_mut().flatten();
                    queues.filter(|queue| queue.device() == device).for_each(|queue| queue.give_up(successor));
                }
            }
        }
    }

    /// Looks at queues that were given up, whatever it is that they wait for.
    fn touch_given_up(&mut self) {
        if !std::mem::take(&mut self.giving_up) {
            return;
        }
        let mut ring = self.ring.borrow_mut();
        for (place, queue) in self.queues.iter().enumerate() {
            if queue.as_ref().is_some_and(Queue::is_given_up) {
                self.giving_up = true;
                touch(&mut self.touched, place as u32);
                if !ring.is_submitted() {
                    // Nothing may complete that shows when the kernel has taken it.
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
            self.coalescing.note(usize::from(cookie.kind == Kind::Transfer));
            queue.completed(cookie, completion);
            touch(&mut self.touched, cookie.queue);
        }
    }

    #[inline(always)]
    fn serve_touched(&mut self) -> io::Result<()> {
        if self.touched.is_empty() { Ok(()) } else { self.serve_some() }
    }

    fn serve_some(&mut self) -> io::Result<()> {
        let came = clock();
        let mut now = came;
        let mut closed = false;
        if self.touched.len() > 1 {
            // Those that keep the others waiting come last.
            let queues = &self.queues;
            self.touched.sort_by_key(|place| queues[*place as usize].as_ref().is_some_and(Queue::is_slow));
        }
        for place in self.touched.drain(..) {
            let slot = &mut self.queues[place as usize];
            let Some(queue) = slot else { continue };
            if queue.waiting() != 0 {
                self.idle.active = true;
                self.coalescing.note(queue.waiting());
                // First in the submission: the client can go on while files of the kernel's do what comes behind.
                queue.flush_done();
                queue.serve(came, now);
                now = begin_after(now);
            }
            queue.flush();
            if let Some(error) = queue.take_ring_failure() {
                return Err(error);
            }
            if queue.is_over()
                && let Some(queue) = slot.take()
            {
                if queue.is_given_up() {
                    self.retired.push(place as usize);
                }
                self.transfers.extend(queue.close().into_iter().map(|(tag, transfer)| ((place, tag), transfer)));
                self.inbox.unload();
                closed = true;
            }
        }
        if closed {
            self.find_place(None);
            self.agree_on_coalescing();
        }
        Ok(())
    }

    /// The thread has other queues than before.
    fn agree_on_coalescing(&mut self) {
        if self.coalescing.agree(self.queues.iter().flatten().map(Queue::coalescing)) {
            exact_timers();
        }
    }

    /// Goes to the CPUs that the queues want, and one that is about to come.
    fn find_place(&mut self, coming: Option<Option<CpuSet>>) {
        if coming == Some(None) && !self.thread_place.is_pinned() {
            return;
        }
        let wishes = self.queues.iter().flatten().map(Queue::cpus).chain(coming);
        self.thread_place.move_to(wishes);
    }

    /// Ends all queues of a thread that cannot go on.
    fn give_up(&mut self, reason: &str) {
        self.transfers.drain().for_each(|(_, transfer)| transfer.abandon());
        for queue in self.queues.drain(..).flatten() {
            queue.fail(reason.to_owned());
            queue.abandon();
        }
    }
}

/// Notes that something happened to a queue.
fn touch(touched: &mut Vec<u32>, place: u32) {
    if touched.last() != Some(&place) && !touched.contains(&place) {
        touched.push(place);
    }
}
