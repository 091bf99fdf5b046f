// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which checkout of this project is tested: the one whose script started the program.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The variable in which `vm/run`, `vm/kmod` and `vm/package` pass the checkout that they belong to.
const VARIABLE: &str = "UBLK_VM_ROOT";

/// Returns the root of the checkout. It is not known at build time: a checkout may be moved, or copied
/// together with the programs that were built in it.
pub(crate) fn find() -> Result<PathBuf> {
    let root = env::var_os(VARIABLE).with_context(|| format!("{VARIABLE} is not set: start vm/run or vm/kmod"))?;
    let root = PathBuf::from(root);
    if !is_checkout(&root) {
        bail!("{} is not a checkout of this project: it has no vm/guest/init", root.display());
    }
    Ok(root)
}

fn is_checkout(root: &Path) -> bool {
    root.join("vm/guest/init").is_file()
}
