// SPDX-License-Identifier: MIT OR Apache-2.0

//! Life cycle of a tag: it is fetched, gets a request, is committed, and canceled.

use std::collections::VecDeque;

use super::{Command, FakeDevice, FakeQueue, FakeRequest, FakeState, FakeTag, NOT_COPIED};
use crate::errno::Errno;
use crate::memory::Descriptor;
use crate::uapi::{self, Features};
use crate::units::{QueueId, Tag};

impl FakeState {
    /// Returns the pages of a request that the server owns.
    pub(super) fn pages(&mut self, id: u32, queue: QueueId, tag: Tag) -> Result<&mut Vec<u8>, Errno> {
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        match queue.tags.get_mut(tag.index()) {
            Some(FakeTag::Served(request)) => Ok(&mut request.pages),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Carries out NEED_GET_DATA: copies the write's data to the address.
    pub(super) fn get_data(&mut self, id: u32, queue: QueueId, tag: Tag, address: u64) -> Result<(), Errno> {
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
        let slot = queue.tags.get_mut(tag.index()).ok_or(Errno::EINVAL)?;
        let FakeTag::Asked(request) = slot else {
            self.violations.push(format!("NEED_GET_DATA of tag {tag}, which was not asked for"));
            return Err(Errno::EINVAL);
        };
        let request = request.clone();
        // SAFETY: the contract in `fake.rs`.
        unsafe { std::ptr::copy_nonoverlapping(request.pages.as_ptr(), address as *mut u8, request.pages.len()) };
        *slot = FakeTag::Served(request);
        Ok(())
    }

    /// Carries out FETCH_REQ or COMMIT_AND_FETCH_REQ. An error completes the command at once.
    pub(super) fn io_command(
        &mut self,
        id: u32,
        queue: QueueId,
        tag: Tag,
        command: Command,
        commit: Option<i32>,
    ) -> Result<(), Errno> {
        let name = if commit.is_some() { "COMMIT_AND_FETCH_REQ" } else { "FETCH_REQ" };
        if let Some(errno) = self.refusals.get_mut(name).and_then(VecDeque::pop_front) {
            return Err(errno);
        }
        let device = self.devices.get_mut(&id).ok_or(Errno::ENODEV)?;
        let slot = device
            .queues
            .get_mut(usize::from(queue.0))
            .and_then(|q| q.tags.get_mut(tag.index()))
            .ok_or(Errno::EINVAL)?;
        let flags = Features::from_bits_retain(device.info.flags);
        let broken = match (&*slot, commit) {
            (FakeTag::Idle, None) => {
                *slot = FakeTag::Armed(command);
                return Ok(());
            }
            (FakeTag::Served(request), Some(_)) if request.daemon.is_some() && request.daemon != command.daemon => {
                (Errno::EINVAL, "from a thread that did not fetch the tag")
            }
            (FakeTag::Served(request), Some(result)) => {
                let canceling = device.canceling;
                let answer = Errno::check(result).map_err(Errno::known).map(|read| {
                    let read = (read as usize).min(request.len);
                    if request.shared {
                        return Vec::new();
                    }
                    if read == 0 || flags.intersects(NOT_COPIED) {
                        return request.pages[..read].to_vec();
                    }
                    // SAFETY: the contract in `fake.rs`: the command's address holds the data.
                    unsafe { std::slice::from_raw_parts(command.address as *const u8, read) }.to_vec()
                });
                self.answers.insert(request.ticket, answer);
                if canceling {
                    *slot = FakeTag::Idle;
                    return if command.daemon.is_some() { Err(Errno::ENODEV) } else { Ok(()) };
                }
                *slot = FakeTag::Armed(command);
                return Ok(());
            }
            (FakeTag::Armed(_) | FakeTag::Asked(_), Some(_)) => (Errno::EBUSY, "of a tag that is not at the server"),
            (FakeTag::Idle, Some(_)) => (Errno::EINVAL, "of a tag that was never fetched"),
            (_, None) => (Errno::EINVAL, "of a tag that is fetched already"),
        };
        self.violations.push(format!("{name} {} (queue {queue}, tag {tag})", broken.1));
        Err(broken.0)
    }
}

impl FakeDevice {
    /// Delivers a request by an armed tag. Returns `None` if there is none.
    pub(super) fn deliver(
        &mut self,
        id: u32,
        queue: usize,
        mut descriptor: Descriptor,
        request: FakeRequest,
    ) -> Option<()> {
        let flags = Features::from_bits_retain(self.info.flags);
        let FakeQueue { descriptors, tags, delivery } = &mut self.queues[queue];
        if flags.contains(Features::BATCH_IO) && delivery.is_none() {
            return None;
        }
        let tag = Tag(tags.iter().position(|t| matches!(t, FakeTag::Armed(_)))? as u16);
        let FakeTag::Armed(command) = tags[tag.index()].clone() else { unreachable!("found above") };
        let request = FakeRequest { daemon: command.daemon, ..request };
        let carries = !request.pages.is_empty() && request.len == 0 && !request.shared;
        let asks = flags.contains(Features::NEED_GET_DATA) && carries;
        if carries && !asks && !flags.intersects(NOT_COPIED) {
            let pages = &request.pages;
            // SAFETY: the contract in `fake.rs`: the buffer is ours while the command waits.
            unsafe { std::ptr::copy_nonoverlapping(pages.as_ptr(), command.address as *mut u8, pages.len()) };
        }
        if flags.contains(Features::AUTO_BUF_REG)
            && !request.pages.is_empty()
            && let Some(index) = command.register
        {
            command.ring.state().registered.insert(index, (id, QueueId(queue as u16), tag));
        }
        if !request.shared {
            descriptor.address = command.address;
        }
        descriptors.write_descriptor(tag, descriptor);
        tags[tag.index()] = if asks { FakeTag::Asked(request) } else { FakeTag::Served(request) };
        match delivery {
            Some((ring, user_data)) if flags.contains(Features::BATCH_IO) => ring.deliver(*user_data, tag),
            _ if asks => command.ring.push(command.user_data, uapi::UBLK_IO_RES_NEED_GET_DATA),
            _ => command.ring.push(command.user_data, uapi::UBLK_IO_RES_OK),
        }
        Some(())
    }

    /// Ends all commands that wait for a request.
    pub(super) fn cancel(&mut self) {
        let batch = self.info.flags & Features::BATCH_IO.bits() != 0;
        for queue in &mut self.queues {
            for tag in &mut queue.tags {
                if let FakeTag::Armed(command) = tag {
                    if !batch {
                        command.ring.push(command.user_data, uapi::UBLK_IO_RES_ABORT);
                    }
                    *tag = FakeTag::Idle;
                }
            }
            if let Some((ring, user_data)) = queue.delivery.take() {
                ring.push(user_data, uapi::UBLK_IO_RES_ABORT);
            }
        }
    }
}
