// SPDX-License-Identifier: MIT OR Apache-2.0

//! Kernels: which one a request means, and the files that booting it takes. They are Debian's cloud
//! kernels, and the debug kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::apt::{Apt, Package};
use crate::build_tree::BuildTree;
use crate::cache::{Cache, publish};
use crate::debug_kernel;
use crate::image;
use crate::process::{output, run_quietly};
use crate::report::note;
use crate::version;

/// To be counted up when what is kept of a kernel changes.
const RECIPE: u32 = 1;

/// Modules that the first user space needs, before the root file system is there.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console", "ext4"];

/// A kernel in the cache, ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// What `uname -r` will say.
    pub(crate) release: String,
    /// The Debian package version.
    pub(crate) version: String,
    /// Whether it is the one that looks for mistakes while it runs.
    pub(crate) debug: bool,
    dir: PathBuf,
}

impl Kernel {
    /// The compressed kernel.
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The disk image that the guest mounts at /usr/lib/modules.
    pub(crate) fn modules_image(&self) -> PathBuf {
        self.dir.join("modules.img")
    }

    /// The first two numbers of the version, such as `6.12`.
    pub(crate) fn series(&self) -> String {
        series_of(&self.release).map_or_else(String::new, |(major, minor)| format!("{major}.{minor}"))
    }

    /// The modules of the first user space, uncompressed, in the order they are inserted.
    pub(crate) fn boot_modules(&self) -> Result<Vec<PathBuf>> {
        let dir = self.dir.join("boot");
        let mut modules: Vec<PathBuf> = fs::read_dir(&dir)
            .with_context(|| format!("cannot read {}", dir.display()))?
            .flatten()
            .map(|entry| entry.path())
            .collect();
        modules.sort();
        Ok(modules)
    }

    /// Whether the kernel brings the module `name`.
    pub(crate) fn has_module(&self, name: &str) -> Result<bool> {
        let path = self.dir.join("modules.dep");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(ModuleIndex::parse(&text).find(name).is_some())
    }

