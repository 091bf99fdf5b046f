// SPDX-License-Identifier: MIT OR Apache-2.0

//! Extents returned by Python: the location of a request's bytes instead of the bytes.

use std::convert::identity;
use std::os::fd::AsRawFd;
use std::time::Duration;

use pyo3::exceptions::{PyOSError, PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyTuple, PyType};
use ublk_core::extents::files::{self, SharedFile};
use ublk_core::extents::{Direction, Extent, ExtentMap, Flight, Moment};
use ublk_core::{Op, Pieces, Request};

use crate::any_request::AnyRequest;
use crate::descriptor::with_descriptor;
use crate::error::os_error;
use crate::flushes::Flushes;
use crate::interpreter;
use crate::operations::op_object;

/// Location of a range of the disk in a file.
#[pyclass(frozen, module = "ublk", name = "Extent")]
#[derive(Debug)]
pub(crate) struct PyExtent {
    file: SharedFile,
    #[pyo3(get)]
    offset: u64,
    #[pyo3(get)]
    length: u64,
    /// First byte on the disk; by default the first byte of the request.
    #[pyo3(get)]
    start: Option<u64>,
    #[pyo3(get)]
    stable: bool,
}

#[pymethods]
impl PyExtent {
    #[new]
    #[pyo3(signature = (file, offset, length, *, start = None, stable = false))]
    fn new(file: &Bound<'_, PyAny>, offset: u64, length: u64, start: Option<u64>, stable: bool) -> PyResult<Self> {
        check_length(length, offset, start)?;
        let file = with_descriptor(file, |file| {
            files::shared(file).map_err(|errno| {
                let text =
                    "the file of an extent must be a regular file or a block device, and not opened with O_APPEND";
                PyOSError::new_err((errno.get(), format!("{}: {text}", errno.known().desc())))
            })
        })?;
        Ok(PyExtent { file, offset, length, start, stable })
    }

    fn __repr__(&self) -> String {
        format!("<ublk.Extent {}+{} of descriptor {}>", self.offset, self.length, self.file.file.as_raw_fd())
    }
}

/// Range of the disk that reads as zeros.
#[pyclass(frozen, module = "ublk", name = "Zeros")]
#[derive(Debug)]
pub(crate) struct PyZeros {
    #[pyo3(get)]
    length: u64,
    #[pyo3(get)]
    start: Option<u64>,
    #[pyo3(get)]
    stable: bool,
}

#[pymethods]
impl PyZeros {
    #[new]
    #[pyo3(signature = (length, *, start = None, stable = false))]
    fn new(length: u64, start: Option<u64>, stable: bool) -> PyResult<Self> {
        check_length(length, 0, start)?;
        Ok(PyZeros { length, start, stable })
    }

    fn __repr__(&self) -> String {
        format!("<ublk.Zeros {}>", self.length)
    }
}

fn check_length(length: u64, offset: u64, start: Option<u64>) -> PyResult<()> {
    let limit = i64::MAX as u64;
    let beyond = |from: u64| from > limit || length > limit - from;
    if length == 0 || beyond(offset) || start.is_some_and(beyond) {
        return Err(PyValueError::new_err(format!("invalid length of an extent: {length} bytes")));
    }
    Ok(())
}

/// Outcome of [`Mapper::ask`].
pub(crate) enum Mapped {
    /// The request's bytes are stored there.
    At(Pieces, Flight),
    /// The handler has to serve the request.
    Unknown,
}

/// Extents of a device, and the method that returns them.
#[derive(Debug)]
pub(crate) struct Mapper {
    pub(crate) map: Py<PyAny>,
    pub(crate) extents: DiskExtents,
}

/// Extents of a block device, and the flushes that make writes to them durable.
#[derive(Clone, Debug, Default)]
pub(crate) struct DiskExtents {
    pub(crate) map: ExtentMap,
    pub(crate) flushes: Flushes,
}

impl DiskExtents {
    /// Forwards a request to the files that store its bytes.
    pub(crate) fn forward(&self, request: Request<'_>, pieces: Pieces, flight: Flight) {
        self.flushes.forwarded(request.op());
        request.forward_pieces(pieces, flight);
    }
}

/// Number of attempts to get an extent that is not invalidated meanwhile.
pub(crate) const ATTEMPTS: u32 = 16;

fn direction(op: Op) -> Option<Direction> {
    match op {
        Op::Read => Some(Direction::Read),
        Op::Write => Some(Direction::Write),
        _ => None,
    }
}

impl Mapper {
    pub(crate) fn clone_ref(&self, py: Python<'_>) -> Self {
        Mapper { map: self.map.clone_ref(py), extents: self.extents.clone() }
    }

    /// Forwards a request whose extents are cached, without Python. Returns any other request.
    pub(crate) fn forward_known<'q>(&self, request: Request<'q>) -> Option<Request<'q>> {
        let found = direction(request.op()).and_then(|d| self.extents.map.find(d, request.offset(), request.len()));
        match found {
            Some((pieces, flight)) => {
                self.extents.forward(request, pieces, flight);
                None
            }
            None => Some(request),
        }
    }

    /// Calls `map` for a request.
    pub(crate) fn ask(&self, py: Python<'_>, request: &Request<'_>) -> PyResult<Mapped> {
        let Some(direction) = direction(request.op()) else { return Ok(Mapped::Unknown) };
        let (start, end) = (request.offset(), request.offset() + request.len());
        for _ in 0..ATTEMPTS {
            let asked = self.extents.map.now();
            let mut extents = Vec::new();
            let mut at = start;
            while at < end {
                let answer = self.map.bind(py).call1((op_object(py, request.op())?, at, end - at))?;
                if answer.is_none() {
                    return Ok(Mapped::Unknown);
                }
                let (extent, stable) = convert(&answer, "map", at, direction)?.ok_or_else(|| {
                    let name = answer.get_type().name();
                    name.map_or_else(identity, |name| {
                        PyTypeError::new_err(format!("map returned {name}; it must return Extent, Zeros or None"))
                    })
                })?;
                if !(extent.start..extent.end()).contains(&at) {
                    let (start, end) = (extent.start, extent.end());
                    let text = format!("map returned an extent of {start} to {end} for byte {at}");
                    return Err(PyValueError::new_err(text));
                }
                if stable {
                    self.extents.map.insert(direction, extent.clone(), asked);
                }
                let to = extent.end().min(end);
                extents.push(extent.part(at, to));
                at = to;
            }
            if let Some((pieces, flight)) = self.extents.map.admit(extents, asked) {
                return Ok(Mapped::At(pieces, flight));
            }
        }
        Ok(Mapped::Unknown)
    }
}

