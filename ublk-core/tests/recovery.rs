// SPDX-License-Identifier: MIT OR Apache-2.0

//! Devices that lose their server and get another one, on the stand-in driver.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ublk_core::fake::{FakeDriver, Sent};
use ublk_core::targets::{File, FileOptions, Io, Mem, Zoned, ZonedOptions};
use ublk_core::{
    DataMovement, Device, DeviceId, DeviceOptions, DeviceState, Ending, Errno, Error, Features, Integrity, Operations,
    Parameter, Params, QueueHandler, QueueInfo, Recovery, Requests, Result, SegmentLimits, Server, Target,
};

mod support;

use support::{SIZE, completing, custom, disk_file, file_disk, finish, options, ram_disk, server, until, until_held};

fn recoverable(recovery: Recovery, batch: bool) -> DeviceOptions {
    options(2, 4).recovery(recovery).batch(batch)
}

fn every_way() -> impl Iterator<Item = DeviceOptions> {
    Recovery::ALL.into_iter().flat_map(|recovery| [false, true].map(|batch| recoverable(recovery, batch)))
}

fn state_of(driver: &FakeDriver, device: &Device) -> DeviceState {
    server(driver, 1).control().info(device.id()).unwrap().state
}

#[test]
fn a_server_that_leaves_is_followed_by_another_with_the_same_data() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let target = ram_disk();
        let first = server(&driver, 2).start(target.clone(), &way).unwrap();
        let id = first.id();
        let disk = driver.disk(id);
        disk.write(4096, &[7; 4096]).unwrap();
        first.leave().unwrap();
        let waiting = if way.recovery == Some(Recovery::FailIo) { DeviceState::FailIo } else { DeviceState::Quiesced };
        assert_eq!(state_of(&driver, &first), waiting, "{way:?}");
        drop(first);
        assert_eq!(driver.devices(), [id], "dropping it does not delete it: {way:?}");
        let second = server(&driver, 2).recover(id, target).unwrap();
        assert_eq!(disk.read(4096, 4096).unwrap(), [7; 4096], "{way:?}");
        assert_eq!(second.recovery(), way.recovery);
        finish(&driver, second);
    }
}

#[test]
fn requests_wait_while_there_is_no_server_or_fail_if_that_was_asked_for() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let target = ram_disk();
        let first = server(&driver, 2).start(target.clone(), &way).unwrap();
        let (id, disk) = (first.id(), driver.disk(first.id()));
        first.leave().unwrap();
        let theirs = disk.clone();
        let client = std::thread::spawn(move || theirs.write(0, &[1; 512]));
        if way.recovery == Some(Recovery::FailIo) {
            until("the failure of the write", || client.is_finished());
        } else {
            std::thread::sleep(Duration::from_millis(50));
            assert!(!client.is_finished(), "{way:?}");
        }
        let second = server(&driver, 2).recover(id, target).unwrap();
        let expected = if way.recovery == Some(Recovery::FailIo) { Err(Errno::EIO) } else { Ok(()) };
        assert_eq!(client.join().unwrap(), expected, "{way:?}");
        finish(&driver, second);
    }
}

#[test]
fn a_request_that_a_handler_has_is_finished_before_its_server_leaves() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let (entered, release) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (e, r) = (entered.clone(), release.clone());
        let slow = custom(move |request| {
            e.store(true, Ordering::SeqCst);
            until("the release of the handler", || r.load(Ordering::SeqCst));
            request.complete();
        });
        let first = Arc::new(server(&driver, 2).start(slow, &way).unwrap());
        let disk = driver.disk(first.id());
        let sent = disk.send(1, 0, 512, &[0; 512]).unwrap();
        until("the handler", || entered.load(Ordering::SeqCst));
        let leaving = first.clone();
        let leaver = std::thread::spawn(move || leaving.leave());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!leaver.is_finished(), "{way:?}");
        release.store(true, Ordering::SeqCst);
        disk.wait(sent).unwrap();
        leaver.join().unwrap().unwrap();
        let second = server(&driver, 2).recover(first.id(), completing()).unwrap();
        finish(&driver, second);
    }
}

