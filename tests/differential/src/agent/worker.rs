// SPDX-License-Identifier: MIT OR Apache-2.0

//! An agent's side: its process, its threads, and control commands.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::block::Disk;
use super::memory::Memory;
use super::server::{Server, Shared};
use super::{Answer, ControlOrder, Identity, Order, SHARED, USER, stay_on};
use crate::ring::{ASYNC_CANCEL, Ring, Sqe, URING_CMD};
use ublk_test_common::uapi::{Plain, ublksrv_ctrl_cmd};

/// Room for the payload of a control command; more than `len` can say.
const ROOM: usize = 1 << 17;
/// Bytes of the payload that the conductor gets to see.
const SHOWN: usize = 512;

/// The result of a system call, as a number or a negative errno.
pub(super) fn outcome<T: Into<i64>>(value: T) -> i64 {
    let value = value.into();
    if value < 0 { last_errno() } else { value }
}

/// The negative errno of the last system call.
pub(super) fn last_errno() -> i64 {
    negative(&io::Error::last_os_error())
}

/// The negative errno of an error.
pub(super) fn negative(error: &io::Error) -> i64 {
    -i64::from(error.raw_os_error().unwrap_or(libc::EIO))
}

/// The agent's process; does not return.
pub(super) fn process(identity: Identity, sockets: Vec<OwnedFd>, event: RawFd, cpus: &[usize]) -> ! {
    // SAFETY: plain system calls on this process itself.
    unsafe {
        if identity == Identity::User {
            let none: [libc::gid_t; 0] = [];
            if libc::setgroups(0, none.as_ptr()) != 0 || libc::setgid(USER) != 0 || libc::setuid(USER) != 0 {
                libc::_exit(1);
            }
        }
        // After the change of identity, which resets it.
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
    }
    let shared = Arc::new(Shared::default());
    let threads: Vec<_> = sockets
        .into_iter()
        .enumerate()
        .map(|(number, socket)| {
            let shared = Arc::clone(&shared);
            let cpu = cpus.get(number).copied();
            std::thread::spawn(move || {
                if let Some(cpu) = cpu {
                    stay_on(cpu);
                }
                Worker::new(socket, event, shared).run();
            })
        })
        .collect();
    for thread in threads {
        let _ = thread.join();
    }
    // SAFETY: ends the process without the conductor's exit handlers.
    unsafe { libc::_exit(0) }
}

/// A control command that has not completed.
struct Pending {
    payload: Memory,
    address: u64,
    shown: usize,
    wide: bool,
}

struct Worker {
    socket: OwnedFd,
    event: RawFd,
    server: Server,
    disk: Disk,
    control: Option<std::fs::File>,
    wide: Option<Ring>,
    narrow: Option<Ring>,
    pending: HashMap<u64, Pending>,
    done: HashMap<u64, i32>,
    token: u64,
    /// Payload memory that is free again.
    spare: Vec<Memory>,
    /// Memory for registered buffers.
    shareable: Option<Memory>,
}

impl Worker {
    fn new(socket: OwnedFd, event: RawFd, shared: Arc<Shared>) -> Self {
        Worker {
            socket,
            event,
            server: Server::new(event, shared),
            disk: Disk::default(),
            control: None,
            wide: None,
            narrow: None,
            pending: HashMap::new(),
            done: HashMap::new(),
            token: 0,
            spare: Vec::new(),
            shareable: None,
        }
    }

