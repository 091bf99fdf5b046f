// SPDX-License-Identifier: MIT OR Apache-2.0

//! The operations of requests.

use crate::memory::Descriptor;
use crate::uapi;
use crate::units::Sectors;

/// The operation of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Fill the buffer with what the disk holds.
    Read,
    /// Store the buffer.
    Write,
    /// Make everything acknowledged so far durable.
    Flush,
    /// The range's content is no longer needed; it may read as anything afterwards.
    Discard,
    /// The range reads as zeros afterwards.
    WriteZeroes,
    /// Open a zone explicitly.
    ZoneOpen,
    /// Close an open zone.
    ZoneClose,
    /// Make a zone full: its write pointer goes to its end.
    ZoneFinish,
    /// Store the buffer at the write pointer of the zone that begins at the request's offset, and return the position
    /// ([`complete_append`](crate::Request::complete_append)).
    ZoneAppend,
    /// Make a zone empty: its write pointer goes to its beginning.
    ZoneReset,
    /// Make all sequential zones empty.
    ZoneResetAll,
    /// Fill the buffer with an array of `struct blk_zone`: the zones from the request's offset on. Those
    /// that do not exist stay zeros.
    ReportZones,
}

impl Op {
    /// All operations, each at the index of its number.
    pub(crate) const ALL: [Op; 12] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::ZoneOpen,
        Op::ZoneClose,
        Op::ZoneFinish,
        Op::ZoneAppend,
        Op::ZoneReset,
        Op::ZoneResetAll,
        Op::ReportZones,
    ];

    pub(crate) fn decode(op_flags: u32) -> Option<Self> {
        match op_flags as u8 {
            uapi::UBLK_IO_OP_READ => Some(Op::Read),
            uapi::UBLK_IO_OP_WRITE => Some(Op::Write),
            uapi::UBLK_IO_OP_FLUSH => Some(Op::Flush),
            uapi::UBLK_IO_OP_DISCARD => Some(Op::Discard),
            uapi::UBLK_IO_OP_WRITE_ZEROES => Some(Op::WriteZeroes),
            uapi::UBLK_IO_OP_ZONE_OPEN => Some(Op::ZoneOpen),
            uapi::UBLK_IO_OP_ZONE_CLOSE => Some(Op::ZoneClose),
            uapi::UBLK_IO_OP_ZONE_FINISH => Some(Op::ZoneFinish),
            uapi::UBLK_IO_OP_ZONE_APPEND => Some(Op::ZoneAppend),
            uapi::UBLK_IO_OP_ZONE_RESET => Some(Op::ZoneReset),
            uapi::UBLK_IO_OP_ZONE_RESET_ALL => Some(Op::ZoneResetAll),
            uapi::UBLK_IO_OP_REPORT_ZONES => Some(Op::ReportZones),
            _ => None,
        }
    }

    /// Returns the name of the operation in lists: `read`, `write-zeroes`.
    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write-zeroes",
            Op::ZoneOpen => "zone-open",
            Op::ZoneClose => "zone-close",
            Op::ZoneFinish => "zone-finish",
            Op::ZoneAppend => "zone-append",
            Op::ZoneReset => "zone-reset",
            Op::ZoneResetAll => "zone-reset-all",
            Op::ReportZones => "report-zones",
        }
    }

    /// Returns whether requests of this kind carry data.
    pub fn has_data(self) -> bool {
        matches!(self, Op::Read | Op::Write | Op::ZoneAppend | Op::ReportZones)
    }

    /// Returns whether it changes the disk's data in a way that files have.
    pub(crate) fn changes(self) -> bool {
        matches!(self, Op::Write | Op::Discard | Op::WriteZeroes)
    }

    /// Returns whether the server provides the data.
    pub fn fills(self) -> bool {
        matches!(self, Op::Read | Op::ReportZones)
    }

    /// Bytes that a request with this descriptor covers.
    pub(crate) fn len(self, descriptor: &Descriptor) -> u64 {
        match self {
            Op::Flush | Op::ZoneResetAll => 0,
            // The descriptor counts zones then.
            Op::ReportZones => u64::from(descriptor.nr_sectors) * Self::ZONE_DESCRIPTOR,
            _ => Sectors(u64::from(descriptor.nr_sectors)).bytes(),
        }
    }

    /// Bytes of a `struct blk_zone`, from `linux/blkzoned.h`.
    pub(crate) const ZONE_DESCRIPTOR: u64 = 64;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(count: u32) -> Descriptor {
        Descriptor { op_flags: 0, nr_sectors: count, start_sector: 0, address: 0 }
    }

    #[test]
    fn a_report_is_as_long_as_its_zones_descriptors() {
        assert_eq!(Op::ReportZones.len(&descriptor(3)), 192);
        assert_eq!(Op::Read.len(&descriptor(3)), 1536);
        assert_eq!(Op::Flush.len(&descriptor(3)), 0);
    }

    #[test]
    fn each_operation_is_at_the_place_of_its_number() {
        assert!(Op::ALL.iter().enumerate().all(|(place, op)| *op as usize == place));
        let known = (0..=u8::MAX).filter_map(|number| Op::decode(number.into()));
        assert_eq!(known.collect::<std::collections::BTreeSet<_>>(), Op::ALL.into());
    }

    #[test]
    fn flags_do_not_change_the_operation() {
        assert_eq!(Op::decode(uapi::UBLK_IO_F_FUA | u32::from(uapi::UBLK_IO_OP_WRITE)), Some(Op::Write));
        assert_eq!(Op::decode(0xff), None);
    }
}
