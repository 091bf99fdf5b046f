// SPDX-License-Identifier: MIT OR Apache-2.0

//! The only way into the interpreter for threads that may outlive it.
//!
//! The threads that serve devices are daemons: finalization does not wait for them. A daemon thread that enters the
//! interpreter during or after finalization uses a freed thread state, or is unwound through Rust frames, which is
//! undefined behaviour. So there is a gate, which an exit handler closes:
//!
//! 1. A thread that is detached from the interpreter enters it with a [`Permit`], and keeps the permit as long as there are
//!    Rust frames below Python frames on its stack, or until it runs only Python.
//! 2. No permit is given once the gate is closed, except to threads that have one already, to the thread that closed
//!    it, which is the one that finalizes, and, for a while, to threads that were in a call before.
//! 3. The interpreter is finalized only after the gate was closed and all permits were returned: [`close_gate`] waits for
//!    them, and ends the process without finalization if a permit is not returned.
//! 4. A thread that is outside, in a call of this module, may hold locks of the program that are needed by exit handlers
//!    and finalizers which run after the gate is closed. So [`close_gate`] waits for such threads to return to Python, where
//!    their next call fails in [`check_return`]. A thread that takes too long finds the gate sealed, and does not return.
//!
//! A Python thread that runs only Python needs no permit: the interpreter ends it correctly.
//!
//! A forked child has one thread, and its parent's permits do not count in it: a permit counts in the generation in which
//! it was given.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use pyo3::exceptions::{PyImportError, PyRuntimeError};
use pyo3::prelude::*;

use crate::stdio;

static CLOSED: AtomicBool = AtomicBool::new(false);
/// Set some time after `CLOSED`.
static SEALED: AtomicBool = AtomicBool::new(false);
/// Number of threads that are [outside](Outside), in a call.
static OUTSIDE: AtomicUsize = AtomicUsize::new(0);
/// Time that threads get to return from calls.
const RETURN_PATIENCE: Duration = Duration::from_secs(2);
/// Time that a process with a stuck handler gets to report that and to write its output.
const EXIT_SECONDS: f64 = 10.0;
/// Number of threads with a permit.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Number of forks between the first process and this one.
static GENERATION: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Number of permits that this thread has; only the first one counts in `INSIDE`.
    static PERMITS: Cell<usize> = const { Cell::new(0) };
    /// Whether this thread has closed the gate.
    static CLOSER: Cell<bool> = const { Cell::new(false) };
}

/// Fails in subinterpreters: the gate would close, and end all devices, when the first of the interpreters ends.
pub(crate) fn check_first() -> PyResult<()> {
    // SAFETY: the calling thread is attached, as modules are made by such a thread only.
    let id = unsafe { pyo3::ffi::PyInterpreterState_GetID(pyo3::ffi::PyInterpreterState_Get()) };
    if id != 0 {
        return Err(PyImportError::new_err("ublk works in the main interpreter only"));
    }
    Ok(())
}

/// Permission to use the interpreter on this thread.
#[derive(Debug)]
pub(crate) struct Permit {
    /// Generation in whose count it is, if any.
    counted: Option<usize>,
}

impl Permit {
    /// Returns a permit for the calling thread, or `None` if the interpreter is about to be finalized.
    fn new() -> Option<Self> {
        Self::unless(&CLOSED)
    }

    /// Returns a permit for a thread that returns from a call.
    fn back() -> Option<Self> {
        Self::unless(&SEALED)
    }

