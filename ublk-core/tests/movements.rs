// SPDX-License-Identifier: MIT OR Apache-2.0

//! Every way in which data and tags move between driver and server, on the stand-in driver.

use std::any::Any;
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use std::time::Duration;

use ublk_core::fake::FakeDriver;
use ublk_core::pull::{PullSender, PullSenders, channels};
use ublk_core::{
    Access, DataMovement, DetachedRequest, DeviceOptions, Errno, Features, FilePiece, FileRange, Op, Params,
    QueueHandler, QueueInfo, Requests, Result, Target, pull,
};

mod support;

use support::{SIZE, completing, custom, disk_file, file_disk, finish, options, ram_disk, server, unnamed_file, until};

/// All combinations of data movement, batches and threads that there are.
fn every_way() -> Vec<DeviceOptions> {
    let mut ways = Vec::new();
    for data in DataMovement::ALL {
        for (batch, threads_per_queue) in [(false, 1), (true, 1), (false, 3)] {
            if !(batch && data == DataMovement::GetData) {
                let way = options(2, 4).data(data).batch(batch).threads_per_queue(threads_per_queue);
                ways.push(way);
            }
        }
    }
    ways
}

#[test]
fn a_ram_disk_works_whichever_way_its_data_moves() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let device = server(&driver, 6).start(ram_disk(), &way).unwrap();
        let disk = driver.disk(device.id());
        for round in 1..8u8 {
            let at = u64::from(round) * 8192;
            disk.write(at, &vec![round; 4096 + 512 * usize::from(round)]).unwrap();
            assert_eq!(disk.read(at, 4096).unwrap(), [round; 4096], "{way:?}");
        }
        assert_eq!(disk.read(0, 4096).unwrap(), [0; 4096], "{way:?}");
        disk.discard(8192, 4096).unwrap();
        assert_eq!(disk.read(8192, 4096).unwrap(), [0; 4096], "{way:?}");
        finish(&driver, device);
    }
}

#[test]
fn a_long_request_may_follow_a_short_one_on_the_same_tag() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let way = way.queues(1).depth(1).threads_per_queue(1);
        let device = server(&driver, 1).start(ram_disk(), &way).unwrap();
        let disk = driver.disk(device.id());
        for (value, len) in [(1, 512), (2, 65536), (3, 4096), (4, 131_072)] {
            assert_eq!(disk.read(0, len).unwrap().len(), len, "{way:?}");
            disk.write(0, &vec![value; len]).unwrap();
            assert_eq!(disk.read(0, len).unwrap(), vec![value; len], "{way:?}");
        }
        finish(&driver, device);
    }
}

#[test]
fn a_file_disk_works_whichever_way_its_data_moves() {
    let file = disk_file();
    for (round, way) in every_way().into_iter().enumerate() {
        let driver = FakeDriver::new();
        let target = file_disk(file.path());
        let device = server(&driver, 6).start(target, &way).unwrap();
        let disk = driver.disk(device.id());
        let value = round as u8 + 1;
        disk.write(4096, &[value; 8192]).unwrap();
        disk.flush().unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[4096..12288], [value; 8192], "{way:?}");
        assert_eq!(disk.read(8192, 4096).unwrap(), [value; 4096], "{way:?}");
        finish(&driver, device);
    }
}

/// Looks at a write's bytes and changes them, then forwards it.
#[derive(Debug)]
struct Inverting(Arc<std::fs::File>);

impl Target for Inverting {
    fn kind(&self) -> &str {
        "inverting"
    }
    fn params(&self) -> Params {
        Params::new(SIZE, 512)
    }
    fn access(&self) -> Access {
        Access::Forwards { memory_alignment: 1 }
    }
    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Inverting(self.0.clone())))
    }
}

impl QueueHandler for Inverting {
    fn handle(&mut self, requests: Requests<'_>) {
        for mut request in requests {
            if request.op() == Op::Write {
                request.load().unwrap();
                request.data_mut().iter_mut().for_each(|byte| *byte = !*byte);
            }
            let offset = request.offset();
            request.forward(FileRange::new(&self.0, offset));
        }
    }
}

