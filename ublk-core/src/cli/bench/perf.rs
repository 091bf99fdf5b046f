// SPDX-License-Identifier: MIT OR Apache-2.0

//! Hardware counters of executed instructions and of cycles, kernel and user together.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. [`Attributes`] is the first version of `struct perf_event_attr` (64 bytes), as its `size` states. The kernel only reads
//!    it, and only during the call.
//! 2. A descriptor that the kernel has just returned belongs to this process alone.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};

use crate::errno::Errno;
use crate::error::errno_of;
use crate::placement::CpuSet;

/// `PERF_TYPE_HARDWARE`, and two of its events.
const HARDWARE: u32 = 0;
const CYCLES: u64 = 0;
const INSTRUCTIONS: u64 = 1;
/// `PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING`.
const READ_FORMAT: u64 = 1 | 2;
/// The flag `inherit`: also count threads and processes created later.
const INHERIT: u64 = 1 << 1;
/// `PERF_FLAG_FD_CLOEXEC`.
const CLOSE_ON_EXEC: libc::c_ulong = 1 << 3;

/// The beginning of `struct perf_event_attr`.
#[repr(C)]
#[derive(Debug, Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    sample_period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup_events: u32,
    breakpoint_type: u32,
    config1: u64,
}

/// Scope of counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// All processes on all CPUs, interrupts and kernel threads included.
    System,
    /// The client and the server of the disk.
    Processes,
}

impl Scope {
    /// Returns the widest scope that is available here, or why there is none.
    pub(super) fn find() -> Result<Self, String> {
        match Counters::open(Scope::System, None) {
            Ok(_) => Ok(Scope::System),
            Err(_) => Counters::open(Scope::Processes, None).map(|_| Scope::Processes).map_err(|e| describe(&e)),
        }
    }

    /// The name in JSON.
    pub(super) fn name(self) -> &'static str {
        match self {
            Scope::System => "system",
            Scope::Processes => "processes",
        }
    }
}

/// Describes why there are no counters.
fn describe(error: &io::Error) -> String {
    match errno_of(error) {
        Errno::ENOENT | Errno::EOPNOTSUPP | Errno::ENODEV => {
            "this machine has no hardware counters, like many virtual machines".to_owned()
        }
        Errno::EACCES | Errno::EPERM => {
            let setting = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid").unwrap_or_default();
            format!("not permitted (kernel.perf_event_paranoid is {})", setting.trim())
        }
        Errno::ENOSYS => "this kernel or sandbox has no perf_event_open".to_owned(),
        errno => format!("perf_event_open: {errno}"),
    }
}

/// Open counters, which count from their creation on.
#[derive(Debug)]
pub(super) struct Counters {
    instructions: Vec<File>,
    cycles: Vec<File>,
}

impl Counters {
    /// Opens counters for this thread and for a server, or for all CPUs.
    pub(super) fn open(scope: Scope, server: Option<i32>) -> io::Result<Self> {
        let targets: Vec<(i32, i32)> = match scope {
            Scope::System => online_cpus()?.iter().map(|cpu| (-1, cpu as i32)).collect(),
            Scope::Processes => {
                std::iter::once(0).chain(server.into_iter().flat_map(threads)).map(|thread| (thread, -1)).collect()
            }
        };
        let flags = if scope == Scope::Processes { INHERIT } else { 0 };
        let open = |event| targets.iter().map(|target| open(event, *target, flags)).collect::<io::Result<Vec<_>>>();
        Ok(Counters { instructions: open(INSTRUCTIONS)?, cycles: open(CYCLES)? })
    }

    /// Returns the instructions so far; `None` if they were not counted.
    pub(super) fn instructions(&self) -> Option<u64> {
        sum(&self.instructions)
    }

    /// Returns the cycles so far; `None` if they were not counted.
    pub(super) fn cycles(&self) -> Option<u64> {
        sum(&self.cycles)
    }
}

/// Opens a counter of a thread or of a CPU.
fn open(event: u64, (thread, cpu): (i32, i32), flags: u64) -> io::Result<File> {
    let attributes = Attributes {
        kind: HARDWARE,
        size: size_of::<Attributes>() as u32,
        config: event,
        read_format: READ_FORMAT,
        flags,
        ..Attributes::default()
    };
    // SAFETY: (1).
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attributes, thread, cpu, -1 as libc::c_int, CLOSE_ON_EXEC)
    };
    match i32::try_from(fd) {
        // SAFETY: (2).
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Adds up counters.
fn sum(counters: &[File]) -> Option<u64> {
    counters.iter().map(value).sum()
}

/// Reads a counter.
fn value(mut counter: &File) -> Option<u64> {
    let mut bytes = [0; 24];
    counter.read_exact(&mut bytes).ok()?;
    let word = |at: usize| u64::from_ne_bytes(bytes[at * 8..][..8].try_into().expect("8 bytes"));
    scaled(word(0), word(1), word(2))
}

/// Extrapolates a counter that shared the hardware with others, and counted for a part of the time only.
fn scaled(value: u64, enabled: u64, running: u64) -> Option<u64> {
    match (enabled, running) {
        // It has not been needed yet: its thread did not run.
        (0, _) => Some(0),
        (_, 0) if value == 0 => None,
        (enabled, running) if enabled == running => Some(value),
        (enabled, running) => u64::try_from(u128::from(value) * u128::from(enabled) / u128::from(running.max(1))).ok(),
    }
}

fn online_cpus() -> io::Result<CpuSet> {
    let list = fs::read_to_string("/sys/devices/system/cpu/online")?;
    list.trim().parse().map_err(io::Error::other)
}

/// The threads of a process.
fn threads(process: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Virtual machines and containers seldom have counters: then there is a reason.
    #[test]
    fn instructions_are_counted_or_a_reason_is_given() {
        let scope = match Scope::find() {
            Ok(scope) => scope,
            Err(reason) => {
                assert!(!reason.is_empty());
                return;
            }
        };
        let counters = Counters::open(scope, Some(std::process::id() as i32)).unwrap();
        let before = counters.instructions().unwrap();
        let sum: u64 = std::hint::black_box((0..100_000u64).collect::<Vec<_>>()).iter().sum();
        assert!(sum > 0 && counters.instructions().unwrap() > before + 100_000);
        assert!(counters.cycles().unwrap() > 0);
    }

    #[test]
    fn the_layout_is_the_kernels() {
        assert_eq!(size_of::<Attributes>(), 64);
        assert_eq!(std::mem::offset_of!(Attributes, config), 8);
        assert_eq!(std::mem::offset_of!(Attributes, read_format), 32);
        assert_eq!(std::mem::offset_of!(Attributes, flags), 40);
    }

    #[test]
    fn a_counter_that_ran_for_half_of_the_time_is_doubled() {
        assert_eq!(scaled(500, 10, 10), Some(500));
        assert_eq!(scaled(500, 10, 5), Some(1000));
        assert_eq!(scaled(0, 10, 0), None);
        assert_eq!(scaled(0, 0, 0), Some(0));
    }

    #[test]
    fn reasons_name_the_setting() {
        assert!(describe(&Errno::EACCES.into()).contains("perf_event_paranoid"));
        assert!(describe(&Errno::ENOENT.into()).contains("no hardware counters"));
    }
}
