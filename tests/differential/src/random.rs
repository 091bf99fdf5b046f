// SPDX-License-Identifier: MIT OR Apache-2.0

//! The generator's dice. An own small generator, so that a seed means the same sequence for ever.

/// `SplitMix64`.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// The dice of one sequence of a run.
    pub(crate) fn new(seed: u64, sequence: u64) -> Self {
        let mut random = Random(seed ^ sequence.wrapping_mul(0xa076_1d64_78bd_642f));
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
        // The bias is far below anything that matters here.
        self.next() % limit
    }

    /// An index into something of that length.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// True in `percent` of all cases.
    pub(crate) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of the choices.
    pub(crate) fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// One of the choices, by weight.
    pub(crate) fn weighted<T: Copy>(&mut self, choices: &[(u64, T)]) -> T {
        let total = choices.iter().map(|(weight, _)| weight).sum();
        let mut at = self.below(total);
        for &(weight, choice) in choices {
            if at < weight {
                return choice;
            }
            at -= weight;
        }
        unreachable!("the weights add up to the total")
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
    fn sequences_differ() {
        assert_ne!(Random::new(1, 2).next(), Random::new(1, 3).next());
        assert_ne!(Random::new(1, 2).next(), Random::new(2, 2).next());
    }

    #[test]
    fn weights_count() {
        let mut random = Random::new(7, 0);
        let mut heavy = 0;
        for _ in 0..1000 {
            match random.weighted(&[(9, 'h'), (1, 'l'), (0, 'n')]) {
                'h' => heavy += 1,
                'l' => {}
                _ => panic!("a weight of nothing was picked"),
            }
        }
        assert!((850..950).contains(&heavy), "{heavy}");
    }
}
