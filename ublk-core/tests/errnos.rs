// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that fail: whatever the number of the error, no client may take it for success.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use ublk_core::fake::{FakeDisk, FakeDriver};
use ublk_core::{DataMovement, Errno, Op};

mod support;

use support::{custom, disk_file, file_disk, finish, options, server};

/// The outcomes of one request of each kind.
fn outcomes(disk: &FakeDisk) -> [Result<(), Errno>; 5] {
    [
        disk.read(0, 512).map(drop),
        disk.write(0, &[1; 512]),
        disk.flush(),
        disk.discard(0, 512),
        disk.write_zeroes(0, 512),
    ]
}

#[test]
fn a_handlers_errno_is_never_success() {
    let driver = FakeDriver::new();
    let number = Arc::new(AtomicI32::new(0));
    let theirs = number.clone();
    let target = custom(move |request| request.fail(Errno::new(theirs.load(Ordering::SeqCst)).unwrap()));
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    for errno in (1..=4095).step_by(7).chain([41, 58, 133, 134, 511, 512, 524, 4095]) {
        number.store(errno, Ordering::SeqCst);
        let expected = Errno::new(errno).unwrap().known();
        assert_eq!(outcomes(&disk), [Err(expected); 5], "errno {errno}");
    }
    finish(&driver, device);
}

#[test]
fn an_errno_that_nix_has_lost_fails_the_request() {
    let driver = FakeDriver::new();
    let lost = nix::errno::Errno::from_raw(503);
    let device = server(&driver, 1).start(custom(move |request| request.fail(lost)), &options(1, 1)).unwrap();
    assert_eq!(outcomes(&driver.disk(device.id())), [Err(Errno::EIO); 5]);
    finish(&driver, device);
}

#[test]
fn a_file_may_refuse_data_with_any_errno() {
    let file = disk_file();
    for (data, batch) in [
        (DataMovement::Copy, false),
        (DataMovement::Copy, true),
        (DataMovement::UserCopy, false),
        (DataMovement::GetData, false),
    ] {
        let driver = FakeDriver::new();
        let target = file_disk(file.path());
        let way = options(1, 2).data(data).batch(batch);
        let device = server(&driver, 1).start(target, &way).unwrap();
        let disk = driver.disk(device.id());
        // The last two are EJUKEBOX, of NFS, and ENOTSUPP.
        for (number, expected) in
            [(41, Errno::EIO), (511, Errno::EIO), (528, Errno::EIO), (524, Errno::EOPNOTSUPP), (28, Errno::ENOSPC)]
        {
            driver.refuse_files(Errno::new(number));
            assert_eq!(disk.write(0, &[1; 512]), Err(expected), "{data:?}, errno {number}");
            assert_eq!(disk.read(0, 512), Err(expected), "{data:?}, errno {number}");
        }
        driver.refuse_files(None);
        assert_eq!(disk.read(0, 512), Ok(vec![0; 512]));
        finish(&driver, device);
    }
}

#[test]
fn a_read_or_write_is_not_completed_as_an_append() {
    for data in DataMovement::ALL {
        let driver = FakeDriver::new();
        let target = custom(move |mut request| {
            request.load().unwrap();
            if request.op() == Op::Read {
                request.data_mut().fill(7);
            }
            request.complete_append(0);
        });
        let way = options(1, 1).data(data).batch(false);
        let device = server(&driver, 1).start(target, &way).unwrap();
        assert_eq!(outcomes(&driver.disk(device.id())), [Err(Errno::EIO); 5], "{data:?}");
        finish(&driver, device);
    }
}

#[test]
fn cleared_memory_is_zeros_or_poison() {
    let driver = FakeDriver::new();
    let target = custom(|mut request| {
        request.clear();
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[1; 512]).unwrap();
    assert_eq!(disk.read(0, 512), Ok(vec![0; 512]));
    driver.poison_reads(0xa5);
    assert_eq!(disk.read(0, 512), Ok(vec![0xa5; 512]));
    finish(&driver, device);
}
