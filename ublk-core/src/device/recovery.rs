// SPDX-License-Identifier: MIT OR Apache-2.0

//! A device that has lost its server gets another one.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::serving::Serving;
use super::starting::{NODE_TIMEOUT, may_open_later, open_error};
use super::{Device, Ending, Server, fitting};
use crate::control::{DeviceInfo, STATE_POLL};
use crate::data::{Access, DataMovement};
use crate::driver::CharDevice;
use crate::engine::{QueueEvents, Successor};
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::options::Recovery;
use crate::params::Params;
use crate::plan::Plan;
use crate::process::is_alive;
use crate::target::Target;
use crate::uapi::{DeviceState, Features};
use crate::units::DeviceId;

/// Time limit for the driver to notice that a server is dead: Linux 6.12 up to 30 s, 6.1 some 5 s, newer
/// ones a moment.
const DEATH_TIMEOUT: Duration = Duration::from_secs(45);
/// Time for which another process may have the char device of a device without a server open.
const OPENER_TIMEOUT: Duration = Duration::from_secs(10);

impl Device {
    /// Returns what happens to the device when its server exits.
    pub fn recovery(&self) -> Option<Recovery> {
        Recovery::from_features(self.info.features)
    }

    /// Changes the disk's capacity to `bytes` while it is in use. The target must be able to serve the new
    /// size; it is not notified. Since Linux 6.16.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] unless it is a multiple of the logical block size; `ECANCELED` if the device ends meanwhile.
    pub fn resize(&self, bytes: u64) -> Result<()> {
        let _open = self.require_opened("UPDATE_SIZE")?;
        self.control.update_size_unless(self.id(), bytes, &|| self.is_given_up())
    }

    /// Stops and deletes the device unless its disk is open. Since Linux 7.0.
    ///
    /// # Errors
    ///
    /// `EBUSY` if it is in use: it continues to be served. `EBUSY` also if another process has asked this server to leave a
    /// recoverable device before the driver knew whether it is in use: it waits for its next server, or has it. Otherwise as
    /// [`stop`](Device::stop).
    pub fn try_stop(&self) -> Result<()> {
        self.require_owner("TRY_STOP_DEV")?;
        if self.is_stopped() {
            return Ok(());
        }
        let open = self.opened();
        if open.is_some() || self.is_own() {
            match self.control.try_stop_unless(self.id(), &|| self.is_given_up()) {
                // It is served no more, in use or not.
                Err(Error::Control { errno: Errno::ECANCELED, .. }) if self.events.open_queues() == 0 => {
                    drop(open);
                    return self.conclude_unused();
                }
                other => other?,
            }
        }
        drop(open);
        self.stop()
    }

    /// Ends a device whose queues have closed before it was known whether its disk is in use.
    fn conclude_unused(&self) -> Result<()> {
        match self.conclude()? {
            Ending::Deleted => Ok(()),
            Ending::Left => Err(Error::Control {
                command: "TRY_STOP_DEV",
                device: Some(self.id()),
                errno: Errno::EBUSY,
                hint: "another process has asked its server to leave: the device waits for its next server".into(),
            }),
        }
    }
}

/// A device that waits for a server, and that no other process can serve while its char device is open.
struct Unserved {
    info: DeviceInfo,
    params: Params,
    /// See [`Control::instance`](crate::control::Control::instance).
    instance: Option<u64>,
    file: Arc<dyn CharDevice>,
}

impl Server {
    /// Serves a device whose last server is gone, and returns when its disk works again. Requests that
    /// waited are served then.
    ///
    /// The device keeps its shape, queues and data movement, because the block layer was given them at its start: the
    /// target has to be able to serve every request that they allow. For a server that has just died, this waits until
    /// the driver has noticed.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a living process serves the device, also one that has recovered it meanwhile, [`Error::Control`] if it
    /// was not made to be recovered, [`Error::Mismatch`] if the target does not fit, or if the disk is known to be stored in
    /// [another file](Target::backing) ([`Parameter::BackingFile`](crate::Parameter::BackingFile)). Otherwise the device
    /// still waits for a server then. If the error came late, queues had been opened: the driver takes the next server once
    /// the threads that had them have ended, which is at once unless they serve other devices too.
    pub fn recover(&self, id: DeviceId, target: Arc<dyn Target>) -> Result<Device> {
        self.recover_from(id, target, false)
    }

