// SPDX-License-Identifier: MIT OR Apache-2.0

//! Servers: their start, the commands that fetch, and their end.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{PATIENCE, Sequence, Server, State, Tag, number};
use crate::agent::{Address, Agent, Answer, Autopilot, Elements, Identity, IoOrder, Order, Place};
use crate::ring::{BUFFER_SELECT, Cqe, MULTISHOT};
use crate::userdata::{Kind, UserData};
use ublk_test_common::uapi::*;

/// Places in a ring's table of registered buffers.
const TABLE: u32 = 64;
/// Group of the provided buffers.
const GROUP: u16 = 5;

/// A FETCH_REQ or COMMIT_AND_FETCH_REQ.
#[derive(Debug, Clone)]
pub(super) struct TagCommand {
    pub(super) name: &'static str,
    pub(super) op: u32,
    pub(super) case: String,
    pub(super) queue: u16,
    pub(super) tag: u16,
    pub(super) thread: usize,
    pub(super) result: i32,
    pub(super) addr: Address,
    pub(super) sqe_addr: u64,
    /// Arguments in words.
    pub(super) said: String,
}

impl Sequence<'_> {
    /// A new server: its process, its memory, its rings, the char device. The errno of open.
    pub(super) fn start_server(&mut self, threads: usize) -> Result<i64> {
        let device = self.device()?.clone();
        let identity = if device.owned { Identity::User } else { Identity::Root };
        let context = self.context();
        let mut agent = Agent::start(identity, threads, &[])?;
        let size = (device.buffer as usize).clamp(4096, 1 << 20);
        agent.status(0, &Order::Arena { slots: device.slots(), size })?;
        // A server before may not have been released yet.
        let patience = if self.aftermath { PATIENCE.as_millis() as u64 } else { 0 };
        let open = agent.status(0, &Order::OpenChar { id: device.id, patience })?;
        if open == 0 {
            self.aftermath = false;
        }
        let wide = self.random.chance(30);
        for thread in 0..threads {
            agent.status(thread, &Order::OpenRing { wide })?;
            agent.status(thread, &Order::Table { count: TABLE })?;
        }
        if open == 0 {
            self.server = Some(Server {
                agent,
                tags: vec![Tag::Idle; device.slots()],
                owner: vec![0; device.slots()],
                open: true,
                autopilot: false,
                fetching: vec![false; usize::from(device.queues)],
                starved: Vec::new(),
            });
            if let Some(device) = &mut self.device {
                device.stopping = false;
                device.quiesced = false;
            }
            self.no_aborts = false;
        }
        self.record("open", "ok", &context, &format!("threads={threads} wide={wide}"), number(open), String::new())?;
        Ok(open)
    }

    /// Maps the descriptors of all queues; on the way something is tried that must not work.
    pub(super) fn map_all(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        let stride = usize::from(device.stride);
        let len = (stride * usize::from(device.depth)).next_multiple_of(4096);
        let area = (stride * 4096).next_multiple_of(4096) as u64;
        if self.random.chance(25) {
            let (case, len, offset, write) = self.random.pick(&[
                ("length", len + 4096, 0, false),
                ("length-0", 0, 0, false),
                ("offset", len, 4096, false),
                ("offset-page", len, 1, false),
                ("queue", len, area * 4096, false),
                ("queue-absent", len, area * 2, false),
                ("write", len, 0, true),
                ("buffers", len, 0x8000_0000, false),
            ]);
            self.map("map", case, 0, len, offset, write, stride)?;
        }
        for queue in 0..device.queues {
            self.map("map", "ok", queue, len, area * u64::from(queue), false, stride)?;
        }
        if self.random.chance(8) {
            let context = self.context();
            let result = self.server()?.agent.status(0, &Order::Protect { queue: 0 })?;
            self.record("mprotect", "write", &context, "queue=0", number(result), String::new())?;
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    fn map(
        &mut self,
        command: &str,
        case: &str,
        queue: u16,
        len: usize,
        offset: u64,
        write: bool,
        stride: usize,
    ) -> Result<()> {
        let context = self.context();
        let order = Order::Map { queue: if case == "ok" { queue } else { u16::MAX }, len, offset, write, stride };
        let result = self.server()?.agent.status(0, &order)?;
        let said = format!("len={len} offset={offset:#x} write={write}");
        self.record(command, case, &context, &said, number(result), String::new())
    }

    /// Sends a command on the char device. Its own completion, unless it has none or brings a
    /// request; all others are taken in.
    pub(super) fn issue(&mut self, thread: usize, order: &IoOrder) -> Result<Option<Cqe>> {
        let answer = self.server()?.agent.order(thread, &Order::Io(order.clone()))?;
        let Answer::Completions(list) = answer else { bail!("a strange answer: {answer:?}") };
        let mut own = None;
        for (cqe, tags) in list {
            let kind = UserData(cqe.user_data).kind();
            if cqe.user_data == order.user_data && (cqe.result < 0 || kind == Some(Kind::Other)) {
                own = Some(cqe);
            } else {
                self.completed(cqe, &tags)?;
            }
        }
        Ok(own)
    }

    /// The address word for automatic registration of a tag's buffer.
    pub(super) fn auto_word(&self, slot: usize, fallback: bool) -> u64 {
        let flags = if fallback { u64::from(UBLK_AUTO_BUF_REG_FALLBACK) } else { 0 };
        (slot as u64 % u64::from(TABLE)) | flags << 16
    }

    /// A right command for a tag.
    pub(super) fn tag_command(
        &mut self,
        name: &'static str,
        queue: u16,
        tag: u16,
        thread: usize,
    ) -> Result<TagCommand> {
        let device = self.device()?.clone();
        let slot = device.slot(queue, tag);
        let op = match name {
            "FETCH_REQ" => UBLK_U_IO_FETCH_REQ,
            "COMMIT_AND_FETCH_REQ" => UBLK_U_IO_COMMIT_AND_FETCH_REQ,
            _ => UBLK_U_IO_NEED_GET_DATA,
        };
        let auto = device.has(UBLK_F_AUTO_BUF_REG);
        Ok(TagCommand {
            name,
            op: if self.random.chance(12) { op & 0xff } else { op },
            case: "ok".into(),
            queue,
            tag,
            thread,
            result: 0,
            addr: if device.copies() { Address::Buffer(slot) } else { Address::Plain(0) },
            sqe_addr: if auto { self.auto_word(slot, device.has(UBLK_F_SUPPORT_ZERO_COPY)) } else { 0 },
            said: String::new(),
        })
    }

    /// Sends a command for a tag and follows what it means. The errno, or 0 if it was accepted.
    pub(super) fn run_tag_command(&mut self, command: &TagCommand) -> Result<i32> {
        let serial = self.next_serial();
        let user_data = UserData::new(Kind::Tag, command.queue, command.tag, serial).0;
        let payload =
            ublksrv_io_cmd { q_id: command.queue, tag: command.tag, result: command.result, ..Default::default() };
        let slot = self.device()?.slot(command.queue, command.tag);
        let valid = command.tag < self.device()?.depth && command.queue < self.device()?.queues;
        let before = if valid { self.server()?.tags.get(slot).copied() } else { None };
        let fetch = command.op & 0xff == UBLK_IO_FETCH_REQ;
        let commit = command.op & 0xff == UBLK_IO_COMMIT_AND_FETCH_REQ;
        // A request may come with the very completion of the command.
        if let Some(tag) = self.server()?.tags.get_mut(slot)
            && valid
        {
            match before {
                Some(Tag::Held) if commit => *tag = Tag::Armed,
                Some(Tag::Idle) if fetch => *tag = Tag::Armed,
                _ => {}
            }
        }
        let held =
            self.requests.iter().position(|request| (request.queue, request.tag) == (command.queue, command.tag));
        let request = match (commit && before == Some(Tag::Held), held) {
            (true, Some(at)) => Some(self.requests.remove(at)),
            _ => None,
        };
        let order = IoOrder {
            op: command.op,
            flags: 0,
            uring_flags: 0,
            sqe_addr: command.sqe_addr,
            group: 0,
            user_data,
            payload: payload.bytes(),
            addr: Some(command.addr),
            elements: None,
            patience: 0,
        };
        let own = self.issue(command.thread, &order)?;
        let result = own.map_or(0, |cqe| cqe.result);
        if result < 0 {
            let gone = result == UBLK_IO_RES_ABORT && commit;
            if let Some(tag) = self.server()?.tags.get_mut(slot)
                && let Some(before) = before
            {
                *tag = if gone { Tag::Spent } else { before };
            }
            if let Some(request) = request.filter(|_| !gone) {
                self.requests.push(request);
                self.requests.sort();
            }
        } else {
            match request {
                Some(request) if request.registered => self.lingering.push(request),
                Some(request) => self.ended(&request),
                None => {}
            }
            if fetch && let Some(owner) = self.server()?.owner.get_mut(slot) {
                *owner = command.thread;
            }
        }
        Ok(result)
    }

    /// One FETCH_REQ, written down; what it sets off is not waited for.
    pub(super) fn fetch(&mut self, command: &TagCommand) -> Result<i32> {
        let context = self.context();
        let result = self.run_tag_command(command)?;
        let said =
            format!("op={:#x} q={} tag={} {}", command.op, command.queue as i16, command.tag as i16, command.said);
        let text = if result == 0 { "armed".to_owned() } else { number(result) };
        self.record(command.name, &command.case, &context, said.trim_end(), text, String::new())?;
        Ok(result)
    }

    /// Lends all tags to the driver that it does not have.
    pub(super) fn fetch_all(&mut self) -> Result<()> {
        if self.device()?.has(UBLK_F_BATCH_IO) {
            return self.prepare_all();
        }
        let device = self.device()?.clone();
        let threads = self.server()?.agent.threads();
        for queue in 0..device.queues {
            for tag in 0..device.depth {
                if self.server()?.tags[device.slot(queue, tag)] != Tag::Idle {
                    continue;
                }
                let thread = usize::from(queue + tag) % threads;
                let command = self.tag_command("FETCH_REQ", queue, tag, thread)?;
                if self.fetch(&command)? != 0 {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// FETCH_REQ of the next tag with something wrong in it.
    pub(super) fn stray_fetch(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        let next = self.server()?.tags.iter().position(|tag| *tag == Tag::Idle);
        let armed = self.server()?.tags.iter().position(|tag| *tag == Tag::Armed);
        let (queue, tag) = next.or(armed).map_or((0, 0), |slot| {
            ((slot / usize::from(device.depth)) as u16, (slot % usize::from(device.depth)) as u16)
        });
        let mut command = self.tag_command("FETCH_REQ", queue, tag, 0)?;
        command.case = self
            .random
            .pick(&[
                "queue",
                "tag",
                "addr-flip",
                "auto-reserved",
                "auto-flags",
                "type-byte",
                "twice",
                "unknown",
                "batch",
                "commit-idle",
                "get-data-idle",
                "register-idle",
                "unregister-idle",
            ])
            .to_owned();
        match command.case.as_str() {
            "queue" => command.queue = self.random.pick(&[device.queues, 4096, u16::MAX]),
            "tag" => command.tag = self.random.pick(&[device.depth, 4096, u16::MAX]),
            "addr-flip" => {
                command.addr = match command.addr {
                    Address::Plain(0) => Address::Plain(0x1000),
                    _ => Address::Plain(0),
                };
                // Where an address may be left out, this would be a right command.
                if device.has(UBLK_F_NEED_GET_DATA) || device.has(UBLK_F_BATCH_IO) {
                    command.queue = u16::MAX;
                }
            }
            "auto-reserved" => {
                command.sqe_addr |= self.random.pick(&[1 << 24, 1 << 32, 1 << 63]);
                if !device.has(UBLK_F_AUTO_BUF_REG) {
                    command.tag = u16::MAX;
                }
            }
            "auto-flags" => {
                command.sqe_addr |= self.random.pick(&[2 << 16, 0x80 << 16]);
                if !device.has(UBLK_F_AUTO_BUF_REG) {
                    command.tag = u16::MAX;
                }
            }
            "type-byte" => command.op = command.op & !0xff00 | 0x7400,
            "twice" => {
                let Some(slot) = armed else { return Ok(()) };
                command.queue = (slot / usize::from(device.depth)) as u16;
                command.tag = (slot % usize::from(device.depth)) as u16;
                command.thread = self.server()?.owner[slot];
            }
            "unknown" => command.op = self.random.pick(&[0xc010_7528, 0xc010_753f, 0x2f, 0xc010_75ff]),
            "batch" => {
                command.op = self.random.pick(&[UBLK_U_IO_PREP_IO_CMDS, UBLK_U_IO_COMMIT_IO_CMDS]);
                if device.has(UBLK_F_BATCH_IO) {
                    // A batch command must have its elements.
                    command.op = UBLK_U_IO_FETCH_REQ;
                }
            }
            "commit-idle" => command.op = UBLK_U_IO_COMMIT_AND_FETCH_REQ,
            "get-data-idle" => command.op = UBLK_U_IO_NEED_GET_DATA,
            "register-idle" => command.op = UBLK_U_IO_REGISTER_IO_BUF,
            _ => command.op = UBLK_U_IO_UNREGISTER_IO_BUF,
        }
        if next.is_none() && command.op & 0xff == UBLK_IO_FETCH_REQ {
            command.case.push_str("-again");
        }
        let kind = command.case.clone();
        let settled = self.server()?.tags.clone();
        let result = self.fetch(&command)?;
        if result == 0 && !matches!(kind.as_str(), "auto-reserved" | "auto-flags") {
            // Accepted against expectation: the trace says so, and the model cannot follow.
            self.server()?.tags = settled;
            bail!("a wrong command was accepted: {kind}");
        }
        Ok(())
    }

    /// A batch command, whose completion comes at once: its result, and its arguments in words.
    pub(super) fn batch(&mut self, op: u32, io: ublk_batch_io, elements: Elements) -> Result<(i32, String)> {
        let serial = self.next_serial();
        let order = IoOrder {
            op,
            flags: 0,
            uring_flags: 0,
            sqe_addr: 0,
            group: 0,
            user_data: UserData::new(Kind::Other, 0, 0, serial).0,
            payload: io.bytes(),
            addr: None,
            elements: Some(elements),
            patience: PATIENCE.as_millis() as u64,
        };
        let threads = self.server()?.agent.threads();
        // Only a commit from the ring that the driver registered a buffer in takes it back.
        let thread = if self.device()?.has(UBLK_F_AUTO_BUF_REG) { 0 } else { self.random.index(threads) };
        let Some(cqe) = self.issue(thread, &order)? else { bail!("a batch command does not complete") };
        let said = format!("op={op:#x} q={} flags={} n={} bytes={}", io.q_id, io.flags, io.nr_elem, io.elem_bytes);
        Ok((cqe.result, said))
    }

    /// Flags and size of the elements of a right batch command.
    pub(super) fn batch_shape(&self) -> Result<(u16, u8)> {
        let device = self.device()?;
        Ok(if device.copies() {
            (UBLK_BATCH_F_HAS_BUF_ADDR, 16)
        } else if device.has(UBLK_F_AUTO_BUF_REG) && device.has(UBLK_F_SUPPORT_ZERO_COPY) {
            (UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK, 8)
        } else {
            (0, 8)
        })
    }

    /// A right element of a batch command.
    pub(super) fn element(&self, queue: u16, tag: u16, result: i32) -> Result<(Vec<u8>, Option<Address>)> {
        let device = self.device()?;
        let slot = device.slot(queue, tag);
        let index = if device.has(UBLK_F_AUTO_BUF_REG) { self.auto_word(slot, false) as u16 } else { 0 };
        let header = ublk_elem_header { tag, buf_index: index, result };
        Ok((header.bytes(), device.copies().then_some(Address::Buffer(slot))))
    }

    fn prepare_all(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        let (flags, elem_bytes) = self.batch_shape()?;
        for queue in 0..device.queues {
            let idle: Vec<u16> = (0..device.depth)
                .filter(|tag| self.server.as_ref().is_some_and(|s| s.tags[device.slot(queue, *tag)] == Tag::Idle))
                .collect();
            if idle.is_empty() {
                continue;
            }
            if self.random.chance(30) {
                self.stray_prepare(queue, &idle)?;
            }
            let list = idle.iter().map(|tag| self.element(queue, *tag, 0)).collect::<Result<Vec<_>>>()?;
            let io = ublk_batch_io { q_id: queue, flags, nr_elem: idle.len() as u16, elem_bytes, ..Default::default() };
            let elements = Elements { place: Place::Tight, list };
            let context = self.context();
            let (result, said) = self.batch(UBLK_U_IO_PREP_IO_CMDS, io, elements)?;
            self.record("PREP_IO_CMDS", "ok", &context, &said, number(result), String::new())?;
            if result < 0 {
                return Ok(());
            }
            for tag in idle {
                let slot = device.slot(queue, tag);
                self.server()?.tags[slot] = Tag::Armed;
            }
            self.fetch_tags(queue)?;
        }
        Ok(())
    }

    /// PREP_IO_CMDS with something wrong in it.
    fn stray_prepare(&mut self, queue: u16, idle: &[u16]) -> Result<()> {
        let device = self.device()?.clone();
        let (flags, elem_bytes) = self.batch_shape()?;
        let mut io = ublk_batch_io { q_id: queue, flags, nr_elem: idle.len() as u16, elem_bytes, ..Default::default() };
        let mut elements = Elements {
            place: Place::Tight,
            list: idle.iter().map(|tag| self.element(queue, *tag, 0)).collect::<Result<Vec<_>>>()?,
        };
        let mut op = UBLK_U_IO_PREP_IO_CMDS;
        let case = self.random.pick(&[
            "queue",
            "flags",
            "elem-bytes",
            "too-many",
            "tag",
            "twice",
            "fault",
            "nowhere",
            "op",
            "buf-flag",
            "zone-flag",
            "fallback-flag",
            "legacy",
        ]);
        match case {
            "queue" => io.q_id = self.random.pick(&[device.queues, u16::MAX]),
            "flags" => io.flags |= self.random.pick(&[8, 0x8000]),
            "elem-bytes" => io.elem_bytes = self.random.pick(&[0, 1, 7, elem_bytes ^ 24, 32, 255]),
            "too-many" => io.nr_elem = device.depth + 1,
            "tag" => elements.list[0].0[..2].copy_from_slice(&device.depth.to_ne_bytes()),
            "twice" => {
                if elements.list.len() < 2 {
                    return Ok(());
                }
                elements.list[1] = elements.list[0].clone();
            }
            "fault" => elements.place = Place::Fault,
            "nowhere" => elements.place = Place::Nowhere,
            "op" => op ^= self.random.pick(&[1 << 30, 1 << 16]),
            "legacy" => op &= 0xff,
            "buf-flag" => io.flags ^= UBLK_BATCH_F_HAS_BUF_ADDR,
            "zone-flag" => {
                io.flags |= UBLK_BATCH_F_HAS_ZONE_LBA;
                io.elem_bytes = self.random.pick(&[elem_bytes, elem_bytes + 8]);
                if device.has(UBLK_F_ZONED) {
                    io.q_id = u16::MAX;
                }
            }
            _ => {
                io.flags |= UBLK_BATCH_F_AUTO_BUF_REG_FALLBACK;
                if device.has(UBLK_F_AUTO_BUF_REG) {
                    io.elem_bytes = 9;
                }
            }
        }
        let context = self.context();
        let (result, said) = self.batch(op, io, elements)?;
        self.record("PREP_IO_CMDS", case, &context, &said, number(result), String::new())?;
        if result >= 0 {
            bail!("a wrong PREP_IO_CMDS was accepted: {case}");
        }
        Ok(())
    }

    /// FETCH_IO_CMDS for a queue.
    pub(super) fn fetch_tags(&mut self, queue: u16) -> Result<()> {
        let group = GROUP + queue;
        let context = self.context();
        // Enough for all tags: when the driver runs out of buffers would be chance.
        let count = self.random.pick(&[8u16, 16, 32]);
        let result = self.server()?.agent.status(0, &Order::Provide { group, count, size: 256 })?;
        self.record("provide", "ok", &context, &format!("group={group} count={count}"), number(result), String::new())?;
        if self.random.chance(25) {
            match self.random.index(4) {
                0 => self.fetch_tags_with("elem-bytes", queue, group, MULTISHOT, 8, BUFFER_SELECT)?,
                1 => self.fetch_tags_with("single", queue, group, 0, 2, BUFFER_SELECT)?,
                2 => self.fetch_tags_with("no-select", queue, group, MULTISHOT, 2, 0)?,
                _ => self.fetch_tags_with("queue", 77, group, MULTISHOT, 2, BUFFER_SELECT)?,
            }
        }
        let zoned = self.device()?.has(UBLK_F_ZONED);
        if self.random.chance(12) && !zoned {
            // Which queue is asked for zones is chance. Nothing is wrong until there is a request; then it ends, and the right one follows.
            return self.fetch_tags_with("no-group", queue, 99, MULTISHOT, 2, BUFFER_SELECT);
        }
        self.feed(queue)
    }

    /// FETCH_IO_CMDS that has buffers.
    pub(super) fn feed(&mut self, queue: u16) -> Result<()> {
        self.fetch_tags_with("ok", queue, GROUP + queue, MULTISHOT, 2, BUFFER_SELECT)
    }

    fn fetch_tags_with(
        &mut self,
        case: &str,
        queue: u16,
        group: u16,
        uring_flags: u32,
        elem_bytes: u8,
        flags: u8,
    ) -> Result<()> {
        let context = self.context();
        let serial = self.next_serial();
        let io = ublk_batch_io { q_id: queue, elem_bytes, ..Default::default() };
        let order = IoOrder {
            op: UBLK_U_IO_FETCH_IO_CMDS,
            flags,
            uring_flags,
            sqe_addr: 0,
            group,
            user_data: UserData::new(Kind::Multishot, queue, group, serial).0,
            payload: io.bytes(),
            addr: None,
            elements: None,
            patience: 0,
        };
        let result = match self.issue(0, &order)? {
            Some(cqe) => number(cqe.result),
            None => {
                if let Some(fetching) = self.server()?.fetching.get_mut(usize::from(queue)) {
                    *fetching = true;
                }
                "armed".into()
            }
        };
        let said = format!("q={queue} group={group} bytes={elem_bytes} uring_flags={uring_flags} flags={flags}");
        self.record("FETCH_IO_CMDS", case, &context, &said, result, String::new())
    }

    /// From now on the server answers by itself.
    pub(super) fn engage_autopilot(&mut self) -> Result<()> {
        let depth = self.device()?.depth;
        let server = self.server()?;
        server.autopilot = true;
        for thread in 0..server.agent.threads() {
            server.agent.status(thread, &Order::Autopilot(Autopilot { depth, buffers: true }))?;
        }
        Ok(())
    }

    /// The server ends: by a signal, or by giving back all it has.
    pub(super) fn end_server(&mut self, how: &str) -> Result<()> {
        let context = self.context();
        let Some(mut server) = self.server.take() else { return Ok(()) };
        if how == "close" {
            for thread in 0..server.agent.threads() {
                server.agent.status(thread, &Order::CloseRing)?;
            }
            server.agent.status(0, &Order::Unmap)?;
            server.agent.status(0, &Order::CloseChar)?;
        }
        server.agent.shoot();
        let reaped = server.agent.reap(PATIENCE + Duration::from_secs(4));
        drop(server);
        let held: Vec<_> = self.requests.drain(..).chain(self.lingering.drain(..)).collect();
        if self.device.as_ref().is_some_and(|device| !device.has(UBLK_F_USER_RECOVERY_REISSUE)) {
            // What the server held fails, also where other requests are kept for the next one.
            held.iter().for_each(|request| self.ended(request));
        }
        self.no_aborts = false;
        let mut state = String::new();
        if let Some(device) = &self.device
            && !self.over
        {
            let live = device.state == State::Live;
            self.aftermath = true;
            let now = if live { self.await_death()? } else { self.state()?.unwrap_or(State::Dead) };
            state = now.name().to_owned();
            let device = self.device_mut()?;
            device.state = now;
            device.stopping = false;
            device.quiesced = false;
        }
        self.settle()?;
        let events = self.take_events();
        let result = if reaped { "0" } else { "stuck" };
        self.record("end", how, &context, "", result, format!("{state} | {events}"))
    }
}
