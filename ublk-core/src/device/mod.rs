// SPDX-License-Identifier: MIT OR Apache-2.0

//! The life of a device: add, start, serve, stop, delete. Every wait in it ends.
//!
//! * [`fitting`] — whether a target can serve a disk that was made for another one.
//! * [`recovery`] — a device that has lost its server gets another one.
//! * [`ending`] — how a server stops a device, or leaves it.
//! * [`serving`] — which server of this process is a device's latest.

mod ending;
mod fitting;
mod recovery;
mod serving;

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

pub use self::ending::Ending;
#[cfg(feature = "cli")]
pub(crate) use self::recovery::check_fit;
use self::serving::Serving;
use crate::control::{AddRequest, Control, DeviceInfo};
use crate::data::shared::{SharedMemory, SharedTable};
use crate::data::{Access, DataMovement};
use crate::driver::kernel::KernelDriver;
use crate::driver::{CharDevice, Driver};
use crate::engine::{QueueEvents, QueueSetup, Spawn, StdSpawn, ThreadPool};
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result, errno_of};
use crate::options::DeviceOptions;
use crate::params::{Operations, Params};
use crate::placement::Cpus;
use crate::plan::{Demands, Plan};
use crate::request::FileSync;
use crate::stats::{DeviceCounters, DeviceStats, StatsHandle};
use crate::target::{QueueInfo, Target};
use crate::uapi::Features;
use crate::units::{DeviceId, QueueId};

/// What the driver demands of clients' memory by itself.
const DEFAULT_DMA_ALIGNMENT: u32 = 4;

/// How long `/dev/ublkcN` and `/dev/ublkbN` may take to appear, and udev to let go of the former.
const NODE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long udev may take to give a user his device; without its rules it never does.
const ACCESS_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a thread may take to open a queue.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

/// Serves devices: a driver, and threads that their queues share.
#[derive(Clone, Debug)]
pub struct Server {
    control: Control,
    pool: Arc<ThreadPool>,
    cpus: Cpus,
    coalescing: Duration,
}

/// The longest window of [request coalescing](Server::with_coalescing).
pub const MAX_COALESCING: Duration = Duration::from_millis(10);

