// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk owner`: run by the udev rules that give users the nodes of their devices.

use std::fs::{self, Permissions};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;

use nix::fcntl::{AtFlags, OFlag, open};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, fchownat};

use super::failure::{Failure, Outcome};
use super::instance::Instance;
use super::output::print;
use crate::control::Control;
use crate::control::DeviceInfo;
use crate::uapi::Features;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The kernel's name of a node: ublkcN, ublkbN, or ublkbNpM of a partition
    #[arg(value_name = "NODE")]
    node: String,
    /// Give the node to the owner, unless the device has been replaced by another one
    #[arg(long)]
    apply: bool,
}

/// Prints the numbers of the user and the group, or gives the node to them. Fails for a device that root created, whose
/// nodes stay root's.
pub(super) fn run(args: &Args) -> Outcome {
    let id =
        device(&args.node).ok_or_else(|| Failure::Text(format!("{:?} is not a node of a ublk device", args.node)))?;
    let node = format!("/dev/{}", args.node);
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("{what} {node}: {e}"));
    let before = Instance::of(id);
    let opened = if args.apply {
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Some(open(node.as_str(), flags, Mode::empty()).map_err(|e| failed("opening", &e))?)
    } else {
        None
    };
    let info = Control::open()?.info(id)?;
    if !info.features.contains(Features::UNPRIVILEGED_DEV) {
        return Err(Failure::Text(format!("device {id} is not an unprivileged device")));
    }
    let Some(opened) = opened else { return print(&format!("{} {}\n", info.owner_uid, info.owner_gid)) };
    // udev runs rules late, when the number may be another device's. If the device is the same before and after, then the
    // node that was opened in between is its node. A node of a deleted device can be given away: it has no name any more.
    if before.is_none() || Instance::of(id) != before {
        return Err(Failure::Text(format!("device {id} has been replaced meanwhile")));
    }
    give(&opened, &info).map_err(|e| failed("changing the owner of", &e))
}

/// Gives an open node to a device's owner.
fn give(node: &OwnedFd, info: &DeviceInfo) -> std::io::Result<()> {
    fs::set_permissions(format!("/proc/self/fd/{}", node.as_raw_fd()), Permissions::from_mode(0o600))?;
    let (user, group) = (Uid::from_raw(info.owner_uid), Gid::from_raw(info.owner_gid));
    Ok(fchownat(node, "", Some(user), Some(group), AtFlags::AT_EMPTY_PATH)?)
}

/// Returns the device that a node belongs to.
fn device(node: &str) -> Option<DeviceId> {
    let number = node.strip_prefix("ublkc").or_else(|| {
        let disk = node.strip_prefix("ublkb")?;
        Some(disk.split_once('p').map_or(disk, |(disk, _)| disk))
    })?;
    number.parse().ok().map(DeviceId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_parsed() {
        for (node, id) in [("ublkc0", 0), ("ublkb12", 12), ("ublkb12p3", 12)] {
            assert_eq!(device(node), Some(DeviceId(id)));
        }
        for node in ["ublk-control", "ublkc", "ublkbx", "ublkb", "sda1", "ublkc1p2"] {
            assert_eq!(device(node), None, "{node}");
        }
    }
}