/// Converts an extent that Python has returned for byte `at`, and whether to cache it. `None` if it is something else.
fn convert(answer: &Bound<'_, PyAny>, who: &str, at: u64, direction: Direction) -> PyResult<Option<(Extent, bool)>> {
    let refused = |text: &str| Err(PyValueError::new_err(format!("{who} returned {text}")));
    if let Ok(extent) = answer.cast::<PyExtent>() {
        let PyExtent { file, offset, length, start, stable } = extent.get();
        let (start, len, offset) = (start.unwrap_or(at), *length, *offset);
        match direction {
            Direction::Read if !file.readable => {
                return refused("an extent for a read, whose file is not open for reading");
            }
            Direction::Write if !file.writable => {
                return refused("an extent for a write, whose file is not open for writing");
            }
            _ => {}
        }
        return Ok(Some((Extent { start, len, file: file.file.clone(), offset }, *stable)));
    }
    if let Ok(zeros) = answer.cast::<PyZeros>() {
        if direction == Direction::Write {
            return refused("Zeros for a write, and they cannot be written to");
        }
        let PyZeros { length, start, stable } = zeros.get();
        let (start, len, file) = (start.unwrap_or(at), *length, files::zeros().map_err(os_error)?);
        return Ok(Some((Extent { start, len, file, offset: 0 }, *stable)));
    }
    Ok(None)
}

/// Outcome of [`forward_returned`].
pub(crate) enum Returned<R> {
    /// The engine carries out the request.
    Forwarded,
    /// The extent was invalidated meanwhile: the handler must be called again.
    Stale(R),
    /// The extent is invalid for the request.
    Refused(R, PyErr),
}

/// Returns whether a handler has returned an extent instead of transferring the data.
pub(crate) fn is_extent(op: Op, value: &Bound<'_, PyAny>) -> bool {
    direction(op).is_some() && (value.is_instance_of::<PyExtent>() || value.is_instance_of::<PyZeros>())
}

/// Forwards a request whose handler has returned an [extent](is_extent). `asked` is when the handler was called.
pub(crate) fn forward_returned<'q, R: AnyRequest<'q>>(
    request: R,
    value: &Bound<'_, PyAny>,
    who: &str,
    extents: &DiskExtents,
    asked: Moment,
) -> Returned<R> {
    let (start, end) = (request.get().offset(), request.get().offset() + request.get().len());
    let found = direction(request.get().op()).map(|direction| convert(value, who, start, direction));
    let extent = match found.unwrap_or(Ok(None)) {
        Ok(Some((_, true))) => {
            let text = format!("{who} returned a stable extent; only map may do so");
            return Returned::Refused(request, PyValueError::new_err(text));
        }
        Ok(Some((extent, false))) if extent.start <= start && end <= extent.end() => extent.part(start, end),
        Ok(Some((extent, false))) => {
            let (from, to) = (extent.start, extent.end());
            let text = format!("{who} returned an extent of {from} to {to} for a request of {start} to {end}");
            return Returned::Refused(request, PyValueError::new_err(text));
        }
        Ok(None) => return Returned::Refused(request, PyTypeError::new_err(format!("{who} returned no extent"))),
        Err(error) => return Returned::Refused(request, error),
    };
    match extents.map.admit(vec![extent], asked) {
        Some((pieces, flight)) => {
            extents.forward(request.into(), pieces, flight);
            Returned::Forwarded
        }
        None => Returned::Stale(request),
    }
}

/// Extents of a block device, shared by all devices that serve it.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug, Default)]
pub(crate) struct Extents(pub(crate) DiskExtents);

#[pymethods]
impl Extents {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Returns the extents for an object that replaces this one: none yet, and the same flushes, so that a failed one is
    /// not forgotten.
    fn successor(&self) -> Self {
        Extents(DiskExtents { map: ExtentMap::default(), flushes: self.0.flushes.clone() })
    }

    /// Invalidates extents and, unless `wait` is `None`, waits up to so many seconds for requests in flight on them. Returns
    /// false if some are still in flight.
    fn invalidate(&self, py: Python<'_>, offset: u64, length: u64, wait: Option<f64>) -> PyResult<bool> {
        self.0.map.invalidate(offset, length);
        let Some(seconds) = wait else { return Ok(true) };
        interpreter::check_return()?;
        let timeout = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Ok(interpreter::detached(py, || self.0.map.drain(offset, length, timeout)).0)
    }

    fn __len__(&self) -> usize {
        self.0.map.len()
    }

    /// A copy in another process has no extents, because their files are open in this process.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> (Bound<'py, PyType>, Bound<'py, PyTuple>) {
        (slf.get_type(), PyTuple::empty(slf.py()))
    }
}
