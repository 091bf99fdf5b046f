// SPDX-License-Identifier: MIT OR Apache-2.0

//! `user_data` of a submission: what it was, for which queue of the thread, and for which tag.

use crate::units::Tag;

/// What a completion's `user_data` says about its submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cookie {
    pub(super) kind: Kind,
    /// The queue's index among those of its thread.
    pub(super) queue: u32,
    /// The tag; the array's number for [`Kind::CommitBatch`].
    pub(super) tag: Tag,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Fetch = 1,
    Commit,
    GetData,
    Prepare,
    FetchBatch,
    CommitBatch,
    /// A step of a request that the engine carries out on a file.
    Transfer,
    /// A request's pages leave the ring's table.
    Unregister,
}

impl Kind {
    const ALL: [Kind; 8] = [
        Kind::Fetch,
        Kind::Commit,
        Kind::GetData,
        Kind::Prepare,
        Kind::FetchBatch,
        Kind::CommitBatch,
        Kind::Transfer,
        Kind::Unregister,
    ];
}

impl Cookie {
    pub(super) fn encode(self) -> u64 {
        (self.kind as u64) << 56 | u64::from(self.queue) << 16 | u64::from(self.tag.0)
    }

    pub(super) fn decode(user_data: u64) -> Option<Self> {
        let kind = *Kind::ALL.get(((user_data >> 56) as usize).checked_sub(1)?)?;
        Some(Cookie { kind, queue: (user_data >> 16) as u32, tag: Tag(user_data as u16) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cookie_survives_its_encoding() {
        for kind in Kind::ALL {
            let cookie = Cookie { kind, queue: u32::MAX, tag: Tag(4095) };
            assert_eq!(Cookie::decode(cookie.encode()), Some(cookie));
        }
        assert_eq!(Cookie::decode(u64::MAX), None);
        assert_eq!(Cookie::decode(0), None);
    }
}
