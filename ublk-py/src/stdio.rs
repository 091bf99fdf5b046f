// SPDX-License-Identifier: MIT OR Apache-2.0

//! The process's descriptors 0 to 2.
//!
//! A program that was started with a closed stderr gets descriptor 2 for a file that it opens, which may be its disk.
//! Messages of this library, of Rust's panic hook and of other libraries would then be written into that file.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd};
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::libc::PIPE_BUF;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::Mode;
use nix::unistd::write;
use pyo3::prelude::*;
use ublk_core::Errno;

use crate::error::os_error;

/// Whether descriptor 2 is a file of the program, and not stderr.
static FOREIGN: AtomicBool = AtomicBool::new(false);
/// Time limit for a message: stderr may be a full pipe that nothing reads.
const PATIENCE: Duration = Duration::from_secs(1);

/// Opens `/dev/null` for each of the descriptors 0 to 2 that is closed, like the runtime of Rust programs. If the program
/// was started without a stderr and has opened another file since, nothing is written to that. Panics are reported by
/// [`write_in_time`], so that a panic of a thread that another one waits for cannot block both.
pub(crate) fn secure(py: Python<'_>) -> PyResult<()> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let is_closed = |file: &BorrowedFd<'_>| fcntl(file, FcntlArg::F_GETFD) == Err(nix::Error::EBADF);
    if !is_closed(&stderr.as_fd()) && py.import("sys")?.getattr("__stderr__")?.is_none() {
        FOREIGN.store(true, Ordering::Relaxed);
    }
    std::panic::set_hook(Box::new(report_panic));
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

/// Prints a message to stderr, if there is one. Takes a second at most.
pub(crate) fn complain(message: &str) {
    write_in_time(&format!("ublk: {message}\n"));
}

fn report_panic(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    // As the environment asks for.
    let trace = Backtrace::capture();
    let trace = if trace.status() == BacktraceStatus::Captured { format!("{trace}\n") } else { String::new() };
    write_in_time(&format!("thread '{name}' {info}\n{trace}"));
}

/// Writes a text to stderr, if there is one, or as much of it as there is room for within a second.
///
/// Not through [`io::stderr`], whose lock a thread may hold that waits for room, also one of the process from which this one
/// was forked.
fn write_in_time(text: &str) {
    if FOREIGN.load(Ordering::Relaxed) {
        return;
    }
    let stderr = io::stderr();
    let deadline = Instant::now() + PATIENCE;
    let mut left = text.as_bytes();
    while !left.is_empty() {
        let rest = deadline.saturating_duration_since(Instant::now());
        let mut files = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
        match poll(&mut files, PollTimeout::try_from(rest).unwrap_or(PollTimeout::ZERO)) {
            Err(nix::Error::EINTR) if !rest.is_zero() => continue,
            Ok(1) => {}
            _ => return,
        }
        // A pipe that is writable has room for so much.
        match write(&stderr, &left[..left.len().min(PIPE_BUF)]) {
            Ok(written) => left = &left[written..],
            Err(nix::Error::EINTR) if !rest.is_zero() => {}
            Err(_) => return,
        }
    }
}
