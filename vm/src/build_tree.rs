// SPDX-License-Identifier: MIT OR Apache-2.0

//! Root directories in which kernel code is built: a kernel's headers and the compiler that it was
//! built with, since these seldom are the host's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Mirrors, transport_options};
use crate::cache::{Cache, publish};
use crate::host::{self, is_root};
use crate::process::run_quietly;
use crate::report::note;

/// To be counted up when what is in a tree changes.
const RECIPE: u32 = 2;

/// What building takes besides headers and compiler. The kernel's W=1 runs scripts in Perl, C=1
/// sparse.
const TOOLS: &str = "make,binutils,perl,sparse";

/// A Debian release and its neighbours, as apt calls them; `true` for those on the security mirror.
type Suites = (&'static str, &'static [(&'static str, bool)]);

/// What a guest's kernel of today's Debian is built with.
pub(crate) const TRIXIE: Suites =
    ("trixie", &[("trixie", false), ("trixie-security", true), ("trixie-backports", false)]);

/// A root directory with /lib/modules/RELEASE/build.
#[derive(Clone, Debug)]
pub(crate) struct BuildTree {
    root: PathBuf,
    release: String,
}

impl BuildTree {
    /// The tree in `root`, for the kernel `release`.
    pub(crate) fn new(root: PathBuf, release: &str) -> Self {
        Self { root, release: release.to_owned() }
    }

    /// The tree for one of Debian's kernels, made if it is not in the cache.
    pub(crate) fn of_debian(cache: &Cache, apt: &Apt<'_>, release: &str, version: &str) -> Result<Self> {
        let place = cache.dir("build-trees")?.join(format!("{release}_{version}_r{RECIPE}"));
        if !place.is_dir() {
            if !Self::can_be_made(apt, release)? {
                bail!("cannot build for Linux {release}: Debian no longer has its headers");
            }
            note(format_args!("fetching the headers of Linux {release} and their compiler (a minute or two)"));
            let temporary = cache.temporary("build-tree")?;
            let tree = temporary.path().join("tree");
            bootstrap(cache, apt, suites_of(release), &headers(release), &tree)
                .context("cannot fetch the headers and their compiler")?;
            publish(&tree, &place)?;
        }
        Ok(Self::new(place, release))
    }

    /// Whether Debian has the headers of one of its kernels; images stay in the archive for longer.
    pub(crate) fn can_be_made(apt: &Apt<'_>, release: &str) -> Result<bool> {
        apt.has(&headers(release))
    }

    /// A command that runs in the tree and sees `work` as /mnt.
    pub(crate) fn command(&self, work: &Path, words: &[&str]) -> Command {
        enter(&self.root, work, words)
    }

    /// A command that builds the external module in `work`.
    pub(crate) fn make(&self, work: &Path, words: &[&str]) -> Command {
        let build = format!("/lib/modules/{}/build", self.release);
        let jobs = format!("-j{}", std::thread::available_parallelism().map_or(1, usize::from));
        let mut command = self.command(work, &["make", "-s", "-C", &build, "M=/mnt", &jobs]);
        command.args(words).arg("modules");
        command
    }
}

/// The package with a kernel's headers.
fn headers(release: &str) -> String {
    format!("linux-headers-{release}")
}

/// A command in the root directory `root`, with `work` mounted at its /mnt.
pub(crate) fn enter(root: &Path, work: &Path, words: &[&str]) -> Command {
    // Namespaces of its own: the mounts vanish with the command, and a user may do it too.
    let script = "set -e; for dir in dev proc; do mount --rbind /$dir \"$1/$dir\"; done; mount --bind \"$2\" \"$1/mnt\"
        root=$1; shift 2; exec chroot \"$root\" \"$@\"";
    let mut command = Command::new("unshare");
    if !is_root() {
        command.arg("--map-root-user");
    }
    command
        .args(["--mount", "sh", "-c", script, "sh"])
        .args([root, work])
        .args(words)
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C.UTF-8");
    command
}

/// Makes a root directory with the tools and `packages` of a Debian release.
pub(crate) fn bootstrap(cache: &Cache, apt: &Apt<'_>, suites: Suites, packages: &str, tree: &Path) -> Result<()> {
    host::require(host::ROOTFS)?;
    cache.need_room(2000, "a place to build kernel code in")?;
    let temporary = cache.temporary("bootstrap")?;
    let archive = temporary.path().join("tree.tar");
    fs::create_dir(tree).with_context(|| format!("cannot make {}", tree.display()))?;
    let (suite, neighbours) = suites;
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=minbase", "--architectures=amd64"])
        .arg(format!("--include={TOOLS},{packages}"))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .env("TMPDIR", temporary.path());
    for option in transport_options() {
        command.arg(format!("--aptopt={option}"));
    }
    command.arg(suite).arg(&archive).args(Mirrors::of_host()?.sources(neighbours, ""));
    run_quietly(&mut command)?;
    run_quietly(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--exclude=./dev/*", "-f"])
            .arg(&archive)
            .arg("-C")
            .arg(tree),
    )?;
    if suite == TRIXIE.0 {
        // Its own sparse does not understand Linux 7's headers.
        let sparse = apt.newest("sparse")?;
        apt.fetch_into(&sparse.name, &sparse.version, tree)?;
    }
    Ok(())
}

/// The Debian release whose compiler and libraries the kernel's headers ask for.
fn suites_of(release: &str) -> Suites {
    let debian =
        release.split_once("+deb").and_then(|(_, rest)| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok());
    match debian {
        None | Some(..=12) => ("bookworm", &[("bookworm", false), ("bookworm-security", true)]),
        Some(13) => TRIXIE,
        Some(_) => ("sid", &[("sid", false)]),
    }
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
