// SPDX-License-Identifier: MIT OR Apache-2.0

//! A stand-in for the driver, in this process and without privileges.
//!
//! It keeps the rules that a server can break (who may fetch and commit which tag, and when), answers
//! control commands from the same states, and plays the block layer's part: [`FakeDisk`] sends
//! requests and waits for their end. What it does not have is everything around that: no nodes, no
//! page cache, no partition scan.
//!
//! Invariant of the `unsafe` blocks: the address that a server passes with FETCH_REQ or
//! COMMIT_AND_FETCH_REQ points to a buffer of the device's `max_io_buf_bytes`, which the server leaves
//! alone until the command completes. That is the driver's own contract.

mod char_device;
mod control;
mod disk;
mod ring;
mod tags;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use self::char_device::FakeChar;
pub use self::disk::{FakeDisk, Sent};
use self::ring::{Completions, FakeRing, RingFiles};
use super::{CharDevice, ControlCommand, ControlFailure, Driver, Operation, Ring};
use crate::errno::Errno;
use crate::memory::{Descriptor, Region};
use crate::uapi::{self, Features, ublk_params, ublksrv_ctrl_dev_info};
use crate::units::DeviceId;

/// How long a disk's client waits for a request to end.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);

/// The driver.
#[derive(Clone, Debug, Default)]
pub struct FakeDriver {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<FakeState>,
    changed: Condvar,
    /// A client sends more: rings do not look yet.
    holding: AtomicBool,
    /// What cleared memory is filled with. Not under the lock, which another thread may hold while a handler forks.
    unwritten_byte: AtomicU8,
}

#[derive(Debug, Default)]
struct FakeState {
    devices: BTreeMap<u32, FakeDevice>,
    /// Rules that a server broke.
    violations: Vec<String>,
    /// Answers that clients have not looked at, by their request's ticket.
    answers: HashMap<u64, Result<Vec<u8>, Errno>>,
    tickets: u64,
    /// Rings may call themselves quiet: no client is at work.
    quiet: bool,
    files: Files,
    /// What the driver says it can do; everything unless a test wants less.
    offered: Option<Features>,
    /// Whether callers lack CAP_SYS_ADMIN.
    unprivileged: bool,
    char_openings: usize,
    /// How long the last close of a char device takes.
    close_delay: Duration,
    /// Errnos to answer the next commands of a name with.
    refusals: HashMap<&'static str, VecDeque<Errno>>,
    /// Commands that are not answered.
    ignored: HashSet<&'static str>,
    /// What happens after the next command of a name.
    hooks: HashMap<&'static str, Hook>,
}

