// SPDX-License-Identifier: MIT OR Apache-2.0

//! The states of the zones of a disk, without their data: write pointers, conditions, and the limits of open and active zones.
//! The rules are those of the zoned command sets (ZBC, ZAC, ZNS) as Linux expects them.

use crate::errno::Errno;

/// Zone types of `linux/blkzoned.h`.
const TYPE_CONVENTIONAL: u8 = 1;
const TYPE_SEQUENTIAL: u8 = 2;

/// Condition of a zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// A conventional zone, without a write pointer.
    Conventional,
    Empty,
    /// Opened by a write.
    ImplicitlyOpen,
    /// Opened by a command.
    ExplicitlyOpen,
    /// Partly written, and not open.
    Closed,
    Full,
}

impl Condition {
    fn number(self) -> u8 {
        match self {
            Condition::Conventional => 0,
            Condition::Empty => 1,
            Condition::ImplicitlyOpen => 2,
            Condition::ExplicitlyOpen => 3,
            Condition::Closed => 4,
            Condition::Full => 14,
        }
    }

    fn is_open(self) -> bool {
        matches!(self, Condition::ImplicitlyOpen | Condition::ExplicitlyOpen)
    }

    fn is_active(self) -> bool {
        self.is_open() || self == Condition::Closed
    }
}

/// One zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Zone {
    pub(super) condition: Condition,
    /// Write pointer: bytes written from the start of the zone.
    pub(super) written: u64,
    /// A write is in progress.
    busy: bool,
    /// Nothing was written since the server started, so a write may repeat one that the last server carried out, completely
    /// or in part, without acknowledging it.
    may_repeat: bool,
}

/// Beginning of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// In a conventional zone.
    Anywhere,
    AtPointer,
    /// This many bytes below the write pointer, with the end at or above it. Accepted only if the zone has these bytes
    /// already.
    BelowPointer(u64),
}

/// All zones of a disk.
#[derive(Debug)]
pub(super) struct Zones {
    size: u64,
    zones: Vec<Zone>,
    max_open: usize,
    max_active: usize,
    open: usize,
    active: usize,
    /// Where the search for a zone to close begins, so that roughly the oldest is closed.
    next_to_close: usize,
}

impl Zones {
    /// `written` has the write pointer of each sequential zone, and `None` for a conventional zone. 0 means no limit.
    pub(super) fn new(size: u64, written: &[Option<u64>], max_open: u32, max_active: u32) -> Self {
        let zone = |written: &Option<u64>| {
            let (condition, written) = match *written {
                None => (Condition::Conventional, 0),
                Some(0) => (Condition::Empty, 0),
                Some(bytes) if bytes >= size => (Condition::Full, size),
                Some(bytes) => (Condition::Closed, bytes),
            };
            Zone { condition, written, busy: false, may_repeat: written != 0 }
        };
        let zones: Vec<Zone> = written.iter().map(zone).collect();
        let active = zones.iter().filter(|zone| zone.condition.is_active()).count();
        let limit = |limit: u32| if limit == 0 { usize::MAX } else { limit as usize };
        let (max_open, max_active) = (limit(max_open), limit(max_active));
        Zones { size, zones, max_open, max_active, open: 0, active, next_to_close: 0 }
    }

    /// Returns the zone of an offset on the disk.
    pub(super) fn index(&self, offset: u64) -> usize {
        (offset / self.size) as usize
    }

    pub(super) fn len(&self) -> usize {
        self.zones.len()
    }

    fn start(&self, index: usize) -> u64 {
        index as u64 * self.size
    }

    fn set(&mut self, index: usize, condition: Condition) {
        let zone = &mut self.zones[index];
        self.open -= usize::from(zone.condition.is_open());
        self.active -= usize::from(zone.condition.is_active());
        zone.condition = condition;
        self.open += usize::from(condition.is_open());
        self.active += usize::from(condition.is_active());
    }

    /// Opens a zone, and closes another one if necessary.
    fn open_as(&mut self, index: usize, condition: Condition) -> Result<(), Errno> {
        let present = self.zones[index].condition;
        if !present.is_active() && self.active >= self.max_active {
            return Err(Errno::EOVERFLOW);
        }
        if !present.is_open() && self.open >= self.max_open {
            let count = self.zones.len();
            let candidates = (0..count).map(|n| (self.next_to_close + n) % count);
            let victim = candidates.into_iter().find(|n| self.zones[*n].condition == Condition::ImplicitlyOpen);
            // All open zones were opened explicitly.
            let victim = victim.ok_or(Errno::ETOOMANYREFS)?;
            self.next_to_close = (victim + 1) % count;
            self.close_written(victim);
        }
        self.set(index, condition);
        Ok(())
    }

