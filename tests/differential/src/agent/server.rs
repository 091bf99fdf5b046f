// SPDX-License-Identifier: MIT OR Apache-2.0

//! A thread that serves a device exactly as ordered, right or wrong.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use io_uring::types::BufRingEntry;

use super::memory::Memory;
use super::worker::{last_errno, negative, outcome};
use super::{Address, Answer, Autopilot, IoOrder, Order, wait_readable};
use crate::pattern::{checksum, fill};
use crate::ring::{Cqe, MORE, READ_FIXED, Ring, Sqe, URING_CMD, WRITE_FIXED};
use crate::userdata::{Kind, UserData};
use ublk_test_common::uapi::{
    Plain, UBLK_IO_OP_FLUSH, UBLK_IO_OP_READ, UBLK_IO_OP_WRITE, UBLK_U_IO_COMMIT_AND_FETCH_REQ,
    UBLK_U_IO_NEED_GET_DATA, ublksrv_io_cmd, ublksrv_io_desc,
};

/// Entries of a thread's submission queue.
const ENTRIES: u32 = 256;
/// Room for the array of a batch command.
const ELEMENTS: usize = 1 << 14;
/// `IORING_CQE_F_BUFFER`
const SELECTED: u32 = 1;
/// Commands that wait for nothing complete well within this.
const PROMPT: Duration = Duration::from_secs(5);

/// Descriptors of one queue.
#[derive(Debug, Clone, Copy)]
struct Map {
    at: usize,
    len: usize,
    stride: usize,
}

/// What the threads of a server have in common.
#[derive(Debug, Default)]
pub(super) struct Shared(Mutex<Common>);

#[derive(Debug, Default)]
struct Common {
    char_device: Option<File>,
    maps: HashMap<u16, Map>,
    arena: Option<(Memory, usize)>,
    /// A file for data on its way to and from registered buffers.
    file: Option<File>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Common> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Common {
    fn char_fd(&self) -> RawFd {
        self.char_device.as_ref().map_or(-1, AsRawFd::as_raw_fd)
    }

    fn slot_address(&self, slot: usize) -> u64 {
        self.arena.map_or(0, |(memory, size)| memory.address(slot * size))
    }

    fn slot(&self, slot: usize, len: usize) -> &mut [u8] {
        match &self.arena {
            Some((memory, size)) => memory.part(slot * size, len.min(*size)),
            None => &mut [],
        }
    }

    fn resolve(&self, address: Address) -> u64 {
        match address {
            Address::Plain(number) => number,
            Address::Buffer(slot) => self.slot_address(slot),
        }
    }

    fn descriptor(&self, queue: u16, tag: u16) -> Option<ublksrv_io_desc> {
        let map = self.maps.get(&queue)?;
        let offset = usize::from(tag) * map.stride;
        if offset + size_of::<ublksrv_io_desc>() > map.len {
            return None;
        }
        let at = (map.at + offset) as *const ublksrv_io_desc;
        // SAFETY: within a mapping that is unmapped only under the lock that is held; the kernel may
        // change it at any time, hence volatile.
        Some(unsafe { at.read_volatile() })
    }
}

/// Provided buffers.
#[derive(Debug)]
struct Provided {
    ring: Memory,
    buffers: Memory,
    count: u16,
    size: u32,
    tail: u16,
}

impl Provided {
    fn add(&mut self, buffer: u16) {
        let base = self.ring.address(0) as *mut BufRingEntry;
        let at = usize::from(self.tail & (self.count - 1));
        // SAFETY: the ring has `count` entries and is never unmapped; the entry behind the tail is ours.
        unsafe {
            let entry = &mut *base.add(at);
            entry.set_addr(self.buffers.address(usize::from(buffer) * self.size as usize));
            entry.set_len(self.size);
            entry.set_bid(buffer);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the tail's place in the ring, aligned for 16 bits, which the kernel only reads.
        let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(base).cast_mut()) };
        tail.store(self.tail, Ordering::Release);
    }
}

/// One thread of a server.
#[derive(Debug)]
pub(super) struct Server {
    event: RawFd,
    shared: Arc<Shared>,
    ring: Option<Ring>,
    provided: HashMap<u16, Provided>,
    autopilot: Option<Autopilot>,
    /// Completions that were not asked for yet.
    stash: Vec<(Cqe, Vec<u16>)>,
    elements: Option<Memory>,
}

impl Server {
    pub(super) fn new(event: RawFd, shared: Arc<Shared>) -> Self {
        Server {
            event,
            shared,
            ring: None,
            provided: HashMap::new(),
            autopilot: None,
            stash: Vec::new(),
            elements: None,
        }
    }

