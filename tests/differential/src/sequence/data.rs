// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests at the server: their data, by all ways that data can go, and their end.

use anyhow::{Result, bail};

use super::io::TagCommand;
use super::params::ZONE;
use super::{Request, Sequence, Tag, number};
use crate::agent::{Address, Elements, IoOrder, Order, Place};
use crate::userdata::{Kind, UserData};
use ublk_test_common::uapi::*;

/// How a request ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// All done.
    Full,
    /// Half of it done.
    Short,
    /// Nothing done, and no error.
    Zero,
    /// More done than asked for.
    More,
    /// An error.
    Error(i32),
}

/// The ways of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The driver copies.
    Buffer,
    /// pread and pwrite.
    UserCopy,
    /// REGISTER_IO_BUF
    Register,
    /// The driver has registered the buffer.
    Auto,
}

/// One in so many sequences has results that are less than the request.
const SHORT_EVERY: u64 = 5;

/// Errors that requests end with.
const ERRORS: &[i32] = &[
    -libc::EIO,
    -libc::EINVAL,
    -libc::ENOSPC,
    -libc::EOPNOTSUPP,
    -libc::ETIMEDOUT,
    -libc::EREMOTEIO,
    -libc::EILSEQ,
    -libc::ENODATA,
    -libc::EPERM,
    -4095,
    -5000,
];

/// A position for pread and pwrite.
fn position(queue: u16, tag: u16, offset: u64) -> u64 {
    UBLKSRV_IO_BUF_OFFSET + (u64::from(queue) << UBLK_QID_OFF | u64::from(tag) << UBLK_TAG_OFF | offset)
}

