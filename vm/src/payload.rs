// SPDX-License-Identifier: MIT OR Apache-2.0

//! What of this project goes into the guest: a disk image with the command, the wheel, the tests
//! and the guest's own scripts, mounted at /opt/ublk.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, Fingerprint, prune, publish, touch};
use crate::image;
use crate::process::{output, run, run_quietly, which};
use crate::report::note;
use crate::tree::{copy_tree, is_litter};

/// Examples of the Rust library that tests run in the guest.
const RUST_EXAMPLES: [&str; 2] = ["pull_threads", "pull_tokio"];

/// To be counted up when the layout of the image changes.
const RECIPE: u32 = 2;

/// Room in the image beyond its content, in MiB, for what tests write beside themselves.
const SPARE: u64 = 512;

/// Images that are kept; each edit of the sources makes a new one.
const KEEP: usize = 4;

/// The parts of the payload, as they lie on the host.
#[derive(Debug)]
struct Parts {
    command: Option<PathBuf>,
    /// Built examples of the Rust library.
    examples: Vec<PathBuf>,
    wheel: Option<PathBuf>,
    /// Directories of the repository and their names in the guest.
    folders: Vec<(PathBuf, &'static str)>,
    driver: Option<PathBuf>,
    /// A directory that the user wants in the guest, as it is.
    extra: Option<PathBuf>,
}

/// The payload image for the present sources, made if it is not in the cache.
pub(crate) fn obtain(
    cache: &Cache,
    repository: &Path,
    driver: Option<PathBuf>,
    extra: Option<PathBuf>,
    build: bool,
) -> Result<PathBuf> {
    let _lock = cache.lock("payload")?;
    let target = target_dir(repository);
    let parts = Parts {
        command: command(repository, &target, build)?,
        examples: examples(&target),
        wheel: wheel(cache, repository, &target, build)?,
        folders: vec![
            (repository.join("tests"), "tests"),
            (repository.join("ublk-py/examples"), "examples"),
            (repository.join("vm/guest"), "vm"),
            (repository.join("ublk-core/udev"), "udev"),
        ],
        driver,
        extra,
    };
    let images = cache.dir("payload")?;
    let image = images.join(format!("{}.img", parts.fingerprint()?));
    if image.is_file() {
        touch(&image);
    } else {
        parts.make(cache, &image)?;
        prune(&images, KEEP);
    }
    Ok(image)
}

pub(crate) fn target_dir(repository: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| repository.join("target"), PathBuf::from)
}

/// The `ublk` command.
fn command(repository: &Path, target: &Path, build: bool) -> Result<Option<PathBuf>> {
    let program = target.join("release/ublk");
    if !repository.join("ublk-core/src/bin/ublk.rs").is_file() {
        note("no ublk command in the guest: ublk-core/src/bin/ublk.rs does not exist");
        return Ok(None);
    }
    if build {
        run(Command::new("cargo")
            .args(["build", "--quiet", "--release", "--package", "ublk-core", "--package", "ublk-examples"])
            .args(["--features", "ublk-core/cli", "--bins"])
            .current_dir(repository))
        .context("cannot build the ublk command for the guest")?;
    }
    if !program.is_file() {
        note("no ublk command in the guest: it was never built");
        return Ok(None);
    }
    Ok(Some(program))
}

/// The examples that were built with the command.
fn examples(target: &Path) -> Vec<PathBuf> {
    let programs = RUST_EXAMPLES.iter().map(|name| target.join("release").join(name));
    programs.filter(|program| program.is_file()).collect()
}

/// The Python package's wheel.
fn wheel(cache: &Cache, repository: &Path, target: &Path, build: bool) -> Result<Option<PathBuf>> {
    if !repository.join("ublk-py/pyproject.toml").is_file() || !repository.join("ublk-py/src/lib.rs").is_file() {
        note("no Python package in the guest: ublk-py does not exist");
        return Ok(None);
    }
    let dir = target.join("vm/wheel");
    let stamp = target.join("vm/wheel.made-from");
    let find = || {
        fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
    };
    if build {
        let mut sources = Fingerprint::default();
        for name in ["Cargo.toml", "Cargo.lock", "ublk-core", "ublk-py"] {
            sources.add("part", name).add_tree(&repository.join(name), &is_litter)?;
        }
        let sources = sources.finish();
        let made_from = fs::read_to_string(&stamp).unwrap_or_default();
        if made_from != sources || find().is_none() {
            note("building the Python wheel");
            let _ = fs::remove_file(&stamp);
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
            run_quietly(
                Command::new(maturin(cache)?)
                    .args(["build", "--release", "--quiet", "--out"])
                    .arg(&dir)
                    // A directory of its own: other builds of the same library, with other
                    // features, would take turns with this one.
                    .arg("--target-dir")
                    .arg(target.join("vm/wheel-build"))
                    .current_dir(repository.join("ublk-py")),
            )
            .context("cannot build the wheel for the guest")?;
            // Cargo.lock may have been brought up to date by the build: the next run then
            // builds once more, which is cheap and right.
            fs::write(&stamp, sources).with_context(|| format!("cannot write {}", stamp.display()))?;
        }
    }
    let found = find();
    if found.is_none() {
        note("no Python package in the guest: the wheel was never built");
    }
    Ok(found)
}

