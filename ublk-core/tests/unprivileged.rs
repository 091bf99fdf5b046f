// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices of a user without CAP_SYS_ADMIN, on the stand-in driver.

use std::time::Duration;

use ublk_core::fake::FakeDriver;
use ublk_core::{DataMovement, DeviceState, Errno, Features, Recovery};

mod support;

use support::{SIZE, finish, options, ram_disk, server};

#[test]
fn a_user_makes_uses_changes_and_deletes_a_device() {
    let driver = FakeDriver::new();
    driver.drop_privileges();
    let device = server(&driver, 2).start(ram_disk(), &options(2, 4)).unwrap();
    assert!(device.info().features.contains(Features::UNPRIVILEGED_DEV));
    assert_eq!(device.data_movement().0, DataMovement::Copy);
    let disk = driver.disk(device.id());
    disk.write(4096, &[7; 4096]).unwrap();
    assert_eq!(disk.read(4096, 4096).unwrap(), [7; 4096]);
    let control = server(&driver, 1).control().clone();
    assert_eq!(control.params(device.id()).unwrap().params.size, SIZE);
    assert_eq!(control.queue_affinity(device.id(), ublk_core::QueueId(0)).unwrap(), [0]);
    device.resize(SIZE / 2).unwrap();
    assert_eq!(control.params(device.id()).unwrap().params.size, SIZE / 2);
    finish(&driver, device);
}

#[test]
fn somebody_else_with_access_deletes_it() {
    let driver = FakeDriver::new();
    driver.drop_privileges();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    let control = server(&driver, 1).control().clone();
    control.try_stop(device.id()).unwrap();
    assert!(device.wait(Some(Duration::from_secs(5))));
    device.stop().unwrap();
    assert!(driver.devices().is_empty());
}

#[test]
fn a_node_that_is_gone_means_the_device_is_unless_that_is_still_there() {
    let driver = FakeDriver::new();
    driver.drop_privileges();
    let control = server(&driver, 1).control().clone();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    let id = device.id();
    driver.refuse_next("GET_DEV_INFO2", Errno::ENOENT);
    let error = control.info(id).unwrap_err();
    assert_eq!(error.errno(), Errno::ENOENT);
    assert!(error.to_string().contains("which identifies an unprivileged device"), "{error}");
    finish(&driver, device);
    driver.refuse_next("GET_DEV_INFO2", Errno::ENOENT);
    assert_eq!(control.info(id).unwrap_err().errno(), Errno::ENODEV);
}

#[test]
fn roots_device_is_not_a_users() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    assert!(!device.info().features.contains(Features::UNPRIVILEGED_DEV));
    driver.drop_privileges();
    let error = server(&driver, 1).control().stop(device.id()).unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM);
    assert_eq!(server(&driver, 1).control().info(device.id()).unwrap().state, DeviceState::Live);
    std::mem::forget(device);
}

#[test]
fn what_takes_privileges_is_refused_in_words() {
    let driver = FakeDriver::new();
    driver.drop_privileges();
    for wish in [options(1, 1).recovery(Recovery::Reissue), options(1, 1).data(DataMovement::UserCopy)] {
        let error = server(&driver, 1).start(ram_disk(), &wish).unwrap_err().to_string();
        assert!(error.contains("CAP_SYS_ADMIN"), "{error}");
    }
    assert!(driver.devices().is_empty());
}

#[test]
fn a_driver_without_users_devices_wants_root() {
    let driver = FakeDriver::new();
    driver.offer(Features::USER_COPY);
    driver.drop_privileges();
    let error = server(&driver, 1).start(ram_disk(), &options(1, 1)).unwrap_err();
    assert_eq!(error.errno(), Errno::EPERM);
}
