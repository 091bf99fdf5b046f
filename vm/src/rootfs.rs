// SPDX-License-Identifier: MIT OR Apache-2.0

//! The guest's root file system: Debian trixie with what the tests call, one image for all kernels.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::apt::{Mirrors, transport_options};
use crate::cache::{Cache, Fingerprint, publish, touch};
use crate::host::{self, as_root};
use crate::image;
use crate::process::run_quietly;
use crate::report::note;

/// To be counted up when the way the image is made changes.
const RECIPE: u32 = 1;

/// The Debian release in the guest.
const SUITE: &str = "trixie";

/// Size of the guest's root disk, in MiB; the image is sparse.
const SIZE: u64 = 16 << 10;

/// What is installed besides the essential packages.
const PACKAGES: &[&str] = &[
    "bpftrace",
    "btrfs-progs",
    "e2fsprogs",
    "fdisk",
    "fio",
    "jq",
    "kmod",
    // Thousands of files for the demo to copy.
    "libpython3.13-testsuite",
    // Benchmarks compare with them.
    "nbd-client",
    "nbdkit",
    "nbdkit-plugin-python",
    "parted",
    "procps",
    "psmisc",
    "python3",
    "python3-numpy",
    "python3-pytest",
    "rsync",
    "strace",
    "udev",
    "util-linux",
    "xfsprogs",
];

/// What nobody reads in a throw-away machine.
const LEFT_OUT: &[&str] = &["/usr/share/doc/*", "/usr/share/info/*", "/usr/share/locale/*", "/usr/share/man/*"];

/// The image in the cache, made if it is not there.
pub(crate) fn obtain(cache: &Cache) -> Result<PathBuf> {
    let mut name = Fingerprint::default();
    name.add("recipe", RECIPE.to_string())
        .add("suite", SUITE)
        .add("size", SIZE.to_string())
        .add("packages", PACKAGES.join(" "))
        .add("left out", LEFT_OUT.join(" "));
    let image = cache.dir("rootfs")?.join(format!("{}.img", name.finish()));
    let _lock = cache.lock("root file system")?;
    if image.is_file() {
        touch(&image);
    } else {
        make(cache, &image)?;
    }
    Ok(image)
}

fn make(cache: &Cache, image: &std::path::Path) -> Result<()> {
    host::require(host::ROOTFS)?;
    cache.need_room(2500, "making the guest's root file system")?;
    note(format_args!(
        "making the guest's root file system (Debian {SUITE}, {} packages named; a minute or two)",
        PACKAGES.len()
    ));
    let temporary = cache.temporary("rootfs")?;
    let archive = temporary.path().join("root.tar");
    let tree = temporary.path().join("tree");
    fs::create_dir(&tree).with_context(|| format!("cannot make {}", tree.display()))?;

    let mut command = Command::new("mmdebstrap");
    command
        .args(["--quiet", "--variant=minbase", "--architectures=amd64"])
        .arg(format!("--include={}", PACKAGES.join(",")))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .env("TMPDIR", temporary.path());
    for option in transport_options() {
        command.arg(format!("--aptopt={option}"));
    }
    for path in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={path}"));
    }
    let sources = Mirrors::of_host()?.sources(&[(SUITE, false), ("trixie-security", true)], "");
    command.arg(SUITE).arg(&archive).args(sources);
    run_quietly(&mut command).context("cannot make the guest's root file system")?;

    // One session from archive to image: files keep their owners, and fakeroot, which stands in
    // for root where a user runs this, remembers them only as long as it runs.
    let script = format!(
        "set -e; tar -xpf \"$1\" -C \"$2\" --exclude='./dev/*'; rm -f \"$1\"; cd \"$2\"
        chmod -R u+rX .
        mkdir -p opt/ublk results usr/lib/modules; rm -rf var/lib/apt/lists var/cache/apt
        echo ublk-vm >etc/hostname; echo '127.0.0.1 localhost ublk-vm' >etc/hosts
        PATH=$PATH:/usr/sbin:/sbin; exec mke2fs {} -L root -d \"$2\" \"$3\" {SIZE}M",
        image::OPTIONS
    );
    let finished = temporary.path().join("root.img");
    run_quietly(as_root("sh").args(["-c", &script, "sh"]).args([&archive, &tree, &finished]))
        .context("cannot make the image of the guest's root file system")?;
    publish(&finished, image)
}
