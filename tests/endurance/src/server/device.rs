// SPDX-License-Identifier: MIT OR Apache-2.0

//! The char device of a server: descriptors and user copy.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use anyhow::{Context, Result};

use crate::waiting::until;
use ublk_test_common::uapi::*;

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wish {
    /// `UBLK_IO_OP_*`
    pub(super) op: u8,
    /// `UBLK_IO_F_*`
    pub(super) flags: u32,
    /// In bytes.
    pub(super) offset: u64,
    /// In bytes.
    pub(super) length: usize,
}

/// `/dev/ublkcN`, open.
#[derive(Debug)]
pub(super) struct CharDevice {
    file: File,
    pub(super) info: ublksrv_ctrl_dev_info,
    /// The descriptors of each queue.
    descriptors: Vec<*const ublksrv_io_desc>,
}

// SAFETY: the mappings stay until the process ends, and are only read.
unsafe impl Send for CharDevice {}
// SAFETY: as above.
unsafe impl Sync for CharDevice {}

impl CharDevice {
    pub(super) fn open(info: ublksrv_ctrl_dev_info) -> Result<Self> {
        let path = format!("/dev/ublkc{}", info.dev_id);
        // It appears some time after ADD_DEV, and is busy until the last server has been cleaned up after.
        let (file, _) =
            until("opening the char device", || match OpenOptions::new().read(true).write(true).open(&path) {
                Ok(file) => Ok(Some(file)),
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOENT)) => Ok(None),
                Err(error) => Err(error).with_context(|| format!("cannot open {path}")),
            })?;
        let page = 4096;
        let length = (usize::from(info.queue_depth) * size_of::<ublksrv_io_desc>()).next_multiple_of(page);
        let stride = (usize::from(UBLK_MAX_QUEUE_DEPTH) * size_of::<ublksrv_io_desc>()).next_multiple_of(page);
        let mut descriptors = Vec::new();
        for queue in 0..usize::from(info.nr_hw_queues) {
            let offset = (UBLKSRV_CMD_BUF_OFFSET as usize + queue * stride) as libc::off_t;
            // SAFETY: a new mapping, wherever the kernel wants it.
            let map = unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    length,
                    libc::PROT_READ,
                    libc::MAP_SHARED | libc::MAP_POPULATE,
                    file.as_raw_fd(),
                    offset,
                )
            };
            if map == libc::MAP_FAILED {
                return Err(io::Error::last_os_error()).context("cannot map the descriptors");
            }
            descriptors.push(map.cast_const().cast());
        }
        Ok(CharDevice { file, info, descriptors })
    }

    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn descriptor(&self, queue: u16, tag: u16) -> ublksrv_io_desc {
        // SAFETY: within the mapping; the driver leaves the descriptor alone while the server has the request.
        unsafe { self.descriptors[usize::from(queue)].add(usize::from(tag)).read_volatile() }
    }

    /// The buffer that the server gave for the tag.
    pub(super) fn buffer(&self, queue: u16, tag: u16) -> u64 {
        self.descriptor(queue, tag).addr
    }

    /// The request of a tag that the driver has given to the server.
    pub(super) fn wish(&self, queue: u16, tag: u16) -> Wish {
        let descriptor = self.descriptor(queue, tag);
        // SAFETY: both members of the union are integers.
        let sectors = unsafe { descriptor.anon_1.nr_sectors };
        Wish {
            op: (descriptor.op_flags & 0xff) as u8,
            flags: descriptor.op_flags & !0xff,
            offset: descriptor.start_sector * SECTOR,
            length: sectors as usize * SECTOR as usize,
        }
    }

    /// Moves a request's data to or from `memory` by read or write; a negative errno if that fails.
    pub(super) fn user_copy(&self, queue: u16, tag: u16, op: u8, memory: *mut u8, length: usize) -> i32 {
        let at = UBLKSRV_IO_BUF_OFFSET | u64::from(tag) << UBLK_TAG_OFF | u64::from(queue) << UBLK_QID_OFF;
        let mut done = 0;
        while done < length {
            let position = (at + done as u64) as libc::off_t;
            // SAFETY: the caller's memory has `length` bytes.
            let moved = unsafe {
                let memory = memory.add(done).cast();
                if op == UBLK_IO_OP_READ {
                    libc::pwrite(self.fd(), memory, length - done, position)
                } else {
                    libc::pread(self.fd(), memory, length - done, position)
                }
            };
            match moved {
                1.. => done += moved as usize,
                0 => return -libc::EIO,
                _ => match io::Error::last_os_error().raw_os_error() {
                    Some(libc::EINTR) => {}
                    error => return -error.unwrap_or(libc::EIO),
                },
            }
        }
        length as i32
    }
}
