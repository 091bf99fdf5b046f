// SPDX-License-Identifier: MIT OR Apache-2.0

//! What /proc says about other processes.

/// The state of a process as in `/proc/PID/stat`: `R`, `S`, `D`, `T`, `Z` and so on; `None` if there is none.
pub(crate) fn state(pid: i32) -> Option<char> {
    // 0 and -1 are no process's number.
    let stat = (pid > 0).then(|| std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()).flatten()?;
    // The name, in parentheses, may contain anything.
    stat.rsplit_once(')').and_then(|(_, rest)| rest.trim_start().chars().next())
}

/// Whether a process lives, not counting one that has died and was not collected.
pub(crate) fn is_alive(pid: i32) -> bool {
    !matches!(state(pid), None | Some('Z' | 'X'))
}

/// Whether a process is stopped, by SIGSTOP or a debugger.
pub(crate) fn is_stopped(pid: i32) -> bool {
    matches!(state(pid), Some('T' | 't'))
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
