// SPDX-License-Identifier: MIT OR Apache-2.0

//! The sequence of a job's requests, which is the same in every run.

use super::job::Job;

/// Seed of the offsets and of the data written.
pub(super) const SEED: u64 = 0x7562_6c6b;

/// One request; its size is the job's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) write: bool,
    /// Offset on the disk in bytes.
    pub(super) offset: u64,
}

/// Generator of a job's requests.
#[derive(Debug)]
pub(super) struct Requests {
    job: Job,
    /// How many requests fit on the disk.
    places: u64,
    /// Place of the next request, if offsets ascend.
    next: u64,
    random: fastrand::Rng,
}

impl Requests {
    /// Creates the generator for a disk of `disk_size` bytes; `None` if it is smaller than a request.
    pub(super) fn new(job: Job, disk_size: u64) -> Option<Self> {
        let places = disk_size / u64::from(job.size);
        (places > 0).then(|| Requests { job, places, next: 0, random: fastrand::Rng::with_seed(SEED) })
    }

    /// Returns the next request. Ascending offsets start again at the end of the disk.
    pub(super) fn next(&mut self) -> Request {
        let place = if self.job.pattern.is_random() {
            self.random.u64(..self.places)
        } else {
            let place = self.next;
            self.next = (place + 1) % self.places;
            place
        };
        let write = match self.job.pattern.read_percentage() {
            0 => true,
            100 => false,
            reads => self.random.u8(..100) >= reads,
        };
        Request { write, offset: place * u64::from(self.job.size) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn requests(job: &str, disk_size: u64, count: usize) -> Vec<Request> {
        let mut requests = Requests::new(job.parse().unwrap(), disk_size).unwrap();
        (0..count).map(|_| requests.next()).collect()
    }

    #[test]
    fn requests_are_on_the_disk_and_repeatable() {
        let first = requests("randread-4k-qd1", (1 << 20) + 100, 5000);
        assert_eq!(first, requests("randread-4k-qd1", (1 << 20) + 100, 5000));
        assert!(first.iter().all(|r| !r.write && r.offset % 4096 == 0 && r.offset + 4096 <= 1 << 20));
        let mut places: Vec<_> = first.iter().map(|r| r.offset / 4096).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 256, "every place of the disk is used");
    }

    #[test]
    fn ascending_offsets_start_again_at_the_end() {
        let offsets: Vec<_> = requests("write-4k-qd1", 3 * 4096, 5).iter().map(|r| r.offset / 4096).collect();
        assert_eq!(offsets, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn seven_of_ten_mixed_requests_are_reads() {
        let reads = requests("mixed-4k-qd1", 1 << 30, 10_000).iter().filter(|r| !r.write).count();
        assert!((6800..7200).contains(&reads), "{reads}");
    }

    #[test]
    fn a_disk_smaller_than_a_request_has_no_requests() {
        assert!(Requests::new("read-128k-qd1".parse().unwrap(), 4096).is_none());
    }
}
