// SPDX-License-Identifier: MIT OR Apache-2.0

//! Other processes: their state in /proc, and signals that cannot reach the wrong one.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

/// Reads a text of /proc. Names of processes and files in it may be any bytes; those that are no UTF-8 are replaced.
pub(crate) fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The state of a process as in `/proc/PID/stat`: `R`, `S`, `D`, `T`, `Z` and so on; `None` if there is none.
pub(crate) fn state(pid: i32) -> Option<char> {
    // 0 and -1 are no process's number.
    let stat = (pid > 0).then(|| read_text(format!("/proc/{pid}/stat")).ok()).flatten()?;
    // The name, in parentheses, may contain anything.
    stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next())
}

/// Returns whether a process lives, not counting one that has died and was not collected.
pub(crate) fn is_alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

/// Returns whether a process is stopped, by SIGSTOP or a debugger.
pub(crate) fn is_stopped(pid: i32) -> bool {
    matches!(state(pid), Some('T' | 't'))
}

/// A descriptor of a process, which remains that of this process when its number has become another one's.
#[derive(Debug)]
pub(crate) struct Pidfd(OwnedFd);

impl Pidfd {
    /// Opens a process; `None` if there is none, before Linux 5.3, or if this process can open no more files.
    pub(crate) fn open(pid: i32) -> Option<Self> {
        // SAFETY: a system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let fd = i32::try_from(fd).ok().filter(|fd| *fd >= 0)?;
        // SAFETY: the kernel has just created this descriptor, and nothing else owns it.
        Some(Pidfd(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Sends SIGKILL. A process that has ended already is no error.
    pub(crate) fn kill(&self) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: the descriptor is open as long as `self` lives, and no information comes with the signal.
        let sent = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), libc::SIGKILL, none, 0) };
        let error = io::Error::last_os_error();
        if sent == 0 || error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_runs_and_impossible_numbers_do_not() {
        let own = std::process::id() as i32;
        assert!(is_alive(own) && !is_stopped(own));
        for pid in [0, -1, i32::MIN, i32::MAX] {
            assert!(!is_alive(pid) && !is_stopped(pid), "{pid}");
        }
    }

    #[test]
    fn a_process_whose_name_is_no_text_is_alive() {
        use std::os::unix::ffi::OsStrExt;

        let directory = tempfile::tempdir().unwrap();
        // As a name of several bytes per character that the kernel has cut off.
        let program = directory.path().join(std::ffi::OsStr::from_bytes(b"server-\xc3"));
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program).arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        // The kernel names it a moment after it has replaced the program.
        while std::fs::read(format!("/proc/{pid}/comm")).unwrap() != b"server-\xc3\n" {
            assert!(std::time::Instant::now() < deadline);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let found = state(pid);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.is_some());
    }

    #[test]
    fn a_stopped_process_is_seen_to_be_stopped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = child.id() as i32;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGSTOP).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !is_stopped(pid) {
            assert!(std::time::Instant::now() < deadline, "{:?}", state(pid));
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!is_alive(pid));
    }
}
