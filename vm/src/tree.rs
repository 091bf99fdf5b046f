// SPDX-License-Identifier: MIT OR Apache-2.0

//! Source trees: what belongs to them, and copies of them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

/// Names of things that appear beside sources and are none.
const LITTER: &[&str] = &[
    ".git",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".venv",
    "Module.symvers",
    "__pycache__",
    "modules.order",
    "target",
];

/// Endings of such names.
const LITTER_ENDINGS: &[&str] = &[".cmd", ".egg-info", ".ko", ".mod", ".mod.c", ".o", ".pyc", ".so"];

/// Whether a thing of that name is the product of some tool.
pub(crate) fn is_litter(name: &str) -> bool {
    LITTER.contains(&name) || LITTER_ENDINGS.iter().any(|ending| name.ends_with(ending))
}

/// Copies a directory and all in it but litter; nothing is made of what does not exist.
pub(crate) fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    fs::create_dir_all(to).with_context(|| format!("cannot make {}", to.display()))?;
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", from.display()))?;
        let name = entry.file_name();
        if is_litter(&name.to_string_lossy()) {
            continue;
        }
        let (path, target) = (entry.path(), to.join(&name));
        let describe = || format!("cannot copy {}", path.display());
        let kind = entry.file_type().with_context(describe)?;
        if kind.is_dir() {
            copy_tree(&path, &target)?;
        } else if kind.is_symlink() {
            let link = fs::read_link(&path).with_context(describe)?;
            std::os::unix::fs::symlink(link, &target).with_context(describe)?;
        } else {
            fs::copy(&path, &target).with_context(describe)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::is_litter;

    #[test]
    fn sources_are_no_litter() {
        for name in ["Kbuild", "main.c", "target.rs", "targets", "mod.rs", "test_so.py", "COPYING"] {
            assert!(!is_litter(name), "{name}");
        }
        for name in ["target", "ublk_drv.ko", ".main.o.cmd", "ublk_drv.mod.c", "__pycache__"] {
            assert!(is_litter(name), "{name}");
        }
    }
}
