// SPDX-License-Identifier: MIT OR Apache-2.0

//! Safe code that tries to reach undefined behaviour. What must not compile is in `driver`'s documentation.
//!
//! `tests/run memory` runs this under valgrind.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, mpsc};

use ublk_core::fake::{FakeDisk, FakeDriver};
use ublk_core::{
    Access, DataMovement, DetachedRequest, Device, DeviceOptions, Errno, FilePiece, FileRange, Op, Params, Pieces,
    QueueHandler, QueueInfo, Request, Requests, Result, SharedMemory, Target,
};

mod support;

use support::{SIZE, custom, disk_file, file_disk, finish, options, ram_disk, server, unnamed_file, until_held};

const READ: u32 = 0;
const WRITE: u32 = 1;

/// A device whose clients share memory, the file of that, and its disk.
fn sharing(target: Arc<dyn Target>, way: DeviceOptions) -> (FakeDriver, Device, File, FakeDisk) {
    let driver = FakeDriver::new();
    let device = server(&driver, 1).start(target, &way.shared_memory(true)).unwrap();
    let memory = unnamed_file(8192);
    device.share_memory(SharedMemory::map(&memory, 8192, false).unwrap()).unwrap();
    let disk = driver.disk(device.id());
    (driver, device, memory, disk)
}

