// SPDX-License-Identifier: MIT OR Apache-2.0

//! The directory for logs, state files and sockets of servers: `/run/ublk` for root, and for other users `ublk` in
//! `$XDG_RUNTIME_DIR`, or without that, `/tmp/ublk-UID`.
//!
//! Any user can create a directory with the last name before its owner does. So nothing is opened by its path: a
//! [`RunDir`] holds a descriptor of a directory that only this user can write to. Files are opened relative to that
//! descriptor, without following links, and used only if they are regular files of this user.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, mkdirat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};

/// Maximum length of a file that is read.
const MAX_LEN: u64 = 1 << 20;

/// An open directory that only this user can write to.
#[derive(Debug)]
pub(super) struct RunDir {
    path: PathBuf,
    directory: OwnedFd,
}

impl RunDir {
    /// The path of this user's directory, which need not exist.
    pub(super) fn location() -> PathBuf {
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

    /// Opens this user's directory, and creates it if it does not exist.
    ///
    /// # Errors
    ///
    /// Also if other users can write to it: state files determine what is served.
    pub(super) fn create() -> io::Result<Self> {
        let path = Self::location();
        let mode = if geteuid().is_root() { 0o755 } else { 0o700 };
        let (parent, name) = (path.parent().unwrap_or("/".as_ref()), path.file_name().unwrap_or_default());
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let parent = open(parent, flags, Mode::empty())?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(mode)) {
            Ok(()) | Err(nix::errno::Errno::EEXIST) => Self::open(&path),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Opens this user's directory. `None` if it does not exist, or if other users can write to it.
    pub(super) fn find() -> Option<Self> {
        Self::open(&Self::location()).ok()
    }

    /// Opens a directory, unless it is a link or other users can write to it.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(path, flags, Mode::empty())?;
        check(&fstat(&directory)?, SFlag::S_IFDIR)?;
        Ok(RunDir { path: path.to_owned(), directory })
    }

    /// The path of a file in the directory, for messages only.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// A path of a file that goes through the descriptor, for system calls that take only paths. Valid as long as `self`.
    pub(super) fn through(&self, name: &str) -> PathBuf {
        format!("/proc/self/fd/{}/{name}", self.directory.as_raw_fd()).into()
    }

    /// Reads a file. `None` if it does not exist.
    ///
    /// # Errors
    ///
    /// Also if it is not a regular file of this user, or too long.
    pub(super) fn read(&self, name: &str) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open_file(name, OFlag::O_RDONLY) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let mut content = Vec::new();
        file.take(MAX_LEN + 1).read_to_end(&mut content)?;
        if content.len() as u64 > MAX_LEN {
            return Err(io::Error::other(format!("it has more than {MAX_LEN} bytes")));
        }
        Ok(Some(content))
    }

    /// Writes a file atomically, readable by this user only.
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

    /// Opens a file to append to it. Creates it, readable by this user only, if it does not exist.
    pub(super) fn append(&self, name: &str) -> io::Result<File> {
        self.open_file(name, OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND)
    }

    /// Removes a file, a link or a socket, if it exists.
    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(nix::errno::Errno::ENOENT) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Lists the names in the directory.
    pub(super) fn names(&self) -> Vec<OsString> {
        fs::read_dir(self.through("")).into_iter().flatten().flatten().map(|entry| entry.file_name()).collect()
    }

    /// Opens a file. A FIFO, a device or a socket of that name does not block and is refused.
    fn open_file(&self, name: &str, flags: OFlag) -> io::Result<File> {
        let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = openat(self.directory.as_fd(), name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        check(&fstat(&file)?, SFlag::S_IFREG)?;
        Ok(file.into())
    }
}

/// Checks that a file has the right type and owner, and that other users cannot write to it.
fn check(found: &FileStat, kind: SFlag) -> io::Result<()> {
    if found.st_mode & SFlag::S_IFMT.bits() != kind.bits() {
        return Err(io::Error::other("not a regular file"));
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

    /// None of these may block, be followed, or be used.
    #[test]
    fn only_regular_files_are_read_and_written() {
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
    fn a_file_that_others_can_write_to_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::open(place.path()).unwrap();
        dir.replace("state", b"{}").unwrap();
        assert_eq!(fs::metadata(place.path().join("state")).unwrap().permissions().mode() & 0o777, 0o600);
        with_mode(&place.path().join("state"), 0o666);
        assert!(dir.read("state").is_err());
        fs::write(place.path().join("long"), vec![0; MAX_LEN as usize + 1]).unwrap();
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
        fs::write(path.join("state"), "foreign").unwrap();
        assert!(dir.read("state").unwrap().is_none());
        dir.remove("state").unwrap();
        assert!(path.join("state").exists());
        dir.replace("state", b"ours").unwrap();
        assert_eq!(fs::read(place.path().join("moved/state")).unwrap(), b"ours");
        assert_eq!(dir.names(), ["state"]);
    }
}