#[test]
fn a_server_leaves_as_soon_as_the_last_request_has_ended_elsewhere() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let held = Arc::new(Mutex::new(None));
        let theirs = held.clone();
        let first = Arc::new(
            server(&driver, 2).start(custom(move |r| *theirs.lock().unwrap() = Some(r.detach())), &way).unwrap(),
        );
        let disk = driver.disk(first.id());
        let sent = disk.send(1, 0, 512, &[0; 512]).unwrap();
        until("the request", || held.lock().unwrap().is_some());
        let leaving = first.clone();
        let leaver = std::thread::spawn(move || leaving.leave());
        // The driver's deliveries have ended by then.
        std::thread::sleep(Duration::from_millis(50));
        let ended = Instant::now();
        held.lock().unwrap().take().unwrap().complete();
        disk.wait(sent).unwrap();
        leaver.join().unwrap().unwrap();
        assert!(ended.elapsed() < Duration::from_millis(1500), "{way:?}: {:?}", ended.elapsed());
        let second = server(&driver, 2).recover(first.id(), completing()).unwrap();
        finish(&driver, second);
    }
}

#[test]
fn somebody_elses_stop_deletes_and_somebody_elses_quiesce_leaves() {
    for quiesce in [false, true] {
        let driver = FakeDriver::new();
        let device = server(&driver, 2).start(ram_disk(), &recoverable(Recovery::Queue, true)).unwrap();
        let control = server(&driver, 1).control().clone();
        if quiesce {
            control.quiesce(device.id(), Duration::from_millis(10)).unwrap();
        } else {
            control.stop(device.id()).unwrap();
        }
        assert!(device.wait(Some(Duration::from_secs(5))));
        let ending = device.conclude().unwrap();
        assert_eq!(ending, if quiesce { Ending::Left } else { Ending::Deleted });
        assert_eq!(driver.devices().is_empty(), !quiesce);
    }
}

#[test]
fn a_device_that_was_not_made_for_it_is_neither_left_nor_recovered() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    assert!(device.leave().unwrap_err().to_string().contains("QUIESCE"));
    let error = server(&driver, 1).recover(device.id(), ram_disk()).unwrap_err();
    assert!(error.to_string().contains("created without recovery"), "{error}");
    finish(&driver, device);
}

#[test]
fn a_device_with_a_living_server_is_not_recovered() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    let error = server(&driver, 1).recover(device.id(), ram_disk()).unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    finish(&driver, device);
}

#[test]
fn a_target_that_does_not_fit_leaves_the_device_waiting() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, true)).unwrap();
    let id = device.id();
    device.leave().unwrap();
    let small: Arc<dyn Target> = Arc::new(Mem::with_params(Params::new(SIZE / 2, 512)).unwrap());
    let error = server(&driver, 1).recover(id, small).unwrap_err();
    assert!(error.to_string().contains("size"), "{error}");
    let second = server(&driver, 1).recover(id, ram_disk()).unwrap();
    driver.disk(id).write(0, &[1; 512]).unwrap();
    finish(&driver, second);
}

#[test]
fn a_recovery_that_failed_once_is_begun_again() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    let id = device.id();
    device.leave().unwrap();
    driver.refuse_next("FETCH_REQ", Errno::EFAULT);
    assert!(server(&driver, 1).recover(id, ram_disk()).is_err());
    // What Linux up to 6.12 says to a second one.
    driver.refuse_next("START_USER_RECOVERY", Errno::EINVAL);
    let deadline = Instant::now() + Duration::from_secs(10);
    let second = loop {
        match server(&driver, 1).recover(id, ram_disk()) {
            Ok(device) => break device,
            // The first attempt's threads are giving up.
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
    };
    driver.disk(id).write(0, &[1; 512]).unwrap();
    finish(&driver, second);
}

#[test]
fn a_recovery_waits_until_nobody_else_has_the_char_device_open() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    device.leave().unwrap();
    for _ in 0..5 {
        driver.refuse_next("START_USER_RECOVERY", Errno::EBUSY);
    }
    let second = server(&driver, 1).recover(device.id(), ram_disk()).unwrap();
    finish(&driver, second);
}

