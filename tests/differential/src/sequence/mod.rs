// SPDX-License-Identifier: MIT OR Apache-2.0

//! One sequence: the life of a device, generated step by step from what happened before.
//!
//! What is chosen next depends on the dice and on what the driver answered so far, so the same seed
//! makes the same sequence as long as the driver answers alike. For that, nothing that depends on
//! timing may be seen: a step ends when everything that it sets off has happened ([`Sequence::settle`]),
//! and what happened is written down in sorted order. Which tag the block layer takes for a request
//! is chance, so tags are distinguished only by what they are used for.

mod control;
mod data;
mod disk;
mod io;
mod params;
mod scenario;

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::agent::{Agent, Answer, Identity, Order, wait_readable};
use crate::ring::{Cqe, MORE};
use crate::trace::{Line, Writer};
use crate::userdata::{Kind, UserData};
use ublk_test_common::random::Random;
use ublk_test_common::uapi::*;

/// How long to wait for what has to happen.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long a client may take until it waits in the kernel.
const GLIMPSE: Duration = Duration::from_secs(2);

/// Processes that outlive sequences.
#[derive(Debug)]
pub(crate) struct Crew {
    root: Agent,
    user: Agent,
    client: Agent,
    /// The numbers of its threads.
    clients: Vec<i64>,
    /// Devices that could not be removed.
    pub(crate) stuck: Vec<u32>,
}

/// Threads of the client, and the processors they stay on.
const CLIENTS: [usize; 3] = [0, 1, 0];

impl Crew {
    /// Starts them.
    pub(crate) fn start() -> Result<Self> {
        let mut client = Agent::start(Identity::Root, CLIENTS.len(), &CLIENTS)?;
        Ok(Crew {
            root: Agent::start(Identity::Root, 1, &[])?,
            user: Agent::start(Identity::User, 1, &[])?,
            clients: client.numbers()?,
            client,
            stuck: Vec::new(),
        })
    }

    /// Has other clients take the place of those that hang.
    fn replace_clients(&mut self) -> Result<()> {
        self.client = Agent::start(Identity::Root, CLIENTS.len(), &CLIENTS)?;
        self.clients = self.client.numbers()?;
        Ok(())
    }
}

/// State of a device as GET_DEV_INFO would have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Dead,
    Live,
    Quiesced,
    FailIo,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Dead => "DEAD",
            State::Live => "LIVE",
            State::Quiesced => "QUIESCED",
            State::FailIo => "FAIL_IO",
        }
    }
}

/// The device as it should be now.
#[derive(Debug, Clone)]
struct Device {
    id: u32,
    flags: u64,
    queues: u16,
    depth: u16,
    buffer: u32,
    stride: u16,
    state: State,
    params: ublk_params,
    /// What the driver has as parameters may differ from `params`.
    unsure: bool,
    /// Made by the ordinary user.
    owned: bool,
    /// STOP_DEV hit the present server.
    stopping: bool,
    /// QUIESCE_DEV hit the present server.
    quiesced: bool,
    /// The queue that a processor's requests go to.
    queue_of: [u16; 2],
    /// It has parameters that Linux's driver accepts without a look.
    unchecked: bool,
}

impl Device {
    fn has(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }

    /// Data is copied to and from the server's buffers.
    fn copies(&self) -> bool {
        !self.has(UBLK_F_USER_COPY | UBLK_F_SUPPORT_ZERO_COPY | UBLK_F_AUTO_BUF_REG)
    }

    fn slots(&self) -> usize {
        usize::from(self.queues) * usize::from(self.depth)
    }

    fn slot(&self, queue: u16, tag: u16) -> usize {
        usize::from(queue) * usize::from(self.depth) + usize::from(tag)
    }
}

/// A tag as its server sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tag {
    /// Never fetched.
    Idle,
    /// Fetched: the driver has it.
    Armed,
    /// There is a request.
    Held,
    /// There is a write that waits for NEED_GET_DATA.
    Asking,
    /// Its command came back with an error.
    Spent,
}

