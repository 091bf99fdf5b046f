// SPDX-License-Identifier: MIT OR Apache-2.0

//! How a device becomes a disk: its parameters, queues, START_DEV and its node.

use std::iter::StepBy;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::{Device, fitting};
use crate::data::Access;
use crate::driver::CharDevice;
use crate::engine::QueueSetup;
use crate::errno::Errno;
use crate::error::{Error, Result, errno_of};
use crate::params::Operations;
use crate::target::{QueueInfo, Target};
use crate::uapi::Features;
use crate::units::{DeviceId, QueueId};

/// Time limit for `/dev/ublkcN` and `/dev/ublkbN` to appear, and for udev to close the former.
pub(super) const NODE_TIMEOUT: Duration = Duration::from_secs(30);
/// Time that udev gets to make the user owner of the device; without its rules it never does.
const ACCESS_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit for the opening of a queue by its thread.
const OPEN_TIMEOUT: Duration = Duration::from_secs(30);

impl Device {
    /// Serves a device that was [added](crate::Server::add), and returns when its node can be used. Once.
    ///
    /// # Errors
    ///
    /// After any failure, the device is stopped and deleted. A second call is refused with `EEXIST`, and the device goes
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
    pub(super) fn undo(&self, error: Error) -> Error {
        // The error of the queue is more specific than that of the command that waited for it.
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
    pub(super) fn hold_char(&self) -> Result<()> {
        if self.info.features.contains(Features::UNPRIVILEGED_DEV) { Ok(()) } else { self.hold_open_char() }
    }

    fn hold_open_char(&self) -> Result<()> {
        let file = self.open_char()?;
        self.hold(file);
        Ok(())
    }

    pub(super) fn open_queues(&self, target: &Arc<dyn Target>) -> Result<()> {
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
        tags: StepBy<Range<u16>>,
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

    pub(super) fn wait_for_node(&self) -> Result<()> {
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
}

/// Returns whether a char device that cannot be opened now may be opened later.
pub(super) fn may_open_later(error: &std::io::Error) -> bool {
    matches!(errno_of(error), Errno::ENOENT | Errno::EBUSY | Errno::EACCES | Errno::ENXIO)
}

/// Why a char device was not opened, after [`NODE_TIMEOUT`] if it [might have been](may_open_later).
pub(super) fn open_error(id: DeviceId, error: &std::io::Error) -> Error {
    let hint = if may_open_later(error) {
        format!("still so after {} s (is /dev a devtmpfs?)", NODE_TIMEOUT.as_secs())
    } else {
        String::new()
    };
    Error::File { operation: "open", path: format!("/dev/ublkc{id}").into(), errno: errno_of(error), hint }
}

/// Deals a queue's tags out to its threads in turn. The block layer prefers tags that were used lately, so that a load which
/// needs only some of them uses neighbours.
fn shares(depth: u16, threads: u16) -> impl Iterator<Item = StepBy<Range<u16>>> {
    (0..threads).map(move |first| (first..depth).step_by(threads.into()))
}
