// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which `ublk_drv` the guest loads: the kernel's own, or the one in this repository, which is
//! built here against the headers of the very kernel, by the compiler that Debian built it with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Mirrors, transport_options};
use crate::cache::{Cache, Fingerprint, prune, publish, touch};
use crate::host::{self, is_root};
use crate::kernel::Kernel;
use crate::process::{run, run_quietly};
use crate::report::note;
use crate::tree::{copy_tree, is_litter};

/// To be counted up when the way the driver is built changes.
const RECIPE: u32 = 1;

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
    pub(crate) fn prepare(self, cache: &Cache, repository: &Path, kernel: &Kernel) -> Result<Option<PathBuf>> {
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
            Self::Bundled => bundled(cache, repository, kernel).map(Some),
        }
    }
}

/// The module for `kernel` in the cache, built if its source or the kernel is new.
fn bundled(cache: &Cache, repository: &Path, kernel: &Kernel) -> Result<PathBuf> {
    let source = repository.join("kmod");
    if !source.join("Kbuild").is_file() {
        bail!(
            "--driver bundled needs the driver's source, and there is no kmod/Kbuild in {}; take \
             --driver intree",
            repository.display()
        );
    }
    let _lock = cache.lock("driver")?;
    let mut name = Fingerprint::default();
    name.add("recipe", RECIPE.to_string())
        .add("release", &kernel.release)
        .add("version", &kernel.version)
        .add_tree(&source, &is_litter)?;
    let modules = cache.dir("drivers")?;
    let module = modules.join(format!("{}.ko", name.finish()));
    if module.is_file() {
        touch(&module);
        return Ok(module);
    }
    let tree = build_tree(cache, kernel)?;
    note(format_args!("building kmod/ for Linux {}", kernel.release));
    let temporary = cache.temporary("driver")?;
    let work = temporary.path().join("kmod");
    copy_tree(&source, &work)?;
    // Namespaces of its own: the mounts vanish with the build, and a user may do it too.
    let script = "set -e; for dir in dev proc; do mount --rbind /$dir \"$1/$dir\"; done; mount --bind \"$2\" \"$1/mnt\"
        exec chroot \"$1\" make -s -C \"/lib/modules/$3/build\" M=/mnt -j\"$(nproc)\" modules";
    let mut make = Command::new("unshare");
    if !is_root() {
        make.arg("--map-root-user");
    }
    run(make
        .args(["--mount", "sh", "-c", script, "sh"])
        .args([&tree, &work])
        .arg(&kernel.release)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8"))
    .with_context(|| format!("cannot build kmod/ for Linux {}", kernel.release))?;
    let built = work.join("ublk_drv.ko");
    if !built.is_file() {
        bail!("the build of kmod/ went well but left no ublk_drv.ko: does kmod/Kbuild name it so?");
    }
    publish(&built, &module)?;
    prune(&modules, KEEP);
    Ok(module)
}

/// The Debian release whose compiler and libraries the kernel's headers ask for.
fn suites_of(release: &str) -> (&'static str, &'static [(&'static str, bool)]) {
    let debian =
        release.split_once("+deb").and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    match debian {
        None | Some(..=12) => ("bookworm", &[("bookworm", false), ("bookworm-security", true)]),
        Some(13) => ("trixie", &[("trixie", false), ("trixie-security", true), ("trixie-backports", false)]),
        Some(_) => ("sid", &[("sid", false)]),
    }
}

/// A root directory with the kernel's headers and all that building a module takes.
fn build_tree(cache: &Cache, kernel: &Kernel) -> Result<PathBuf> {
    let place = cache.dir("build-trees")?.join(format!("{}_{}_r{RECIPE}", kernel.release, kernel.version));
    if place.is_dir() {
        return Ok(place);
    }
    host::require(host::ROOTFS)?;
    cache.need_room(2000, "a place to build the driver in")?;
    note(format_args!("fetching the headers of Linux {} and their compiler (a minute or two)", kernel.release));
    let temporary = cache.temporary("build-tree")?;
    let archive = temporary.path().join("tree.tar");
    let tree = temporary.path().join("tree");
    fs::create_dir(&tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let (suite, suites) = suites_of(&kernel.release);
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=minbase", "--architectures=amd64"])
        .arg(format!("--include=make,binutils,linux-headers-{}", kernel.release))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .env("TMPDIR", temporary.path());
    for option in transport_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(suite).arg(&archive).args(Mirrors::of_host()?.sources(suites, ""));
    run_quietly(&mut command).context("cannot fetch the headers and their compiler")?;
    run_quietly(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--exclude=./dev/*", "-f"])
            .arg(&archive)
            .arg("-C")
            .arg(&tree),
    )?;
    publish(&tree, &place)?;
    Ok(place)
}

#[cfg(test)]
mod tests {
    use super::suites_of;

    #[test]
    fn the_compiler_is_the_kernels() {
        for (release, suite) in [
            ("6.1.0-56-cloud-amd64", "bookworm"),
            ("6.12.117+deb12-cloud-amd64", "bookworm"),
            ("6.12.90+deb13.1-cloud-amd64", "trixie"),
            ("7.3.4+deb13-cloud-amd64", "trixie"),
            ("7.2.13+deb14-cloud-amd64", "sid"),
        ] {
            assert_eq!(suites_of(release).0, suite, "{release}");
        }
    }
}