    /// Like [`recover`](Server::recover), but also serves a file that has replaced the one that the disk was stored in, or
    /// that is not recognized because its file system was mounted again, or because the block device was deactivated or
    /// unplugged meanwhile. The driver keeps the identity of the file that the
    /// device was created for: later recoveries compare with that.
    ///
    /// # Errors
    ///
    /// As [`recover`](Server::recover).
    pub fn recover_replaced(&self, id: DeviceId, target: Arc<dyn Target>) -> Result<Device> {
        self.recover_from(id, target, true)
    }

    fn recover_from(&self, id: DeviceId, target: Arc<dyn Target>, accept_replaced: bool) -> Result<Device> {
        self.check_driver()?;
        let events = Arc::new(QueueEvents::new()?);
        let Unserved { info, params, instance, file } = self.open_unserved(id, &*target, accept_replaced)?;
        let data = DataMovement::from(info.features);
        let plan = Plan {
            data,
            batch: info.features.contains(Features::BATCH_IO),
            threads_per_queue: 1,
            features: info.features,
            reason: "as the device was created",
        };
        // Not earlier: this process may have the server that was quicker.
        let mut device = self.device(info, params, plan, events, Serving::begin(instance));
        device.hold(file);
        // Even after a failure here, the device must not be deleted.
        device.deleted = Mutex::new(true);
        device.started = AtomicBool::new(true);
        let recovered = device
            .open_queues(&target)
            .and_then(|()| self.control.end_recovery(id, std::process::id(), &|| device.events.is_ending()));
        if let Err(error) = recovered {
            let error = device.events.take_failure().unwrap_or(error);
            self.pool.abandon(&device.events, Successor::Server);
            return Err(error);
        }
        if let Err(error) = device.wait_for_node() {
            if let Err(second) = device.leave() {
                log::error!("leaving device {id} again: {second}");
                self.pool.abandon(&device.events, Successor::Server);
            }
            return Err(error);
        }
        *device.deleted.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = false;
        Ok(device)
    }

    /// Checks whether a target can serve a device that was made for another one, as [`recover`](Server::recover) does, and
    /// changes nothing: for before the present server is asked to leave.
    ///
    /// # Errors
    ///
    /// [`Error::Mismatch`] if the target does not fit the disk or is stored in another file, [`Error::Control`] with
    /// `EINVAL` if the device was not made to be recovered, `ENODEV` if there is none.
    pub fn check_recovery(&self, id: DeviceId, target: &dyn Target) -> Result<()> {
        let info = self.control.info(id)?;
        require_recovery(&info)?;
        let disk = self.control.params(id)?.params;
        check_fit(&target.params(), target.access(), &disk, info.features)?;
        fitting::check_backing(target.backing(), info.backing)
    }

