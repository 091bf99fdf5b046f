// SPDX-License-Identifier: MIT OR Apache-2.0

//! The processes that do what a sequence says.
//!
//! The conductor (the process that generates sequences) touches neither the driver nor its disks. It
//! forks agents and sends orders to their threads, one order and one answer at a time over a socket.
//! So an agent can be killed in the middle of anything, and a thread that hangs in a system call
//! hangs nothing else: the conductor stops waiting for its answer when the patience for it is over.

mod block;
mod memory;
mod server;
mod worker;

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::ring::Cqe;

/// Who an agent is to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Identity {
    /// All rights.
    Root,
    /// An ordinary user.
    User,
}

/// Number of the ordinary user and of its group.
pub(crate) const USER: u32 = 1000;

/// Where the payload of a control command is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Place {
    /// `addr` is 0.
    Nowhere,
    /// Memory that reaches far behind the payload.
    Roomy,
    /// Memory that ends with the payload: what is after it faults.
    Tight,
    /// An address where there is no memory.
    Fault,
}

/// A control command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ControlOrder {
    pub(crate) op: u32,
    /// On a ring with entries of 64 bytes, which cannot work.
    pub(crate) narrow: bool,
    pub(crate) dev_id: u32,
    pub(crate) queue_id: u16,
    pub(crate) len: u16,
    pub(crate) data: u64,
    pub(crate) path_len: u16,
    pub(crate) place: Place,
    pub(crate) payload: Vec<u8>,
    /// Byte of the payload where the address of this agent's shared memory goes.
    pub(crate) memory_at: Option<usize>,
    pub(crate) patience: u64,
}

/// Size of the memory that an agent can share.
pub(crate) const SHARED: u64 = 1 << 16;

/// `sqe->addr` or the `addr` of an I/O command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Address {
    /// A number.
    Plain(u64),
    /// The buffer in that slot of the server's memory.
    Buffer(usize),
}

/// A command on the char device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct IoOrder {
    pub(crate) op: u32,
    pub(crate) flags: u8,
    pub(crate) uring_flags: u32,
    /// `sqe->addr`; for the batch commands the array of elements takes its place.
    pub(crate) sqe_addr: u64,
    pub(crate) group: u16,
    pub(crate) user_data: u64,
    /// `struct ublksrv_io_cmd` or `struct ublk_batch_io`.
    pub(crate) payload: Vec<u8>,
    /// What stands in the payload's `addr`, if it is of the first kind.
    pub(crate) addr: Option<Address>,
    /// The array of elements of a batch command.
    pub(crate) elements: Option<Elements>,
    /// Milliseconds to wait for this command's own completion.
    pub(crate) patience: u64,
}

/// The array of a batch command.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Elements {
    pub(crate) place: Place,
    /// Each element's bytes, and the buffer address that follows the header, if any.
    pub(crate) list: Vec<(Vec<u8>, Option<Address>)>,
}

/// Requests on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum BlockOrder {
    /// pread: offset and length.
    Read(u64, u32),
    /// pwrite: offset, length and what the data depends on.
    Write(u64, u32, u64),
    /// pwritev2 with `RWF_DSYNC`.
    WriteSync(u64, u32, u64),
    /// fdatasync
    Flush,
    /// `BLKDISCARD`
    Discard(u64, u64),
    /// `BLKZEROOUT`
    ZeroOut(u64, u64),
    /// `BLKREPORTZONE`: sector and number.
    ReportZones(u64, u32),
    /// `BLKRESETZONE`, `BLKOPENZONE`, `BLKCLOSEZONE`, `BLKFINISHZONE`: which, sector, sectors.
    Zone(u8, u64, u64),
    /// `BLKGETSIZE64`
    Size,
    /// `BLKRRPART`
    Rescan,
    /// `FS_IOC_GETLBMD_CAP`
    Metadata,
}

