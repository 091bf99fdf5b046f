// SPDX-License-Identifier: MIT OR Apache-2.0

//! The strict build of kmod/: for each kernel with the compiler's extra warnings and sparse, and
//! checkpatch over its sources. Whatever any of them says about our files is a failure.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::Apt;
use crate::build_tree::BuildTree;
use crate::cache::{Cache, publish};
use crate::catalog;
use crate::cli::Kmod;
use crate::debug_kernel::SOURCE;
use crate::driver;
use crate::process::{answer, run_quietly};
use crate::report::note;
use crate::repository;
use crate::tree::copy_tree;

/// There are complaints.
const COMPLAINTS: u8 = 1;

/// Advice of checkpatch that does not fit a driver which is built for several kernels: not to ask for
/// the version, and to use what only the newest have.
const IGNORED: &str = "LINUX_VERSION_CODE,ALLOC_WITH_SIZEOF";

/// Builds for all kernels that `options` names and looks at the style; the exit status.
pub(crate) fn check(cache: &Cache, options: &Kmod) -> Result<u8> {
    let repository = &repository::find()?;
    let source = driver::source(repository)?;
    let apt = Apt::open(cache)?;
    let kernels = if options.kernels.is_empty() { catalog::buildable(&apt)? } else { options.kernels.clone() };
    let mut failed = Vec::new();
    let mut newest = None;
    for kernel in &kernels {
        let tree = {
            let _lock = cache.lock("driver")?;
            catalog::build_tree_of(cache, &apt, kernel)?
        };
        if !build(cache, &source, &tree, kernel, &[])? {
            failed.push(format!("Linux {kernel}"));
        }
        newest = Some((tree, kernel));
    }
    if let Some((tree, kernel)) = newest {
        if !build(cache, &source, &tree, kernel, &["UBLK_DEBUG=1"])? {
            failed.push(format!("Linux {kernel} with assertions"));
        }
        if !style(cache, &apt, &source, &tree)? {
            failed.push("checkpatch".to_owned());
        }
    }
    if failed.is_empty() {
        return Ok(0);
    }
    note(format_args!("warnings about kmod/: {}", failed.join(", ")));
    Ok(COMPLAINTS)
}

/// Whether a strict build for one kernel says nothing.
fn build(cache: &Cache, source: &Path, tree: &BuildTree, kernel: &str, words: &[&str]) -> Result<bool> {
    note(format_args!("kmod/ for Linux {kernel}: compiler and sparse {}", words.join(" ")));
    let temporary = cache.temporary("kmod")?;
    let work = temporary.path().join("kmod");
    copy_tree(source, &work)?;
    // C=1 would ask a script of the kernel's that Debian's headers lack whether sparse is there.
    let (success, text) = answer(&mut tree.make(&work, &[&["W=1", "KBUILD_CHECKSRC=1"], words].concat()))?;
    let complaints = if success { complaints(&text) } else { text.lines().collect() };
    show(&complaints);
    Ok(success && complaints.is_empty())
}

/// Lines of a build that complain about our files, with what explains them. What sparse says about
/// the kernel's own headers is not ours to mend.
fn complaints(text: &str) -> Vec<&str> {
    text.lines()
        .filter(|line| {
            let Some(at) = ["warning:", "WARNING:", "error:", "ERROR:"].iter().find_map(|word| line.find(word)) else {
                return false;
            };
            let place = &line[..at];
            let of_kernel = ["/usr/", "./", "../", "include/", "arch/"].iter().any(|dir| place.starts_with(dir));
            !of_kernel
        })
        .collect()
}

/// Whether checkpatch says nothing.
fn style(cache: &Cache, apt: &Apt<'_>, source: &Path, tree: &BuildTree) -> Result<bool> {
    note("kmod/: checkpatch");
    let temporary = cache.temporary("style")?;
    let kmod = temporary.path().join("kmod");
    copy_tree(source, &kmod)?;
    copy_tree(&scripts(cache, apt)?, &temporary.path().join("scripts"))?;
    // From inside of kmod/: what it asks of a file depends on its path in the kernel's tree.
    let script =
        "cd /mnt/kmod || exit 9; set -- $(find . -name '*.[ch]' -printf '%P\\n' | sort); [ $# -gt 0 ] || exit 9
        exec perl ../scripts/checkpatch.pl --no-tree --strict --terse --no-summary --show-types \
            --ignore=\"$IGNORED\" -f \"$@\"";
    let mut command = tree.command(temporary.path(), &["sh", "-c", script]);
    let (success, text) = answer(command.env("IGNORED", IGNORED))?;
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    show(&lines);
    Ok(success && lines.is_empty())
}

/// checkpatch and its word lists, out of the newest kernel's source.
fn scripts(cache: &Cache, apt: &Apt<'_>) -> Result<PathBuf> {
    let package = apt.newest(SOURCE)?;
    let place = cache.dir("tools")?.join(format!("checkpatch_{}", package.version));
    if place.is_dir() {
        return Ok(place);
    }
    let source = apt.unpacked(SOURCE)?.join("usr/src").join(format!("{SOURCE}.tar.xz"));
    let temporary = cache.temporary("checkpatch")?;
    run_quietly(
        Command::new("tar")
            .args(["-x", "--no-same-owner", "--strip-components=1", "--wildcards", "-f"])
            .arg(&source)
            .arg("-C")
            .arg(temporary.path())
            .args(["*/scripts/checkpatch.pl", "*/scripts/spelling.txt", "*/scripts/const_structs.checkpatch"]),
    )
    .context("cannot unpack checkpatch")?;
    let scripts = temporary.path().join("scripts");
    fs::metadata(scripts.join("checkpatch.pl")).context("the kernel's source has no checkpatch")?;
    publish(&scripts, &place)?;
    Ok(place)
}

fn show(lines: &[&str]) {
    for line in lines {
        eprintln!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::complaints;

    #[test]
    fn what_is_said_about_our_files_counts() {
        for line in [
            "queue.c:12:3: warning: unused variable 'x' [-Wunused-variable]",
            "/mnt/queue.c:12:3: warning: symbol 'x' was not declared. Should it be static?",
            "compat/v6.h:1:1: error: bad constant",
            "WARNING: modpost: missing MODULE_DESCRIPTION() in ublk_drv.o",
            "ERROR: modpost: \"x\" [ublk_drv.ko] undefined!",
        ] {
            assert_eq!(complaints(line), [line]);
        }
    }

    #[test]
    fn what_is_said_about_the_kernels_does_not() {
        for line in [
            "/usr/src/linux-headers-7.3.4-common/include/linux/x.h:1:1: warning: bad",
            "./include/linux/x.h:1:1: error: bad",
            "include/linux/x.h:1:1: error: bad",
            "  CC [M]  warnings.o",
            "Skipping BTF generation for ublk_drv.ko due to unavailability of vmlinux",
        ] {
            assert_eq!(complaints(line), [""; 0], "{line}");
        }
    }
}
