// SPDX-License-Identifier: MIT OR Apache-2.0

//! Whether a block device is mounted or otherwise opened exclusively, found by opening it exclusively.
//!
//! The open is uninterruptible while a driver scans the disk for partitions, which takes answers of the disk's server. A
//! process cannot end before all its threads have, so a forked process opens the disk, and may outlive this one.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, pipe2};

/// How long opening a disk may take, which may wait for its server.
pub(super) const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the forked process may take to end after it has answered or was killed.
const EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// Returns whether a block device is opened exclusively.
///
/// # Errors
///
/// `TimedOut` if the disk cannot be opened within `timeout`. If the disk cannot be opened for another reason than that it is
/// claimed or gone, or if the forked process fails.
pub(super) fn is_claimed(disk: &Path, timeout: Duration) -> io::Result<bool> {
    let path = CString::new(disk.as_os_str().as_bytes())?;
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let report = writer.as_raw_fd();
    // SAFETY: the child only makes system calls, and ends with one.
    let child = match unsafe { fork() }? {
        ForkResult::Parent { child } => child,
        // SAFETY: system calls with numbers, a C string, and a byte of this function.
        ForkResult::Child => unsafe {
            // Only the pipe stays open: other processes may wait for the close of inherited descriptors.
            libc::dup2(report, 0);
            libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
            let fd = libc::open(path.as_ptr(), libc::O_RDONLY | libc::O_EXCL | libc::O_CLOEXEC);
            let answer = if fd < 0 { nix::errno::Errno::last_raw() } else { 0 }.to_ne_bytes();
            if fd >= 0 {
                // Before the answer: an open disk is in use.
                libc::close(fd);
            }
            libc::write(0, answer.as_ptr().cast(), answer.len());
            libc::_exit(0)
        },
    };
    drop(writer);
    let answer = answer(File::from(reader), Instant::now() + timeout);
    reap(child, answer.is_err());
    answer
}

fn answer(mut pipe: File, deadline: Instant) -> io::Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(0) => return Err(crate::Errno::ETIMEDOUT.into()),
            Ok(_) => {
                let mut errno = [0; 4];
                pipe.read_exact(&mut errno)?;
                return match i32::from_ne_bytes(errno) {
                    0 | libc::ENOENT | libc::ENXIO => Ok(false),
                    libc::EBUSY => Ok(true),
                    other => Err(io::Error::from_raw_os_error(other)),
                };
            }
        }
    }
}

/// Reaps the forked process. If it does not end, it is left to init when this process ends.
fn reap(child: Pid, kill_first: bool) {
    if kill_first {
        let _ = kill(child, Signal::SIGKILL);
    }
    let deadline = Instant::now() + EXIT_TIMEOUT;
    while matches!(
        waitpid(child, Some(WaitPidFlag::WNOHANG)),
        Ok(WaitStatus::StillAlive) | Err(nix::errno::Errno::EINTR)
    ) && Instant::now() < deadline
    {
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_that_blocks_times_out() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let started = Instant::now();
        let error = is_claimed(&fifo, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT));
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    }

    /// `EPERM` of a container's device filter, and `ENFILE`, do not mean that it is unused.
    #[test]
    fn a_disk_that_cannot_be_opened_is_unknown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("loop");
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let error = is_claimed(&path, Duration::from_secs(20)).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn an_unused_or_missing_file_is_not_claimed() {
        for path in ["/dev/null", "/nonexistent/ublkb7"] {
            assert!(!is_claimed(path.as_ref(), Duration::from_secs(20)).unwrap(), "{path}");
        }
    }
}
