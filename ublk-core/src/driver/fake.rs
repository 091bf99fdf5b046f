// SPDX-License-Identifier: MIT OR Apache-2.0

//! A stand-in for the driver, in this process and without privileges.
//!
//! It keeps the rules that a server can break (who may fetch and commit which tag, and when), answers
//! control commands from the same states, and acts as the block layer: [`FakeDisk`] sends
//! requests and waits for their end. It has no device nodes, no page cache and no partition scan.
//!
//! Invariant of the `unsafe` blocks: the address that a server passes with FETCH_REQ or
//! COMMIT_AND_FETCH_REQ points to a buffer of the device's `max_io_buf_bytes`, which the server does not access
//! until the command completes. That is the driver's own contract.

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

/// Time limit of a client's request.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(20);

/// A stand-in for the ublk driver. Clones share its devices.
#[derive(Clone, Debug, Default)]
pub struct FakeDriver {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<FakeState>,
    changed: Condvar,
    /// Whether a client is still sending: rings do not look for requests yet.
    holding: AtomicBool,
    /// Byte that cleared memory is filled with. Not under the lock, which another thread may hold while a handler forks.
    unwritten_byte: AtomicU8,
}

#[derive(Debug, Default)]
struct FakeState {
    devices: BTreeMap<u32, FakeDevice>,
    /// Rules that a server broke.
    violations: Vec<String>,
    /// Results that clients have not taken, by the ticket of their request.
    answers: HashMap<u64, Result<Vec<u8>, Errno>>,
    tickets: u64,
    /// Whether rings may report that they are quiet: no client is sending.
    quiet: bool,
    files: Files,
    /// Features that the driver offers; all unless a test limits them.
    offered: Option<Features>,
    /// Whether callers lack CAP_SYS_ADMIN.
    unprivileged: bool,
    char_openings: usize,
    /// Delay with which the driver notices the last close of a char device.
    close_delay: Duration,
    /// Errnos for the next commands of a name.
    refusals: HashMap<&'static str, VecDeque<Errno>>,
    /// Commands that are not answered.
    ignored: HashSet<&'static str>,
    /// Commands that exceed their time limit at once.
    expired: HashSet<&'static str>,
    /// Functions to call after the next command of a name.
    hooks: HashMap<&'static str, Hook>,
}

struct Hook(Box<dyn FnOnce() + Send>);

impl std::fmt::Debug for Hook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hook")
    }
}

/// Behaviour of files.
#[derive(Debug, Default)]
struct Files {
    /// Duration of an operation.
    delay: Duration,
    /// Errno with which they refuse reads and writes.
    refusal: Option<Errno>,
    /// Whether they accept operations without carrying them out.
    holding: bool,
    held: Vec<HeldOperation>,
}

/// An operation that a file has accepted and not carried out.
#[derive(Debug)]
struct HeldOperation {
    ring: Arc<Completions>,
    user_data: u64,
    operation: Operation,
    /// Files that a ring keeps open while it has operations in flight.
    files: RingFiles,
}

#[derive(Debug)]
struct FakeDevice {
    info: ublksrv_ctrl_dev_info,
    /// See [`Driver::instance`].
    instance: u64,
    /// Whether DEL_DEV was sent: only its number is left, until the char device is closed.
    deleted: bool,
    params: Option<ublk_params>,
    queues: Vec<FakeQueue>,
    char_open: bool,
    /// Whether QUIESCE_DEV was sent: tags go back to the server, until the next one recovers the device.
    canceling: bool,
    /// Number of registrations of memory that clients share.
    shared_memory: i32,
    /// Requests that the last server held and the next one gets.
    held: Vec<(Descriptor, FakeRequest)>,
}

#[derive(Debug)]
struct FakeQueue {
    descriptors: Arc<Region>,
    tags: Vec<FakeTag>,
    /// Ring to which FETCH_IO_CMDS delivers tags, and the command's `user_data`.
    delivery: Option<(Arc<Completions>, u64)>,
}

/// Fetch of a tag, and where its completion goes.
#[derive(Clone, Debug)]
struct Command {
    ring: Arc<Completions>,
    user_data: u64,
    address: u64,
    /// Index at which to register pages.
    register: Option<u16>,
    /// Thread that may commit; `None` for a batch, which any thread may commit.
    daemon: Option<ThreadId>,
}

/// A request that is sent to the server.
#[derive(Clone, Debug)]
struct FakeRequest {
    daemon: Option<ThreadId>,
    /// A read's length, 0 for others.
    len: usize,
    /// Its pages.
    pages: Vec<u8>,
    /// Whether its data is in memory that the client shares.
    shared: bool,
    ticket: u64,
}

#[derive(Clone, Debug)]
enum FakeTag {
    Idle,
    Armed(Command),
    /// The server was asked for the destination of a write's data.
    Asked(FakeRequest),
    /// The server has the request.
    Served(FakeRequest),
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `check` returns a value.
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
    /// Creates a driver without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the disk of a device, as a client of the block layer sees it.
    pub fn disk(&self, id: DeviceId) -> FakeDisk {
        FakeDisk::new(self.shared.clone(), id.0)
    }

    /// Fails the next command of this name with an errno. The name is that of a control command in the UAPI, `FETCH_REQ`,
    /// `PREP_IO_CMDS`, `COMMIT_AND_FETCH_REQ` for any commit, `fdatasync` for that of any file, `io_uring_setup` for the next
    /// ring, or `io_uring_enter` for a submission without a wait, which fails after it has carried out what was queued.
    pub fn refuse_next(&self, command: &'static str, errno: Errno) {
        self.shared.state().refusals.entry(command).or_default().push_back(errno);
    }

