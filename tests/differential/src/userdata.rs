// SPDX-License-Identifier: MIT OR Apache-2.0

//! What is written into `user_data`: the only part of a completion that says what it is for.

/// What a command is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One tag: it stays until there is a request for it.
    Tag,
    /// Something that completes at once.
    Other,
    /// `FETCH_IO_CMDS`; the tag's place holds the buffer group.
    Multishot,
}

/// Kind, queue, tag and a number that distinguishes commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct UserData(pub(crate) u64);

impl UserData {
    /// Packs; of the number 24 bits are kept.
    pub(crate) fn new(kind: Kind, queue: u16, tag: u16, serial: u32) -> Self {
        let kind = match kind {
            Kind::Tag => 1,
            Kind::Other => 2,
            Kind::Multishot => 3,
        };
        UserData(kind << 56 | u64::from(queue) << 40 | u64::from(tag) << 24 | u64::from(serial & 0xff_ffff))
    }

    /// What the command is about.
    pub(crate) fn kind(self) -> Option<Kind> {
        match self.0 >> 56 {
            1 => Some(Kind::Tag),
            2 => Some(Kind::Other),
            3 => Some(Kind::Multishot),
            _ => None,
        }
    }

    /// The queue.
    pub(crate) fn queue(self) -> u16 {
        (self.0 >> 40) as u16
    }

    /// The tag, or the buffer group.
    pub(crate) fn tag(self) -> u16 {
        (self.0 >> 24) as u16
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_comes_out() {
        for kind in [Kind::Tag, Kind::Other, Kind::Multishot] {
            let packed = UserData::new(kind, 0xfffe, 0xfffd, 0x1ff_ffff);
            assert_eq!((packed.kind(), packed.queue(), packed.tag()), (Some(kind), 0xfffe, 0xfffd));
        }
        assert_eq!(UserData(0).kind(), None);
    }
}
