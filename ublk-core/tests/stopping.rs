// SPDX-License-Identifier: MIT OR Apache-2.0

//! How long a stop waits for handlers, on the stand-in driver.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ublk_core::control::Removal;
use ublk_core::fake::{FakeDriver, Sent};
use ublk_core::{
    DetachedRequest, Device, DeviceId, DeviceOptions, Ending, Errno, Error, FileRange, Recovery, SharedMemory,
};

mod support;

use support::{SIZE, completing, custom, finish, options, server, unnamed_file, until_held};

/// More than a stop may take that waits for nothing, and less than one that waits for a handler.
const SOON: Duration = Duration::from_secs(20);

/// A device with a request that its handler does not finish before the sender is dropped.
fn stuck_device(driver: &FakeDriver, way: &DeviceOptions) -> (Device, Sender<()>) {
    let (leave, stay) = channel::<()>();
    let (enter, entered) = channel();
    let stay = Arc::new(Mutex::new(stay));
    let target = custom(move |request| {
        let _ = enter.send(());
        let _ = stay.lock().unwrap().recv();
        request.complete();
    });
    let device = server(driver, 1).start(target, way).unwrap();
    let _ = driver.disk(device.id()).send(0, 0, 512, &[]).unwrap();
    entered.recv().unwrap();
    (device, leave)
}

/// A device with a detached request, which is in the list.
fn detached_device(driver: &FakeDriver) -> (Device, Arc<Mutex<Vec<DetachedRequest>>>, Sent) {
    let detached = Arc::new(Mutex::new(Vec::<DetachedRequest>::new()));
    let (list, (enter, entered)) = (detached.clone(), channel());
    let target = custom(move |request| {
        list.lock().unwrap().push(request.detach());
        let _ = enter.send(());
    });
    let device = server(driver, 1).start(target, &options(1, 2)).unwrap();
    let sent = driver.disk(device.id()).send(0, 0, 512, &[]).unwrap();
    entered.recv().unwrap();
    (device, detached, sent)
}

#[test]
fn a_stop_waits_for_a_stuck_handler_no_longer_than_asked() {
    let driver = FakeDriver::new();
    let (device, leave) = stuck_device(&driver, &options(1, 2));
    let begin = Instant::now();
    let error = device.stop_within(Duration::from_millis(100)).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(begin.elapsed() < SOON);
    assert!(!device.is_stopped());
    drop(leave);
    // What became of its request was said by the first one.
    let _ = device.stop();
    assert!(device.is_stopped());
    assert_eq!(driver.devices(), []);
}

#[test]
fn a_stop_that_is_expedited_waits_no_longer() {
    let driver = FakeDriver::new();
    let (device, leave) = stuck_device(&driver, &options(1, 2));
    let device = Arc::new(device);
    let theirs = device.clone();
    let stop = std::thread::spawn(move || theirs.stop_within(Duration::from_secs(3600)));
    std::thread::sleep(Duration::from_millis(100));
    let begin = Instant::now();
    device.expedite();
    assert!(matches!(stop.join().unwrap(), Err(Error::Timeout { .. })));
    assert!(begin.elapsed() < SOON);
    drop(leave);
}

#[test]
fn of_two_stops_the_one_with_the_least_time_decides() {
    let driver = FakeDriver::new();
    let (device, leave) = stuck_device(&driver, &options(1, 2));
    let device = Arc::new(device);
    let theirs = device.clone();
    let patient = std::thread::spawn(move || theirs.stop_within(Duration::from_secs(3600)));
    std::thread::sleep(Duration::from_millis(100));
    let begin = Instant::now();
    device.stop_within(Duration::from_millis(100)).unwrap_err();
    patient.join().unwrap().unwrap_err();
    assert!(begin.elapsed() < SOON);
    drop(leave);
}

#[test]
fn a_request_that_is_elsewhere_keeps_the_device_until_it_ends() {
    let driver = FakeDriver::new();
    let (device, held, sent) = detached_device(&driver);
    let begin = Instant::now();
    assert!(matches!(device.stop_within(Duration::ZERO), Err(Error::Timeout { .. })));
    assert!(begin.elapsed() < SOON);
    // Too late for anything but letting the device go.
    held.lock().unwrap().drain(..).for_each(DetachedRequest::complete);
    let _ = device.stop();
    assert!(device.is_stopped());
    assert!(driver.disk(device.id()).wait(sent).is_err());
    assert_eq!(driver.devices(), []);
    assert_eq!(driver.violations(), Vec::<String>::new());
}

