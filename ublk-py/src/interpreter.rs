// SPDX-License-Identifier: MIT OR Apache-2.0

//! The only way into the interpreter for threads that may outlive it.
//!
//! The threads that serve devices are daemons: finalization does not wait for them. A daemon thread that enters the
//! interpreter during or after that uses a thread state that is freed, or is unwound through frames of Rust that cannot
//! be. So there is a gate, which an exit handler closes:
//!
//! 1. A thread that is not the interpreter's own at that moment enters with a [`Permit`], and keeps it for as long as
//!    there are frames of Rust below Python's on its stack, or until it runs nothing but Python.
//! 2. No permit is given once the gate is closed, except to threads that have one already, to the thread that closed
//!    it, which is the one that finalizes, and, for a while, to threads that Python had sent out before.
//! 3. The interpreter is finalized only after the gate was closed and all permits were given back: [`close_gate`] waits
//!    for them, and ends the process without finalization if they do not come.
//! 4. A thread that is out in a call of this module may hold locks of the program, which exit handlers and finalizers
//!    want that run after the gate is closed. So [`close_gate`] waits for such threads to come back to Python, where
//!    they run into [`check_return`] with the next call. One that takes too long comes back to a gate that is sealed, and
//!    does not return.
//!
//! A thread that Python has made, and that runs nothing but Python, needs none: the interpreter ends it in the right way.
//!
//! A forked child has one thread, and its parent's permits are none of its own: they count for the generation that
//! they were given in.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyImportError, PyRuntimeError};
use pyo3::prelude::*;

static CLOSED: AtomicBool = AtomicBool::new(false);
/// Set some time after `CLOSED`.
static SEALED: AtomicBool = AtomicBool::new(false);
/// Threads that are [out](Outside) in a call.
static OUTSIDE: AtomicUsize = AtomicUsize::new(0);
/// How long threads have to come back from calls.
const RETURN_PATIENCE: Duration = Duration::from_secs(2);
/// Threads with a permit.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Forks between the first process and this one.
static GENERATION: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// How many permits this thread has; only the first one counts in `INSIDE`.
    static PERMITS: Cell<usize> = const { Cell::new(0) };
    /// Whether this thread has closed the gate.
    static CLOSER: Cell<bool> = const { Cell::new(false) };
}

/// An error in another interpreter of the process than the first one. The gate, and with it all devices, would end with
/// whichever interpreter ends first.
pub(crate) fn check_first() -> PyResult<()> {
    // SAFETY: the calling thread is attached, as modules are made by such a thread only.
    let id = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    if id != 0 {
        return Err(PyImportError::new_err("ublk works in the main interpreter only"));
    }
    Ok(())
}

/// Leave to use the interpreter on this thread.
#[derive(Debug)]
pub(crate) struct Permit {
    /// The generation whose count it is in, if it is.
    counted: Option<usize>,
}

impl Permit {
    /// A permit for the calling thread. None if the interpreter is about to be finalized.
    fn new() -> Option<Self> {
        Self::unless(&CLOSED)
    }

    /// A permit for a thread that comes back from a call.
    fn back() -> Option<Self> {
        Self::unless(&SEALED)
    }

