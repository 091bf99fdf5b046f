// SPDX-License-Identifier: MIT OR Apache-2.0

//! Statistics of a device on the stand-in driver: every way in which requests move and end is counted once.

use std::time::Duration;

use ublk_core::fake::FakeDriver;
use ublk_core::{DataMovement, DeviceStats, Errno, Op};

mod support;

use support::{completing, custom, disk_file, file_disk, finish, options, ram_disk, server};

/// Requests, bytes and failures of an operation.
fn numbers(stats: &DeviceStats, op: Op) -> (u64, u64, u64) {
    stats.total.get(&op).map_or((0, 0, 0), |entry| (entry.requests, entry.bytes, entry.errors))
}

#[test]
fn every_data_movement_counts_the_same() {
    let movements = DataMovement::ALL.into_iter().map(Some);
    for (data, batch) in movements.chain([None]).flat_map(|data| [(data, false), (data, true)]) {
        if (data, batch) == (Some(DataMovement::GetData), true) {
            continue;
        }
        let driver = FakeDriver::new();
        let target = ram_disk();
        let mut options = options(2, 4).batch(batch);
        options.data = data;
        let device = server(&driver, 2).start(target, &options).unwrap();
        assert!(device.stats().total.is_empty());
        let disk = driver.disk(device.id());
        for n in 0..5 {
            disk.write(n * 4096, &[1; 4096]).unwrap();
        }
        for n in 0..3 {
            disk.read(n * 4096, 8192).unwrap();
        }
        disk.flush().unwrap();
        disk.discard(0, 65536).unwrap();
        disk.write_zeroes(4096, 512).unwrap();
        let stats = device.stats();
        let found = [Op::Write, Op::Read, Op::Flush, Op::Discard, Op::WriteZeroes].map(|op| numbers(&stats, op));
        assert_eq!(found, [(5, 20480, 0), (3, 24576, 0), (1, 0, 0), (1, 65536, 0), (1, 512, 0)], "{data:?} {batch}");
        assert_eq!(stats.queues.len(), 2);
        finish(&driver, device);
    }
}

#[test]
fn failures_are_counted_and_their_bytes_are_not() {
    let driver = FakeDriver::new();
    let target = custom(|request| match request.op() {
        Op::Read => request.complete(),
        // Dropped: fails.
        Op::Write => {}
        _ => request.fail(Errno::ENOSPC),
    });
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    let disk = driver.disk(device.id());
    disk.read(0, 4096).unwrap();
    assert_eq!(disk.write(0, &[0; 4096]), Err(Errno::EIO));
    assert_eq!(disk.discard(0, 4096), Err(Errno::ENOSPC));
    let stats = device.stats();
    assert_eq!(numbers(&stats, Op::Read), (1, 4096, 0));
    assert_eq!(numbers(&stats, Op::Write), (1, 0, 1));
    assert_eq!(numbers(&stats, Op::Discard), (1, 0, 1));
    finish(&driver, device);
}

#[test]
fn a_commit_that_the_driver_refuses_is_a_failure() {
    let driver = FakeDriver::new();
    let options = options(1, 1).batch(false);
    let device = server(&driver, 1).start(completing(), &options).unwrap();
    driver.refuse_next("COMMIT_AND_FETCH_REQ", Errno::EINVAL);
    assert_eq!(driver.disk(device.id()).read(0, 512).map(drop), Err(Errno::EIO));
    assert_eq!(numbers(&device.stats(), Op::Read), (1, 512, 1));
    finish(&driver, device);
}

#[test]
fn requests_that_were_elsewhere_are_counted_with_their_whole_time() {
    let driver = FakeDriver::new();
    let target = custom(|request| {
        let request = request.detach();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            request.complete();
        });
    });
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    driver.disk(device.id()).read(0, 4096).unwrap();
    let stats = device.stats();
    assert_eq!(numbers(&stats, Op::Read), (1, 4096, 0));
    let longest = Duration::from_nanos(stats.total[&Op::Read].latency_ns.max);
    assert!(longest >= Duration::from_millis(30), "{stats:?}");
    finish(&driver, device);
}

#[test]
fn forwarded_requests_are_counted() {
    let file = disk_file();
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(file_disk(file.path()), &options(1, 8)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 65536]).unwrap();
    disk.read(0, 65536).unwrap();
    disk.flush().unwrap();
    let stats = device.stats();
    let found = [Op::Write, Op::Read, Op::Flush].map(|op| numbers(&stats, op));
    assert_eq!(found, [(1, 65536, 0), (1, 65536, 0), (1, 0, 0)]);
    finish(&driver, device);
}
