// SPDX-License-Identifier: MIT OR Apache-2.0

//! The life of a device: add, start, serve, stop, delete. Every wait in it ends.
//!
//! * [`server`] — creating devices, and the threads that serve them.
//! * [`starting`] — how a device becomes a disk.
//! * [`fitting`] — whether a target can serve a disk that was made for another one.
//! * [`recovery`] — a device that has lost its server gets another one.
//! * [`ending`] — how a server stops a device, or leaves it.
//! * [`serving`] — which server of this process is a device's latest.

mod ending;
mod fitting;
mod recovery;
mod server;
mod serving;
mod starting;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

pub use self::ending::Ending;
#[cfg(feature = "cli")]
pub(crate) use self::recovery::check_fit;
pub use self::server::{MAX_COALESCING, Server};
use self::serving::Serving;
use crate::control::{Control, DeviceInfo};
use crate::data::DataMovement;
use crate::data::shared::{SharedMemory, SharedTable};
use crate::driver::CharDevice;
use crate::engine::{QueueEvents, ThreadPool};
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::fork::Maker;
use crate::params::Params;
use crate::placement::Cpus;
use crate::plan::Plan;
use crate::request::FileSync;
use crate::stats::{DeviceCounters, DeviceStats, StatsHandle};
use crate::units::DeviceId;

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
    /// The device may be about to be left to another server. Even if that fails, dropping this does not delete
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
    maker: Maker,
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

    /// Returns the id.
    pub fn id(&self) -> DeviceId {
        self.info.id
    }

    /// The block device, `/dev/ublkbN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the driver's information about the device from its creation, which may differ from the request.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// The disk's shape.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Returns how the data moves, and the reason.
    pub fn data_movement(&self) -> (DataMovement, &'static str) {
        (self.plan.data, self.plan.reason)
    }

    /// Lets clients that map the same file use it for direct I/O without any copy; see [`SharedMemory`]. The
    /// device has to be made with [`shared_memory`](crate::DeviceOptions::shared_memory).
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

    /// Returns the statistics since this server started or recovered the device.
    pub fn stats(&self) -> DeviceStats {
        self.counters.snapshot()
    }

    /// A way to read the statistics elsewhere.
    pub fn stats_handle(&self) -> StatsHandle {
        StatsHandle { id: self.id(), counters: self.counters.clone() }
    }

    /// Returns whether tags go to and from the driver in batches.
    pub fn is_batched(&self) -> bool {
        self.plan.batch
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

    /// Like [`opened`](Device::opened), for a command that is of no use otherwise.
    fn require_opened(&self, command: &'static str) -> Result<Arc<dyn CharDevice>> {
        self.require_owner(command)?;
        self.opened().ok_or_else(|| self.not_served(command, "the device is no longer served by this process"))
    }

    /// Returns whether this is a forked child's copy of its parent's device. Other threads of the parent may have had its locks
    /// at the fork, and nothing unlocks these.
    fn is_copy(&self) -> bool {
        !self.maker.is_here()
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

    /// Returns whether a command for which the char device is kept open must end: the device is stopped in a hurry, or its
    /// queues are closed, and the driver fails what they had when the char device is closed, for which other commands wait.
    pub(crate) fn is_given_up(&self) -> bool {
        self.events.is_expedited() || self.events.is_ending() && self.events.open_queues() == 0
    }

    /// Waits until the device begins to end, because it is stopped or deleted, or because a queue failed. Returns false after
    /// `timeout`. A forked child, which does not serve the device, does not wait.
    pub fn wait(&self, timeout: Option<Duration>) -> bool {
        self.is_copy() || self.events.wait_ending(timeout)
    }

    /// Returns whether the device has begun to end; true in a forked child, which does not serve it.
    pub fn is_ending(&self) -> bool {
        self.is_copy() || self.events.is_ending()
    }

    /// Returns whether the calling thread serves one of its queues, perhaps beside those of other devices. Such a thread cannot
    /// wait for the device to stop.
    pub fn is_served_here(&self) -> bool {
        !self.is_copy() && self.events.is_served_here()
    }

    /// Returns how many queues are served; each of [several threads](crate::DeviceOptions::threads_per_queue) counts. None in a
    /// forked child.
    pub fn queues_left(&self) -> usize {
        if self.is_copy() { 0 } else { self.events.open_queues() }
    }

    /// Returns whether [`stop`](Device::stop) has done its work. Does not wait for one that is at it.
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