#[test]
fn a_device_that_another_process_stops_ends_in_time_too() {
    for expedite in [false, true] {
        let driver = FakeDriver::new();
        let (device, leave) = stuck_device(&driver, &options(1, 2).recovery(Recovery::Queue));
        let id = device.id();
        let control = server(&driver, 1).control().clone();
        // It gives up, and the device goes on to stop.
        control.stop_within(id, Duration::from_millis(10)).unwrap_err();
        let begin = Instant::now();
        let timeout = Duration::from_secs(if expedite { 3600 } else { 2 });
        let error = std::thread::scope(|scope| {
            let conclude = scope.spawn(|| device.conclude_within(timeout).unwrap_err());
            // It is about to ask the driver, or has.
            std::thread::sleep(Duration::from_millis(1500));
            if expedite {
                device.expedite();
            }
            conclude.join().unwrap()
        });
        assert!(matches!(error, Error::Timeout { .. }), "{error}");
        assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        drop(leave);
    }
}

#[test]
fn an_idle_device_stops_in_no_time_and_without_a_failure() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    driver.disk(device.id()).read(0, 512).unwrap();
    device.expedite();
    device.stop_within(Duration::ZERO).unwrap();
    finish(&driver, device);
}

#[test]
fn a_thread_knows_whose_queues_it_serves() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let first = Arc::new(server.start(completing(), &options(1, 2)).unwrap());
    let theirs = Arc::downgrade(&first);
    let (answer, answered) = channel();
    let target = custom(move |request| {
        answer.send(theirs.upgrade().is_some_and(|device| device.is_served_here())).unwrap();
        request.complete();
    });
    let second = server.start(target, &options(1, 2)).unwrap();
    assert_ne!(second.id(), DeviceId(0));
    driver.disk(second.id()).read(0, 512).unwrap();
    assert!(answered.recv().unwrap(), "one thread serves both");
    assert!(!first.is_served_here() && !second.is_served_here());
    first.stop().unwrap();
    driver.disk(second.id()).read(0, 512).unwrap();
    assert!(!answered.recv().unwrap(), "it serves one any more");
    finish(&driver, second);
}

#[test]
fn a_quiesce_without_an_answer_ends_when_it_is_expedited() {
    for leaves in [true, false] {
        let driver = FakeDriver::new();
        let (device, leave) = stuck_device(&driver, &options(1, 2).recovery(Recovery::Queue));
        driver.ignore_next("QUIESCE_DEV");
        std::thread::scope(|scope| {
            let end = scope.spawn(|| if leaves { device.leave() } else { device.conclude().map(drop) });
            // The command is under way.
            std::thread::sleep(Duration::from_millis(1500));
            let begin = Instant::now();
            device.expedite();
            end.join().unwrap().unwrap_err();
            assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
        });
        drop(leave);
    }
}

/// How the owner of a device ends with it.
fn end(device: Device, way: &str) {
    match way {
        "drop" => drop(device),
        "stop" => device.stop().unwrap(),
        "try_stop" => device.try_stop().unwrap(),
        _ => assert_eq!(device.conclude().unwrap(), Ending::Deleted, "{way}"),
    }
}

#[test]
fn the_next_device_of_a_number_outlives_the_end_of_the_last_one() {
    for (way, recovery) in ["drop", "stop", "try_stop", "conclude"]
        .into_iter()
        .flat_map(|way| [None, Some(Recovery::Queue)].map(|r| (way, r)))
    {
        let driver = FakeDriver::new();
        let mut options = options(1, 2);
        options.recovery = recovery;
        let first = server(&driver, 1).start(completing(), &options).unwrap();
        let id = first.id();
        // As `ublk del` and `ublk add` of other processes.
        server(&driver, 1).control().remove(id).unwrap();
        let second = server(&driver, 1).start(completing(), &options).unwrap();
        assert_eq!(second.id(), id);
        end(first, way);
        assert!(!second.is_ending(), "{way} {recovery:?}");
        driver.disk(id).read(0, 512).unwrap();
        finish(&driver, second);
    }
}

