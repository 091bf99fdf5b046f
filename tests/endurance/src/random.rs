// SPDX-License-Identifier: MIT OR Apache-2.0

//! The dice. An own small generator, so that a seed means the same plan for ever.

use std::time::Duration;

/// `SplitMix64`.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The dice of one part of a run.
    pub(crate) fn new(seed: u64, part: u64) -> Self {
        let mut random = Random(seed ^ part.wrapping_mul(0xa076_1d64_78bd_642f));
        random.next();
        random
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True in `percent` of all cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the choices, by weight.
    pub(crate) fn weighted<T: Copy>(&mut self, choices: &[(u64, T)]) -> T {
        let mut at = self.below(choices.iter().map(|(weight, _)| weight).sum());
        for &(weight, choice) in choices {
            if at < weight {
                return choice;
            }
            at -= weight;
        }
        unreachable!("the dice stay below the sum of the weights")
    }

    /// Some time below `limit`.
    pub(crate) fn time(&mut self, limit: Duration) -> Duration {
        Duration::from_micros(self.below(limit.as_micros() as u64 + 1))
    }

    /// Puts the items into some order.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last as u64 + 1) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_means_the_same_for_ever() {
        assert_eq!(Random::new(1, 2).next(), Random::new(1, 2).next());
        assert_ne!(Random::new(1, 2).next(), Random::new(1, 3).next());
        assert_ne!(Random::new(1, 2).next(), Random::new(2, 2).next());
    }

    #[test]
    fn weights_of_zero_are_never_drawn() {
        let mut random = Random::new(7, 0);
        assert!((0..100).all(|_| random.weighted(&[(0, 'a'), (3, 'b'), (0, 'c')]) == 'b'));
    }
}
