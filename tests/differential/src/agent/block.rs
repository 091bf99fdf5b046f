// SPDX-License-Identifier: MIT OR Apache-2.0

//! A thread that uses a disk, with plain blocking system calls.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::memory::Memory;
use super::worker::{negative, outcome};
use super::{Answer, BlockOrder};
use crate::pattern::{checksum, fill};

/// Largest transfer.
const ROOM: usize = 2 << 20;

const BLKRRPART: libc::Ioctl = 0x125f;
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;
const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
const BLKREPORTZONE: libc::Ioctl = 0xc010_1282;
const BLKRESETZONE: libc::Ioctl = 0x4010_1283;
const BLKOPENZONE: libc::Ioctl = 0x4010_1286;
const BLKCLOSEZONE: libc::Ioctl = 0x4010_1287;
const BLKFINISHZONE: libc::Ioctl = 0x4010_1288;
/// `_IOWR(0x15, 2, struct logical_block_metadata_cap)`
const FS_IOC_GETLBMD_CAP: libc::Ioctl = 0xc010_1502;

/// The disk that a thread has open.
#[derive(Debug, Default)]
pub(super) struct Disk {
    file: Option<File>,
    memory: Option<Memory>,
}

impl Disk {
    pub(super) fn open(&mut self, id: u32, write: bool, exclusive: bool) -> i64 {
        let mut flags = libc::O_DIRECT | libc::O_CLOEXEC;
        if exclusive {
            flags |= libc::O_EXCL;
        }
        match OpenOptions::new().read(true).write(write).custom_flags(flags).open(format!("/dev/ublkb{id}")) {
            Ok(file) => {
                self.file = Some(file);
                0
            }
            Err(error) => negative(&error),
        }
    }

    pub(super) fn close(&mut self) -> i64 {
        self.file = None;
        0
    }

    pub(super) fn execute(&mut self, order: &BlockOrder) -> io::Result<Answer> {
        let memory = match self.memory {
            Some(memory) => memory,
            None => *self.memory.insert(Memory::new(ROOM)?),
        };
        let fd = self.file.as_ref().map_or(-1, AsRawFd::as_raw_fd);
        let buffer = memory.part(0, ROOM);
        let mut sum = 0;
        let mut text = String::new();
        let result = match *order {
            BlockOrder::Read(offset, len) => {
                let buffer = &mut buffer[..(len as usize).min(ROOM)];
                buffer.fill(0xa5);
                // SAFETY: the buffer is as long as its slice.
                let got = unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), buffer.len(), offset as libc::off_t) };
                let got = outcome(got as i64);
                sum = checksum(&buffer[..usize::try_from(got).unwrap_or(0)]);
                got
            }
            BlockOrder::Write(offset, len, salt) | BlockOrder::WriteSync(offset, len, salt) => {
                let buffer = &mut buffer[..(len as usize).min(ROOM)];
                fill(buffer, offset, salt);
                let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
                let flags = if matches!(order, BlockOrder::WriteSync(..)) { libc::RWF_DSYNC } else { 0 };
                // SAFETY: one vector, whose buffer is as long as it says.
                outcome(unsafe { libc::pwritev2(fd, &raw const vector, 1, offset as libc::off_t, flags) } as i64)
            }
            // SAFETY: a plain system call.
            BlockOrder::Flush => outcome(unsafe { libc::fdatasync(fd) }),
            BlockOrder::Discard(offset, len) => {
                let range = [offset, len];
                // SAFETY: the ioctl reads two numbers.
                outcome(unsafe { libc::ioctl(fd, BLKDISCARD, range.as_ptr()) })
            }
            BlockOrder::ZeroOut(offset, len) => {
                let range = [offset, len];
                // SAFETY: the ioctl reads two numbers.
                outcome(unsafe { libc::ioctl(fd, BLKZEROOUT, range.as_ptr()) })
            }
            BlockOrder::ReportZones(sector, count) => {
                let len = 16 + count as usize * 64;
                let report = &mut buffer[..len.min(ROOM)];
                report.fill(0);
                report[0..8].copy_from_slice(&sector.to_ne_bytes());
                report[8..12].copy_from_slice(&count.to_ne_bytes());
                // SAFETY: struct blk_zone_report with room for as many zones as it says.
                let result = outcome(unsafe { libc::ioctl(fd, BLKREPORTZONE, report.as_mut_ptr()) });
                sum = checksum(report);
                text = format!("zones={}", u32::from_ne_bytes([report[8], report[9], report[10], report[11]]));
                result
            }
            BlockOrder::Zone(what, sector, sectors) => {
                let request = match what {
                    0 => BLKRESETZONE,
                    1 => BLKOPENZONE,
                    2 => BLKCLOSEZONE,
                    _ => BLKFINISHZONE,
                };
                let range = [sector, sectors];
                // SAFETY: the ioctl reads two numbers.
                outcome(unsafe { libc::ioctl(fd, request, range.as_ptr()) })
            }
            BlockOrder::Size => {
                let mut size = 0u64;
                // SAFETY: the ioctl writes one number.
                let result = outcome(unsafe { libc::ioctl(fd, BLKGETSIZE64, &raw mut size) });
                text = format!("size={size}");
                result
            }
            // SAFETY: the ioctl has no argument.
            BlockOrder::Rescan => outcome(unsafe { libc::ioctl(fd, BLKRRPART) }),
            BlockOrder::Metadata => {
                let mut capability = [0u32; 4];
                // SAFETY: struct logical_block_metadata_cap has 16 bytes, which the number of the ioctl says.
                let result = outcome(unsafe { libc::ioctl(fd, FS_IOC_GETLBMD_CAP, capability.as_mut_ptr()) });
                text = format!("cap={capability:x?}").replace(' ', "");
                result
            }
        };
        Ok(Answer::Block { result, sum, text })
    }
}