impl Server {
    /// A server on the running kernel's driver, with as many threads as there are CPUs at most.
    ///
    /// # Errors
    ///
    /// See [`KernelDriver::open`].
    pub fn new() -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self::with_driver(Arc::new(KernelDriver::open()?), Arc::new(StdSpawn), threads))
    }

    /// A server on any driver, with at most `threads` threads, which `spawn` starts.
    pub fn with_driver(driver: Arc<dyn Driver>, spawn: Arc<dyn Spawn>, threads: usize) -> Self {
        let pool = Arc::new(ThreadPool::new(driver.clone(), spawn, threads));
        Server { control: Control::new(driver), pool, cpus: Cpus::Any, coalescing: Duration::ZERO }
    }

    /// The same server with its threads on certain CPUs. Devices that it serves already are not moved.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] for CPUs that this process may not use.
    pub fn with_cpus(mut self, cpus: Cpus) -> Result<Self> {
        cpus.check()?;
        self.cpus = cpus;
        Ok(self)
    }

    /// The same server with request coalescing, like interrupt coalescing of network cards: under load, a thread sleeps for
    /// `window` after each round, and then handles a batch. Zero, the default, disables it; 20 µs are a good start.
    ///
    /// This means less work per request and more latency: up to `window` for each step of a request (its arrival, and its
    /// end if a file or another thread has served it). It applies while rounds bring two requests or more, and ends after
    /// four rounds with one request, so that a client that sends one request at a time does not wait. The latencies in
    /// statistics begin when the thread takes the request. A thread that also serves queues with a shorter window uses
    /// that. Devices that the server has already keep their window. Before Linux 6.1 the thread is woken for each request
    /// all the same.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] for more than [`MAX_COALESCING`].
    pub fn with_coalescing(mut self, window: Duration) -> Result<Self> {
        if window > MAX_COALESCING {
            let most = format!("{} µs at most", MAX_COALESCING.as_micros());
            return Err(Error::invalid(Parameter::Coalescing, format!("{} µs", window.as_micros()), most));
        }
        self.coalescing = window;
        Ok(self)
    }

    /// The control plane of this server's driver.
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Makes a device, serves it and returns when its node can be used.
    ///
    /// # Errors
    ///
    /// Whatever goes wrong on the way is undone first: after an error there is no device.
    pub fn start(&self, target: Arc<dyn Target>, options: &DeviceOptions) -> Result<Device> {
        let device = self.add(&target, options)?;
        device.go_live(target)?;
        Ok(device)
    }

    /// Makes a device that has an id and no disk yet: [`Device::go_live`] does the rest of
    /// [`start`](Server::start). For those who have to know the device before its first request comes, which before
    /// Linux 7.0 is one of the partition scan.
    ///
    /// # Errors
    ///
    /// As [`start`](Server::start).
    pub fn add(&self, target: &Arc<dyn Target>, options: &DeviceOptions) -> Result<Device> {
        let params = target.params();
        let (queues, depth) = options.checked()?;
        params.validate()?;
        let offered = self.check_driver()?;
        let access = target.access();
        let mut features = Features::empty();
        features.set(Features::NO_AUTO_PART_SCAN, !options.partition_scan);
        features.set(Features::SHMEM_ZC, options.shared_memory);
        if let Some(recovery) = options.recovery {
            // So that it can be handed over without a failure, where the driver has that.
            features |= recovery.features() | (offered & Features::QUIESCE);
        }
        features.set(Features::ZONED, params.zoned.is_some());
        features.set(Features::INTEGRITY, params.integrity.is_some());
        let excludes_copy = features.intersects(Features::ZONED | Features::INTEGRITY);
        let demands = Demands { access, excludes_copy, features };
        let plan = Plan::choose(offered, &demands, options)?;
        log::debug!("data moves by {}: {}", plan.data, plan.reason);
        let events = Arc::new(QueueEvents::new()?);
        let backing = target.backing();
        let add = |plan: Plan| {
            let features = plan.features;
            let max_io_bytes = params.max_io_bytes;
            self.control
                .add(&AddRequest { id: options.id, queues, depth, max_io_bytes, features, backing })
                .map(|info| (info, plan))
        };
        let (info, plan) = match add(plan) {
            // Without CAP_SYS_ADMIN. Linux 6.3 lets users have devices of their own, with fewer features.
            Err(error) if error.errno() == Errno::EPERM && offered.contains(Features::UNPRIVILEGED_DEV) => {
                add(Plan::choose_unprivileged(offered, &demands, options)?)?
            }
            added => added?,
        };
        let device = self.device(info, params, plan, events, Serving::begin(self.control.instance(info.id)));
        let made = device.plan.check(device.info.features).and_then(|()| device.hold_char());
        made.map_err(|error| device.undo(error))?;
        Ok(device)
    }

    /// A device that is not served yet, and that its end deletes.
    fn device(
        &self,
        info: DeviceInfo,
        params: Params,
        plan: Plan,
        events: Arc<QueueEvents>,
        serving: Serving,
    ) -> Device {
        Device {
            control: self.control.clone(),
            pool: self.pool.clone(),
            path: self.control.driver().block_path(info.id),
            info,
            params,
            plan,
            events,
            counters: DeviceCounters::default(),
            shared: Arc::default(),
            sync: FileSync::of_device(format!("ublkb{}", info.id)),
            started: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            cpus: self.cpus,
            coalescing: self.coalescing,
            held: Mutex::default(),
            file: Mutex::default(),
            serving,
            deleted: Mutex::new(false),
            owner: std::process::id(),
        }
    }

    /// ioctl-encoded commands and GET_FEATURES are what this crate speaks.
    fn check_driver(&self) -> Result<Features> {
        let unsupported = || Error::Unsupported { feature: "UBLK_F_CMD_IOCTL_ENCODE with GET_FEATURES", since: "6.5" };
        let features = self.control.features().map_err(|error| match error.errno() {
            Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EINVAL => unsupported(),
            _ => error,
        })?;
        if features.contains(Features::CMD_IOCTL_ENCODE) { Ok(features) } else { Err(unsupported()) }
    }
}

