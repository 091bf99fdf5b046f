// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk quiesce`.

use super::failure::{Failure, Outcome};
use crate::control::Control;
use crate::control::DRAIN_TIMEOUT;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
}

pub(super) fn run(args: &Args) -> Outcome {
    Control::open()?.quiesce_until(DeviceId(args.id), DRAIN_TIMEOUT).map(drop).map_err(Failure::from)
}
