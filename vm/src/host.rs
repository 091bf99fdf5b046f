// SPDX-License-Identifier: MIT OR Apache-2.0

//! What the host must have: programs, and the Debian packages they come from.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{run_quietly, which};
use crate::report::note;

/// A program and the Debian package that brings it.
type Need = (&'static str, &'static str);

/// Needed to make images and to boot.
pub(crate) const MACHINE: &[Need] = &[
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("busybox", "busybox-static"),
    ("mke2fs", "e2fsprogs"),
    ("depmod", "kmod"),
    ("setpriv", "util-linux"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("tar", "tar"),
];

/// Needed to make the guest's root file system.
pub(crate) const ROOTFS: &[Need] = &[("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs")];

/// True for the superuser, who may install packages and own files as root.
pub(crate) fn is_root() -> bool {
    nix::unistd::Uid::effective().is_root()
}

/// Installs what is missing, saying so; without the right to, says what to install.
pub(crate) fn require(needs: &[Need]) -> Result<()> {
    let mut missing: Vec<&str> =
        needs.iter().filter(|(program, _)| which(program).is_none()).map(|(_, package)| *package).collect();
    if !is_root() && which("fakeroot").is_none() {
        // Images must belong to root whoever makes them.
        missing.push("fakeroot");
    }
    if !is_root() && which("newuidmap").is_none() {
        // mmdebstrap unpacks with user ids of a namespace's own.
        missing.push("uidmap");
    }
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !is_root() {
        bail!("the host lacks {list}; as root: apt-get install --no-install-recommends {list}");
    }
    if which("apt-get").is_none() {
        bail!("the host lacks {list}, and has no apt-get to install it");
    }
    note(format_args!("installing on this host: {list}"));
    let install = || {
        run_quietly(
            Command::new("apt-get")
                .args(["-o", "DPkg::Lock::Timeout=600", "-y", "-q"])
                .args(["--no-install-recommends", "install"])
                .args(&missing)
                .env("DEBIAN_FRONTEND", "noninteractive"),
        )
    };
    if install().is_err() {
        // The host's package lists may be missing or too old to find the files.
        run_quietly(Command::new("apt-get").args(["-q", "update"]))
            .context("cannot refresh the host's package lists")?;
        install().with_context(|| format!("cannot install {list}"))?;
    }
    for (program, package) in needs {
        if which(program).is_none() {
            bail!("{package} is installed, but {program} is not on PATH");
        }
    }
    Ok(())
}

/// A command that sees the files it handles as root's, also when a user runs it.
pub(crate) fn as_root(program: &str) -> Command {
    if is_root() {
        Command::new(program)
    } else {
        let mut command = Command::new("fakeroot");
        command.args(["--", program]);
        command
    }
}
