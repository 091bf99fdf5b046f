// SPDX-License-Identifier: MIT OR Apache-2.0

//! Control commands: how they are sent, what they change, and those that are sent for their own sake.

use std::time::Duration;

use anyhow::{Result, bail};

use super::{Device, PATIENCE, Sequence, State, Waiting, number};
use crate::agent::{Answer, ControlOrder, Order, Place, SHARED};
use ublk_test_common::uapi::*;

/// Milliseconds after which a command that should wait is taken to be waiting.
const GLANCE: u64 = 250;

/// The path that comes before the payload for devices of ordinary users.
#[derive(Debug, Clone)]
pub(super) enum DevicePath {
    /// The right one if the device needs one.
    AsNeeded,
    /// None.
    Missing,
    /// This one, with a length of its own.
    Other(String, u16),
}

/// A control command.
#[derive(Debug, Clone)]
pub(super) struct Command {
    pub(super) name: &'static str,
    pub(super) case: String,
    pub(super) op: u32,
    pub(super) user: bool,
    pub(super) narrow: bool,
    pub(super) dev_id: u32,
    pub(super) queue_id: u16,
    /// Of the payload without the path; its real length if not given.
    pub(super) len: Option<u16>,
    pub(super) data: u64,
    pub(super) path: DevicePath,
    pub(super) place: Place,
    pub(super) payload: Vec<u8>,
    /// The payload begins with an offset in the sender's shared memory, whose address takes its place.
    pub(super) shares: bool,
    /// It will wait for something that is not going to happen during this step.
    pub(super) waits: bool,
    /// If it waits, it is canceled at once.
    pub(super) cancels: bool,
    /// Arguments in words.
    pub(super) said: String,
}

/// All control commands, with their numbers.
pub(super) const COMMANDS: &[(&str, u32)] = &[
    ("GET_QUEUE_AFFINITY", UBLK_U_CMD_GET_QUEUE_AFFINITY),
    ("GET_DEV_INFO", UBLK_U_CMD_GET_DEV_INFO),
    ("GET_DEV_INFO2", UBLK_U_CMD_GET_DEV_INFO2),
    ("ADD_DEV", UBLK_U_CMD_ADD_DEV),
    ("DEL_DEV", UBLK_U_CMD_DEL_DEV),
    ("DEL_DEV_ASYNC", UBLK_U_CMD_DEL_DEV_ASYNC),
    ("START_DEV", UBLK_U_CMD_START_DEV),
    ("STOP_DEV", UBLK_U_CMD_STOP_DEV),
    ("TRY_STOP_DEV", UBLK_U_CMD_TRY_STOP_DEV),
    ("SET_PARAMS", UBLK_U_CMD_SET_PARAMS),
    ("GET_PARAMS", UBLK_U_CMD_GET_PARAMS),
    ("START_USER_RECOVERY", UBLK_U_CMD_START_USER_RECOVERY),
    ("END_USER_RECOVERY", UBLK_U_CMD_END_USER_RECOVERY),
    ("UPDATE_SIZE", UBLK_U_CMD_UPDATE_SIZE),
    ("QUIESCE_DEV", UBLK_U_CMD_QUIESCE_DEV),
    ("REG_BUF", UBLK_U_CMD_REG_BUF),
    ("UNREG_BUF", UBLK_U_CMD_UNREG_BUF),
    ("GET_FEATURES", UBLK_U_CMD_GET_FEATURES),
];

impl Command {
    /// A right command, but for its payload.
    pub(super) fn new(name: &'static str, dev_id: u32) -> Self {
        let op = COMMANDS.iter().find(|(known, _)| *known == name).map_or(0, |(_, op)| *op);
        Command {
            name,
            case: "ok".into(),
            op,
            user: false,
            narrow: false,
            dev_id,
            queue_id: u16::MAX,
            len: None,
            data: 0,
            path: DevicePath::AsNeeded,
            place: Place::Roomy,
            payload: Vec::new(),
            shares: false,
            waits: false,
            cancels: false,
            said: String::new(),
        }
    }

    pub(super) fn case(mut self, case: impl Into<String>) -> Self {
        self.case = case.into();
        self
    }

