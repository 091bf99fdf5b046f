// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which bytes of a disk are stored where in which file, for targets that forward requests to files.
//!
//! An [`ExtentMap`] keeps extents of reads and writes apart (the blocks of a snapshot are read from one file and
//! written to another), splits requests among them, and counts requests in flight. Extents are invalidated in
//! two steps:
//!
//! 1. Once [`invalidate`](ExtentMap::invalidate) has returned, no later request is admitted to an extent that
//!    was found before, in the map or not.
//! 2. Once [`drain`](ExtentMap::drain) has returned true after that, no request is in flight on such an extent either:
//!    the files' space can be used for something else.

pub mod files;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::request::{FilePiece, FileRange, Pieces};

/// A range of a disk that is stored in a file.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Its first byte on the disk.
    pub start: u64,
    /// Its length in bytes.
    pub len: u64,
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Its first byte in the file.
    pub offset: u64,
}

impl Extent {
    /// Returns the first byte after it.
    pub fn end(&self) -> u64 {
        self.start.saturating_add(self.len)
    }

    /// Returns the part between two bytes of the disk, which must both be in it.
    pub fn part(&self, from: u64, to: u64) -> Extent {
        Extent { start: from, len: to - from, file: self.file.clone(), offset: self.offset + (from - self.start) }
    }

    /// The piece of a file that stores `len` bytes of the disk, all of them in this extent.
    fn piece(&self, from: u64, len: u64) -> FilePiece {
        FilePiece { file: FileRange::new(&self.file, self.offset + (from - self.start)), len }
    }
}

/// The kind of requests that an extent is valid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Reads.
    Read,
    /// Writes.
    Write,
}

/// A moment in the life of an [`ExtentMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Moment(u64);

/// Longer than any process runs.
const FOR_EVER: Duration = Duration::from_secs(1 << 32);

/// Invalidations that are remembered. An extent that was found before the oldest one counts as stale.
const REMEMBERED: usize = 64;

/// The extents of a disk.
#[derive(Clone, Debug, Default)]
pub struct ExtentMap(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<MapState>,
    landed: Condvar,
    /// How many invalidations there have been; changed under the lock.
    moment: AtomicU64,
}

#[derive(Debug, Default)]
struct MapState {
    /// By their first byte; no two of them overlap.
    reads: BTreeMap<u64, Extent>,
    writes: BTreeMap<u64, Extent>,
    /// Ranges that were invalidated last, oldest first.
    invalidated: VecDeque<(u64, u64)>,
    /// Requests that are under way; places are used again.
    flights: Vec<Option<Route>>,
    /// How many there have been.
    taken_off: u64,
    free: Vec<usize>,
    /// A thread waits for flights to end.
    waiting: usize,
}

/// The extents of a request, in order.
#[derive(Debug)]
struct Cover {
    first: Extent,
    rest: Vec<Extent>,
}

impl Cover {
    fn into_pieces(self) -> Pieces {
        let piece = |extent: &Extent| extent.piece(extent.start, extent.len);
        Pieces::new(piece(&self.first), self.rest.iter().map(piece).collect())
    }
}

/// The range of a request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Route {
    start: u64,
    end: u64,
    /// Each has its own.
    number: u64,
}

impl MapState {
    fn map(&mut self, direction: Direction) -> &mut BTreeMap<u64, Extent> {
        match direction {
            Direction::Read => &mut self.reads,
            Direction::Write => &mut self.writes,
        }
    }

    #[inline]
    fn take_off(&mut self, start: u64, end: u64) -> usize {
        let place = self.free.pop().unwrap_or_else(|| {
            self.flights.push(None);
            self.flights.len() - 1
        });
        self.taken_off += 1;
        self.flights[place] = Some(Route { start, end, number: self.taken_off });
        place
    }

    /// Returns whether something in a range was invalidated since a moment.
    fn is_stale(&self, since: Moment, now: Moment, start: u64, end: u64) -> bool {
        let new = (now.0 - since.0) as usize;
        new > self.invalidated.len() || self.invalidated.iter().rev().take(new).any(|(s, e)| *s < end && start < *e)
    }
}

/// Removes a range from a map; the parts of extents outside of it stay.
fn cut(map: &mut BTreeMap<u64, Extent>, start: u64, end: u64) {
    let first = map.range(..start).next_back().filter(|(_, extent)| extent.end() > start).map(|(key, _)| *key);
    let keys: Vec<u64> = first.into_iter().chain(map.range(start..end).map(|(key, _)| *key)).collect();
    for key in keys {
        let Some(extent) = map.remove(&key) else { continue };
        if extent.start < start {
            map.insert(extent.start, extent.part(extent.start, start));
        }
        if extent.end() > end {
            map.insert(end, extent.part(end, extent.end()));
        }
    }
}

