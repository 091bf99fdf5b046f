// SPDX-License-Identifier: MIT OR Apache-2.0

//! User code that panics on a thread which serves other devices too: they go on, and the device can be removed at once.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ublk_core::fake::FakeDriver;
use ublk_core::{
    Access, Device, Errno, FilePiece, FileRange, Params, QueueHandler, QueueInfo, Requests, Result, Server, Target,
};

mod support;

use support::{SIZE, custom, finish, options, ram_disk, server, unnamed_file};

/// Far below every time-out of a device's end.
const SOON: Duration = Duration::from_secs(50);

/// Where user code panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Access,
    OpenQueue,
    Handle,
    ThrownByHandle,
    HandlersDrop,
    TargetsDrop,
}

struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("planted in a drop");
    }
}

/// A target that panics in one place, once that is armed.
#[derive(Debug)]
struct Panics {
    place: Place,
    armed: Arc<AtomicBool>,
}

impl Panics {
    fn at(&self, place: Place) {
        assert!(self.place != place || !self.armed.load(Ordering::SeqCst), "planted in {place:?}");
    }
}

impl Target for Panics {
    fn kind(&self) -> &str {
        "panics"
    }

    fn params(&self) -> Params {
        Params::new(SIZE, 512)
    }

    fn access(&self) -> Access {
        self.at(Place::Access);
        Access::Bytes
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        self.at(Place::OpenQueue);
        let drop = (self.place == Place::HandlersDrop).then(|| Bomb);
        Ok(Box::new(PanicsQueue { place: self.place, _drop: drop }))
    }
}

impl Drop for Panics {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.at(Place::TargetsDrop);
        }
    }
}

struct PanicsQueue {
    place: Place,
    _drop: Option<Bomb>,
}

impl QueueHandler for PanicsQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        match self.place {
            Place::Handle => panic!("planted in handle"),
            Place::ThrownByHandle => std::panic::panic_any(Bomb),
            _ => requests.for_each(|request| request.complete()),
        }
    }
}

/// A device of the server's only thread, beside the one that misbehaves.
fn neighbour(server: &Server) -> Device {
    server.start(ram_disk(), &options(1, 1)).unwrap()
}

#[test]
fn a_panic_on_a_queues_thread_is_the_devices_alone() {
    for place in [Place::OpenQueue, Place::Handle, Place::ThrownByHandle, Place::HandlersDrop] {
        let driver = FakeDriver::new();
        let server = server(&driver, 1);
        let other = neighbour(&server);
        let begin = Instant::now();
        let target = Panics { place, armed: Arc::new(AtomicBool::new(true)) };
        match server.start(Arc::new(target), &options(1, 1)) {
            Ok(device) => {
                let outcome = driver.disk(device.id()).read(0, 512).map(drop);
                let expected = if place == Place::HandlersDrop { Ok(()) } else { Err(Errno::EIO) };
                assert_eq!(outcome, expected, "{place:?}");
                device.stop().unwrap();
            }
            Err(error) => {
                assert!(place == Place::OpenQueue && error.to_string().contains("planted"), "{place:?}: {error}");
            }
        }
        assert_eq!(driver.devices(), [other.id()], "{place:?}");
        assert!(begin.elapsed() < SOON, "{place:?}: {:?}", begin.elapsed());
        driver.disk(other.id()).write(0, &[7; 512]).unwrap();
        finish(&driver, other);
    }
}

#[test]
fn a_target_is_not_asked_for_its_access_on_the_thread() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let other = neighbour(&server);
    let armed = Arc::new(AtomicBool::new(false));
    let target: Arc<dyn Target> = Arc::new(Panics { place: Place::Access, armed: armed.clone() });
    let device = server.add(&target, &options(1, 1)).unwrap();
    armed.store(true, Ordering::SeqCst);
    let begin = Instant::now();
    // On the caller's thread a panic is the caller's.
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| device.go_live(target)));
    assert!(result.is_err());
    drop(device);
    assert_eq!(driver.devices(), [other.id()]);
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    driver.disk(other.id()).write(0, &[7; 512]).unwrap();
    finish(&driver, other);
}

#[test]
fn what_is_kept_for_a_forwarded_request_may_panic() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let other = neighbour(&server);
    let file = Arc::new(unnamed_file(SIZE));
    let target = custom(move |request| {
        // One that is refused at once, and one that a file carries out.
        let len = if request.offset() == 0 { 1 } else { request.len() };
        let piece = FilePiece { file: FileRange::new(&file, 0), len };
        request.forward_pieces(piece, Box::new(Bomb) as Box<dyn Any + Send>);
    });
    let device = server.start(target, &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    assert_eq!(disk.read(0, 512), Err(Errno::EIO));
    assert_eq!(disk.read(512, 512), Ok(vec![0; 512]));
    device.stop().unwrap();
    driver.disk(other.id()).write(0, &[7; 512]).unwrap();
    finish(&driver, other);
}

#[test]
fn a_target_may_panic_when_it_is_dropped() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let other = neighbour(&server);
    let armed = Arc::new(AtomicBool::new(true));
    let target = Panics { place: Place::TargetsDrop, armed };
    let started =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| server.start(Arc::new(target), &options(1, 1))));
    // Whichever thread was the last to have it.
    drop(started);
    driver.disk(other.id()).write(0, &[7; 512]).unwrap();
    drop(other);
    assert_eq!(driver.devices(), []);
}

#[test]
fn a_second_start_of_a_device_is_refused_and_harmless() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let target = ram_disk();
    let device = server.start(target.clone(), &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 512]).unwrap();
    assert_eq!(device.go_live(target).unwrap_err().errno(), Errno::EEXIST);
    assert_eq!(disk.read(0, 512), Ok(vec![7; 512]));
    finish(&driver, device);
}

#[test]
fn a_queue_that_opens_half_way_leaves_the_thread_to_others() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let other = neighbour(&server);
    // Its tags are with the driver by then.
    driver.refuse_next("io_uring_enter", Errno::EBADF);
    let begin = Instant::now();
    let error = server.start(ram_disk(), &options(1, 4)).unwrap_err().to_string();
    assert!(error.contains("Bad file descriptor"), "{error}");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    assert_eq!(driver.devices(), [other.id()]);
    let third = neighbour(&server);
    for device in [&other, &third] {
        driver.disk(device.id()).write(0, &[7; 512]).unwrap();
    }
    third.stop().unwrap();
    finish(&driver, other);
}