struct Hook(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// How files behave.
#[derive(Debug, Default)]
struct Files {
    /// How long they take for an operation.
    delay: Duration,
    /// What they refuse reads and writes with.
    refusal: Option<Errno>,
    /// They take operations, and carry them out later.
    holding: bool,
    held: Vec<HeldOperation>,
}

/// An operation that a file has taken.
#[derive(Debug)]
struct HeldOperation {
    ring: Arc<Completions>,
    user_data: u64,
    operation: Operation,
    /// What a ring keeps open while it has operations in flight.
    files: RingFiles,
}

#[derive(Debug)]
struct FakeDevice {
    info: ublksrv_ctrl_dev_info,
    /// See [`Driver::instance`].
    instance: u64,
    /// DEL_DEV was sent: only its number is left, until the char device is closed.
    deleted: bool,
    params: Option<ublk_params>,
    queues: Vec<FakeQueue>,
    char_open: bool,
    /// QUIESCE_DEV was sent: tags go back to the server, until the next one comes.
    canceling: bool,
    /// How much memory clients have shared, counted in registrations.
    shared_memory: i32,
    /// Requests that the dead server held and the next one gets.
    held: Vec<(Descriptor, FakeRequest)>,
}

#[derive(Debug)]
struct FakeQueue {
    descriptors: Arc<Region>,
    tags: Vec<FakeTag>,
    /// Where FETCH_IO_CMDS delivers tags: the ring, and the command's `user_data`.
    delivery: Option<(Arc<Completions>, u64)>,
}

/// Who fetched a tag, and where the answer goes.
#[derive(Clone, Debug)]
struct Command {
    ring: Arc<Completions>,
    user_data: u64,
    address: u64,
    /// Where pages are to be registered.
    register: Option<u16>,
    /// The thread that may commit; any for a batch.
    daemon: Option<ThreadId>,
}

/// A request on its way through the server.
#[derive(Clone, Debug)]
struct FakeRequest {
    daemon: Option<ThreadId>,
    /// A read's length, 0 for others.
    len: usize,
    /// Its pages.
    pages: Vec<u8>,
    /// Its data is in memory that the client shares.
    shared: bool,
    ticket: u64,
}

#[derive(Clone, Debug)]
enum FakeTag {
    Idle,
    Armed(Command),
    /// The server was asked where a write's data shall go.
    Asked(FakeRequest),
    /// The server has the request.
    Served(FakeRequest),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `check` gives something.
    fn wait_for<T>(
        &self,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
        mut check: impl FnMut(&mut FakeState) -> Option<T>,
    ) -> Result<T, ControlFailure> {
        let deadline = super::deadline(timeout);
        loop {
            if let Some(value) = check(&mut self.state()) {
                return Ok(value);
            }
            // Without the lock: it may ask the driver, or close a device.
            if give_up() {
                return Err(ControlFailure::GaveUp);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ControlFailure::Timeout);
            }
            let mut state = self.state();
            if let Some(value) = check(&mut state) {
                return Ok(value);
            }
            let slice = left.min(Duration::from_millis(10));
            drop(self.changed.wait_timeout(state, slice).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl FakeDriver {
    /// A driver without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// The disk of a device, as a client of the block layer sees it.
    pub fn disk(&self, id: DeviceId) -> FakeDisk {
        FakeDisk::new(self.shared.clone(), id.0)
    }

    /// Answers the next command of this name with an errno: a control command's name in the UAPI, or
    /// `FETCH_REQ` or `PREP_IO_CMDS`, `COMMIT_AND_FETCH_REQ` for any commit, or `fdatasync` for that of any file.
    /// `io_uring_setup` is for the next ring, and `io_uring_enter` for a submission without a wait, which fails after it has carried out what was queued.
    pub fn refuse_next(&self, command: &'static str, errno: Errno) {
        self.shared.state().refusals.entry(command).or_default().push_back(errno);
    }

    /// Leaves the next control command of this name without an answer, until its sender gives up or its time is over, which
    /// takes a minute here.
    pub fn ignore_next(&self, command: &'static str) {
        self.shared.state().ignored.insert(command);
    }

    /// Calls `act` after the next control command of this name, before its sender goes on: what other processes do then.
    pub fn after_next(&self, command: &'static str, act: impl FnOnce() + Send + 'static) {
        self.shared.state().hooks.insert(command, Hook(Box::new(act)));
    }

    /// How often a char device was to be opened.
    pub fn char_openings(&self) -> usize {
        self.shared.state().char_openings
    }

    /// Has the driver notice only after this time that a char device was closed: drivers release devices in the background.
    pub fn delay_closes(&self, delay: Duration) {
        self.shared.state().close_delay = delay;
    }

    /// Makes the driver an older one, which has only these features.
    pub fn offer(&self, features: Features) {
        self.shared.state().offered = Some(features | ALWAYS_ON);
    }

    /// Treats all callers as users without CAP_SYS_ADMIN, from now on.
    pub fn drop_privileges(&self) {
        self.shared.state().unprivileged = true;
    }

    /// Makes files slow.
    pub fn delay_files(&self, delay: Duration) {
        self.shared.state().files.delay = delay;
    }

    /// Has files refuse all reads and writes, as a FUSE server may with any errno.
    pub fn refuse_files(&self, errno: Option<Errno>) {
        self.shared.state().files.refusal = errno;
    }

    /// Has files take operations without answering, as one on a network does whose server is away. With `false` they
    /// carry out what they have, and go on.
    pub fn hold_files(&self, holding: bool) {
        let mut state = self.shared.state();
        state.files.holding = holding;
        let held = if holding { Vec::new() } else { std::mem::take(&mut state.files.held) };
        drop(state);
        self.carry_out(held);
    }

    /// Has the file carry out the operation that it has taken last, and hold the others.
    pub fn release_last_file(&self) {
        let last = self.shared.state().files.held.pop();
        self.carry_out(last.into_iter().collect());
    }

    fn carry_out(&self, held: Vec<HeldOperation>) {
        for HeldOperation { ring, user_data, operation, files } in held {
            let refusal = self.shared.state().refusal_of(operation);
            ring.push(user_data, refusal.map_or_else(|| ring::file_operation(operation), |errno| -errno.get()));
            drop(files);
        }
    }

    /// How many operations files have taken and not carried out.
    pub fn held_files(&self) -> usize {
        self.shared.state().files.held.len()
    }

    /// Has servers fill the memory of reads with `byte` where they [clear](crate::Request::clear) it, so that a test sees
    /// which bytes a handler has left unwritten.
    pub fn poison_reads(&self, byte: u8) {
        self.shared.unwritten_byte.store(byte, Ordering::Relaxed);
    }

    /// Lets servers give memory back while rings are idle. Until then no client may send anything: it would
    /// not be the thread of the ring, as the driver is.
    pub fn let_memory_go(&self, quiet: bool) {
        self.shared.state().quiet = quiet;
    }

    /// The rules that servers have broken so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.state().violations.clone()
    }
}

// SAFETY: what it copies is what addresses and lengths of submissions name, while they are under way.
unsafe impl Driver for FakeDriver {
    unsafe fn control(
        &self,
        mut command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>), ControlFailure> {
        let result = self.execute(&mut command, timeout, give_up);
        let hook = self.shared.state().hooks.remove(command.name);
        if let Some(Hook(act)) = hook {
            act();
        }
        let result = result?;
        Ok((result, command.payload))
    }

    fn open_char(&self, id: DeviceId) -> io::Result<Arc<dyn CharDevice>> {
        let mut state = self.shared.state();
        state.char_openings += 1;
        let device = state.devices.get_mut(&id.0).filter(|device| !device.deleted).ok_or(Errno::ENXIO)?;
        if std::mem::replace(&mut device.char_open, true) {
            return Err(Errno::EBUSY.into());
        }
        Ok(Arc::new(FakeChar::new(self.shared.clone(), id.0)))
    }

    fn new_ring(&self) -> io::Result<Box<dyn Ring>> {
        match self.shared.state().refusals.get_mut("io_uring_setup").and_then(VecDeque::pop_front) {
            Some(errno) => Err(errno.into()),
            None => Ok(Box::new(FakeRing::new(self.shared.clone()))),
        }
    }

    fn block_path(&self, id: DeviceId) -> PathBuf {
        format!("/nonexistent/ublkb{id}").into()
    }

    fn block_node_exists(&self, id: DeviceId) -> bool {
        self.shared.state().devices.get(&id.0).is_some_and(|d| d.info.state == uapi::UBLK_S_DEV_LIVE)
    }

    fn device_ids(&self) -> io::Result<Vec<DeviceId>> {
        let state = self.shared.state();
        Ok(state.devices.iter().filter(|(_, device)| !device.deleted).map(|(id, _)| DeviceId(*id)).collect())
    }

    fn instance(&self, id: DeviceId) -> io::Result<Option<u64>> {
        let state = self.shared.state();
        Ok(state.devices.get(&id.0).filter(|device| !device.deleted).map(|device| device.instance))
    }
}

/// Counts the devices of all drivers of this process.
static INSTANCES: AtomicU64 = AtomicU64::new(1);

/// What every device has.
const ALWAYS_ON: Features = Features::CMD_IOCTL_ENCODE.union(Features::URING_CMD_COMP_IN_TASK);
/// What keeps the driver from copying.
const NOT_COPIED: Features = Features::USER_COPY.union(Features::SUPPORT_ZERO_COPY).union(Features::AUTO_BUF_REG);

impl FakeState {
    /// What a file's sync is to fail with.
    fn refusal_of(&mut self, operation: Operation) -> Option<Errno> {
        let syncs = matches!(operation, Operation::SyncData { .. });
        self.refusals.get_mut("fdatasync").filter(|_| syncs).and_then(VecDeque::pop_front)
    }

    /// What the driver offers.
    fn features(&self) -> Features {
        self.offered.unwrap_or(Features::all())
    }
}
