// SPDX-License-Identifier: MIT OR Apache-2.0

//! Forked children: they have copies of their parent's objects, but not the threads that use these.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use once_cell::race::OnceBox;

/// Number of forks between the program's first process and this one.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// The process that has made an object. Forked children have copies of it, in which locks may be held by threads that only the
/// parent has, and which refer to the parent's requests, descriptors and devices.
///
/// Not a process ID: a child in a PID namespace of its own may have the same one, as may a later descendant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Maker(u32);

impl Maker {
    /// Returns the calling process.
    pub(crate) fn here() -> Self {
        static COUNTING: Once = Once::new();
        COUNTING.call_once(|| {
            // SAFETY: the function only changes an atomic number. The C library forgets it if this library is unloaded. It
            // fails only for lack of memory.
            let failed = unsafe { libc::pthread_atfork(None, None, Some(count_fork)) };
            assert_eq!(failed, 0, "no memory for a fork handler");
        });
        Maker(FORKS.load(Ordering::Relaxed))
    }

    /// Returns whether the calling process is this one, and no forked child.
    pub(crate) fn is_here(self) -> bool {
        self.0 == FORKS.load(Ordering::Relaxed)
    }
}

impl Default for Maker {
    fn default() -> Self {
        Self::here()
    }
}

/// Runs in each forked child.
unsafe extern "C" fn count_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A value behind a lock, of which each process has its own: in a forked child it begins as the default.
///
/// The lock of the parent may be held for ever in the child, by a thread that the child does not have. The parent's value is
/// never dropped in the child, because what it refers to (threads, mapped memory, descriptors) is the parent's. So every fork
/// that is followed by a use leaks one value.
///
/// ```
/// static NAMES: ublk_core::PerProcess<Vec<String>> = ublk_core::PerProcess::new();
///
/// NAMES.lock().push("first".to_owned());
/// assert_eq!(NAMES.lock().len(), 1);
/// ```
#[derive(Debug)]
pub struct PerProcess<T>(OnceBox<Own<T>>);

/// The value of one process, and those of its forked children.
#[derive(Debug)]
struct Own<T> {
    maker: Maker,
    /// `None` only during the drop.
    value: Option<Mutex<T>>,
    /// That of the child that this process is; empty in the process that `maker` is.
    child: OnceBox<Own<T>>,
}

impl<T> PerProcess<T> {
    /// Creates a value that is made at its first use in each process.
    pub const fn new() -> Self {
        PerProcess(OnceBox::new())
    }
}

impl<T: Default> PerProcess<T> {
    /// Locks the calling process's value, which is made first if need be. A panic of another thread that had locked it is
    /// ignored.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        let mut place = &self.0;
        loop {
            // Two threads may both make one, of which one is dropped. No thread ever waits for another, which a fork may end.
            let own = place.get_or_init(Box::default);
            if let (true, Some(value)) = (own.maker.is_here(), &own.value) {
                return value.lock().unwrap_or_else(PoisonError::into_inner);
            }
            place = &own.child;
        }
    }
}

impl<T> Default for PerProcess<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Default> Default for Own<T> {
    fn default() -> Self {
        Own { maker: Maker::here(), value: Some(Mutex::default()), child: OnceBox::new() }
    }
}

impl<T> Drop for Own<T> {
    fn drop(&mut self) {
        if !self.maker.is_here() {
            std::mem::forget(self.value.take());
        }
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::{ForkResult, alarm, fork};

    use super::*;

    /// Runs a check in a forked child, which is killed after a minute.
    fn in_child(check: impl FnOnce() -> bool) -> WaitStatus {
        // SAFETY: the child only runs the check and exits; the checks make only small allocations, which the C library allows.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                alarm::set(60);
                let passed = check();
                // SAFETY: ends the process without running the parent's exit handlers.
                unsafe { libc::_exit(i32::from(!passed)) }
            }
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    fn passed(status: WaitStatus) -> bool {
        matches!(status, WaitStatus::Exited(_, 0))
    }

    #[test]
    fn a_forked_child_begins_anew_though_its_parent_holds_the_lock() {
        let value = PerProcess::<Vec<u8>>::new();
        let mut held = value.lock();
        held.push(1);
        let status = in_child(|| {
            let is_empty = value.lock().is_empty();
            value.lock().push(2);
            let grandchild = in_child(|| value.lock().is_empty());
            is_empty && passed(grandchild) && *value.lock() == [2]
        });
        assert!(passed(status), "{status:?}");
        assert_eq!(*held, [1]);
    }

    #[test]
    fn a_parents_value_is_not_dropped_in_a_child() {
        #[derive(Default)]
        struct Exits(bool);
        impl Drop for Exits {
            fn drop(&mut self) {
                if self.0 {
                    // SAFETY: ends the process, which is a forked child.
                    unsafe { libc::_exit(1) };
                }
            }
        }
        let mut value = Some(PerProcess::<Exits>::new());
        value.as_ref().unwrap().lock().0 = true;
        let status = in_child(|| {
            drop(value.take());
            true
        });
        value.unwrap().lock().0 = false;
        assert!(passed(status), "{status:?}");
    }

    #[test]
    fn a_panic_with_the_lock_held_leaves_it_usable() {
        let value = PerProcess::<u8>::new();
        let panicked = std::thread::scope(|scope| {
            let held = || {
                let _held = value.lock();
                panic!("expected by the test");
            };
            scope.spawn(held).join()
        });
        assert!(panicked.is_err());
        *value.lock() = 1;
        assert_eq!(*value.lock(), 1);
    }
}
