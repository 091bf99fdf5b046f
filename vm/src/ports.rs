// SPDX-License-Identifier: MIT OR Apache-2.0

//! The channels between this program and QEMU: connected sockets that QEMU inherits, so there are
//! no files or names for anybody else to find or to clean up.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

/// One end is ours, the other is for QEMU to inherit.
#[derive(Debug)]
pub(crate) struct Channel {
    /// QEMU's name for it.
    pub(crate) id: &'static str,
    /// Our end.
    pub(crate) ours: UnixStream,
    theirs: OwnedFd,
}

impl Channel {
    /// Makes a connected pair.
    pub(crate) fn new(id: &'static str) -> Result<Self> {
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::empty())
            .context("cannot make a socket pair")?;
        // Only QEMU's end may survive an exec; otherwise QEMU would hold both and never see ours
        // being closed.
        fcntl(&ours, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("cannot set close-on-exec")?;
        Ok(Self { id, ours: ours.into(), theirs })
    }

    /// QEMU's option for its end.
    pub(crate) fn chardev(&self) -> String {
        format!("socket,id={},fd={}", self.id, self.theirs.as_raw_fd())
    }

    /// A second handle on our end, for a thread.
    pub(crate) fn handle(&self) -> Result<UnixStream> {
        self.ours.try_clone().context("cannot duplicate a socket")
    }
}