/// A process that serves the device.
#[derive(Debug)]
struct Server {
    agent: Agent,
    tags: Vec<Tag>,
    /// Which thread fetched the tag.
    owner: Vec<usize>,
    /// The char device is open.
    open: bool,
    autopilot: bool,
    /// FETCH_IO_CMDS that wait, by queue.
    fetching: Vec<bool>,
    /// Queues whose FETCH_IO_CMDS had no buffer.
    starved: Vec<u16>,
}

/// A request at the server.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Request {
    sector: u64,
    op: u8,
    count: u32,
    queue: u16,
    op_flags: u32,
    tag: u16,
    /// REGISTER_IO_BUF was accepted and not undone.
    registered: bool,
}

impl Request {
    /// Bytes of data.
    fn bytes(&self) -> u32 {
        match self.op {
            UBLK_IO_OP_READ | UBLK_IO_OP_WRITE | UBLK_IO_OP_ZONE_APPEND => self.count << 9,
            UBLK_IO_OP_REPORT_ZONES => self.count * 64,
            _ => 0,
        }
    }

    /// The server is to give data.
    fn wants_data(&self) -> bool {
        matches!(self.op, UBLK_IO_OP_READ | UBLK_IO_OP_REPORT_ZONES)
    }

    /// The server is given data.
    fn brings_data(&self) -> bool {
        matches!(self.op, UBLK_IO_OP_WRITE | UBLK_IO_OP_ZONE_APPEND)
    }

    fn name(&self) -> String {
        match self.op {
            UBLK_IO_OP_READ => "READ".into(),
            UBLK_IO_OP_WRITE => "WRITE".into(),
            UBLK_IO_OP_FLUSH => "FLUSH".into(),
            UBLK_IO_OP_DISCARD => "DISCARD".into(),
            UBLK_IO_OP_WRITE_ZEROES => "WRITE_ZEROES".into(),
            UBLK_IO_OP_ZONE_OPEN => "ZONE_OPEN".into(),
            UBLK_IO_OP_ZONE_CLOSE => "ZONE_CLOSE".into(),
            UBLK_IO_OP_ZONE_FINISH => "ZONE_FINISH".into(),
            UBLK_IO_OP_ZONE_APPEND => "ZONE_APPEND".into(),
            UBLK_IO_OP_ZONE_RESET_ALL => "ZONE_RESET_ALL".into(),
            UBLK_IO_OP_ZONE_RESET => "ZONE_RESET".into(),
            UBLK_IO_OP_REPORT_ZONES => "REPORT_ZONES".into(),
            other => format!("op{other}"),
        }
    }

    /// Where it is, without the tag.
    fn place(&self) -> String {
        let sector = if self.op == UBLK_IO_OP_FLUSH { 0 } else { self.sector };
        format!("{}@{}+{}", self.name(), sector, self.count)
    }
}

/// What a client thread waits for.
#[derive(Debug, Clone)]
struct Job {
    text: String,
    /// Sectors that its requests lie in.
    first: u64,
    last: u64,
    /// Its requests have no sectors.
    flushes: bool,
    queue: u16,
    /// The block layer does one such thing at a time.
    exclusive: bool,
    /// It never reaches the driver.
    instant: bool,
    /// Its request was ended, so it ends as well, or there is more of it under the same tag.
    ended: bool,
    given_up: bool,
}

/// A control command that has not completed.
#[derive(Debug, Clone)]
struct Waiting {
    name: &'static str,
    user: bool,
    token: u64,
    given_up: bool,
}

/// A sequence.
#[derive(Debug)]
pub(crate) struct Sequence<'a> {
    number: u64,
    step: u32,
    random: Random,
    crew: &'a mut Crew,
    trace: &'a mut Writer,
    device: Option<Device>,
    server: Option<Server>,
    /// A server was killed or closed its device, and nothing has shown yet that the driver is done
    /// with it.
    aftermath: bool,
    requests: Vec<Request>,
    /// Requests that were committed but are still registered.
    lingering: Vec<Request>,
    jobs: [Option<Job>; CLIENTS.len()],
    opened: [bool; CLIENTS.len()],
    /// Who has it open for writing.
    writable: [bool; CLIENTS.len()],
    waiting: Vec<Waiting>,
    /// What happened since the last step ended.
    events: Vec<String>,
    /// Waiting for aborted commands was in vain.
    no_aborts: bool,
    /// The device is deleted, or about to be.
    over: bool,
    /// DEL_DEV_ASYNC does not wait until the device's number is free.
    async_deletion: bool,
    /// Steps become events of the one around them.
    quiet: bool,
    serial: u32,
    salt: u64,
}