#[test]
fn a_target_with_zones_does_not_fit_a_disk_without() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    device.leave().unwrap();
    let zoned = Arc::new(Zoned::open(&ZonedOptions::new(SIZE).zone_size(1 << 18)).unwrap());
    let error = server(&driver, 1).recover(device.id(), zoned).unwrap_err();
    assert!(error.to_string().contains("zones"), "{error}");
    finish(&driver, server(&driver, 1).recover(device.id(), ram_disk()).unwrap());
}

#[test]
fn a_live_disk_changes_its_size_in_whole_blocks() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    let size = |device: &Device| server(&driver, 1).control().params(device.id()).unwrap().params.size;
    device.resize(SIZE / 2).unwrap();
    assert_eq!(size(&device), SIZE / 2);
    let error = device.resize(SIZE / 2 + 1).unwrap_err();
    assert!(error.to_string().contains("multiple of the logical block size"), "{error}");
    assert_eq!(size(&device), SIZE / 2);
    finish(&driver, device);
}

#[test]
fn many_hand_overs_under_load_lose_no_write() {
    let driver = FakeDriver::new();
    let target = ram_disk();
    let mut device = server(&driver, 2).start(target.clone(), &recoverable(Recovery::Queue, true)).unwrap();
    let id = device.id();
    let stop = Arc::new(AtomicBool::new(false));
    let written = Arc::new(Mutex::new(0u64));
    let client = {
        let (disk, stop, written) = (driver.disk(id), stop.clone(), written.clone());
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                let n = *written.lock().unwrap();
                disk.write(n % 1024 * 512, &[n as u8; 512]).unwrap();
                assert_eq!(disk.read(n % 1024 * 512, 512).unwrap(), [n as u8; 512]);
                *written.lock().unwrap() += 1;
            }
        })
    };
    for _ in 0..20 {
        let before = *written.lock().unwrap();
        device.leave().unwrap();
        device = server(&driver, 2).recover(id, target.clone()).unwrap();
        until("another write of the client", || *written.lock().unwrap() != before);
    }
    stop.store(true, Ordering::SeqCst);
    client.join().unwrap();
    finish(&driver, device);
}

/// A file that does not finish a write: it may land at any time.
fn with_a_write_under_way(way: &DeviceOptions) -> (FakeDriver, tempfile::NamedTempFile, Device, Sent) {
    let driver = FakeDriver::new();
    let file = disk_file();
    let device = server(&driver, 1).start(file_disk(file.path()), way).unwrap();
    let disk = driver.disk(device.id());
    disk.write(4096, &[1; 512]).unwrap();
    driver.hold_files(true);
    let sent = disk.send(1, 0, 512, &[2; 512]).unwrap();
    until_held(&driver, 1);
    (driver, file, device, sent)
}

fn wait_until_unserved(driver: &FakeDriver, device: &Device) {
    until("the release of the device", || state_of(driver, device) != DeviceState::Live);
}

#[test]
fn a_device_is_not_handed_over_while_a_file_writes() {
    for (data, batch) in [
        (DataMovement::Copy, false),
        (DataMovement::Copy, true),
        (DataMovement::UserCopy, false),
        (DataMovement::GetData, false),
    ] {
        let way = recoverable(Recovery::Reissue, batch).data(data).queues(1);
        let (driver, file, device, sent) = with_a_write_under_way(&way);
        let (id, disk) = (device.id(), driver.disk(device.id()));
        // As after a time-out of `leave` or `conclude`.
        device.abandon();
        assert!(device.wait(Some(Duration::from_secs(60))), "its queue was given up: {way:?}");
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(state_of(&driver, &device), DeviceState::Live, "the old write may land over a newer one: {way:?}");
        driver.hold_files(false);
        wait_until_unserved(&driver, &device);
        let second = server(&driver, 1).recover(id, file_disk(file.path())).unwrap();
        disk.wait(sent).unwrap();
        disk.write(0, &[3; 512]).unwrap();
        assert_eq!(disk.read(0, 512).unwrap(), [3; 512], "{way:?}");
        drop(device);
        finish(&driver, second);
    }
}