#[test]
fn requests_in_one_shared_place_have_memory_of_their_own() {
    let (sender, receiver) = mpsc::channel::<DetachedRequest>();
    let target = custom(move |request: Request<'_>| drop(sender.send(request.detach())));
    let (driver, device, memory, disk) = sharing(target, options(1, 2));
    let sent = [0, 4096].map(|offset| disk.send_shared(READ, offset, 512, (0, 0)).unwrap());
    let (mut a, mut b) = (receiver.recv().unwrap(), receiver.recv().unwrap());
    let (first, second) = (a.data_mut(), b.data_mut());
    assert_ne!(first.as_ptr(), second.as_ptr(), "two exclusive references to the same bytes");
    first.fill(1);
    second.fill(2);
    // The client's memory is its own until the requests end.
    let mut seen = [9; 512];
    memory.read_exact_at(&mut seen, 0).unwrap();
    assert_eq!(seen, [0; 512]);
    a.complete();
    b.complete();
    sent.into_iter().for_each(|sent| drop(disk.wait(sent).unwrap()));
    memory.read_exact_at(&mut seen, 0).unwrap();
    assert!(seen == [1; 512] || seen == [2; 512]);
    finish(&driver, device);
}

#[test]
fn a_client_that_changes_a_write_changes_no_reference() {
    let (sender, receiver) = mpsc::channel::<DetachedRequest>();
    let target = custom(move |request: Request<'_>| drop(sender.send(request.detach())));
    let (driver, device, memory, disk) = sharing(target, options(1, 2));
    memory.write_all_at(&[1; 512], 0).unwrap();
    let sent = disk.send_shared(WRITE, 0, 512, (0, 0)).unwrap();
    let request = receiver.recv().unwrap();
    let data = request.data();
    assert_eq!(data, [1; 512]);
    memory.write_all_at(&[2; 512], 0).unwrap();
    assert_eq!(data, [1; 512]);
    request.complete();
    disk.wait(sent).unwrap();
    finish(&driver, device);
}

/// Fills reads, and remembers writes, by copying.
#[derive(Debug, Clone)]
struct Copying(Arc<Mutex<Vec<u8>>>);

impl Target for Copying {
    fn kind(&self) -> &str {
        "copying"
    }

    fn params(&self) -> Params {
        Params::new(SIZE, 512)
    }

    fn access(&self) -> Access {
        Access::Copies
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(Arc::unwrap_or_clone(self)))
    }
}

impl QueueHandler for Copying {
    fn handle(&mut self, requests: Requests<'_>) {
        for mut request in requests {
            let mut bytes = self.0.lock().unwrap();
            bytes.resize(request.len() as usize, 0);
            let copied = match request.op() {
                Op::Read => request.write_data(0, &bytes),
                _ => request.read_data(0, &mut bytes),
            };
            request.finish(copied);
        }
    }
}

/// Every way in which a target moves shared data, and what it needs.
fn targets() -> Vec<(&'static str, Arc<dyn Target>)> {
    let file = disk_file();
    let changed = Arc::new(unnamed_file(SIZE));
    vec![
        ("bytes", ram_disk()),
        ("copies", Arc::new(Copying(Arc::default()))),
        ("forwards", file_disk(file.path())),
        (
            "forwards a copy",
            custom(move |mut request| {
                // As one does who encrypts.
                request.load().unwrap();
                request.data_mut().iter_mut().for_each(|byte| *byte = !*byte);
                let offset = request.offset();
                request.forward(FileRange::new(&changed, offset));
            }),
        ),
    ]
}

#[test]
fn shared_data_arrives_however_it_moves() {
    for data in [DataMovement::Copy, DataMovement::GetData, DataMovement::UserCopy, DataMovement::AutoRegister] {
        for (what, target) in targets() {
            let way = options(1, 2).data(data).batch(false);
            let (driver, device, memory, disk) = sharing(target, way);
            memory.write_all_at(&[5; 4096], 4096).unwrap();
            disk.wait(disk.send_shared(WRITE, 8192, 4096, (0, 4096)).unwrap()).unwrap();
            let mut seen = [0; 4096];
            memory.read_exact_at(&mut seen, 4096).unwrap();
            assert_eq!(seen, [5; 4096], "{what}, {data:?}: a write changes nothing of its client's");
            disk.wait(disk.send_shared(READ, 8192, 4096, (0, 0)).unwrap()).unwrap();
            memory.read_exact_at(&mut seen, 0).unwrap();
            let expected = if what == "forwards a copy" { [!5; 4096] } else { [5; 4096] };
            assert_eq!(seen, expected, "{what}, {data:?}");
            // The tag's own memory is as it should be.
            disk.write(0, &[6; 4096]).unwrap();
            disk.read(0, 4096).unwrap();
            finish(&driver, device);
        }
    }
}

#[test]
fn a_client_that_shrinks_the_shared_file_fails_its_requests() {
    for (what, target) in targets() {
        let (driver, device, memory, disk) = sharing(target, options(1, 2));
        memory.set_len(0).unwrap();
        for op in [READ, WRITE] {
            let outcome = disk.wait(disk.send_shared(op, 0, 4096, (0, 0)).unwrap());
            assert!(outcome.is_err(), "{what}: {op}");
        }
        disk.write(0, &[6; 4096]).unwrap();
        finish(&driver, device);
    }
}

#[test]
fn a_forwarded_request_keeps_its_file_open() {
    let driver = FakeDriver::new();
    let mut right = unnamed_file(SIZE);
    let lent = Arc::new(Mutex::new(Some(Arc::new(right.try_clone().unwrap()))));
    let theirs = lent.clone();
    let target = custom(move |request| {
        // The last one that has it.
        let file = theirs.lock().unwrap().take().unwrap();
        let pieces = vec![
            FilePiece { file: FileRange::new(&file, 0), len: 512 },
            FilePiece { file: FileRange::new(file, 512), len: 512 },
        ];
        request.forward_pieces(Pieces::from(pieces), Box::new(()) as Box<dyn std::any::Any + Send>);
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    let number = lent.lock().unwrap().as_ref().unwrap().as_raw_fd();
    driver.hold_files(true);
    let disk = driver.disk(device.id());
    let sent = disk.send(WRITE, 0, 1024, &[7; 1024]).unwrap();
    until_held(&driver, 1);
    // Others that would get its number.
    let wrong: Vec<File> = (0..8).map(|_| unnamed_file(0)).collect();
    assert!(wrong.iter().all(|file| file.as_raw_fd() != number));
    driver.hold_files(false);
    disk.wait(sent).unwrap();
    let mut written = vec![0; 1024];
    right.rewind().unwrap();
    right.read_exact(&mut written).unwrap();
    assert_eq!(written, [7; 1024]);
    assert!(wrong.iter().all(|file| file.metadata().unwrap().len() == 0));
    finish(&driver, device);
}

#[test]
fn a_closed_file_cannot_be_named() {
    // What is forwarded to is owned: neither a number nor a borrowed descriptor is one.
    let file = Arc::new(OwnedFd::from(unnamed_file(512)));
    let range = FileRange::new(file.clone(), 0);
    drop(file);
    let mut open = File::from(std::os::fd::AsFd::as_fd(&range.file).try_clone_to_owned().unwrap());
    open.write_all(b"open").unwrap();
}

#[test]
fn integrity_and_data_are_read_within_the_request_only() {
    let driver = FakeDriver::new();
    let target = custom(|mut request| {
        let outside = [
            request.read_data(u64::MAX, &mut [0; 1]),
            request.read_data(513, &mut []),
            request.write_data(512, &[0; 1]),
            request.write_data(u64::MAX - 1, &[0; 4]),
        ];
        request.finish(if outside == [Err(Errno::EINVAL); 4] { Ok(()) } else { Err(Errno::EPROTO) });
    });
    let device = server(&driver, 1).start(target, &options(1, 1)).unwrap();
    driver.disk(device.id()).read(0, 512).unwrap();
    finish(&driver, device);
}
