// SPDX-License-Identifier: MIT OR Apache-2.0

//! A thread that serves tags with one command each.

use anyhow::{Context, Result, bail};
use io_uring::{opcode, types};

use super::Shared;
use super::device::Wish;
use crate::mode::{Data, MAX_IO};
use crate::ring::{Command, IoRing, enter, push};
use ublk_test_common::uapi::*;

/// What a completion is about; the slot is in the lower half of `user_data`.
const COMMAND: u64 = 0;
const REGISTER: u64 = 1 << 32;
const MOVE: u64 = 2 << 32;
const UNREGISTER: u64 = 3 << 32;
const KIND: u64 = !0 << 32;

/// A place that no ring has: registration there fails.
const NOWHERE: u16 = u16::MAX;

/// A tag of this thread.
struct Slot {
    queue: u16,
    tag: u16,
    buffer: u64,
    /// The answer to the request that the server has.
    result: i32,
}

struct Worker<'a> {
    shared: &'a Shared,
    ring: IoRing,
    slots: Vec<Slot>,
    /// Requests at this thread.
    in_hand: usize,
    /// The driver has taken a tag back.
    leaving: bool,
    dice: u32,
}

/// Serves until the driver sends the server away.
pub(super) fn run(shared: &Shared, number: u16, ready: impl FnOnce() -> Result<()>) -> Result<()> {
    let mut worker = Worker::new(shared, number)?;
    worker.fetch()?;
    ready()?;
    worker.serve()
}

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared, number: u16) -> Result<Self> {
        let info = &shared.char_device.info;
        // With a thread per queue, or fewer, queues stay whole: older drivers want that.
        let mine = |queue: u16, tag: u16| {
            let at = if shared.threads > info.nr_hw_queues { queue * info.queue_depth + tag } else { queue };
            at % shared.threads == number
        };
        let tags = (0..info.nr_hw_queues).flat_map(|queue| (0..info.queue_depth).map(move |tag| (queue, tag)));
        let tags: Vec<_> = tags.filter(|&(queue, tag)| mine(queue, tag)).collect();
        let memory = if shared.data.has_buffers() { buffers(tags.len())? } else { 0 };
        let slots: Vec<_> = tags
            .into_iter()
            .enumerate()
            .map(|(at, (queue, tag))| {
                let buffer = if memory == 0 { 0 } else { memory + at as u64 * u64::from(MAX_IO) };
                Slot { queue, tag, buffer, result: 0 }
            })
            .collect();
        let ring = IoRing::builder().build((slots.len() as u32 * 2).next_power_of_two()).context("no ring")?;
        if shared.data.flags() & (UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG) != 0 {
            ring.submitter().register_buffers_sparse(slots.len() as u32).context("no table of buffers")?;
        }
        let dice = u32::from(number) ^ std::process::id();
        Ok(Worker { shared, ring, slots, in_hand: 0, leaving: false, dice })
    }

    /// Lends all tags to the driver.
    fn fetch(&mut self) -> Result<()> {
        for slot in 0..self.slots.len() {
            let one_by_one = self.shared.about_to_fetch(1);
            self.command(UBLK_U_IO_FETCH_REQ, slot, -1)?;
            if one_by_one {
                self.ring.submit()?;
            }
        }
        self.ring.submit()?;
        Ok(())
    }

    fn serve(&mut self) -> Result<()> {
        while !self.leaving || self.in_hand > 0 {
            enter(&mut self.ring)?;
            let completions: Vec<_> = self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result())).collect();
            for (user_data, result) in completions {
                self.complete(user_data & KIND, (user_data & !KIND) as usize, result)?;
            }
        }
        // Commits of the last round.
        self.ring.submit()?;
        Ok(())
    }

    fn complete(&mut self, kind: u64, slot: usize, result: i32) -> Result<()> {
        match (kind, result) {
            (COMMAND, UBLK_IO_RES_OK) => self.request(slot),
            (COMMAND, UBLK_IO_RES_NEED_GET_DATA) => self.command(UBLK_U_IO_NEED_GET_DATA, slot, -1),
            (COMMAND, UBLK_IO_RES_ABORT) => {
                self.leaving = true;
                Ok(())
            }
            (REGISTER, 0) => self.transfer(slot),
            (MOVE, _) => {
                self.slots[slot].result = result;
                if self.registers_itself(slot) {
                    self.register(UBLK_U_IO_UNREGISTER_IO_BUF, UNREGISTER, slot)
                } else {
                    self.commit(slot)
                }
            }
            (UNREGISTER, 0) => self.commit(slot),
            _ => bail!(
                "completion {result} of kind {}, queue {} tag {}",
                kind >> 32,
                self.slots[slot].queue,
                self.slots[slot].tag
            ),
        }
    }

    fn wish(&self, slot: usize) -> Wish {
        self.shared.char_device.wish(self.slots[slot].queue, self.slots[slot].tag)
    }

    fn request(&mut self, slot: usize) -> Result<()> {
        self.in_hand += 1;
        let wish = self.wish(slot);
        if wish.op == UBLK_IO_OP_WRITE {
            self.shared.store.count(wish.offset);
        }
        self.shared.dawdle(&mut self.dice);
        let place = match wish.op {
            UBLK_IO_OP_READ | UBLK_IO_OP_WRITE => self.shared.store.place(wish.offset, wish.length),
            UBLK_IO_OP_FLUSH => {
                self.slots[slot].result = 0;
                return self.commit(slot);
            }
            op => bail!("operation {op} was not offered"),
        };
        let Some(place) = place else { bail!("{wish:?} is beyond the end of the disk") };
        let Slot { queue, tag, buffer, .. } = self.slots[slot];
        self.slots[slot].result = match self.shared.data {
            _ if self.shared.loses(wish, self.dice) => wish.length as i32,
            Data::Copy | Data::GetData => {
                // SAFETY: the buffer has room for the largest request, and nothing else uses it now. The block
                // layer may write to the same place through another tag: that is as it is with disks.
                unsafe { copy(wish, place, buffer as *mut u8) }
            }
            Data::UserCopy => self.shared.char_device.user_copy(queue, tag, wish.op, place, wish.length),
            _ if self.registers_itself(slot) => return self.register(UBLK_U_IO_REGISTER_IO_BUF, REGISTER, slot),
            _ => return self.transfer(slot),
        };
        self.commit(slot)
    }

    /// Whether this request's buffer is the server's to register.
    fn registers_itself(&self, slot: usize) -> bool {
        self.shared.data == Data::ZeroCopy || self.wish(slot).flags & UBLK_IO_F_NEED_REG_BUF != 0
    }

    fn register(&mut self, op: u32, kind: u64, slot: usize) -> Result<()> {
        let Slot { queue, tag, .. } = self.slots[slot];
        let entry = Command {
            fd: self.shared.char_device.fd(),
            op,
            user_data: kind | slot as u64,
            payload: io_payload(queue, tag, 0, slot as u64),
            ..Command::default()
        };
        push(&mut self.ring, &entry.entry())?;
        Ok(())
    }

    /// Between the store and the registered buffer.
    fn transfer(&mut self, slot: usize) -> Result<()> {
        let entry = transfer(self.wish(slot), self.shared.store.fd(), slot as u16).user_data(MOVE | slot as u64);
        push(&mut self.ring, &entry)?;
        Ok(())
    }

    fn commit(&mut self, slot: usize) -> Result<()> {
        self.in_hand -= 1;
        self.command(UBLK_U_IO_COMMIT_AND_FETCH_REQ, slot, self.slots[slot].result)
    }

    fn command(&mut self, op: u32, slot: usize, result: i32) -> Result<()> {
        let Slot { queue, tag, buffer, .. } = self.slots[slot];
        let fallback = self.shared.data == Data::AutoFallback;
        let registration = match self.shared.data {
            Data::Auto | Data::AutoFallback => {
                let index = if fallback && tag % 2 == 1 { NOWHERE } else { slot as u16 };
                let flags = if fallback { UBLK_AUTO_BUF_REG_FALLBACK } else { 0 };
                u64::from(index) | u64::from(flags) << 16
            }
            _ => 0,
        };
        let entry = Command {
            fd: self.shared.char_device.fd(),
            op,
            addr: registration,
            user_data: COMMAND | slot as u64,
            payload: io_payload(queue, tag, result, buffer),
            ..Command::default()
        };
        push(&mut self.ring, &entry.entry())?;
        Ok(())
    }
}