    /// What tells it from every other kernel, also from one of the same version.
    pub(crate) fn identity(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A place to build modules for it in.
    pub(crate) fn build_tree(&self, cache: &Cache, apt: &Apt<'_>) -> Result<BuildTree> {
        if self.debug {
            debug_kernel::build_tree(cache, apt)
        } else {
            BuildTree::of_debian(cache, apt, &self.release, &self.version)
        }
    }

    /// A place to build modules in for the kernel that `wanted` means; the kernel itself is not
    /// fetched.
    pub(crate) fn build_tree_of(cache: &Cache, apt: &Apt<'_>, wanted: &str) -> Result<BuildTree> {
        if wanted == debug_kernel::NAME {
            return debug_kernel::build_tree(cache, apt);
        }
        let package = choose(&apt.kernels()?, wanted)?;
        let release = release_of(&package.name).with_context(|| format!("'{}' is not a kernel image", package.name))?;
        BuildTree::of_debian(cache, apt, release, &package.version)
    }

    /// The series that Debian offers together with what building modules takes, such as `6.12`, in
    /// ascending order.
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

    /// The kernel that was packed in `dir`.
    pub(crate) fn packed(release: String, version: String, debug: bool, dir: PathBuf) -> Self {
        Self { release, version, debug, dir }
    }

    /// Brings the kernel that `wanted` means into the cache: `debug`, or the newest of a version
    /// such as `7.3` or `6.12.107`.
    pub(crate) fn obtain(cache: &Cache, apt: &Apt<'_>, wanted: &str) -> Result<Self> {
        if wanted == debug_kernel::NAME {
            return debug_kernel::obtain(cache, apt);
        }
        let package = choose(&apt.kernels()?, wanted)?;
        let release =
            release_of(&package.name).with_context(|| format!("'{}' is not a kernel image", package.name))?.to_owned();
        let dir = cache.dir("kernels")?.join(format!("{release}_{}_r{RECIPE}", package.version));
        let kernel = Self::packed(release, package.version.clone(), false, dir);
        let _lock = cache.lock("kernel")?;
        if !kernel.dir.is_dir() {
            kernel.make(cache, apt, &package)?;
        }
        Ok(kernel)
    }

    fn make(&self, cache: &Cache, apt: &Apt<'_>, package: &Package) -> Result<()> {
        note(format_args!("fetching Linux {} ({})", self.release, self.version));
        cache.need_room(600, "unpacking a kernel")?;
        let temporary = cache.temporary("kernel")?;
        let tree = temporary.path().join("tree");
        let made = temporary.path().join("made");
        // From 7.x on the image package is empty and depends on those that hold the files.
        apt.fetch_into(&package.name, &package.version, &tree)?;
        let suffix = format!("{}-cloud-amd64", self.upstream_name());
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
            .find(|dir| dir.join(&self.release).is_dir());
        let vmlinuz = [
            tree.join("boot").join(format!("vmlinuz-{}", self.release)),
            tree.join("usr/lib/modules").join(&self.release).join("vmlinuz"),
        ]
        .into_iter()
        .find(|file| file.is_file());
        let (Some(vmlinuz), Some(modules)) = (vmlinuz, modules) else {
            bail!(
                "{} {} has no vmlinuz or no modules for {}: unknown layout \
                 of packages",
                package.name,
                package.version,
                self.release
            );
        };
        pack(cache, &self.release, &vmlinuz, &modules, &made)?;
        publish(&made, &self.dir)
    }

    /// The release without Debian's flavour, as the split packages are named.
    fn upstream_name(&self) -> &str {
        self.release.strip_suffix("-cloud-amd64").unwrap_or(&self.release)
    }
}

/// Moves a kernel and its directory of modules (which holds one named after the release) to `made`,
/// in the form that booting takes.
pub(crate) fn pack(cache: &Cache, release: &str, vmlinuz: &Path, modules: &Path, made: &Path) -> Result<()> {
    let boot = made.join("boot");
    fs::create_dir_all(&boot).with_context(|| format!("cannot make {}", boot.display()))?;
    fs::rename(vmlinuz, made.join("vmlinuz")).context("cannot move the kernel")?;
    // depmod looks below <base>/lib/modules.
    let base = cache.temporary("modules")?;
    let lib = base.path().join("lib");
    fs::create_dir_all(&lib).context("cannot make a directory in the cache")?;
    let all = lib.join("modules");
    fs::rename(modules, &all).context("cannot move the modules")?;
    run_quietly(
        Command::new(crate::process::which("depmod").unwrap_or_else(|| "depmod".into()))
            .arg("-b")
            .arg(base.path())
            .arg(release),
    )?;
    let home = all.join(release);
    keep_boot_modules(&home, &boot).with_context(|| format!("cannot prepare the boot modules of {release}"))?;
    fs::copy(home.join("modules.dep"), made.join("modules.dep")).context("cannot copy modules.dep")?;
    let size = image::size_of(&all)?;
    image::from_dir(&all, &made.join("modules.img"), "modules", size + size / 4 + 16)
}

/// The kernel release that an image package holds, if it is one that this program boots.
pub(crate) fn release_of(package: &str) -> Option<&str> {
    let release = package.strip_prefix("linux-image-")?;
    (release.ends_with("-cloud-amd64") && release.starts_with(|c: char| c.is_ascii_digit())).then_some(release)
}

/// Numbers at the start of a version: `6.12.107+deb13-...` gives 6, 12, 107.
fn numbers(version: &str) -> Vec<u32> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    version[..end].split('.').map_while(|part| part.parse().ok()).collect()
}