/// The extents that cover a range, cut to it; `None` if they do not.
fn cover(map: &BTreeMap<u64, Extent>, start: u64, end: u64) -> Option<Cover> {
    let part = |at: u64| {
        let (_, extent) = map.range(..=at).next_back().filter(|(_, extent)| extent.end() > at)?;
        Some(extent.part(at, extent.end().min(end)))
    };
    let mut found = Cover { first: part(start)?, rest: Vec::new() };
    let mut at = found.first.end();
    while at < end {
        let next = part(at)?;
        at = next.end();
        found.rest.push(next);
    }
    Some(found)
}

impl ExtentMap {
    /// A map without extents.
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, MapState> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps an extent for the requests that come, in place of what it overlaps; unless something in it was invalidated
    /// since `asked`, the [moment](ExtentMap::now) before its place was found out.
    pub fn insert(&self, direction: Direction, extent: Extent, asked: Moment) {
        let mut state = self.state();
        if extent.len == 0 || state.is_stale(asked, self.now(), extent.start, extent.end()) {
            return;
        }
        let map = state.map(direction);
        cut(map, extent.start, extent.end());
        map.insert(extent.start, extent);
    }

    /// The present moment.
    pub fn now(&self) -> Moment {
        Moment(self.0.moment.load(Ordering::Acquire))
    }

    /// Admits a request to the extents that are kept; `None` if they do not cover it.
    pub fn find(&self, direction: Direction, start: u64, len: u64) -> Option<(Pieces, Flight)> {
        let end = start.checked_add(len)?;
        let mut state = self.state();
        let map = state.map(direction);
        let (_, extent) = map.range(..=start).next_back()?;
        if end <= extent.end() {
            // The usual case: there is nothing to collect.
            let piece = extent.piece(start, len);
            let place = state.take_off(start, end);
            drop(state);
            return Some((piece.into(), Flight { shared: self.0.clone(), place }));
        }
        let pieces = cover(map, start, end)?.into_pieces();
        let place = state.take_off(start, end);
        drop(state);
        Some((pieces, Flight { shared: self.0.clone(), place }))
    }

    /// Admits a request to extents that were found out just now, which cover it; `None` if something in its range was
    /// invalidated since `asked`: they have to be looked up again.
    pub fn admit(&self, extents: Vec<Extent>, asked: Moment) -> Option<(Pieces, Flight)> {
        let mut extents = extents.into_iter();
        let first = extents.next()?;
        let cover = Cover { first, rest: extents.collect() };
        let (start, end) = (cover.first.start, cover.rest.last().unwrap_or(&cover.first).end());
        let mut state = self.state();
        if state.is_stale(asked, self.now(), start, end) {
            return None;
        }
        let pieces = cover.into_pieces();
        let place = state.take_off(start, end);
        drop(state);
        Some((pieces, Flight { shared: self.0.clone(), place }))
    }

    /// Takes extents back. Requests that were admitted before may still be under way.
    pub fn invalidate(&self, start: u64, len: u64) {
        let end = start.saturating_add(len);
        let mut state = self.state();
        cut(&mut state.reads, start, end);
        cut(&mut state.writes, start, end);
        self.0.moment.fetch_add(1, Ordering::Release);
        state.invalidated.push_back((start, end));
        if state.invalidated.len() > REMEMBERED {
            state.invalidated.pop_front();
        }
    }

    /// Waits until all requests in a range that are under way now have ended; false if that takes longer than `timeout`.
    ///
    /// Not to be called by a thread that serves queues: it would wait for its own requests.
    pub fn drain(&self, start: u64, len: u64, timeout: Duration) -> bool {
        let end = start.saturating_add(len);
        // A time that no clock reaches is a long one.
        let deadline = Instant::now().checked_add(timeout).unwrap_or_else(|| Instant::now() + FOR_EVER);
        let mut state = self.state();
        let overlaps = |route: &Route| route.start < end && start < route.end;
        let pending: Vec<(usize, Route)> = (state.flights.iter().enumerate())
            .filter_map(|(place, route)| Some((place, route.filter(overlaps)?)))
            .collect();
        state.waiting += 1;
        let landed = loop {
            if pending.iter().all(|(place, route)| state.flights[*place] != Some(*route)) {
                break true;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break false;
            }
            state = self.0.landed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        };
        state.waiting -= 1;
        landed
    }

    /// Returns how many extents are kept.
    pub fn len(&self) -> usize {
        let state = self.state();
        state.reads.len() + state.writes.len()
    }

    /// Returns whether no extent is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A request that is under way on extents. It is over when this is dropped.
#[derive(Debug)]
pub struct Flight {
    shared: Arc<Shared>,
    place: usize,
}

impl Drop for Flight {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.flights[self.place] = None;
        state.free.push(self.place);
        if state.waiting != 0 {
            self.shared.landed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd, RawFd};

    use proptest::prelude::*;

    use super::*;

    fn file() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/dev/null").unwrap().into())
    }

    fn extent(file: &Arc<OwnedFd>, start: u64, len: u64, offset: u64) -> Extent {
        Extent { start, len, file: file.clone(), offset }
    }

    fn pieces(found: Option<(Pieces, Flight)>) -> Option<Vec<(RawFd, u64, u64)>> {
        found.map(|(pieces, _)| pieces.iter().map(|p| (p.raw_fd(), p.file.offset, p.len)).collect())
    }

