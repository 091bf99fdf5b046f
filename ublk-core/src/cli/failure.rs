// SPDX-License-Identifier: MIT OR Apache-2.0

//! Failures of commands.

use crate::error::Error;

/// Why a command failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The message was printed or logged already.
    Reported,
    Error(Error),
    Text(String),
}

/// Result of a command.
pub(super) type Outcome = Result<(), Failure>;

impl Failure {
    /// The message, unless it was printed or logged already.
    pub(super) fn message(&self) -> Option<String> {
        match self {
            Failure::Reported => None,
            Failure::Error(error) => Some(error.to_string()),
            Failure::Text(text) => Some(text.clone()),
        }
    }

    /// Prints the message to standard error, unless that was done already.
    pub(super) fn report(&self) {
        if let Some(message) = self.message() {
            eprintln!("ublk: {message}");
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}
