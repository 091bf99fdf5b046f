// SPDX-License-Identifier: MIT OR Apache-2.0

//! Random numbers by a generator of our own, so that a seed gives the same numbers with each version of a library.

use std::time::Duration;

/// `SplitMix64`.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Creates the generator of one part of a run.
    pub fn new(seed: u64, part: u64) -> Self {
        let mut random = Random(seed ^ part.wrapping_mul(0xa076_1d64_78bd_642f));
        random.next();
        random
    }

    /// Returns the next 64 bits.
    #[allow(clippy::should_implement_trait, reason = "there is no end")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        // The bias is far below anything that matters here.
        self.next() % limit
    }

    /// Returns an index into something of that length.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// Returns true in `percent` of all cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Returns one of the choices.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// Returns one of the choices, by weight.
    pub fn weighted<T: Copy>(&mut self, choices: &[(u64, T)]) -> T {
        let mut at = self.below(choices.iter().map(|(weight, _)| weight).sum());
        for &(weight, choice) in choices {
            if at < weight {
                return choice;
            }
            at -= weight;
        }
        unreachable!("the weights add up to the total")
    }

    /// Returns a duration of at most `limit`.
    pub fn time(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64 + 1))
    }

    /// Shuffles the items.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.index(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_for_ever() {
        let mut random = Random::new(1, 2);
        let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(first, [17_100_143_027_588_883_870, 11_504_891_614_271_665_043, 12_325_519_385_653_524_904]);
    }

    #[test]
    fn parts_of_a_run_differ() {
        assert_ne!(Random::new(1, 2).next(), Random::new(1, 3).next());
        assert_ne!(Random::new(1, 2).next(), Random::new(2, 2).next());
    }

    #[test]
    fn choices_come_by_their_weight() {
        let mut random = Random::new(7, 0);
        let drawn: Vec<char> = (0..1000).map(|_| random.weighted(&[(9, 'h'), (1, 'l'), (0, 'n')])).collect();
        let heavy = drawn.iter().filter(|choice| **choice == 'h').count();
        assert!((850..950).contains(&heavy) && !drawn.contains(&'n'), "{heavy}");
    }
}
