// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk owner`: the program of the udev rules that give users the nodes of their devices.

use super::{Failure, Outcome};
use crate::uapi::Features;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The kernel's name of a node: ublkcN, ublkbN, or ublkbNpM of a partition
    #[arg(value_name = "NODE")]
    node: String,
}

/// Prints the user's and the group's number. Fails for a device that root has made: its nodes stay root's.
pub(super) fn run(args: &Args) -> Outcome {
    let id = device(&args.node).ok_or_else(|| Failure::Text(format!("{:?} is no node of a ublk device", args.node)))?;
    let info = super::control()?.info(id)?;
    if !info.features.contains(Features::UNPRIVILEGED_DEV) {
        return Err(Failure::Text(format!("device {id} is no user's own")));
    }
    super::print(&format!("{} {}\n", info.owner_uid, info.owner_gid))
}

/// The device that a node belongs to.
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
    fn nodes_are_told_apart() {
        for (node, id) in [("ublkc0", 0), ("ublkb12", 12), ("ublkb12p3", 12)] {
            assert_eq!(device(node), Some(DeviceId(id)));
        }
        for node in ["ublk-control", "ublkc", "ublkbx", "ublkb", "sda1", "ublkc1p2"] {
            assert_eq!(device(node), None, "{node}");
        }
    }
}
