// SPDX-License-Identifier: MIT OR Apache-2.0

//! The debug kernel: the source of Debian's newest kernel, built here with what finds wrong memory
//! accesses, wrong locking, leaks and the like while the kernel runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package};
use crate::build_tree::{BuildTree, TRIXIE, bootstrap, enter};
use crate::cache::{Cache, Fingerprint, Lock, publish};
use crate::kernel::{Kernel, pack};
use crate::process::{output, run_quietly};
use crate::report::note;

/// What `--kernel` calls it.
pub(crate) const NAME: &str = "debug";

/// The package with the source.
pub(crate) const SOURCE: &str = "linux-source-7.3";

/// The configuration, beyond what Kconfig does not let one switch off.
const CONFIG: &str = include_str!("../debug.config");

/// What building a whole kernel takes besides the tools for modules.
const PACKAGES: &str = "gcc,libc6-dev,flex,bison,bc,libelf-dev";

/// Leaves of a tree what building modules takes.
const STRIP: &str = include_str!("debug_kernel/strip.sh");

/// To be counted up when the way it is built changes.
const RECIPE: u32 = 1;

/// Where both products are in the cache.
struct Places {
    /// What booting takes.
    kernel: PathBuf,
    /// The root directory that it was built in.
    tree: PathBuf,
}

impl Places {
    fn of(cache: &Cache, source: &Package) -> Result<Self> {
        let mut name = Fingerprint::default();
        name.add("recipe", RECIPE.to_string())
            .add("source", &source.version)
            .add("config", CONFIG)
            .add("packages", PACKAGES);
        let name = format!("{NAME}_{}_{}", source.version, name.finish());
        Ok(Self { kernel: cache.dir("kernels")?.join(&name), tree: cache.dir("build-trees")?.join(&name) })
    }

    fn release(&self) -> Result<String> {
        let path = self.kernel.join("release");
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }
}

/// The kernel in the cache, built if it is not there.
pub(crate) fn obtain(cache: &Cache, apt: &Apt<'_>) -> Result<Kernel> {
    let source = apt.newest(SOURCE)?;
    let places = Places::of(cache, &source)?;
    let _lock = lock(cache)?;
    if !places.kernel.is_dir() {
        build(cache, apt, &places)?;
    }
    Ok(Kernel::packed(places.release()?, source.version, true, places.kernel))
}

/// The place to build modules for it in.
pub(crate) fn build_tree(cache: &Cache, apt: &Apt<'_>) -> Result<BuildTree> {
    let places = Places::of(cache, &apt.newest(SOURCE)?)?;
    let _lock = lock(cache)?;
    if !places.tree.is_dir() || !places.kernel.is_dir() {
        build(cache, apt, &places)?;
    }
    Ok(BuildTree::new(places.tree.clone(), &places.release()?))
}

fn lock(cache: &Cache) -> Result<Lock> {
    cache.lock("debug kernel")
}

fn build(cache: &Cache, apt: &Apt<'_>, places: &Places) -> Result<()> {
    let source = apt.unpacked(SOURCE)?.join("usr/src").join(format!("{SOURCE}.tar.xz"));
    note("building the debug kernel (10 to 30 minutes, once)");
    cache.need_room(8000, "building a kernel")?;
    let temporary = cache.temporary("debug-kernel")?;
    let tree = temporary.path().join("tree");
    bootstrap(cache, apt, TRIXIE, PACKAGES, &tree).context("cannot fetch the compiler of the debug kernel")?;
    let linux = tree.join("usr/src/linux");
    fs::create_dir_all(&linux).with_context(|| format!("cannot make {}", linux.display()))?;
    run_quietly(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--strip-components=1", "-f"])
            .arg(&source)
            .arg("-C")
            .arg(&linux),
    )
    .context("cannot unpack the kernel's source")?;

    let work = temporary.path().join("work");
    fs::create_dir(&work).with_context(|| format!("cannot make {}", work.display()))?;
    let config = work.join("debug.config");
    fs::write(&config, CONFIG).with_context(|| format!("cannot write {}", config.display()))?;
    let make = |words: &[&str]| {
        let jobs = format!("-j{}", std::thread::available_parallelism().map_or(1, usize::from));
        let common = ["make", "-s", "-C", "/usr/src/linux", "O=/usr/src/build", &jobs];
        enter(&tree, &work, &[&common, words].concat())
    };
    fs::create_dir(tree.join("usr/src/build")).context("cannot make a directory in the cache")?;
    run_quietly(&mut make(&["KCONFIG_ALLCONFIG=/mnt/debug.config", "allnoconfig"]))
        .context("cannot configure the debug kernel")?;
    let made = tree.join("usr/src/build/.config");
    let made = fs::read_to_string(&made).with_context(|| format!("cannot read {}", made.display()))?;
    let refused = refused(CONFIG, &made);
    if !refused.is_empty() {
        bail!("{SOURCE} does not take these lines of vm/debug.config: {}", refused.join(", "));
    }
    run_quietly(&mut make(&["bzImage", "modules"])).context("cannot build the debug kernel")?;
    run_quietly(&mut make(&["INSTALL_MOD_PATH=/mnt", "DEPMOD=true", "modules_install"]))
        .context("cannot collect the modules of the debug kernel")?;
    let release = output(&mut make(&["kernelrelease"]))?.trim().to_owned();

    let packed = temporary.path().join("packed");
    let modules = work.join("lib/modules");
    for link in ["build", "source"] {
        let link = modules.join(&release).join(link);
        if link.is_symlink() {
            fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
        }
    }
    let vmlinuz = tree.join("usr/src/build/arch/x86/boot/bzImage");
    pack(cache, &release, &vmlinuz, &modules, &packed)?;
    fs::write(packed.join("release"), &release).context("cannot write the release")?;
    run_quietly(&mut enter(&tree, &work, &["sh", "-c", STRIP, "sh", &release]))
        .context("cannot strip the tree of the debug kernel")?;
    publish_over(&tree, &places.tree)?;
    publish_over(&packed, &places.kernel)
}

/// Lines of the fragment that the finished configuration has not.
fn refused<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has = |line: &str| config.lines().any(|other| other == line);
    fragment.lines().filter(|line| line.starts_with("CONFIG_") && !has(line)).collect()
}

/// Publishes what replaces an older make of the same.
fn publish_over(from: &Path, to: &Path) -> Result<()> {
    crate::process::remove_tree(to);
    publish(from, to)
}

#[cfg(test)]
mod tests {
    use super::{CONFIG, refused};

    #[test]
    fn lines_that_kconfig_drops_are_seen() {
        let fragment = "# CONFIG_Z=y\n\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=5\nCONFIG_D=\"x\"\n";
        assert_eq!(refused(fragment, "CONFIG_A=y\nCONFIG_B=m\nCONFIG_C=5\nCONFIG_D=\"x\"\n"), [""; 0]);
        let changed = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=\"xy\"\n";
        assert_eq!(refused(fragment, changed), ["CONFIG_B=m", "CONFIG_C=5", "CONFIG_D=\"x\""]);
    }

    #[test]
    fn each_option_is_named_once() {
        let mut names: Vec<&str> =
            CONFIG.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