/// Memory for the requests of so many tags, until the process ends.
pub(super) fn buffers(tags: usize) -> Result<u64> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping, wherever the kernel wants it.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), tags * MAX_IO as usize, prot, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("no memory for buffers");
    }
    Ok(memory as u64)
}

/// Carries a request out between a place of the store and a buffer; the result to commit.
///
/// # Safety
///
/// Both have `wish.length` bytes, and the buffer is the caller's.
pub(super) unsafe fn copy(wish: Wish, place: *mut u8, buffer: *mut u8) -> i32 {
    // SAFETY: as the caller promises.
    unsafe {
        if wish.op == UBLK_IO_OP_READ {
            std::ptr::copy_nonoverlapping(place, buffer, wish.length);
        } else {
            std::ptr::copy_nonoverlapping(buffer, place, wish.length);
        }
    }
    wish.length as i32
}

/// The same by the kernel, with a registered buffer, whose addresses begin at 0.
pub(super) fn transfer(wish: Wish, store: i32, index: u16) -> io_uring::squeue::Entry {
    let file = types::Fd(store);
    let length = wish.length as u32;
    if wish.op == UBLK_IO_OP_READ {
        opcode::ReadFixed::new(file, std::ptr::null_mut(), length, index).offset(wish.offset).build()
    } else {
        opcode::WriteFixed::new(file, std::ptr::null(), length, index).offset(wish.offset).build()
    }
}

/// Returns the payload of a command on one tag.
fn io_payload(q_id: u16, tag: u16, result: i32, addr: u64) -> [u8; 16] {
    payload(&ublksrv_io_cmd { q_id, tag, result, anon_1: ublksrv_io_cmd_addr { addr } })
}