    fn close_written(&mut self, index: usize) {
        let Zone { written, busy, .. } = self.zones[index];
        // A write in progress keeps its zone active.
        let condition = if written == 0 && !busy { Condition::Empty } else { Condition::Closed };
        self.set(index, condition);
    }

    /// Write pointer of a zone: bytes written from its start.
    pub(super) fn written_to(&self, index: usize) -> u64 {
        self.zones[index].written
    }

    /// Checks where a write of `len` bytes at `offset` on the disk begins. In a sequential zone that has to be the write
    /// pointer.
    ///
    /// The exception is a write that a dead server carried out and the kernel sends again: the write pointer is at its end,
    /// or, if it was interrupted, within it. There is at most one such write per zone, because the kernel sends one at a
    /// time.
    pub(super) fn place_write(&self, offset: u64, len: u64) -> Result<Start, Errno> {
        let index = self.index(offset);
        let zone = self.zones[index];
        let at = offset - self.start(index);
        if at + len > self.size {
            return Err(Errno::EIO);
        }
        match zone.condition {
            Condition::Conventional => Ok(Start::Anywhere),
            _ if zone.may_repeat && at < zone.written && at + len >= zone.written => {
                Ok(Start::BelowPointer(zone.written - at))
            }
            Condition::Full => Err(Errno::EIO),
            _ if at == zone.written => Ok(Start::AtPointer),
            _ => Err(Errno::EIO),
        }
    }

    /// Returns where on the disk an append to the zone that begins at `offset` is written.
    pub(super) fn place_append(&self, offset: u64, len: u64) -> Result<u64, Errno> {
        let index = self.index(offset);
        let zone = self.zones[index];
        let sequential = !matches!(zone.condition, Condition::Conventional | Condition::Full);
        if !sequential || zone.written + len > self.size {
            return Err(Errno::EIO);
        }
        Ok(self.start(index) + zone.written)
    }

    /// Opens a sequential zone for a write. To be followed by [`end_write`](Zones::end_write).
    pub(super) fn begin_write(&mut self, index: usize) -> Result<(), Errno> {
        let condition = self.zones[index].condition;
        // A full zone only receives a repeated write.
        if !condition.is_open() && condition != Condition::Full {
            self.open_as(index, Condition::ImplicitlyOpen)?;
        }
        self.zones[index].busy = true;
        Ok(())
    }

    /// Moves the write pointer to `written`, the end of the write. `None` if the write failed.
    pub(super) fn end_write(&mut self, index: usize, written: Option<u64>) {
        let zone = &mut self.zones[index];
        zone.busy = false;
        if let Some(written) = written {
            zone.written = written;
            zone.may_repeat = false;
            if written == self.size {
                self.set(index, Condition::Full);
            }
        } else if zone.written == 0 && zone.condition != Condition::ExplicitlyOpen {
            self.set(index, Condition::Empty);
        }
    }

    /// Returns the zone that begins at `offset`, if it is sequential.
    pub(super) fn sequential(&self, offset: u64) -> Result<usize, Errno> {
        let index = self.index(offset);
        if self.zones[index].condition == Condition::Conventional { Err(Errno::EIO) } else { Ok(index) }
    }

    pub(super) fn open(&mut self, offset: u64) -> Result<(), Errno> {
        let index = self.sequential(offset)?;
        match self.zones[index].condition {
            Condition::Full => Err(Errno::EIO),
            Condition::ExplicitlyOpen => Ok(()),
            _ => self.open_as(index, Condition::ExplicitlyOpen),
        }
    }

    pub(super) fn close(&mut self, offset: u64) -> Result<(), Errno> {
        let index = self.sequential(offset)?;
        match self.zones[index].condition {
            Condition::Full => Err(Errno::EIO),
            // Also an empty zone: the last server may have had it open.
            _ => {
                self.close_written(index);
                Ok(())
            }
        }
    }

    /// Makes a sequential zone full.
    pub(super) fn finish(&mut self, index: usize) {
        self.set(index, Condition::Full);
        self.zones[index].written = self.size;
        self.zones[index].may_repeat = false;
    }

    /// Makes a sequential zone empty.
    pub(super) fn reset(&mut self, index: usize) {
        self.set(index, Condition::Empty);
        self.zones[index].written = 0;
        self.zones[index].may_repeat = false;
    }

    /// Returns the sequential zones that are not empty.
    pub(super) fn written(&self) -> Vec<usize> {
        let written =
            |index: &usize| !matches!(self.zones[*index].condition, Condition::Conventional | Condition::Empty);
        (0..self.zones.len()).filter(written).collect()
    }

