// SPDX-License-Identifier: MIT OR Apache-2.0

//! The engine and the life cycle on the stand-in driver: every way a request or a device can end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ublk_core::control::{AddRequest, Removal};
use ublk_core::fake::FakeDriver;
use ublk_core::targets::{File, FileOptions, Io, Null};
use ublk_core::{
    Device, DeviceId, Errno, Error, Op, Params, QueueHandler, QueueInfo, Requests, Result, Server, Spawn, StdSpawn,
    Target,
};

mod support;

use support::{SIZE, completing, custom, disk_file, file_disk, finish, options, ram_disk, server, until};

#[test]
fn a_ram_disk_returns_what_was_written() {
    let driver = FakeDriver::new();
    let device = server(&driver, 2).start(ram_disk(), &options(2, 4)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(4096, &[0xab; 8192]).unwrap();
    assert_eq!(disk.read(4096, 8192).unwrap(), vec![0xab; 8192]);
    assert_eq!(disk.read(0, 4096).unwrap(), vec![0; 4096]);
    disk.write_zeroes(4096, 512).unwrap();
    disk.discard(8192, 512).unwrap();
    assert_eq!(disk.read(4096, 1024).unwrap(), [vec![0; 512], vec![0xab; 512]].concat());
    finish(&driver, device);
}

#[test]
fn a_null_disk_completes_every_operation() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(Arc::new(Null::new(SIZE, 512).unwrap()), &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    disk.write_durably(0, &[1; 512]).unwrap();
    disk.read(0, 512).unwrap();
    disk.flush().unwrap();
    disk.discard(0, 512).unwrap();
    disk.write_zeroes(0, 512).unwrap();
    finish(&driver, device);
}

#[test]
fn a_file_disk_reads_and_writes_its_file() {
    let file = disk_file();
    for io in [Io::Auto, Io::Buffered] {
        let driver = FakeDriver::new();
        let target = File::open(file.path(), &FileOptions::new().io(io)).unwrap();
        let block = target.params().logical_block_size as usize;
        let device = server(&driver, 1).start(Arc::new(target), &options(1, 8)).unwrap();
        let disk = driver.disk(device.id());
        disk.write(4096, &vec![0x5a; 4096.max(block)]).unwrap();
        disk.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[4096..8192], [0x5a; 4096]);
        disk.write_zeroes(4096, 4096).unwrap();
        assert_eq!(disk.read(4096, 4096).unwrap(), vec![0; 4096]);
        finish(&driver, device);
    }
}

#[test]
fn a_file_that_shrinks_under_its_disk_is_an_error_and_not_zeros() {
    let file = disk_file();
    let driver = FakeDriver::new();
    let target = file_disk(file.path());
    let device = server(&driver, 1).start(target, &options(1, 2)).unwrap();
    file.as_file().set_len(SIZE / 2).unwrap();
    assert_eq!(driver.disk(device.id()).read(SIZE - 4096, 4096), Err(Errno::EIO));
    finish(&driver, device);
}

#[test]
fn a_flush_has_no_position_that_could_overflow() {
    let driver = FakeDriver::new();
    let target = custom(|request| {
        assert_eq!((request.offset(), request.len(), request.is_empty()), (0, 0, true));
        assert!(format!("{request:?}").contains("Flush"));
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    driver.disk(device.id()).flush().unwrap();
    finish(&driver, device);
}

#[test]
fn a_device_that_somebody_else_removed_stops_well() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let device = server.start(completing(), &options(1, 4)).unwrap();
    assert_eq!(server.control().remove(device.id()).unwrap(), Removal::Complete);
    assert_eq!(server.control().remove(device.id()).unwrap_err().errno(), Errno::ENODEV);
    assert!(device.wait(Some(Duration::from_secs(5))));
    finish(&driver, device);
}

#[test]
fn a_removal_does_not_wait_for_whoever_holds_the_device_open() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let device = server.start(completing(), &options(1, 1)).unwrap();
    let id = device.id();
    device.stop().unwrap();
    let mut request = AddRequest::new(1, 4096);
    request.id = Some(id);
    let info = server.control().add(&request).unwrap();
    let held = driver.open_char_device(info.id).unwrap();
    assert_eq!(server.control().remove(id).unwrap(), Removal::HeldOpen);
    assert_eq!(driver.devices(), [], "it is deleted all the same");
    drop(held);
    assert_eq!(server.control().remove(id).unwrap_err().errno(), Errno::ENODEV);
}