#[test]
fn a_flush_that_fails_after_its_queue_was_given_up_is_known() {
    const FLUSH: u32 = 2;
    let way = recoverable(Recovery::Reissue, false).queues(1);
    let driver = FakeDriver::new();
    let file = disk_file();
    let target = file_disk(file.path());
    let device = server(&driver, 1).start(target.clone(), &way).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[1; 512]).unwrap();
    driver.hold_files(true);
    let sent = disk.send(FLUSH, 0, 0, &[]).unwrap();
    until_held(&driver, 1);
    device.abandon();
    assert!(device.wait(Some(Duration::from_secs(60))));
    driver.refuse_next("fdatasync", Errno::EIO);
    driver.hold_files(false);
    wait_until_unserved(&driver, &device);
    let second = server(&driver, 1).recover(device.id(), target).unwrap();
    // It is sent again, and the kernel would not report the error a second time.
    assert_eq!(disk.wait(sent), Err(Errno::EIO));
    drop(device);
    finish(&driver, second);
}

#[test]
fn a_device_is_not_handed_over_when_its_ring_fails() {
    let way = recoverable(Recovery::Reissue, false).data(DataMovement::Copy).queues(1);
    let (driver, file, device, sent) = with_a_write_under_way(&way);
    let id = device.id();
    // The ring fails in the round that gives the queue up, so that the thread ends with it.
    driver.refuse_next("io_uring_enter", Errno::EBADF);
    device.abandon();
    assert!(device.wait(Some(Duration::from_secs(60))));
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(state_of(&driver, &device), DeviceState::Live);
    driver.hold_files(false);
    wait_until_unserved(&driver, &device);
    let second = server(&driver, 1).recover(id, file_disk(file.path())).unwrap();
    driver.disk(id).wait(sent).unwrap();
    drop(device);
    finish(&driver, second);
}

#[test]
#[ignore = "takes as long as requests may take to end: a minute"]
fn a_device_is_deleted_although_a_file_does_not_answer() {
    let way = recoverable(Recovery::Reissue, false).data(DataMovement::Copy).queues(1);
    let (driver, _file, device, sent) = with_a_write_under_way(&way);
    device.stop().unwrap_err();
    assert_eq!(driver.devices(), [], "no other server will have it");
    // Whatever the file does later, the client has its answer.
    assert!(driver.disk(device.id()).wait(sent).is_err());
    driver.hold_files(false);
}

#[test]
fn an_old_driver_says_which_kernel_is_needed() {
    let driver = FakeDriver::new();
    driver.offer(Features::USER_COPY | Features::USER_RECOVERY);
    let options = recoverable(Recovery::FailIo, false);
    let error = server(&driver, 1).start(ram_disk(), &options).unwrap_err().to_string();
    assert!(error.contains("USER_RECOVERY_FAIL_IO") && error.contains("6.13"), "{error}");
    let scan = support::options(1, 1).partition_scan(false);
    let error = server(&driver, 1).start(ram_disk(), &scan).unwrap_err().to_string();
    assert!(error.contains("NO_AUTO_PART_SCAN") && error.contains("7.0"), "{error}");
}

/// A target of any shape that completes everything.
#[derive(Debug)]
struct Shaped(Params);

struct Completes;

impl Target for Shaped {
    fn kind(&self) -> &str {
        "shaped"
    }

    fn params(&self) -> Params {
        self.0
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Completes))
    }
}

impl QueueHandler for Completes {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| request.complete());
    }
}

