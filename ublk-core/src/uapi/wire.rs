// SPDX-License-Identifier: MIT OR Apache-2.0

//! Structures to bytes and back.
//!
//! Invariant of the `unsafe` blocks: all structures are plain numbers (`repr(C)`, every bit pattern valid), and their padding
//! is spelled out or zeroed, because they are made from `Default`.

use super::{ublk_params, ublk_shmem_buf_reg, ublksrv_ctrl_dev_info};

fn encode<T: Copy>(value: &T) -> Vec<u8> {
    let mut bytes = vec![0; size_of::<T>()];
    // SAFETY: the vector has room for a `T`, and the write is unaligned.
    unsafe { bytes.as_mut_ptr().cast::<T>().write_unaligned(*value) };
    bytes
}

fn decode<T: Copy + Default>(bytes: &[u8]) -> T {
    assert!(bytes.len() >= size_of::<T>(), "{} bytes for a structure of {}", bytes.len(), size_of::<T>());
    // SAFETY: the slice is long enough (assertion), every bit pattern is a valid `T` (above), and the read is unaligned.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}

pub(crate) fn encode_info(info: &ublksrv_ctrl_dev_info) -> Vec<u8> {
    encode(info)
}

pub(crate) fn decode_info(bytes: &[u8]) -> ublksrv_ctrl_dev_info {
    decode(bytes)
}

pub(crate) fn encode_shared(buffer: &ublk_shmem_buf_reg) -> Vec<u8> {
    encode(buffer)
}

pub(crate) fn encode_params(params: &ublk_params) -> Vec<u8> {
    encode(params)
}

pub(crate) fn decode_params(bytes: &[u8]) -> ublk_params {
    decode(bytes)
}