#[test]
fn a_dropped_request_fails_with_eio_and_the_device_lives_on() {
    let driver = FakeDriver::new();
    let target = custom(|request| match request.op() {
        Op::Flush => drop(request),
        _ => request.complete(),
    });
    let device = server(&driver, 1).start(target, &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    assert_eq!(disk.flush(), Err(Errno::EIO));
    disk.read(0, 512).unwrap();
    finish(&driver, device);
}

#[test]
fn a_request_is_shown_as_people_would_tell_of_it() {
    let driver = FakeDriver::new();
    let (tell, told) = std::sync::mpsc::channel();
    let target = custom(move |request| {
        let _ = tell.send(request.to_string());
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    driver.disk(device.id()).write(4096, &[0; 512]).unwrap();
    let expected = format!("write of 512 bytes at 4096, ublkb{} queue 0 tag 0", device.id());
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [expected]);
    finish(&driver, device);
}

#[test]
fn a_panicking_handler_fails_its_request_and_the_device_lives_on() {
    let driver = FakeDriver::new();
    let target = custom(|request| match request.op() {
        Op::Write => panic!("a bug in the target"),
        _ => request.complete(),
    });
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    let disk = driver.disk(device.id());
    for _ in 0..10 {
        assert_eq!(disk.write(0, &[0; 512]), Err(Errno::EIO));
        disk.read(0, 512).unwrap();
    }
    finish(&driver, device);
}

#[test]
fn requests_that_a_handler_leaves_behind_fail_with_eio() {
    #[derive(Debug)]
    struct Lazy;
    impl Target for Lazy {
        fn kind(&self) -> &str {
            "lazy"
        }
        fn params(&self) -> Params {
            Params::new(SIZE, 512)
        }
        fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
            Ok(Box::new(Lazy))
        }
    }
    impl QueueHandler for Lazy {
        fn handle(&mut self, _: Requests<'_>) {}
    }
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(Arc::new(Lazy), &options(1, 4)).unwrap();
    assert_eq!(driver.disk(device.id()).read(0, 512), Err(Errno::EIO));
    finish(&driver, device);
}

#[test]
fn an_operation_that_nobody_knows_is_not_supported() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(completing(), &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    let sent = disk.send(0x2a, 0, 0, &[]).unwrap();
    assert_eq!(disk.wait(sent), Err(Errno::EOPNOTSUPP));
    finish(&driver, device);
}

#[test]
fn a_handlers_errno_reaches_the_client() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(custom(|r| r.fail(Errno::ENOSPC)), &options(1, 1)).unwrap();
    assert_eq!(driver.disk(device.id()).write(0, &[0; 512]), Err(Errno::ENOSPC));
    finish(&driver, device);
}

/// Counts the rounds in which requests come; the first one takes long enough for others to come meanwhile.
#[derive(Debug, Default, Clone)]
struct Rounds(Arc<AtomicUsize>);

impl Target for Rounds {
    fn kind(&self) -> &str {
        "rounds"
    }

    fn params(&self) -> Params {
        Params::new(SIZE, 512)
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Arc::unwrap_or_clone(self)))
    }
}

impl QueueHandler for Rounds {
    fn handle(&mut self, requests: Requests<'_>) {
        if self.0.fetch_add(1, Ordering::Relaxed) == 0 {
            std::thread::sleep(Duration::from_millis(200));
        }
        requests.for_each(|request| request.complete());
    }
}