/// A running device. Dropping it stops and deletes it, unless it can be recovered and
/// [has begun to end](Device::is_ending): then dropping [concludes](Device::conclude) it.
#[derive(Debug)]
pub struct Device {
    control: Control,
    pool: Arc<ThreadPool>,
    path: PathBuf,
    info: DeviceInfo,
    params: Params,
    plan: Plan,
    events: Arc<QueueEvents>,
    counters: DeviceCounters,
    shared: Arc<SharedTable>,
    /// How files are synced that requests are forwarded to.
    sync: FileSync,
    /// A target was set to serve it.
    started: AtomicBool,
    /// It may be about to be left to another server: whatever goes wrong then, dropping this does not delete
    /// it.
    leaving: AtomicBool,
    cpus: Cpus,
    coalescing: Duration,
    /// The char device, from the moment the device is made until its queues are opened.
    held: Mutex<Option<Arc<dyn CharDevice>>>,
    /// The same, which queues keep open from then on.
    file: Mutex<Option<Weak<dyn CharDevice>>>,
    /// What distinguishes it from later devices of its number, and its server from later ones.
    serving: Serving,
    deleted: Mutex<bool>,
    /// The process that serves the device. A forked child has a copy of this structure, but neither the
    /// threads nor the right to end its parent's device.
    owner: u32,
}

impl Device {
    /// The control plane of its driver.
    #[cfg(feature = "cli")]
    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// See [`Control::instance`].
    #[cfg(feature = "cli")]
    pub(crate) fn instance(&self) -> Option<u64> {
        self.serving.instance
    }

    /// Its id.
    pub fn id(&self) -> DeviceId {
        self.info.id
    }

    /// The block device, `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the driver made of the request when the device was added.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The disk's shape.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// How its data moves, and why so.
    pub fn data_movement(&self) -> (DataMovement, &'static str) {
        (self.plan.data, self.plan.reason)
    }

    /// Lets clients that map the same file use it for direct I/O without any copy; see [`SharedMemory`]. The
    /// device has to be made with [`DeviceOptions::shared_memory`].
    ///
    /// Returns a number for [`unshare_memory`](Device::unshare_memory). Without that, the pages stay pinned until
    /// the device is deleted.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` if the device was not made for it, `EEXIST` if some of the pages are shared already, `ECANCELED` if the
    /// device ends meanwhile.
    pub fn share_memory(&self, memory: SharedMemory) -> Result<u16> {
        let _open = self.require_opened("REG_BUF")?;
        let give_up = || self.is_given_up();
        self.shared.add(memory, |memory| self.control.register_memory_unless(self.id(), memory, &give_up))
    }

    /// Ends the sharing of memory. Waits for requests that are in it.
    ///
    /// # Errors
    ///
    /// `ENOENT` if no shared memory is registered with this index, `ECANCELED` if the device ends meanwhile.
    pub fn unshare_memory(&self, index: u16) -> Result<()> {
        let _open = self.require_opened("UNREG_BUF")?;
        let give_up = || self.is_given_up();
        self.shared.remove(index, || self.control.unregister_memory_unless(self.id(), index, &give_up))
    }

    /// What it has done since this server took it over.
    pub fn stats(&self) -> DeviceStats {
        self.counters.snapshot()
    }

    /// A way to read the statistics elsewhere.
    pub fn stats_handle(&self) -> StatsHandle {
        StatsHandle { id: self.id(), counters: self.counters.clone() }
    }

    /// Whether tags go to and from the driver in batches.
    pub fn is_batched(&self) -> bool {
        self.plan.batch
    }

