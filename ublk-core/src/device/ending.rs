// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a server stops a device, or leaves it to the next one.
//!
//! Commands name a device by its number, which is another device's as soon as this one is deleted, by any process, and
//! its char device closed; and a device that was left may have its next server. So STOP_DEV, QUIESCE_DEV and DEL_DEV are
//! sent while this process has the char device open ([`Hold`]), which rules out both. Where it is closed already, because
//! another process has begun the end, [`Device::is_own`] comes before each command. What remains is the moment between the
//! two, in which another process would have to delete the device and a third one to make or recover one of its number. So it
//! does for DEL_DEV before Linux 6.9 and for unprivileged devices, where DEL_DEV_ASYNC is not to be had.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::Device;
use crate::control::{DRAIN_TIMEOUT, DeviceInfo, Removal, STATE_POLL};
use crate::driver::CharDevice;
use crate::engine::Successor;
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};

/// Time that queues get to close before STOP_DEV is sent again.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// Time limit for the end of queues that were given up.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(2);
/// Time that a device whose requests are finished gets to stop, even if the time limit is shorter.
const GRACE: Duration = Duration::from_millis(500);
/// Time limit for the removal of a disk by the driver once its queues were given up.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for the driver to notice that the server has left.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(40);

/// Outcome for a device whose server has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// It is gone.
    Deleted,
    /// It waits for another server.
    Left,
}

impl Device {
    /// Stops and deletes the device. Requests in flight are finished first. Calling it again, from any
    /// thread, is harmless, and so it is in a forked child: the device is its parent's.
    ///
    /// A queue's handler must not call it: it would wait for itself until the time-out.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if requests are not finished, or if the driver does not delete the device in time; calling
    /// again tries again. [`Error::Queue`] if a queue failed earlier; the device is gone then.
    pub fn stop(&self) -> Result<()> {
        self.stop_within(DRAIN_TIMEOUT)
    }

    /// Stops and deletes the device as [`stop`](Device::stop), and waits for requests in flight for at most `timeout`.
    /// After that the queues are given up, which takes a few seconds at most. Of several stops at the same time, the one with
    /// the least time decides. A handler that does not return, or a
    /// [`DetachedRequest`](crate::DetachedRequest) that is neither ended nor dropped, still keeps the device.
    ///
    /// # Errors
    ///
    /// As [`stop`](Device::stop).
    pub fn stop_within(&self, timeout: Duration) -> Result<()> {
        if self.is_copy() {
            return Ok(());
        }
        let mut deleted = self.lock_deleted(timeout);
        if *deleted {
            return Ok(());
        }
        let id = self.id();
        let hold = Hold::new(self);
        // It is about to be deleted, which waits for this descriptor.
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        let patience = Patience::new(self, timeout);
        self.stop_disk(&patience, &hold)?;
        let mut pause = ASK_AGAIN;
        while !patience.wait_all_closed(pause) && !patience.is_over() {
            pause *= 2;
            // A tag that was fetched again after the first STOP_DEV is canceled by another one.
            self.stop_disk(&patience, &hold)?;
        }
        self.give_up_queues(&patience, Successor::None, &hold)?;
        let removal = match hold.take() {
            Some(file) => self.control.delete_open(id, self.serving.instance, file)?,
            None if self.has_next_server() => Removal::Complete,
            None => self.control.delete_closed(id, self.serving.instance)?,
        };
        if removal == Removal::HeldOpen {
            log::warn!(
                "device {id} is deleted, but a process still has it open; its number becomes free when it is closed"
            );
        }
        *deleted = true;
        // For those that wait for the end of a device that never had a queue.
        self.events.stopping();
        self.events.take_failure().map_or(Ok(()), Err)
    }

