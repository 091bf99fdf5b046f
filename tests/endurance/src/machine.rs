// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine: what is left of devices, tasks that hang, the module.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::Process;
use crate::waiting::until;

/// The driver under test, where the testbed puts it; the kernel's own otherwise.
const BUNDLED: &str = "/opt/ublk/driver/ublk_drv.ko";

/// A task that sleeps uninterruptibly in so many looks in a row hangs.
const LOOKS: usize = 4;
const BETWEEN_LOOKS: Duration = Duration::from_millis(300);

/// Names in a directory that begin so; none if there is no such directory.
fn names(directory: &str, prefixes: &[&str]) -> Vec<String> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| prefixes.iter().any(|prefix| name.starts_with(prefix))).collect()
}

/// Waits until nothing of any device is there.
pub(crate) fn no_devices() -> Result<()> {
    let mut left = Vec::new();
    let gone = until("the end of all devices", || {
        left = names("/dev", &["ublkb", "ublkc"]);
        left.extend(names("/sys/block", &["ublkb"]));
        left.extend(names("/sys/class/ublk-char", &["ublkc"]));
        Ok(left.is_empty().then_some(()))
    });
    gone.map(drop).with_context(|| format!("these stay: {}", left.join(" ")))
}

/// Tasks in uninterruptible sleep: number and name.
fn sleepers() -> BTreeSet<String> {
    let mut sleepers = BTreeSet::new();
    for process in names("/proc", &["1", "2", "3", "4", "5", "6", "7", "8", "9"]) {
        for task in names(&format!("/proc/{process}/task"), &[""]) {
            // One that is gone meanwhile does not hang.
            let stat = std::fs::read_to_string(format!("/proc/{process}/task/{task}/stat")).unwrap_or_default();
            if let Some((before, after)) = stat.rsplit_once(')')
                && after.trim_start().starts_with('D')
            {
                sleepers.insert(format!("{before})"));
            }
        }
    }
    sleepers
}

/// Fails if a task hangs.
pub(crate) fn no_hung_task() -> Result<()> {
    let mut hung = sleepers();
    for _ in 1..LOOKS {
        if hung.is_empty() {
            return Ok(());
        }
        std::thread::sleep(BETWEEN_LOOKS);
        let now = sleepers();
        hung.retain(|task| now.contains(task));
    }
    if hung.is_empty() {
        return Ok(());
    }
    bail!("tasks in uninterruptible sleep: {}", hung.into_iter().collect::<Vec<_>>().join(" "))
}

fn tool(program: &str, arguments: &[&str]) -> Result<bool> {
    let what = format!("{program} {}", arguments.join(" "));
    Ok(Process::start(&what, Command::new(program).args(arguments))?.wait()?.success())
}

/// Takes the module out and puts it in again.
pub(crate) fn reload_module() -> Result<()> {
    // udev may still be looking at what was there.
    if !tool("udevadm", &["settle", "--timeout=30"])? {
        bail!("udev does not settle");
    }
    until("rmmod ublk_drv", || Ok(tool("rmmod", &["ublk_drv"])?.then_some(())))?;
    let inserted =
        if Path::new(BUNDLED).exists() { tool("insmod", &[BUNDLED]) } else { tool("modprobe", &["ublk_drv"]) }?;
    if !inserted {
        bail!("the module cannot be inserted again");
    }
    until("/dev/ublk-control", || Ok(Path::new("/dev/ublk-control").exists().then_some(()))).map(drop)
}

/// Where results go, if they are wanted.
pub(crate) fn results() -> Option<PathBuf> {
    let place = std::env::var_os("UBLK_RESULTS").map_or_else(|| PathBuf::from("/results"), PathBuf::from);
    place.is_dir().then_some(place)
}

/// Has the kernel say where tasks are blocked, and keeps its log.
pub(crate) fn show_blocked_tasks(name: &str) -> Result<()> {
    std::fs::write("/proc/sysrq-trigger", "w").context("sysrq")?;
    let Some(results) = results() else { return Ok(()) };
    let log = std::fs::File::create(results.join(format!("{name}.dmesg")))?;
    Process::start("dmesg", Command::new("dmesg").stdout(log))?.wait().map(drop)
}