#[test]
fn a_request_that_was_loaded_is_forwarded_with_what_its_handler_made_of_it() {
    for way in every_way() {
        let file = unnamed_file(SIZE);
        let driver = FakeDriver::new();
        let device = server(&driver, 6).start(Arc::new(Inverting(Arc::new(file))), &way).unwrap();
        let disk = driver.disk(device.id());
        disk.write(0, &[0x0f; 512]).unwrap();
        assert_eq!(disk.read(0, 512).unwrap(), [0xf0; 512], "{way:?}");
        finish(&driver, device);
    }
}

/// Does reads by itself, and leaves writes to whoever takes them.
#[derive(Debug)]
struct Sharing {
    file: Arc<std::fs::File>,
    senders: PullSenders,
}

impl Target for Sharing {
    fn kind(&self) -> &str {
        "sharing"
    }
    fn params(&self) -> Params {
        Params::new(SIZE, 512)
    }
    fn access(&self) -> Access {
        Access::Forwards { memory_alignment: 1 }
    }
    fn open_queue(self: Arc<Self>, queue: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(SharingQueue(self.file.clone(), self.senders.open(queue.queue)?)))
    }
}

struct SharingQueue(Arc<std::fs::File>, PullSender);

impl QueueHandler for SharingQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        let (file, sender) = (&self.0, &self.1);
        sender.send(requests.filter_map(|request| {
            if request.op() == Op::Write {
                return Some(request.detach());
            }
            let offset = request.offset();
            request.forward(FileRange::new(file, offset));
            None
        }));
    }
}

#[test]
fn a_target_may_hand_over_some_requests_and_they_may_be_forwarded_from_there() {
    for way in every_way() {
        let file = Arc::new(unnamed_file(SIZE));
        let driver = FakeDriver::new();
        let (senders, queues) = channels(way.queues).unwrap();
        let kept = Arc::new(());
        let workers: Vec<_> = queues
            .into_iter()
            .map(|queue| {
                let (file, kept) = (file.clone(), kept.clone());
                std::thread::spawn(move || {
                    while let Some(batch) = queue.next_batch(8) {
                        for mut request in batch {
                            request.load().unwrap();
                            request.data_mut().iter_mut().for_each(|byte| *byte = !*byte);
                            // Somebody holds on to the old memory; the bytes are the request's all the same.
                            request.replace_buffer();
                            let (at, len) = (request.offset(), request.len());
                            let piece = |from: u64, len| FilePiece { file: FileRange::new(&file, at + from), len };
                            request.forward_pieces(
                                vec![piece(0, 512), piece(512, len - 512)],
                                Box::new(kept.clone()) as Box<dyn Any + Send>,
                            );
                        }
                    }
                })
            })
            .collect();
        let device = server(&driver, 6).start(Arc::new(Sharing { file, senders }), &way).unwrap();
        let disk = driver.disk(device.id());
        let sent: Vec<_> = (0..16u64).map(|i| disk.send(1, i * 8192, 8192, &[i as u8; 8192]).unwrap()).collect();
        for (i, sent) in sent.into_iter().enumerate() {
            disk.wait(sent).unwrap();
            assert_eq!(disk.read(i as u64 * 8192, 8192).unwrap(), [!(i as u8); 8192], "{way:?}");
        }
        finish(&driver, device);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert_eq!(Arc::strong_count(&kept), 1, "{way:?}");
    }
}

#[test]
fn detached_requests_end_in_any_order_on_any_thread() {
    for way in every_way() {
        let kept: Arc<Mutex<Vec<DetachedRequest>>> = Arc::default();
        let theirs = kept.clone();
        let driver = FakeDriver::new();
        let target = custom(move |request| theirs.lock().unwrap().push(request.detach()));
        let device = server(&driver, 6).start(target, &way).unwrap();
        let disk = driver.disk(device.id());
        let sent: Vec<_> = (0..4).map(|i| disk.send(0, i * 4096, 512, &[]).unwrap()).collect();
        until("all requests", || kept.lock().unwrap().len() == 4);
        // Backwards, each on a thread of its own.
        let requests = std::mem::take(&mut *kept.lock().unwrap());
        for mut request in requests.into_iter().rev() {
            std::thread::spawn(move || {
                let value = (request.offset() / 4096) as u8;
                request.write_data(0, &vec![value; request.len() as usize]).unwrap();
                request.complete();
            })
            .join()
            .unwrap();
        }
        for (i, sent) in sent.into_iter().enumerate() {
            assert_eq!(disk.wait(sent).unwrap(), [i as u8; 512], "{way:?}");
        }
        finish(&driver, device);
    }
}