impl<'a> Sequence<'a> {
    /// Runs a sequence from its start to the removal of all it made.
    pub(crate) fn run(seed: u64, number: u64, crew: &'a mut Crew, trace: &'a mut Writer) -> Result<()> {
        let mut random = Random::new(seed, number);
        let salt = random.next();
        let mut sequence = Sequence {
            number,
            step: 0,
            random,
            crew,
            trace,
            device: None,
            server: None,
            aftermath: false,
            requests: Vec::new(),
            lingering: Vec::new(),
            jobs: Default::default(),
            opened: Default::default(),
            writable: Default::default(),
            waiting: Vec::new(),
            events: Vec::new(),
            no_aborts: false,
            over: false,
            async_deletion: false,
            quiet: false,
            serial: 0,
            salt,
        };
        let outcome = sequence.scenario();
        if let Err(error) = &outcome {
            let text = format!("{error:#}").replace(['\t', '\n'], " ");
            sequence.record("harness", "error", "", "", text, String::new())?;
        }
        sequence.clean_up()
    }

    /// The state in words, for the trace.
    fn context(&self) -> String {
        let Some(device) = &self.device else { return "none".into() };
        let mut text = device.state.name().to_owned();
        if device.stopping {
            text.push_str("+stopping");
        }
        if device.quiesced {
            text.push_str("+quiesced");
        }
        if device.owned {
            text.push_str("+user");
        }
        if let Some(server) = &self.server {
            text.push_str(if server.open { ",server" } else { ",closed" });
            if server.tags.iter().all(|tag| matches!(tag, Tag::Armed | Tag::Held | Tag::Asking)) {
                text.push_str("+fetched");
            } else if server.tags.iter().any(|tag| *tag != Tag::Idle) {
                text.push_str("+some");
            }
        }
        for waiting in &self.waiting {
            text.push_str(",waits:");
            text.push_str(waiting.name);
        }
        if !self.requests.is_empty() {
            text.push_str(",held");
        }
        text
    }

    /// Writes a line.
    fn record(
        &mut self,
        command: &str,
        case: &str,
        context: &str,
        arguments: &str,
        result: impl Display,
        outputs: String,
    ) -> Result<()> {
        if self.quiet {
            self.events.push(format!("{command} {arguments} -> {result} {outputs}").trim_end().to_owned());
            return Ok(());
        }
        let line = Line {
            sequence: self.number,
            step: self.step,
            command: command.into(),
            case: case.into(),
            context: context.into(),
            arguments: arguments.into(),
            result: result.to_string(),
            outputs,
        };
        self.step += 1;
        self.trace.write(&line)
    }

    /// What happened, sorted; equal things with their number.
    fn take_events(&mut self) -> String {
        if self.quiet {
            return String::new();
        }
        let mut events = std::mem::take(&mut self.events);
        events.sort();
        let mut text = String::new();
        let mut at = 0;
        while at < events.len() {
            let same = events[at..].iter().take_while(|event| **event == events[at]).count();
            if !text.is_empty() {
                text.push_str("; ");
            }
            text.push_str(&events[at]);
            if same > 1 {
                text.push_str(&format!(" x{same}"));
            }
            at += same;
        }
        text
    }

    fn device(&self) -> Result<&Device> {
        match &self.device {
            Some(device) => Ok(device),
            None => bail!("there is no device"),
        }
    }

    fn device_mut(&mut self) -> Result<&mut Device> {
        match &mut self.device {
            Some(device) => Ok(device),
            None => bail!("there is no device"),
        }
    }

    fn server(&mut self) -> Result<&mut Server> {
        match &mut self.server {
            Some(server) => Ok(server),
            None => bail!("there is no server"),
        }
    }

    /// An agent that sends control commands.
    fn controller(&mut self, user: bool) -> &mut Agent {
        if user { &mut self.crew.user } else { &mut self.crew.root }
    }