/// An order to a thread of an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Order {
    /// A control command.
    Control(ControlOrder),
    /// The thread's number.
    Number,
    /// Wait for a control command given before.
    Await { token: u64, patience: u64 },
    /// Cancel a control command given before.
    Cancel { token: u64, patience: u64 },
    /// The texts of files.
    Read(Vec<String>),
    /// Which of the paths exist.
    Exist(Vec<String>),
    /// Give a file to the ordinary user.
    Own(String),

    /// Memory for as many requests.
    Arena { slots: usize, size: usize },
    /// Open the char device; while it is busy, that long.
    OpenChar { id: u32, patience: u64 },
    /// Close it.
    CloseChar,
    /// A ring for this thread.
    OpenRing { wide: bool },
    /// Close it.
    CloseRing,
    /// Map descriptors.
    Map { queue: u16, len: usize, offset: u64, write: bool, stride: usize },
    /// Unmap all descriptors.
    Unmap,
    /// mprotect the descriptors writable.
    Protect { queue: u16 },
    /// A command on the char device.
    Io(IoOrder),
    /// What has completed.
    Collect,
    /// A descriptor.
    Descriptor { queue: u16, tag: u16 },
    /// Data into a slot of the memory.
    Fill { slot: usize, len: usize, position: u64, salt: u64 },
    /// Zones into a slot of the memory.
    FillZones { slot: usize, first: u64, zone_sectors: u64, count: u32 },
    /// Checksum of a slot of the memory.
    Sum { slot: usize, len: usize },
    /// pread (`write` false) or pwrite on the char device, out of and into a slot of the memory.
    Transfer { slot: usize, len: usize, position: u64, write: bool },
    /// Data between a slot of the memory and a registered buffer, through a file.
    Fixed { slot: usize, index: u16, len: u32, into: bool },
    /// A table for registered buffers.
    Table { count: u32 },
    /// A ring of provided buffers.
    Provide { group: u16, count: u16, size: u32 },
    /// Answer all requests with success from now on, by itself.
    Autopilot(Autopilot),

    /// Open the disk.
    OpenDisk { id: u32, write: bool, exclusive: bool },
    /// Close it.
    CloseDisk,
    /// A request.
    Block(BlockOrder),
}

/// How a server thread answers requests by itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Autopilot {
    /// Depth of the queues, which turns queue and tag into a slot.
    pub(crate) depth: u16,
    /// The commit carries the address of a buffer.
    pub(crate) buffers: bool,
}

/// What became of an order.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Answer {
    /// 0 or more, or a negative errno.
    Status(i64),
    /// A control command: its token, its result unless it is pending, its payload afterwards.
    Control { token: u64, result: Option<i32>, payload: Vec<u8> },
    /// Texts, or negative errnos.
    Texts(Vec<Result<String, i32>>),
    /// What completed: the entries, and the tags in a selected buffer.
    Completions(Vec<(Cqe, Vec<u16>)>),
    /// A descriptor: words, and the slot that `addr` points to.
    Descriptor { op_flags: u32, count: u32, sector: u64, addr: u64, slot: Option<usize> },
    /// Result of a request, checksum of its data.
    Block { result: i64, sum: u32, text: String },
    /// The harness itself failed.
    Broken(String),
}

/// The conductor's end of a thread.
#[derive(Debug)]
struct Link {
    socket: OwnedFd,
    /// An order is under way.
    busy: bool,
}

/// A process with threads that take orders.
#[derive(Debug)]
pub(crate) struct Agent {
    pid: libc::pid_t,
    links: Vec<Link>,
    /// Counts completions of the agent's rings.
    event: OwnedFd,
    /// Room for an answer.
    text: Vec<u8>,
    gone: bool,
}

/// How long an order may take that cannot block.
const PROMPT: Duration = Duration::from_secs(60);

