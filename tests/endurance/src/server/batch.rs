// SPDX-License-Identifier: MIT OR Apache-2.0

//! A thread that serves tags of all queues in batches.

use std::sync::Barrier;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context, Result, bail};
use io_uring::types::BufRingEntry;

use super::Shared;
use super::single::{buffers, copy, transfer};
use crate::mode::{Data, MAX_IO};
use crate::ring::{BUFFER_SELECT, Command, IoRing, MULTISHOT, enter, push};
use ublk_test_common::uapi::*;

/// Tags of one PREP_IO_CMDS. Less than all of a queue, so that servers can die in between.
const PREPARED_AT_ONCE: u16 = 8;
/// Buffers for lists of tags, per queue.
const LISTS: u16 = 8;

/// What a completion is about; the lower half of `user_data` says which.
const PREPARE: u64 = 0;
/// Of a queue.
const FETCH: u64 = 1 << 32;
/// Of a queue, with the tag from bit 16 on.
const MOVE: u64 = 2 << 32;
/// An index into the commits on their way.
const COMMIT: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// Buffers of one queue for lists of tags, in the kernel's ring of provided buffers.
struct Lists {
    ring: *mut BufRingEntry,
    memory: *mut u16,
    depth: u16,
    tail: u16,
}

impl Lists {
    fn new(uring: &IoRing, group: u16, depth: u16) -> Result<Self> {
        // One piece of memory each, aligned to pages as the kernel wants it, until the process ends.
        let ring = buffers(1)? as *mut BufRingEntry;
        let memory = buffers(1)? as *mut u16;
        // SAFETY: the ring's memory is zero, has room for the entries, and stays.
        unsafe { uring.submitter().register_buf_ring_with_flags(ring as u64, LISTS, group, 0) }
            .context("no ring of buffers")?;
        let mut lists = Lists { ring, memory, depth, tail: 0 };
        for buffer in 0..LISTS {
            lists.give(buffer);
        }
        Ok(lists)
    }

    fn list(&self, buffer: u16) -> *mut u16 {
        // SAFETY: `buffers` has room for more than LISTS lists of a queue's tags.
        unsafe { self.memory.add(usize::from(buffer) * usize::from(self.depth)) }
    }

    /// Lends a buffer to the kernel.
    fn give(&mut self, buffer: u16) {
        // SAFETY: the entry is within the ring, and the kernel does not look at it before the tail has moved.
        unsafe {
            let entry = &mut *self.ring.add(usize::from(self.tail % LISTS));
            entry.set_addr(self.list(buffer) as u64);
            entry.set_len(u32::from(self.depth) * 2);
            entry.set_bid(buffer);
            self.tail = self.tail.wrapping_add(1);
            AtomicU16::from_ptr(BufRingEntry::tail(self.ring).cast_mut()).store(self.tail, Ordering::Release);
        }
    }

    /// The tags in a buffer that the kernel has filled; it gets the buffer back.
    fn take(&mut self, buffer: u16, bytes: usize) -> Vec<u16> {
        // SAFETY: the kernel has written so many bytes, and is done with the buffer.
        let tags = unsafe { std::slice::from_raw_parts(self.list(buffer), bytes / 2) }.to_vec();
        self.give(buffer);
        tags
    }
}

/// Elements of a PREP_IO_CMDS or COMMIT_IO_CMDS, which stay where they are until it is complete.
#[derive(Debug, Default)]
struct Elements {
    queue: u16,
    bytes: Vec<u8>,
}

struct Worker<'a> {
    shared: &'a Shared,
    number: u16,
    ring: IoRing,
    lists: Vec<Lists>,
    /// Of all tags of all queues. Each thread has its own, but it is the one that prepared a tag whose buffer is
    /// used until the first commit, and from then on that of the thread that committed last.
    memory: u64,
    /// What is to be committed, per queue.
    finished: Vec<Vec<(u16, i32)>>,
    commits: Vec<Option<Elements>>,
    in_hand: usize,
    leaving: bool,
    dice: u32,
}

