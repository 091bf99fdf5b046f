// SPDX-License-Identifier: MIT OR Apache-2.0

//! The `ublk` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ublk_core::cli::main()
}