impl Sequence<'_> {
    /// A random end.
    pub(super) fn some_ending(&mut self) -> Ending {
        match self.random.below(100) {
            0..66 => Ending::Full,
            66..76 => Ending::Short,
            76..81 => Ending::Zero,
            81..86 => Ending::More,
            _ => Ending::Error(self.random.pick(ERRORS)),
        }
    }

    /// The thread that fetched the request's tag.
    fn owner_of(&mut self, request: &Request) -> Result<usize> {
        let slot = self.device()?.slot(request.queue, request.tag);
        Ok(self.server()?.owner.get(slot).copied().unwrap_or(0))
    }

    /// Results that Linux's driver takes for the whole end the comparison, so most sequences are without.
    fn tame(&self, request: &Request, ending: Ending) -> Result<Ending> {
        let told = request.op == UBLK_IO_OP_READ && self.device()?.copies();
        let wild = match ending {
            Ending::Short => !told,
            Ending::Zero => request.op == UBLK_IO_OP_WRITE,
            _ => false,
        };
        Ok(if wild && !self.number.is_multiple_of(SHORT_EVERY) { Ending::Full } else { ending })
    }

    /// Does what a server has to do for a request, and ends it.
    pub(super) fn answer(&mut self, request: &Request, ending: Ending) -> Result<()> {
        let ending = self.tame(request, ending)?;
        let slot = self.device()?.slot(request.queue, request.tag);
        if self.server()?.tags.get(slot) == Some(&Tag::Asking) {
            let thread = self.owner_of(request)?;
            let mut command = self.tag_command("NEED_GET_DATA", request.queue, request.tag, thread)?;
            if !self.quiet && self.random.chance(20) {
                command.op = UBLK_U_IO_COMMIT_AND_FETCH_REQ;
                command.name = "COMMIT_AND_FETCH_REQ";
                command.case = "asking".into();
                if self.finish(&command, request)? == 0 {
                    bail!("a commit was accepted instead of NEED_GET_DATA");
                }
                command = self.tag_command("NEED_GET_DATA", request.queue, request.tag, thread)?;
            }
            if self.finish(&command, request)? != 0 {
                return Ok(());
            }
        }
        let registered =
            if matches!(ending, Ending::Error(_)) && self.random.chance(70) { false } else { self.move_data(request)? };
        let bytes = request.bytes() as i32;
        let block = 1i32 << self.device()?.params.basic.logical_bs_shift.clamp(9, 12);
        let result = match ending {
            Ending::Full => bytes,
            Ending::Short => bytes / 2 / block * block,
            Ending::Zero => 0,
            Ending::More => self.random.pick(&[bytes.saturating_add(512), i32::MAX]),
            Ending::Error(error) => error,
        };
        let early = registered && self.random.chance(70);
        if early {
            self.unregister(request, "ok", "")?;
        } else if registered {
            for held in &mut self.requests {
                held.registered |= (held.queue, held.tag) == (request.queue, request.tag);
            }
        }
        self.commit(request, ending, result)?;
        if registered && !early {
            self.unregister(request, "late", &format!(" result={result}"))?;
        }
        Ok(())
    }

    /// The commit of a request.
    fn commit(&mut self, request: &Request, ending: Ending, result: i32) -> Result<()> {
        let case = match ending {
            Ending::Full => "full",
            Ending::Short => "short",
            Ending::Zero => "zero",
            Ending::More => "more",
            Ending::Error(_) => "error",
        };
        if self.device()?.has(UBLK_F_BATCH_IO) {
            return self.commit_batch(request, case, result);
        }
        let thread = self.owner_of(request)?;
        let mut command = self.tag_command("COMMIT_AND_FETCH_REQ", request.queue, request.tag, thread)?;
        command.case = case.into();
        command.result = result;
        if request.op == UBLK_IO_OP_ZONE_APPEND {
            command.addr = Address::Plain(request.sector + 8);
        }
        self.finish(&command, request).map(drop)
    }

    /// Sends a command for a held request, waits for what it sets off, and writes it down.
    fn finish(&mut self, command: &TagCommand, request: &Request) -> Result<i32> {
        let context = self.context();
        let result = self.run_tag_command(command)?;
        if !self.quiet {
            self.settle()?;
        }
        let events = self.take_events();
        let text = if result == 0 { "armed".to_owned() } else { number(result) };
        let said = format!("op={:#x} req={} result={} {}", command.op, request.place(), command.result, command.said);
        self.record(command.name, &command.case, &context, said.trim_end(), text, events)?;
        Ok(result)
    }

    fn commit_batch(&mut self, request: &Request, case: &str, result: i32) -> Result<()> {
        let context = self.context();
        let (flags, elem_bytes) = self.batch_shape()?;
        let device = self.device()?.clone();
        // Others of the queue may end with it, failed.
        let mut ended = vec![(request.clone(), result)];
        if !self.quiet && self.random.chance(40) {
            let others = self.requests.iter().filter(|held| held.queue == request.queue && held.tag != request.tag);
            ended.extend(others.filter(|held| !held.registered).map(|held| (held.clone(), -libc::ENOSPC)));
        }
        let count = ended.len();
        let io = ublk_batch_io { q_id: request.queue, flags, nr_elem: count as u16, elem_bytes, ..Default::default() };
        let list = ended
            .iter()
            .map(|(held, result)| self.element(held.queue, held.tag, *result))
            .collect::<Result<Vec<_>>>()?;
        // Requests may come with the very completion of the command.
        let mut taken = Vec::new();
        for (held, _) in &ended {
            self.server()?.tags[device.slot(held.queue, held.tag)] = Tag::Armed;
            if let Some(at) = self.requests.iter().position(|other| (other.queue, other.tag) == (held.queue, held.tag))
            {
                taken.push(self.requests.remove(at));
            }
        }
        let (done, said) = self.batch(UBLK_U_IO_COMMIT_IO_CMDS, io, Elements { place: Place::Tight, list })?;
        // What was not consumed is still held.
        let consumed = usize::try_from(done).unwrap_or(0) / usize::from(elem_bytes);
        for (at, held) in taken.into_iter().enumerate() {
            if at >= consumed {
                self.server()?.tags[device.slot(held.queue, held.tag)] = Tag::Held;
                self.requests.push(held);
                self.requests.sort();
            } else if held.registered {
                self.lingering.push(held);
            } else {
                self.ended(&held);
            }
        }
        if !self.quiet {
            self.settle()?;
        }
        let events = self.take_events();
        let mut said = format!("{said} req={} result={result}", request.place());
        if request.op == UBLK_IO_OP_REPORT_ZONES {
            // Which queue it came by is chance.
            said = said.replace(&format!(" q={} ", request.queue), " ");
        }
        self.record("COMMIT_IO_CMDS", case, &context, &said, number(done), events)
    }

    /// Moves a request's data; whether its buffer is registered by hand now.
    fn move_data(&mut self, request: &Request) -> Result<bool> {
        if request.bytes() == 0 {
            return Ok(false);
        }
        let device = self.device()?.clone();
        let slot = device.slot(request.queue, request.tag);
        let mut ways = Vec::new();
        if device.copies() {
            ways.push(Way::Buffer);
        }
        if device.has(UBLK_F_USER_COPY) {
            ways.push(Way::UserCopy);
        }
        if device.has(UBLK_F_SUPPORT_ZERO_COPY) {
            ways.push(Way::Register);
        }
        let by_hand = request.op_flags & UBLK_IO_F_NEED_REG_BUF != 0;
        if device.has(UBLK_F_AUTO_BUF_REG) && !by_hand {
            ways.push(Way::Auto);
        }
        if ways.is_empty() {
            return Ok(false);
        }
        let way = self.random.pick(&ways);
        let len = request.bytes() as usize;
        if request.wants_data() {
            let order = if request.op == UBLK_IO_OP_REPORT_ZONES {
                let first = request.sector / u64::from(ZONE);
                Order::FillZones { slot, first, zone_sectors: u64::from(ZONE), count: request.count }
            } else {
                Order::Fill { slot, len, position: request.sector << 9, salt: self.salt }
            };
            self.server()?.agent.status(0, &order)?;
        }
        let mut registered = false;
        match way {
            Way::Buffer => {
                if request.brings_data() {
                    let context = self.context();
                    let sum = self.server()?.agent.status(0, &Order::Sum { slot, len })?;
                    self.record("data", "buffer", &context, &request.place(), format!("{sum:08x}"), String::new())?;
                }
                return Ok(false);
            }
            Way::UserCopy => {
                if !self.quiet && self.random.chance(25) {
                    self.stray_transfer(request)?;
                }
                self.transfer("ok", request, slot, len, position(request.queue, request.tag, 0), request.wants_data())?;
                return Ok(false);
            }
            Way::Register => {
                if !self.register(request, slot)? {
                    return Ok(false);
                }
                registered = true;
            }
            Way::Auto => {}
        }
        let context = self.context();
        // A registration belongs to the ring of the thread that fetched the tag, with batches to that
        // of the thread that fetches tags.
        let thread = if device.has(UBLK_F_BATCH_IO) { 0 } else { self.owner_of(request)? };
        let into = !request.wants_data();
        let index = self.auto_word(slot, false) as u16;
        // Where data comes in for the request, the file is filled first and read into the buffer.
        let order = Order::Fixed { slot, index: index + self.table_shift(way), len: len as u32, into: !into };
        let result = self.server()?.agent.status(thread, &order)?;
        let sum = if into && result > 0 { self.server()?.agent.status(0, &Order::Sum { slot, len })? } else { 0 };
        let name = if into { "write_fixed" } else { "read_fixed" };
        let case = if way == Way::Auto { "auto" } else { "registered" };
        self.record(name, case, &context, &request.place(), number(result), format!("sum={sum:08x}"))?;
        Ok(registered)
    }

    /// Indices of manual and of automatic registrations do not meet.
    fn table_shift(&self, way: Way) -> u16 {
        if way == Way::Register { 32 } else { 0 }
    }

    fn register(&mut self, request: &Request, slot: usize) -> Result<bool> {
        let index = (self.auto_word(slot, false) as u16 + self.table_shift(Way::Register)).into();
        if !self.quiet && self.random.chance(25) {
            let case = self.random.pick(&["index", "tag", "queue", "index-huge"]);
            let mut wrong = request.clone();
            let mut place = index;
            match case {
                "index" => place = 64,
                "index-huge" => place = u64::MAX,
                "tag" => wrong.tag = self.device()?.depth,
                _ => wrong.queue = self.device()?.queues,
            }
            self.buffer_command("REGISTER_IO_BUF", case, &wrong, request, place, "")?;
        }
        let result = self.buffer_command("REGISTER_IO_BUF", "ok", request, request, index, "")?;
        if result == 0 && !self.quiet && self.random.chance(15) {
            self.buffer_command("REGISTER_IO_BUF", "occupied", request, request, index, "")?;
        }
        Ok(result == 0)
    }

    fn unregister(&mut self, request: &Request, case: &str, said: &str) -> Result<()> {
        let slot = self.device()?.slot(request.queue, request.tag);
        let index = (self.auto_word(slot, false) as u16 + self.table_shift(Way::Register)).into();
        if !self.quiet && self.random.chance(15) {
            self.buffer_command("UNREGISTER_IO_BUF", "index", request, request, 63, "")?;
        }
        self.lingering
            .retain(|held| (held.queue, held.tag, held.sector) != (request.queue, request.tag, request.sector));
        self.buffer_command("UNREGISTER_IO_BUF", case, request, request, index, said).map(drop)
    }

    /// REGISTER_IO_BUF or UNREGISTER_IO_BUF.
    fn buffer_command(
        &mut self,
        name: &str,
        case: &str,
        target: &Request,
        request: &Request,
        index: u64,
        said: &str,
    ) -> Result<i32> {
        let context = self.context();
        let thread = if self.device()?.has(UBLK_F_BATCH_IO) { 0 } else { self.owner_of(request)? };
        let op = if name == "REGISTER_IO_BUF" { UBLK_U_IO_REGISTER_IO_BUF } else { UBLK_U_IO_UNREGISTER_IO_BUF };
        let serial = self.next_serial();
        let payload = ublksrv_io_cmd { q_id: target.queue, tag: target.tag, ..Default::default() };
        let order = IoOrder {
            op,
            flags: 0,
            uring_flags: 0,
            sqe_addr: 0,
            group: 0,
            user_data: UserData::new(Kind::Other, 0, 0, serial).0,
            payload: payload.bytes(),
            addr: Some(Address::Plain(index)),
            elements: None,
            patience: super::PATIENCE.as_millis() as u64,
        };
        let Some(cqe) = self.issue(thread, &order)? else { bail!("{name} does not complete") };
        if !self.quiet {
            self.settle()?;
        }
        let events = self.take_events();
        self.record(name, case, &context, &format!("{}{said}", request.place()), number(cqe.result), events)?;
        Ok(cqe.result)
    }

    fn transfer(
        &mut self,
        case: &str,
        request: &Request,
        slot: usize,
        len: usize,
        position: u64,
        write: bool,
    ) -> Result<()> {
        let context = self.context();
        let result = self.server()?.agent.status(0, &Order::Transfer { slot, len, position, write })?;
        let sum = if !write && result > 0 {
            self.server()?.agent.status(0, &Order::Sum { slot, len: result as usize })?
        } else {
            0
        };
        let name = if write { "pwrite" } else { "pread" };
        let said = format!("{} len={len}", request.place());
        self.record(name, case, &context, &said, number(result), format!("sum={sum:08x}"))
    }

    /// pread or pwrite where there is nothing, or in the wrong direction.
    fn stray_transfer(&mut self, request: &Request) -> Result<()> {
        let device = self.device()?.clone();
        let slot = device.slot(request.queue, request.tag);
        let len = request.bytes() as usize;
        let (queue, tag, write) = (request.queue, request.tag, request.wants_data());
        let case = self.random.pick(&[
            "direction",
            "queue",
            "tag",
            "end",
            "behind",
            "low",
            "integrity",
            "tail",
            "bit",
            "empty",
        ]);
        let (at, len, write) = match case {
            "direction" => (position(queue, tag, 0), len, !write),
            "queue" => (position(device.queues, tag, 0), len, write),
            "tag" => (position(queue, device.depth, 0), len, write),
            "end" => (position(queue, tag, len as u64), len, write),
            "behind" => (position(queue, tag, len as u64 + 512), len, write),
            "low" => (4096, len, write),
            "integrity" => (position(queue, tag, 0) | UBLKSRV_IO_INTEGRITY_FLAG, len, write),
            "tail" => (position(queue, tag, 512.min(len as u64 - 1)), len, write),
            "empty" => (position(queue, tag, 0), 0, write),
            _ => (position(queue, tag, 0) | 1 << 54, len, write),
        };
        self.transfer(case, request, slot, len, at, write)
    }

    /// A command about a held request that is wrong.
    pub(super) fn stray_commit(&mut self, request: &Request) -> Result<()> {
        let device = self.device()?.clone();
        if device.has(UBLK_F_BATCH_IO) {
            return self.stray_commit_batch(request);
        }
        let slot = device.slot(request.queue, request.tag);
        if self.server()?.tags.get(slot) != Some(&Tag::Held) {
            return Ok(());
        }
        let thread = self.owner_of(request)?;
        let mut command = self.tag_command("COMMIT_AND_FETCH_REQ", request.queue, request.tag, thread)?;
        command.result = request.bytes() as i32;
        let case = self.random.pick(&[
            "thread",
            "addr-flip",
            "queue",
            "tag",
            "armed",
            "fetch-held",
            "get-data",
            "auto-word",
            "type-byte",
            "number",
        ]);
        command.case = case.to_owned();
        match case {
            "thread" => {
                let threads = self.server()?.agent.threads();
                if threads == 1 {
                    return Ok(());
                }
                command.thread = (thread + 1) % threads;
            }
            "addr-flip" => {
                if command.addr == Address::Plain(0) && request.op != UBLK_IO_OP_ZONE_APPEND {
                    command.addr = Address::Plain(4096);
                } else if device.has(UBLK_F_NEED_GET_DATA) && !request.wants_data() {
                    return Ok(());
                } else {
                    command.addr = Address::Plain(0);
                }
                if request.op == UBLK_IO_OP_ZONE_APPEND {
                    return Ok(());
                }
            }
            "queue" => command.queue = device.queues,
            "tag" => command.tag = device.depth,
            "armed" => {
                let start = device.slot(request.queue, 0);
                let tags = &self.server()?.tags[start..start + usize::from(device.depth)];
                let Some(tag) = tags.iter().position(|tag| *tag == Tag::Armed) else { return Ok(()) };
                command.tag = tag as u16;
                command.thread = self.server()?.owner[start + tag];
            }
            "fetch-held" => command.op = UBLK_U_IO_FETCH_REQ,
            "get-data" => command.op = UBLK_U_IO_NEED_GET_DATA,
            "auto-word" => {
                if !device.has(UBLK_F_AUTO_BUF_REG) {
                    return Ok(());
                }
                command.sqe_addr |= self.random.pick(&[1 << 24, 1 << 40, 4 << 16]);
            }
            "type-byte" => command.op ^= 0x100,
            _ => command.op = 0xc010_753a,
        }
        if self.finish(&command, request)? == 0 {
            bail!("a wrong command was accepted: {case}");
        }
        Ok(())
    }

    fn stray_commit_batch(&mut self, request: &Request) -> Result<()> {
        let device = self.device()?.clone();
        let (flags, elem_bytes) = self.batch_shape()?;
        let mut io = ublk_batch_io { q_id: request.queue, flags, nr_elem: 1, elem_bytes, ..Default::default() };
        let mut op = UBLK_U_IO_COMMIT_IO_CMDS;
        let mut element = self.element(request.queue, request.tag, request.bytes() as i32)?;
        let mut place = Place::Tight;
        let case = self.random.pick(&[
            "queue",
            "tag",
            "armed",
            "flags",
            "elem-bytes",
            "too-many",
            "fault",
            "none",
            "op",
            "single",
        ]);
        match case {
            "queue" => io.q_id = device.queues,
            "tag" => element.0[..2].copy_from_slice(&device.depth.to_ne_bytes()),
            "armed" => {
                let start = device.slot(request.queue, 0);
                let tags = &self.server()?.tags[start..start + usize::from(device.depth)];
                let Some(tag) = tags.iter().position(|tag| *tag == Tag::Armed) else { return Ok(()) };
                element.0[..2].copy_from_slice(&(tag as u16).to_ne_bytes());
            }
            "flags" => io.flags |= 8,
            "elem-bytes" => io.elem_bytes = self.random.pick(&[0, 4, 9, 32]),
            "too-many" => io.nr_elem = device.depth + 1,
            "fault" => place = Place::Fault,
            "none" => io.nr_elem = 0,
            "op" => op ^= 1 << 16,
            _ => op = self.random.pick(&[UBLK_U_IO_COMMIT_AND_FETCH_REQ, UBLK_U_IO_FETCH_REQ, UBLK_U_IO_NEED_GET_DATA]),
        }
        let context = self.context();
        let (result, said) = self.batch(op, io, Elements { place, list: vec![element] })?;
        self.record("COMMIT_IO_CMDS", case, &context, &said, number(result), String::new())?;
        if result > 0 {
            bail!("a wrong COMMIT_IO_CMDS was accepted: {case}");
        }
        Ok(())
    }
}
