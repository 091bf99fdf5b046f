// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a server needs that carries swap, or the file system that programs are run from: the system must not
//! wait for memory that only this process can free.
//!
//! Threads that serve queues are marked as part of a write-out path in any case (`PR_SET_IO_FLUSHER`).

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::errno::Errno;
use crate::error::{Error, Result, errno_of};

static LOCKED: AtomicBool = AtomicBool::new(false);

/// Keeps all memory that this process has and will have in RAM, request buffers included: queues times depth times
/// the longest request where the driver copies. Memory of idle devices is then not given back.
///
/// Call it before devices are started.
///
/// # Errors
///
/// [`Error::Process`] with `EPERM` or `ENOMEM` without `CAP_IPC_LOCK`, unless `RLIMIT_MEMLOCK` allows it.
pub fn lock_memory() -> Result<()> {
    let locked = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE).map_err(Errno::from);
    locked.map_err(|errno| Error::Process {
        operation: "locking its memory",
        errno,
        hint: match errno {
            Errno::EPERM | Errno::ENOMEM | Errno::EAGAIN => {
                "needs CAP_IPC_LOCK or a higher limit of locked memory (RLIMIT_MEMLOCK)".into()
            }
            _ => String::new(),
        },
    })?;
    LOCKED.store(true, Ordering::Relaxed);
    Ok(())
}

/// Returns whether [`lock_memory`] was called.
pub(crate) fn memory_is_locked() -> bool {
    LOCKED.load(Ordering::Relaxed)
}

/// Keeps this process and those that it makes from being killed when the system is out of memory.
///
/// # Errors
///
/// [`Error::Process`] with `EACCES` without `CAP_SYS_RESOURCE`.
pub fn refuse_oom_kill() -> Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000").map_err(|e| Error::Process {
        operation: "protecting itself from the out-of-memory killer",
        errno: errno_of(&e),
        hint: match errno_of(&e) {
            Errno::EACCES | Errno::EPERM => "needs CAP_SYS_RESOURCE".into(),
            _ => String::new(),
        },
    })
}
