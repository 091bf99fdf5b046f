// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that a thread sends back to ring threads together, with one wake-up of each, instead of one by one.
//!
//! If each were sent at once, a ring thread that wakes up would find one request, submit it and sleep again, and the client
//! would do the same: with one CPU for all of them, each request costs several context switches.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::inbox::{Inbox, Return, Returned};
use super::schedule::Pace;
use crate::fork::Maker;
use crate::memory::IoBuffer;
use crate::units::Tag;

thread_local! {
    static CORK: Cork = const {
        Cork { maker: Cell::new(None), depth: Cell::new(0), held: RefCell::new(Vec::new()), pace: RefCell::new(None) }
    };
}

/// What a thread holds back.
struct Cork {
    /// The process of the outermost call of [`corked`].
    maker: Cell<Option<Maker>>,
    /// Calls of [`corked`] that have not returned.
    depth: Cell<usize>,
    held: RefCell<Vec<(Arc<Inbox>, Returned)>>,
    /// Made with the first request.
    pace: RefCell<Option<Pace>>,
}

impl Cork {
    /// Returns whether what this thread ends is held back. In a forked child, calls of its parent do not count.
    fn is_in(&self) -> bool {
        self.depth.get() != 0 && self.maker.get().is_some_and(Maker::is_here)
    }

    fn enter(&self) -> Uncork {
        if !self.is_in() {
            self.forget();
            self.maker.set(Some(Maker::here()));
        }
        self.depth.set(self.depth.get() + 1);
        Uncork { maker: Maker::here() }
    }

    /// Leaves what a forked child has of its parent's alone: threads of that may have held locks.
    fn forget(&self) {
        std::mem::forget(self.held.take());
        self.depth.set(0);
    }

    /// Sends all that is held.
    fn send(&self) {
        // Sending drops requests of queues that were abandoned, and with them values of the user, which may send, too.
        let mut held = self.held.take();
        while !held.is_empty() {
            let inbox = held[0].0.clone();
            let others = held.extract_if(.., |(of, _)| !Arc::ptr_eq(of, &inbox)).collect();
            inbox.return_all(held.drain(..).map(|(_, returned)| returned));
            held = others;
        }
    }

    fn is_slow(&self) -> bool {
        self.pace.borrow_mut().get_or_insert_default().next()
    }
}

/// Returns a request to the thread of its queue: now, or with others if this thread is [`corked`].
pub(crate) fn send(inbox: &Arc<Inbox>, queue: u32, tag: Tag, buffer: Option<Arc<IoBuffer>>, reason: Return) {
    // The thread may be ending.
    if CORK.try_with(Cork::is_in).unwrap_or(false) {
        let returned = Returned { queue, tag, buffer, reason };
        CORK.with(|cork| cork.held.borrow_mut().push((inbox.clone(), returned)));
    } else {
        inbox.returned(queue, tag, buffer, reason);
    }
}

/// Ends a call of [`corked`], also if that panics.
struct Uncork {
    maker: Maker,
}

impl Drop for Uncork {
    fn drop(&mut self) {
        let _ = CORK.try_with(|cork| {
            if !self.maker.is_here() {
                // In a forked child, the end of its parent's call.
                if !cork.is_in() {
                    cork.forget();
                }
                return;
            }
            cork.depth.set(cork.depth.get() - 1);
            if cork.depth.get() != 0 {
                return;
            }
            cork.send();
            if let Some(pace) = cork.pace.borrow().as_ref() {
                pace.end(None);
            }
        });
    }
}

/// Runs `work`, and then sends the ends of all [detached](crate::Request::detach) requests that this thread has ended
/// meanwhile, with one wake-up of each ring thread.
///
/// For a loop that ends several requests without waiting. Until `work` returns, nothing ends for the clients, so it must not
/// wait for any of them; [`uncork_if_slow`] helps where some requests may take long. Calls may be nested: the outermost
/// one sends. A child that is forked off inside sends nothing of it, and may call this for its own requests.
pub fn corked<R>(work: impl FnOnce() -> R) -> R {
    let _uncork = CORK.with(Cork::enter);
    work()
}

