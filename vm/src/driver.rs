// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which `ublk_drv` the guest loads: the kernel's own, or the one in this repository, which is
//! built here against the headers of the very kernel, by the compiler that Debian built it with.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::cache::{Cache, Fingerprint, prune, publish, touch};
use crate::catalog;
use crate::kernel::Kernel;
use crate::process::run;
use crate::report::note;
use crate::tree::{copy_tree, is_litter};

/// To be counted up when the way the driver is built changes.
const RECIPE: u32 = 2;

/// Modules that are kept; each edit of the source makes a new one.
const KEEP: usize = 20;

/// The choice of `--driver`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Driver {
    /// The module that comes with the kernel.
    Intree,
    /// The module built from kmod/.
    Bundled,
}

impl Driver {
    /// The name, as the guest sees it in UBLK_DRIVER.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Intree => "intree",
            Self::Bundled => "bundled",
        }
    }

    /// Makes sure that the choice can work on `kernel`; the path of the module for the payload, if
    /// it does not come with the kernel.
    pub(crate) fn prepare(
        self,
        cache: &Cache,
        apt: &Apt<'_>,
        repository: &Path,
        kernel: &Kernel,
    ) -> Result<Option<PathBuf>> {
        match self {
            Self::Intree => {
                if !kernel.has_module("ublk_drv")? {
                    bail!("Linux {} has no ublk_drv; use --driver bundled, or Linux 6.12 or newer", kernel.release);
                }
                Ok(None)
            }
            Self::Bundled => bundled(cache, apt, repository, kernel).map(Some),
        }
    }
}

/// The directory of the driver's source.
pub(crate) fn source(repository: &Path) -> Result<PathBuf> {
    let source = repository.join("kmod");
    if !source.join("Kbuild").is_file() {
        bail!("--driver bundled: there is no kmod/Kbuild in {}", repository.display());
    }
    Ok(source)
}

/// The module for `kernel` in the cache, built if its source or the kernel is new.
fn bundled(cache: &Cache, apt: &Apt<'_>, repository: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let source = &source(repository)?;
    let _lock = cache.lock("driver")?;
    let mut name = Fingerprint::default();
    name.add("recipe", RECIPE.to_string()).add("kernel", kernel.identity()).add_tree(source, &is_litter)?;
    let modules = cache.dir("drivers")?;
    let module = modules.join(format!("{}.ko", name.finish()));
    if module.is_file() {
        touch(&module);
        return Ok(module);
    }
    let tree = catalog::build_tree(kernel, cache, apt)?;
    note(format_args!("building kmod/ for Linux {}", kernel.release));
    let temporary = cache.temporary("driver")?;
    let work = temporary.path().join("kmod");
    copy_tree(source, &work)?;
    // The driver's own assertions belong to the kernel's.
    let words: &[&str] = if kernel.debug { &["UBLK_DEBUG=1"] } else { &[] };
    run(&mut tree.make(&work, words)).with_context(|| format!("cannot build kmod/ for Linux {}", kernel.release))?;
    let built = work.join("ublk_drv.ko");
    if !built.is_file() {
        bail!("the build of kmod/ succeeded but made no ublk_drv.ko: check kmod/Kbuild");
    }
    publish(&built, &module)?;
    prune(&modules, KEEP);
    Ok(module)
}
