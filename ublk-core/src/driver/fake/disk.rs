// SPDX-License-Identifier: MIT OR Apache-2.0

//! The block layer's part: requests to a device, and their ends.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{CLIENT_TIMEOUT, FakeRequest, FakeState, Shared};
use crate::errno::Errno;
use crate::memory::Descriptor;
use crate::uapi;
use crate::units::Sectors;

/// A client of a device's disk. Each call is one request and waits for its end.
#[derive(Clone, Debug)]
pub struct FakeDisk {
    shared: Arc<Shared>,
    id: u32,
}

/// A request that was sent and not yet waited for.
#[derive(Debug)]
#[must_use]
pub struct Sent(u64);

impl FakeDisk {
    pub(super) fn new(shared: Arc<Shared>, id: u32) -> Self {
        FakeDisk { shared, id }
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    ///
    /// The errno that the server failed the request with; `ENODEV` without a live device, `ETIMEDOUT`
    /// if it does not answer. The same holds for all calls here.
    pub fn read(&self, offset: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_READ.into(), offset, len, &[])?;
        self.wait(sent)
    }

    /// Reads `count` times `len` bytes from the disk's beginning on. Servers do not look before all but the last are
    /// there, unless they are woken: the disk's only queue must have as many tags, and have been read from before.
    pub fn read_at_once(&self, count: usize, len: usize) -> Result<(), Errno> {
        let send = |n: usize| {
            self.shared.holding.store(n + 1 != count, Ordering::Relaxed);
            self.send(uapi::UBLK_IO_OP_READ.into(), (n * len) as u64, len, &[])
        };
        let sent: Result<Vec<_>, _> = (0..count).map(send).collect();
        self.shared.holding.store(false, Ordering::Relaxed);
        sent?.into_iter().try_for_each(|sent| self.wait(sent).map(drop))
    }

    /// Writes.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_WRITE.into(), offset, data.len(), data)?;
        self.wait(sent).map(drop)
    }

    /// Writes with forced unit access.
    pub fn write_durably(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let op = u32::from(uapi::UBLK_IO_OP_WRITE) | uapi::UBLK_IO_F_FUA;
        let sent = self.send(op, offset, data.len(), data)?;
        self.wait(sent).map(drop)
    }

    /// Flushes.
    pub fn flush(&self) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_FLUSH.into(), 0, 0, &[])?;
        self.wait(sent).map(drop)
    }

    /// Discards.
    pub fn discard(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_DISCARD.into(), offset, len, &[])?;
        self.wait(sent).map(drop)
    }

    /// Zeroes.
    pub fn write_zeroes(&self, offset: u64, len: usize) -> Result<(), Errno> {
        let sent = self.send(uapi::UBLK_IO_OP_WRITE_ZEROES.into(), offset, len, &[])?;
        self.wait(sent).map(drop)
    }

    /// The most bytes that one read or write takes.
    pub fn max_io_bytes(&self) -> Result<usize, Errno> {
        self.shared.state().devices.get(&self.id).map(|d| d.info.max_io_buf_bytes as usize).ok_or(Errno::ENODEV)
    }

    /// Sends a request with a raw operation word and does not wait. `data` is what a write carries.
    pub fn send(&self, op_flags: u32, offset: u64, len: usize, data: &[u8]) -> Result<Sent, Errno> {
        self.send_at(op_flags, offset, len, data, None)
    }

    /// Sends a request whose data is in memory that the client shares: its number, and the byte in it.
    pub fn send_shared(&self, op_flags: u32, offset: u64, len: usize, place: (u16, u32)) -> Result<Sent, Errno> {
        self.send_at(op_flags | uapi::UBLK_IO_F_SHMEM_ZC, offset, len, &[], Some(place))
    }

    fn send_at(
        &self,
        op_flags: u32,
        offset: u64,
        len: usize,
        data: &[u8],
        shared: Option<(u16, u32)>,
    ) -> Result<Sent, Errno> {
        let mut turn = offset as usize >> 12;
        self.wait_for(|state| {
            let device = match state.devices.get_mut(&self.id) {
                Some(device) if device.canceling || device.info.state == uapi::UBLK_S_DEV_QUIESCED => return None,
                Some(device) if device.info.state == uapi::UBLK_S_DEV_LIVE => device,
                Some(device) if device.info.state == uapi::UBLK_S_DEV_FAIL_IO => return Some(Err(Errno::EIO)),
                _ => return Some(Err(Errno::ENODEV)),
            };
            turn += 1;
            let queue = turn % device.queues.len();
            assert!(data.len() <= device.info.max_io_buf_bytes as usize, "longer than the device takes");
            assert!(data.len() <= len, "more data than the request is long");
            let is_read = op_flags as u8 == uapi::UBLK_IO_OP_READ;
            let pages = if is_read && shared.is_none() { vec![0xee; len] } else { data.to_vec() };
            let descriptor = Descriptor {
                op_flags,
                nr_sectors: (len as u64 / Sectors::SIZE) as u32,
                // A flush has no position; the block layer leaves all ones there.
                start_sector: if op_flags as u8 == uapi::UBLK_IO_OP_FLUSH {
                    u64::MAX
                } else {
                    Sectors::from_bytes(offset).0
                },
                address: shared.map_or(0, |(number, at)| u64::from(number) << 32 | u64::from(at)),
            };
            let ticket = state.tickets + 1;
            let request = FakeRequest {
                daemon: None,
                len: if is_read { len } else { 0 },
                pages,
                shared: shared.is_some(),
                ticket,
            };
            device.deliver(self.id, queue, descriptor, request)?;
            state.tickets = ticket;
            Some(Ok(Sent(ticket)))
        })
    }

    /// Waits for a request's end and gives a read's data.
    pub fn wait(&self, sent: Sent) -> Result<Vec<u8>, Errno> {
        self.wait_for(|state| {
            // The block layer's requeue list.
            if let Some(device) = state.devices.get_mut(&self.id)
                && device.info.state == uapi::UBLK_S_DEV_LIVE
                && let Some((descriptor, request)) = device.held.pop()
                && device.deliver(self.id, 0, descriptor, request.clone()).is_none()
            {
                device.held.push((descriptor, request));
            }
            state.answers.remove(&sent.0)
        })
    }

    fn wait_for<T>(&self, check: impl FnMut(&mut FakeState) -> Option<Result<T, Errno>>) -> Result<T, Errno> {
        let result = self.shared.wait_for(CLIENT_TIMEOUT, &|| false, check);
        self.shared.changed.notify_all();
        result.unwrap_or(Err(Errno::ETIMEDOUT))
    }
}
