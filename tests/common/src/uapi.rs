// SPDX-License-Identifier: MIT OR Apache-2.0

//! The driver's numbers and layouts: the generated bindings of `ublk-core`, and their bytes.

#[rustfmt::skip]
#[path = "../../../ublk-core/src/uapi/bindings.rs"]
mod bindings;

pub use bindings::*;

/// Bytes of a sector, the unit of block requests.
pub const SECTOR: u64 = 512;

/// Returns a structure as the payload of a command, filled up with zeros.
///
/// # Panics
///
/// If the structure is longer.
pub fn payload<const N: usize>(structure: &impl Plain) -> [u8; N] {
    let bytes = structure.bytes();
    let mut payload = [0; N];
    payload[..bytes.len()].copy_from_slice(&bytes);
    payload
}

/// A structure of the user API as bytes.
pub trait Plain: Copy {
    /// Returns the bytes of the structure.
    fn bytes(&self) -> Vec<u8> {
        let at: *const Self = self;
        // SAFETY: the structures of the user API have no padding bytes (each has explicit ones), so all
        // of their size is initialised.
        unsafe { std::slice::from_raw_parts(at.cast::<u8>(), size_of::<Self>()) }.to_vec()
    }

    /// Returns the structure that begins with these bytes. Missing ones are zero.
    fn from_bytes(bytes: &[u8]) -> Self
    where
        Self: Default,
    {
        let mut value = Self::default();
        let length = bytes.len().min(size_of::<Self>());
        let at: *mut Self = &mut value;
        // SAFETY: any bytes are a value of these structures, and `length` is within both.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast::<u8>(), length) };
        value
    }
}

impl Plain for ublksrv_ctrl_cmd {}
impl Plain for ublksrv_ctrl_dev_info {}
impl Plain for ublksrv_io_cmd {}
impl Plain for ublk_elem_header {}
impl Plain for ublk_batch_io {}
impl Plain for ublk_shmem_buf_reg {}

impl Plain for ublk_params {
    fn bytes(&self) -> Vec<u8> {
        params_bytes(self)
    }
}

/// `struct ublk_params` has a hole made by the compiler, so it is put together field by field.
fn params_bytes(params: &ublk_params) -> Vec<u8> {
    let mut bytes = vec![0u8; size_of::<ublk_params>()];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    macro_rules! put {
        ($($field:ident).+) => {
            put(std::mem::offset_of!(ublk_params, $($field).+), &params.$($field).+.to_ne_bytes())
        };
    }
    put!(len);
    put!(types);
    put!(basic.attrs);
    put!(basic.logical_bs_shift);
    put!(basic.physical_bs_shift);
    put!(basic.io_opt_shift);
    put!(basic.io_min_shift);
    put!(basic.max_sectors);
    put!(basic.chunk_sectors);
    put!(basic.dev_sectors);
    put!(basic.virt_boundary_mask);
    put!(discard.discard_alignment);
    put!(discard.discard_granularity);
    put!(discard.max_discard_sectors);
    put!(discard.max_write_zeroes_sectors);
    put!(discard.max_discard_segments);
    put!(discard.reserved0);
    put!(devt.char_major);
    put!(devt.char_minor);
    put!(devt.disk_major);
    put!(devt.disk_minor);
    put!(zoned.max_open_zones);
    put!(zoned.max_active_zones);
    put!(zoned.max_zone_append_sectors);
    put!(dma.alignment);
    put!(seg.seg_boundary_mask);
    put!(seg.max_segment_size);
    put!(seg.max_segments);
    put!(integrity.flags);
    put!(integrity.max_integrity_segments);
    put!(integrity.interval_exp);
    put!(integrity.metadata_size);
    put!(integrity.pi_offset);
    put!(integrity.csum_type);
    put!(integrity.tag_size);
    bytes
}
