// SPDX-License-Identifier: MIT OR Apache-2.0

//! Available kernels: Debian's cloud kernels and the debug kernel. Resolves a requested version, and brings the kernel into
//! the cache.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package, release_of};
use crate::build_tree::BuildTree;
use crate::cache::{Cache, publish};
use crate::debug_kernel;
use crate::kernel::{Kernel, RECIPE, numbers, pack, series_of};
use crate::report::note;
use crate::version;

/// Returns the build tree for modules of a kernel.
pub(crate) fn build_tree(kernel: &Kernel, cache: &Cache, apt: &Apt<'_>) -> Result<BuildTree> {
    if kernel.debug {
        debug_kernel::build_tree(cache, apt)
    } else {
        BuildTree::of_debian(cache, apt, &kernel.release, &kernel.version)
    }
}

/// Returns the build tree for modules of the kernel that `wanted` means, without fetching the kernel itself.
pub(crate) fn build_tree_of(cache: &Cache, apt: &Apt<'_>, wanted: &str) -> Result<BuildTree> {
    if wanted == debug_kernel::NAME {
        return debug_kernel::build_tree(cache, apt);
    }
    let package = choose(&apt.kernels()?, wanted)?;
    let release = release_of(&package.name).with_context(|| format!("'{}' is not a kernel image", package.name))?;
    BuildTree::of_debian(cache, apt, release, &package.version)
}

/// Returns the series, such as `6.12`, for which Debian has what building modules takes, in ascending order.
pub(crate) fn buildable(apt: &Apt<'_>) -> Result<Vec<String>> {
    let images = apt.kernels()?;
    let mut found = Vec::new();
    for series in series(&images) {
        let package = choose(&images, &series)?;
        if BuildTree::can_be_made(apt, release_of(&package.name).unwrap_or_default())? {
            found.push(series);
        }
    }
    Ok(found)
}

/// Brings the kernel that `wanted` means into the cache: `debug`, or the newest of a version
/// such as `7.3` or `6.12.107`.
pub(crate) fn obtain(cache: &Cache, apt: &Apt<'_>, wanted: &str) -> Result<Kernel> {
    if wanted == debug_kernel::NAME {
        return debug_kernel::obtain(cache, apt);
    }
    let package = choose(&apt.kernels()?, wanted)?;
    let release =
        release_of(&package.name).with_context(|| format!("'{}' is not a kernel image", package.name))?.to_owned();
    let dir = cache.dir("kernels")?.join(format!("{release}_{}_r{RECIPE}", package.version));
    let kernel = Kernel::packed(release, package.version.clone(), false, dir);
    let _lock = cache.lock("kernel")?;
    if !kernel.dir.is_dir() {
        fetch(&kernel, cache, apt, &package)?;
    }
    Ok(kernel)
}

/// Fetches the packages of a kernel, and packs it.
fn fetch(kernel: &Kernel, cache: &Cache, apt: &Apt<'_>, package: &Package) -> Result<()> {
    note(format_args!("fetching Linux {} ({})", kernel.release, kernel.version));
    cache.need_room(600, "unpacking a kernel")?;
    let temporary = cache.temporary("kernel")?;
    let tree = temporary.path().join("tree");
    let made = temporary.path().join("made");
    // From 7.x on the image package is empty and depends on those that hold the files.
    apt.fetch_into(&package.name, &package.version, &tree)?;
    let suffix = format!("{}-cloud-amd64", upstream_name(&kernel.release));
    for part in ["linux-base-", "linux-binary-", "linux-modules-"] {
        let name = format!("{part}{suffix}");
        if package.depends.contains(&name) {
            apt.fetch_into(&name, &package.version, &tree)?;
        }
    }

    // The place of both has moved over the years.
    let modules = ["usr/lib/modules", "lib/modules"]
        .map(|dir| tree.join(dir))
        .into_iter()
        .find(|dir| dir.join(&kernel.release).is_dir());
    let vmlinuz = [
        tree.join("boot").join(format!("vmlinuz-{}", kernel.release)),
        tree.join("usr/lib/modules").join(&kernel.release).join("vmlinuz"),
    ]
    .into_iter()
    .find(|file| file.is_file());
    let (Some(vmlinuz), Some(modules)) = (vmlinuz, modules) else {
        bail!(
            "{} {} has no vmlinuz or no modules for {}: unknown layout \
             of packages",
            package.name,
            package.version,
            kernel.release
        );
    };
    pack(cache, &kernel.release, &vmlinuz, &modules, &made)?;
    publish(&made, &kernel.dir)
}