/// The block layer got the disk's shape when it was made; see `device/fitting.rs` for each value.
#[test]
fn a_target_that_needs_another_shape_leaves_the_device_waiting() {
    type Need = (&'static str, fn(&mut Params));
    let driver = FakeDriver::new();
    let disk = Params::new(SIZE, 512);
    let way = recoverable(Recovery::Reissue, false);
    let device = server(&driver, 1).start(Arc::new(Shaped(disk)), &way).unwrap();
    device.leave().unwrap();
    let needs: [Need; 5] = [
        ("write cache", |params| params.operations |= Operations::FLUSH),
        ("chunk size", |params| params.chunk_size = 1 << 19),
        ("maximum request size", |params| params.max_io_bytes = 4096),
        ("DMA alignment", |params| params.dma_alignment = Some(512)),
        ("segments", |params| params.segments = Some(SegmentLimits::default().max_count(1))),
    ];
    for (name, need) in needs {
        let mut other = disk;
        need(&mut other);
        let error = server(&driver, 1).recover(device.id(), Arc::new(Shaped(other))).unwrap_err();
        assert!(error.to_string().contains(name), "{name}: {error}");
        assert_eq!(state_of(&driver, &device), DeviceState::Quiesced, "{name}");
    }
    finish(&driver, server(&driver, 1).recover(device.id(), Arc::new(Shaped(disk))).unwrap());
}

/// A device whose disk is stored in a file, or a directory of zones.
fn stored(driver: &FakeDriver, target: Arc<dyn Target>) -> Device {
    server(driver, 1).start(target, &recoverable(Recovery::Reissue, false)).unwrap()
}

fn zones(path: &Path) -> Arc<dyn Target> {
    Arc::new(Zoned::open(&ZonedOptions::new(SIZE).zone_size(1 << 19).directory(path)).unwrap())
}

/// A restore or a copy ends with a rename.
#[test]
fn a_file_that_took_the_name_of_the_disks_file_is_refused() {
    let create_file = |path: &Path| std::fs::File::create(path).unwrap().set_len(SIZE).unwrap();
    let create_directory = |path: &Path| std::fs::create_dir(path).unwrap();
    type Kind = (fn(&Path) -> Arc<dyn Target>, fn(&Path));
    let kinds: [Kind; 2] = [(|path| file_disk(path), create_file), (zones, create_directory)];
    for (open, create) in kinds {
        let directory = tempfile::tempdir().unwrap();
        let [path, old, new] = ["disk", "old", "new"].map(|name| directory.path().join(name));
        create(&path);
        let driver = FakeDriver::new();
        let device = stored(&driver, open(&path));
        let id = device.id();
        device.leave().unwrap();
        drop(device);
        // Under another name it is the same file.
        std::fs::rename(&path, &old).unwrap();
        std::os::unix::fs::symlink(&old, &path).unwrap();
        server(&driver, 1).check_recovery(id, &*open(&path)).unwrap();
        server(&driver, 1).recover(id, open(&path)).unwrap().leave().unwrap();
        create(&new);
        // A directory cannot replace a link.
        std::fs::remove_file(&path).unwrap();
        std::fs::rename(&new, &path).unwrap();
        let check = || server(&driver, 1).check_recovery(id, &*open(&path));
        let recover = || server(&driver, 1).recover(id, open(&path)).map(drop);
        for refused in [check().unwrap_err(), recover().unwrap_err()] {
            assert!(matches!(refused, Error::Mismatch { parameter: Parameter::BackingFile, .. }), "{refused:?}");
            assert!(refused.to_string().contains("recover_replaced"), "{refused}");
        }
        assert_eq!(server(&driver, 1).control().info(id).unwrap().state, DeviceState::Quiesced);
        server(&driver, 1).recover_replaced(id, open(&path)).unwrap().leave().unwrap();
        finish(&driver, server(&driver, 1).recover(id, open(&old)).unwrap());
    }
}

#[test]
fn a_file_that_replaced_the_integrity_file_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let [disk, metadata, new] = ["disk", "metadata", "new"].map(|name| directory.path().join(name));
    std::fs::File::create(&disk).unwrap().set_len(SIZE).unwrap();
    let open = || {
        let file = File::open(&disk, &FileOptions::new().io(Io::Buffered)).unwrap();
        Arc::new(file.with_integrity(Integrity::new(8, 512), &metadata).unwrap()) as Arc<dyn Target>
    };
    let driver = FakeDriver::new();
    let device = stored(&driver, open());
    let id = device.id();
    device.leave().unwrap();
    drop(device);
    server(&driver, 1).recover(id, open()).unwrap().leave().unwrap();
    std::fs::copy(&metadata, &new).unwrap();
    std::fs::rename(&new, &metadata).unwrap();
    let refused = server(&driver, 1).recover(id, open()).unwrap_err();
    assert!(matches!(refused, Error::Mismatch { parameter: Parameter::BackingFile, .. }), "{refused:?}");
    finish(&driver, server(&driver, 1).recover_replaced(id, open()).unwrap());
}