impl Agent {
    /// Forks an agent with as many threads. With `cpus`, thread n stays on processor `cpus[n]`.
    pub(crate) fn start(identity: Identity, threads: usize, cpus: &[usize]) -> Result<Self> {
        // SAFETY: a plain system call; the descriptor is checked below.
        let event = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if event < 0 {
            return Err(io::Error::last_os_error()).context("eventfd");
        }
        // SAFETY: the descriptor is fresh and ours.
        let event = unsafe { OwnedFd::from_raw_fd(event) };
        let mut ours = Vec::new();
        let mut theirs = Vec::new();
        for _ in 0..threads {
            let mut pair = [0; 2];
            // SAFETY: `pair` has room for two descriptors.
            if unsafe {
                libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, pair.as_mut_ptr())
            } != 0
            {
                return Err(io::Error::last_os_error()).context("socketpair");
            }
            // SAFETY: both descriptors are fresh and ours.
            let (a, b) = unsafe { (OwnedFd::from_raw_fd(pair[0]), OwnedFd::from_raw_fd(pair[1])) };
            ours.push(Link { socket: a, busy: false });
            theirs.push(b);
        }
        // SAFETY: the conductor has one thread only, so its copy may do anything.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()).context("fork"),
            0 => {
                drop(ours);
                worker::process(identity, theirs, event.as_raw_fd(), cpus)
            }
            pid => Ok(Agent { pid, links: ours, event, text: vec![0; 1 << 17], gone: false }),
        }
    }

    /// The agent's process id.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.links.len()
    }

    /// Gives an order to a thread and waits for the answer.
    pub(crate) fn order(&mut self, thread: usize, order: &Order) -> Result<Answer> {
        self.send(thread, order)?;
        match self.receive(thread, PROMPT)? {
            Some(answer) => Ok(answer),
            None => bail!("an agent does not answer: {order:?}"),
        }
    }

    /// An order whose answer is a number.
    pub(crate) fn status(&mut self, thread: usize, order: &Order) -> Result<i64> {
        match self.order(thread, order)? {
            Answer::Status(status) => Ok(status),
            other => bail!("a strange answer to {order:?}: {other:?}"),
        }
    }

    /// Gives an order to a thread.
    pub(crate) fn send(&mut self, thread: usize, order: &Order) -> Result<()> {
        let link = &mut self.links[thread];
        if link.busy {
            bail!("an agent is still busy and cannot do {order:?}");
        }
        let text = serde_json::to_vec(order)?;
        // SAFETY: the buffer is `text`.
        let sent = unsafe { libc::send(link.socket.as_raw_fd(), text.as_ptr().cast(), text.len(), libc::MSG_NOSIGNAL) };
        if sent < 0 {
            return Err(io::Error::last_os_error()).context("an agent takes no orders");
        }
        link.busy = true;
        Ok(())
    }

    /// The answer to the last order, if it comes in time.
    pub(crate) fn receive(&mut self, thread: usize, patience: Duration) -> Result<Option<Answer>> {
        let link = &mut self.links[thread];
        if !wait_readable(&[link.socket.as_raw_fd()], patience)? {
            return Ok(None);
        }
        let text = &mut self.text;
        // SAFETY: the buffer is `text`.
        let got = unsafe { libc::recv(link.socket.as_raw_fd(), text.as_mut_ptr().cast(), text.len(), 0) };
        if got < 0 {
            return Err(io::Error::last_os_error()).context("an agent's answer");
        }
        if got == 0 {
            bail!("an agent has died");
        }
        link.busy = false;
        match serde_json::from_slice(&text[..got as usize])? {
            Answer::Broken(text) => bail!("an agent failed: {text}"),
            answer => Ok(Some(answer)),
        }
    }

    /// Whether an order to this thread is under way.
    pub(crate) fn busy(&self, thread: usize) -> bool {
        self.links[thread].busy
    }

    /// The descriptors that become readable when something has happened.
    pub(crate) fn sources(&self) -> impl Iterator<Item = RawFd> {
        let answers = self.links.iter().filter(|link| link.busy).map(|link| link.socket.as_raw_fd());
        answers.chain([self.event.as_raw_fd()])
    }

    /// Whether rings of the agent got completions since the last question.
    pub(crate) fn rang(&mut self) -> bool {
        let mut count = 0u64;
        // SAFETY: the buffer is `count`.
        unsafe { libc::read(self.event.as_raw_fd(), (&raw mut count).cast(), 8) == 8 }
    }

    /// The numbers of its threads.
    pub(crate) fn numbers(&mut self) -> Result<Vec<i64>> {
        (0..self.threads()).map(|thread| self.status(thread, &Order::Number)).collect()
    }

    /// Whether the thread of that number sleeps in the kernel until something happens there.
    pub(crate) fn is_blocked(&self, number: i64) -> bool {
        let path = format!("/proc/{}/task/{number}/stat", self.pid);
        let stat = std::fs::read_to_string(path).unwrap_or_default();
        // The name before it may hold anything.
        stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('D'))
    }

    /// Kills the agent without waiting for its end.
    pub(crate) fn shoot(&mut self) {
        if !self.gone {
            // SAFETY: a plain system call; the process is a child of ours that was not waited for.
            unsafe { libc::kill(self.pid, libc::SIGKILL) };
        }
    }

    /// Waits for the end of an agent that was killed; whether it came in time.
    pub(crate) fn reap(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while !self.gone {
            // SAFETY: a plain system call without a status.
            let got = unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::WNOHANG) };
            if got != 0 {
                self.gone = true;
            } else if Instant::now() >= deadline {
                return false;
            } else {
                std::thread::sleep(Duration::from_micros(300));
            }
        }
        true
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shoot();
        // What hangs in the kernel is left to it.
        self.reap(Duration::from_millis(200));
    }
}

/// Keeps this thread on a processor.
pub(crate) fn stay_on(cpu: usize) {
    // SAFETY: the set is plain memory that is initialised by CPU_ZERO.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_ZERO(&mut set);
        libc::CPU_SET(cpu, &mut set);
        libc::sched_setaffinity(0, size_of_val(&set), &set);
    }
}

/// Waits until one of the descriptors is readable; whether one is.
pub(crate) fn wait_readable(sources: &[RawFd], patience: Duration) -> Result<bool> {
    let mut polls: Vec<libc::pollfd> =
        sources.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let milliseconds = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: the array is `polls`.
        match unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, milliseconds) } {
            0 => return Ok(false),
            1.. => return Ok(true),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::EINTR) => {}
                error => return Err(error).context("poll"),
            },
        }
    }
}