#[test]
fn requests_gather_while_several_are_under_way() {
    let driver = FakeDriver::new();
    let rounds = Rounds::default();
    let server = server(&driver, 1).with_coalescing(Duration::from_millis(10)).unwrap();
    let device = server.start(Arc::new(rounds.clone()), &options(1, 16)).unwrap();
    let disk = driver.disk(device.id());
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..20).for_each(|_| disk.read(0, 512).map(drop).unwrap()));
        }
    });
    let rounds = rounds.0.load(Ordering::Relaxed);
    assert!(rounds * 2 <= 8 * 20, "160 requests in {rounds} rounds");
    finish(&driver, device);
}

#[test]
fn requests_cannot_gather_for_long() {
    let error = server(&FakeDriver::new(), 1).with_coalescing(Duration::from_millis(11)).unwrap_err();
    assert!(error.to_string().contains("10000 µs at most"), "{error}");
}

#[test]
fn a_slow_request_does_not_hold_up_those_finished_before_it() {
    let driver = FakeDriver::new();
    let target = custom(|request| {
        if request.op() == Op::Write {
            std::thread::sleep(Duration::from_millis(300));
        } else {
            std::thread::sleep(Duration::from_millis(20));
        }
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 8)).unwrap();
    let disk = driver.disk(device.id());
    // The first write keeps the thread busy until the other three are there and make one batch.
    let first = disk.send(1, 0, 512, &[0; 512]).unwrap();
    let read = disk.send(0, 0, 512, &[]).unwrap();
    let slow = [disk.send(1, 0, 512, &[0; 512]).unwrap(), disk.send(1, 0, 512, &[0; 512]).unwrap()];
    disk.wait(first).unwrap();
    let begin = Instant::now();
    disk.wait(read).unwrap();
    let waited = begin.elapsed();
    for sent in slow {
        disk.wait(sent).unwrap();
    }
    assert!(waited < begin.elapsed() / 2, "the read waited for the whole batch: {waited:?}");
    finish(&driver, device);
}

