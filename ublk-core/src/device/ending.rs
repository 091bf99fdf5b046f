// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a server stops a device, or leaves it to the next one.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Device;
use crate::control::{DRAIN_TIMEOUT, Removal, STATE_POLL};
use crate::engine::Successor;
use crate::error::{Error, Result};
use crate::uapi::{DeviceState, Features};

/// How long queues may take to close before the driver is asked again for what keeps them open.
const ASK_AGAIN: Duration = Duration::from_secs(1);
/// How long queues may take to close after they were given up.
const ABANDON_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the driver may take to notice that the server has left.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(40);

/// What became of a device that its server has ended with.
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
    /// [`Error::Timeout`] if requests are not finished or the device is not let go in time; calling
    /// again tries again. [`Error::Queue`] if a queue failed earlier; the device is gone then.
    pub fn stop(&self) -> Result<()> {
        if self.owner != std::process::id() {
            return Ok(());
        }
        let mut deleted = self.deleted.lock().unwrap_or_else(PoisonError::into_inner);
        if *deleted {
            return Ok(());
        }
        let id = self.id();
        // It is about to be deleted, which waits for this descriptor.
        self.held.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.stop_disk()?;
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        let mut pause = ASK_AGAIN;
        while !self.events.wait_all_closed(pause) && Instant::now() < deadline {
            pause *= 2;
            // A tag that was lent again behind the first STOP_DEV is taken away by another.
            self.stop_disk()?;
        }
        self.give_up_queues(Successor::None)?;
        match self.control.remove(id) {
            Ok(Removal::Complete) | Err(Error::Control { errno: Errno::ENODEV, .. }) => {}
            Ok(Removal::HeldOpen) => {
                log::warn!("device {id} is deleted, but somebody still holds it open; its id is free after that");
            }
            Err(error) => return Err(error),
        }
        *deleted = true;
        // Whoever waits for the end of a device that never had a queue.
        self.events.stopping();
        self.events.take_failure().map_or(Ok(()), Err)
    }

    /// Removes the disk. If requests keep that from happening for too long, their queues are given up: the
    /// driver fails what they had, once their thread's ring is closed.
    fn stop_disk(&self) -> Result<()> {
        match gone_is_fine(self.control.stop(self.id())) {
            Err(error @ Error::Timeout { .. }) => {
                log::error!("{error}; giving up the queues of device {}", self.id());
                self.give_up_queues(Successor::None)?;
                gone_is_fine(self.control.stop(self.id()))
            }
            other => other,
        }
    }

    /// Gives up the queues that did not close.
    fn give_up_queues(&self, successor: Successor) -> Result<()> {
        if self.events.open_queues() != 0 {
            self.pool.abandon(self.id(), successor);
            if !self.events.wait_all_closed(ABANDON_TIMEOUT) {
                return Err(Error::Timeout {
                    waiting_for: format!("closing {} queues of device {}", self.events.open_queues(), self.id()),
                    waited: DRAIN_TIMEOUT + ABANDON_TIMEOUT,
                    hint: match successor {
                        Successor::Server => "a handler does not return, or a file does not finish what it was given: the \
                                              next server has to wait for that"
                            .into(),
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

    /// Ends a device that [has begun to end](Device::is_ending), as whoever caused that meant it: one that was
    /// asked to wait for another server is left, any other is stopped and deleted.
    ///
    /// # Errors
    ///
    /// As [`stop`](Device::stop); and [`Error::Timeout`] if the driver does not notice that the server has left, or if a
    /// file does not finish what it was given.
    /// A device that can be recovered is there after that. Before Linux 6.16 (`UBLK_F_QUIESCE`) nothing but the end
    /// of their thread takes tags away from a queue that is given up because its handler does not return: where such a
    /// thread serves other devices too, it is their end that lets the next server in.
    pub fn conclude(&self) -> Result<Ending> {
        if self.recovery().is_none() || self.owner != std::process::id() {
            return self.stop().map(|()| Ending::Deleted);
        }
        let id = self.id();
        self.leaving.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        while !self.events.wait_all_closed(ASK_AGAIN) && Instant::now() < deadline {
            // Tags that were lent again behind the command that took the others away.
            match self.control.info(id).map(|info| info.state) {
                Ok(DeviceState::Live) if self.info.features.contains(Features::QUIESCE) => {
                    // Somebody may be stopping it, which forbids this and does the same.
                    let _ = self.control.quiesce(id, Duration::from_millis(100));
                }
                Ok(DeviceState::Dead) => gone_is_fine(self.control.stop(id))?,
                Ok(_) => {}
                Err(error) if error.errno() == Errno::ENODEV => break,
                Err(error) => return Err(error),
            }
        }
        self.give_up_queues(Successor::Server)?;
        // The driver takes a moment to notice.
        let deadline = Instant::now() + NOTICE_TIMEOUT;
        loop {
            match self.control.info(id).map(|info| info.state) {
                Ok(DeviceState::Quiesced | DeviceState::FailIo) => {
                    *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    return self.events.take_failure().map_or(Ok(Ending::Left), Err);
                }
                Ok(DeviceState::Live) if Instant::now() < deadline => std::thread::sleep(STATE_POLL),
                Ok(DeviceState::Live) => {
                    // Its requests are somebody's: not to be failed because of a stray descriptor.
                    *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    return Err(Error::Timeout {
                        waiting_for: format!("the driver noticing that device {id} has no server"),
                        waited: NOTICE_TIMEOUT,
                        hint: format!("a child of this process may still have /dev/ublkc{id} open"),
                    });
                }
                Ok(_) => return self.stop().map(|()| Ending::Deleted),
                Err(error) if error.errno() == Errno::ENODEV => return self.stop().map(|()| Ending::Deleted),
                Err(error) => return Err(error),
            }
        }
    }

    /// Gives up the queues and leaves the device as it is, for another server: without a word to the driver, so also
    /// before Linux 6.16. What its handlers had fails, or is sent again to the next server, which gets the device once files
    /// have finished what they were given: an old write could land over a newer one. Dropping it does not delete
    /// it after that. For devices that can be recovered, and whose recovery has gone wrong.
    pub fn abandon(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        *self.deleted.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.pool.abandon(self.id(), Successor::Server);
    }

    /// Finishes the requests in flight and leaves the device to another server: it stays, and requests that
    /// still come wait, or fail if it was made with [`Recovery::FailIo`](super::Recovery::FailIo). Needs
    /// [`DeviceOptions::recovery`](super::DeviceOptions::recovery) and Linux 6.16.
    ///
    /// # Errors
    ///
    /// `EINVAL` if the device was not made for it, [`Error::Unsupported`] if the driver is too old; else as
    /// [`stop`](Device::stop).
    pub fn leave(&self) -> Result<()> {
        self.control.require_quiesce(&self.info)?;
        let id = self.id();
        match self.control.quiesce(id, ASK_AGAIN) {
            Ok(()) | Err(Error::Control { errno: Errno::EBUSY, .. }) => {}
            Err(error) => return Err(error),
        }
        match self.conclude()? {
            Ending::Left => Ok(()),
            Ending::Deleted => Err(Error::Control {
                command: "QUIESCE_DEV",
                device: Some(id),
                errno: Errno::ENODEV,
                hint: "somebody else has deleted the device meanwhile".into(),
            }),
        }
    }
}

/// Somebody else may delete the device at any time.
fn gone_is_fine(result: Result<()>) -> Result<()> {
    match result {
        Err(Error::Control { errno: Errno::ENODEV, .. }) => Ok(()),
        other => other,
    }
}
