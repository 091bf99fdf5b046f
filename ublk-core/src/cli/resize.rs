// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk resize`.

use super::state::State;
use super::{Outcome, size};
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Number of the device
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// The new size, e.g. 2G [default: that of the backing file]
    #[arg(short, long, value_parser = size::parse)]
    size: Option<u64>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let id = DeviceId(args.id);
    let control = super::control()?;
    let present = control.params(id)?.params.size;
    // What its server can serve stands in the state file.
    let bytes = State::load(id)?.add_args()?.new_size(args.size, present)?;
    control.update_size(id, bytes)?;
    Ok(())
}
