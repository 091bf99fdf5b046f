// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where logs, states and sockets of servers are: root's in `/run/ublk`, a user's in `ublk` of the runtime
//! directory, or where there is none, in `/tmp/ublk-UID`.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::unistd::geteuid;

/// The directory of this process's user. It need not exist.
pub(super) fn path() -> PathBuf {
    let user = geteuid();
    if user.is_root() {
        return "/run/ublk".into();
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match runtime.filter(|runtime| runtime.is_absolute() && is_own(runtime)) {
        Some(runtime) => runtime.join("ublk"),
        None => format!("/tmp/ublk-{user}").into(),
    }
}

/// Makes that directory.
///
/// # Errors
///
/// Also if it is somebody else's, or somebody else may write to it: what stands there decides what is
/// served.
pub(super) fn make() -> io::Result<PathBuf> {
    let path = path();
    let mode = if geteuid().is_root() { 0o755 } else { 0o700 };
    match DirBuilder::new().mode(mode).create(&path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ if is_own(&path) => Ok(path),
        _ => Err(io::Error::other("it is not this user's alone")),
    }
}

/// Whether that directory is there and what it holds is this user's own word.
pub(super) fn is_trusted() -> bool {
    is_own(&path())
}

/// Whether a path is a directory, no link to one, that only this user can write to.
fn is_own(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == geteuid().as_raw() && m.mode() & 0o022 == 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_directory_that_others_can_write_to_or_a_link_to_one_is_not_trusted() {
        let place = tempfile::tempdir().unwrap();
        let (own, link, open) = (place.path().join("own"), place.path().join("link"), place.path().join("open"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        symlink(&own, &link).unwrap();
        assert!(is_own(&own));
        assert!(!is_own(&link) && !is_own(&open) && !is_own(&place.path().join("missing")));
    }
}