    #[test]
    fn a_request_is_divided_among_the_extents_that_cover_it() {
        let (map, a, b) = (ExtentMap::new(), file(), file());
        let (fa, fb) = (a.as_raw_fd(), b.as_raw_fd());
        map.insert(Direction::Read, extent(&a, 0, 100, 1000), map.now());
        map.insert(Direction::Read, extent(&b, 100, 50, 0), map.now());
        let find = |start, len| pieces(map.find(Direction::Read, start, len));
        assert_eq!(find(10, 20), Some(vec![(fa, 1010, 20)]));
        assert_eq!(find(90, 30), Some(vec![(fa, 1090, 10), (fb, 0, 20)]));
        assert_eq!(find(140, 20), None);
        assert_eq!(pieces(map.find(Direction::Write, 10, 20)), None);
    }

    #[test]
    fn what_is_invalidated_is_gone_and_what_lies_beside_it_stays() {
        let (map, a) = (ExtentMap::new(), file());
        let fd = a.as_raw_fd();
        for direction in [Direction::Read, Direction::Write] {
            map.insert(direction, extent(&a, 0, 100, 1000), map.now());
        }
        map.invalidate(40, 20);
        for direction in [Direction::Read, Direction::Write] {
            assert_eq!(pieces(map.find(direction, 30, 20)), None);
            assert_eq!(pieces(map.find(direction, 0, 40)), Some(vec![(fd, 1000, 40)]));
            assert_eq!(pieces(map.find(direction, 60, 40)), Some(vec![(fd, 1060, 40)]));
        }
        assert_eq!(map.len(), 4);
    }

    #[test]
    fn what_was_found_out_before_an_invalidation_is_neither_kept_nor_used_after_it() {
        let (map, a) = (ExtentMap::new(), file());
        let asked = map.now();
        map.invalidate(50, 10);
        map.insert(Direction::Read, extent(&a, 0, 100, 0), asked);
        assert!(map.is_empty());
        assert!(map.admit(vec![extent(&a, 55, 10, 0)], asked).is_none());
        // Elsewhere on the disk nothing has changed.
        assert!(map.admit(vec![extent(&a, 60, 10, 0)], asked).is_some());
        // Too long ago to be known.
        (0..=REMEMBERED).for_each(|_| map.invalidate(1000, 1));
        assert!(map.admit(vec![extent(&a, 60, 10, 0)], asked).is_none());
    }

    #[test]
    fn draining_may_take_any_time() {
        let map = ExtentMap::new();
        assert!(map.drain(0, 1, Duration::MAX));
    }

    #[test]
    fn draining_waits_for_what_is_under_way_in_the_range_and_nothing_else() {
        let (map, a) = (ExtentMap::new(), file());
        map.insert(Direction::Read, extent(&a, 0, 100, 0), map.now());
        let (_, inside) = map.find(Direction::Read, 40, 10).unwrap();
        let (_, outside) = map.find(Direction::Read, 60, 10).unwrap();
        map.invalidate(45, 1);
        assert!(!map.drain(45, 1, Duration::from_millis(5)));
        let waiter = {
            let map = map.clone();
            std::thread::spawn(move || map.drain(45, 1, Duration::from_secs(20)))
        };
        std::thread::sleep(Duration::from_millis(20));
        drop(inside);
        assert!(waiter.join().unwrap());
        drop(outside);
    }

    #[test]
    fn pieces_keep_their_files_open() {
        let (map, a) = (ExtentMap::new(), file());
        map.insert(Direction::Read, extent(&a, 0, 100, 0), map.now());
        let (pieces, _flight) = map.find(Direction::Read, 0, 10).unwrap();
        map.invalidate(0, 100);
        assert_eq!(Arc::strong_count(&a), 2);
        drop(pieces);
        assert_eq!(Arc::strong_count(&a), 1);
    }

    proptest! {
        #[test]
        fn any_history_agrees_with_a_byte_by_byte_model(
            steps in prop::collection::vec((any::<bool>(), 0u64..64, 1u64..32, 0u64..1000), 1..40),
            (start, len) in (0u64..64, 1u64..32),
        ) {
            let (map, a) = (ExtentMap::new(), file());
            let mut model = [None; 128];
            for (insert, at, count, offset) in steps {
                let range = at as usize..(at + count) as usize;
                if insert {
                    map.insert(Direction::Read, extent(&a, at, count, offset), map.now());
                    for (n, byte) in model[range].iter_mut().enumerate() {
                        *byte = Some(offset + n as u64);
                    }
                } else {
                    map.invalidate(at, count);
                    model[range].fill(None);
                }
            }
            let expected: Option<Vec<u64>> = model[start as usize..(start + len) as usize].iter().copied().collect();
            let found = pieces(map.find(Direction::Read, start, len));
            let found = found.map(|p| p.iter().flat_map(|(_, offset, len)| *offset..offset + len).collect::<Vec<_>>());
            prop_assert_eq!(found, expected);
        }
    }
}