    /// Returns a zone as a `struct blk_zone`, in sectors.
    pub(super) fn describe(&self, index: usize) -> [u8; 64] {
        let zone = self.zones[index];
        let (start, sectors) = (self.start(index) >> 9, self.size >> 9);
        let conventional = zone.condition == Condition::Conventional;
        let pointer = if conventional { 0 } else { start + (zone.written >> 9) };
        let mut bytes = [0; 64];
        bytes[0..8].copy_from_slice(&start.to_ne_bytes());
        bytes[8..16].copy_from_slice(&sectors.to_ne_bytes());
        bytes[16..24].copy_from_slice(&pointer.to_ne_bytes());
        bytes[24] = if conventional { TYPE_CONVENTIONAL } else { TYPE_SEQUENTIAL };
        bytes[25] = zone.condition.number();
        bytes[32..40].copy_from_slice(&sectors.to_ne_bytes());
        bytes
    }

    #[cfg(test)]
    fn conditions(&self) -> Vec<Condition> {
        self.zones.iter().map(|zone| zone.condition).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::Condition::*;
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;

    /// What the target does for a write.
    impl Zones {
        fn write(&mut self, offset: u64, len: u64) -> Result<bool, Errno> {
            let index = self.index(offset);
            if self.place_write(offset, len)? == Start::Anywhere {
                return Ok(false);
            }
            self.begin_write(index)?;
            self.end_write(index, Some(offset + len - self.start(index)));
            Ok(true)
        }

        fn append(&mut self, offset: u64, len: u64) -> Result<u64, Errno> {
            let landed = self.place_append(offset, len)?;
            self.write(landed, len).map(|_| landed)
        }
    }

    /// One conventional zone and five sequential ones.
    fn zones(max_open: u32, max_active: u32) -> Zones {
        Zones::new(SIZE, &[None, Some(0), Some(0), Some(0), Some(0), Some(0)], max_open, max_active)
    }

    #[test]
    fn a_write_has_to_begin_at_the_write_pointer() {
        let mut zones = zones(0, 0);
        assert_eq!(zones.write(SIZE + 4096, 4096), Err(Errno::EIO));
        assert_eq!(zones.write(SIZE, 4096), Ok(true));
        assert_eq!(zones.write(SIZE, 4096), Err(Errno::EIO));
        assert_eq!(zones.write(SIZE + 4096, SIZE), Err(Errno::EIO), "it would reach into the next zone");
        assert_eq!(zones.write(SIZE + 4096, SIZE - 4096), Ok(true));
        assert_eq!(zones.conditions()[1], Full);
        assert_eq!(zones.write(4096, 4096), Ok(false), "conventional zones take anything");
    }

    #[test]
    fn an_append_returns_its_offset() {
        let mut zones = zones(0, 0);
        assert_eq!(zones.append(2 * SIZE, 512), Ok(2 * SIZE));
        assert_eq!(zones.append(2 * SIZE, 512), Ok(2 * SIZE + 512));
        assert_eq!(zones.append(2 * SIZE, SIZE), Err(Errno::EIO));
        assert_eq!(zones.append(0, 512), Err(Errno::EIO), "there is no write pointer");
    }

    #[test]
    fn beyond_the_limit_an_implicitly_open_zone_is_closed() {
        let mut zones = zones(2, 0);
        for n in 1..=3 {
            zones.write(n * SIZE, 512).unwrap();
        }
        assert_eq!(zones.conditions()[1..4], [Closed, ImplicitlyOpen, ImplicitlyOpen]);
    }

    #[test]
    fn explicitly_open_zones_are_not_closed_for_others() {
        let mut zones = zones(2, 0);
        zones.open(SIZE).unwrap();
        zones.open(2 * SIZE).unwrap();
        assert_eq!(zones.open(3 * SIZE), Err(Errno::ETOOMANYREFS));
        assert_eq!(zones.write(3 * SIZE, 512), Err(Errno::ETOOMANYREFS));
        zones.close(SIZE).unwrap();
        assert_eq!(zones.conditions()[1], Empty, "nothing was written");
        zones.write(3 * SIZE, 512).unwrap();
    }

    #[test]
    fn active_zones_are_limited() {
        let mut zones = zones(0, 2);
        zones.write(SIZE, 512).unwrap();
        zones.write(2 * SIZE, 512).unwrap();
        zones.close(SIZE).unwrap();
        assert_eq!(zones.write(3 * SIZE, 512), Err(Errno::EOVERFLOW));
        zones.finish(2);
        zones.write(3 * SIZE, 512).unwrap();
        zones.reset(1);
        zones.write(4 * SIZE, 512).unwrap();
    }

    #[test]
    fn zones_with_data_are_closed_or_full_at_first() {
        let zones = Zones::new(SIZE, &[Some(0), Some(512), Some(SIZE)], 0, 0);
        assert_eq!(zones.conditions(), [Empty, Closed, Full]);
        assert_eq!(zones.written(), [1, 2]);
    }

    #[test]
    fn a_failed_write_leaves_its_zone_unchanged() {
        let mut zones = zones(1, 1);
        zones.begin_write(1).unwrap();
        assert_eq!(zones.write(2 * SIZE, 512), Err(Errno::EOVERFLOW), "its zone is active already");
        zones.close(SIZE).unwrap();
        assert_eq!(zones.conditions()[1], Closed, "its zone stays active");
        zones.end_write(1, None);
        assert_eq!((zones.conditions()[1], zones.written_to(1)), (Empty, 0));
        zones.write(2 * SIZE, 512).unwrap();
        zones.begin_write(2).unwrap();
        zones.end_write(2, None);
        assert_eq!((zones.conditions()[2], zones.written_to(2)), (ImplicitlyOpen, 512));
    }

    #[test]
    fn a_new_server_accepts_the_last_write_once_more() {
        let new = || Zones::new(SIZE, &[Some(8192), Some(SIZE), Some(0)], 0, 0);
        let mut zones = new();
        assert_eq!(zones.place_write(4096, 4096), Ok(Start::BelowPointer(4096)), "carried out");
        assert_eq!(zones.place_write(4096, 8192), Ok(Start::BelowPointer(4096)), "interrupted");
        assert_eq!(zones.place_write(8192, 4096), Ok(Start::AtPointer), "not begun");
        assert_eq!(zones.place_write(0, 4096), Err(Errno::EIO), "not the last write");
        assert_eq!(zones.place_write(12288, 4096), Err(Errno::EIO));
        assert_eq!(zones.write(4096, 8192), Ok(true));
        assert_eq!((zones.written_to(0), zones.conditions()[0]), (12288, ImplicitlyOpen));
        assert_eq!(zones.place_write(8192, 4096), Err(Errno::EIO));
        // The write that filled the zone.
        assert_eq!(zones.write(2 * SIZE - 4096, 4096), Ok(true));
        assert_eq!((zones.written_to(1), zones.conditions()[1]), (SIZE, Full));
        assert_eq!(zones.write(2 * SIZE - 4096, 4096), Err(Errno::EIO));
        let mut zones = new();
        zones.append(0, 4096).unwrap();
        assert_eq!(zones.write(8192, 4096), Err(Errno::EIO));
    }

    #[test]
    fn a_description_has_the_layout_of_blk_zone() {
        let mut zones = zones(0, 0);
        zones.write(SIZE, 1536).unwrap();
        let bytes = zones.describe(1);
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((number(0), number(8), number(16), number(32)), (2048, 2048, 2051, 2048));
        assert_eq!((bytes[24], bytes[25]), (2, 2));
        assert_eq!((zones.describe(0)[24], zones.describe(0)[25]), (1, 0));
    }

    proptest! {
        /// After any sequence of commands, limits hold and counts agree with conditions.
        #[test]
        fn limits_hold(steps in prop::collection::vec((0u8..8, 0u64..6, 1u64..2049), 1..200)) {
            let mut zones = zones(2, 3);
            for (what, zone, sectors) in steps {
                let offset = zone * SIZE;
                let _ = match what {
                    // The target locks a zone while it writes.
                    0 | 1 | 4..=6 if zones.zones[zone as usize].busy => Ok(()),
                    0 => zones.append(offset, sectors * 512).map(drop),
                    1 => {
                        // At the write pointer, or at the start of a full zone.
                        let at = offset + zones.zones[zone as usize].written % SIZE;
                        zones.write(at, (sectors * 512).min(SIZE)).map(drop)
                    }
                    2 => zones.open(offset),
                    3 => zones.close(offset),
                    4 => zones.sequential(offset).map(|index| zones.finish(index)),
                    5 => zones.sequential(offset).map(|index| zones.reset(index)),
                    // A write that ends with the next one.
                    6 => zones.place_append(offset, 512).and_then(|_| zones.begin_write(zone as usize)),
                    _ => {
                        if zones.zones[zone as usize].busy {
                            zones.end_write(zone as usize, None);
                        }
                        Ok(())
                    }
                };
                let open = zones.conditions().iter().filter(|c| c.is_open()).count();
                let active = zones.conditions().iter().filter(|c| c.is_active()).count();
                prop_assert_eq!((open, active), (zones.open, zones.active));
                prop_assert!(open <= 2 && active <= 3);
                prop_assert!(zones.zones.iter().all(|zone| zone.written <= SIZE));
            }
        }
    }
}
