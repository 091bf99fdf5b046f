// SPDX-License-Identifier: MIT OR Apache-2.0

//! The state machine of a queue's tags, without any I/O.
//!
//! ```text
//!        fetch           completion 0          commit
//! Idle ────────▶ Armed ───────────────▶ Owned ────────▶ Armed ...
//!                  │ completion -ENODEV
//!                  ▼
//!                Gone
//! ```
//!
//! With batches no command waits in a tag: a tag is `Armed` from the moment it was prepared or committed,
//! until the driver delivers it or ends its deliveries.
//!
//! `Armed` tags are the driver's, `Owned` ones the server's. A queue is drained once every tag is
//! `Gone` (or was never fetched): only then may its memory go.

use crate::errno::Errno;
use crate::units::Tag;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum TagState {
    /// Never fetched.
    Idle,
    /// A FETCH or COMMIT_AND_FETCH is with the driver. `rejections` counts refused commits of the
    /// request that it would have finished.
    Armed { rejections: u8 },
    /// The server owns the request.
    Owned { rejections: u8 },
    /// The driver let go of the tag.
    Gone,
}

/// What the completion of a tag's command means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// There is a request; the server owns the tag now.
    Request,
    /// The driver takes the tag away: the device stops.
    Gone,
    /// A commit was refused and the request is still the server's: it must be committed again, as a
    /// failure.
    CommitRefused(Errno),
    /// The tag is lost: its FETCH was refused, or its commit was refused twice.
    Lost(Errno),
}

/// All tags of one queue.
#[derive(Debug)]
pub(crate) struct TagTable {
    states: Vec<TagState>,
    armed: u16,
    owned: u16,
}

impl TagTable {
    pub(crate) fn new(depth: u16) -> Self {
        TagTable { states: vec![TagState::Idle; usize::from(depth)], armed: 0, owned: 0 }
    }

    /// The tag is about to be fetched.
    pub(crate) fn fetch(&mut self, tag: Tag) {
        let state = &mut self.states[tag.index()];
        assert_eq!(*state, TagState::Idle, "tag {tag} fetched twice");
        *state = TagState::Armed { rejections: 0 };
        self.armed += 1;
    }

    /// The request of the tag is about to be committed.
    pub(crate) fn commit(&mut self, tag: Tag) {
        let state = &mut self.states[tag.index()];
        let TagState::Owned { rejections } = *state else { panic!("tag {tag} committed in state {state:?}") };
        *state = TagState::Armed { rejections };
        self.owned -= 1;
        self.armed += 1;
    }

    /// The tag's command completed with `result`.
    pub(crate) fn completed(&mut self, tag: Tag, result: i32, was_commit: bool) -> Event {
        let state = &mut self.states[tag.index()];
        let TagState::Armed { rejections } = *state else { panic!("tag {tag} completed in state {state:?}") };
        self.armed -= 1;
        match Errno::check(result) {
            Ok(_) => {
                *state = TagState::Owned { rejections: 0 };
                self.owned += 1;
                Event::Request
            }
            Err(errno) => self.refused(tag, errno, was_commit.then_some(rejections)),
        }
    }

    /// The driver has refused a fetch of the tag; `rejections` are those of the request that it would have finished.
    fn refused(&mut self, tag: Tag, errno: Errno, rejections: Option<u8>) -> Event {
        let state = &mut self.states[tag.index()];
        if errno == Errno::ENODEV {
            *state = TagState::Gone;
            Event::Gone
        } else if rejections == Some(0) {
            *state = TagState::Owned { rejections: 1 };
            self.owned += 1;
            Event::CommitRefused(errno)
        } else {
            *state = TagState::Gone;
            Event::Lost(errno)
        }
    }

    /// The driver delivered the tag in a batch; false if it had no right to.
    pub(crate) fn delivered(&mut self, tag: Tag) -> bool {
        let Some(state @ TagState::Armed { .. }) = self.states.get_mut(tag.index()) else { return false };
        *state = TagState::Owned { rejections: 0 };
        self.armed -= 1;
        self.owned += 1;
        true
    }

    /// The commit of the tag, one of a batch, was refused.
    pub(crate) fn commit_refused(&mut self, tag: Tag, errno: Errno) -> Event {
        self.completed(tag, -errno.get(), true)
    }

    /// The driver delivers no more: what it holds is gone.
    pub(crate) fn deliveries_ended(&mut self) {
        for state in self.states.iter_mut().filter(|state| matches!(state, TagState::Armed { .. })) {
            *state = TagState::Gone;
        }
        self.armed = 0;
    }

    /// Whether the driver holds the tag.
    pub(crate) fn is_armed(&self, tag: Tag) -> bool {
        matches!(self.states[tag.index()], TagState::Armed { .. })
    }

    /// Whether the server holds the tag.
    pub(crate) fn is_owned(&self, tag: Tag) -> bool {
        matches!(self.states[tag.index()], TagState::Owned { .. })
    }

