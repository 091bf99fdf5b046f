// SPDX-License-Identifier: MIT OR Apache-2.0

//! A request's memory as a Python object: a lease that ends with the request.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. A `Buffer` holds an `Arc` of its memory, and every exported view holds the `Buffer`: the memory
//!    outlives all views.
//! 2. Views are exported only while a lease is active, that is while the request is the server's and
//!    its handler runs. The engine reuses the memory only if no view is left when the lease ends; else
//!    it takes fresh memory for the tag, and exported views keep the old memory. A view that is being made is counted
//!    before the lease is checked, and the lease ends before the count is checked: one of both sees the other.
//! 3. Python code may race with itself on a view it shares between its threads, as with any writable
//!    buffer; nothing in Rust holds a reference to the bytes meanwhile.
//! 4. Without the interpreter lock another thread may be in the middle of a copy when its view is released, which
//!    no count shows. So memory is not reused if another thread has the view when the lease ends, and the `Buffer`
//!    lives until that thread has dropped the view.

use std::ffi::c_int;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError};

use pyo3::exceptions::PyBufferError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyMemoryView, PyWeakref, PyWeakrefReference};
use ublk_core::IoBuffer;

/// The memory of one tag.
#[pyclass(frozen, module = "ublk._ublk")]
#[derive(Debug)]
pub(crate) struct Buffer {
    memory: Arc<IoBuffer>,
    /// Length of the current request's data.
    len: AtomicUsize,
    readonly: AtomicBool,
    active: AtomicBool,
    exports: AtomicUsize,
}

#[pymethods]
impl Buffer {
    // SAFETY (of being called): Python passes a live `view` to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, view: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        this.exports.fetch_add(1, Ordering::SeqCst);
        if !this.active.load(Ordering::SeqCst) {
            this.exports.fetch_sub(1, Ordering::SeqCst);
            // SAFETY: `view` is valid for writes (caller); an exporter must clear `obj` when it refuses.
            unsafe { (*view).obj = std::ptr::null_mut() };
            return Err(PyBufferError::new_err("the request that this buffer belonged to has ended"));
        }
        let len = this.len.load(Ordering::Relaxed) as ffi::Py_ssize_t;
        let readonly = c_int::from(this.readonly.load(Ordering::Relaxed));
        let address = this.memory.as_ptr().cast();
        // SAFETY: (1) and (2): the memory has at least `len` bytes and lives as long as `slf`, which the
        // view now holds. The call raises an exception if the flags ask for something else.
        let result = unsafe { ffi::PyBuffer_FillInfo(view, slf.as_ptr(), address, len, readonly, flags) };
        if result != 0 {
            this.exports.fetch_sub(1, Ordering::SeqCst);
            return Err(PyErr::fetch(slf.py()));
        }
        Ok(())
    }

    // SAFETY (of being called): Python passes a view that `__getbuffer__` filled, once.
    unsafe fn __releasebuffer__(&self, _view: *mut ffi::Py_buffer) {
        self.exports.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Buffer object of a tag, created on first use and kept for the tag's next request.
#[derive(Debug, Default)]
pub(crate) struct CachedBuffer(Option<Py<Buffer>>);

impl CachedBuffer {
    /// Returns a view of the first `len` bytes of `memory` that is valid for one request.
    pub(crate) fn lease(
        &mut self,
        py: Python<'_>,
        memory: &Arc<IoBuffer>,
        len: usize,
        readonly: bool,
    ) -> PyResult<Lease> {
        match self.0.take().filter(|buffer| Arc::ptr_eq(&buffer.get().memory, memory)) {
            Some(buffer) => Lease::of(py, buffer, len, readonly),
            None => Lease::new(py, memory, len, readonly),
        }
    }

    /// Ends a lease. Returns false if Python still holds a view, which then keeps the memory.
    pub(crate) fn end(&mut self, py: Python<'_>, lease: Lease) -> bool {
        let (memory_is_free, buffer) = lease.end(py);
        self.0 = buffer;
        memory_is_free
    }
}

/// View of memory that is valid for one request.
#[derive(Debug)]
pub(crate) struct Lease {
    buffer: Py<Buffer>,
    view: Py<PyMemoryView>,
}

impl Lease {
    /// Creates a view of the first `len` bytes of `memory`.
    pub(crate) fn new(py: Python<'_>, memory: &Arc<IoBuffer>, len: usize, readonly: bool) -> PyResult<Self> {
        let buffer = Buffer {
            memory: memory.clone(),
            len: AtomicUsize::new(0),
            readonly: AtomicBool::new(true),
            active: AtomicBool::new(false),
            exports: AtomicUsize::new(0),
        };
        Self::of(py, Py::new(py, buffer)?, len, readonly)
    }

    fn of(py: Python<'_>, buffer: Py<Buffer>, len: usize, readonly: bool) -> PyResult<Self> {
        let state = buffer.get();
        assert!(len <= state.memory.len());
        state.len.store(len, Ordering::Relaxed);
        state.readonly.store(readonly, Ordering::Relaxed);
        state.active.store(true, Ordering::Release);
        let view = PyMemoryView::from(buffer.bind(py))?.unbind();
        Ok(Lease { buffer, view })
    }

    /// Returns the view for the handler.
    pub(crate) fn view<'py>(&self, py: Python<'py>) -> &Bound<'py, PyMemoryView> {
        self.view.bind(py)
    }

    /// Ends the lease. Returns whether the memory may be reused, that is whether Python holds no view of it, and the buffer
    /// object if there is no other reference to it.
    pub(crate) fn end(self, py: Python<'_>) -> (bool, Option<Py<Buffer>>) {
        let Lease { buffer, view } = self;
        buffer.get().active.store(false, Ordering::SeqCst);
        let shared = is_shared(view.as_ptr());
        if shared && cfg!(Py_GIL_DISABLED) {
            Keeper::until_gone(py, view.bind(py), &buffer);
        }
        if shared {
            // Fails if the view has exports itself, to an array for example; the count of exports then
            // shows it.
            let _ = view.call_method0(py, pyo3::intern!(py, "release"));
        }
        view.drop_ref(py);
        if shared && cfg!(Py_GIL_DISABLED) || buffer.get().exports.load(Ordering::SeqCst) != 0 {
            return (false, None);
        }
        // A holder of the object itself could create a view of the next request.
        let known = is_shared(buffer.as_ptr());
        (true, (!known).then_some(buffer))
    }
}

