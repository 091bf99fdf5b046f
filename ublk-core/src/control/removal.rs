// SPDX-License-Identifier: MIT OR Apache-2.0

//! Removal of a device, although its server may be faster, and another device may get its id.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{AFFINITY_BYTES, Control, STATE_POLL, commands};
use crate::driver::CharDevice;
use crate::errno::Errno;
use crate::error::{Error, Result};
use crate::units::DeviceId;

/// Time that [`Control::remove`] waits for a deleted device's id to become free.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// Time between the moments in which the driver forgets a device and gives its id away: it frees memory meanwhile.
const RELEASE_DELAY: Duration = Duration::from_millis(5);

/// Outcome of [`Control::remove`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// The device is gone and its id free.
    Complete,
    /// The disk is gone, but a process still has one of its nodes open; the id becomes free when that is closed.
    HeldOpen,
}

impl Control {
    /// Stops and deletes a device of any server.
    ///
    /// # Errors
    ///
    /// `ENODEV` if there is no such device, [`Error::Timeout`] if requests in flight are not finished, or if the driver did not
    /// delete the stopped device in time.
    pub fn remove(&self, id: DeviceId) -> Result<Removal> {
        self.remove_instance(id, self.instance(id))
    }

    /// Like [`remove`](Control::remove), for the device of which [`instance`](Control::instance) has returned `instance`: a
    /// later one with its id is left alone. If the device is deleted already, this waits for its id.
    ///
    /// # Errors
    ///
    /// As [`remove`](Control::remove); `ENODEV` also if the id is another device's.
    pub fn remove_instance(&self, id: DeviceId, instance: Option<u64>) -> Result<Removal> {
        if self.is_deleted(id, instance) && self.is_taken(id) {
            return Ok(self.wait_for_release(id, instance));
        }
        self.require_instance("STOP_DEV", id, instance)?;
        self.stop(id)?;
        // Its server, which sees the stop, may have been quicker.
        self.delete_closed(id, instance)
    }

    /// Deletes a stopped device whose char device this process has open: that keeps the id from becoming another device's
    /// before the driver has the command.
    pub(crate) fn delete_open(
        &self,
        id: DeviceId,
        instance: Option<u64>,
        file: Arc<dyn CharDevice>,
    ) -> Result<Removal> {
        let deleted = self.delete_async(id);
        drop(file);
        match deleted {
            Ok(()) | Err(Error::Control { errno: Errno::ENODEV, .. }) => Ok(self.wait_for_release(id, instance)),
            // Before Linux 6.9, and for a device of a user's. DEL_DEV would wait for the file.
            Err(Error::Control { errno: Errno::EOPNOTSUPP | Errno::EINVAL, .. }) => self.delete_closed(id, instance),
            Err(error) => Err(error),
        }
    }

    /// Deletes a stopped device, unless its id is another one's by now, and waits until the id is free.
    ///
    /// # Errors
    ///
    /// [`Error::Timeout`] if the device still exists after [`RELEASE_TIMEOUT`]: the driver has not carried the command out.
    pub(crate) fn delete_closed(&self, id: DeviceId, instance: Option<u64>) -> Result<Removal> {
        if self.has_followed(id, instance) {
            return Ok(Removal::Complete);
        }
        // DEL_DEV could reach the next device of the id.
        if self.is_deleted(id, instance) {
            return Ok(self.wait_for_release(id, instance));
        }
        let give_up = || self.has_followed(id, instance);
        match self.call(&commands::DEL_DEV, Some(id)).within(RELEASE_TIMEOUT).unless(&give_up).run() {
            // Its server may have been faster, since it notices the stop.
            Err(Error::Control { errno: Errno::ENODEV, .. }) => Ok(self.wait_for_release(id, instance)),
            Ok(()) => Ok(Removal::Complete),
            Err(Error::Control { errno: Errno::ECANCELED, .. }) if give_up() => Ok(Removal::Complete),
            // The command may have waited for another device's DEL_DEV all the time, or was not even sent.
            Err(Error::Timeout { .. }) if self.is_deleted(id, instance) => Ok(Removal::HeldOpen),
            Err(Error::Timeout { .. }) if give_up() => Ok(Removal::Complete),
            Err(error) => Err(error),
        }
    }

    /// Waits until the id of a deleted device is free, or another one's.
    ///
    /// Linux's and this project's driver keep the id until all processes have closed the nodes, and for a moment after that.
    fn wait_for_release(&self, id: DeviceId, instance: Option<u64>) -> Removal {
        let deadline = Instant::now() + RELEASE_TIMEOUT;
        loop {
            if self.has_followed(id, instance) {
                return Removal::Complete;
            }
            if !self.is_taken(id) {
                std::thread::sleep(RELEASE_DELAY);
                return Removal::Complete;
            }
            if Instant::now() >= deadline {
                return Removal::HeldOpen;
            }
            std::thread::sleep(STATE_POLL);
        }
    }

    /// Returns whether the id is another device's by now.
    fn has_followed(&self, id: DeviceId, instance: Option<u64>) -> bool {
        instance.is_some() && self.instance(id).is_some_and(|now| Some(now) != instance)
    }

    /// Returns whether a device is deleted. Its id may still be taken.
    fn is_deleted(&self, id: DeviceId, instance: Option<u64>) -> bool {
        instance.is_some() && matches!(self.driver.instance(id), Ok(None))
    }

    /// Returns whether the driver has a device with this id, which may be deleted already. GET_DEV_INFO2 does not find such a
    /// device, because its node is gone. So this sends a command without a path, which changes nothing: the driver looks for
    /// the device before it checks anything else.
    fn is_taken(&self, id: DeviceId) -> bool {
        let call = self.call(&commands::GET_QUEUE_AFFINITY, Some(id)).payload(vec![0; AFFINITY_BYTES]);
        !call.send().is_err_and(|error| error.errno() == Errno::ENODEV)
    }
}
