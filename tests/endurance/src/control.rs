// SPDX-License-Identifier: MIT OR Apache-2.0

//! Control commands, each with a deadline.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::time::Instant;

use io_uring::{opcode, types};

use crate::ring::ControlRing;
use crate::waiting::PATIENCE;
use ublk_test_common::uapi::*;

/// `queue_id` of commands that are not about a queue.
const NO_QUEUE: u16 = u16::MAX;
/// Any free device number.
const ANY_DEVICE: u32 = u32::MAX;

/// `/dev/ublk-control` and a ring for it.
pub(crate) struct Control {
    file: File,
    ring: ControlRing,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("file", &self.file).finish_non_exhaustive()
    }
}

impl Control {
    pub(crate) fn open() -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/ublk-control")?;
        Ok(Control { file, ring: ControlRing::builder().build(4)? })
    }

    pub(crate) fn features(&mut self) -> io::Result<u64> {
        let header = ublksrv_ctrl_cmd { dev_id: ANY_DEVICE, ..Default::default() };
        self.exchange(UBLK_U_CMD_GET_FEATURES, header, 0u64)
    }

    /// Makes a device; the answer has what the driver made of the wish.
    pub(crate) fn add(&mut self, info: ublksrv_ctrl_dev_info) -> io::Result<ublksrv_ctrl_dev_info> {
        let info = ublksrv_ctrl_dev_info { dev_id: ANY_DEVICE, ..info };
        self.exchange(UBLK_U_CMD_ADD_DEV, ublksrv_ctrl_cmd { dev_id: ANY_DEVICE, ..Default::default() }, info)
    }

    pub(crate) fn set_params(&mut self, device: u32, params: ublk_params) -> io::Result<()> {
        let header = ublksrv_ctrl_cmd { dev_id: device, ..Default::default() };
        self.exchange(UBLK_U_CMD_SET_PARAMS, header, params).map(drop)
    }

    pub(crate) fn info(&mut self, device: u32) -> io::Result<ublksrv_ctrl_dev_info> {
        let header = ublksrv_ctrl_cmd { dev_id: device, ..Default::default() };
        self.exchange(UBLK_U_CMD_GET_DEV_INFO, header, ublksrv_ctrl_dev_info::default())
    }

    /// A command that has nothing but one number.
    pub(crate) fn simple(&mut self, op: u32, device: u32, data: u64) -> io::Result<()> {
        let header = ublksrv_ctrl_cmd { dev_id: device, data: [data], ..Default::default() };
        self.exchange(op, header, 0u64).map(drop)
    }

    fn exchange<T: Copy>(&mut self, op: u32, header: ublksrv_ctrl_cmd, payload: T) -> io::Result<T> {
        let payload = Box::new(payload);
        let address: *const T = &raw const *payload;
        let header =
            ublksrv_ctrl_cmd { queue_id: NO_QUEUE, addr: address as u64, len: size_of::<T>() as u16, ..header };
        let entry = opcode::UringCmd80::new(types::Fd(self.file.as_raw_fd()), op)
            .cmd(ublk_test_common::uapi::payload(&header))
            .build();
        // SAFETY: the payload stays where it is until the command is complete, or for ever.
        unsafe { self.ring.submission().push(&entry) }.map_err(|_| io::Error::other("the control ring is full"))?;
        match self.completion() {
            Ok(0..) => Ok(*payload),
            Ok(error) => Err(io::Error::from_raw_os_error(-error)),
            Err(error) => {
                // The driver may still write to it.
                Box::leak(payload);
                Err(error)
            }
        }
    }

    fn completion(&mut self) -> io::Result<i32> {
        let begin = Instant::now();
        loop {
            if let Some(cqe) = self.ring.completion().next() {
                return Ok(cqe.result());
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the control command does not end"));
            }
            let left = types::Timespec::from(left);
            match self.ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(&left)) {
                Ok(_) => {}
                Err(error) if matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR)) => {}
                Err(error) => return Err(error),
            }
        }
    }
}
