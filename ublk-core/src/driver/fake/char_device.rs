// SPDX-License-Identifier: MIT OR Apache-2.0

//! The char device: descriptors, data, and the effects of its close.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{FakeTag, Shared};
use crate::driver::{CharDevice, RequestPlace};
use crate::errno::Errno;
use crate::fork::Maker;
use crate::memory::DescriptorMap;
use crate::uapi::{self, Features};
use crate::units::{QueueId, Tag};

#[derive(Debug)]
pub(super) struct FakeChar {
    shared: Arc<Shared>,
    id: u32,
    /// The process that has opened it.
    maker: Maker,
}

impl FakeChar {
    pub(super) fn new(shared: Arc<Shared>, id: u32) -> Self {
        FakeChar { shared, id, maker: Maker::here() }
    }
}

// SAFETY: it maps only its own memory, and its descriptor is a number that only the stand-in uses.
unsafe impl CharDevice for FakeChar {
    fn map_descriptors(&self, queue: QueueId, depth: u16) -> io::Result<DescriptorMap> {
        let state = self.shared.state();
        let device = state.devices.get(&self.id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        Ok(DescriptorMap::shared(queue.descriptors.clone(), depth))
    }

    fn raw_fd(&self) -> RawFd {
        self.id as RawFd
    }

    fn unwritten_byte(&self) -> u8 {
        self.shared.unwritten_byte.load(Ordering::Relaxed)
    }

    fn copy_from_request(&self, place: RequestPlace, into: &mut [u8]) -> io::Result<()> {
        let mut state = self.shared.state();
        let pages = state.pages(self.id, place.queue, place.tag)?;
        let from = pages.get(place.offset as usize..).and_then(|p| p.get(..into.len())).ok_or(Errno::EINVAL)?;
        into.copy_from_slice(from);
        Ok(())
    }

    fn copy_to_request(&self, place: RequestPlace, from: &[u8]) -> io::Result<()> {
        let mut state = self.shared.state();
        let pages = state.pages(self.id, place.queue, place.tag)?;
        let into = pages.get_mut(place.offset as usize..).and_then(|p| p.get_mut(..from.len())).ok_or(Errno::EINVAL)?;
        into.copy_from_slice(from);
        Ok(())
    }
}

impl Drop for FakeChar {
    fn drop(&mut self) {
        // Its parent keeps the file open after a forked child closes its copy. Another thread of the parent may have held
        // the lock at the fork.
        if !self.maker.is_here() {
            return;
        }
        let (shared, id) = (self.shared.clone(), self.id);
        let delay = shared.state().close_delay;
        if delay.is_zero() {
            return shared.closed(id);
        }
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            shared.closed(id);
        });
    }
}

impl Shared {
    /// Handles the exit of the server: without recovery, the disk is removed, and requests that the server had fail.
    fn closed(&self, id: u32) {
        let mut state = self.state();
        if let Some(device) = state.devices.get_mut(&id) {
            let flags = Features::from_bits_retain(device.info.flags);
            device.char_open = false;
            device.canceling = false;
            device.info.ublksrv_pid = -1;
            device.info.state = match device.info.state {
                uapi::UBLK_S_DEV_LIVE if flags.contains(Features::USER_RECOVERY_FAIL_IO) => uapi::UBLK_S_DEV_FAIL_IO,
                uapi::UBLK_S_DEV_LIVE if flags.contains(Features::USER_RECOVERY) => uapi::UBLK_S_DEV_QUIESCED,
                waiting if device.waits_for_server() => waiting,
                _ => uapi::UBLK_S_DEV_DEAD,
            };
            let mut ended = Vec::new();
            for queue in &mut device.queues {
                queue.delivery = None;
                for (number, tag) in queue.tags.iter_mut().enumerate() {
                    match std::mem::replace(tag, FakeTag::Idle) {
                        FakeTag::Served(request) | FakeTag::Asked(request)
                            if flags.contains(Features::USER_RECOVERY_REISSUE) =>
                        {
                            let descriptor = DescriptorMap::shared(queue.descriptors.clone(), device.info.queue_depth)
                                .read(Tag(number as u16));
                            device.held.push((descriptor, request));
                        }
                        FakeTag::Served(request) | FakeTag::Asked(request) => ended.push(request.ticket),
                        FakeTag::Armed(command) if !flags.contains(Features::BATCH_IO) => {
                            command.ring.push(command.user_data, uapi::UBLK_IO_RES_ABORT);
                        }
                        FakeTag::Idle | FakeTag::Armed(_) => {}
                    }
                }
            }
            if device.deleted {
                state.devices.remove(&id);
            }
            state.answers.extend(ended.into_iter().map(|ticket| (ticket, Err(Errno::EIO))));
        }
        drop(state);
        self.changed.notify_all();
    }
}
