// SPDX-License-Identifier: MIT OR Apache-2.0

//! Creating devices, and the threads that serve them.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Device;
use super::serving::Serving;
use crate::control::{AddRequest, Control, DeviceInfo};
use crate::driver::Driver;
#[cfg(any(test, feature = "fake"))]
use crate::driver::fake::FakeDriver;
use crate::driver::kernel::KernelDriver;
use crate::engine::{QueueEvents, Spawn, StdSpawn, ThreadPool};
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result};
use crate::fork::Maker;
use crate::options::DeviceOptions;
use crate::params::Params;
use crate::placement::Cpus;
use crate::plan::{Demands, Plan};
use crate::request::FileSync;
use crate::stats::DeviceCounters;
use crate::target::Target;
use crate::uapi::Features;

/// Serves devices: a driver, and threads that their queues share.
#[derive(Clone, Debug)]
pub struct Server {
    pub(super) control: Control,
    pub(super) pool: Arc<ThreadPool>,
    cpus: Cpus,
    coalescing: Duration,
}

/// The longest window of [request coalescing](Server::with_coalescing).
pub const MAX_COALESCING: Duration = Duration::from_millis(10);

impl Server {
    /// Creates a server on the kernel's driver, with at most as many threads as there are CPUs.
    ///
    /// # Errors
    ///
    /// As [`Control::open`].
    pub fn new() -> Result<Self> {
        Ok(Self::with_driver(Arc::new(KernelDriver::open()?)))
    }

    /// Creates a server on a stand-in for the kernel's driver, for tests.
    #[cfg(any(test, feature = "fake"))]
    pub fn with_fake(driver: &FakeDriver) -> Self {
        Self::with_driver(Arc::new(driver.clone()))
    }

    pub(crate) fn with_driver(driver: Arc<dyn Driver>) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = Arc::new(ThreadPool::new(driver.clone(), Arc::new(StdSpawn), threads));
        Server { control: Control::new(driver), pool, cpus: Cpus::Any, coalescing: Duration::ZERO }
    }

    /// The same server with at most `threads` threads, at least one, and no devices yet.
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.pool = Arc::new(self.pool.with_limit(threads));
        self
    }

    /// The same server with threads that `spawn` starts, and no devices yet.
    #[must_use]
    pub fn with_spawn(mut self, spawn: Arc<dyn Spawn>) -> Self {
        self.pool = Arc::new(self.pool.with_spawn(spawn));
        self
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
    pub(super) fn device(
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
            maker: Maker::here(),
        }
    }

    /// ioctl-encoded commands and GET_FEATURES are what this crate speaks.
    pub(super) fn check_driver(&self) -> Result<Features> {
        let unsupported = || Error::Unsupported { feature: "UBLK_F_CMD_IOCTL_ENCODE with GET_FEATURES", since: "6.5" };
        let features = self.control.features().map_err(|error| match error.errno() {
            Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EINVAL => unsupported(),
            _ => error,
        })?;
        if features.contains(Features::CMD_IOCTL_ENCODE) { Ok(features) } else { Err(unsupported()) }
    }
}
