// SPDX-License-Identifier: MIT OR Apache-2.0

//! ext4 images from directories, without mounting anything.

use std::path::Path;

use anyhow::{Context, Result};

use crate::host::as_root;
use crate::process::run_quietly;

/// Options for mke2fs. No journal: the disks are thrown away, so it would only cost time. No
/// checksums: under emulation they cost more than they could tell about an image just made.
pub(crate) const OPTIONS: &str = "-q -F -t ext4 -m 0 -O ^has_journal,^metadata_csum,^huge_file \
                           -E root_owner=0:0,lazy_itable_init=1";

/// Makes the sparse image `image` of `mebibytes` from what `dir` holds.
pub(crate) fn from_dir(dir: &Path, image: &Path, label: &str, mebibytes: u64) -> Result<()> {
    run_quietly(
        as_root("mke2fs")
            .env("PATH", path_with_sbin())
            .args(OPTIONS.split_whitespace())
            .args(["-L", label, "-d"])
            .args([dir, image])
            .arg(format!("{mebibytes}M")),
    )
    .with_context(|| format!("cannot make the image {}", image.display()))
}

/// A user's PATH often lacks the directories of system tools.
fn path_with_sbin() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

/// What a directory takes, in MiB, counted in file system blocks.
pub(crate) fn size_of(dir: &Path) -> Result<u64> {
    let mut blocks = 0;
    let mut pending = vec![dir.to_path_buf()];
    while let Some(path) = pending.pop() {
        let describe = || format!("cannot read {}", path.display());
        for entry in std::fs::read_dir(&path).with_context(describe)? {
            let entry = entry.with_context(describe)?;
            let meta = entry.metadata().with_context(describe)?;
            if meta.is_dir() {
                pending.push(entry.path());
            }
            blocks += 1 + meta.len().div_ceil(4096);
        }
    }
    Ok((blocks >> 8) + 1)
}
