// SPDX-License-Identifier: MIT OR Apache-2.0

//! When writes to the targets in files are durable, and what a failed sync means.

use std::sync::Arc;

use ublk_core::fake::FakeDriver;
use ublk_core::targets::{File, FileOptions, Io};
use ublk_core::{Device, Errno, FileRange, Op, Operations, Target};

mod support;
use support::{SIZE, custom, disk_file, file_disk, finish, options, server, unnamed_file, until_held};

fn start(driver: &FakeDriver, write_cache: bool, queues: u32) -> (Device, tempfile::NamedTempFile) {
    let backing = disk_file();
    let file = File::open(backing.path(), &FileOptions::new().io(Io::Buffered)).unwrap();
    let mut params = file.params();
    params.operations |= Operations::DISCARD;
    params.operations.set(Operations::FLUSH | Operations::FUA, write_cache);
    let file = file.with_params(params).unwrap();
    (server(driver, queues as usize).start(Arc::new(file), &options(queues, 4)).unwrap(), backing)
}

#[test]
fn without_a_write_cache_each_change_is_synced() {
    for change in ["write", "discard", "write-zeroes"] {
        for write_cache in [false, true] {
            let driver = FakeDriver::new();
            let (device, _backing) = start(&driver, write_cache, 1);
            let disk = driver.disk(device.id());
            // Whatever is not synced does not see it.
            driver.refuse_next("fdatasync", Errno::EIO);
            let outcome = match change {
                "write" => disk.write(0, &[7; 512]),
                "discard" => disk.discard(0, 4096),
                _ => disk.write_zeroes(0, 4096),
            };
            assert_eq!(outcome, if write_cache { Ok(()) } else { Err(Errno::EIO) }, "{change}");
            finish(&driver, device);
        }
    }
}

#[test]
fn no_flush_of_any_queue_succeeds_after_a_failed_sync() {
    let driver = FakeDriver::new();
    let (device, backing) = start(&driver, true, 2);
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 512]).unwrap();
    disk.flush().unwrap();
    driver.refuse_next("fdatasync", Errno::ENOSPC);
    assert_eq!(disk.flush(), Err(Errno::ENOSPC));
    for _ in 0..4 {
        assert_eq!(disk.flush(), Err(Errno::EIO));
    }
    // What was written is there all the same, and reads and plain writes go on.
    disk.write(512, &[8; 512]).unwrap();
    assert_eq!(disk.read(0, 1024).unwrap(), [[7; 512], [8; 512]].concat());
    finish(&driver, device);
    // A new server starts afresh.
    let device = server(&driver, 1).start(file_disk(backing.path()), &options(1, 4)).unwrap();
    driver.disk(device.id()).flush().unwrap();
    finish(&driver, device);
}

#[test]
fn flushes_beside_one_that_fails_fail_too() {
    const FLUSH: u32 = 2;
    let driver = FakeDriver::new();
    let (device, _backing) = start(&driver, true, 1);
    let disk = driver.disk(device.id());
    let flush_at_once = || {
        let sent: Vec<_> = (0..4).map(|_| disk.send(FLUSH, 0, 0, &[]).unwrap()).collect();
        sent.into_iter().map(|sent| disk.wait(sent).map(drop)).collect::<Vec<_>>()
    };
    for _ in 0..50 {
        assert_eq!(flush_at_once(), [Ok(()); 4]);
    }
    driver.refuse_next("fdatasync", Errno::EIO);
    assert_eq!(flush_at_once(), [Err(Errno::EIO); 4]);
    finish(&driver, device);
}

/// A target that forwards all requests to one open file, as programs do that use this crate.
fn forwarding() -> Arc<dyn Target> {
    let file = Arc::new(unnamed_file(SIZE));
    custom(move |request| {
        let at = request.offset();
        request.forward(FileRange::new(&file, at));
    })
}

