// SPDX-License-Identifier: MIT OR Apache-2.0

//! What tests on the stand-in driver share.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ublk_core::fake::FakeDriver;
use ublk_core::targets::{File, FileOptions, Io, Mem};
use ublk_core::{
    Device, DeviceOptions, Operations, Params, QueueHandler, QueueInfo, Request, Requests, Result, Server, Target,
};

pub const SIZE: u64 = 1 << 20;

pub fn server(driver: &FakeDriver, threads: usize) -> Server {
    Server::with_fake(driver).with_threads(threads)
}

pub fn options(queues: u32, depth: u32) -> DeviceOptions {
    DeviceOptions::new().queues(queues).depth(depth)
}

/// A target made of a closure that gets each request.
struct Custom<F>(F, Operations);

impl<F> std::fmt::Debug for Custom<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Custom")
    }
}

impl<F: Fn(Request<'_>) + Clone + Send + Sync + 'static> Target for Custom<F> {
    fn kind(&self) -> &str {
        "custom"
    }

    fn params(&self) -> Params {
        let mut params = Params::new(SIZE, 512);
        params.operations = self.1;
        params
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(CustomQueue(self.0.clone())))
    }
}

struct CustomQueue<F>(F);

impl<F: Fn(Request<'_>)> QueueHandler for CustomQueue<F> {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(&self.0);
    }
}

/// Returns a target whose handler is the closure.
pub fn custom(handler: impl Fn(Request<'_>) + Clone + Send + Sync + 'static) -> Arc<dyn Target> {
    Arc::new(Custom(handler, Operations::all()))
}

/// Returns a target that completes every request.
pub fn completing() -> Arc<dyn Target> {
    custom(|request| request.complete())
}

/// Returns an empty RAM disk.
pub fn ram_disk() -> Arc<dyn Target> {
    Arc::new(Mem::new(SIZE, 512).unwrap())
}

/// Creates a file of zeros of a disk's size.
pub fn disk_file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(SIZE).unwrap();
    file
}

/// Creates a file of zeros that has no name.
pub fn unnamed_file(bytes: u64) -> std::fs::File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    file
}

/// Opens a file as a disk, with buffered I/O.
pub fn file_disk(path: impl AsRef<Path>) -> Arc<dyn Target> {
    Arc::new(File::open(path.as_ref(), &FileOptions::new().io(Io::Buffered)).unwrap())
}

/// Waits until the condition holds; panics with its description if that takes a minute.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until this many operations on files are held, after [`FakeDriver::hold_files`].
pub fn until_held(driver: &FakeDriver, operations: usize) {
    until("the operations on files", || driver.held_files() >= operations);
}

/// Stops the device and checks that nothing is left and no rule was broken.
pub fn finish(driver: &FakeDriver, device: Device) {
    device.stop().expect("the device stops");
    drop(device);
    assert_eq!(driver.devices(), []);
    assert_eq!(driver.violations(), Vec::<String>::new());
}