/// Returns whether there are references to an object besides the caller's.
fn is_shared(object: *mut ffi::PyObject) -> bool {
    // SAFETY: the caller's reference keeps the object alive; reading its count needs no more than being attached.
    let count = || unsafe { ffi::Py_REFCNT(object) };
    if cfg!(Py_GIL_DISABLED) && count() == 1 {
        // The count is the sum of two, and a reference may move from one to the other between reading them.
        fence(Ordering::SeqCst);
    }
    count() > 1
}

/// Holds a buffer until a view of it is gone, see (4).
#[pyclass(frozen, module = "ublk._ublk")]
struct Keeper {
    buffer: Mutex<Option<Py<Buffer>>>,
    /// The weak reference that calls this; they hold each other until it has.
    reference: Mutex<Option<Py<PyWeakref>>>,
}

impl Keeper {
    fn until_gone(py: Python<'_>, view: &Bound<'_, PyMemoryView>, buffer: &Py<Buffer>) {
        let keeper = Keeper { buffer: Mutex::new(Some(buffer.clone_ref(py))), reference: Mutex::default() };
        let made = Bound::new(py, keeper).and_then(|keeper| {
            let reference = PyWeakrefReference::new_with(view, &keeper)?;
            *keeper.get().reference.lock().unwrap_or_else(PoisonError::into_inner) =
                Some(reference.cast_into::<PyWeakref>()?.unbind());
            Ok(())
        });
        if made.is_err() {
            // If that fails for lack of memory, the buffer is never freed.
            std::mem::forget(buffer.clone_ref(py));
        }
    }
}

#[pymethods]
impl Keeper {
    fn __call__(&self, _reference: &Bound<'_, PyAny>) {
        let buffer = self.buffer.lock().unwrap_or_else(PoisonError::into_inner).take();
        let reference = self.reference.lock().unwrap_or_else(PoisonError::into_inner).take();
        // Dropped after the locks are released.
        drop((buffer, reference));
    }
}
