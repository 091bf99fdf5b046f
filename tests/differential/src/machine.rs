// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the machine must be like, so that nothing but the sequences uses the devices.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long udev may take to end.
const PATIENCE: Duration = Duration::from_secs(10);

/// Prepares a throw-away machine; it may be prepared already.
pub(crate) fn prepare() -> Result<()> {
    stop_udev()?;
    let control = "/dev/ublk-control";
    fs::set_permissions(control, fs::Permissions::from_mode(0o666))
        .with_context(|| format!("cannot open up {control}"))?;
    // Disks come and go all the time, and each time the kernel waits for grace periods.
    let hasty = "/sys/kernel/rcu_expedited";
    fs::write(hasty, "1").with_context(|| format!("cannot write {hasty}"))
}

/// udev would open each new disk, and read from it.
fn stop_udev() -> Result<()> {
    if !udev_runs()? {
        return Ok(());
    }
    let status = Command::new("udevadm").args(["control", "--exit"]).status().context("cannot run udevadm")?;
    if !status.success() {
        bail!("udev does not take the request to end: {status}");
    }
    let deadline = Instant::now() + PATIENCE;
    while udev_runs()? {
        if Instant::now() >= deadline {
            bail!("udev does not end");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn udev_runs() -> Result<bool> {
    let processes = fs::read_dir("/proc").context("cannot read /proc")?;
    // A process that ends while this looks has no name, and does not run.
    let names = processes.flatten().filter_map(|entry| fs::read_to_string(entry.path().join("comm")).ok());
    Ok(names.into_iter().any(|name| matches!(name.trim_end(), "systemd-udevd" | "udevd" | "(udev-worker)")))
}
