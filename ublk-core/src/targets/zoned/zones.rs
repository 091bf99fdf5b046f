// SPDX-License-Identifier: MIT OR Apache-2.0

//! The states of a disk's zones, without any data: write pointers, conditions, and the limits of open and
//! active zones. The rules are those of the zoned command sets (ZBC, ZAC, ZNS) as Linux expects them.

use nix::errno::Errno;

/// Numbers of `linux/blkzoned.h`.
const TYPE_CONVENTIONAL: u8 = 1;
const TYPE_SEQUENTIAL: u8 = 2;

/// What a zone is ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// It has no write pointer: anything can be written anywhere.
    Conventional,
    Empty,
    /// Opened by a write.
    ImplicitlyOpen,
    /// Opened by a command.
    ExplicitlyOpen,
    /// Written to, and not open.
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
    /// Bytes written from its beginning.
    pub(super) written: u64,
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
    /// Where the search for a zone to close begins: the oldest first, roughly.
    next_to_close: usize,
}

impl Zones {
    /// `written` holds what is in each sequential zone already; `None` makes a zone conventional. A limit of 0
    /// is none.
    pub(super) fn new(size: u64, written: &[Option<u64>], max_open: u32, max_active: u32) -> Self {
        let zone = |written: &Option<u64>| match *written {
            None => Zone { condition: Condition::Conventional, written: 0 },
            Some(0) => Zone { condition: Condition::Empty, written: 0 },
            Some(bytes) if bytes >= size => Zone { condition: Condition::Full, written: size },
            Some(bytes) => Zone { condition: Condition::Closed, written: bytes },
        };
        let zones: Vec<Zone> = written.iter().map(zone).collect();
        let active = zones.iter().filter(|zone| zone.condition.is_active()).count();
        let limit = |limit: u32| if limit == 0 { usize::MAX } else { limit as usize };
        let (max_open, max_active) = (limit(max_open), limit(max_active));
        Zones { size, zones, max_open, max_active, open: 0, active, next_to_close: 0 }
    }

    /// The zone that holds a byte of the disk.
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

    /// Makes a zone open, at the cost of another one if need be.
    fn open_as(&mut self, index: usize, condition: Condition) -> Result<(), Errno> {
        let present = self.zones[index].condition;
        if !present.is_active() && self.active >= self.max_active {
            return Err(Errno::EOVERFLOW);
        }
        if !present.is_open() && self.open >= self.max_open {
            let count = self.zones.len();
            let candidates = (0..count).map(|n| (self.next_to_close + n) % count);
            let victim = candidates.into_iter().find(|n| self.zones[*n].condition == Condition::ImplicitlyOpen);
            // All open ones were opened by command.
            let victim = victim.ok_or(Errno::ETOOMANYREFS)?;
            self.next_to_close = (victim + 1) % count;
            self.close_written(victim);
        }
        self.set(index, condition);
        Ok(())
    }

    fn close_written(&mut self, index: usize) {
        let condition = if self.zones[index].written == 0 { Condition::Empty } else { Condition::Closed };
        self.set(index, condition);
    }

    /// Takes room for a write of `len` bytes at `offset` on the disk. It has to begin at the zone's write
    /// pointer, which moves behind it, and to fit. False for a conventional zone, which has none.
    pub(super) fn write(&mut self, offset: u64, len: u64) -> Result<bool, Errno> {
        let index = self.index(offset);
        let (start, zone) = (self.start(index), self.zones[index]);
        if zone.condition == Condition::Conventional {
            return if self.index(offset + len - 1) == index { Ok(false) } else { Err(Errno::EIO) };
        }
        if zone.condition == Condition::Full || offset != start + zone.written || zone.written + len > self.size {
            return Err(Errno::EIO);
        }
        self.advance(index, len)?;
        Ok(true)
    }

    /// Takes room at the write pointer of the zone that begins at `offset`; says where that is.
    pub(super) fn append(&mut self, offset: u64, len: u64) -> Result<u64, Errno> {
        let index = self.index(offset);
        let zone = self.zones[index];
        let sequential = !matches!(zone.condition, Condition::Conventional | Condition::Full);
        if !sequential || zone.written + len > self.size {
            return Err(Errno::EIO);
        }
        self.advance(index, len)?;
        Ok(self.start(index) + zone.written)
    }

    fn advance(&mut self, index: usize, len: u64) -> Result<(), Errno> {
        if !self.zones[index].condition.is_open() {
            self.open_as(index, Condition::ImplicitlyOpen)?;
        }
        self.zones[index].written += len;
        if self.zones[index].written == self.size {
            self.set(index, Condition::Full);
        }
        Ok(())
    }