    fn run(mut self) {
        let mut text = vec![0u8; 1 << 18];
        loop {
            if self.server.on_autopilot() {
                self.server.serve(self.socket.as_raw_fd());
            }
            // SAFETY: the buffer is `text`.
            let got = unsafe { libc::recv(self.socket.as_raw_fd(), text.as_mut_ptr().cast(), text.len(), 0) };
            if got < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINTR) {
                continue;
            }
            if got <= 0 {
                return;
            }
            let answer = match serde_json::from_slice::<Order>(&text[..got as usize]) {
                Ok(order) => self.execute(order).unwrap_or_else(|error| Answer::Broken(error.to_string())),
                Err(error) => Answer::Broken(error.to_string()),
            };
            let Ok(bytes) = serde_json::to_vec(&answer) else { return };
            // SAFETY: the buffer is `bytes`.
            let sent =
                unsafe { libc::send(self.socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_NOSIGNAL) };
            if sent < 0 {
                return;
            }
        }
    }

    fn execute(&mut self, order: Order) -> io::Result<Answer> {
        match order {
            Order::Control(order) => self.control(&order),
            Order::Await { token, patience } => self.wait(token, Duration::from_millis(patience)),
            Order::Cancel { token, patience } => self.cancel(token, Duration::from_millis(patience)),
            Order::Read(paths) => Ok(Answer::Texts(
                paths
                    .iter()
                    .map(|path| {
                        std::fs::read_to_string(path)
                            .map(|text| text.trim_end().to_owned())
                            .map_err(|error| negative(&error) as i32)
                    })
                    .collect(),
            )),
            // SAFETY: a plain system call.
            Order::Number => Ok(Answer::Status(unsafe { libc::gettid() }.into())),
            Order::Exist(paths) => Ok(Answer::Texts(
                paths.iter().map(|path| Ok(std::fs::symlink_metadata(path).is_ok().to_string())).collect(),
            )),
            Order::Own(path) => Ok(Answer::Status(
                std::os::unix::fs::chown(&path, Some(USER), Some(USER)).map_or_else(|error| negative(&error), |()| 0),
            )),
            Order::OpenDisk { id, write, exclusive } => Ok(Answer::Status(self.disk.open(id, write, exclusive))),
            Order::CloseDisk => Ok(Answer::Status(self.disk.close())),
            Order::Block(order) => self.disk.execute(&order),
            other => self.server.execute(other),
        }
    }

    fn ring(&mut self, wide: bool) -> io::Result<&mut Ring> {
        let slot = if wide { &mut self.wide } else { &mut self.narrow };
        if slot.is_none() {
            *slot = Some(Ring::new(8, wide, self.event)?);
        }
        slot.as_mut().ok_or_else(|| io::Error::other("the ring was just made"))
    }

    fn control(&mut self, order: &ControlOrder) -> io::Result<Answer> {
        let fd = match &self.control {
            Some(file) => file.as_raw_fd(),
            None => {
                let file = std::fs::OpenOptions::new().read(true).write(true).open("/dev/ublk-control")?;
                let fd = file.as_raw_fd();
                self.control = Some(file);
                fd
            }
        };
        let payload = match self.spare.pop() {
            Some(memory) => memory,
            None => Memory::new(ROOM)?,
        };
        if order.place == super::Place::Roomy {
            let behind = order.payload.len();
            payload.part(behind, SHOWN).fill(0);
        }
        let mut bytes = order.payload.clone();
        if let Some(at) = order.memory_at {
            let memory = match self.shareable {
                Some(memory) => memory,
                None => *self.shareable.insert(Memory::new(SHARED as usize)?),
            };
            let given = u64::from_ne_bytes(bytes[at..at + 8].try_into().map_err(io::Error::other)?);
            bytes[at..at + 8].copy_from_slice(&memory.address(given as usize).to_ne_bytes());
        }
        let address = payload.put(order.place, &bytes);
        let header = ublksrv_ctrl_cmd {
            dev_id: order.dev_id,
            queue_id: order.queue_id,
            len: order.len,
            addr: address,
            data: [order.data],
            dev_path_len: order.path_len,
            ..Default::default()
        };
        self.token += 1;
        let token = self.token;
        let sqe = Sqe {
            opcode: URING_CMD,
            fd,
            offset: u64::from(order.op),
            user_data: token,
            payload: header.bytes(),
            ..Sqe::default()
        };
        let shown = match order.place {
            super::Place::Roomy => SHOWN,
            super::Place::Tight => order.payload.len(),
            super::Place::Nowhere | super::Place::Fault => 0,
        };
        self.pending.insert(token, Pending { payload, address, shown, wide: !order.narrow });
        self.ring(!order.narrow)?.submit(&sqe)?;
        self.wait(token, Duration::from_millis(order.patience))
    }

    fn wait(&mut self, token: u64, patience: Duration) -> io::Result<Answer> {
        let Some(wide) = self.pending.get(&token).map(|pending| pending.wide) else {
            return Err(io::Error::other("there is no such control command"));
        };
        let deadline = Instant::now() + patience;
        loop {
            let completions = self.ring(wide)?.take();
            self.done.extend(completions.iter().map(|cqe| (cqe.user_data, cqe.result)));
            if let Some(result) = self.done.remove(&token)
                && let Some(pending) = self.pending.remove(&token)
            {
                let shown = pending
                    .payload
                    .offset_of(pending.address)
                    .map_or_else(Vec::new, |offset| pending.payload.part(offset, pending.shown).to_vec());
                self.spare.push(pending.payload);
                return Ok(Answer::Control { token, result: Some(result), payload: shown });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Answer::Control { token, result: None, payload: Vec::new() });
            }
            self.ring(wide)?.wait(left)?;
        }
    }

    fn cancel(&mut self, token: u64, patience: Duration) -> io::Result<Answer> {
        let Some(wide) = self.pending.get(&token).map(|pending| pending.wide) else {
            return Err(io::Error::other("there is no such control command"));
        };
        let sqe = Sqe { opcode: ASYNC_CANCEL, fd: -1, addr: token, user_data: u64::MAX, ..Sqe::default() };
        self.ring(wide)?.submit(&sqe)?;
        let answer = self.wait(token, patience);
        self.done.remove(&u64::MAX);
        answer
    }
}
