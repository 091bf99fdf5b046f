// SPDX-License-Identifier: MIT OR Apache-2.0

//! Debian packages from several releases at once, through an apt of our own: its lists and caches
//! live in our cache, the host's apt is only read. Mirrors and transport options are the host's.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, publish};
use crate::process::{output, run_quietly};
use crate::report::note;
use crate::version;

/// The releases that are searched; `true` for those on the security mirror.
const SUITES: &[(&str, bool)] = &[
    ("bookworm", false),
    ("bookworm-security", true),
    ("trixie", false),
    ("trixie-security", true),
    ("trixie-backports", false),
    ("sid", false),
];

/// How long a package index is taken for fresh.
const FRESH: Duration = Duration::from_secs(24 * 3600);

/// The file that tells when the index was fetched; its name changes with what is kept of it.
const STAMP: &str = "fetched-2";

/// Where Debian keeps the keys of its archives.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// One version of a package in the index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    /// The package's name.
    pub(crate) name: String,
    /// The package's version.
    pub(crate) version: String,
    /// Names of the packages it depends on (the first of alternatives).
    pub(crate) depends: Vec<String>,
}

/// The addresses of the archive and of its security updates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mirrors {
    /// The archive itself.
    pub(crate) archive: String,
    /// Security updates, if the host knows of a mirror for them.
    pub(crate) security: Option<String>,
}