    /// Takes in whatever has happened.
    fn pump(&mut self) -> Result<()> {
        if let Some(server) = &mut self.server
            && server.agent.rang()
            && server.open
            && !server.autopilot
        {
            for thread in 0..server.agent.threads() {
                let Some(server) = &mut self.server else { break };
                if let Answer::Completions(list) = server.agent.order(thread, &Order::Collect)? {
                    for (cqe, tags) in list {
                        self.completed(cqe, &tags)?;
                    }
                }
            }
        }
        while let Some(queue) = self.server.as_mut().and_then(|server| server.starved.pop()) {
            let quiet = std::mem::replace(&mut self.quiet, true);
            let fed = self.feed(queue);
            self.quiet = quiet;
            fed?;
        }
        for thread in 0..CLIENTS.len() {
            if self.crew.client.busy(thread)
                && let Some(answer) = self.crew.client.receive(thread, Duration::ZERO)?
            {
                self.job_done(thread, &answer)?;
            }
        }
        let rang = [self.crew.root.rang(), self.crew.user.rang()];
        for waiting in self.waiting.clone() {
            if rang[usize::from(waiting.user)] {
                let order = Order::Await { token: waiting.token, patience: 0 };
                let answer = self.controller(waiting.user).order(0, &order)?;
                if let Answer::Control { result: Some(result), .. } = answer {
                    self.waiting_done(&waiting, result)?;
                }
            }
        }
        Ok(())
    }

    /// A control command that waited has ended.
    fn waiting_done(&mut self, waiting: &Waiting, result: i32) -> Result<()> {
        self.waiting.retain(|other| (other.user, other.token) != (waiting.user, waiting.token));
        self.events.push(format!("{} -> {}", waiting.name, number(result)));
        self.control_done(waiting.name, result)
    }

    fn job_done(&mut self, thread: usize, answer: &Answer) -> Result<()> {
        let text = match self.jobs[thread].take() {
            Some(job) => job.text,
            None => "nothing".into(),
        };
        let result = match answer {
            Answer::Block { result, sum, text } => {
                let sum = if *sum == 0 { String::new() } else { format!(" sum={sum:08x}") };
                format!("{}{sum} {text}", number(*result)).trim_end().to_owned()
            }
            Answer::Status(status) => number(*status),
            other => bail!("a strange answer of a client: {other:?}"),
        };
        self.events.push(format!("client{thread} {text} -> {result}"));
        Ok(())
    }

    /// A command on the char device has completed.
    fn completed(&mut self, cqe: Cqe, tags: &[u16]) -> Result<()> {
        let from = UserData(cqe.user_data);
        match from.kind() {
            Some(Kind::Tag) if cqe.result >= 0 => self.arrived(from.queue(), from.tag(), cqe.result),
            Some(Kind::Tag) => {
                let slot = self.device()?.slot(from.queue(), from.tag());
                if let Some(tag) = self.server()?.tags.get_mut(slot) {
                    *tag = Tag::Spent;
                }
                self.events.push(format!("tag back {}", number(cqe.result)));
                Ok(())
            }
            Some(Kind::Multishot) => {
                for tag in tags {
                    self.arrived(from.queue(), *tag, UBLK_IO_RES_OK)?;
                }
                if cqe.flags & MORE == 0 {
                    let queue = usize::from(from.queue());
                    let depth = usize::from(self.device()?.depth);
                    let server = self.server()?;
                    if let Some(fetching) = server.fetching.get_mut(queue) {
                        *fetching = false;
                    }
                    if cqe.result == -libc::ENOBUFS {
                        server.starved.push(from.queue());
                    }
                    if cqe.result == UBLK_IO_RES_ABORT {
                        for tag in server.tags.iter_mut().skip(queue * depth).take(depth) {
                            if *tag == Tag::Armed {
                                *tag = Tag::Spent;
                            }
                        }
                    }
                    self.events.push(format!("fetch q{queue} ends {}", number(cqe.result)));
                }
                Ok(())
            }
            _ => {
                self.events.push(format!("late {}", number(cqe.result)));
                Ok(())
            }
        }
    }

