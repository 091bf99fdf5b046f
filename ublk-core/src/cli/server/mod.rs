// SPDX-License-Identifier: MIT OR Apache-2.0

//! The server of `ublk add` and `ublk recover`: creates devices, or takes over one without a server, and serves them to
//! their end.
//!
//! * `main_loop`: waits for signals, the ends of devices, and clients of `ublk stat`.
//! * `signals`: which signals end a server, and how urgently.
//! * `ending`: stops a device, or leaves it to its next server; `ending_pool` does so for several devices at once.

mod ending;
mod ending_pool;
mod main_loop;
mod signals;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub(super) use self::signals::Signals;
use super::backing_files;
use super::failure::Outcome;
use super::instance::Instance;
use super::output::{printed, write_interruptibly};
use super::state_file::{CommandLine, StateFile};
use super::target;
use crate::data::shared::SharedMemory;
use crate::device::{Device, Server};
use crate::error::{Error, Result};
use crate::options::DeviceOptions;
use crate::placement::Cpus;
use crate::pressure;
use crate::targets;
use crate::units::DeviceId;

/// What to serve, and how.
#[derive(Debug)]
pub(super) struct Options<'a> {
    pub(super) target: &'a target::Args,
    pub(super) device: DeviceOptions,
    /// Number of devices to create.
    pub(super) count: u32,
    /// File that clients map for direct I/O without copying.
    pub(super) shared_memory: Option<&'a PathBuf>,
    /// Maximum number of ring threads, by default one per CPU.
    pub(super) threads: Option<usize>,
    pub(super) cpus: Cpus,
    pub(super) coalescing: Duration,
    pub(super) lock_memory: bool,
    pub(super) protect: bool,
}

/// Creates devices, or gives the device `existing` a new server, calls `ready` when they can be used, and serves them to
/// their end. `line` is stored for the devices' next servers.
pub(super) fn run(
    options: &Options<'_>,
    line: &CommandLine,
    existing: Option<DeviceId>,
    ready: impl FnOnce(&[Device], &Signals) -> Outcome,
) -> Outcome {
    // Before any thread is created: threads inherit the mask.
    let signals = Signals::block()?;
    raise_file_limit();
    if options.protect {
        pressure::refuse_oom_kill()?;
    }
    if options.lock_memory {
        pressure::lock_memory()?;
    }
    let devices = start(options, line, existing)?;
    let recoverable = options.device.recovery.is_some();
    let reported =
        save_state(&devices, line, &options.target.files(), recoverable).and_then(|()| ready(&devices, &signals));
    if let Err(failure) = reported {
        give_up(devices, existing.is_some());
        return Err(failure);
    }
    main_loop::run(&signals, devices)
}

/// Prints the paths of a foreground server's disks.
pub(super) fn print_paths(devices: &[Device], signals: &Signals) -> Outcome {
    let paths = devices.iter().map(|device| format!("{}\n", device.path().display())).collect();
    printed(write_interruptibly(std::io::stdout(), paths, &interrupts(devices, signals)))
}

/// Descriptors that are readable when a signal has arrived or a device has ended, which interrupts other waits.
pub(super) fn interrupts<'s>(devices: &'s [Device], signals: &'s Signals) -> Vec<BorrowedFd<'s>> {
    std::iter::once(signals.as_fd()).chain(devices.iter().map(AsFd::as_fd)).collect()
}

/// Raises the limit of open files to its maximum: each device takes two, and the usual limit is 1,024.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(now, most)| if now < most { setrlimit(Resource::RLIMIT_NOFILE, most, most) } else { Ok(()) });
    if let Err(errno) = raised {
        log::debug!("raising the limit of open files: {errno}");
    }
}

/// Starts the devices. On an error, those that were started are dropped, which stops and deletes them.
fn start(options: &Options<'_>, line: &CommandLine, existing: Option<DeviceId>) -> Result<Vec<Device>> {
    let threads = options.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    // A disk in use is better served on other CPUs than not at all.
    let (cpus, fallback) = if existing.is_some() { options.cpus.available() } else { (options.cpus, None) };
    if let Some(fallback) = fallback {
        log::warn!("{fallback}");
    }
    let server = Server::new()?.with_threads(threads).with_cpus(cpus)?.with_coalescing(options.coalescing)?;
    let mut devices = Vec::new();
    match existing {
        None => {
            for _ in 0..options.count {
                devices.push(server.start(options.target.create()?, &options.device)?);
            }
        }
        Some(id) => {
            // The old server has the files locked.
            server.wait_until_unserved(id)?;
            let disk = server.control().params(id)?.params;
            let target = options.target.reopen(&disk)?;
            // After the files were opened, because they may be replaced until then.
            backing_files::check(&options.target.files(), line.files())?;
            // The state file is more precise, and it records the files that were accepted last.
            let recovered = if line.decides_about_files() {
                server.recover_replaced(id, target)
            } else {
                server.recover(id, target)
            };
            devices.push(recovered.map_err(|error| backing_files::explain(error, &options.target.files()))?);
        }
    }
    if let Some(path) = options.shared_memory {
        devices.iter().try_for_each(|device| share_memory(device, path))?;
    }
    Ok(devices)
}

/// Lets clients of a device use a file's memory.
fn share_memory(device: &Device, path: &Path) -> Result<()> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.map_err(|e| Error::file("open", path, &e))?;
    let len = targets::file_size(path)?;
    let memory = SharedMemory::map(&file, len, false).map_err(|e| Error::file("map", path, &e))?;
    device.share_memory(memory).map(drop)
}

/// Writes the devices' state files. A failure matters only for recoverable devices.
fn save_state(devices: &[Device], line: &CommandLine, files: &[PathBuf], recoverable: bool) -> Outcome {
    for device in devices {
        match StateFile::new(device, line, files).and_then(|state| state.save(device.id())) {
            Err(failure) if recoverable => return Err(failure),
            Err(failure) => failure.message().into_iter().for_each(|message| log::warn!("{message}")),
            Ok(()) => {}
        }
    }
    Ok(())
}

/// Ends devices whose server could not report them: deletes new ones, and leaves existing ones without a server again.
fn give_up(devices: Vec<Device>, existing: bool) {
    for device in devices {
        let (id, instance) = (device.id(), device.instance().map(Instance::from));
        if existing {
            if let Err(error) = device.leave() {
                log::debug!("leaving device {id}: {error}");
                // Dropping it would delete it. The end of this process leaves it, too.
                std::mem::forget(device);
            }
        } else {
            drop(device);
            StateFile::remove(id, instance);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::fake::FakeDriver;
    use crate::test_support::{null_disk, server};
    use crate::{DeviceOptions, Recovery};

    /// A recoverable device of a stand-in driver.
    pub(super) fn recoverable(driver: &FakeDriver) -> Device {
        let options = DeviceOptions { recovery: Some(Recovery::Queue), ..DeviceOptions::default() };
        server(driver).start(null_disk(), &options).unwrap()
    }
}