#[test]
fn a_detached_request_that_is_dropped_fails_with_eio() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let device = server(&driver, 6).start(custom(|request| drop(request.detach())), &way).unwrap();
        assert_eq!(driver.disk(device.id()).write(0, &[1; 512]), Err(Errno::EIO), "{way:?}");
        finish(&driver, device);
    }
}

#[test]
fn a_refused_commit_fails_its_request_and_no_other() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let device = server(&driver, 6).start(completing(), &way).unwrap();
        let disk = driver.disk(device.id());
        driver.refuse_next("COMMIT_AND_FETCH_REQ", Errno::EINVAL);
        assert_eq!(disk.write(0, &[0; 512]), Err(Errno::EIO), "{way:?}");
        disk.write(0, &[0; 512]).unwrap();
        finish(&driver, device);
    }
}

#[test]
fn a_range_that_is_not_the_requests_is_refused() {
    let driver = FakeDriver::new();
    let target = custom(|mut request| {
        let mut byte = [0];
        let results = [
            request.read_data(request.len(), &mut byte),
            request.read_data(u64::MAX, &mut byte),
            request.write_data(request.len() - 1, &[0; 2]),
            request.read_data(request.len() - 1, &mut byte),
        ];
        let bad = Err(Errno::EINVAL);
        request.finish(if results == [bad, bad, bad, Ok(())] { Ok(()) } else { Err(Errno::EPROTO) });
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    driver.disk(device.id()).write(0, &[1; 512]).unwrap();
    finish(&driver, device);
}

/// A RAM disk that is served by worker threads.
fn serve(queue: &pull::PullQueue, disk: &Mutex<Vec<u8>>) {
    while let Some(batch) = queue.next_batch(8) {
        for mut request in batch {
            let (at, len) = (request.offset() as usize, request.len() as usize);
            let result = match request.op() {
                Op::Read => {
                    let bytes = disk.lock().unwrap()[at..at + len].to_vec();
                    request.write_data(0, &bytes)
                }
                Op::Write => {
                    let mut bytes = vec![0; len];
                    request
                        .read_data(0, &mut bytes)
                        .map(|()| disk.lock().unwrap()[at..at + len].copy_from_slice(&bytes))
                }
                _ => Err(Errno::EOPNOTSUPP),
            };
            request.finish(result);
        }
    }
}

#[test]
fn pulled_requests_are_served_by_many_threads_until_the_device_ends() {
    for way in every_way() {
        let driver = FakeDriver::new();
        let (target, queues) = pull(Params::new(SIZE, 512), way.queues).unwrap();
        let data = Arc::new(Mutex::new(vec![0; SIZE as usize]));
        let queues: Vec<_> = queues.into_iter().map(Arc::new).collect();
        let workers: Vec<_> = (0..4)
            .map(|i| {
                let (queue, data) = (queues[i % queues.len()].clone(), data.clone());
                std::thread::spawn(move || serve(&queue, &data))
            })
            .collect();
        let device = server(&driver, 6).start(target, &way).unwrap();
        let disk = driver.disk(device.id());
        let sent: Vec<_> = (0..64u64).map(|i| (i, disk.send(1, i * 512, 512, &[i as u8; 512]).unwrap())).collect();
        for (i, sent) in sent {
            disk.wait(sent).unwrap();
            assert_eq!(disk.read(i * 512, 512).unwrap(), [i as u8; 512], "{way:?}");
        }
        finish(&driver, device);
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    }
}

#[test]
fn a_pull_queue_can_be_polled() {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    use std::os::fd::AsFd;
    let readable = |queue: &pull::PullQueue, millis: u16| {
        let mut fds = [PollFd::new(queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(millis)).unwrap() == 1
    };
    let driver = FakeDriver::new();
    let (target, mut queues) = pull(Params::new(SIZE, 512), 1).unwrap();
    let queue = queues.remove(0);
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    let disk = driver.disk(device.id());
    assert!(!readable(&queue, 0));
    assert_eq!(queue.next_batch_timeout(1, Duration::ZERO).unwrap().len(), 0);
    assert_eq!(queue.next_batch(0).unwrap().len(), 0, "it does not wait for what it would not take");
    let sent = [disk.send(2, 0, 0, &[]).unwrap(), disk.send(2, 0, 0, &[]).unwrap()];
    for _ in 0..2 {
        assert!(readable(&queue, 10_000));
        assert_eq!(queue.next_batch(0).unwrap().len(), 0);
        let batch = queue.next_batch_timeout(1, Duration::MAX).unwrap();
        batch.into_iter().for_each(|request| request.complete());
    }
    sent.into_iter().for_each(|sent| drop(disk.wait(sent).unwrap()));
    assert!(!readable(&queue, 0));
    finish(&driver, device);
    assert!(readable(&queue, 0), "the end can be seen too");
    assert!(queue.next_batch(1).is_none() && queue.next_batch(0).is_none());
}

#[test]
fn a_pull_queue_that_nobody_wants_fails_its_requests() {
    let driver = FakeDriver::new();
    let (target, queues) = pull(Params::new(SIZE, 512), 1).unwrap();
    let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
    drop(queues);
    assert_eq!(driver.disk(device.id()).write(0, &[0; 512]), Err(Errno::EIO));
    finish(&driver, device);
}

#[test]
fn pull_queues_end_when_the_device_does_not_start() {
    let driver = FakeDriver::new();
    driver.refuse_next("START_DEV", Errno::EINVAL);
    let (target, queues) = pull(Params::new(SIZE, 512), 2).unwrap();
    server(&driver, 1).start(target, &options(1, 4)).unwrap_err();
    for queue in queues {
        assert!(queue.next_batch(1).is_none() && queue.next_batch(0).is_none());
    }
}

#[test]
fn an_old_driver_gets_what_it_can_do() {
    let old = Features::NEED_GET_DATA | Features::USER_RECOVERY;
    for (offered, data, batch) in [
        (old, DataMovement::Copy, false),
        (old | Features::USER_COPY, DataMovement::Copy, false),
        (old | Features::USER_COPY | Features::SUPPORT_ZERO_COPY, DataMovement::Register, false),
        (Features::all(), DataMovement::AutoRegister, true),
    ] {
        let file = disk_file();
        let driver = FakeDriver::new();
        driver.offer(offered);
        let target = file_disk(file.path());
        let device = server(&driver, 1).start(target, &options(1, 4)).unwrap();
        assert_eq!((device.data_movement().0, device.is_batched()), (data, batch));
        driver.disk(device.id()).write(0, &[3; 4096]).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[..4096], [3; 4096]);
        finish(&driver, device);
    }
}

/// The timer that gives idle memory back ends while the read is under way, and the end of both is one round of
/// the thread: the read's data has been committed then, but the driver has not copied it yet.
#[test]
fn memory_is_not_given_back_before_the_driver_has_taken_its_data() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![0x5a; SIZE as usize]).unwrap();
    let driver = FakeDriver::new();
    let target = file_disk(file.path());
    let copy = options(1, 1).data(DataMovement::Copy).batch(false);
    let device = server(&driver, 1).start(target, &copy).unwrap();
    let disk = driver.disk(device.id());
    driver.let_memory_go(true);
    driver.delay_files(Duration::from_millis(2300));
    assert_eq!(disk.read(0, 4096).unwrap(), vec![0x5a; 4096]);
    driver.delay_files(Duration::ZERO);
    finish(&driver, device);
}

#[test]
fn threads_of_a_queue_share_a_load_that_does_not_fill_it() {
    let driver = FakeDriver::new();
    let served: Arc<Mutex<HashMap<ThreadId, usize>>> = Arc::default();
    let waiting: Arc<Mutex<Vec<DetachedRequest>>> = Arc::default();
    let counts = served.clone();
    let target = custom(move |request| {
        *counts.lock().unwrap().entry(std::thread::current().id()).or_default() += 1;
        let mut waiting = waiting.lock().unwrap();
        waiting.push(request.detach());
        // All of them are under way at the same time.
        if waiting.len() == 4 {
            waiting.drain(..).for_each(|request| request.complete());
        }
    });
    let device = server(&driver, 2).start(target, &options(1, 32).batch(false).threads_per_queue(2)).unwrap();
    let disk = driver.disk(device.id());
    let sent: Vec<_> = (0..4).map(|i| disk.send(0, i * 4096, 4096, &[]).unwrap()).collect();
    sent.into_iter().for_each(|sent| drop(disk.wait(sent).unwrap()));
    let mut each: Vec<_> = served.lock().unwrap().values().copied().collect();
    each.sort_unstable();
    assert_eq!(each, [2, 2]);
    finish(&driver, device);
}