    /// There is a request for a tag.
    fn arrived(&mut self, queue: u16, tag: u16, result: i32) -> Result<()> {
        let slot = self.device()?.slot(queue, tag);
        let answer = self.server()?.agent.order(0, &Order::Descriptor { queue, tag })?;
        let Answer::Descriptor { op_flags, count, sector, addr, slot: buffer } = answer else {
            self.events.push(format!("req q{queue} without descriptor"));
            return Ok(());
        };
        let request = Request { sector, op: (op_flags & 0xff) as u8, count, queue, op_flags, tag, registered: false };
        let known = match (buffer, addr) {
            (Some(buffer), _) if buffer == slot => "own",
            (Some(_), _) => "other",
            // The index of a registration depends on the tag, and may be 0.
            (None, _) if self.device()?.has(UBLK_F_AUTO_BUF_REG) => "auto",
            (None, 0) => "0",
            (None, _) => "wild",
        };
        // Zones are asked for by whatever processor START_DEV runs on.
        let place = if request.op == UBLK_IO_OP_REPORT_ZONES { String::new() } else { format!("q{queue} ") };
        self.events.push(format!("req {place}{} f={:x} addr={known} res={result}", request.place(), op_flags >> 8));
        let state = if result == UBLK_IO_RES_NEED_GET_DATA { Tag::Asking } else { Tag::Held };
        for job in self.jobs.iter_mut().flatten() {
            job.ended &= !Self::belongs(&request, job);
        }
        let before = self.server()?.tags.get(slot).copied();
        match before {
            Some(Tag::Armed) => {}
            // The answer to NEED_GET_DATA: the same request.
            Some(Tag::Asking) => self.requests.retain(|held| (held.queue, held.tag) != (queue, tag)),
            other => self.events.push(format!("req for a tag that is {other:?}")),
        }
        if let Some(tag) = self.server()?.tags.get_mut(slot) {
            *tag = state;
        }
        self.requests.push(request);
        self.requests.sort();
        Ok(())
    }

    fn armed(&self, queue: u16) -> usize {
        let (Some(server), Some(device)) = (&self.server, &self.device) else { return 0 };
        let start = device.slot(queue, 0);
        let end = (start + usize::from(device.depth)).min(server.tags.len());
        server.tags[start.min(end)..end].iter().filter(|tag| **tag == Tag::Armed).count()
    }

    /// A request belongs to this job.
    fn belongs(request: &Request, job: &Job) -> bool {
        if request.op == UBLK_IO_OP_FLUSH { job.flushes } else { (job.first..job.last).contains(&request.sector) }
    }

    /// A request was ended. Unless more of the same job has come already, there will be something of it.
    fn ended(&mut self, request: &Request) {
        for job in self.jobs.iter_mut().flatten() {
            let more = self.requests.iter().any(|held| Self::belongs(held, job));
            job.ended |= Self::belongs(request, job) && !more;
        }
    }

    /// What has to happen still, if anything.
    fn unsettled(&self) -> Option<String> {
        let device = self.device.as_ref();
        let fetched = self.server.as_ref().is_some_and(|server| {
            server.open && server.tags.iter().all(|tag| matches!(tag, Tag::Armed | Tag::Held | Tag::Asking))
        });
        let autopilot = self.server.as_ref().is_some_and(|server| server.autopilot);
        for waiting in self.waiting.iter().filter(|waiting| !waiting.given_up) {
            let due = match waiting.name {
                "START_DEV" | "END_USER_RECOVERY" => fetched,
                "STOP_DEV" | "TRY_STOP_DEV" => autopilot || (self.requests.is_empty() && self.lingering.is_empty()),
                "DEL_DEV" => self.server.as_ref().is_none_or(|server| !server.open) && !self.opened.contains(&true),
                _ => true,
            };
            if due {
                return Some(waiting.name.to_owned());
            }
        }
        let device = device?;
        if (device.stopping || device.quiesced) && !autopilot && !self.no_aborts {
            let stopping = !self.waiting.iter().any(|waiting| waiting.name.contains("STOP"));
            let batch = device.has(UBLK_F_BATCH_IO);
            let armed = self.server.as_ref().is_some_and(|server| {
                if batch { server.fetching.contains(&true) } else { server.tags.contains(&Tag::Armed) }
            });
            if armed && stopping {
                return Some("aborts".into());
            }
        }
        for (number, job) in self.jobs.iter().enumerate() {
            let Some(job) = job else { continue };
            if job.given_up {
                continue;
            }
            let held = self.requests.iter().chain(&self.lingering).any(|request| Self::belongs(request, job));
            if held {
                continue;
            }
            let due = match device.state {
                _ if job.instant || job.ended => true,
                State::Dead | State::FailIo => true,
                State::Quiesced => false,
                State::Live => {
                    let lingering = self.lingering.iter().filter(|request| request.queue == job.queue).count();
                    autopilot || (!device.quiesced && !self.aftermath && self.armed(job.queue) > lingering)
                }
            };
            if due {
                return Some(format!("client{number} {}", job.text));
            }
        }
        None
    }

