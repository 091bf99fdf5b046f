// SPDX-License-Identifier: MIT OR Apache-2.0

//! Parts of the test programs that use the driver directly (`tests/differential`, `tests/endurance`).

pub mod random;
pub mod uapi;
