// SPDX-License-Identifier: MIT OR Apache-2.0

//! The directory of logs, states and sockets of servers: root's is `/run/ublk`, a user's is `ublk` in the runtime
//! directory, or where there is none, `/tmp/ublk-UID`.
//!
//! Anyone may make a directory of the latter name before its user does. So nothing is opened by its path: a
//! [`RunDir`] holds a descriptor of a directory that was seen to be this user's alone, and everything in it is reached
//! through that, without following links, and believed only if it is this user's regular file.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// Longest file that is read.
const LONGEST: u64 = 1 << 20;

/// An open directory that only this user can write to.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    directory: OwnedFd,
}

impl RunDir {
    /// Where the directory of this process's user is, or would be.
    pub(super) fn place() -> PathBuf {
        let user = geteuid();
        if user.is_root() {
            return "/run/ublk".into();
        }
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        match runtime.filter(|runtime| runtime.is_absolute() && Self::open(runtime).is_ok()) {
            Some(runtime) => runtime.join("ublk"),
            None => format!("/tmp/ublk-{user}").into(),
        }
    }

    /// Opens the directory of this process's user, and makes it if it is not there.
    ///
    /// # Errors
    ///
    /// Also if it is not this user's alone: what is stored there decides what is served.
    pub(super) fn make() -> io::Result<Self> {
        let path = Self::place();
        let mode = if geteuid().is_root() { 0o755 } else { 0o700 };
        let (parent, name) = (path.parent().unwrap_or("/".as_ref()), path.file_name().unwrap_or_default());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent = open(parent, flags, Mode::empty())?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(mode)) {
            Ok(()) | Err(Errno::EEXIST) => Self::open(&path),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Opens the directory of this process's user; `None` if there is none, or one that others can write to.
    pub(super) fn find() -> Option<Self> {
        Self::open(&Self::place()).ok()
    }

    /// Opens a directory, unless it is a link or not this user's alone.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(path, flags, Mode::empty())?;
        check(&fstat(&directory)?, SFlag::S_IFDIR)?;
        Ok(RunDir { path: path.to_owned(), directory })
    }

    /// The path of a file in it, for messages only.
    pub(super) fn name(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path that leads through the descriptor, for system calls that take nothing else. Valid while this lives.
    pub(super) fn through(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Reads a file; `None` if there is none.
    ///
    /// # Errors
    ///
    /// Also if it is not this user's regular file, or too long.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_file(name, OFlag::O_RDONLY) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut content = Vec::new();
        file.take(LONGEST + 1).read_to_end(&mut content)?;
        if content.len() as u64 > LONGEST {
            return Err(io::Error::other(format!("it has more than {LONGEST} bytes")));
        }
        Ok(Some(content))
    }

    /// Writes a file, whole or not at all, for this user only.
    pub(super) fn replace(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let new = format!("{name}.new");
        self.remove(&new)?;
        let written = self
            .open_file(&new, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL)
            .and_then(|mut file| file.write_all(content))
            .and_then(|()| Ok(renameat(&self.directory, new.as_str(), &self.directory, name)?));
        written.inspect_err(|_| {
            let _ = self.remove(&new);
        })
    }

    /// Opens a file to append to it, and makes it for this user only if it is not there.
    pub(super) fn append(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND)
    }

    /// Removes a file, a link or a socket, if there is one.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names of all that is in it.
    pub(super) fn names(&self) -> Vec<OsString> {
        fs::read_dir(self.through("")).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    }

    /// A FIFO, a device or a socket in the file's place neither blocks this nor passes the check.
    fn open_file(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = openat(self.directory.as_fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        check(&fstat(&file)?, SFlag::S_IFREG)?;
        Ok(file.into())
    }
}

/// Checks that something is of a kind, belongs to this user and cannot be written by another.
fn check(found: &FileStat, kind: SFlag) -> io::Result<()> {
    if found.st_mode & SFlag::S_IFMT.bits() != kind.bits() {
        return Err(io::Error::other("it is no regular file"));
    }
    let user = geteuid();
    if found.st_uid != user.as_raw() {
        return Err(io::Error::other(format!("it belongs to user {}, not to {user}", found.st_uid)));
    }
    if found.st_mode & 0o022 != 0 {
        return Err(io::Error::other(format!("other users may write to it (mode {:o})", found.st_mode & 0o777)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn with_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn a_directory_that_others_can_write_to_or_a_link_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let (own, link, open) = (place.path().join("own"), place.path().join("link"), place.path().join("open"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&open).unwrap();
        with_mode(&own, 0o755);
        with_mode(&open, 0o777);
        symlink(&own, &link).unwrap();
        RunDir::open(&own).unwrap();
        assert!(RunDir::open(&link).is_err());
        let error = RunDir::open(&open).unwrap_err().to_string();
        assert!(error.contains("777"), "{error}");
        assert!(RunDir::open(&place.path().join("missing")).is_err());
    }

    /// None of these may block, be followed, or be believed.
    #[test]
    fn what_is_no_regular_file_is_neither_read_nor_written() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::open(place.path()).unwrap();
        let victim = place.path().join("victim");
        fs::write(&victim, "kept").unwrap();
        nix::unistd::mkfifo(&place.path().join("fifo"), Mode::S_IRWXU).unwrap();
        symlink(&victim, place.path().join("link")).unwrap();
        symlink("/dev/zero", place.path().join("endless")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(place.path().join("socket")).unwrap();
        fs::create_dir(place.path().join("directory")).unwrap();
        for name in ["fifo", "link", "endless", "socket", "directory"] {
            assert!(dir.read(name).is_err(), "{name}");
            assert!(dir.append(name).is_err(), "{name}");
        }
        for name in ["fifo", "link", "endless", "socket"] {
            dir.replace(name, b"new").unwrap();
            assert_eq!(dir.read(name).unwrap().unwrap(), b"new", "{name}");
        }
        assert_eq!(fs::read(&victim).unwrap(), b"kept");
    }

    #[test]
    fn a_file_that_others_can_write_to_is_not_believed() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::open(place.path()).unwrap();
        dir.replace("state", b"{}").unwrap();
        assert_eq!(fs::metadata(place.path().join("state")).unwrap().permissions().mode() & 0o777, 0o600);
        with_mode(&place.path().join("state"), 0o666);
        assert!(dir.read("state").is_err());
        fs::write(place.path().join("long"), vec![0; LONGEST as usize + 1]).unwrap();
        assert!(dir.read("long").is_err());
        assert!(dir.read("missing").unwrap().is_none());
    }

    #[test]
    fn a_directory_that_is_replaced_later_is_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("ublk");
        fs::create_dir(&path).unwrap();
        with_mode(&path, 0o700);
        let dir = RunDir::open(&path).unwrap();
        fs::rename(&path, place.path().join("moved")).unwrap();
        fs::create_dir(&path).unwrap();
        fs::write(path.join("state"), "another's").unwrap();
        assert!(dir.read("state").unwrap().is_none());
        dir.remove("state").unwrap();
        assert!(path.join("state").exists());
        dir.replace("state", b"ours").unwrap();
        assert_eq!(fs::read(place.path().join("moved/state")).unwrap(), b"ours");
        assert_eq!(dir.names(), ["state"]);
    }
}
