// SPDX-License-Identifier: MIT OR Apache-2.0

//! A kernel in the cache: the files that booting it takes, and how they are packed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::image;
use crate::process::{output, run_quietly};

/// To be counted up when what is kept of a kernel changes.
pub(crate) const RECIPE: u32 = 1;

/// Modules that the first user space needs, before the root file system is there.
const BOOT_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console", "ext4"];

/// A kernel in the cache, ready to boot.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    /// The output of `uname -r`.
    pub(crate) release: String,
    /// The Debian package version.
    pub(crate) version: String,
    /// Whether it has the debug configuration.
    pub(crate) debug: bool,
    /// Directory of its files.
    pub(crate) dir: PathBuf,
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

    /// Returns whether the kernel has the module `name`.
    pub(crate) fn has_module(&self, name: &str) -> Result<bool> {
        let path = self.dir.join("modules.dep");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(ModuleIndex::parse(&text).find(name).is_some())
    }

    /// A name that no other kernel has, not even one of the same version.
    pub(crate) fn identity(&self) -> String {
        self.dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The kernel that was packed in `dir`.
    pub(crate) fn packed(release: String, version: String, debug: bool, dir: PathBuf) -> Self {
        Self { release, version, debug, dir }
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

/// Numbers at the start of a version: `6.12.107+deb13-...` gives 6, 12, 107.
pub(crate) fn numbers(version: &str) -> Vec<u32> {
    let end = version.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(version.len());
    version[..end].split('.').map_while(|part| part.parse().ok()).collect()
}

/// The first two numbers of a release's version; `None` for a meta package's, which has no more.
pub(crate) fn series_of(release: &str) -> Option<(u32, u32)> {
    match numbers(release)[..] {
        [major, minor, _, ..] => Some((major, minor)),
        _ => None,
    }
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
