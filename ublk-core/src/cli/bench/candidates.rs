// SPDX-License-Identifier: MIT OR Apache-2.0

//! The disks that are measured if none is given: this project's, and those of others that are available.

use std::ffi::OsString;
use std::os::fd::BorrowedFd;
use std::path::Path;

use super::created::{Created, NotCreated};
use super::disk::{Access, Disk};
use super::helper;
use crate::cli::failure::Failure;
use crate::cli::host::Host;
use crate::control::Control;
use crate::units::DeviceId;

/// A disk to measure, if it is available.
#[derive(Debug)]
pub(super) struct Candidate<'f> {
    pub(super) name: String,
    source: Source<'f>,
}

/// Origin of a disk.
#[derive(Debug)]
enum Source<'f> {
    /// A server of this program, which prints the path of its disk.
    Server(Vec<OsString>),
    /// A disk of the kernel that exists, and the module that has it.
    Kernel { path: &'static str, module: &'static str },
    /// A loop device for the file.
    Loop(&'f Path),
    /// Another ublk server, with the arguments of its `add` after the device number.
    Foreign { program: &'static str, target: &'static str, arguments: Vec<OsString> },
}

/// A disk that is ready, and what removes it.
#[derive(Debug)]
pub(super) struct Ready {
    // Closed before the disk is removed.
    pub(super) disk: Disk,
    pub(super) created: Option<Created>,
}

impl<'f> Candidate<'f> {
    /// Returns all candidates. Those that are stored in a file use `file`, others with a size have `size` bytes.
    pub(super) fn all(host: &Host, file: &'f Path, size: u64) -> Vec<Self> {
        let own = |kind: &str, options: &[OsString]| {
            let add = ["add", "-t", kind, "--foreground"].map(OsString::from);
            let name = format!("ublk-{kind}");
            Candidate { name, source: Source::Server([&host.relaunch[..], &add[..], options].concat()) }
        };
        let mut candidates = vec![
            own("null", &[]),
            own("mem", &["--size".into(), size.to_string().into()]),
            own("file", &["--file".into(), file.into()]),
        ];
        candidates.extend(
            host.bench
                .iter()
                .map(|disk| Candidate { name: disk.name.clone(), source: Source::Server(disk.serve.clone()) }),
        );
        let kernel =
            |name: &str, path, module| Candidate { name: name.into(), source: Source::Kernel { path, module } };
        candidates.push(kernel("null_blk", "/dev/nullb0", "null_blk"));
        candidates.push(kernel("brd", "/dev/ram0", "brd"));
        candidates.push(Candidate { name: "loop".into(), source: Source::Loop(file) });
        let foreign = |program: &'static str, target: &'static str, arguments: &[OsString]| Candidate {
            name: format!("{program}-{target}"),
            source: Source::Foreign { program, target, arguments: arguments.into() },
        };
        candidates.push(foreign("kublk", "null", &[]));
        candidates.push(foreign("kublk", "loop", &[file.into()]));
        candidates.push(foreign("rublk", "null", &[]));
        candidates.push(foreign("rublk", "loop", &["-f".into(), file.into()]));
        candidates
    }

    /// Returns whether the disk is one of this project, which must be available.
    pub(super) fn is_own(&self) -> bool {
        matches!(self.source, Source::Server(_))
    }

    /// Returns what the disk needs and is not there: a program, the driver, or the file.
    pub(super) fn missing(&self, driver_error: Option<&String>, has_file: bool) -> Option<String> {
        let (needs_driver, needs_file) = match &self.source {
            Source::Kernel { .. } => (false, false),
            Source::Loop(_) => (false, true),
            Source::Server(_) => (true, self.name == "ublk-file"),
            Source::Foreign { program, .. } if !is_installed(program) => {
                return Some(format!("{program} is not installed"));
            }
            Source::Foreign { arguments, .. } => (true, !arguments.is_empty()),
        };
        match driver_error {
            Some(error) if needs_driver => Some(error.clone()),
            _ => (needs_file && !has_file).then(|| "the temporary file could not be created".to_owned()),
        }
    }

    /// Returns whether the disk is created by this command, which may then write to it.
    pub(super) fn is_created(&self) -> bool {
        !matches!(self.source, Source::Kernel { .. })
    }

    /// Returns whether reads of a new disk would find no data, and it has to be filled first.
    pub(super) fn is_empty(&self) -> bool {
        self.name == "ublk-mem" || self.name == "brd"
    }

    /// Creates the disk and opens it. A disk that was not created by this command is opened for writes only if `write`.
    pub(super) fn create(&self, host: &Host, write: bool, interrupts: BorrowedFd<'_>) -> Result<Ready, NotCreated> {
        let created = match &self.source {
            Source::Kernel { path, module } => {
                if !Path::new(path).exists() {
                    return Err(NotCreated::Absent(format!("there is no {path} (kernel module {module})")));
                }
                let disk = self.open(path.as_ref(), Access { write, unused: true })?;
                return Ok(Ready { disk, created: None });
            }
            Source::Loop(file) => Created::loop_device(file)?,
            Source::Server(argv) => {
                let remove = ["del", "--force", "-n"].map(OsString::from);
                Created::by_server(argv, &[&host.relaunch[..], &remove[..]].concat(), interrupts)?
            }
            Source::Foreign { program, target, arguments } => foreign(program, target, arguments)?,
        };
        // Other programs may look at a new disk, for example for file systems.
        let mut disk = self.open(&created.path, Access { write: true, unused: false })?;
        disk.own_server = created.server();
        Ok(Ready { disk, created: Some(created) })
    }