    pub(super) fn payload(mut self, payload: Vec<u8>) -> Self {
        self.payload = payload;
        self
    }

    pub(super) fn data(mut self, data: u64, said: impl Into<String>) -> Self {
        self.data = data;
        self.said = said.into();
        self
    }

    pub(super) fn user(mut self, user: bool) -> Self {
        self.user = user;
        self
    }
}

/// Words of a device's description.
fn describe_info(info: &ublksrv_ctrl_dev_info, server: Option<i32>) -> String {
    let pid = match info.ublksrv_pid {
        -1 => "none",
        pid if Some(pid) == server => "server",
        0 => "0",
        _ => "other",
    };
    format!(
        "queues={} depth={} state={} desc={} buf={} id={} pid={pid} flags={:#x} private={:#x} owner={}:{}",
        info.nr_hw_queues,
        info.queue_depth,
        info.state,
        info.io_desc_size,
        info.max_io_buf_bytes,
        info.dev_id,
        info.flags,
        info.ublksrv_flags,
        info.owner_uid,
        info.owner_gid
    )
}

/// Words of parameters. Majors and minors are the machine's business.
fn describe_params(bytes: &[u8]) -> String {
    let mut params = ublk_params::from_bytes(bytes);
    let devt = params.devt;
    params.devt = ublk_param_devt::default();
    let set = |number: u32| if number == 0 { '0' } else { '1' };
    let text: String = params.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{} devt={}{}", text.trim_end_matches('0'), set(devt.char_major), set(devt.disk_major))
}