    pub(super) fn execute(&mut self, order: Order) -> io::Result<Answer> {
        let status = match order {
            Order::Arena { slots, size } => {
                self.shared.lock().arena = Some((Memory::new(slots * size)?, size));
                0
            }
            Order::OpenChar { id, patience } => self.open(id, Duration::from_millis(patience)),
            Order::CloseChar => {
                self.shared.lock().char_device = None;
                0
            }
            Order::OpenRing { wide } => {
                self.ring = Some(Ring::new(ENTRIES, wide, self.event)?);
                0
            }
            Order::CloseRing => {
                self.ring = None;
                self.provided.clear();
                self.autopilot = None;
                0
            }
            Order::Map { queue, len, offset, write, stride } => self.map(queue, len, offset, write, stride),
            Order::Unmap => self.unmap(),
            Order::Protect { queue } => {
                let common = self.shared.lock();
                match common.maps.get(&queue) {
                    // SAFETY: a mapping of ours; more rights do not harm it.
                    Some(map) => outcome(unsafe {
                        libc::mprotect(map.at as *mut _, map.len, libc::PROT_READ | libc::PROT_WRITE)
                    }),
                    None => -i64::from(libc::ENOENT),
                }
            }
            Order::Io(order) => return self.io(&order),
            Order::Collect => {
                self.reap();
                return Ok(Answer::Completions(std::mem::take(&mut self.stash)));
            }
            Order::Descriptor { queue, tag } => return Ok(self.descriptor(queue, tag)),
            Order::Fill { slot, len, position, salt } => {
                fill(self.shared.lock().slot(slot, len), position, salt);
                0
            }
            Order::FillZones { slot, first, zone_sectors, count } => {
                self.fill_zones(slot, first, zone_sectors, count);
                0
            }
            Order::Sum { slot, len } => i64::from(checksum(self.shared.lock().slot(slot, len))),
            Order::Transfer { slot, len, position, write } => self.transfer(slot, len, position, write),
            Order::Fixed { slot, index, len, into } => self.fixed(slot, index, len, into)?,
            Order::Table { count } => self.table(count),
            Order::Provide { group, count, size } => self.provide(group, count, size)?,
            Order::Autopilot(autopilot) => {
                self.autopilot = Some(autopilot);
                0
            }
            other => return Err(io::Error::other(format!("not an order for a server: {other:?}"))),
        };
        Ok(Answer::Status(status))
    }

