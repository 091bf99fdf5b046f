// SPDX-License-Identifier: MIT OR Apache-2.0

//! Data that shows where it belongs, and checksums of data.

/// Fills a buffer that stands for the bytes from `position` on.
pub(crate) fn fill(buffer: &mut [u8], position: u64, salt: u64) {
    for (at, word) in (position / 8..).zip(buffer.chunks_mut(8)) {
        let value = (at ^ salt.rotate_left(17)).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt;
        word.copy_from_slice(&value.to_ne_bytes()[..word.len()]);
    }
}

/// A checksum in which the order of the words counts.
pub(crate) fn checksum(buffer: &[u8]) -> u32 {
    let mut sum = 0xcbf2_9ce4_8422_2325u64;
    for word in buffer.chunks(8) {
        let mut bytes = [0; 8];
        bytes[..word.len()].copy_from_slice(word);
        sum = (sum ^ u64::from_ne_bytes(bytes)).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
    }
    (sum >> 32) as u32 ^ sum as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pattern_belongs_to_its_place() {
        let mut whole = [0; 64];
        fill(&mut whole, 512, 3);
        let mut part = [0; 32];
        fill(&mut part, 512 + 32, 3);
        assert_eq!(whole[32..], part);
        fill(&mut part, 512 + 32, 4);
        assert_ne!(whole[32..], part);
    }

    #[test]
    fn the_order_counts() {
        assert_ne!(checksum(&[1, 0, 0, 0, 0, 0, 0, 0, 2]), checksum(&[2, 0, 0, 0, 0, 0, 0, 0, 1]));
    }
}