    /// Waits until the last server of a device that can be [recovered](Server::recover) has exited, so that its exclusive
    /// resources, such as the lock of a file, are free for the next one.
    ///
    /// # Errors
    ///
    /// `EBUSY` if a living process serves the device, `EINVAL` if it was created without recovery, `ENODEV` if
    /// there is no such device or it was stopped, [`Error::Timeout`] if another process keeps the driver
    /// from noticing the exit.
    pub fn wait_until_unserved(&self, id: DeviceId) -> Result<DeviceInfo> {
        let busy = |info: &DeviceInfo, hint: String| Error::Control {
            command: "START_USER_RECOVERY",
            device: Some(id),
            errno: if info.state == DeviceState::Dead { Errno::ENODEV } else { Errno::EBUSY },
            hint,
        };
        let deadline = Instant::now() + DEATH_TIMEOUT;
        loop {
            let info = self.control.info(id)?;
            require_recovery(&info)?;
            match info.state {
                DeviceState::Dead => return Err(busy(&info, "the device has no disk: it was stopped".into())),
                DeviceState::Live if is_alive(info.pid) => {
                    return Err(busy(&info, format!("process {} serves the device", info.pid)));
                }
                DeviceState::Live => {}
                _ => return Ok(info),
            }
            if Instant::now() >= deadline {
                return Err(Error::Timeout {
                    waiting_for: format!("the driver noticing that the server of device {id} is gone"),
                    waited: DEATH_TIMEOUT,
                    hint: format!(
                        "a child of process {} may still have /dev/ublkc{id} open, or a file still works on what that process gave it",
                        info.pid
                    ),
                });
            }
            std::thread::sleep(STATE_POLL);
        }
    }

    /// Opens the char device of a device that waits for a server. Of several processes that recover it at the same time, one
    /// can do so; the device may have been served, resized or deleted since it was first looked at.
    fn open_unserved(&self, id: DeviceId, target: &dyn Target, accept_replaced: bool) -> Result<Unserved> {
        let check = |disk: &Params, info: &DeviceInfo| {
            check_fit(&target.params(), target.access(), disk, info.features)?;
            if accept_replaced { Ok(()) } else { fitting::check_backing(target.backing(), info.backing) }
        };
        let deadline = Instant::now() + NODE_TIMEOUT;
        loop {
            let instance = self.control.instance(id);
            let info = self.wait_until_unserved(id)?;
            check(&self.control.params(id)?.params, &info)?;
            self.begin_recovery(&info)?;
            let file = match self.control.driver().open_char(id) {
                Ok(file) => file,
                // The next server may have it open, which ends this, or udev.
                Err(e) if may_open_later(&e) && Instant::now() < deadline => {
                    std::thread::sleep(STATE_POLL);
                    continue;
                }
                Err(e) => return Err(open_error(id, &e)),
            };
            self.control.require_instance("START_USER_RECOVERY", id, instance)?;
            let params = self.control.params(id)?.params;
            check(&params, &info)?;
            return Ok(Unserved { info, params, instance, file });
        }
    }

    /// START_USER_RECOVERY, for a device that waits for a server.
    fn begin_recovery(&self, info: &DeviceInfo) -> Result<()> {
        let deadline = Instant::now() + OPENER_TIMEOUT;
        loop {
            match self.control.start_recovery(info.id) {
                Ok(()) => return Ok(()),
                // Another process has the char device open: udev, or the device's next server.
                Err(Error::Control { errno: Errno::EBUSY, .. }) if Instant::now() < deadline => {
                    self.wait_until_unserved(info.id)?;
                }
                // Up to Linux 6.12, a second one without a server between them is refused so: the first
                // attempt at a recovery failed, and all is as prepared as it can be.
                Err(Error::Control { errno: Errno::EINVAL, .. }) => {
                    log::debug!("device {}: a recovery was already started", info.id);
                    return Ok(());
                }
                Err(error) => return Err(error),
            }
            std::thread::sleep(STATE_POLL);
        }
    }
}

/// Checks that a device was made to be recovered.
fn require_recovery(info: &DeviceInfo) -> Result<()> {
    if Recovery::from_features(info.features).is_some() {
        return Ok(());
    }
    Err(Error::Control {
        command: "START_USER_RECOVERY",
        device: Some(info.id),
        errno: Errno::EINVAL,
        hint: "the device was created without recovery".into(),
    })
}

/// Checks that a target with these parameters can serve a disk, whose device has these features.
pub(crate) fn check_fit(target: &Params, access: Access, disk: &Params, features: Features) -> Result<()> {
    fitting::check(target, access, disk, DataMovement::from(features))
}
