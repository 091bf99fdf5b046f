// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages of the repository whose Rust code the documentation tests compile.

#[doc = include_str!("../../README.md")]
mod readme {}

#[doc = include_str!("../../docs/porting/libublk-rs.md")]
mod libublk_rs {}