/// Sends what this thread has held back if one of its last requests was slow, or if that has not been sent for some
/// milliseconds. To be called inside of [`corked`], each time before a request is begun.
pub fn uncork_if_slow() {
    CORK.with(|cork| {
        if cork.is_in() && cork.is_slow() {
            cork.send();
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::driver::Waker;
    use crate::request::Answer;

    /// An inbox, and how often its thread was woken.
    fn inbox() -> (Arc<Inbox>, Arc<WakeUps>) {
        let (inbox, wake_ups) = (Arc::new(Inbox::default()), Arc::new(WakeUps::default()));
        inbox.set_waker(wake_ups.clone());
        (inbox, wake_ups)
    }

    #[derive(Debug, Default)]
    struct WakeUps(Mutex<usize>);

    impl WakeUps {
        fn count(&self) -> usize {
            *self.0.lock().unwrap()
        }
    }

    impl Waker for WakeUps {
        fn wake(&self) {
            *self.0.lock().unwrap() += 1;
        }
    }

    fn end(inbox: &Arc<Inbox>, tag: u16) {
        send(inbox, 0, Tag(tag), None, Return::Ended(Answer::new(0)));
    }

    fn taken(inbox: &Inbox) -> Vec<u16> {
        let mut returned = Vec::new();
        assert!(inbox.take(&mut returned).is_empty());
        returned.into_iter().map(|returned| returned.tag.0).collect()
    }

    #[test]
    fn requests_are_sent_together_when_the_work_is_done() {
        let (inbox, wake_ups) = inbox();
        corked(|| {
            (0..3).for_each(|tag| end(&inbox, tag));
            corked(|| end(&inbox, 3));
            assert_eq!((taken(&inbox), wake_ups.count()), (vec![], 0));
        });
        assert_eq!((taken(&inbox), wake_ups.count()), (vec![0, 1, 2, 3], 1));
        end(&inbox, 4);
        assert_eq!((taken(&inbox), wake_ups.count()), (vec![4], 2));
    }

    #[test]
    fn each_thread_gets_its_own_requests() {
        let ((one, of_one), (other, of_other)) = (inbox(), inbox());
        corked(|| {
            for tag in 0..4 {
                end(if tag % 2 == 0 { &one } else { &other }, tag);
            }
        });
        assert_eq!((taken(&one), of_one.count()), (vec![0, 2], 1));
        assert_eq!((taken(&other), of_other.count()), (vec![1, 3], 1));
    }

    #[test]
    fn other_threads_send_at_once() {
        let (inbox, wake_ups) = inbox();
        corked(|| {
            end(&inbox, 0);
            std::thread::scope(|scope| drop(scope.spawn(|| end(&inbox, 1)).join()));
            assert_eq!((taken(&inbox), wake_ups.count()), (vec![1], 1));
        });
        assert_eq!((taken(&inbox), wake_ups.count()), (vec![0], 2));
    }

    #[test]
    fn a_panic_sends_what_was_ended_before() {
        let (inbox, _) = inbox();
        let work = || {
            corked(|| {
                end(&inbox, 0);
                panic!("a test");
            })
        };
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).is_err());
        assert_eq!(taken(&inbox), [0]);
        end(&inbox, 1);
        assert_eq!(taken(&inbox), [1]);
    }

    #[test]
    fn after_a_slow_request_the_others_are_sent_one_by_one() {
        let (inbox, _) = inbox();
        corked(|| {
            uncork_if_slow();
            end(&inbox, 0);
            // Longer than a request may take, and than a tick of the clock.
            std::thread::sleep(std::time::Duration::from_millis(50));
            uncork_if_slow();
            assert_eq!(taken(&inbox), [0]);
            end(&inbox, 1);
            uncork_if_slow();
            assert_eq!(taken(&inbox), [1]);
        });
        uncork_if_slow();
        assert!(!inbox.is_filled());
    }

    #[test]
    fn a_forked_child_sends_nothing() {
        use nix::sys::wait::{WaitStatus, waitpid};
        use nix::unistd::{ForkResult, fork};

        let (inbox, _) = inbox();
        let ends = |tag| {
            corked(|| {
                end(&inbox, tag);
                // SAFETY: the child only looks at memory that no other thread uses, and exits.
                match unsafe { fork() }.unwrap() {
                    ForkResult::Child => None,
                    ForkResult::Parent { child } => Some(child),
                }
            })
        };
        let Some(child) = ends(0) else {
            let sent = inbox.is_filled();
            // SAFETY: plain system call.
            unsafe { libc::_exit(i32::from(sent)) }
        };
        assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        assert_eq!(taken(&inbox), [0]);
    }

    /// It may stay in the call, and serve a device of its own there.
    #[test]
    fn a_child_that_was_forked_inside_sends_its_own_requests() {
        use nix::sys::wait::{WaitStatus, waitpid};
        use nix::unistd::{ForkResult, fork};

        let (parents, _) = inbox();
        let child = corked(|| {
            end(&parents, 0);
            // SAFETY: the child uses memory that no other thread uses, allocates, which the C library makes work, and exits.
            match unsafe { fork() }.unwrap() {
                ForkResult::Child => {
                    let (own, _) = inbox();
                    end(&own, 1);
                    let at_once = taken(&own) == [1];
                    corked(|| end(&own, 2));
                    let passed = at_once && taken(&own) == [2] && !parents.is_filled();
                    // SAFETY: plain system call.
                    unsafe { libc::_exit(i32::from(!passed)) }
                }
                ForkResult::Parent { child } => child,
            }
        });
        assert_eq!(waitpid(child, None).unwrap(), WaitStatus::Exited(child, 0));
        assert_eq!(taken(&parents), [0]);
    }
}
