// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest kernel's log: what in it is a failure whatever the command's status was.

/// A line of the log that tells of a fault, or `None` if there is none.
pub(crate) fn fault(log: &str) -> Option<&str> {
    log.lines().map(|line| (line, message(line))).find(|(_, text)| is_fault(text)).map(|(line, _)| line.trim_end())
}

/// The last `count` lines.
pub(crate) fn tail(log: &str, count: usize) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim_end).collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// The lines around the first fault: some before, and enough behind it for a stack.
pub(crate) fn around_fault(log: &str) -> Option<String> {
    let lines: Vec<&str> = log.lines().map(str::trim_end).collect();
    let at = lines.iter().position(|line| is_fault(message(line)))?;
    let end = (at + 70).min(lines.len());
    Some(lines[at.saturating_sub(5)..end].join("\n"))
}

/// What a kernel that was asked by SysRq says about blocked tasks and running CPUs, and what it had
/// said before; its list of all tasks is too long to be shown.
pub(crate) fn blocked(log: &str) -> String {
    let lines: Vec<&str> = log.lines().map(str::trim_end).collect();
    let find = |text: &str| lines.iter().position(|line| message(line) == text);
    let asked = find("sysrq: Changing Loglevel").unwrap_or(lines.len());
    let end = find("sysrq: Show State").unwrap_or(lines.len());
    let end = end.min(asked + 200);
    lines[asked.saturating_sub(30)..end].join("\n")
}

/// The line without the time stamp, `[   12.345678] ` or `[   12.345678][ T123] `.
fn message(line: &str) -> &str {
    let mut text = line.trim_start();
    while let Some(rest) = text.strip_prefix('[') {
        let Some((stamp, rest)) = rest.split_once(']') else {
            break;
        };
        let stamp_like = |c: char| c.is_ascii_digit() || " .TC".contains(c);
        if !stamp.chars().all(stamp_like) {
            break;
        }
        text = rest.trim_start();
    }
    text
}

fn is_fault(text: &str) -> bool {
    const STARTS: &[&str] = &[
        "BUG: ",
        "WARNING: ",
        "UBSAN: ",
        "Oops: ",
        "Oops - ",
        "general protection fault",
        "kernel BUG at ",
        "Kernel panic - not syncing",
        "------------[ cut here ]",
        "KASAN: ",
        "ODEBUG: ",
        "INFO: trying to register non-static key",
    ];
    const PARTS: &[&str] = &[
        "Kernel panic - not syncing",
        "detected stall",
        "self-detected stall",
        "BUG: soft lockup",
        "BUG: unable to handle",
        "blocked for more than",
        "BUG: KASAN",
        "BUG: sleeping function",
        "possible circular locking dependency",
        "possible recursive locking",
        "inconsistent lock state",
        "suspicious RCU usage",
        "new suspected memory leaks",
    ];
    STARTS.iter().any(|start| text.starts_with(start)) || PARTS.iter().any(|part| text.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_seen_with_and_without_time_stamps() {
        for line in [
            "[   12.345678] WARNING: CPU: 0 PID: 1 at block/blk-mq.c:1 f+0x1/0x2 [ublk_drv]",
            "[   12.345678] WARNING: block/blk-mq.c:1 at f+0x1/0x2, CPU#0: kworker/1",
            "[   12.345678][  T123] BUG: kernel NULL pointer dereference, address: 0000000000000000",
            "[    1.0] BUG: unable to handle page fault for address: ffff",
            "[    1.0] Oops: 0002 [#1] PREEMPT SMP NOPTI",
            "[    1.0] Oops: general protection fault, probably for non-canonical address",
            "[    1.0] general protection fault: 0000 [#1] SMP",
            "[    1.0] kernel BUG at block/blk-mq.c:1!",
            "Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100",
            "[  200.1] INFO: task mkfs.ext4:123 blocked for more than 120 seconds.",
            "[  200.1] watchdog: BUG: soft lockup - CPU#1 stuck for 26s! [ublk:1]",
            "[  200.1] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[  200.1] ------------[ cut here ]------------",
            "[   60.0] BUG: KASAN: slab-use-after-free in f+0x1/0x2 [ublk_drv]",
            "[   60.0] WARNING: possible circular locking dependency detected",
            "[   60.0] WARNING: possible recursive locking detected",
            "[   60.0] WARNING: inconsistent lock state",
            "[   60.0] WARNING: suspicious RCU usage",
            "[   60.0] INFO: trying to register non-static key.",
            "[   60.0] BUG: sleeping function called from invalid context at mm/x.c:1",
            "[   60.0] ODEBUG: free active (active state 0) object: f hint: g",
            "[   60.0] kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)",
            "[  200.1] UBSAN: array-index-out-of-bounds in drivers/block/ublk_drv.c:1:2",
        ] {
            assert_eq!(fault(line), Some(line));
        }
    }

    #[test]
    fn other_lines_are_no_faults() {
        for line in [
            "",
            "[    1.0] Linux version 7.3.4",
            "[    1.0] rcu: Hierarchical RCU implementation.",
            "[    1.0] kmemleak: Kernel memory leak detector initialized (mem pool available: 59431)",
            "[    1.0] rcu: \tRCU lockdep checking is enabled.",
            "[    1.0] kasan: KernelAddressSanitizer initialized (generic)",
            "[    1.0] NMI watchdog: Perf NMI watchdog permanently disabled",
            "[    1.0] watchdog: Delayed init of the lockup detector failed",
            "[    1.0] blk_print_req_error: I/O error, dev ublkb0, sector 0 op 0x0:(READ)",
            "[    1.0] Buffer I/O error on dev ublkb0, logical block 0, async page read",
            "[    1.0] EXT4-fs warning (device ublkb0): something",
            "[    1.0] systemd-udevd[70]: DEBUG: x",
            "ublk-vm: shell",
        ] {
            assert_eq!(fault(line), None, "{line}");
        }
    }

    #[test]
    fn the_first_fault_is_told_with_what_follows() {
        let mut log: Vec<String> = (0..100).map(|i| format!("[ {i}.0] line {i}")).collect();
        log[50] = "[ 50.0] WARNING: x".into();
        let text = around_fault(&log.join("\n")).unwrap();
        assert!(text.starts_with("[ 45.0]"), "{text}");
        assert!(text.ends_with("line 99"), "{text}");
        assert_eq!(around_fault("all is well"), None);
        assert_eq!(tail("a\nb\nc\n", 2), "b\nc");
        assert_eq!(tail("a", 2), "a");
    }

    #[test]
    fn blocked_tasks_are_shown_without_all_the_others() {
        let log = "[ 1.0] before\n[ 2.0] sysrq: Changing Loglevel\n\
                   [ 3.0] sysrq: Show Blocked State\n[ 3.1] task:x state:D\n\
                   [ 4.0] sysrq: Show State\n[ 4.1] task:y state:S\n";
        assert_eq!(
            blocked(log),
            "[ 1.0] before\n[ 2.0] sysrq: Changing Loglevel\n\
             [ 3.0] sysrq: Show Blocked State\n[ 3.1] task:x state:D"
        );
        // A kernel that does not answer.
        assert_eq!(blocked("a\nb"), "a\nb");
        assert_eq!(blocked(""), "");
    }
}