#[test]
fn a_slow_request_does_not_hold_up_what_another_queue_of_its_thread_has_done() {
    let driver = FakeDriver::new();
    let served = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
    let seen = served.clone();
    let target = custom(move |request| {
        seen[usize::from(request.queue().0)].fetch_add(1, Ordering::Relaxed);
        if request.op() == Op::Write {
            std::thread::sleep(Duration::from_millis(300));
        }
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(2, 8)).unwrap();
    let disk = driver.disk(device.id());
    let begin = Instant::now();
    let counts = || [0, 1].map(|queue: usize| served[queue].load(Ordering::Relaxed));
    // The stand-in sends what lies in even pages through queue 1, once both queues are there.
    while counts().contains(&0) {
        assert!(begin.elapsed() < Duration::from_secs(10));
        disk.read(0, 512).unwrap();
        disk.read(4096, 512).unwrap();
    }
    // It keeps the thread busy until the next two are there, and shows that writes, all in queue 1, are slow.
    let before = counts()[1];
    let first = disk.send(1, 0, 512, &[0; 512]).unwrap();
    until("the first write", || counts()[1] != before);
    let read = disk.send(0, 4096, 512, &[]).unwrap();
    let slow = disk.send(1, 0, 512, &[0; 512]).unwrap();
    disk.wait(first).unwrap();
    let begin = Instant::now();
    disk.wait(read).unwrap();
    let waited = begin.elapsed();
    disk.wait(slow).unwrap();
    assert!(waited < begin.elapsed() / 2, "the read waited for the other queue's write: {waited:?}");
    finish(&driver, device);
}

#[test]
fn a_kept_buffer_is_never_reused() {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let theirs = kept.clone();
    let driver = FakeDriver::new();
    let target = custom(move |mut request| {
        if request.op() == Op::Read {
            request.data_mut().fill(0x77);
        }
        theirs.lock().unwrap().push((request.buffer().clone(), request.data().to_vec()));
        request.replace_buffer();
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    for round in 0..4u8 {
        disk.write(0, &[round; 4096]).unwrap();
        assert_eq!(disk.read(0, 4096).unwrap(), vec![0x77; 4096], "the read's data moved along");
    }
    finish(&driver, device);
    let kept = kept.lock().unwrap();
    assert_eq!(kept.len(), 8);
    for (buffer, bytes) in kept.iter() {
        // SAFETY: the buffers were replaced in their requests and the device is gone: nobody writes.
        let now = unsafe { std::slice::from_raw_parts(buffer.as_ptr(), bytes.len()) };
        assert_eq!(now, bytes);
    }
}

#[test]
fn a_refused_commit_fails_the_request_once() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(completing(), &options(1, 1)).unwrap();
    driver.refuse_next("COMMIT_AND_FETCH_REQ", Errno::EINVAL);
    let disk = driver.disk(device.id());
    assert_eq!(disk.read(0, 512), Err(Errno::EIO));
    disk.read(0, 512).unwrap();
    finish(&driver, device);
}

#[test]
fn a_refused_commit_of_a_batch_fails_its_request_although_nothing_else_happens() {
    let driver = FakeDriver::new();
    let options = options(1, 4).batch(true);
    let device = server(&driver, 1).start(completing(), &options).unwrap();
    let disk = driver.disk(device.id());
    disk.read(0, 512).unwrap();
    driver.refuse_next("COMMIT_AND_FETCH_REQ", Errno::EINVAL);
    assert_eq!(disk.read(0, 512), Err(Errno::EIO));
    disk.read(0, 512).unwrap();
    finish(&driver, device);
}

#[test]
fn a_start_that_fails_at_any_step_leaves_no_device() {
    for step in ["ADD_DEV", "SET_PARAMS", "FETCH_REQ", "PREP_IO_CMDS", "START_DEV"] {
        let driver = FakeDriver::new();
        driver.refuse_next(step, Errno::EINVAL);
        let options = options(2, 4).batch(step != "FETCH_REQ");
        let error = server(&driver, 2).start(completing(), &options).unwrap_err();
        assert!(error.to_string().contains(step), "{step}: {error}");
        assert_eq!(driver.devices(), [], "{step}");
        assert_eq!(driver.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_target_that_cannot_open_its_queue_leaves_no_device() {
    #[derive(Debug)]
    struct Broken(bool);
    impl Target for Broken {
        fn kind(&self) -> &str {
            "broken"
        }
        fn params(&self) -> Params {
            Params::new(SIZE, 512)
        }
        fn open_queue(self: Arc<Self>, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
            assert!(!self.0, "no queue today");
            Err(Error::Target { context: format!("opening queue {}", queue.queue), source: Errno::ENOMEM.into() })
        }
    }
    for (panics, words) in [(false, "opening queue 0"), (true, "no queue today")] {
        let driver = FakeDriver::new();
        let error = server(&driver, 1).start(Arc::new(Broken(panics)), &options(2, 4)).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(driver.devices(), []);
    }
}

#[test]
fn impossible_options_are_refused_before_the_driver_is_asked() {
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    for (bad, words) in [
        (options(0, 1), "queues = 0"),
        (options(4097, 1), "queues = 4097"),
        (options(1, 0), "queue depth = 0"),
        (options(1, 4097), "queue depth = 4097"),
        (options(70_000, 1), "queues = 70000"),
        (options(1, 1).id(DeviceId(1 << 20)), "device id = 1048576"),
    ] {
        // Would be seen if the driver were asked.
        driver.refuse_next("ADD_DEV", Errno::ENOTTY);
        let error = server.start(completing(), &bad).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(error.errno(), Errno::EINVAL);
    }
}

#[test]
fn an_id_in_use_is_named_and_the_first_device_lives_on() {
    let driver = FakeDriver::new();
    let server = server(&driver, 2);
    let fixed = options(1, 1).id(DeviceId(5));
    let first = server.start(completing(), &fixed).unwrap();
    let error = server.start(completing(), &fixed).unwrap_err();
    assert!(error.to_string().contains("the id is in use"), "{error}");
    driver.disk(first.id()).read(0, 512).unwrap();
    finish(&driver, first);
}

#[test]
fn a_device_stopped_from_outside_ends_its_wait() {
    let driver = FakeDriver::new();
    let server = server(&driver, 2);
    let device = server.start(completing(), &options(2, 16)).unwrap();
    assert!(!device.wait(Some(Duration::from_millis(20))), "a live device does not end");
    server.control().stop(device.id()).unwrap();
    assert!(device.wait(Some(Duration::from_secs(5))));
    finish(&driver, device);
}

#[test]
fn stopping_waits_for_the_request_in_the_handler() {
    let driver = FakeDriver::new();
    let target = custom(|request| {
        std::thread::sleep(Duration::from_millis(200));
        request.complete();
    });
    let device = server(&driver, 1).start(target, &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    let sent = disk.send(0, 0, 512, &[]).unwrap();
    let client = std::thread::spawn(move || disk.wait(sent));
    std::thread::sleep(Duration::from_millis(50));
    device.stop().unwrap();
    drop(device);
    // The answer was committed before the device went.
    assert!(matches!(client.join().unwrap(), Ok(_) | Err(Errno::ENODEV)));
    assert_eq!(driver.violations(), Vec::<String>::new());
}

#[test]
fn stopping_twice_and_from_many_threads_is_harmless() {
    let driver = FakeDriver::new();
    let device = Arc::new(server(&driver, 2).start(completing(), &options(2, 8)).unwrap());
    let stoppers: Vec<_> = (0..4)
        .map(|_| {
            let device = device.clone();
            std::thread::spawn(move || device.stop())
        })
        .collect();
    stoppers.into_iter().for_each(|t| t.join().unwrap().unwrap());
    device.stop().unwrap();
}

#[test]
fn many_devices_share_few_threads_which_end_with_them() {
    #[derive(Debug, Default)]
    struct Counting {
        made: AtomicUsize,
        alive: Arc<AtomicUsize>,
    }
    impl Spawn for Counting {
        fn spawn(&self, name: String, body: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
            self.made.fetch_add(1, Ordering::SeqCst);
            self.alive.fetch_add(1, Ordering::SeqCst);
            let alive = self.alive.clone();
            let counted = move || {
                body();
                alive.fetch_sub(1, Ordering::SeqCst);
            };
            StdSpawn.spawn(name, Box::new(counted))
        }
    }
    let driver = FakeDriver::new();
    let spawn = Arc::new(Counting::default());
    let server = Server::with_fake(&driver).with_threads(3).with_spawn(spawn.clone());
    let devices: Vec<Device> = (0..50).map(|_| server.start(ram_disk(), &options(2, 2)).unwrap()).collect();
    assert_eq!(spawn.made.load(Ordering::SeqCst), 3);
    for (i, device) in devices.iter().enumerate() {
        driver.disk(device.id()).write(0, &[i as u8; 512]).unwrap();
    }
    for (i, device) in devices.iter().enumerate() {
        assert_eq!(driver.disk(device.id()).read(0, 512).unwrap(), [i as u8; 512]);
    }
    drop(devices);
    until("the end of threads without queues", || spawn.alive.load(Ordering::SeqCst) == 0);
    assert_eq!(driver.violations(), Vec::<String>::new());
}

#[test]
fn a_thread_that_cannot_be_made_leaves_no_device() {
    #[derive(Debug)]
    struct Refuse;
    impl Spawn for Refuse {
        fn spawn(&self, _: String, _: Box<dyn FnOnce() + Send>) -> std::io::Result<()> {
            Err(Errno::EAGAIN.into())
        }
    }
    let driver = FakeDriver::new();
    let server = Server::with_fake(&driver).with_threads(1).with_spawn(Arc::new(Refuse));
    let error = server.start(completing(), &options(1, 1)).unwrap_err();
    assert_eq!(error.errno(), Errno::EAGAIN, "{error}");
    assert_eq!(driver.devices(), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any mix of operations over any number of queues agrees with a plain array.
    #[test]
    fn a_ram_disk_agrees_with_a_model(
        queues in 1u32..4,
        depth in 1u32..9,
        steps in prop::collection::vec((0u64..2000, 1usize..40, 0u8..6, any::<u8>()), 1..60),
    ) {
        let driver = FakeDriver::new();
        let device = server(&driver, 2).start(ram_disk(), &options(queues, depth)).unwrap();
        let disk = driver.disk(device.id());
        let mut model = vec![0u8; SIZE as usize];
        for (block, blocks, op, value) in steps {
            let offset = block * 512;
            let len = blocks * 512;
            let range = offset as usize..offset as usize + len;
            match op {
                0 | 1 => {
                    disk.write(offset, &vec![value; len]).unwrap();
                    model[range].fill(value);
                }
                2 => {
                    disk.write_zeroes(offset, len).unwrap();
                    model[range].fill(0);
                }
                3 => {
                    disk.discard(offset, len).unwrap();
                    model[range].fill(0);
                }
                _ => prop_assert_eq!(disk.read(offset, len).unwrap(), &model[range]),
            }
        }
        device.stop().unwrap();
        prop_assert_eq!(driver.violations(), Vec::<String>::new());
    }
}

#[test]
fn a_device_that_starts_behind_a_blocked_handler_waits_for_it() {
    let (release, blocked) = std::sync::mpsc::channel::<()>();
    let blocked = Arc::new(Mutex::new(blocked));
    let driver = FakeDriver::new();
    let server = server(&driver, 1);
    let stuck = custom(move |request| {
        let _ = blocked.lock().unwrap().recv_timeout(Duration::from_secs(5));
        request.complete();
    });
    let first = server.start(stuck, &options(1, 4)).unwrap();
    let disk = driver.disk(first.id());
    let sent = disk.send(0, 0, 512, &[]).unwrap();
    let client = std::thread::spawn(move || disk.wait(sent));
    let other = {
        let server = server.clone();
        std::thread::spawn(move || server.start(ram_disk(), &options(1, 4)))
    };
    std::thread::sleep(Duration::from_millis(100));
    release.send(()).unwrap();
    let second = other.join().unwrap().unwrap();
    client.join().unwrap().unwrap();
    driver.disk(second.id()).write(0, &[1; 512]).unwrap();
    first.stop().unwrap();
    driver.disk(second.id()).write(512, &[2; 512]).unwrap();
    drop(first);
    finish(&driver, second);
}

#[test]
fn whoever_waits_for_a_device_hears_of_a_start_that_failed() {
    for command in ["START_DEV", "FETCH_REQ"] {
        let driver = FakeDriver::new();
        let target = ram_disk();
        let options = options(1, 4).batch(false);
        let device = server(&driver, 1).add(&target, &options).unwrap();
        assert!(!device.is_ending());
        driver.refuse_next(command, Errno::EIO);
        device.go_live(target).unwrap_err();
        assert!(device.wait(Some(Duration::from_secs(10))), "{command}");
        finish(&driver, device);
    }
    // Stopped before it began.
    let driver = FakeDriver::new();
    let target = ram_disk();
    let device = server(&driver, 1).add(&target, &options(1, 4)).unwrap();
    device.stop().unwrap();
    assert!(device.wait(Some(Duration::from_secs(10))));
    finish(&driver, device);
}

#[test]
fn a_ram_disk_whose_device_was_made_larger_fails_what_lies_beyond_and_nothing_else() {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(ram_disk(), &options(1, 4)).unwrap();
    device.resize(2 * SIZE).unwrap();
    let disk = driver.disk(device.id());
    for at in [SIZE - 512, SIZE, 2 * SIZE - 512] {
        assert_eq!(disk.read(at, 1024.min((2 * SIZE - at) as usize)), Err(Errno::EIO), "{at}");
        assert_eq!(disk.write(at, &vec![1; 1024.min((2 * SIZE - at) as usize)]), Err(Errno::EIO), "{at}");
    }
    disk.write(SIZE - 512, &[1; 512]).unwrap();
    disk.flush().unwrap();
    finish(&driver, device);
}

#[test]
fn a_ring_that_cannot_be_made_is_reported_with_its_errno() {
    for errno in [Errno::ENOMEM, Errno::EMFILE] {
        let driver = FakeDriver::new();
        driver.refuse_next("io_uring_setup", errno);
        let error = server(&driver, 1).start(completing(), &options(1, 4)).unwrap_err();
        assert_eq!(error.errno(), errno, "{error}");
        assert!(error.to_string().contains("ring"), "{error}");
    }
}