impl Sequence<'_> {
    /// Sends a command, waits for what it sets off, and writes it down. `None`: it is pending.
    pub(super) fn control(&mut self, command: &Command) -> Result<Option<i32>> {
        let context = self.context();
        let answer = self.hand(command, if command.waits { GLANCE } else { PATIENCE.as_millis() as u64 })?;
        let Answer::Control { token, result: done, payload } = answer else { bail!("a strange answer: {answer:?}") };
        let path = self.skipped(command);
        let mut outputs = match done {
            Some(result) if result >= 0 => self.outputs(command, payload.get(path..).unwrap_or_default()),
            _ => String::new(),
        };
        match done {
            Some(result) => self.control_done(command.name, result)?,
            None => {
                let waiting = Waiting { name: command.name, user: command.user, token, given_up: !command.waits };
                self.waiting.push(waiting.clone());
                self.control_pending(command.name)?;
                if command.cancels {
                    self.cancel_waiting(&waiting)?;
                }
            }
        }
        if command.name == "ADD_DEV" && done == Some(0) {
            self.added(command, &payload)?;
        }
        self.settle()?;
        let events = self.take_events();
        if !events.is_empty() {
            outputs = format!("{outputs} | {events}");
        }
        let result = done.map_or_else(|| "pending".into(), number);
        self.record(command.name, &command.case, &context, &self.arguments(command), result, outputs)?;
        Ok(done)
    }

    /// Sends a command that is no part of the trace.
    pub(super) fn hand(&mut self, command: &Command, patience: u64) -> Result<Answer> {
        let path = self.path_of(command);
        let mut payload = Vec::new();
        let mut path_len = 0;
        if let Some((path, said)) = path {
            payload.extend_from_slice(&path);
            path_len = said;
        }
        let memory_at = command.shares.then_some(payload.len());
        payload.extend_from_slice(&command.payload);
        let len = command.len.unwrap_or(command.payload.len() as u16).wrapping_add(path_len);
        let order = ControlOrder {
            op: command.op,
            narrow: command.narrow,
            dev_id: command.dev_id,
            queue_id: command.queue_id,
            len,
            data: command.data,
            path_len,
            place: command.place,
            payload,
            memory_at,
            patience,
        };
        self.controller(command.user).order(0, &Order::Control(order))
    }

    /// Sends a command quietly; its result and payload.
    pub(super) fn quietly(&mut self, command: &Command) -> Result<(Option<i32>, Vec<u8>)> {
        let path = self.skipped(command);
        match self.hand(command, PATIENCE.as_millis() as u64)? {
            Answer::Control { token, result, payload } => {
                if result.is_none() {
                    self.waiting.push(Waiting { name: command.name, user: command.user, token, given_up: true });
                }
                Ok((result, payload.get(path..).unwrap_or_default().to_vec()))
            }
            other => bail!("a strange answer: {other:?}"),
        }
    }

    /// The path's bytes, and the length that is said of it.
    fn path_of(&self, command: &Command) -> Option<(Vec<u8>, u16)> {
        let bytes = |path: &str| {
            let mut bytes = path.as_bytes().to_vec();
            bytes.push(0);
            bytes
        };
        match &command.path {
            DevicePath::Missing => None,
            DevicePath::Other(path, said) => Some((bytes(path), *said)),
            DevicePath::AsNeeded => {
                let device = self.device.as_ref()?;
                let needs = device.owned || command.name == "GET_DEV_INFO2";
                if !needs || device.id != command.dev_id || matches!(command.name, "ADD_DEV" | "GET_FEATURES") {
                    return None;
                }
                let path = bytes(&format!("/dev/ublkc{}", device.id));
                let said = path.len() as u16;
                Some((path, said))
            }
        }
    }

    /// Bytes before the payload that the driver takes for a path.
    fn skipped(&self, command: &Command) -> usize {
        let owned = self.device.as_ref().is_some_and(|device| device.owned);
        match self.path_of(command) {
            Some((_, said)) if owned || command.name == "GET_DEV_INFO2" => usize::from(said),
            _ => 0,
        }
    }

    fn arguments(&self, command: &Command) -> String {
        let mut text = format!("op={:#x} dev={}", command.op, command.dev_id as i32);
        if command.user {
            text.push_str(" user");
        }
        if command.narrow {
            text.push_str(" narrow");
        }
        if command.queue_id != u16::MAX {
            text.push_str(&format!(" queue={}", command.queue_id));
        }
        if let Some(len) = command.len {
            text.push_str(&format!(" len={len}"));
        }
        if command.place != Place::Roomy {
            text.push_str(&format!(" {:?}", command.place));
        }
        match &command.path {
            DevicePath::AsNeeded => {}
            DevicePath::Missing => text.push_str(" path=none"),
            DevicePath::Other(path, said) => text.push_str(&format!(" path={path}:{said}")),
        }
        if !command.said.is_empty() {
            text.push(' ');
            text.push_str(&command.said);
        }
        text
    }

    fn outputs(&self, command: &Command, payload: &[u8]) -> String {
        let server = self.server.as_ref().map(|server| server.agent.pid());
        match command.name {
            "ADD_DEV" | "GET_DEV_INFO" | "GET_DEV_INFO2" => {
                describe_info(&ublksrv_ctrl_dev_info::from_bytes(payload), server)
            }
            "GET_PARAMS" => {
                let len = payload.get(..4).map_or(0, |b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
                format!("len={len} {}", describe_params(payload.get(..152).unwrap_or_default()))
            }
            "GET_QUEUE_AFFINITY" => {
                let len = usize::from(command.len.unwrap_or(8)).min(payload.len());
                format!("mask={:02x?}", &payload[..len]).replace(", ", "")
            }
            "GET_FEATURES" => {
                let bytes = payload.get(..8).unwrap_or_default();
                bytes.iter().rev().map(|byte| format!("{byte:02x}")).collect()
            }
            _ => String::new(),
        }
    }

    /// A device was made.
    fn added(&mut self, command: &Command, payload: &[u8]) -> Result<()> {
        let info = ublksrv_ctrl_dev_info::from_bytes(payload);
        if self.device.is_some() {
            // One too many: it is removed again, and the trace shows that it was made.
            let mut delete = Command::new("DEL_DEV", info.dev_id);
            delete.path = DevicePath::Other(format!("/dev/ublkc{}", info.dev_id), 0);
            self.quietly(&delete)?;
            return Ok(());
        }
        self.device = Some(Device {
            id: info.dev_id,
            flags: info.flags,
            queues: info.nr_hw_queues,
            depth: info.queue_depth,
            buffer: info.max_io_buf_bytes,
            stride: if info.io_desc_size == 0 { 24 } else { info.io_desc_size },
            state: State::Dead,
            params: ublk_params::default(),
            unsure: true,
            owned: info.flags & UBLK_F_UNPRIVILEGED_DEV != 0,
            stopping: false,
            quiesced: false,
            queue_of: [0; 2],
            unchecked: false,
        });
        for queue in 1..info.nr_hw_queues {
            self.learn_processors(queue)?;
        }
        if command.user && self.random.chance(92) {
            let path = format!("/dev/ublkc{}", info.dev_id);
            self.crew.root.status(0, &Order::Own(path))?;
        }
        Ok(())
    }

    /// Which processors' requests go to a queue.
    fn learn_processors(&mut self, queue: u16) -> Result<()> {
        let id = self.device()?.id;
        let mut command = Command::new("GET_QUEUE_AFFINITY", id).payload(vec![0; 64]);
        command.data = queue.into();
        let (result, mask) = self.quietly(&command)?;
        if result == Some(0)
            && let Some(device) = &mut self.device
        {
            for (cpu, place) in device.queue_of.iter_mut().enumerate() {
                if mask[0] & 1 << cpu != 0 {
                    *place = queue;
                }
            }
        }
        Ok(())
    }

    /// What a command that has ended means for the device.
    pub(super) fn control_done(&mut self, name: &str, result: i32) -> Result<()> {
        if result < 0 {
            if name == "SET_PARAMS"
                && let Some(device) = &mut self.device
            {
                device.unsure = true;
            }
            return Ok(());
        }
        let open = self.server.as_ref().is_some_and(|server| server.open);
        let Some(device) = &mut self.device else { return Ok(()) };
        match name {
            "START_DEV" => {
                device.state = State::Live;
            }
            "END_USER_RECOVERY" => device.state = State::Live,
            "STOP_DEV" | "TRY_STOP_DEV" => {
                device.state = State::Dead;
                device.stopping |= open;
            }
            "DEL_DEV" | "DEL_DEV_ASYNC" => {
                device.state = State::Dead;
                device.stopping |= open;
                self.over = true;
                self.async_deletion |= name == "DEL_DEV_ASYNC";
            }
            "QUIESCE_DEV" => device.quiesced |= device.state == State::Live,
            _ => {}
        }
        Ok(())
    }

    /// What a command that waits has done already.
    fn control_pending(&mut self, name: &str) -> Result<()> {
        let open = self.server.as_ref().is_some_and(|server| server.open);
        let idle = self.requests.is_empty() && self.lingering.is_empty();
        let Some(device) = &mut self.device else { return Ok(()) };
        if name == "DEL_DEV" {
            self.over = true;
            if idle {
                device.state = State::Dead;
                device.stopping |= open;
            }
        }
        Ok(())
    }

    /// The state as the driver has it, and the process id in words.
    pub(super) fn state(&mut self) -> Result<Option<State>> {
        let id = self.device()?.id;
        let command = Command::new("GET_DEV_INFO", id).payload(vec![0; 64]);
        let (result, payload) = self.quietly(&command)?;
        if result != Some(0) {
            return Ok(None);
        }
        Ok(Some(match ublksrv_ctrl_dev_info::from_bytes(&payload).state {
            UBLK_S_DEV_LIVE => State::Live,
            UBLK_S_DEV_QUIESCED => State::Quiesced,
            UBLK_S_DEV_FAIL_IO => State::FailIo,
            _ => State::Dead,
        }))
    }

    /// Waits until a number is free again, by making a device of that number and deleting it.
    pub(super) fn await_number(&mut self, id: u32) -> Result<bool> {
        let deadline = std::time::Instant::now() + PATIENCE;
        let info = ublksrv_ctrl_dev_info {
            nr_hw_queues: 1,
            queue_depth: 1,
            max_io_buf_bytes: 4096,
            dev_id: id,
            ..Default::default()
        };
        loop {
            match self.quietly(&Command::new("ADD_DEV", id).payload(info.bytes()))?.0 {
                Some(0) => return Ok(self.quietly(&Command::new("DEL_DEV", id))?.0 == Some(0)),
                Some(result) if result == -libc::EEXIST && std::time::Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                _ => return Ok(false),
            }
        }
    }

    /// Ends a command that waits for something that will not come.
    pub(super) fn cancel(&mut self, name: &str) -> Result<()> {
        let Some(waiting) = self.waiting.iter().find(|waiting| waiting.name == name).cloned() else {
            return Ok(());
        };
        let context = self.context();
        let result = self.cancel_waiting(&waiting)?;
        self.settle()?;
        let outputs = self.take_events();
        self.record("cancel", name, &context, "", result.map_or_else(|| "pending".into(), number), outputs)
    }

    /// Cancels a command; its result.
    fn cancel_waiting(&mut self, waiting: &Waiting) -> Result<Option<i32>> {
        let order = Order::Cancel { token: waiting.token, patience: PATIENCE.as_millis() as u64 };
        let answer = self.controller(waiting.user).order(0, &order)?;
        let Answer::Control { result, .. } = answer else { bail!("a strange answer: {answer:?}") };
        if let Some(result) = result {
            self.waiting_done(waiting, result)?;
        }
        Ok(result)
    }

    /// The id that a command for no device in particular has.
    pub(super) fn some_id(&mut self) -> u32 {
        self.device.as_ref().map_or(7, |device| device.id)
    }

    /// Whether START_DEV and END_USER_RECOVERY have to wait.
    pub(super) fn unfetched(&self) -> bool {
        self.server.as_ref().is_none_or(|server| {
            !server.open
                || server
                    .tags
                    .iter()
                    .any(|tag| !matches!(tag, super::Tag::Armed | super::Tag::Held | super::Tag::Asking))
        })
    }

    /// ADD_DEV with what is wanted of a device, right or wrong.
    pub(super) fn add(&mut self, want: &Want) -> Result<Option<i32>> {
        let mut info = want.info;
        let mut command = Command::new("ADD_DEV", info.dev_id).user(want.user);
        let mut cases = Vec::new();
        for _ in 0..want.faults {
            let case = self.random.pick(ADD_FAULTS);
            cases.push(case);
            match case {
                "depth-0" => info.queue_depth = 0,
                "depth-4097" => info.queue_depth = 4097,
                "queues-0" => info.nr_hw_queues = 0,
                "queues-4097" => info.nr_hw_queues = 4097,
                "reissue-alone" => info.flags = info.flags & !UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE,
                "fail-io-alone" => info.flags = info.flags & !UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_FAIL_IO,
                "reissue-and-fail-io" => {
                    info.flags |= UBLK_F_USER_RECOVERY | UBLK_F_USER_RECOVERY_REISSUE | UBLK_F_USER_RECOVERY_FAIL_IO;
                }
                "quiesce-alone" => info.flags = info.flags & !UBLK_F_USER_RECOVERY | UBLK_F_QUIESCE,
                "integrity-alone" => info.flags = info.flags & !UBLK_F_USER_COPY | UBLK_F_INTEGRITY,
                "zoned-alone" => {
                    info.flags = info.flags & !(UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY) | UBLK_F_ZONED;
                }
                "desc-size" => {
                    info.flags |= UBLK_F_IO_DESC_SIZE;
                    info.io_desc_size = self.random.pick(&[0, 16, 23, 25, 28, 264, 65535]);
                }
                "id-mismatch" => command.dev_id = command.dev_id.wrapping_add(1),
                "id-big" => {
                    info.dev_id = self.random.pick(&[1 << 20, 0x7fff_ffff, 0xffff_fffe]);
                    command.dev_id = info.dev_id;
                }
                "len" => command.len = Some(self.random.pick(&[0, 1, 63, 8])),
                "nowhere" => command.place = Place::Nowhere,
                "fault" => command.place = Place::Fault,
                "tight" => {
                    command.place = Place::Tight;
                    command.len = Some(65);
                }
                "queue-id" => command.queue_id = self.random.pick(&[0, 1, 0xfffe]),
                "narrow" => command.narrow = true,
                "legacy" => command.op = UBLK_CMD_ADD_DEV,
                "type-byte" => command.op = command.op & !0xff00 | self.random.pick(&[0x100, 0x7600, 0xff00]),
                "direction" => command.op ^= self.random.pick(&[1u32 << 30, 1 << 31, 3 << 30]),
                "size" => command.op ^= self.random.pick(&[1u32 << 16, 1 << 21, 0xff << 16]),
                "other-user" => {
                    command.user = !command.user;
                    info.flags ^= if self.random.chance(50) { UBLK_F_UNPRIVILEGED_DEV } else { 0 };
                }
                "big-buffer" => info.max_io_buf_bytes = self.random.pick(&[0, 1, 4095, 1 << 26, 1 << 31, u32::MAX]),
                // Why zoned devices have one, see `want`.
                "many-queues" if info.flags & UBLK_F_ZONED != 0 => {}
                "many-queues" => info.nr_hw_queues = self.random.pick(&[3, 64, 4096]),
                _ => bail!("no such fault: {case}"),
            }
        }
        cases.sort_unstable();
        command.case = if cases.is_empty() { "ok".into() } else { cases.join("+") };
        command.payload = info.bytes();
        command.said = format!(
            "queues={} depth={} buf={} id={} flags={:#x} desc={}",
            info.nr_hw_queues,
            info.queue_depth,
            info.max_io_buf_bytes,
            info.dev_id as i32,
            info.flags,
            info.io_desc_size
        );
        self.control(&command)
    }

    /// A control command with something wrong in it, or of no consequence.
    pub(super) fn stray_control(&mut self) -> Result<()> {
        let id = self.some_id();
        let owned = self.device.as_ref().is_some_and(|device| device.owned);
        let user = if owned { self.random.chance(70) } else { self.random.chance(6) };
        let name = self.random.pick(STRAY);
        let mut command = Command::new(name, id).user(user);
        let case = match name {
            "GET_DEV_INFO" | "GET_DEV_INFO2" => {
                command.payload = vec![0; 64];
                self.random.pick(&["ok", "ok", "ok", "len", "nowhere", "fault", "legacy", "path", "op"])
            }
            "GET_PARAMS" => {
                let len: u32 = self.random.pick(&[152, 152, 152, 8, 4, 64, 112, 0, 153, 200]);
                command.payload = vec![0; 152.max(len as usize)];
                command.payload[..4].copy_from_slice(&len.to_ne_bytes());
                command.said = format!("params.len={len}");
                command.len = Some(self.random.pick(&[152, 152, 200, 8, 64]));
                self.random.pick(&["ok", "ok", "ok", "len", "nowhere", "fault", "legacy", "path"])
            }
            "GET_QUEUE_AFFINITY" => {
                command.payload = vec![0xee; 64];
                command.len = Some(self.random.pick(&[8, 16, 64, 0, 1, 4, 7, 9, 12]));
                let queue = self.random.pick(&[0, 0, 1, 2, 4096, u64::MAX, 1 << 32]);
                command = command.data(queue, format!("q={queue:#x}"));
                self.random.pick(&["ok", "ok", "ok", "nowhere", "fault", "legacy", "path"])
            }
            "GET_FEATURES" => {
                command.payload = vec![0; 16];
                command.len = Some(self.random.pick(&[8, 8, 8, 0, 7, 9, 16]));
                command.dev_id = self.random.pick(&[id, u32::MAX, 0]);
                self.random.pick(&["ok", "ok", "nowhere", "fault", "bare", "op"])
            }
            "REG_BUF" => {
                let mut buffer = ublk_shmem_buf_reg { addr: 0x1000, len: 4096, ..Default::default() };
                let wrong = self.random.pick(&["addr", "len-0", "flags", "reserved", "align", "length", "big"]);
                match wrong {
                    "addr" => {}
                    "len-0" => buffer.len = 0,
                    "flags" => buffer.flags = 2,
                    "reserved" => buffer.reserved = 1,
                    "align" => buffer.addr = 0x1200,
                    "length" => buffer.len = 1000,
                    _ => buffer.len = (4 << 30) + 4096,
                }
                command.payload = buffer.bytes();
                command.said = wrong.to_owned();
                self.random.pick(&["ok", "ok", "ok", "len", "nowhere", "fault", "path"])
            }
            "UNREG_BUF" => {
                let index = self.random.pick(&[0, 1, 65535, 65536, u64::MAX]);
                command = command.data(index, format!("index={index:#x}"));
                self.random.pick(&["ok", "path"])
            }
            "UPDATE_SIZE" if self.device.as_ref().is_some_and(|device| device.state == State::Live) => {
                // Only where nothing changes: how large the disk is decides what I/O is generated.
                let size = self.device()?.params.basic.dev_sectors;
                command = command.data(size, format!("sectors={size}"));
                "same"
            }
            "UPDATE_SIZE" => {
                let size = self.random.pick(&[0, 1, 2048, u64::MAX]);
                command = command.data(size, format!("sectors={size:#x}"));
                self.random.pick(&["ok", "path"])
            }
            "unknown" => {
                command.op = self.random.pick(&[
                    0x03,
                    0x0a,
                    0x0f,
                    0x13,
                    0x14,
                    0x1a,
                    0x1f,
                    0xff,
                    0,
                    0x7500,
                    0x8020_750a,
                    0xc020_751a,
                    0xc020_751f,
                    0xc020_75ff,
                    0xc010_7520,
                ]);
                // Those which are known on some device would do something.
                if matches!(command.op, 0x14) {
                    command.dev_id = 999;
                }
                self.random.pick(&["ok", "no-device"])
            }
            "no-device" => {
                let (_, op) = self.random.pick(COMMANDS);
                command.op = if op == UBLK_U_CMD_ADD_DEV { UBLK_U_CMD_GET_DEV_INFO } else { op };
                command.payload = vec![0; 160];
                "no-device"
            }
            _ => {
                command.payload = vec![0; 160];
                command.op =
                    COMMANDS.iter().find(|(known, _)| *known == name).map_or(UBLK_U_CMD_GET_DEV_INFO, |(_, op)| *op);
                self.random.pick(&["type-byte", "narrow", "no-device"])
            }
        };
        match case {
            "len" => command.len = Some(self.random.pick(&[0, 1, 7, 63])),
            "nowhere" => command.place = Place::Nowhere,
            "fault" => command.place = Place::Fault,
            "legacy" => command.op &= 0xff,
            "bare" => command.op &= 0xff,
            "op" => command.op ^= self.random.pick(&[1u32 << 30, 1 << 31, 1 << 16, 1 << 22]),
            "type-byte" => command.op = command.op & !0xff00 | self.random.pick(&[0x100, 0x7400, 0xf500]),
            "narrow" => command.narrow = true,
            "no-device" => command.dev_id = self.random.pick(&[998, 999, u32::MAX, 1 << 20, 0x8000_0000]),
            "path" => {
                let own = format!("/dev/ublkc{id}");
                let size = own.len() as u16 + 1;
                command.path = match self.random.index(8) {
                    0 => DevicePath::Missing,
                    1 => DevicePath::Other("/dev/null".into(), 10),
                    2 => DevicePath::Other("/nowhere".into(), 9),
                    3 => DevicePath::Other("/dev".into(), 5),
                    4 => DevicePath::Other(own, size - 1),
                    5 => DevicePath::Other(own, 0),
                    6 => DevicePath::Other(own, 4097),
                    _ => DevicePath::Other(own, size),
                };
            }
            _ => {}
        }
        command.case = format!("stray-{case}");
        self.control(&command).map(drop)
    }

    /// REG_BUF and UNREG_BUF with memory that is there.
    pub(super) fn share(&mut self) -> Result<()> {
        let device = self.device()?.clone();
        if !device.has(UBLK_F_SHMEM_ZC) {
            return Ok(());
        }
        for _ in 0..1 + self.random.below(3) {
            let offset = self.random.below(4) * 4096;
            let len = 4096 * (1 + self.random.below(4));
            let flags = self.random.pick(&[0, UBLK_SHMEM_BUF_READ_ONLY]);
            let buffer = ublk_shmem_buf_reg { addr: offset, len, flags, reserved: 0 };
            let mut command = Command::new("REG_BUF", device.id).user(device.owned).payload(buffer.bytes());
            command.shares = true;
            command.case = "memory".into();
            command.said = format!("offset={offset} len={len} flags={flags}");
            debug_assert!(offset + len <= SHARED);
            let result = self.control(&command)?;
            if let Some(index @ 0..) = result
                && self.random.chance(70)
            {
                let times = self.random.pick(&[1, 1, 2]);
                for _ in 0..times {
                    let command = Command::new("UNREG_BUF", device.id).case("memory").user(device.owned);
                    self.control(&command.data(index as u64, format!("index={index}")))?;
                }
            }
        }
        Ok(())
    }

    /// START_DEV or END_USER_RECOVERY.
    pub(super) fn begin(&mut self, name: &'static str, right: bool) -> Result<Option<i32>> {
        let id = self.device()?.id;
        let owned = self.device()?.owned;
        let server = self.server.as_ref().map_or(-1, |server| server.agent.pid());
        let root = self.crew.root.pid();
        let (case, pid) = if right {
            ("ok", i64::from(server))
        } else {
            self.random.pick(&[
                ("pid-0", 0),
                ("pid-negative", -1),
                ("pid-other", i64::from(root)),
                ("pid-none", 0x3f_fff0),
            ])
        };
        let mut command = Command::new(name, id).case(case).user(owned).data(pid as u64, case);
        // Before it waits for anything, START_DEV looks whether this can be a process.
        command.waits = self.unfetched() && !(name == "START_DEV" && pid <= 0);
        self.control(&command)
    }

    /// STOP_DEV or TRY_STOP_DEV.
    pub(super) fn stop(&mut self, name: &'static str) -> Result<Option<i32>> {
        let device = self.device()?;
        let (id, owned) = (device.id, device.owned);
        let autopilot = self.server.as_ref().is_some_and(|server| server.autopilot);
        let mut command = Command::new(name, id).user(owned);
        command.waits = !(autopilot || self.requests.is_empty() && self.lingering.is_empty());
        self.control(&command)
    }

    /// DEL_DEV or DEL_DEV_ASYNC.
    pub(super) fn delete(&mut self, name: &'static str) -> Result<Option<i32>> {
        let device = self.device()?;
        let (id, owned) = (device.id, device.owned);
        let mut command = Command::new(name, id).user(owned);
        let busy = !(self.requests.is_empty() && self.lingering.is_empty());
        let open = self.server.as_ref().is_some_and(|server| server.open);
        // It waits until everybody has closed the char device and the disk.
        command.waits = busy || (name == "DEL_DEV" && (open || self.opened.contains(&true)));
        self.control(&command)
    }

    /// Polls until the driver has noticed that the server is gone.
    pub(super) fn await_death(&mut self) -> Result<State> {
        let deadline = std::time::Instant::now() + PATIENCE;
        loop {
            match self.state()? {
                Some(State::Live) if std::time::Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Some(state) => return Ok(state),
                None => return Ok(State::Dead),
            }
        }
    }
}