/// The release without Debian's flavour, as the split packages are named.
fn upstream_name(release: &str) -> &str {
    release.strip_suffix("-cloud-amd64").unwrap_or(release)
}

/// The newest image that `wanted` means: a whole release, or the first numbers of its version.
fn choose(images: &[Package], wanted: &str) -> Result<Package> {
    let wanted_numbers = numbers(wanted);
    let plain = wanted.chars().all(|c| c.is_ascii_digit() || c == '.');
    let matches = |image: &&Package| {
        let Some(release) = release_of(&image.name) else {
            return false;
        };
        // Meta packages ("linux-image-6.12-cloud-amd64") hold no kernel.
        let full = numbers(release).len() > 2;
        let exact = release == wanted || release.strip_suffix("-cloud-amd64") == Some(wanted);
        // The image's own version has the point release also where the name has only "6.1.0-56".
        let upstream = numbers(&image.version);
        full && (exact || plain && !wanted_numbers.is_empty() && upstream.starts_with(&wanted_numbers))
    };
    images.iter().filter(matches).max_by(|a, b| version::compare(&a.version, &b.version)).cloned().with_context(|| {
        format!(
            "there is no kernel '{wanted}'; there are {}, exact versions of these, and {}",
            series(images).join(", "),
            debug_kernel::NAME
        )
    })
}

fn series(images: &[Package]) -> Vec<String> {
    let numbers: BTreeSet<(u32, u32)> = images.iter().filter_map(|image| series_of(release_of(&image.name)?)).collect();
    numbers.iter().map(|(major, minor)| format!("{major}.{minor}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(release: &str, version: &str) -> Package {
        Package { name: format!("linux-image-{release}-cloud-amd64"), version: version.into(), depends: Vec::new() }
    }

    fn offered() -> Vec<Package> {
        vec![
            image("6.1.0-9", "6.1.27-1"),
            image("6.1.0-56", "6.1.192-2"),
            image("6.12", "6.12.117-1"),
            image("6.12.107+deb13", "6.12.107-1"),
            image("6.12.117+deb12", "6.12.117-1~deb12u1"),
            image("6.12.117+deb13", "6.12.117-1"),
            image("6.16.12+deb13", "6.16.12-1~bpo13+1"),
            image("7.2.9+deb13", "7.2.9-1~bpo13+1"),
            image("7.2.13+deb14", "7.2.13-1"),
            image("7.3.4+deb13", "7.3.4-1~bpo13+1"),
        ]
    }

    fn chosen(wanted: &str) -> Option<String> {
        choose(&offered(), wanted).ok().and_then(|package| release_of(&package.name).map(str::to_owned))
    }

    #[test]
    fn the_newest_of_a_series_is_chosen() {
        for (wanted, release) in [
            ("6.1", "6.1.0-56-cloud-amd64"),
            ("6.12", "6.12.117+deb13-cloud-amd64"),
            ("6.12.107", "6.12.107+deb13-cloud-amd64"),
            ("6.12.117+deb12", "6.12.117+deb12-cloud-amd64"),
            ("6.1.27", "6.1.0-9-cloud-amd64"),
            ("7.2", "7.2.13+deb14-cloud-amd64"),
            ("7", "7.3.4+deb13-cloud-amd64"),
            ("7.3.4+deb13-cloud-amd64", "7.3.4+deb13-cloud-amd64"),
        ] {
            assert_eq!(chosen(wanted).as_deref(), Some(release), "{wanted}");
        }
    }

    #[test]
    fn what_does_not_exist_is_refused_with_a_list() {
        for wanted in ["", "6.13", "7.30", "x", "7.3x", ".", "-1"] {
            assert_eq!(chosen(wanted), None, "{wanted}");
        }
        let error = choose(&offered(), "9.9").map(drop).unwrap_err().to_string();
        assert!(error.contains("6.1, 6.12, 6.16, 7.2, 7.3"), "{error}");
    }
}