/// Serves until the driver sends the server away.
pub(super) fn run(shared: &Shared, number: u16, prepared: &Barrier, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut worker = Worker::new(shared, number)?;
    worker.prepare()?;
    // The driver takes FETCH_IO_CMDS when the queue is prepared. If another thread fails, the process ends.
    prepared.wait();
    for queue in 0..shared.char_device.info.nr_hw_queues {
        worker.fetch(queue)?;
    }
    worker.ring.submit()?;
    ready()?;
    worker.serve()
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared, number: u16) -> Result<Self> {
        let info = &shared.char_device.info;
        let tags = u32::from(info.nr_hw_queues) * u32::from(info.queue_depth);
        let ring = IoRing::builder().setup_cqsize(tags * 4).build(tags.next_power_of_two()).context("no ring")?;
        let memory = if shared.data == Data::BatchAuto {
            ring.submitter().register_buffers_sparse(tags).context("no table of buffers")?;
            0
        } else {
            buffers(tags as usize)?
        };
        let lists =
            (0..info.nr_hw_queues).map(|queue| Lists::new(&ring, queue, info.queue_depth)).collect::<Result<_>>()?;
        Ok(Worker {
            shared,
            number,
            ring,
            lists,
            memory,
            finished: vec![Vec::new(); usize::from(info.nr_hw_queues)],
            commits: Vec::new(),
            in_hand: 0,
            leaving: false,
            dice: u32::from(number) ^ std::process::id(),
        })
    }

    /// Where the tag stands among all tags of the device.
    fn position(&self, queue: u16, tag: u16) -> u16 {
        queue * self.shared.char_device.info.queue_depth + tag
    }

    /// This thread's buffer for a tag.
    fn buffer(&self, queue: u16, tag: u16) -> u64 {
        self.memory + u64::from(self.position(queue, tag)) * u64::from(MAX_IO)
    }

    fn elements(&self, queue: u16, tags: impl Iterator<Item = (u16, i32)>) -> Elements {
        let mut bytes = Vec::new();
        for (tag, result) in tags {
            let position = self.position(queue, tag);
            bytes.extend(tag.to_ne_bytes());
            bytes.extend(if self.memory == 0 { position } else { 0 }.to_ne_bytes());
            bytes.extend(result.to_ne_bytes());
            if self.memory != 0 {
                bytes.extend(self.buffer(queue, tag).to_ne_bytes());
            }
        }
        Elements { queue, bytes }
    }

    fn push_elements(&mut self, op: u32, elements: &Elements, user_data: u64) -> Result<()> {
        let (flags, elem_bytes) = if self.memory == 0 { (0, 8) } else { (UBLK_BATCH_F_HAS_BUF_ADDR, 16) };
        let nr_elem = (elements.bytes.len() / usize::from(elem_bytes)) as u16;
        let batch = ublk_batch_io { q_id: elements.queue, flags, nr_elem, elem_bytes, ..Default::default() };
        let entry = Command {
            fd: self.shared.char_device.fd(),
            op,
            addr: elements.bytes.as_ptr() as u64,
            user_data,
            payload: payload(&batch),
            ..Command::default()
        };
        push(&mut self.ring, &entry.entry())?;
        Ok(())
    }

    /// Lends the tags of this thread's share of the queues to the driver.
    fn prepare(&mut self) -> Result<()> {
        let info = self.shared.char_device.info;
        let (threads, number) = (self.shared.threads, self.number);
        for queue in (0..info.nr_hw_queues).filter(|queue| queue % threads == number) {
            for first in (0..info.queue_depth).step_by(usize::from(PREPARED_AT_ONCE)) {
                let end = (first + PREPARED_AT_ONCE).min(info.queue_depth);
                self.shared.about_to_fetch(u32::from(end - first));
                let elements = self.elements(queue, (first..end).map(|tag| (tag, 0)));
                self.push_elements(UBLK_U_IO_PREP_IO_CMDS, &elements, PREPARE)?;
                enter(&mut self.ring)?;
                match self.ring.completion().next().map(|cqe| cqe.result()) {
                    Some(0) => {}
                    other => bail!("PREP_IO_CMDS of queue {queue}: {other:?}"),
                }
            }
        }
        Ok(())
    }

    fn fetch(&mut self, queue: u16) -> Result<()> {
        let entry = Command {
            flags: BUFFER_SELECT,
            fd: self.shared.char_device.fd(),
            op: UBLK_U_IO_FETCH_IO_CMDS,
            command_flags: MULTISHOT,
            user_data: FETCH | u64::from(queue),
            buf_group: queue,
            payload: payload(&ublk_batch_io { q_id: queue, elem_bytes: 2, ..Default::default() }),
            ..Command::default()
        };
        push(&mut self.ring, &entry.entry())?;
        Ok(())
    }

    fn serve(&mut self) -> Result<()> {
        while !self.leaving || self.in_hand > 0 || self.commits.iter().any(Option::is_some) {
            enter(&mut self.ring)?;
            let completions: Vec<_> =
                self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result(), cqe.flags())).collect();
            for (user_data, result, flags) in completions {
                let which = (user_data & !KIND) as u32;
                match user_data & KIND {
                    FETCH => self.fetched(which as u16, result, flags)?,
                    MOVE => self.finish(which as u16, (which >> 16) as u16, result),
                    COMMIT => self.committed(which as usize, result)?,
                    kind => bail!("completion {result} of kind {}", kind >> 32),
                }
            }
            for queue in 0..self.finished.len() {
                let finished = std::mem::take(&mut self.finished[queue]);
                if !finished.is_empty() {
                    let elements = self.elements(queue as u16, finished.into_iter());
                    self.commit(elements)?;
                }
            }
        }
        Ok(())
    }

    fn fetched(&mut self, queue: u16, result: i32, flags: u32) -> Result<()> {
        if let Some(buffer) = io_uring::cqueue::buffer_select(flags) {
            for tag in self.lists[usize::from(queue)].take(buffer, result.max(0) as usize) {
                self.request(queue, tag)?;
            }
        }
        if io_uring::cqueue::more(flags) {
            return Ok(());
        }
        match -result {
            libc::ENOBUFS => self.fetch(queue),
            libc::ENODEV => {
                self.leaving = true;
                Ok(())
            }
            _ => bail!("FETCH_IO_CMDS of queue {queue} ends with {result}"),
        }
    }

    fn request(&mut self, queue: u16, tag: u16) -> Result<()> {
        self.in_hand += 1;
        let wish = self.shared.char_device.wish(queue, tag);
        if wish.op == UBLK_IO_OP_WRITE {
            self.shared.store.count(wish.offset);
        }
        self.shared.dawdle(&mut self.dice);
        match wish.op {
            UBLK_IO_OP_READ | UBLK_IO_OP_WRITE => {}
            UBLK_IO_OP_FLUSH => {
                self.finish(queue, tag, 0);
                return Ok(());
            }
            op => bail!("operation {op} was not offered"),
        }
        let Some(place) = self.shared.store.place(wish.offset, wish.length) else {
            bail!("{wish:?} is beyond the end of the disk");
        };
        if self.shared.loses(wish, self.dice) {
            self.finish(queue, tag, wish.length as i32);
        } else if self.memory == 0 {
            let user_data = MOVE | u64::from(tag) << 16 | u64::from(queue);
            let entry = transfer(wish, self.shared.store.fd(), self.position(queue, tag)).user_data(user_data);
            push(&mut self.ring, &entry)?;
        } else {
            // The data of a write is where the tag's last commit said, of any thread. What is read is taken from where
            // this thread's commit will say.
            let buffer = match wish.op {
                UBLK_IO_OP_READ => self.buffer(queue, tag),
                _ => self.shared.char_device.buffer(queue, tag),
            };
            // SAFETY: both are buffers that a thread of this server keeps for this tag, with room for the largest
            // request, and nothing else uses them until the commit.
            let result = unsafe { copy(wish, place, buffer as *mut u8) };
            self.finish(queue, tag, result);
        }
        Ok(())
    }

    fn finish(&mut self, queue: u16, tag: u16, result: i32) {
        self.in_hand -= 1;
        self.finished[usize::from(queue)].push((tag, result));
    }

    fn commit(&mut self, elements: Elements) -> Result<()> {
        let slot = self.commits.iter().position(Option::is_none).unwrap_or_else(|| {
            self.commits.push(None);
            self.commits.len() - 1
        });
        self.push_elements(UBLK_U_IO_COMMIT_IO_CMDS, &elements, COMMIT | slot as u64)?;
        self.commits[slot] = Some(elements);
        Ok(())
    }

    /// The driver says how many bytes of the elements it has taken.
    fn committed(&mut self, slot: usize, result: i32) -> Result<()> {
        let Some(mut elements) = self.commits[slot].take() else { bail!("a commit completes twice") };
        if result <= 0 {
            bail!("COMMIT_IO_CMDS of queue {}: {result}", elements.queue);
        }
        elements.bytes.drain(..result as usize);
        if elements.bytes.is_empty() { Ok(()) } else { self.commit(elements) }
    }
}