fn series_of(release: &str) -> Option<(u32, u32)> {
    match numbers(release)[..] {
        [major, minor, _, ..] => Some((major, minor)),
        _ => None,
    }
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

/// Copies the boot modules and what they depend on, uncompressed, numbered in insertion order.
fn keep_boot_modules(home: &Path, into: &Path) -> Result<()> {
    let read = |name: &str| {
        let path = home.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let index = ModuleIndex::parse(&read("modules.dep")?);
    // Comes in a package that is not always left in the archive; then what is no module is taken
    // for built in.
    let builtin = read("modules.builtin").ok().map(|text| ModuleIndex::parse(&text.replace('\n', ":\n")));
    let mut order: Vec<String> = Vec::new();
    for name in BOOT_MODULES {
        if let Some(path) = index.find(name) {
            for needed in index.with_dependencies(path) {
                if !order.contains(&needed) {
                    order.push(needed);
                }
            }
        } else if builtin.as_ref().is_some_and(|list| list.find(name).is_none()) {
            bail!("the kernel has no {name}, neither as a module nor built in");
        }
    }
    for (number, path) in order.iter().enumerate() {
        let name = module_name(path);
        let target = into.join(format!("{number:02}-{name}.ko"));
        let source = home.join(path);
        let unpack = match source.extension().and_then(|extension| extension.to_str()) {
            Some("xz") => Some("xz"),
            Some("zst") => Some("zstd"),
            _ => None,
        };
        fs::copy(&source, &target).with_context(|| format!("cannot copy {}", source.display()))?;
        if let Some(tool) = unpack {
            let packed = into.join(format!("packed.{tool}"));
            fs::rename(&target, &packed).context("cannot rename a module")?;
            output(
                Command::new("sh").args(["-c", "exec \"$1\" -dc <\"$2\" >\"$3\"", "sh", tool]).args([&packed, &target]),
            )?;
            fs::remove_file(&packed).context("cannot remove a packed module")?;
        }
    }
    Ok(())
}

/// modules.dep: for each module, what has to be loaded before it (the last one first).
struct ModuleIndex(BTreeMap<String, (String, Vec<String>)>);

impl ModuleIndex {
    fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| {
                    let (path, needs) = line.split_once(':')?;
                    let needs = needs.split_whitespace().map(str::to_owned).collect();
                    Some((module_name(path), (path.to_owned(), needs)))
                })
                .collect(),
        )
    }

    fn find(&self, name: &str) -> Option<&str> {
        self.0.get(&name.replace('-', "_")).map(|(path, _)| path.as_str())
    }

    fn with_dependencies(&self, path: &str) -> Vec<String> {
        let needs = self.0.get(&module_name(path)).map(|(_, needs)| needs);
        needs.into_iter().flatten().rev().cloned().chain([path.to_owned()]).collect()
    }
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
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

    #[test]
    fn only_signed_cloud_images_are_kernels() {
        assert!(release_of("linux-image-7.3.4+deb13-cloud-amd64").is_some());
        for name in [
            "linux-image-cloud-amd64",
            "linux-image-7.3.4+deb13-amd64",
            "linux-image-7.3.4+deb13-cloud-amd64-dbg",
            "linux-image-6.1.0-56-cloud-amd64-unsigned",
        ] {
            assert_eq!(release_of(name), None, "{name}");
        }
    }

    #[test]
    fn modules_come_after_what_they_need() {
        let index = ModuleIndex::parse(
            "kernel/fs/ext4/ext4.ko.xz: kernel/fs/jbd2/jbd2.ko.xz kernel/lib/crc-16.ko.xz\n\
             kernel/lib/crc-16.ko.xz:\n",
        );
        let path = index.find("ext4").unwrap();
        assert_eq!(
            index.with_dependencies(path),
            ["kernel/lib/crc-16.ko.xz", "kernel/fs/jbd2/jbd2.ko.xz", "kernel/fs/ext4/ext4.ko.xz"]
        );
        assert_eq!(index.find("crc-16"), index.find("crc_16"));
        assert_eq!(index.find("xfs"), None);
    }
}
