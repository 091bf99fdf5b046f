// SPDX-License-Identifier: MIT OR Apache-2.0

//! The `ublk` command inside the Python package.

use std::ffi::OsString;

use pyo3::prelude::*;
use ublk_core::cli::{ExtraCommand, Host};

use crate::{interpreter, logging};

/// Runs the command and returns its exit status. `relaunch` starts this program again, for servers in the background;
/// `extra` are the names and descriptions of commands that the caller handles.
#[pyfunction]
pub(crate) fn main(
    py: Python<'_>,
    arguments: Vec<OsString>,
    relaunch: Vec<OsString>,
    extra: Vec<(String, String)>,
) -> PyResult<u8> {
    logging::follow(py)?;
    let command = |(name, about)| ExtraCommand { name, about, ..ExtraCommand::default() };
    let extra = extra.into_iter().map(command).collect();
    Ok(interpreter::detached(py, || ublk_core::cli::run(arguments, &Host { relaunch, extra })).0)
}