    /// Serves a device that was [added](Server::add), and returns when its node can be used. Once.
    ///
    /// # Errors
    ///
    /// Whatever goes wrong, the device is stopped and deleted. A second time is refused with `EEXIST`, and the device goes
    /// on.
    pub fn go_live(&self, target: Arc<dyn Target>) -> Result<()> {
        self.require_owner("START_DEV")?;
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(Error::Control {
                command: "START_DEV",
                device: Some(self.id()),
                errno: Errno::EEXIST,
                hint: "the device has already been started".into(),
            });
        }
        self.try_to_go_live(&target).map_err(|error| self.undo(error))
    }

    /// Deletes a device whose start has failed, and gives the reason.
    fn undo(&self, error: Error) -> Error {
        // The queue's own words say more than those of the command that it kept waiting.
        let error = self.events.take_failure().unwrap_or(error);
        if let Err(second) = self.stop() {
            log::error!("undoing the start of device {}: {second}", self.id());
        }
        error
    }

    fn try_to_go_live(&self, target: &Arc<dyn Target>) -> Result<()> {
        let id = self.id();
        let mut params = self.params;
        params.read_only |= !params.operations.contains(Operations::WRITE);
        params.dma_alignment = fitting::dma_alignment(&params, target.access(), self.plan.data);
        if self.info.features.contains(Features::UNPRIVILEGED_DEV) {
            self.wait_for_access()?;
            self.hold_open_char()?;
        }
        self.control.set_params_checked(id, &params)?;
        self.open_queues(target)?;
        self.control.start(id, std::process::id(), &|| self.events.is_ending())?;
        self.wait_for_node()
    }

    /// Waits until udev has given a user's device to its user.
    fn wait_for_access(&self) -> Result<()> {
        let deadline = Instant::now() + ACCESS_TIMEOUT;
        loop {
            match self.control.info(self.id()) {
                Err(error) if matches!(error.errno(), Errno::EACCES | Errno::EPERM | Errno::ENOENT) => {
                    if Instant::now() >= deadline {
                        return Err(Error::File {
                            operation: "open",
                            path: format!("/dev/ublkc{}", self.id()).into(),
                            errno: error.errno(),
                            hint: format!(
                                "still so after {} s: are the udev rules installed that give devices to their users? \
                                 Only root can delete this one (`ublk del -n {}`)",
                                ACCESS_TIMEOUT.as_secs(),
                                self.id()
                            ),
                        });
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other.map(drop),
            }
        }
    }

    /// Opens the char device, unless that has to wait for udev. A device that is open has a server: `ublk del --dead`
    /// does not take it for one whose server is gone.
    fn hold_char(&self) -> Result<()> {
        if self.info.features.contains(Features::UNPRIVILEGED_DEV) { Ok(()) } else { self.hold_open_char() }
    }

    fn hold_open_char(&self) -> Result<()> {
        let file = self.open_char()?;
        self.hold(file);
        Ok(())
    }

    /// Keeps the char device open until the queues are opened.
    fn hold(&self, file: Arc<dyn CharDevice>) {
        self.remember(&file);
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(file);
    }

    fn remember(&self, file: &Arc<dyn CharDevice>) {
        *self.file.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::downgrade(file));
    }

    /// The char device, if this process has it open for this device. While the caller keeps it, the driver gives the number
    /// to no other device, and the device to no other server: commands with the number reach this one.
    pub(crate) fn opened(&self) -> Option<Arc<dyn CharDevice>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner).as_ref()?.upgrade()
    }

    /// As [`opened`](Device::opened), for a command that is of no use otherwise.
    fn require_opened(&self, command: &'static str) -> Result<Arc<dyn CharDevice>> {
        self.require_owner(command)?;
        self.opened().ok_or_else(|| self.not_served(command, "the device is no longer served by this process"))
    }

    /// Whether this is a forked child's copy of its parent's device. Other threads of the parent may have had its locks at the
    /// fork, and nothing unlocks these.
    fn is_copy(&self) -> bool {
        self.owner != std::process::id()
    }

    /// Refuses what a forked child must not do to its parent's device.
    fn require_owner(&self, command: &'static str) -> Result<()> {
        if self.is_copy() {
            return Err(self.not_served(command, "a forked child does not serve the device, its parent does"));
        }
        Ok(())
    }

    fn not_served(&self, command: &'static str, hint: &str) -> Error {
        Error::Control { command, device: Some(self.id()), errno: Errno::ENODEV, hint: hint.to_owned() }
    }

    /// Whether a command for which the char device is kept open is to end: the device is stopped in a hurry, or its queues are
    /// closed, and the driver fails what they had when the char device is closed, for which other commands wait.
    pub(crate) fn is_given_up(&self) -> bool {
        self.events.is_expedited() || self.events.is_ending() && self.events.open_queues() == 0
    }

    fn open_queues(&self, target: &Arc<dyn Target>) -> Result<()> {
        let access = target.access();
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        let file = held.map_or_else(|| self.open_char(), Ok)?;
        self.remember(&file);
        for queue in (0..self.info.queues).map(QueueId) {
            for share in shares(self.info.depth, self.plan.threads_per_queue) {
                self.open_queue(queue, share, (target, access), &file)?;
            }
        }
        Ok(())
    }

    /// Opens `/dev/ublkcN`, which devtmpfs makes a moment after ADD_DEV, and which udev may hold open
    /// for another.
    fn open_char(&self) -> Result<Arc<dyn CharDevice>> {
        let deadline = Instant::now() + NODE_TIMEOUT;
        loop {
            match self.control.driver().open_char(self.id()) {
                Ok(file) => return Ok(file),
                Err(e) if may_open_later(&e) && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(e) => return Err(open_error(self.id(), &e)),
            }
        }
    }

    fn open_queue(
        &self,
        queue: QueueId,
        tags: Range<u16>,
        (target, access): (&Arc<dyn Target>, Access),
        file: &Arc<dyn CharDevice>,
    ) -> Result<()> {
        let zoned = self.params.zoned.is_some();
        let mut info = QueueInfo::new(self.id(), queue, self.info.depth, self.info.max_io_bytes, zoned);
        info.integrity = self.params.integrity;
        let setup = QueueSetup {
            info,
            tags,
            data: self.plan.data,
            batch: self.plan.batch,
            target: target.clone(),
            file: file.clone(),
            shared: self.shared.clone(),
            sync: self.sync.clone(),
            access,
            events: self.events.opening(),
            stats: self.counters.queue(queue.0),
            cpus: self.cpus.of(|| self.control.queue_affinity(self.id(), queue))?,
            coalescing: self.coalescing,
        };
        let opened = self
            .pool
            .open(setup)
            .map_err(|e| Error::Target { context: format!("starting a thread for queue {queue}"), source: e })?;
        match opened.recv_timeout(OPEN_TIMEOUT) {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout {
                waiting_for: format!("opening queue {queue} of device {}", self.id()),
                waited: OPEN_TIMEOUT,
                hint: "its thread is in a handler or has ended".into(),
            }),
        }
    }

    fn wait_for_node(&self) -> Result<()> {
        let deadline = Instant::now() + NODE_TIMEOUT;
        while !self.control.driver().block_node_exists(self.id()) {
            if self.is_ending() {
                return Err(Error::Control {
                    command: "START_DEV",
                    device: Some(self.id()),
                    errno: Errno::ENODEV,
                    hint: "another process has stopped the device meanwhile".into(),
                });
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    waiting_for: format!("{} as a block device", self.path.display()),
                    waited: NODE_TIMEOUT,
                    hint: "the disk exists, but its node was not created (is /dev a devtmpfs?)".into(),
                });
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Waits until the device begins to end, because it is stopped or deleted, or because a queue failed. Returns false after
    /// `timeout`.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.events.wait_ending(timeout)
    }

    /// Whether the device has begun to end.
    pub fn is_ending(&self) -> bool {
        self.events.is_ending()
    }

    /// Whether the calling thread serves one of its queues, perhaps beside those of other devices. Such a thread cannot
    /// wait for the device to stop.
    pub fn is_served_here(&self) -> bool {
        self.events.is_served_here()
    }

    /// How many queues are served; each of [several threads](DeviceOptions::threads_per_queue) counts.
    pub fn queues_left(&self) -> usize {
        self.events.open_queues()
    }

    /// Whether [`stop`](Device::stop) has done its work. Does not wait for one that is at it.
    pub fn is_stopped(&self) -> bool {
        self.deleted.try_lock().is_ok_and(|deleted| *deleted)
    }
}