#[test]
fn a_device_that_is_gone_changes_no_other_one() {
    let driver = FakeDriver::new();
    let first = server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    server(&driver, 1).control().remove(first.id()).unwrap();
    let second = server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    assert_eq!(first.resize(4096).unwrap_err().errno(), Errno::ENODEV);
    let size = server(&driver, 1).control().params(second.id()).unwrap().params.size;
    assert_eq!(size, SIZE);
    drop(first);
    finish(&driver, second);
}

/// It may be another's between the two commands.
#[test]
fn a_number_is_free_when_a_stop_returns_and_not_before_it_is_deleted() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    let id = options(1, 2).id(DeviceId(7));
    let start = || server(&driver, 1).start(completing(), &id);
    // Before Linux 6.9, and of a user's device.
    for refusal in [None, Some(Errno::EOPNOTSUPP), Some(Errno::EINVAL)] {
        for delay in [0, 100].map(Duration::from_millis) {
            if let Some(errno) = refusal {
                driver.refuse_next("DEL_DEV_ASYNC", errno);
            }
            driver.delay_closes(delay);
            start().unwrap().stop().unwrap();
            assert_eq!(driver.devices(), [device.id()], "{refusal:?} {delay:?}");
            let next = start().unwrap_or_else(|error| panic!("{refusal:?} {delay:?}: {error}"));
            driver.delay_closes(Duration::ZERO);
            next.stop().unwrap();
        }
    }
    finish(&driver, device);
}

#[test]
fn a_number_is_free_when_a_removal_is_complete() {
    // Its server, which notices the stop, is quicker; or another process has begun the end before.
    for command in ["STOP_DEV", "DEL_DEV_ASYNC"] {
        let driver = FakeDriver::new();
        let id = options(1, 2).id(DeviceId(7));
        let start = || server(&driver, 1).start(completing(), &id).unwrap();
        driver.delay_closes(Duration::from_millis(100));
        let device = start();
        let control = server(&driver, 1).control().clone();
        let instance = control.instance(id.id.unwrap());
        if command == "STOP_DEV" {
            driver.after_next(command, move || device.conclude().map(drop).unwrap());
        } else {
            control.delete_async(device.id()).unwrap();
            drop(device);
        }
        match control.remove_instance(DeviceId(7), instance) {
            Ok(removal) => assert_eq!(removal, Removal::Complete, "{command}"),
            Err(error) => assert_eq!(error.errno(), Errno::ENODEV, "{command}"),
        }
        driver.delay_closes(Duration::ZERO);
        finish(&driver, start());
    }
}

#[test]
fn a_deleted_device_that_stays_open_keeps_its_number() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    let (id, control) = (device.id(), server(&driver, 1).control().clone());
    let instance = control.instance(id);
    driver.delay_closes(Duration::from_secs(3600));
    control.delete_async(id).unwrap();
    drop(device);
    assert_eq!(control.info(id).unwrap_err().errno(), Errno::ENODEV, "it has no node any more");
    assert_eq!(control.remove_instance(id, instance).unwrap(), Removal::HeldOpen);
}

/// It waits for the driver's lock, which the DEL_DEV of a busy device holds, or its helper process got no CPU time.
#[test]
fn a_deletion_that_was_not_carried_out_is_a_failure() {
    let driver = FakeDriver::new();
    let start = || server(&driver, 1).start(completing(), &options(1, 2)).unwrap();
    let device = start();
    // As for a device of a user's.
    driver.refuse_next("DEL_DEV_ASYNC", Errno::EINVAL);
    driver.expire_next("DEL_DEV");
    assert_eq!(device.stop().unwrap_err().errno(), Errno::ETIMEDOUT);
    assert!(!device.is_stopped());
    assert_eq!(driver.devices(), [device.id()]);
    finish(&driver, device);
    let device = start();
    let control = server(&driver, 1).control().clone();
    driver.expire_next("DEL_DEV");
    assert_eq!(control.remove(device.id()).unwrap_err().errno(), Errno::ETIMEDOUT);
    assert_eq!(driver.devices(), [device.id()]);
    finish(&driver, device);
}

