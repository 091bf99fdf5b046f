// SPDX-License-Identifier: MIT OR Apache-2.0

//! The cache: everything that is made once and used again lives under one directory, appears there
//! only when it is whole, and is named after what it was made from.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

use crate::process::{TemporaryDir, remove_tree};
use crate::report::note;

/// The cache directory.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    root: PathBuf,
}

/// Held while something is being made; another run waits for it.
#[derive(Debug)]
pub(crate) struct Lock(#[expect(dead_code, reason = "its end releases the lock")] Flock<File>);

impl Cache {
    /// `$UBLK_VM_CACHE`, or `ublk-vm` in the user's cache directory.
    pub(crate) fn open() -> Result<Self> {
        let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let root = if let Some(dir) = set("UBLK_VM_CACHE") {
            PathBuf::from(dir)
        } else if let Some(dir) = set("XDG_CACHE_HOME") {
            PathBuf::from(dir).join("ublk-vm")
        } else if let Some(home) = set("HOME") {
            PathBuf::from(home).join(".cache/ublk-vm")
        } else {
            bail!(
                "no directory for the cache: none of UBLK_VM_CACHE, XDG_CACHE_HOME and HOME is set; \
                 set UBLK_VM_CACHE to a directory with a few GiB of space"
            );
        };
        fs::create_dir_all(&root).with_context(|| {
            format!("cannot make the cache directory {}; set UBLK_VM_CACHE to a writable directory", root.display())
        })?;
        let root = root.canonicalize().with_context(|| format!("cannot resolve {}", root.display()))?;
        if root.to_string_lossy().contains(',') {
            // QEMU's option syntax splits at commas.
            bail!(
                "the cache path {} has a comma, which QEMU's options cannot contain; set UBLK_VM_CACHE",
                root.display()
            );
        }
        let cache = Self { root };
        cache.sweep();
        Ok(cache)
    }

    /// A directory of the cache, made if need be.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// Takes the lock `name`; says so when another run holds it.
    pub(crate) fn lock(&self, name: &str) -> Result<Lock> {
        let path = self.dir("locks")?.join(name);
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => held,
            Err((file, _)) => {
                note(format_args!("another run is preparing the {name}: waiting for it"));
                Flock::lock(file, FlockArg::LockExclusive)
                    .map_err(|(_, errno)| errno)
                    .with_context(|| format!("cannot lock {}", path.display()))?
            }
        };
        Ok(Lock(held))
    }

    /// A fresh temporary directory on the cache's file system, so that a rename can publish from it.
    pub(crate) fn temporary(&self, purpose: &str) -> Result<TemporaryDir> {
        let stamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        let name = format!("{}-{purpose}-{stamp:x}", std::process::id());
        TemporaryDir::create(self.dir("tmp")?.join(name))
    }

    /// Removes temporary directories whose owner is gone without having removed them.
    fn sweep(&self) {
        let Ok(entries) = fs::read_dir(self.root.join("tmp")) else {
            return;
        };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let owner = name.split('-').next().unwrap_or_default();
            if !owner.is_empty() && !Path::new("/proc").join(owner).exists() {
                remove_tree(&entry.path());
            }
        }
    }

    /// Fails early, with the numbers, if the cache's file system lacks room.
    pub(crate) fn need_room(&self, mebibytes: u64, purpose: &str) -> Result<()> {
        let room = nix::sys::statvfs::statvfs(&self.root)
            .with_context(|| format!("cannot ask for the free space of {}", self.root.display()))?;
        let free = (room.fragment_size() * room.blocks_available()) >> 20;
        if free < mebibytes {
            bail!(
                "{purpose} needs about {mebibytes} MiB in {}, which has {free} MiB free: make room, \
                 or set UBLK_VM_CACHE to another file system",
                self.root.display()
            );
        }
        Ok(())
    }
}

/// Moves a finished thing to its name in the cache.
pub(crate) fn publish(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).with_context(|| format!("cannot move {} to {}", from.display(), to.display()))
}

/// Marks a file as used now; [`prune`] goes by it.
pub(crate) fn touch(path: &Path) {
    if let Ok(file) = File::options().append(true).open(path) {
        let _ = file.set_modified(SystemTime::now());
    }
}