    /// How many tags the driver holds.
    pub(crate) fn armed(&self) -> u16 {
        self.armed
    }

    /// How many requests the server holds.
    pub(crate) fn owned(&self) -> u16 {
        self.owned
    }

    /// Whether neither side holds anything: nothing refers to the queue's memory any more.
    pub(crate) fn drained(&self) -> bool {
        self.armed == 0 && self.owned == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ABORT: i32 = -Errno::ENODEV.get();

    fn fetched(depth: u16) -> TagTable {
        let mut table = TagTable::new(depth);
        (0..depth).for_each(|t| table.fetch(Tag(t)));
        table
    }

    #[test]
    fn a_tag_goes_from_fetch_to_request_to_commit_and_round_again() {
        let mut table = fetched(1);
        for round in 0..3 {
            assert_eq!(table.completed(Tag(0), 0, round > 0), Event::Request);
            assert_eq!((table.armed(), table.owned()), (0, 1));
            table.commit(Tag(0));
            assert_eq!((table.armed(), table.owned()), (1, 0));
        }
    }

    #[test]
    #[should_panic(expected = "committed in state")]
    fn a_second_commit_is_a_bug() {
        let mut table = fetched(1);
        table.completed(Tag(0), 0, false);
        table.commit(Tag(0));
        table.commit(Tag(0));
    }

    #[test]
    fn a_queue_is_drained_only_when_requests_are_finished_too() {
        let mut table = fetched(2);
        table.completed(Tag(0), 0, false);
        assert_eq!(table.completed(Tag(1), ABORT, false), Event::Gone);
        assert!(!table.drained());
        table.commit(Tag(0));
        assert!(!table.drained());
        table.completed(Tag(0), ABORT, true);
        assert!(table.drained());
    }

    #[test]
    fn a_refused_commit_is_tried_once_more_and_then_given_up() {
        let einval = -Errno::EINVAL.get();
        let mut table = fetched(1);
        table.completed(Tag(0), 0, false);
        table.commit(Tag(0));
        assert_eq!(table.completed(Tag(0), einval, true), Event::CommitRefused(Errno::EINVAL));
        table.commit(Tag(0));
        assert_eq!(table.completed(Tag(0), einval, true), Event::Lost(Errno::EINVAL));
        assert!(table.drained());
    }

    #[test]
    fn a_refusal_with_an_unknown_errno_is_no_request() {
        let unknown = Errno::new(503).unwrap();
        let mut table = fetched(1);
        table.completed(Tag(0), 0, false);
        table.commit(Tag(0));
        assert_eq!(table.commit_refused(Tag(0), unknown), Event::CommitRefused(unknown));
        table.commit(Tag(0));
        assert_eq!(table.completed(Tag(0), i32::MIN, true), Event::Lost(Errno::EIO));
    }

    #[test]
    fn a_refused_fetch_loses_the_tag_without_a_request() {
        let mut table = fetched(1);
        assert_eq!(table.completed(Tag(0), -Errno::EBUSY.get(), false), Event::Lost(Errno::EBUSY));
        assert!(table.drained());
    }

    #[test]
    fn a_batch_delivers_armed_tags_only() {
        let mut table = fetched(2);
        assert!(table.delivered(Tag(1)));
        assert!(!table.delivered(Tag(1)), "the server has it");
        assert!(!table.delivered(Tag(2)), "there is no such tag");
        assert_eq!((table.armed(), table.owned()), (1, 1));
    }

    #[test]
    fn the_end_of_deliveries_leaves_what_the_server_owns() {
        let mut table = fetched(3);
        table.delivered(Tag(0));
        table.deliveries_ended();
        assert_eq!((table.armed(), table.owned()), (0, 1));
        table.commit(Tag(0));
        table.deliveries_ended();
        assert!(table.drained());
    }

    proptest! {
        /// Whatever the driver answers, every tag is held by exactly one side, and the counts agree.
        #[test]
        fn counts_agree_with_states(depth in 1u16..40, steps in prop::collection::vec((0u16..40, 0u8..4), 0..400)) {
            let mut table = fetched(depth);
            let mut committed = vec![false; usize::from(depth)];
            for (tag, choice) in steps {
                let tag = Tag(tag % depth);
                match table.states[tag.index()] {
                    TagState::Armed { .. } => {
                        let result = [0, 0, ABORT, -22][usize::from(choice)];
                        table.completed(tag, result, committed[tag.index()]);
                    }
                    TagState::Owned { .. } => {
                        table.commit(tag);
                        committed[tag.index()] = true;
                    }
                    TagState::Idle | TagState::Gone => {}
                }
                let armed = table.states.iter().filter(|s| matches!(s, TagState::Armed { .. })).count();
                let owned = table.states.iter().filter(|s| matches!(s, TagState::Owned { .. })).count();
                prop_assert_eq!((armed, owned), (usize::from(table.armed()), usize::from(table.owned())));
                prop_assert_eq!(table.drained(), armed + owned == 0);
            }
        }
    }
}
