// SPDX-License-Identifier: MIT OR Apache-2.0

//! The driver's numbers and layouts: the same generated bindings that `ublk-core` uses.

#[rustfmt::skip]
#[path = "../../../ublk-core/src/uapi/bindings.rs"]
mod bindings;

pub(crate) use bindings::*;

/// Bytes of a sector, the unit of block requests.
pub(crate) const SECTOR: u64 = 512;

/// The payload of a control command.
pub(crate) fn control_payload(header: ublksrv_ctrl_cmd) -> [u8; 80] {
    let mut payload = [0; 80];
    // SAFETY: the structure has 32 bytes of integers and no padding.
    let bytes: [u8; 32] = unsafe { std::mem::transmute(header) };
    payload[..32].copy_from_slice(&bytes);
    payload
}

/// The payload of a command on one tag.
pub(crate) fn io_payload(q_id: u16, tag: u16, result: i32, addr: u64) -> [u8; 16] {
    let command = ublksrv_io_cmd { q_id, tag, result, anon_1: ublksrv_io_cmd_addr { addr } };
    // SAFETY: the structure has 16 bytes of integers and no padding.
    unsafe { std::mem::transmute(command) }
}

/// The payload of a command on many tags.
pub(crate) fn batch_payload(batch: ublk_batch_io) -> [u8; 16] {
    // SAFETY: the structure has 16 bytes of integers and no padding.
    unsafe { std::mem::transmute(batch) }
}