    fn sequential(&self, offset: u64) -> Result<usize, Errno> {
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
            Condition::Empty | Condition::Full => Err(Errno::EIO),
            _ => {
                self.close_written(index);
                Ok(())
            }
        }
    }

    /// Makes a zone full.
    pub(super) fn finish(&mut self, offset: u64) -> Result<usize, Errno> {
        let index = self.sequential(offset)?;
        self.zones[index].written = self.size;
        self.set(index, Condition::Full);
        Ok(index)
    }

    /// Makes a zone empty.
    pub(super) fn reset(&mut self, offset: u64) -> Result<usize, Errno> {
        let index = self.sequential(offset)?;
        self.zones[index].written = 0;
        self.set(index, Condition::Empty);
        Ok(index)
    }

    /// The sequential zones that are not empty.
    pub(super) fn written(&self) -> Vec<usize> {
        let written =
            |index: &usize| !matches!(self.zones[*index].condition, Condition::Conventional | Condition::Empty);
        (0..self.zones.len()).filter(written).collect()
    }

    /// A zone as a `struct blk_zone`, in sectors.
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

    /// One conventional zone and five sequential ones.
    fn zones(max_open: u32, max_active: u32) -> Zones {
        Zones::new(SIZE, &[None, Some(0), Some(0), Some(0), Some(0), Some(0)], max_open, max_active)
    }

    #[test]
    fn a_write_belongs_at_the_write_pointer_and_inside_its_zone() {
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
    fn an_append_says_where_it_landed() {
        let mut zones = zones(0, 0);
        assert_eq!(zones.append(2 * SIZE, 512), Ok(2 * SIZE));
        assert_eq!(zones.append(2 * SIZE, 512), Ok(2 * SIZE + 512));
        assert_eq!(zones.append(2 * SIZE, SIZE), Err(Errno::EIO));
        assert_eq!(zones.append(0, 512), Err(Errno::EIO), "there is no write pointer");
    }

    #[test]
    fn a_zone_too_many_closes_one_that_a_write_had_opened() {
        let mut zones = zones(2, 0);
        for n in 1..=3 {
            zones.write(n * SIZE, 512).unwrap();
        }
        assert_eq!(zones.conditions()[1..4], [Closed, ImplicitlyOpen, ImplicitlyOpen]);
    }

    #[test]
    fn zones_that_were_opened_by_command_are_not_closed_for_others() {
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
    fn active_zones_are_limited_too() {
        let mut zones = zones(0, 2);
        zones.write(SIZE, 512).unwrap();
        zones.write(2 * SIZE, 512).unwrap();
        zones.close(SIZE).unwrap();
        assert_eq!(zones.write(3 * SIZE, 512), Err(Errno::EOVERFLOW));
        zones.finish(2 * SIZE).unwrap();
        zones.write(3 * SIZE, 512).unwrap();
        zones.reset(SIZE).unwrap();
        zones.write(4 * SIZE, 512).unwrap();
    }

    #[test]
    fn what_was_written_before_is_closed_or_full() {
        let zones = Zones::new(SIZE, &[Some(0), Some(512), Some(SIZE)], 0, 0);
        assert_eq!(zones.conditions(), [Empty, Closed, Full]);
        assert_eq!(zones.written(), [1, 2]);
    }

    #[test]
    fn a_description_is_laid_out_as_the_kernel_reads_it() {
        let mut zones = zones(0, 0);
        zones.write(SIZE, 1536).unwrap();
        let bytes = zones.describe(1);
        let number = |at: usize| u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((number(0), number(8), number(16), number(32)), (2048, 2048, 2051, 2048));
        assert_eq!((bytes[24], bytes[25]), (2, 2));
        assert_eq!((zones.describe(0)[24], zones.describe(0)[25]), (1, 0));
    }

    proptest! {
        /// Whatever is asked for, limits hold and counts agree with conditions.
        #[test]
        fn limits_hold(steps in prop::collection::vec((0u8..6, 0u64..6, 1u64..2049), 1..200)) {
            let mut zones = zones(2, 3);
            for (what, zone, sectors) in steps {
                let offset = zone * SIZE;
                let _ = match what {
                    0 => zones.append(offset, sectors * 512).map(drop),
                    1 => {
                        // At the write pointer, or at the beginning of a zone that is full.
                        let at = offset + zones.zones[zone as usize].written % SIZE;
                        zones.write(at, (sectors * 512).min(SIZE)).map(drop)
                    }
                    2 => zones.open(offset),
                    3 => zones.close(offset),
                    4 => zones.finish(offset).map(drop),
                    _ => zones.reset(offset).map(drop),
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