impl Mirrors {
    /// The host's own mirrors, or those in the environment.
    pub(crate) fn of_host() -> Result<Self> {
        let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if let Some(archive) = set("UBLK_VM_MIRROR") {
            let security = set("UBLK_VM_SECURITY_MIRROR");
            return Ok(Self { archive, security });
        }
        let targets = output(Command::new("apt-get").args([
            "indextargets",
            "--format",
            "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ]))
        .context("cannot ask this host's apt for its mirrors")?;
        Self::choose(&targets).with_context(|| {
            format!(
                "this host's apt names no Debian mirror (it has: {}); \
                 name one in UBLK_VM_MIRROR, and UBLK_VM_SECURITY_MIRROR for security updates",
                targets.trim().replace('\n', ", ")
            )
        })
    }

    /// Picks from lines of `address release component`. Repositories of others have release names
    /// of their own, so the release tells whose a line is.
    fn choose(targets: &str) -> Option<Self> {
        let find = |wanted: &dyn Fn(&str) -> bool| {
            targets.lines().find_map(|line| {
                let mut fields = line.split(' ');
                let (address, release) = (fields.next()?, fields.next()?);
                (wanted(release) && fields.next() == Some("main")).then(|| address.to_owned())
            })
        };
        let names = [
            "bullseye",
            "bookworm",
            "trixie",
            "forky",
            "duke",
            "sid",
            "oldoldstable",
            "oldstable",
            "stable",
            "testing",
            "unstable",
        ];
        let archive = find(&|release| {
            let base = release.trim_end_matches("-updates").trim_end_matches("-backports");
            names.contains(&base)
        })?;
        let security = find(&|release| release.strip_suffix("-security").is_some_and(|base| names.contains(&base)));
        Some(Self { archive, security })
    }

    /// Source lines for the given suites.
    pub(crate) fn sources(&self, suites: &[(&str, bool)], options: &str) -> Vec<String> {
        let mut options = options.to_owned();
        if Path::new(KEYRING).exists() {
            options.push_str(&format!(" signed-by={KEYRING}"));
        }
        suites
            .iter()
            .filter_map(|&(suite, security)| {
                let mirror = if security { self.security.as_ref()? } else { &self.archive };
                Some(format!("deb [{}] {mirror} {suite} main", options.trim()))
            })
            .collect()
    }
}

/// The host's settings for reaching mirrors (proxies, certificates, clock checks), for programs
/// that start from an apt configuration of their own.
pub(crate) fn transport_options() -> Vec<String> {
    let dump = output(Command::new("apt-config").args(["dump", "Acquire"])).unwrap_or_default();
    dump.lines()
        .filter(|line| {
            ["http", "https", "Check-", "Retries"]
                .iter()
                .any(|name| line.strip_prefix("Acquire::").is_some_and(|rest| rest.starts_with(name)))
        })
        .filter(|line| !line.ends_with("\"\";"))
        .map(str::to_owned)
        .collect()
}

/// The private apt.
#[derive(Debug)]
pub(crate) struct Apt<'a> {
    cache: &'a Cache,
    dir: PathBuf,
}

impl<'a> Apt<'a> {
    /// Opens the private apt; fetches the index when there is none or when it is old. An old index
    /// is used as it is when the mirror cannot be reached.
    pub(crate) fn open(cache: &'a Cache) -> Result<Self> {
        if crate::process::which("apt-get").is_none() {
            bail!("there is no apt-get on this host: kernels and the guest come as Debian packages");
        }
        let apt = Self { cache, dir: cache.dir("apt")? };
        let _lock = cache.lock("package index")?;
        let age = apt
            .stamp()
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .map(|then| SystemTime::now().duration_since(then).unwrap_or_default());
        match age {
            Some(age) if age < FRESH => {}
            Some(age) => {
                if let Err(error) = apt.update() {
                    note(format_args!(
                        "the package index is {} hours old and cannot be refreshed; going on with it \
                         ({error:#})",
                        age.as_secs() / 3600
                    ));
                }
            }
            None => apt.update()?,
        }
        Ok(apt)
    }

    fn stamp(&self) -> PathBuf {
        self.dir.join(STAMP)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for option in [
            format!("Dir::State={dir}/state"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::Cache={dir}/cache"),
            "Dir::Cache::pkgcache=pkgcache.bin".into(),
            "Dir::Cache::srcpkgcache=srcpkgcache.bin".into(),
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            format!("Dir::Etc::sourceparts={dir}/none"),
            format!("Dir::Etc::preferences={dir}/none/preferences"),
            format!("Dir::Etc::preferencesparts={dir}/none"),
            "APT::Architecture=amd64".into(),
            "APT::Architectures=amd64".into(),
            "Acquire::Languages=none".into(),
            // The cache may lie in a home directory that apt's own user cannot enter.
            "APT::Sandbox::User=root".into(),
        ] {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C.UTF-8");
        command
    }

    /// Fetches the index beside the old one, which stays as it is if that fails.
    fn update(&self) -> Result<()> {
        note("fetching the package index");
        let temporary = self.cache.temporary("index")?;
        let fresh = Self { cache: self.cache, dir: temporary.path().join("fresh") };
        fresh.fill()?;
        publish(&self.dir, &temporary.path().join("old"))?;
        publish(&fresh.dir, &self.dir)
    }

    fn fill(&self) -> Result<()> {
        for name in ["state/lists/partial", "cache/archives/partial", "none"] {
            let dir = self.dir.join(name);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        let write = |name: &str, text: String| {
            let path = self.dir.join(name);
            fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
        };
        write("status", String::new())?;
        let mirrors = Mirrors::of_host()?;
        if mirrors.security.is_none() {
            note("no mirror for security updates is known; continuing without them");
        }
        let sources = mirrors.sources(SUITES, "arch=amd64 target=Packages");
        write("sources.list", sources.join("\n") + "\n")?;
        run_quietly(self.command("apt-get").args(["-qq", "-o", "APT::Update::Error-Mode=any", "update"]))
            .context("cannot fetch the package index")?;
        let names = output(self.command("apt-cache").args(["pkgnames", "linux-"]))?;
        let images: Vec<&str> = names.lines().filter(|name| release_of(name).is_some()).collect();
        write("kernels", self.show(&images)?)?;
        write("names", names)?;
        write(STAMP, String::new())
    }

    fn show(&self, names: &[&str]) -> Result<String> {
        if names.is_empty() {
            return Ok(String::new());
        }
        output(self.command("apt-cache").args(["show", "--all-versions"]).args(names).stderr(Stdio::piped()))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    }

    /// The kernel images in the index that are whole.
    pub(crate) fn kernels(&self) -> Result<Vec<Package>> {
        let names = self.read("names")?;
        let names: HashSet<&str> = names.lines().collect();
        Ok(whole(parse(&self.read("kernels")?), &names))
    }

    /// Whether the index has any version of a package whose name starts with `linux-`.
    pub(crate) fn has(&self, name: &str) -> Result<bool> {
        Ok(self.read("names")?.lines().any(|line| line == name))
    }

    /// The newest version of a package over all releases.
    pub(crate) fn newest(&self, name: &str) -> Result<Package> {
        let valid = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c);
        if name.is_empty() || !name.chars().all(valid) || name.starts_with('-') {
            bail!("'{name}' is not a package name");
        }
        let text = self.show(&[name]).unwrap_or_default();
        newest(parse(&text)).with_context(|| {
            let suites: Vec<_> = SUITES.iter().map(|(suite, _)| *suite).collect();
            format!("there is no package '{name}' in {}", suites.join(", "))
        })
    }

    /// Downloads one version of a package and unpacks it over `into`.
    pub(crate) fn fetch_into(&self, name: &str, version: &str, into: &Path) -> Result<()> {
        let temporary = self.cache.temporary("deb")?;
        let wanted = format!("{name}={version}");
        let download = || {
            run_quietly(
                self.command("apt-get")
                    .args(["-qq", "-o", "Acquire::Retries=3", "download", &wanted])
                    .current_dir(temporary.path()),
            )
        };
        download().with_context(|| {
            format!(
                "cannot download {name} {version}; if the package is gone from the mirror, remove {} \
                 to have the index fetched again",
                self.stamp().display()
            )
        })?;
        let deb = fs::read_dir(temporary.path())
            .with_context(|| format!("cannot read {}", temporary.path().display()))?
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get downloaded no file for {wanted}"))?;
        run_quietly(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(into))
            .with_context(|| format!("cannot unpack {wanted}"))
    }

    /// The directory with the newest version of a package, unpacked in the cache.
    pub(crate) fn unpacked(&self, name: &str) -> Result<PathBuf> {
        let package = self.newest(name)?;
        let place = self.cache.dir("packages")?.join(format!("{name}_{}", package.version));
        let _lock = self.cache.lock("packages")?;
        if !place.is_dir() {
            note(format_args!("fetching {name} {}", package.version));
            let temporary = self.cache.temporary("package")?;
            let tree = temporary.path().join("tree");
            self.fetch_into(name, &package.version, &tree)?;
            publish(&tree, &place)?;
        }
        Ok(place)
    }
}

/// Images that are superseded stay in an archive for a while, but not always with all of their
/// parts. Keeps those that have what booting takes, and of their dependencies those that exist.
fn whole(images: Vec<Package>, names: &HashSet<&str>) -> Vec<Package> {
    let mut images = images;
    images.retain_mut(|image| {
        let there = |name: &String| names.contains(name.as_str());
        let needed = |name: &&String| name.starts_with("linux-binary-") || name.starts_with("linux-modules-");
        let complete = image.depends.iter().filter(needed).all(there);
        image.depends.retain(there);
        complete
    });
    images
}

/// The one with the highest version.
pub(crate) fn newest(packages: impl IntoIterator<Item = Package>) -> Option<Package> {
    packages.into_iter().max_by(|a, b| version::compare(&a.version, &b.version))
}

/// The kernel release that an image package holds, if it is one that this program boots.
pub(crate) fn release_of(package: &str) -> Option<&str> {
    let release = package.strip_prefix("linux-image-")?;
    (release.ends_with("-cloud-amd64") && release.starts_with(|c: char| c.is_ascii_digit())).then_some(release)
}

/// Reads the paragraphs that `apt-cache show` prints.
fn parse(text: &str) -> Vec<Package> {
    let mut packages: Vec<Package> = text
        .split("\n\n")
        .filter_map(|paragraph| {
            let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            Some(Package {
                name: field("Package")?.to_owned(),
                version: field("Version")?.to_owned(),
                depends: field("Depends")
                    .unwrap_or_default()
                    .split(',')
                    .filter_map(|alternatives| alternatives.split_whitespace().next())
                    .map(str::to_owned)
                    .collect(),
            })
        })
        .collect();
    packages.sort_by(|a, b| a.name.cmp(&b.name).then_with(|| version::compare(&a.version, &b.version)));
    // Two releases may hold the same version.
    packages.dedup_by(|a, b| a.name == b.name && version::compare(&a.version, &b.version) == Ordering::Equal);
    packages
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn mirrors_come_from_debians_own_lines() {
        let targets = "https://a.invalid/node/ nodistro main\n\
                       http://m.invalid/debian/ bookworm main\n\
                       http://m.invalid/debian/ bookworm-updates main\n\
                       http://s.invalid/sec/ bookworm-security main\n";
        assert_eq!(
            Mirrors::choose(targets),
            Some(Mirrors {
                archive: "http://m.invalid/debian/".into(),
                security: Some("http://s.invalid/sec/".into()),
            })
        );
        assert_eq!(Mirrors::choose("http://u.invalid/ubuntu/ noble main\n"), None);
        assert_eq!(Mirrors::choose(""), None);
    }

    #[test]
    fn sources_leave_out_a_mirror_that_is_unknown() {
        let mirrors = Mirrors { archive: "http://m.invalid/debian/".into(), security: None };
        let lines = mirrors.sources(SUITES, "arch=amd64");
        assert_eq!(lines.len(), 4);
        assert!(lines[0].starts_with("deb [arch=amd64"));
        assert!(lines[0].ends_with("] http://m.invalid/debian/ bookworm main"));
        assert!(!lines.iter().any(|line| line.contains("-security")));
    }

    #[test]
    fn paragraphs_become_packages() {
        let text = "Package: a\nVersion: 1.2-1\nDepends: b (= 1), c | d, e\nDescription: x\n y\n\n\
                    Package: a\nVersion: 1.10-1\n\n\
                    Package: a\nVersion: 1.2-1\nDepends: b (= 1)\n";
        let packages = parse(text);
        assert_eq!(packages.len(), 2);
        assert_eq!(packages[0].depends, ["b", "c", "e"]);
        assert_eq!(newest(packages).map(|p| p.version), Some("1.10-1".into()));
        assert_eq!(parse(""), []);
    }

    #[test]
    fn an_image_without_its_parts_is_no_offer() {
        let text = "Package: i1\nVersion: 1\nDepends: dracut, linux-base-1, linux-modules-1\n\n\
                    Package: i2\nVersion: 2\nDepends: linux-base-2, linux-modules-2\n\n\
                    Package: i3\nVersion: 3\nDepends: kmod, linux-base-3\n";
        let names = HashSet::from(["linux-base-1", "linux-modules-1", "linux-base-2"]);
        let images = whole(parse(text), &names);
        let left: Vec<&str> = images.iter().map(|image| image.name.as_str()).collect();
        assert_eq!(left, ["i1", "i3"]);
        assert_eq!(images[0].depends, ["linux-base-1", "linux-modules-1"]);
        assert!(images[1].depends.is_empty());
    }
}
