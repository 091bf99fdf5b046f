// SPDX-License-Identifier: MIT OR Apache-2.0

//! The plugin that counts the guest's instructions (vm/counter), made ready for QEMU.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::payload::target_dir;
use crate::process::run;

/// Builds the plugin; where it is, and where it is to write.
pub(crate) fn prepare(repository: &Path, out: &Path) -> Result<(PathBuf, PathBuf)> {
    let manifest = repository.join("Cargo.toml");
    run(Command::new("cargo")
        .args(["build", "--quiet", "--release", "--locked", "--package", "ublk-vm-counter", "--manifest-path"])
        .arg(manifest))?;
    let plugin = target_dir(repository).join("release/libublk_vm_counter.so");
    File::create(out).with_context(|| format!("cannot write {}", out.display()))?;
    let out = out.canonicalize().with_context(|| format!("cannot find {}", out.display()))?;
    for path in [&plugin, &out] {
        if path.to_string_lossy().contains(',') {
            bail!("QEMU splits options at commas, and {} has one", path.display());
        }
    }
    Ok((plugin, out))
}