    fn unless(shut: &AtomicBool) -> Option<Self> {
        let nested = PERMITS.get() != 0 || CLOSER.get();
        let counted = if nested {
            None
        } else {
            INSIDE.fetch_add(1, Ordering::SeqCst);
            // After it counts: either this sees that the gate is shut, or the thread that shuts it sees the count.
            if shut.load(Ordering::SeqCst) {
                INSIDE.fetch_sub(1, Ordering::SeqCst);
                return None;
            }
            Some(GENERATION.load(Ordering::Relaxed))
        };
        PERMITS.set(PERMITS.get() + 1);
        Some(Permit { counted })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        PERMITS.set(PERMITS.get() - 1);
        if self.counted.is_some_and(|generation| generation == GENERATION.load(Ordering::Relaxed)) {
            INSIDE.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Counts a thread that is in a call without a permit.
#[derive(Debug)]
struct Outside {
    /// The generation whose count it is in, if it is.
    counted: Option<usize>,
}

impl Outside {
    fn new() -> Self {
        let counted = (PERMITS.get() == 0 && !CLOSER.get()).then(|| GENERATION.load(Ordering::Relaxed));
        if counted.is_some() {
            OUTSIDE.fetch_add(1, Ordering::SeqCst);
        }
        Outside { counted }
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        if self.counted.is_some_and(|generation| generation == GENERATION.load(Ordering::Relaxed)) {
            OUTSIDE.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

/// Attaches the thread to the interpreter for the time of a call. None, without the call, if the interpreter is gone
/// or about to go.
pub(crate) fn attach<R>(call: impl FnOnce(Python<'_>) -> R) -> Option<R> {
    let _permit = Permit::new()?;
    Python::try_attach(call)
}

/// Calls a function while other threads run Python. Returns a permit besides, to be kept while Rust still has something
/// to do with Python after that.
///
/// Does not return if the call takes so long that the interpreter is about to be finalized, see (4): the thread is a
/// daemon then, whose end nothing waits for.
pub(crate) fn detached<R: Send>(py: Python<'_>, call: impl FnOnce() -> R + Send) -> (R, Permit) {
    // While attached: no other thread gets between a check and this.
    let outside = Outside::new();
    let (result, permit) = py.detach(|| {
        let result = catch_unwind(AssertUnwindSafe(call));
        let permit = loop {
            match Permit::back() {
                Some(permit) => break permit,
                None => std::thread::park(),
            }
        };
        // Not before the permit counts.
        drop(outside);
        (result, permit)
    });
    (result.unwrap_or_else(|panic| resume_unwind(panic)), permit)
}

/// A permit for a function that Python has called, and that calls Python. An error if there is none any more.
pub(crate) fn permit() -> PyResult<Permit> {
    Permit::new().ok_or_else(shutting_down)
}

fn shutting_down() -> PyErr {
    PyRuntimeError::new_err("the interpreter is shutting down: no device can be served any more")
}

/// An error if the interpreter is about to be finalized, when nothing can be served any more.
pub(crate) fn check_open() -> PyResult<()> {
    if CLOSED.load(Ordering::SeqCst) { Err(shutting_down()) } else { Ok(()) }
}

/// An error if a thread that has come back from [`detached`] with this permit is to go out again, and the interpreter is
/// about to be finalized.
pub(crate) fn check_stay(permit: &Permit) -> PyResult<()> {
    if permit.counted.is_some() { check_open() } else { Ok(()) }
}

/// An error if the calling thread could not come back from [`detached`]. For functions that a program may call with a lock of
/// its own: exit handlers of the program that run after the gate is closed may want that lock.
pub(crate) fn check_return() -> PyResult<()> {
    if PERMITS.get() == 0 && !CLOSER.get() { check_open() } else { Ok(()) }
}

/// Keeps all other threads of this module out of the interpreter from now on, and waits for `seconds` at most until they
/// are out. If they are not, a handler does not return, and the process ends with status 1: see (3). Threads that are in
/// calls have a part of that time to come back: see (4).
///
/// The last exit handler to run; a function of Rust, so that no signal's handler can keep it from its work.
#[pyfunction]
pub(crate) fn close_gate(py: Python<'_>, seconds: f64) -> PyResult<()> {
    CLOSER.set(true);
    CLOSED.store(true, Ordering::SeqCst);
    let patience = Duration::from_secs_f64(seconds);
    let begin = Instant::now();
    let own = usize::from(PERMITS.get() != 0);
    // Not `detached`: this is the thread that may always come back.
    let empty = py.detach(|| {
        let wait = |patience, done: &dyn Fn() -> bool| {
            while !done() {
                if begin.elapsed() >= patience {
                    return false;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            true
        };
        let inside = || INSIDE.load(Ordering::SeqCst) > own;
        // In this order: who comes back is inside before it is not outside any more.
        wait(patience.min(RETURN_PATIENCE), &|| OUTSIDE.load(Ordering::SeqCst) == 0 && !inside());
        SEALED.store(true, Ordering::SeqCst);
        wait(patience, &|| !inside())
    });
    if !empty {
        eprintln!("ublk: a handler is stuck; exiting immediately");
        py.import("os")?.getattr("_exit")?.call1((1,))?;
    }
    Ok(())
}

/// How many forks there were between the first process and this one.
pub(crate) fn generation() -> usize {
    GENERATION.load(Ordering::Relaxed)
}

/// Ends the process if it is a child that was forked since `generation`, in a handler that has returned: the request, and
/// the ring that the thread would go on with, are its parent's.
pub(crate) fn end_forked_child(generation: usize) {
    if generation == self::generation() {
        return;
    }
    eprintln!("ublk: a process that a handler has forked has returned from the handler; it ends with status 1");
    // SAFETY: ends the process, and touches no memory. Exit handlers would be the parent's.
    unsafe { nix::libc::_exit(1) };
}

/// Forgets the parent's permits, in a forked child.
#[pyfunction]
pub(crate) fn after_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    INSIDE.store(0, Ordering::SeqCst);
    OUTSIDE.store(0, Ordering::SeqCst);
    CLOSED.store(false, Ordering::SeqCst);
    SEALED.store(false, Ordering::SeqCst);
    CLOSER.set(false);
}
