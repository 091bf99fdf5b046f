// SPDX-License-Identifier: MIT OR Apache-2.0

//! The `ublk` command inside the Python package.

use std::ffi::OsString;

use pyo3::prelude::*;
use ublk_core::cli::{BenchDisk, ExtraArgument, ExtraCommand, Host};

use crate::{interpreter, logging};

/// Description of a command that the package handles, from a dictionary.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Command {
    name: String,
    about: String,
    description: String,
    usage: String,
    arguments: Vec<Argument>,
}

/// Description of an argument of such a command, from a dictionary.
#[derive(FromPyObject)]
#[pyo3(from_item_all)]
pub(crate) struct Argument {
    names: Vec<String>,
    value: Option<String>,
    help: String,
}

impl From<Command> for ExtraCommand {
    fn from(Command { name, about, description, usage, arguments }: Command) -> Self {
        let argument = |Argument { names, value, help }| ExtraArgument { names, value, help };
        ExtraCommand { name, about, description, usage, arguments: arguments.into_iter().map(argument).collect() }
    }
}

/// Runs the command and returns its exit status. `relaunch` starts this program again, for servers in the background;
/// `extra` describes commands that the caller handles, and `bench` has the disks for `ublk bench`, by name.
#[pyfunction]
pub(crate) fn main(
    py: Python<'_>,
    arguments: Vec<OsString>,
    relaunch: Vec<OsString>,
    extra: Vec<Command>,
    bench: Vec<(String, Vec<OsString>)>,
) -> PyResult<u8> {
    logging::follow(py)?;
    let extra = extra.into_iter().map(ExtraCommand::from).collect();
    let bench = bench.into_iter().map(|(name, serve)| BenchDisk { name, serve }).collect();
    Ok(interpreter::detached(py, || ublk_core::cli::run(arguments, &Host { relaunch, extra, bench })).0)
}
