// SPDX-License-Identifier: MIT OR Apache-2.0

//! Built-in targets.

mod file;
mod file_properties;
mod files;
mod mem;
mod null;
mod protected_file;
mod protection;
mod range_locks;
mod sparse;
mod zoned;

pub use file::{File, FileOptions, Io};
#[cfg(feature = "cli")]
pub(crate) use file_properties::size as file_size;
pub use mem::Mem;
pub use null::Null;
pub use zoned::{Zoned, ZonedOptions};