#[test]
fn a_command_under_way_does_not_keep_a_stop_from_giving_up() {
    type Command = fn(&Device, u16) -> Result<(), Error>;
    let commands: [(&str, Command); 4] = [
        ("REG_BUF", |device, _| device.share_memory(shared_memory()).map(drop)),
        ("UNREG_BUF", Device::unshare_memory),
        ("UPDATE_SIZE", |device, _| device.resize(4096)),
        ("TRY_STOP_DEV", |device, _| device.try_stop()),
    ];
    for (name, command) in commands {
        let driver = FakeDriver::new();
        let file = Arc::new(unnamed_file(SIZE));
        let target = custom(move |request| request.forward(FileRange::new(&file, 0)));
        let device = server(&driver, 1).start(target, &options(1, 2).shared_memory(true)).unwrap();
        let index = device.share_memory(shared_memory()).unwrap();
        // A request that does not end, for which the command waits.
        driver.hold_files(true);
        let _ = driver.disk(device.id()).send(0, 0, 512, &[]).unwrap();
        until_held(&driver, 1);
        driver.ignore_next(name);
        std::thread::scope(|scope| {
            let sent = scope.spawn(|| command(&device, index));
            // The command is under way.
            std::thread::sleep(Duration::from_millis(200));
            let _ = device.stop_within(Duration::from_millis(200));
            assert!(device.is_stopped(), "{name}");
            let outcome = sent.join().unwrap();
            assert!(name == "TRY_STOP_DEV" || outcome.unwrap_err().errno() == Errno::ECANCELED, "{name}");
        });
        driver.hold_files(false);
        assert_eq!(driver.devices(), [], "{name}");
    }
}

fn shared_memory() -> SharedMemory {
    let memory = tempfile::tempfile_in("/dev/shm").unwrap();
    memory.set_len(4096).unwrap();
    SharedMemory::map(&memory, 4096, false).unwrap()
}

#[test]
fn memory_may_be_shared_before_a_device_has_queues() {
    let driver = FakeDriver::new();
    let target = completing();
    let device = server(&driver, 1).add(&target, &options(1, 2).shared_memory(true)).unwrap();
    let index = device.share_memory(shared_memory()).unwrap();
    device.go_live(target).unwrap();
    device.unshare_memory(index).unwrap();
    finish(&driver, device);
}

#[test]
fn a_failed_queue_with_requests_keeps_a_stop_not_for_long() {
    let driver = FakeDriver::new();
    let (device, held, _sent) = detached_device(&driver);
    driver.refuse_next("COMMIT_AND_FETCH_REQ", Errno::EIO);
    let begin = Instant::now();
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| device.stop_within(Duration::from_secs(3600)));
        std::thread::sleep(Duration::from_millis(100));
        held.lock().unwrap().drain(..).for_each(DetachedRequest::complete);
        let _ = stop.join().unwrap();
    });
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    let _ = device.stop();
    assert_eq!(driver.devices(), []);
}

#[test]
fn a_time_that_no_clock_reaches_is_none() {
    let driver = FakeDriver::new();
    let start = |options: &DeviceOptions| server(&driver, 1).start(completing(), options).unwrap();
    let device = start(&options(1, 2));
    device.stop_within(Duration::MAX).unwrap();
    finish(&driver, device);
    let way = options(1, 2).recovery(Recovery::Queue);
    let device = start(&way);
    let control = server(&driver, 1).control().clone();
    control.quiesce_until(device.id(), Duration::MAX).unwrap();
    assert_eq!(device.conclude_within(Duration::MAX).unwrap(), Ending::Left);
    control.stop_within(device.id(), Duration::MAX).unwrap();
    control.delete(device.id(), Duration::MAX).unwrap();
    drop(device);
    let device = start(&way);
    control.quiesce(device.id(), Duration::MAX).unwrap();
    device.conclude_within(Duration::MAX).unwrap();
    control.remove(device.id()).unwrap();
}