/// Becomes readable when the device begins to end, for event loops.
impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.events.as_fd()
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // First, because nothing else may be looked at in a forked child.
        if self.is_copy() || self.leaving.load(Ordering::Relaxed) {
            return;
        }
        // Another process may have asked that it wait for another server, or be that.
        let concludes = self.recovery().is_some() && self.is_ending() && !self.is_stopped();
        let ended = if concludes { self.conclude().map(drop) } else { self.stop() };
        if let Err(error) = ended {
            log::error!("stopping device {}: {error}", self.id());
        }
    }
}

/// Whether a char device that cannot be opened now may be opened later.
fn may_open_later(error: &std::io::Error) -> bool {
    matches!(errno_of(error), Errno::ENOENT | Errno::EBUSY | Errno::EACCES | Errno::ENXIO)
}

/// Why a char device was not opened, after [`NODE_TIMEOUT`] if it [might have been](may_open_later).
fn open_error(id: DeviceId, error: &std::io::Error) -> Error {
    let hint = if may_open_later(error) {
        format!("still so after {} s (is /dev a devtmpfs?)", NODE_TIMEOUT.as_secs())
    } else {
        String::new()
    };
    Error::File { operation: "open", path: format!("/dev/ublkc{id}").into(), errno: errno_of(error), hint }
}

/// A queue's tags, divided among its threads as evenly as can be.
fn shares(depth: u16, threads: u16) -> impl Iterator<Item = Range<u16>> {
    let bound = move |n: u16| (u32::from(depth) * u32::from(n) / u32::from(threads)) as u16;
    (0..threads).map(move |n| bound(n)..bound(n + 1))
}
