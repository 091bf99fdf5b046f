// SPDX-License-Identifier: MIT OR Apache-2.0

//! The process's descriptors 0 to 2.
//!
//! A program that was started with a closed stderr gets descriptor 2 for a file that it opens, which may be its disk.
//! Messages of this library, of Rust's panic hook and of other libraries would then be written into that file.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use pyo3::prelude::*;
use ublk_core::Errno;

use crate::error::os_error;

/// Whether descriptor 2 is a file of the program, and not stderr.
static FOREIGN: AtomicBool = AtomicBool::new(false);

/// Opens `/dev/null` for each of the descriptors 0 to 2 that is closed, like the runtime of Rust programs. If the program
/// was started without a stderr and has opened another file since, nothing is written to that.
pub(crate) fn secure(py: Python<'_>) -> PyResult<()> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let is_closed = |file: &BorrowedFd<'_>| fcntl(file, FcntlArg::F_GETFD) == Err(nix::Error::EBADF);
    if !is_closed(&stderr.as_fd()) && py.import("sys")?.getattr("__stderr__")?.is_none() {
        FOREIGN.store(true, Ordering::Relaxed);
        std::panic::set_hook(Box::new(|_| {}));
    }
    if [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].iter().any(is_closed) {
        open_closed().map_err(|errno| os_error(Errno::from(errno)))?;
    }
    Ok(())
}

/// Opens `/dev/null` until no lower descriptor is free. Child processes inherit it.
fn open_closed() -> nix::Result<()> {
    loop {
        let file = open("/dev/null", OFlag::O_RDWR, Mode::empty())?;
        if file.as_raw_fd() > 2 {
            return Ok(());
        }
        let _ = file.into_raw_fd();
    }
}

/// Prints a message to stderr, if there is one.
pub(crate) fn complain(message: &str) {
    if !FOREIGN.load(Ordering::Relaxed) {
        eprintln!("ublk: {message}");
    }
}
