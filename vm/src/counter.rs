// SPDX-License-Identifier: MIT OR Apache-2.0

//! The plugin that counts the guest's instructions (vm/counter), made ready for QEMU.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::payload::target_dir;
use crate::process::run;

/// The plugin, and where it is to write.
#[derive(Debug)]
pub(crate) struct Counter {
    pub(crate) plugin: PathBuf,
    pub(crate) out: PathBuf,
    pub(crate) profile: Option<PathBuf>,
}

impl Counter {
    /// Builds the plugin, and sees to it that it can write.
    pub(crate) fn prepare(repository: &Path, out: &Path, profile: Option<&Path>) -> Result<Self> {
        let manifest = repository.join("Cargo.toml");
        run(Command::new("cargo")
            .args(["build", "--quiet", "--release", "--locked", "--package", "ublk-vm-counter", "--manifest-path"])
            .arg(manifest))?;
        let plugin = target_dir(repository).join("release/libublk_vm_counter.so");
        let profile = profile.map(writable).transpose()?;
        Ok(Self { plugin: nameable(plugin)?, out: writable(out)?, profile })
    }
}

fn writable(path: &Path) -> Result<PathBuf> {
    File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    nameable(path.canonicalize().with_context(|| format!("cannot find {}", path.display()))?)
}

fn nameable(path: PathBuf) -> Result<PathBuf> {
    if path.to_string_lossy().contains(',') {
        bail!("QEMU splits options at commas, and {} has one", path.display());
    }
    Ok(path)
}