/// Keeps the `keep` files that were used last and those used within the last hour (a run that is
/// just starting may be about to open one).
pub(crate) fn prune(dir: &Path, keep: usize) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let mut files: Vec<(SystemTime, PathBuf)> =
        entries.flatten().filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path()))).collect();
    files.sort();
    let fresh = SystemTime::now() - Duration::from_secs(3600);
    let surplus = files.len().saturating_sub(keep);
    for (used, path) in files.into_iter().take(surplus) {
        if used < fresh {
            remove_tree(&path);
        }
    }
}

/// A hash over named parts, as the name of what is made from them.
#[derive(Debug, Default)]
pub(crate) struct Fingerprint(Sha256);

impl Fingerprint {
    /// Adds a labelled value; lengths are hashed too, so that parts cannot run into each other.
    pub(crate) fn add(&mut self, label: &str, value: impl AsRef<[u8]>) -> &mut Self {
        let value = value.as_ref();
        for part in [label.as_bytes(), value] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    /// Adds a file (name, executable or not, content), a link, or a directory with all it holds in
    /// the order of names. Nothing is added for what does not exist.
    pub(crate) fn add_tree(&mut self, path: &Path, skip: &dyn Fn(&str) -> bool) -> Result<&mut Self> {
        self.walk(path, "", skip)?;
        Ok(self)
    }

    fn walk(&mut self, path: &Path, name: &str, skip: &dyn Fn(&str) -> bool) -> Result<()> {
        let describe = || format!("cannot read {}", path.display());
        let Ok(meta) = path.symlink_metadata() else {
            return Ok(());
        };
        if meta.is_symlink() {
            let target = fs::read_link(path).with_context(describe)?;
            self.add(name, target.as_os_str().as_encoded_bytes());
        } else if meta.is_dir() {
            let mut children: Vec<_> =
                fs::read_dir(path).with_context(describe)?.collect::<std::io::Result<_>>().with_context(describe)?;
            children.sort_by_key(fs::DirEntry::file_name);
            for child in children {
                let file_name = child.file_name().to_string_lossy().into_owned();
                if !skip(&file_name) {
                    self.walk(&child.path(), &format!("{name}/{file_name}"), skip)?;
                }
            }
        } else {
            let mode = meta.permissions().mode() & 0o111;
            self.add(name, format!("{mode:o} {}", meta.len()));
            let mut file = File::open(path).with_context(describe)?;
            let mut buffer = vec![0; 1 << 17];
            loop {
                let count = file.read(&mut buffer).with_context(describe)?;
                if count == 0 {
                    break;
                }
                self.0.update(&buffer[..count]);
            }
        }
        Ok(())
    }

    /// The hash, short enough for a file name.
    pub(crate) fn finish(&self) -> String {
        let mut text = String::new();
        for byte in &self.0.clone().finalize()[..10] {
            text.push_str(&format!("{byte:02x}"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_into_each_other() {
        let hash = |a: &str, b: &str| Fingerprint::default().add(a, b).finish();
        assert_eq!(hash("a", "b"), hash("a", "b"));
        assert_ne!(hash("ab", ""), hash("a", "b"));
        assert_ne!(hash("", "ab"), hash("a", "b"));
    }

    #[test]
    fn a_tree_is_its_names_modes_and_contents() -> Result<()> {
        let dir =
            TemporaryDir::create(std::env::temp_dir().join(format!("ublk-vm-cache-test-{}", std::process::id())))?;
        let hash = || -> Result<String> {
            Ok(Fingerprint::default().add_tree(dir.path(), &|name| name == "skipped")?.finish())
        };
        let empty = hash()?;
        fs::write(dir.path().join("skipped"), "x")?;
        assert_eq!(hash()?, empty);
        let file = dir.path().join("file");
        fs::write(&file, "one")?;
        let one = hash()?;
        assert_ne!(one, empty);
        fs::write(&file, "two")?;
        assert_ne!(hash()?, one);
        fs::write(&file, "one")?;
        assert_eq!(hash()?, one);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
        assert_ne!(hash()?, one);
        Ok(())
    }
}