    fn open(&mut self, id: u32, patience: Duration) -> i64 {
        let path = format!("/dev/ublkc{id}");
        let deadline = Instant::now() + patience;
        loop {
            match OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(&path) {
                Ok(file) => {
                    self.shared.lock().char_device = Some(file);
                    return 0;
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_micros(500));
                }
                Err(error) => return negative(&error),
            }
        }
    }

    fn map(&mut self, queue: u16, len: usize, offset: u64, write: bool, stride: usize) -> i64 {
        let mut common = self.shared.lock();
        let protection = if write { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let (fd, offset) = (common.char_fd(), offset as libc::off_t);
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, protection, libc::MAP_SHARED, fd, offset) };
        if at == libc::MAP_FAILED {
            return last_errno();
        }
        if let Some(old) = common.maps.insert(queue, Map { at: at as usize, len, stride }) {
            // SAFETY: nothing refers to the mapping that has just left the table.
            unsafe { libc::munmap(old.at as *mut _, old.len) };
        }
        0
    }

    fn unmap(&mut self) -> i64 {
        for (_, map) in self.shared.lock().maps.drain() {
            // SAFETY: nothing refers to a mapping that has left the table.
            unsafe { libc::munmap(map.at as *mut _, map.len) };
        }
        0
    }

    fn descriptor(&self, queue: u16, tag: u16) -> Answer {
        let common = self.shared.lock();
        match common.descriptor(queue, tag) {
            Some(found) => {
                let slot = common.arena.and_then(|(memory, size)| Some(memory.offset_of(found.addr)? / size));
                Answer::Descriptor {
                    op_flags: found.op_flags,
                    // SAFETY: both members of the union are 32 bits.
                    count: unsafe { found.anon_1.nr_sectors },
                    sector: found.start_sector,
                    addr: found.addr,
                    slot,
                }
            }
            None => Answer::Status(-i64::from(libc::ENOENT)),
        }
    }

    /// Takes the ring's completions over, and the tags that came in provided buffers.
    fn reap(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        for cqe in ring.take() {
            let mut tags = Vec::new();
            if cqe.flags & SELECTED != 0
                && let Some(provided) = self.provided.get_mut(&UserData(cqe.user_data).tag())
            {
                let buffer = (cqe.flags >> 16) as u16;
                let start = usize::from(buffer) * provided.size as usize;
                let bytes = provided.buffers.part(start, cqe.result.max(0) as usize);
                tags = bytes.chunks_exact(2).map(|pair| u16::from_ne_bytes([pair[0], pair[1]])).collect();
                provided.add(buffer);
            }
            self.stash.push((cqe, tags));
        }
    }

    fn io(&mut self, order: &IoOrder) -> io::Result<Answer> {
        let common = self.shared.lock();
        let mut payload = order.payload.clone();
        if let Some(addr) = order.addr {
            payload[8..16].copy_from_slice(&common.resolve(addr).to_ne_bytes());
        }
        let mut addr = order.sqe_addr;
        if let Some(elements) = &order.elements {
            let memory = match self.elements {
                Some(memory) => memory,
                None => *self.elements.insert(Memory::new(ELEMENTS)?),
            };
            let mut bytes = Vec::new();
            for (header, address) in &elements.list {
                bytes.extend_from_slice(header);
                if let Some(address) = address {
                    bytes.extend_from_slice(&common.resolve(*address).to_ne_bytes());
                }
            }
            bytes.truncate(ELEMENTS);
            addr = memory.put(elements.place, &bytes);
        }
        let sqe = Sqe {
            opcode: URING_CMD,
            flags: order.flags,
            fd: common.char_fd(),
            offset: u64::from(order.op),
            addr,
            op_flags: order.uring_flags,
            user_data: order.user_data,
            buffer: order.group,
            payload,
            ..Sqe::default()
        };
        drop(common);
        let Some(ring) = &mut self.ring else { return Err(io::Error::other("this thread has no ring")) };
        ring.submit(&sqe)?;
        self.wait_for(order.user_data, Duration::from_millis(order.patience))?;
        Ok(Answer::Completions(std::mem::take(&mut self.stash)))
    }

    /// Waits for the completion of one command; whether it came.
    fn wait_for(&mut self, user_data: u64, patience: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + patience;
        loop {
            self.reap();
            if self.stash.iter().any(|(cqe, _)| cqe.user_data == user_data) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            match &mut self.ring {
                Some(ring) => ring.wait(left)?,
                None => return Ok(false),
            }
        }
    }

    fn transfer(&mut self, slot: usize, len: usize, position: u64, write: bool) -> i64 {
        let (fd, at) = {
            let common = self.shared.lock();
            (common.char_fd(), common.slot_address(slot))
        };
        let (at, position) = (at as *mut libc::c_void, position as libc::off_t);
        // SAFETY: the kernel checks the range; the arena is never unmapped.
        outcome(unsafe { if write { libc::pwrite(fd, at, len, position) } else { libc::pread(fd, at, len, position) } }
            as i64)
    }

    /// Moves data between the arena and a registered buffer, by way of a file.
    fn fixed(&mut self, slot: usize, index: u16, len: u32, into: bool) -> io::Result<i64> {
        let (file, at) = {
            let mut common = self.shared.lock();
            if common.file.is_none() {
                // SAFETY: the name is a C string.
                let fd = unsafe { libc::memfd_create(c"differential".as_ptr(), libc::MFD_CLOEXEC) };
                if fd < 0 {
                    return Err(io::Error::last_os_error());
                }
                // SAFETY: the descriptor is fresh and ours.
                common.file = Some(unsafe { File::from_raw_fd(fd) });
            }
            (common.file.as_ref().map_or(-1, AsRawFd::as_raw_fd), common.slot_address(slot) as *mut libc::c_void)
        };
        // SAFETY: the slot is as long as the caller says, or the kernel refuses.
        if into && unsafe { libc::pwrite(file, at, len as usize, 0) } < 0 {
            return Ok(last_errno());
        }
        let user_data = UserData::new(Kind::Other, 0, 0, u32::MAX >> 8).0;
        let sqe = Sqe {
            opcode: if into { READ_FIXED } else { WRITE_FIXED },
            fd: file,
            len,
            buffer: index,
            user_data,
            ..Sqe::default()
        };
        let Some(ring) = &mut self.ring else { return Err(io::Error::other("this thread has no ring")) };
        ring.submit(&sqe)?;
        if !self.wait_for(user_data, PROMPT)? {
            return Ok(-i64::from(libc::ETIME));
        }
        let mut result = 0;
        self.stash.retain(|(cqe, _)| {
            if cqe.user_data == user_data {
                result = i64::from(cqe.result);
            }
            cqe.user_data != user_data
        });
        // SAFETY: as above.
        if !into && result > 0 && unsafe { libc::pread(file, at, len as usize, 0) } < 0 {
            return Ok(last_errno());
        }
        Ok(result)
    }

    fn table(&mut self, count: u32) -> i64 {
        match &self.ring {
            Some(ring) => ring.submitter().register_buffers_sparse(count).map_or_else(|e| negative(&e), |()| 0),
            None => -i64::from(libc::EBADF),
        }
    }

    fn provide(&mut self, group: u16, count: u16, size: u32) -> io::Result<i64> {
        let Some(ring) = &self.ring else { return Ok(-i64::from(libc::EBADF)) };
        let mut provided = Provided {
            ring: Memory::new(usize::from(count) * size_of::<BufRingEntry>())?,
            buffers: Memory::new(usize::from(count) * size as usize)?,
            count,
            size,
            tail: 0,
        };
        let (submitter, at) = (ring.submitter(), provided.ring.address(0));
        // SAFETY: the memory is as long as the count says and is never unmapped.
        if let Err(error) = unsafe { submitter.register_buf_ring_with_flags(at, count, group, 0) } {
            return Ok(negative(&error));
        }
        for buffer in 0..count {
            provided.add(buffer);
        }
        self.provided.insert(group, provided);
        Ok(0)
    }

    /// Zones as a new disk has them: sequential ones, empty.
    fn fill_zones(&mut self, slot: usize, first: u64, zone_sectors: u64, count: u32) {
        const ZONE: usize = 64;
        let common = self.shared.lock();
        let bytes = common.slot(slot, count as usize * ZONE);
        bytes.fill(0);
        for (number, zone) in (first..).zip(bytes.chunks_exact_mut(ZONE)) {
            let start = number * zone_sectors;
            zone[0..8].copy_from_slice(&start.to_ne_bytes());
            zone[8..16].copy_from_slice(&zone_sectors.to_ne_bytes());
            zone[16..24].copy_from_slice(&start.to_ne_bytes());
            // BLK_ZONE_TYPE_SEQWRITE_REQ, BLK_ZONE_COND_EMPTY
            zone[24] = 2;
            zone[25] = 1;
            // capacity
            zone[32..40].copy_from_slice(&zone_sectors.to_ne_bytes());
        }
    }

    pub(super) fn on_autopilot(&self) -> bool {
        self.autopilot.is_some() && self.ring.is_some()
    }

    /// Answers requests until there is an order.
    pub(super) fn serve(&mut self, orders: RawFd) {
        loop {
            let (Some(autopilot), Some(ring)) = (self.autopilot.clone(), &self.ring) else { return };
            match wait_readable(&[orders, ring.as_raw_fd()], Duration::from_secs(60)) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(_) => return,
            }
            if wait_readable(&[orders], Duration::ZERO).unwrap_or(true) {
                return;
            }
            self.reap();
            for (cqe, _) in std::mem::take(&mut self.stash) {
                let from = UserData(cqe.user_data);
                if cqe.result < 0 || cqe.flags & MORE != 0 || from.kind() != Some(Kind::Tag) {
                    continue;
                }
                if self.answer(&autopilot, from, cqe.result).is_err() {
                    return;
                }
            }
        }
    }

    fn answer(&mut self, autopilot: &Autopilot, from: UserData, result: i32) -> io::Result<()> {
        let (queue, tag) = (from.queue(), from.tag());
        let slot = usize::from(queue) * usize::from(autopilot.depth) + usize::from(tag);
        let (fd, length, op, addr) = {
            let common = self.shared.lock();
            let Some(found) = common.descriptor(queue, tag) else { return Ok(()) };
            let op = (found.op_flags & 0xff) as u8;
            // SAFETY: both members of the union are 32 bits.
            let length = unsafe { found.anon_1.nr_sectors } << 9;
            if op == UBLK_IO_OP_READ {
                common.slot(slot, length as usize).fill(0);
            }
            let addr = if autopilot.buffers { common.slot_address(slot) } else { 0 };
            (common.char_fd(), length, op, addr)
        };
        let data = matches!(op, UBLK_IO_OP_READ | UBLK_IO_OP_WRITE) && op != UBLK_IO_OP_FLUSH;
        let mut command =
            ublksrv_io_cmd { q_id: queue, tag, result: if data { length as i32 } else { 0 }, ..Default::default() };
        command.anon_1.addr = addr;
        let op = if result == ublk_test_common::uapi::UBLK_IO_RES_NEED_GET_DATA {
            UBLK_U_IO_NEED_GET_DATA
        } else {
            UBLK_U_IO_COMMIT_AND_FETCH_REQ
        };
        let sqe = Sqe {
            opcode: URING_CMD,
            fd,
            offset: u64::from(op),
            user_data: from.0,
            payload: command.bytes(),
            ..Sqe::default()
        };
        match &mut self.ring {
            Some(ring) => ring.submit(&sqe),
            None => Ok(()),
        }
    }
}