#[test]
fn a_target_that_is_stored_nowhere_is_not_compared() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
    let driver = FakeDriver::new();
    let params = file_disk(&path).params();
    let shaped = || Arc::new(Shaped(params)) as Arc<dyn Target>;
    let open = || file_disk(&path);
    let orders: [[&dyn Fn() -> Arc<dyn Target>; 2]; 2] = [[&open, &shaped], [&shaped, &open]];
    for [first, second] in orders {
        let first = first();
        let known = first.backing();
        let device = stored(&driver, first);
        assert_eq!(server(&driver, 1).control().info(device.id()).unwrap().backing, known);
        device.leave().unwrap();
        finish(&driver, server(&driver, 1).recover(device.id(), second()).unwrap());
    }
}

#[test]
fn a_successor_is_checked_while_the_server_lives() {
    let driver = FakeDriver::new();
    let disk = Params::new(SIZE, 512);
    let device = server(&driver, 1).start(Arc::new(Shaped(disk)), &recoverable(Recovery::Queue, false)).unwrap();
    let check = |params| server(&driver, 1).check_recovery(device.id(), &Shaped(params));
    check(disk).unwrap();
    let mut smaller = disk;
    smaller.size /= 2;
    assert!(check(smaller).unwrap_err().to_string().starts_with("size"));
    assert_eq!(state_of(&driver, &device), DeviceState::Live);
    finish(&driver, device);
    let device = server(&driver, 1).start(Arc::new(Shaped(disk)), &options(1, 4)).unwrap();
    let error = server(&driver, 1).check_recovery(device.id(), &Shaped(disk)).unwrap_err();
    assert_eq!(error.errno(), Errno::EINVAL);
    finish(&driver, device);
}

/// A device of which another process has asked that it wait, and its next server.
fn handed_over(driver: &FakeDriver) -> (Device, Device) {
    let target = ram_disk();
    let first = server(driver, 1).start(target.clone(), &recoverable(Recovery::Queue, false)).unwrap();
    server(driver, 1).control().quiesce_until(first.id(), SOON).unwrap();
    let second = server(driver, 1).recover(first.id(), target).unwrap();
    (first, second)
}

/// More than an end takes that waits for nothing, and less than one that waits for the driver.
const SOON: Duration = Duration::from_secs(20);

#[test]
fn the_end_of_a_server_leaves_the_device_to_the_one_that_has_followed() {
    for way in ["drop", "stop", "try_stop", "leave", "conclude"] {
        let driver = FakeDriver::new();
        let (first, second) = handed_over(&driver);
        let begin = Instant::now();
        match way {
            "drop" => drop(first),
            "stop" => first.stop().unwrap(),
            "try_stop" => first.try_stop().unwrap(),
            "leave" => first.leave().unwrap(),
            _ => {
                assert_eq!(first.conclude().unwrap(), Ending::Left);
                assert_eq!(first.conclude().unwrap(), Ending::Left, "again");
            }
        }
        assert!(begin.elapsed() < SOON, "{way}: {:?}", begin.elapsed());
        assert!(!second.is_ending(), "{way}");
        driver.disk(second.id()).write(0, &[7; 512]).unwrap();
        finish(&driver, second);
    }
}

#[test]
fn a_device_that_is_being_handed_over_is_not_deleted_by_a_drop() {
    let driver = FakeDriver::new();
    let first = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    let id = first.id();
    server(&driver, 1).control().quiesce_until(id, SOON).unwrap();
    drop(first);
    assert_eq!(driver.devices(), [id]);
    let second = server(&driver, 1).recover(id, ram_disk()).unwrap();
    finish(&driver, second);
}

/// TRY_STOP_DEV waits for a lock that an opener of the disk has.
#[test]
fn a_try_stop_does_not_delete_a_device_that_is_handed_over() {
    let driver = FakeDriver::new();
    let first = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    let id = first.id();
    driver.ignore_next("TRY_STOP_DEV");
    let outcome = std::thread::scope(|scope| {
        let stop = scope.spawn(|| first.try_stop());
        // The command is under way.
        std::thread::sleep(Duration::from_millis(200));
        server(&driver, 1).control().quiesce_until(id, SOON).unwrap();
        stop.join().unwrap()
    });
    assert_eq!(outcome.unwrap_err().errno(), Errno::EBUSY);
    assert_eq!(state_of(&driver, &first), DeviceState::Quiesced);
    drop(first);
    finish(&driver, server(&driver, 1).recover(id, ram_disk()).unwrap());
}

