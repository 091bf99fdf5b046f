// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the testbed itself says. All of it goes to standard error: standard output belongs to the
//! command in the guest.

/// One line about what happens.
pub(crate) fn note(text: impl std::fmt::Display) {
    eprintln!("vm: {text}");
}