    /// Waits for another stop, which has no more time than this one.
    fn lock_deleted(&self, timeout: Duration) -> MutexGuard<'_, bool> {
        let began = Instant::now();
        loop {
            match self.deleted.try_lock() {
                Ok(deleted) => return deleted,
                Err(TryLockError::Poisoned(deleted)) => return deleted.into_inner(),
                Err(TryLockError::WouldBlock) if began.elapsed() >= timeout => self.events.expedite(),
                Err(TryLockError::WouldBlock) => {}
            }
            std::thread::sleep(STATE_POLL);
        }
    }

    /// Ends the waits of a [stop](Device::stop) that is under way, and those of later ones: the queues are given up
    /// at once. For a program that is in a hurry, from any thread.
    pub fn expedite(&self) {
        if !self.is_copy() {
            self.events.expedite();
        }
    }

    /// Returns whether commands with the number reach this device, and no other server's. The answer may be wrong a moment
    /// later, unless this process has the char device open.
    pub(crate) fn is_own(&self) -> bool {
        !self.has_next_server() && self.control.is_instance(self.id(), self.serving.instance)
    }

    /// Returns whether the driver shows another server for a device of this number.
    fn has_next_server(&self) -> bool {
        // The server of a device without recovery does not change.
        (self.recovery().is_some() || self.serving.instance.is_none())
            && self.control.info(self.id()).is_ok_and(|info| self.is_followed(&info))
    }

    /// Returns whether a device of this number has another server by now. The driver reports no pid for one in another pid
    /// namespace, and this server's own until it has noticed that its queues are closed.
    fn is_followed(&self, info: &DeviceInfo) -> bool {
        let is_visible = info.pid > 0;
        let is_anothers = info.pid != std::process::id() as i32 && (is_visible || self.events.open_queues() == 0);
        info.state == DeviceState::Live && (is_anothers || self.serving.is_followed())
    }

    /// Removes the disk. If requests keep that from happening for too long, their queues are given up: the
    /// driver fails what they had, once their thread's ring is closed.
    fn stop_disk(&self, patience: &Patience<'_>, hold: &Hold) -> Result<()> {
        if !hold.is_open() && !self.is_own() {
            return Ok(());
        }
        let began = Instant::now();
        // Queues that have failed may have had requests, which the driver fails when the char device is closed.
        let has_failed = || hold.is_open() && self.events.open_queues() == 0 && began.elapsed() >= ASK_AGAIN;
        loop {
            let give_up = || patience.is_over() || has_failed();
            match gone_is_fine(self.control.stop_unless(self.id(), patience.left(), &give_up)) {
                Err(error) if patience.is_over() && matches!(error.errno(), Errno::ETIMEDOUT | Errno::ECANCELED) => {
                    log::error!("device {}: requests did not finish in time; abandoning its queues", self.id());
                    hold.take();
                    self.give_up_queues(patience, Successor::None, hold)?;
                    if !self.is_own() {
                        return Ok(());
                    }
                    return gone_is_fine(self.control.stop_unless(self.id(), REMOVE_TIMEOUT, &|| false));
                }
                // The driver has the command, or never gets it: only now may the number become another device's.
                Err(error) if has_failed() && error.errno() == Errno::ECANCELED => {
                    hold.take();
                    if !self.is_own() {
                        return Ok(());
                    }
                }
                other => return other,
            }
        }
    }

    /// Gives up the queues that did not close.
    fn give_up_queues(&self, patience: &Patience<'_>, successor: Successor, hold: &Hold) -> Result<()> {
        if self.events.open_queues() != 0 {
            // The driver fails their requests, or gives them to the next server, when the char device is closed.
            hold.take();
            self.pool.abandon(&self.events, successor);
            if !self.events.wait_all_closed(ABANDON_TIMEOUT) {
                return Err(Error::Timeout {
                    waiting_for: format!("closing {} queues of device {}", self.events.open_queues(), self.id()),
                    waited: patience.began.elapsed(),
                    hint: match successor {
                        Successor::Server => {
                            "a handler does not return, or a file does not finish what it was given: the \
                                              next server has to wait for that"
                                .into()
                        }
                        Successor::None => format!(
                            "a handler does not return, or a program keeps requests without ending them; once this \
                             process has ended, `ublk del -n {}` removes the device",
                            self.id()
                        ),
                    },
                });
            }
        }
        Ok(())
    }

    /// Ends a device that [has begun to end](Device::is_ending) in the way that the initiator has chosen: a device that was
    /// quiesced is left for another server, any other is stopped and deleted.
    ///
    /// # Errors
    ///
    /// As [`stop`](Device::stop); and [`Error::Timeout`] if the driver does not notice that the server has left, or if a
    /// file does not finish what it was given.
    /// A device that can be recovered is there after that. Before Linux 6.16 (`UBLK_F_QUIESCE`) nothing but the end
    /// of their thread takes tags away from a queue that is given up because its handler does not return: where such a
    /// thread serves other devices too, it is their end that lets the next server in.
    pub fn conclude(&self) -> Result<Ending> {
        self.conclude_within(DRAIN_TIMEOUT)
    }

    /// Ends a device as [`conclude`](Device::conclude), and waits for requests in flight for at most `timeout`.
    ///
    /// # Errors
    ///
    /// As [`conclude`](Device::conclude).
    pub fn conclude_within(&self, timeout: Duration) -> Result<Ending> {
        if self.is_copy() {
            return Ok(Ending::Deleted);
        }
        if self.recovery().is_none() {
            return self.stop_within(timeout).map(|()| Ending::Deleted);
        }
        if self.is_stopped() {
            // Its number may be another device's.
            let exists = self.control.is_instance(self.id(), self.serving.instance);
            return Ok(if exists { Ending::Left } else { Ending::Deleted });
        }
        self.conclude_recoverable(timeout)
    }

    fn conclude_recoverable(&self, timeout: Duration) -> Result<Ending> {
        let id = self.id();
        self.leaving.store(true, Ordering::Relaxed);
        let patience = Patience::new(self, timeout);
        while !patience.wait_all_closed(ASK_AGAIN) && !patience.is_over() {
            // Cancels tags that were fetched again after the command that cancelled the others.
            match self.control.info(id).map(|info| info.state) {
                Ok(DeviceState::Live) if self.info.features.contains(Features::QUIESCE) => {
                    // With its queues closed, another server has followed, which is not asked to leave. If another process
                    // is stopping the device, the driver refuses this; the stop has the same effect.
                    if let Some(_open) = self.opened() {
                        let _ = self.control.quiesce_unless(id, Duration::from_millis(100), &|| patience.is_over());
                    }
                }
                Ok(DeviceState::Dead) => self.stop_disk(&patience, &Hold::new(self))?,
                Ok(_) => {}
                Err(error) if error.errno() == Errno::ENODEV => break,
                Err(error) => return Err(error),
            }
        }
        self.give_up_queues(&patience, Successor::Server, &Hold::default())?;
        // The driver takes a moment to notice.
        let noticing = Instant::now();
        loop {
            let info = self.control.info(id);
            // After the look, which was at this device then.
            if !self.control.is_instance(id, self.serving.instance) {
                return self.stop_within(timeout).map(|()| Ending::Deleted);
            }
            let is_followed = info.as_ref().is_ok_and(|info| self.is_followed(info));
            match info.map(|info| info.state) {
                Ok(DeviceState::Live) if is_followed => {
                    *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    return self.events.take_failure().map_or(Ok(Ending::Left), Err);
                }
                Ok(DeviceState::Quiesced | DeviceState::FailIo) => {
                    *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    return self.events.take_failure().map_or(Ok(Ending::Left), Err);
                }
                Ok(DeviceState::Live) if noticing.elapsed() < NOTICE_TIMEOUT && !self.events.is_expedited() => {
                    std::thread::sleep(STATE_POLL)
                }
                Ok(DeviceState::Live) => {
                    // It may have requests, which must not fail because of a stray descriptor.
                    *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    return Err(Error::Timeout {
                        waiting_for: format!("the driver noticing that device {id} has no server"),
                        waited: noticing.elapsed(),
                        hint: format!("a child of this process may still have /dev/ublkc{id} open"),
                    });
                }
                Ok(_) => return self.stop_within(timeout).map(|()| Ending::Deleted),
                Err(error) if error.errno() == Errno::ENODEV => {
                    return self.stop_within(timeout).map(|()| Ending::Deleted);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives up the queues and leaves the device as it is, for another server: without a word to the driver, so also
    /// before Linux 6.16. What its handlers had fails, or is sent again to the next server, which gets the device once files
    /// have finished what they were given: an old write could land over a newer one. Dropping it does not delete
    /// it after that. For devices that can be recovered, and whose recovery has gone wrong.
    pub fn abandon(&self) {
        if self.is_copy() {
            return;
        }
        self.leaving.store(true, Ordering::Relaxed);
        *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.pool.abandon(&self.events, Successor::Server);
    }

    /// Finishes the requests in flight and leaves the device to another server: it stays, and requests that
    /// still come wait, or fail if it was made with [`Recovery::FailIo`](crate::Recovery::FailIo). Needs
    /// [`DeviceOptions::recovery`](crate::DeviceOptions::recovery) and Linux 6.16.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device was not made for it, [`Error::Unsupported`] if the driver is too old; else as
    /// [`stop`](Device::stop).
    pub fn leave(&self) -> Result<()> {
        self.require_owner("QUIESCE_DEV")?;
        self.control.require_quiesce(&self.info)?;
        let id = self.id();
        // Even if the command fails: it may be carried out later.
        let was_leaving = self.leaving.swap(true, Ordering::Relaxed);
        let open = self.opened();
        if open.is_some() || self.is_own() {
            match self.control.quiesce_unless(id, ASK_AGAIN, &|| self.is_given_up()) {
                Ok(()) | Err(Error::Control { errno: Errno::EBUSY | Errno::ECANCELED, .. }) => {}
                Err(error) => {
                    if error.is_refusal() {
                        self.leaving.store(was_leaving, Ordering::Relaxed);
                    }
                    return Err(error);
                }
            }
        }
        drop(open);
        match self.conclude_recoverable(DRAIN_TIMEOUT)? {
            Ending::Left => Ok(()),
            Ending::Deleted => Err(Error::Control {
                command: "QUIESCE_DEV",
                device: Some(id),
                errno: Errno::ENODEV,
                hint: "another process has deleted the device meanwhile".into(),
            }),
        }
    }
}

/// The char device of a device that is about to end, kept open: see the head of this file.
#[derive(Debug, Default)]
struct Hold(Mutex<Option<Arc<dyn CharDevice>>>);

impl Hold {
    fn new(device: &Device) -> Self {
        Hold(Mutex::new(device.opened()))
    }

    fn is_open(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Closes it, unless the caller keeps it.
    fn take(&self) -> Option<Arc<dyn CharDevice>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Time for which a stop still waits for handlers.
#[derive(Debug)]
struct Patience<'d> {
    device: &'d Device,
    began: Instant,
    timeout: Duration,
}

impl<'d> Patience<'d> {
    fn new(device: &'d Device, timeout: Duration) -> Self {
        Patience { device, began: Instant::now(), timeout }
    }

    fn left(&self) -> Duration {
        let timeout = if self.device.events.is_expedited() { GRACE } else { self.timeout.max(GRACE) };
        timeout.saturating_sub(self.began.elapsed())
    }

    fn is_over(&self) -> bool {
        self.left().is_zero()
    }

    /// Waits for the queues to close, for at most `pause`.
    fn wait_all_closed(&self, pause: Duration) -> bool {
        let events = &self.device.events;
        let pause = pause.min(self.left());
        if events.is_expedited() { events.wait_all_closed(pause) } else { events.wait_all_closed_or_expedited(pause) }
    }
}

/// Ignores `ENODEV`: another process may delete the device at any time.
fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::Control { errno: Errno::ENODEV, .. }) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use crate::control::DRAIN_TIMEOUT;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{null_disk, server};
    use crate::uapi::DeviceState;
    use crate::{DeviceOptions, Recovery};

    #[test]
    fn a_server_in_another_pid_namespace_has_followed() {
        let driver = FakeDriver::new();
        let device = server(&driver).start(null_disk(), &DeviceOptions::new().recovery(Recovery::Queue)).unwrap();
        let mut info = device.control.info(device.id()).unwrap();
        assert!(info.state == DeviceState::Live && !device.is_followed(&info));
        device.control.quiesce_until(device.id(), DRAIN_TIMEOUT).unwrap();
        assert!(device.events.wait_all_closed(DRAIN_TIMEOUT));
        assert!(!device.is_followed(&info), "the driver has not noticed");
        info.pid = -1;
        assert!(device.is_followed(&info), "the driver does not report its pid");
        info.state = DeviceState::Quiesced;
        assert!(!device.is_followed(&info));
    }
}