/// What a device shall be.
#[derive(Debug, Clone)]
pub(super) struct Want {
    pub(super) info: ublksrv_ctrl_dev_info,
    pub(super) user: bool,
    /// Number of things that are to be wrong.
    pub(super) faults: u32,
}

/// What can be wrong, or unusual, with ADD_DEV.
const ADD_FAULTS: &[&str] = &[
    "depth-0",
    "depth-4097",
    "queues-0",
    "queues-4097",
    "reissue-alone",
    "fail-io-alone",
    "reissue-and-fail-io",
    "quiesce-alone",
    "integrity-alone",
    "zoned-alone",
    "desc-size",
    "id-mismatch",
    "id-big",
    "len",
    "nowhere",
    "fault",
    "tight",
    "queue-id",
    "narrow",
    "legacy",
    "type-byte",
    "direction",
    "size",
    "other-user",
    "big-buffer",
    "many-queues",
];

/// Commands for [`Sequence::stray_control`].
const STRAY: &[&str] = &[
    "GET_DEV_INFO",
    "GET_DEV_INFO",
    "GET_DEV_INFO2",
    "GET_PARAMS",
    "GET_PARAMS",
    "GET_QUEUE_AFFINITY",
    "GET_FEATURES",
    "REG_BUF",
    "UNREG_BUF",
    "UPDATE_SIZE",
    "unknown",
    "no-device",
    "START_DEV",
    "STOP_DEV",
    "SET_PARAMS",
    "END_USER_RECOVERY",
    "DEL_DEV",
];