    fn unless(shut: &AtomicBool) -> Option<Self> {
        let nested = PERMITS.get() != 0 || CLOSER.get();
        let counted = if nested {
            None
        } else {
            INSIDE.fetch_add(1, Ordering::SeqCst);
            // After counting it: either this sees that the gate is closed, or the thread that closes it sees the count.
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
    /// Generation in whose count it is, if any.
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

/// Attaches the thread to the interpreter and calls a function. Returns `None`, without the call, if the interpreter has
/// been finalized or is about to be.
pub(crate) fn attach<R>(call: impl FnOnce(Python<'_>) -> R) -> Option<R> {
    let _permit = Permit::new()?;
    Python::try_attach(call)
}

/// Calls a function while other threads run Python. Also returns a permit, to be kept while Rust uses Python objects after
/// that.
///
/// Does not return if the interpreter is about to be finalized after the call, see (4): the thread is a daemon then.
pub(crate) fn detached<R: Send>(py: Python<'_>, call: impl FnOnce() -> R + Send) -> (R, Permit) {
    // While attached, so that no other thread runs between a check and this.
    let outside = Outside::new();
    let (result, permit) = py.detach(|| {
        let result = catch_unwind(AssertUnwindSafe(call));
        let permit = loop {
            match Permit::back() {
                Some(permit) => break permit,
                None => std::thread::park(),
            }
        };
        // Only after the permit counts.
        drop(outside);
        (result, permit)
    });
    (result.unwrap_or_else(|panic| resume_unwind(panic)), permit)
}

/// Returns a permit for a function that Python has called and that calls Python. Fails after the gate is closed.
pub(crate) fn permit() -> PyResult<Permit> {
    Permit::new().ok_or_else(shutting_down)
}

fn shutting_down() -> PyErr {
    PyRuntimeError::new_err("the interpreter is shutting down")
}

/// Fails if the interpreter is about to be finalized, when nothing can be served any more.
pub(crate) fn check_open() -> PyResult<()> {
    if CLOSED.load(Ordering::SeqCst) { Err(shutting_down()) } else { Ok(()) }
}

/// Fails if the interpreter is about to be finalized, for a thread that has returned from [`detached`] with this permit and
/// is about to call it again.
pub(crate) fn check_stay(permit: &Permit) -> PyResult<()> {
    if permit.counted.is_some() { check_open() } else { Ok(()) }
}

/// Fails if the calling thread could not return from [`detached`]. For functions that a program may call while it holds a
/// lock, which its exit handlers may need after the gate is closed.
pub(crate) fn check_return() -> PyResult<()> {
    if PERMITS.get() == 0 && !CLOSER.get() { check_open() } else { Ok(()) }
}

/// Closes the gate, and waits up to `seconds` until all other threads of this module have left the interpreter. If one has
/// not, the process exits with status 1: see (3). Threads that are in calls have a part of that time to return: see (4).
///
/// The last exit handler to run. It is written in Rust, so that no signal handler can interrupt it.
#[pyfunction]
pub(crate) fn close_gate(py: Python<'_>, seconds: f64) -> PyResult<()> {
    CLOSER.set(true);
    CLOSED.store(true, Ordering::SeqCst);
    let patience = Duration::from_secs_f64(seconds);
    let begin = Instant::now();
    let own = usize::from(PERMITS.get() != 0);
    // Not `detached`: this thread must always return.
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
        // In this order: a thread that returns is counted as inside before it is not counted as outside any more.
        wait(patience.min(RETURN_PATIENCE), &|| OUTSIDE.load(Ordering::SeqCst) == 0 && !inside());
        SEALED.store(true, Ordering::SeqCst);
        let empty = wait(patience, &|| !inside());
        if !empty {
            // Before this thread needs the interpreter again.
            exit_within(EXIT_SECONDS);
        }
        empty
    });
    if !empty {
        // It does not return. If a signal handler interrupts it, or the program has replaced something that it needs, the
        // process ends all the same.
        let _ = py.import("ublk._lifecycle").and_then(|module| module.getattr("exit_stuck")?.call0());
        exit_now();
    }
    Ok(())
}

/// Ends the process with status 1 after `seconds`, if it has not ended by then, whatever its other threads do.
#[pyfunction]
pub(crate) fn exit_within(seconds: f64) {
    let limit = Duration::from_secs_f64(seconds);
    let end = move || {
        std::thread::sleep(limit);
        exit_now();
    };
    // Without threads, this process depends on what the program has left intact.
    let _ = std::thread::Builder::new().name("ublk-exit".into()).spawn(end);
}

/// Ends the process with status 1, without exit handlers and finalization.
fn exit_now() -> ! {
    // SAFETY: ends the process without accessing memory.
    unsafe { nix::libc::_exit(1) }
}

/// Returns the number of forks between the first process and this one.
pub(crate) fn generation() -> usize {
    GENERATION.load(Ordering::Relaxed)
}

/// Ends the process if it is a child that was forked since `generation` and has returned from the handler: the request and
/// the ring of the thread belong to its parent.
pub(crate) fn end_forked_child(generation: usize) {
    if generation != self::generation() {
        exit_forked_child("returned from the handler that forked it");
    }
}

/// Ends a forked child that has left a handler in some way. Exit handlers are its parent's.
///
/// Written in Rust, so that no signal handler can interrupt it, and no lock matters that a thread of the parent has held.
#[pyfunction]
pub(crate) fn exit_forked_child(way: &str) {
    stdio::complain(&format!("a child process {way}; exiting with status 1"));
    exit_now();
}

/// Number of attempts to carry out a fork hook.
const HOOK_ATTEMPTS: usize = 100;

/// Calls a function until it returns: the handler of a signal may raise an exception at any place of it. Raises the first
/// exception at the end.
///
/// For fork hooks, without which a child could take itself for its parent. Written in Rust, so that no signal handler can
/// interrupt it between two attempts.
#[pyfunction]
pub(crate) fn run_fork_hook(hook: &Bound<'_, PyAny>) -> PyResult<()> {
    let mut first = None;
    for _ in 0..HOOK_ATTEMPTS {
        match hook.call0() {
            Ok(_) => break,
            Err(error) => {
                first.get_or_insert(error);
            }
        }
    }
    first.map_or(Ok(()), Err)
}

/// Forgets the parent's permits in a forked child.
#[pyfunction]
pub(crate) fn after_fork() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    INSIDE.store(0, Ordering::SeqCst);
    OUTSIDE.store(0, Ordering::SeqCst);
    CLOSED.store(false, Ordering::SeqCst);
    SEALED.store(false, Ordering::SeqCst);
    CLOSER.set(false);
}