#[test]
fn a_failed_sync_of_a_forwarded_flush_is_remembered() {
    let driver = FakeDriver::new();
    let device = server(&driver, 2).start(forwarding(), &options(2, 4)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 512]).unwrap();
    disk.flush().unwrap();
    driver.refuse_next("fdatasync", Errno::ENOSPC);
    assert_eq!(disk.flush(), Err(Errno::ENOSPC));
    for _ in 0..4 {
        assert_eq!(disk.flush(), Err(Errno::EIO));
    }
    assert_eq!(disk.write_durably(0, &[8; 512]), Err(Errno::EIO));
    disk.write(512, &[8; 512]).unwrap();
    finish(&driver, device);
    // A new server starts afresh.
    let device = server(&driver, 1).start(forwarding(), &options(1, 4)).unwrap();
    driver.disk(device.id()).flush().unwrap();
    finish(&driver, device);
}

/// The kernel reports lost writes once, by whatever errno the file system chose, so that a sync that is repeated
/// succeeds.
#[test]
fn no_sync_is_repeated_whatever_errno_it_has() {
    for errno in [Errno::EAGAIN, Errno::EINTR] {
        let driver = FakeDriver::new();
        let file_target = start(&driver, true, 1).0;
        let forwarding = server(&driver, 1).start(forwarding(), &options(1, 4)).unwrap();
        for device in [file_target, forwarding] {
            let disk = driver.disk(device.id());
            disk.write(0, &[7; 512]).unwrap();
            driver.refuse_next("fdatasync", errno);
            assert_eq!(disk.flush(), Err(errno));
            assert_eq!(disk.flush(), Err(Errno::EIO));
            device.stop().unwrap();
        }
        assert_eq!(driver.violations(), [""; 0]);
    }
}

#[test]
fn a_failed_sync_of_a_forwarded_fua_write_fails_later_flushes() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(forwarding(), &options(1, 4)).unwrap();
    let disk = driver.disk(device.id());
    driver.refuse_next("fdatasync", Errno::EIO);
    assert_eq!(disk.write_durably(0, &[8; 512]), Err(Errno::EIO));
    assert_eq!(disk.flush(), Err(Errno::EIO));
    finish(&driver, device);
}

#[test]
fn a_failed_sync_fails_flushes_that_handlers_do_themselves() {
    let driver = FakeDriver::new();
    let file = Arc::new(unnamed_file(SIZE));
    let target = custom(move |request| match request.op() {
        Op::Write => {
            let len = request.len();
            let piece = ublk_core::FilePiece { file: FileRange::new(&file, 0), len };
            request.forward_pieces(piece, Box::new(()) as Box<dyn std::any::Any + Send>);
        }
        _ => request.complete(),
    });
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    let disk = driver.disk(device.id());
    disk.write_durably(0, &[8; 512]).unwrap();
    disk.flush().unwrap();
    driver.refuse_next("fdatasync", Errno::EIO);
    assert_eq!(disk.write_durably(0, &[8; 512]), Err(Errno::EIO));
    assert_eq!(disk.flush(), Err(Errno::EIO));
    finish(&driver, device);
}

#[test]
fn a_flush_counts_when_those_of_other_queues_have_ended() {
    const FLUSH: u32 = 2;
    let driver = FakeDriver::new();
    let device = server(&driver, 2).start(forwarding(), &options(2, 4)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 512]).unwrap();
    driver.hold_files(true);
    let first = disk.send(FLUSH, 0, 0, &[]).unwrap();
    until_held(&driver, 1);
    let second = disk.send(FLUSH, 4096, 0, &[]).unwrap();
    until_held(&driver, 2);
    // The first one has taken the error, and its queue does not know it yet.
    driver.release_last_file();
    std::thread::sleep(std::time::Duration::from_millis(50));
    driver.refuse_next("fdatasync", Errno::EIO);
    driver.hold_files(false);
    assert_eq!(disk.wait(first), Err(Errno::EIO));
    assert_eq!(disk.wait(second), Err(Errno::EIO));
    finish(&driver, device);
}
