// SPDX-License-Identifier: MIT OR Apache-2.0

//! The testbed's program: boots a Debian kernel with ublk in QEMU and runs a command in there.

#![forbid(unsafe_code)]

mod accel;
mod apt;
mod build_tree;
mod cache;
mod catalog;
mod cli;
mod console;
mod counter;
mod debug_kernel;
mod driver;
mod host;
mod image;
mod initramfs;
mod kernel;
mod kmod;
mod payload;
mod ports;
mod process;
mod qemu;
mod report;
mod repository;
mod rootfs;
mod run;
mod terminal;
mod tree;
mod version;

use std::process::ExitCode;

use anyhow::Result;

use crate::cli::Action;

/// The testbed's own failure, as env(1) and others have it.
const FAILED: u8 = 125;

fn main() -> ExitCode {
    let action = match Action::parse(std::env::args_os()) {
        Ok(action) => action,
        Err(error) => {
            let _ = error.print();
            return if error.use_stderr() { FAILED.into() } else { ExitCode::SUCCESS };
        }
    };
    match act(action) {
        Ok(code) => code.into(),
        Err(error) => {
            report::note(format_args!("{error:#}"));
            FAILED.into()
        }
    }
}

fn act(action: Action) -> Result<u8> {
    process::watch_signals()?;
    let cache = cache::Cache::open()?;
    match action {
        Action::Kmod(options) => kmod::check(&cache, &options),
        Action::Run(options) => run::run(&cache, &options),
        Action::Package(package) => {
            let place = apt::Apt::open(&cache)?.unpacked(&package.name)?;
            println!("{}", place.display());
            Ok(0)
        }
    }
}
