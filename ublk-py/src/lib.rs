// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk._ublk`: `ublk-core` for the Python package. This crate only converts; policy is in the Python
//! modules.

mod any_request;
mod buffer;
mod call;
mod cli;
mod descriptor;
mod device;
mod error;
mod extents;
mod fake;
mod flushes;
mod handler;
mod held;
mod holders;
mod interpreter;
mod logging;
mod methods;
mod operations;
mod pending;
mod pull;
mod request;
mod start;
mod stats;
mod stdio;
mod system;
mod targets;
mod threads;
mod watch;

use pyo3::prelude::*;

/// The native half of the `ublk` package. Private: use `ublk`.
#[pymodule(name = "_ublk", gil_used = false)]
mod module {
    #[pymodule_export]
    use super::buffer::Buffer;
    #[pymodule_export]
    use super::cli::main;
    #[pymodule_export]
    use super::descriptor::fdatasync;
    #[pymodule_export]
    use super::device::NativeDevice;
    #[pymodule_export]
    use super::extents::{Extents, PyExtent, PyZeros};
    #[pymodule_export]
    use super::fake::FakeDriver;
    #[pymodule_export]
    use super::interpreter::{after_fork, close_gate, exit_forked_child, exit_within, run_fork_hook};
    #[pymodule_export]
    use super::pending::call_in_main_thread;
    #[pymodule_export]
    use super::pull::{PyPullQueue, Worker};
    #[pymodule_export]
    use super::request::PyRequest;
    #[pymodule_export]
    use super::start::{add, check, recover};
    #[pymodule_export]
    use super::system::{delete, device, devices, features, quiesce, resize};
    #[pymodule_export]
    use super::targets::NativeTarget;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        interpreter::check_first()?;
        stdio::secure(module.py())?;
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