    /// Leaves the next control command of this name without an answer, until its sender gives up or its time limit, here a
    /// minute, is exceeded.
    pub fn ignore_next(&self, command: &'static str) {
        self.shared.state().ignored.insert(command);
    }

    /// Has the next control command of this name exceed its time limit, at once, without being carried out.
    pub fn expire_next(&self, command: &'static str) {
        self.shared.state().expired.insert(command);
    }

    /// Calls `act` after the next control command of this name, before its sender continues, in place of other processes.
    pub fn after_next(&self, command: &'static str, act: impl FnOnce() + Send + 'static) {
        self.shared.state().hooks.insert(command, Hook(Box::new(act)));
    }

    /// Returns the number of attempts to open a char device.
    pub fn char_openings(&self) -> usize {
        self.shared.state().char_openings
    }

    /// Delays the moment in which the driver notices that a char device was closed: drivers release devices in the background.
    pub fn delay_closes(&self, delay: Duration) {
        self.shared.state().close_delay = delay;
    }

    /// Limits the features that the driver offers, like an older driver.
    pub fn offer(&self, features: Features) {
        self.shared.state().offered = Some(features | ALWAYS_ON);
    }

    /// Treats all callers as users without CAP_SYS_ADMIN, from now on.
    pub fn drop_privileges(&self) {
        self.shared.state().unprivileged = true;
    }

    /// Sets the duration of operations on files.
    pub fn delay_files(&self, delay: Duration) {
        self.shared.state().files.delay = delay;
    }

    /// Sets the errno with which files refuse all reads and writes, as FUSE servers may with any errno.
    pub fn refuse_files(&self, errno: Option<Errno>) {
        self.shared.state().files.refusal = errno;
    }

    /// Has files accept operations without completing them, like a file on a network whose server is down. With `false`, they
    /// carry out what they have accepted, and work as usual again.
    pub fn hold_files(&self, holding: bool) {
        let mut state = self.shared.state();
        state.files.holding = holding;
        let held = if holding { Vec::new() } else { std::mem::take(&mut state.files.held) };
        drop(state);
        self.carry_out(held);
    }

    /// Carries out the operation that a file has accepted last. The others stay held.
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

    /// Returns the number of operations that files have accepted and not carried out.
    pub fn held_files(&self) -> usize {
        self.shared.state().files.held.len()
    }

    /// Has servers fill the memory of reads with `byte` where they [clear](crate::Request::clear) it, so that a test sees
    /// which bytes a handler has left unwritten.
    pub fn poison_reads(&self, byte: u8) {
        self.shared.unwritten_byte.store(byte, Ordering::Relaxed);
    }

    /// Allows servers to give memory back while rings are idle. No client may be sending at such a moment: its thread copies
    /// the data, which the kernel's driver does on the thread of the ring.
    pub fn let_memory_go(&self, quiet: bool) {
        self.shared.state().quiet = quiet;
    }

    /// Returns the ids of all devices, in ascending order.
    pub fn devices(&self) -> Vec<DeviceId> {
        let state = self.shared.state();
        state.devices.iter().filter(|(_, device)| !device.deleted).map(|(id, _)| DeviceId(*id)).collect()
    }

    /// Opens a device's char device, as another program would. It stays open until the result is dropped.
    ///
    /// # Errors
    ///
    /// `ENXIO` without such a device, `EBUSY` if it is open already.
    pub fn open_char_device(&self, id: DeviceId) -> Result<impl std::fmt::Debug + use<>, Errno> {
        self.open(id)
    }

    fn open(&self, id: DeviceId) -> Result<FakeChar, Errno> {
        let mut state = self.shared.state();
        state.char_openings += 1;
        let device = state.devices.get_mut(&id.0).filter(|device| !device.deleted).ok_or(Errno::ENXIO)?;
        if std::mem::replace(&mut device.char_open, true) {
            return Err(Errno::EBUSY);
        }
        Ok(FakeChar::new(self.shared.clone(), id.0))
    }

    /// Returns the rules that servers have broken so far.
    pub fn violations(&self) -> Vec<String> {
        self.shared.state().violations.clone()
    }
}

// SAFETY: it accesses only memory that submissions name, until they complete.
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
        Ok(Arc::new(self.open(id)?))
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
        Ok(self.devices())
    }

    fn instance(&self, id: DeviceId) -> io::Result<Option<u64>> {
        let state = self.shared.state();
        Ok(state.devices.get(&id.0).filter(|device| !device.deleted).map(|device| device.instance))
    }
}

/// Number of devices that all drivers of this process have created.
static INSTANCES: AtomicU64 = AtomicU64::new(1);

/// Features of every device.
const ALWAYS_ON: Features = Features::CMD_IOCTL_ENCODE.union(Features::URING_CMD_COMP_IN_TASK);
/// Features with which the driver does not copy data.
const NOT_COPIED: Features = Features::USER_COPY.union(Features::SUPPORT_ZERO_COPY).union(Features::AUTO_BUF_REG);

impl FakeState {
    /// Takes the errno with which an operation on a file is to fail.
    fn refusal_of(&mut self, operation: Operation) -> Option<Errno> {
        let syncs = matches!(operation, Operation::SyncData { .. });
        self.refusals.get_mut("fdatasync").filter(|_| syncs).and_then(VecDeque::pop_front)
    }

    /// Returns the features that the driver offers.
    fn features(&self) -> Features {
        self.offered.unwrap_or(Features::all())
    }
}
