// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which `ublk_drv` the guest loads: the kernel's own, or the one in this repository.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use crate::kernel::Kernel;

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
    pub(crate) fn prepare(self, repository: &Path, kernel: &Kernel) -> Result<Option<PathBuf>> {
        match self {
            Self::Intree => {
                if !kernel.has_module("ublk_drv")? {
                    bail!(
                        "Linux {} has no ublk_drv of its own; take --driver bundled or a kernel from \
                         6.12 on",
                        kernel.release
                    );
                }
                Ok(None)
            }
            Self::Bundled => build(repository, kernel).map(Some),
        }
    }
}

fn build(repository: &Path, kernel: &Kernel) -> Result<PathBuf> {
    if !repository.join("kmod/Kbuild").is_file() {
        bail!(
            "--driver bundled needs the driver's source, and there is no kmod/Kbuild in {} yet; \
             take --driver intree",
            repository.display()
        );
    }
    bail!("building kmod/ for Linux {} is not implemented in this program yet; take --driver intree", kernel.release)
}
