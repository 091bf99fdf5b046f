// SPDX-License-Identifier: MIT OR Apache-2.0

//! Ring threads as `threading.Thread`s: the interpreter's thread state then lives as long as the
//! thread, and debuggers and tracers see it.

use std::io;
use std::sync::Mutex;

use pyo3::prelude::*;
use ublk_core::Spawn;

use crate::interpreter;

/// Creates threads with a Python function `(name, body) -> None`.
#[derive(Debug)]
pub(crate) struct PythonSpawn(pub(crate) Py<PyAny>);

impl Spawn for PythonSpawn {
    fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<()> {
        interpreter::attach(|py| self.0.call1(py, (name, Body(Mutex::new(Some(body))))).map(drop))
            .unwrap_or_else(|| Err(pyo3::exceptions::PyRuntimeError::new_err("the interpreter is shutting down")))
            .map_err(io::Error::other)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// Body of a ring thread, to be called once.
#[pyclass(frozen, module = "ublk._ublk")]
struct Body(Mutex<Option<Job>>);

#[pymethods]
impl Body {
    fn __call__(&self, py: Python<'_>) {
        let job = self.0.lock().ok().and_then(|mut job| job.take());
        if let Some(job) = job {
            interpreter::detached(py, job);
        }
    }
}
