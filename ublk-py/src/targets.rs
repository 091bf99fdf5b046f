// SPDX-License-Identifier: MIT OR Apache-2.0

//! Targets of `ublk-core`, created by Python and served without it.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use ublk_core::targets::{File, FileOptions, Io, Mem, Null, Zoned, ZonedOptions};
use ublk_core::{Access, BackingIdentity, Params, QueueHandler, QueueInfo, Result, Target};

use crate::error::to_python;
use crate::interpreter;
use crate::operations::operation_names;

/// Target of `ublk-core`.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct NativeTarget {
    target: Arc<dyn Target>,
    /// The same, if it is a file.
    file: Option<Arc<File>>,
}

impl NativeTarget {
    fn make<T: Target>(py: Python<'_>, make: impl FnOnce() -> Result<T> + Send) -> PyResult<Self> {
        Ok(NativeTarget { target: Self::open(py, make)?, file: None })
    }

    fn open<T: Send + Sync>(py: Python<'_>, open: impl FnOnce() -> Result<T> + Send) -> PyResult<Arc<T>> {
        interpreter::check_return()?;
        let (opened, _permit) = interpreter::detached(py, open);
        opened.map(Arc::new).map_err(|e| to_python(py, &e))
    }

    fn params(&self) -> Params {
        self.target.params()
    }
}

/// Target whose disk was resized after the target was created.
#[derive(Debug)]
struct Resized {
    target: Arc<dyn Target>,
    size: u64,
}

impl Target for Resized {
    fn kind(&self) -> &str {
        self.target.kind()
    }

    fn params(&self) -> Params {
        let mut params = self.target.params();
        params.size = self.size;
        params
    }

    fn access(&self) -> Access {
        self.target.access()
    }

    fn backing(&self) -> Option<BackingIdentity> {
        self.target.backing()
    }

    fn open_queue(self: Arc<Self>, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        self.target.clone().open_queue(queue)
    }
}

impl NativeTarget {
    /// Returns the target with the current size of its disk.
    pub(crate) fn sized(&self, size: u64) -> Arc<dyn Target> {
        let target = self.target.clone();
        if target.params().size == size { target } else { Arc::new(Resized { target, size }) }
    }
}

#[pymethods]
impl NativeTarget {
    /// Target that accepts every request and stores nothing.
    #[staticmethod]
    fn null(py: Python<'_>, size: u64, block_size: u32) -> PyResult<Self> {
        Self::make(py, || Null::new(size, block_size))
    }

    /// RAM disk.
    #[staticmethod]
    fn mem(py: Python<'_>, size: u64, block_size: u32) -> PyResult<Self> {
        Self::make(py, || Mem::new(size, block_size))
    }

    /// Disk in a file or on a block device, which is opened and locked here.
    #[staticmethod]
    fn file(
        py: Python<'_>,
        path: PathBuf,
        read_only: bool,
        block_size: Option<u32>,
        direct: Option<bool>,
    ) -> PyResult<Self> {
        let io = match direct {
            None => Io::Auto,
            Some(true) => Io::Direct,
            Some(false) => Io::Buffered,
        };
        let mut options = FileOptions::new().io(io).read_only(read_only);
        options.logical_block_size = block_size;
        let file = Self::open(py, || File::open(path, &options))?;
        Ok(NativeTarget { target: file.clone(), file: Some(file) })
    }

    /// Zoned disk, in memory or with a file for each zone.
    #[staticmethod]
    #[allow(clippy::too_many_arguments, reason = "a private function with one caller, which passes all by name")]
    fn zoned(
        py: Python<'_>,
        size: u64,
        zone_size: u32,
        conventional_zones: u32,
        max_open_zones: u32,
        max_active_zones: u32,
        block_size: u32,
        directory: Option<PathBuf>,
    ) -> PyResult<Self> {
        if zone_size == 0 {
            return Err(PyValueError::new_err("zone_size = 0: must be a power of two"));
        }
        let mut options = ZonedOptions::new(size).zone_size(zone_size).conventional(conventional_zones);
        options = options.max_open(max_open_zones).max_active(max_active_zones).logical_block_size(block_size);
        options.directory = directory;
        Self::make(py, || Zoned::open(&options))
    }

    #[getter]
    fn kind(&self) -> String {
        self.target.kind().to_owned()
    }

    #[getter]
    fn size(&self) -> u64 {
        self.params().size
    }

    /// Current size of the open file in bytes; None for other targets.
    #[getter]
    fn backing_size(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        let size = self.file.as_ref().map(|file| file.backing_size());
        size.transpose().map_err(|e| to_python(py, &e))
    }

    #[getter]
    fn block_size(&self) -> u32 {
        self.params().logical_block_size
    }

    #[getter]
    fn read_only(&self) -> bool {
        self.params().read_only
    }

    /// Names of the operations that it supports besides reads.
    #[getter]
    fn operations(&self) -> Vec<&'static str> {
        operation_names(self.params().operations)
    }
}
