// SPDX-License-Identifier: MIT OR Apache-2.0

//! Forked children, which have a copy of a device of their parent's, on the stand-in driver.

#![allow(missing_docs)]

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};
use ublk_core::fake::FakeDriver;
use ublk_core::{DataMovement, Device, DeviceOptions, Ending, Errno, Params, Recovery, pull};

use support::{SIZE, completing, finish, options, server};

/// More than a child takes that waits for nothing.
const SOON: Duration = Duration::from_secs(20);

/// Runs `body` in a forked child, and returns whether that returned true in time.
fn in_child(body: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child takes no lock that another thread of its parent may have, which is what is tested, allocates, which
    // the C library makes work, and ends without unwinding into the test's harness.
    let child = match unsafe { fork() }.unwrap() {
        ForkResult::Child => {
            let passed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).unwrap_or(false);
            // SAFETY: as above.
            unsafe { libc::_exit(i32::from(!passed)) }
        }
        ForkResult::Parent { child } => child,
    };
    let begin = Instant::now();
    loop {
        match waitpid(child, Some(WaitPidFlag::WNOHANG)).unwrap() {
            WaitStatus::StillAlive if begin.elapsed() < SOON => std::thread::sleep(Duration::from_millis(1)),
            WaitStatus::StillAlive => {
                kill(child, Signal::SIGKILL).unwrap();
                waitpid(child, None).unwrap();
                return false;
            }
            status => return status == WaitStatus::Exited(child, 0),
        }
    }
}

fn start(driver: &FakeDriver, options: &DeviceOptions) -> Device {
    server(driver, 1).start(completing(), options).unwrap()
}

#[test]
fn a_forked_child_refuses_commands_on_its_parents_device() {
    type Command = fn(&Device) -> bool;
    let commands: [(&str, Command); 9] = [
        ("stop", |device| device.stop().is_ok()),
        ("conclude", |device| matches!(device.conclude(), Ok(Ending::Deleted))),
        ("leave", |device| is_refused(device.leave())),
        ("try_stop", |device| is_refused(device.try_stop())),
        ("resize", |device| is_refused(device.resize(4096))),
        ("unshare_memory", |device| is_refused(device.unshare_memory(0))),
        ("go_live", |device| is_refused(device.go_live(completing()))),
        ("abandon", |device| {
            device.abandon();
            !device.is_stopped()
        }),
        ("expedite", |device| {
            device.expedite();
            true
        }),
    ];
    for recovery in [None, Some(Recovery::Queue)] {
        let driver = FakeDriver::new();
        let mut options = options(1, 2);
        options.recovery = recovery;
        let device = start(&driver, &options);
        for (name, command) in commands {
            assert!(in_child(|| command(&device)), "{name} {recovery:?}");
        }
        driver.disk(device.id()).read(0, 512).unwrap();
        finish(&driver, device);
    }
}

fn is_refused(result: ublk_core::Result<()>) -> bool {
    result.is_err_and(|error| error.errno() == Errno::ENODEV)
}

#[test]
fn a_forked_child_drops_its_copy_of_a_device() {
    for recovery in [None, Some(Recovery::Queue)] {
        let driver = FakeDriver::new();
        let mut options = options(1, 2);
        options.recovery = recovery;
        let device = Arc::new(start(&driver, &options));
        let (theirs, ended) = (device.clone(), Arc::new(AtomicBool::new(false)));
        let end = ended.clone();
        // So that a lock is held at some of the forks.
        let looking = std::thread::spawn(move || {
            while !end.load(Ordering::Relaxed) {
                std::hint::black_box(theirs.is_ending());
            }
        });
        let passed = (0..200).all(|_| {
            in_child(|| {
                // SAFETY: the child's copy of the device, which it does not use after that.
                drop(unsafe { std::ptr::read(Arc::as_ptr(&device)) });
                true
            })
        });
        ended.store(true, Ordering::Relaxed);
        looking.join().unwrap();
        assert!(passed, "{recovery:?}");
        finish(&driver, Arc::into_inner(device).unwrap());
    }
}

/// The child has none of the threads that its parent has started.
#[test]
fn a_forked_child_can_use_its_parents_server() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let device = server.start(completing(), &options(1, 2)).unwrap();
    assert!(in_child(|| {
        let own = server.start(completing(), &options(1, 2)).unwrap();
        driver.disk(own.id()).read(0, 512).unwrap();
        own.stop().is_ok()
    }));
    driver.disk(device.id()).read(0, 512).unwrap();
    finish(&driver, device);
}

#[test]
fn a_forked_child_waits_for_no_lock_of_its_parent() {
    let driver = FakeDriver::new();
    let device = start(&driver, &options(1, 2));
    let is_over = || device.is_ending() && device.wait(None) && device.queues_left() == 0 && !device.is_served_here();
    assert!(in_child(is_over));
    // So that the lock is held at some of the forks.
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                std::hint::black_box(device.queues_left());
            }
        });
        let passed = (0..200).all(|_| in_child(is_over));
        ended.store(true, Ordering::Relaxed);
        assert!(passed);
    });
    finish(&driver, device);
}

/// With user copy, a child would copy through its parent's descriptor, into the memory of the parent's client.
#[test]
fn a_forked_child_leaves_requests_to_its_parent() {
    for data in [DataMovement::Copy, DataMovement::UserCopy] {
        let driver = FakeDriver::new();
        let (target, mut queues) = pull(Params::new(SIZE, 512), 1).unwrap();
        let queue = queues.remove(0);
        let device = server(&driver, 1).start(target, &options(1, 2).data(data)).unwrap();
        let disk = driver.disk(device.id());
        let client = std::thread::spawn(move || disk.read(0, 512));
        let request = queue.next_batch(1).unwrap().remove(0);
        assert!(in_child(|| {
            // SAFETY: the child's copy of the request, of which its parent's stays where it is.
            let mut copy = unsafe { std::ptr::read(&raw const request) };
            let copied = copy.write_data(0, &[1; 512]);
            copy.complete();
            queue.next_batch(1).is_none() && (copied.is_ok() == (data == DataMovement::Copy))
        }));
        let mut request = request;
        request.write_data(0, &[7; 512]).unwrap();
        request.complete();
        assert_eq!(client.join().unwrap().unwrap(), [7; 512]);
        finish(&driver, device);
    }
}

#[test]
fn a_forked_child_ends_requests_while_its_parent_does() {
    let driver = FakeDriver::new();
    let (target, mut queues) = pull(Params::new(SIZE, 512), 1).unwrap();
    let queue = queues.remove(0);
    let device = server(&driver, 1).start(target, &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    let held = std::thread::spawn(move || disk.read(0, 512));
    let request = queue.next_batch(1).unwrap().remove(0);
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // So that the inbox is locked at some of the forks.
        scope.spawn(|| {
            while let Some(requests) = queue.next_batch(2) {
                requests.into_iter().for_each(|request| request.complete());
            }
        });
        let disk = driver.disk(device.id());
        let ended = &ended;
        scope.spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                disk.read(512, 512).unwrap();
            }
        });
        let passed = (0..200).all(|_| {
            in_child(|| {
                // SAFETY: the child's copy, as above.
                unsafe { std::ptr::read(&raw const request) }.complete();
                true
            })
        });
        ended.store(true, Ordering::Relaxed);
        request.complete();
        held.join().unwrap().unwrap();
        device.stop().unwrap();
        assert!(passed);
    });
    drop(device);
    assert_eq!(driver.devices(), []);
}