/// maturin from PATH, or in an environment of our own.
fn maturin(cache: &Cache) -> Result<PathBuf> {
    if let Some(program) = which("maturin")
        && Command::new(&program).arg("--version").output().is_ok_and(|output| output.status.success())
    {
        return Ok(program);
    }
    let place = cache.dir("tools")?.join("maturin");
    let program = place.join("bin/maturin");
    if !program.is_file() {
        note("installing maturin in an environment of its own");
        let _ = fs::remove_dir_all(&place);
        run_quietly(Command::new("python3").args(["-m", "venv"]).arg(&place))
            .context("cannot make a Python environment for maturin (Debian: python3-venv)")?;
        run_quietly(Command::new(place.join("bin/python")).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "maturin>=1.9,<2",
        ]))
        .context("cannot install maturin")?;
    }
    Ok(program)
}

/// A Python whose pip works.
fn pip() -> Result<Command> {
    for python in ["python3", "/usr/bin/python3"] {
        if output(Command::new(python).args(["-m", "pip", "--version"]).stderr(std::process::Stdio::piped())).is_ok() {
            let mut command = Command::new(python);
            command.args(["-m", "pip"]);
            return Ok(command);
        }
    }
    bail!("this host's Python has no pip (Debian: python3-pip), which unpacks the wheel for the guest")
}

impl Parts {
    fn fingerprint(&self) -> Result<String> {
        let mut hash = Fingerprint::default();
        hash.add("recipe", RECIPE.to_string());
        let files = [("command", &self.command), ("wheel", &self.wheel), ("driver", &self.driver)];
        for (label, file) in files {
            if let Some(file) = file {
                hash.add(label, file.file_name().unwrap_or_default().as_encoded_bytes()).add_tree(file, &is_litter)?;
            }
        }
        for example in &self.examples {
            hash.add("example", example.file_name().unwrap_or_default().as_encoded_bytes())
                .add_tree(example, &is_litter)?;
        }
        for (folder, name) in &self.folders {
            hash.add("folder", name).add_tree(folder, &is_litter)?;
        }
        if let Some(extra) = &self.extra {
            hash.add("folder", "extra").add_tree(extra, &|_| false)?;
        }
        Ok(hash.finish())
    }

    fn make(&self, cache: &Cache, image: &Path) -> Result<()> {
        let temporary = cache.temporary("payload")?;
        let tree = temporary.path().join("tree");
        for name in ["bin", "driver", "python", "dist", "tests", "examples", "vm", "udev"] {
            let dir = tree.join(name);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let put = |from: &Path, to: PathBuf| {
            fs::copy(from, &to).with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
        };
        if let Some(command) = &self.command {
            put(command, tree.join("bin/ublk"))?;
        }
        for example in &self.examples {
            put(example, tree.join("bin").join(example.file_name().context("an example has no name")?))?;
        }
        if let Some(driver) = &self.driver {
            put(driver, tree.join("driver/ublk_drv.ko"))?;
        }
        if let Some(wheel) = &self.wheel {
            let name = wheel.file_name().context("the wheel has no name")?;
            put(wheel, tree.join("dist").join(name))?;
            run_quietly(
                pip()?
                    .args(["install", "--quiet", "--no-deps", "--no-compile", "--no-index"])
                    .args(["--root-user-action=ignore", "--target"])
                    .arg(tree.join("python"))
                    .arg(wheel),
            )
            .context("cannot unpack the wheel for the guest")?;
            use_guest_python(&tree.join("python/bin"))?;
        }
        for (folder, name) in &self.folders {
            copy_tree(folder, &tree.join(name))?;
        }
        if let Some(extra) = &self.extra {
            // All of it: what looks like the product of a build is what the user wants there.
            run_quietly(
                Command::new("cp")
                    .args(["--recursive", "--no-dereference", "--preserve=mode", "--"])
                    .arg(extra)
                    .arg(tree.join("extra")),
            )?;
        }
        cache.need_room(300, "making the payload image")?;
        let finished = temporary.path().join("payload.img");
        image::from_dir(&tree, &finished, "payload", image::size_of(&tree)? + SPARE)?;
        publish(&finished, image)
    }
}

/// Console scripts name the interpreter that installed them, which is the host's.
fn use_guest_python(scripts: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(scripts) else {
        return Ok(());
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let describe = || format!("cannot rewrite {}", path.display());
        let text = fs::read_to_string(&path).with_context(describe)?;
        if let Some((first, rest)) = text.split_once('\n')
            && first.starts_with("#!")
        {
            fs::write(&path, format!("#!/usr/bin/python3\n{rest}")).with_context(describe)?;
        }
    }
    Ok(())
}