    /// Waits until all that has to happen has happened.
    fn settle(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.pump()?;
            let Some(what) = self.unsettled() else { return Ok(()) };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.events.push(format!("TIMEOUT {what}"));
                self.give_up();
                return Ok(());
            }
            self.sleep(left)?;
        }
    }

    /// Waits until a client that was given something to do has done it, or cannot go on.
    fn await_client(&mut self, thread: usize) -> Result<()> {
        let deadline = Instant::now() + GLIMPSE;
        let mut seen = 0;
        while self.crew.client.busy(thread) && Instant::now() < deadline {
            // It may sleep on its way, for a moment.
            seen = if self.crew.client.is_blocked(self.crew.clients[thread]) { seen + 1 } else { 0 };
            if seen == 3 {
                break;
            }
            wait_readable(&self.crew.client.sources().collect::<Vec<_>>(), Duration::from_millis(1))?;
            self.pump()?;
        }
        Ok(())
    }

    /// Nothing of what is late is waited for again.
    fn give_up(&mut self) {
        self.no_aborts = true;
        for job in self.jobs.iter_mut().flatten() {
            job.given_up = true;
        }
        for waiting in &mut self.waiting {
            waiting.given_up = true;
        }
    }

    /// Sleeps until something happens.
    fn sleep(&mut self, limit: Duration) -> Result<()> {
        let mut sources: Vec<_> = self.crew.client.sources().collect();
        sources.extend(self.crew.root.sources());
        sources.extend(self.crew.user.sources());
        if let Some(server) = &self.server {
            sources.extend(server.agent.sources());
        }
        wait_readable(&sources, limit).map(drop)
    }

    fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }
}

/// A result in words.
fn number(result: impl Into<i64>) -> String {
    let result = result.into();
    let name = match i32::try_from(-result) {
        Ok(libc::EPERM) => "EPERM",
        Ok(libc::ENOENT) => "ENOENT",
        Ok(libc::EINTR) => "EINTR",
        Ok(libc::EIO) => "EIO",
        Ok(libc::ENXIO) => "ENXIO",
        Ok(libc::E2BIG) => "E2BIG",
        Ok(libc::EBADF) => "EBADF",
        Ok(libc::EAGAIN) => "EAGAIN",
        Ok(libc::ENOMEM) => "ENOMEM",
        Ok(libc::EACCES) => "EACCES",
        Ok(libc::EFAULT) => "EFAULT",
        Ok(libc::EBUSY) => "EBUSY",
        Ok(libc::EEXIST) => "EEXIST",
        Ok(libc::ENODEV) => "ENODEV",
        Ok(libc::EINVAL) => "EINVAL",
        Ok(libc::ENOTTY) => "ENOTTY",
        Ok(libc::ENOSPC) => "ENOSPC",
        Ok(libc::EROFS) => "EROFS",
        Ok(libc::ERANGE) => "ERANGE",
        Ok(libc::ENODATA) => "ENODATA",
        Ok(libc::ETIME) => "ETIME",
        Ok(libc::EREMOTEIO) => "EREMOTEIO",
        Ok(libc::EILSEQ) => "EILSEQ",
        Ok(libc::EOPNOTSUPP) => "EOPNOTSUPP",
        Ok(libc::ENOBUFS) => "ENOBUFS",
        Ok(libc::ETIMEDOUT) => "ETIMEDOUT",
        Ok(libc::ECANCELED) => "ECANCELED",
        _ => return result.to_string(),
    };
    format!("-{name}")
}