#[test]
fn a_leave_that_may_have_begun_is_no_reason_to_delete() {
    for (errno, kept) in [(Errno::ENOMEM, true), (Errno::EINTR, true), (Errno::EOPNOTSUPP, false)] {
        let driver = FakeDriver::new();
        let device = server(&driver, 1).start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
        driver.refuse_next("QUIESCE_DEV", errno);
        assert_eq!(device.leave().unwrap_err().errno(), errno);
        drop(device);
        assert_eq!(!driver.devices().is_empty(), kept, "{errno}");
    }
}

/// A recovery of a device that was left, between whose first command and the next ones `act` happens.
fn recover_late(
    driver: &FakeDriver,
    act: impl FnOnce(&Server, DeviceId) -> Device + Send + 'static,
) -> (Result<Device>, Device) {
    let server = server(driver, 2);
    let first = server.start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    let id = first.id();
    first.leave().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let theirs = server.clone();
    driver.after_next("START_USER_RECOVERY", move || sender.send(act(&theirs, id)).unwrap());
    let late = server.recover(id, ram_disk());
    (late, receiver.recv().unwrap())
}

#[test]
fn a_recovery_that_comes_second_leaves_the_first_alone() {
    let driver = FakeDriver::new();
    let begin = Instant::now();
    let (late, winner) = recover_late(&driver, |server, id| server.recover(id, ram_disk()).unwrap());
    let error = late.unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY, "{error}");
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    // Whatever was asked of its threads is done by the last one.
    (0..3).for_each(|_| drop(driver.disk(winner.id()).read(0, 512).unwrap()));
    assert!(!winner.is_ending());
    finish(&driver, winner);
}

#[test]
fn a_recovery_that_is_refused_looks_whether_it_comes_second() {
    let driver = FakeDriver::new();
    driver.refuse_next("START_USER_RECOVERY", Errno::EBUSY);
    let begin = Instant::now();
    let (late, winner) = recover_late(&driver, |server, id| server.recover(id, ram_disk()).unwrap());
    let error = late.unwrap_err();
    assert_eq!(error.errno(), Errno::EBUSY, "{error}");
    assert!(error.to_string().contains("serves the device"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
    finish(&driver, winner);
}

#[test]
fn a_recovery_uses_what_the_driver_says_at_its_start() {
    let driver = FakeDriver::new();
    let (late, between) = recover_late(&driver, |server, id| {
        let device = server.recover(id, ram_disk()).unwrap();
        device.resize(SIZE / 2).unwrap();
        device.leave().unwrap();
        device
    });
    drop(between);
    let late = late.unwrap();
    assert_eq!(late.params().size, SIZE / 2);
    finish(&driver, late);
}

#[test]
fn a_recovery_is_not_for_the_next_device_of_the_number() {
    let driver = FakeDriver::new();
    let (late, next) = recover_late(&driver, |server, id| {
        server.control().remove(id).unwrap();
        let next = server.start(ram_disk(), &recoverable(Recovery::Reissue, false).id(id)).unwrap();
        next.leave().unwrap();
        next
    });
    let error = late.unwrap_err();
    assert_eq!(error.errno(), Errno::ENODEV, "{error}");
    finish(&driver, server(&driver, 2).recover(next.id(), ram_disk()).unwrap());
}

#[test]
fn a_server_that_has_left_abandons_no_queue_of_the_next() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let first = server.start(ram_disk(), &recoverable(Recovery::Queue, false)).unwrap();
    first.leave().unwrap();
    let second = server.recover(first.id(), ram_disk()).unwrap();
    first.abandon();
    (0..3).for_each(|_| drop(driver.disk(second.id()).read(0, 512).unwrap()));
    assert!(!second.is_ending());
    finish(&driver, second);
}

#[test]
fn a_failed_recovery_follows_no_server() {
    let driver = FakeDriver::new();
    let (late, winner) = recover_late(&driver, |server, id| server.recover(id, ram_disk()).unwrap());
    late.unwrap_err();
    // It has left when the driver has noticed.
    driver.delay_closes(Duration::from_millis(200));
    winner.leave().unwrap();
    assert_eq!(state_of(&driver, &winner), DeviceState::Quiesced);
    driver.delay_closes(Duration::ZERO);
    finish(&driver, server(&driver, 1).recover(winner.id(), ram_disk()).unwrap());
}