    fn open(&self, path: &Path, access: Access) -> Result<Disk, NotCreated> {
        let opened = Disk::open(&self.name, path, access);
        opened.map_err(|failure: Failure| NotCreated::Absent(failure.message().unwrap_or_default()))
    }
}

/// Has another ublk server create a disk.
fn foreign(program: &str, target: &str, arguments: &[OsString]) -> Result<Created, NotCreated> {
    // With a number of our choice, what is removed afterwards cannot be a device of another user.
    let used = Control::open().and_then(|control| control.device_ids()).map_err(|error| error.to_string())?;
    let number = (0..).find(|number| !used.contains(&DeviceId(*number))).unwrap_or_default().to_string();
    // rublk's target comes first, and is a command.
    let kind = if program == "rublk" { vec![target] } else { vec!["-t", target] };
    let words = [program, "add"].into_iter().chain(kind).chain(["-n", &number, "-q", "1", "-d", "128"]);
    let add: Vec<OsString> = words.map(OsString::from).chain(arguments.iter().cloned()).collect();
    helper::run(&add)?;
    let remove = [program, "del", "-n", &number].map(OsString::from).into();
    Ok(Created::by_program(format!("/dev/ublkb{number}").into(), remove))
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::super::helper::script;
    use super::*;
    use crate::cli::BenchDisk;

    fn host() -> Host {
        let python = BenchDisk { name: "python-null".into(), serve: script("echo 'ublk: no driver' >&2; exit 1") };
        Host { relaunch: vec!["false".into()], extra: vec![], bench: vec![python] }
    }

    #[test]
    fn candidates_are_own_and_foreign_disks() {
        let host = host();
        let all = Candidate::all(&host, "/tmp/file".as_ref(), 1 << 20);
        let own: Vec<_> = all.iter().filter(|c| c.is_own()).map(|c| c.name.as_str()).collect();
        assert_eq!(own, ["ublk-null", "ublk-mem", "ublk-file", "python-null"]);
        let others: Vec<_> = all.iter().filter(|c| !c.is_own()).map(|c| (c.name.as_str(), c.is_created())).collect();
        let expected = [
            ("null_blk", false),
            ("brd", false),
            ("loop", true),
            ("kublk-null", true),
            ("kublk-loop", true),
            ("rublk-null", true),
            ("rublk-loop", true),
        ];
        assert_eq!(others, expected);
    }

    #[test]
    fn what_a_candidate_needs_and_lacks_is_named() {
        let host = host();
        let (error, candidates) = ("no driver".to_owned(), Candidate::all(&host, "/tmp/file".as_ref(), 1 << 20));
        let missing = |driver_error, has_file| -> Vec<_> {
            candidates.iter().filter_map(|c| Some((c.name.as_str(), c.missing(driver_error, has_file)?))).collect()
        };
        let lacking_file = missing(None, false);
        let without_file = |name| lacking_file.iter().any(|(lacking, _)| *lacking == name);
        assert!(without_file("ublk-file") && without_file("loop") && !without_file("ublk-null"));
        let lacking_driver = missing(Some(&error), true);
        for own in candidates.iter().filter(|c| c.is_own()) {
            assert!(lacking_driver.contains(&(&own.name, error.clone())), "{}", own.name);
        }
        let foreign = Source::Foreign { program: "ublk-nonexistent", target: "null", arguments: vec![] };
        let foreign = Candidate { name: "x".into(), source: foreign };
        assert_eq!(foreign.missing(Some(&error), false).unwrap(), "ublk-nonexistent is not installed");
    }

    #[test]
    fn a_candidate_that_is_not_available_has_a_reason() {
        let host = host();
        let (reader, _writer) = std::io::pipe().unwrap();
        let absent = |source| {
            let candidate = Candidate { name: "x".into(), source };
            match candidate.create(&host, false, reader.as_fd()).unwrap_err() {
                NotCreated::Absent(reason) => reason,
                NotCreated::Interrupted => panic!("nothing interrupts it"),
            }
        };
        let kernel = Source::Kernel { path: "/dev/nonexistent", module: "null_blk" };
        assert_eq!(absent(kernel), "there is no /dev/nonexistent (kernel module null_blk)");
        assert_eq!(absent(Source::Server(host.bench[0].serve.clone())), "no driver");
        // Not a block device: the server ends.
        let server = script("echo /dev/null; while :; do sleep 0.01; done");
        assert_eq!(absent(Source::Server(server)), "/dev/null is not a block device");
    }
}
