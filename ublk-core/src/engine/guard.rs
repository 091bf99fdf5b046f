// SPDX-License-Identifier: MIT OR Apache-2.0

//! User code on a ring thread: a panic in it is the device's or the request's alone, whichever code it is.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs user code. A panic becomes its message.
///
/// What the code leaves half-done is its own; the engine's state must be as it should be whether or not this returns
/// an error.
pub(crate) fn guarded<T>(code: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(code)).map_err(|panic| {
        let text = panic_text(&*panic).to_owned();
        // What was thrown may panic too when it is dropped.
        if let Err(second) = catch_unwind(AssertUnwindSafe(|| drop(panic))) {
            std::mem::forget(second);
        }
        text
    })
}

/// Drops a value of the user's. A panic is logged, with what it was.
pub(crate) fn drop_guarded<T>(value: T, what: impl FnOnce() -> String) {
    if let Err(panic) = guarded(|| drop(value)) {
        log::error!("{} panicked while it was dropped: {panic}", what());
    }
}

/// The message of a panic.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    use std::panic::panic_any;

    use super::*;

    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }

    #[test]
    fn a_panic_becomes_its_message() {
        assert_eq!(guarded(|| 7), Ok(7));
        assert_eq!(guarded(|| panic!("a literal")), Err::<(), _>("a literal".into()));
        assert_eq!(guarded(|| panic!("number {}", 7)), Err::<(), _>("number 7".into()));
        assert_eq!(guarded(|| panic_any(7)), Err::<(), _>("(no message)".into()));
    }

    #[test]
    fn what_was_thrown_may_panic_too() {
        assert_eq!(guarded(|| panic_any(Bomb)), Err::<(), _>("(no message)".into()));
        drop_guarded(Bomb, || "a bomb".into());
    }
}
