// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks of plain methods, on the stand-in driver.

#![forbid(unsafe_code)]
#![allow(missing_docs)]

mod support;

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use ublk_core::fake::FakeDriver;
use ublk_core::{BlockDevice, Errno, Operations, Params, Target};

use support::{SIZE, finish, options, server};

/// What reached the disk.
#[derive(Clone, Debug, PartialEq)]
enum Call {
    Read(u64, usize),
    Write(u64, usize),
    Flush,
    Discard(u64, u64),
    WriteZeroes(u64, u64, bool),
}

#[derive(Debug, Default)]
struct Recorder {
    calls: Mutex<Vec<Call>>,
    /// The error of the next call.
    error: Mutex<Option<io::Error>>,
}

impl Recorder {
    fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    fn call(&self, call: Call) -> io::Result<()> {
        self.calls.lock().unwrap().push(call);
        self.error.lock().unwrap().take().map_or(Ok(()), Err)
    }
}

impl BlockDevice for Recorder {
    fn params(&self) -> Params {
        Params::new(SIZE, 512).operations(Operations::all())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.call(Call::Read(offset, buffer.len()))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.call(Call::Write(offset, data.len()))
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Call::Flush)
    }

    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.call(Call::Discard(offset, length))
    }

    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        self.call(Call::WriteZeroes(offset, length, may_unmap))
    }
}

#[test]
fn a_disk_is_named_after_its_type() {
    assert_eq!(Recorder::default().kind(), "Recorder");
}

#[test]
fn each_request_calls_one_method() {
    let (driver, recorder) = (FakeDriver::new(), Arc::new(Recorder::default()));
    let device = server(&driver, 1).start(recorder.clone(), &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    recorder.take();
    disk.read(512, 1024).unwrap();
    disk.write(1024, &[1; 512]).unwrap();
    disk.flush().unwrap();
    disk.discard(4096, 8192).unwrap();
    disk.write_zeroes(0, 512).unwrap();
    let expected = [
        Call::Read(512, 1024),
        Call::Write(1024, 512),
        Call::Flush,
        Call::Discard(4096, 8192),
        Call::WriteZeroes(0, 512, true),
    ];
    assert_eq!(recorder.take(), expected);
    finish(&driver, device);
}

#[test]
fn a_durable_write_is_followed_by_a_flush() {
    let (driver, recorder) = (FakeDriver::new(), Arc::new(Recorder::default()));
    let device = server(&driver, 1).start(recorder.clone(), &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    recorder.take();
    disk.write_durably(0, &[1; 512]).unwrap();
    assert_eq!(recorder.take(), [Call::Write(0, 512), Call::Flush]);
    finish(&driver, device);
}

#[test]
fn a_failed_flush_fails_the_durable_write() {
    let (driver, recorder) = (FakeDriver::new(), Arc::new(Recorder::default()));
    let device = server(&driver, 1).start(Arc::new(NoFlush(recorder)), &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[1; 512]).unwrap();
    assert_eq!(disk.write_durably(0, &[1; 512]), Err(Errno::EOPNOTSUPP));
    finish(&driver, device);
}

/// A disk with the default for `flush`, which it should not have advertised.
#[derive(Debug)]
struct NoFlush(Arc<Recorder>);

impl BlockDevice for NoFlush {
    fn params(&self) -> Params {
        BlockDevice::params(&*self.0)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(data, offset)
    }
}

#[test]
fn an_error_of_a_method_fails_its_request() {
    let (driver, recorder) = (FakeDriver::new(), Arc::new(Recorder::default()));
    let device = server(&driver, 1).start(recorder.clone(), &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    for (error, expected) in [
        (io::Error::from_raw_os_error(28), Errno::ENOSPC),
        (io::Error::from_raw_os_error(600), Errno::EIO),
        (io::Error::other("no number"), Errno::EIO),
        (io::ErrorKind::StorageFull.into(), Errno::ENOSPC),
        (io::ErrorKind::TimedOut.into(), Errno::ETIMEDOUT),
        (io::ErrorKind::Unsupported.into(), Errno::EOPNOTSUPP),
        (io::ErrorKind::UnexpectedEof.into(), Errno::EIO),
    ] {
        let text = format!("{error:?}");
        *recorder.error.lock().unwrap() = Some(error);
        assert_eq!(disk.write(0, &[1; 512]), Err(expected), "{text}");
    }
    disk.write(0, &[1; 512]).unwrap();
    finish(&driver, device);
}

#[test]
fn bytes_that_a_read_leaves_are_zeros() {
    let (driver, recorder) = (FakeDriver::new(), Arc::new(Recorder::default()));
    let device = server(&driver, 1).start(recorder, &options(1, 1)).unwrap();
    let disk = driver.disk(device.id());
    disk.write(0, &[7; 4096]).unwrap();
    assert_eq!(disk.read(0, 4096).unwrap(), [0; 4096]);
    finish(&driver, device);
}

/// A disk whose first read says that it has begun, and waits; other reads panic.
#[derive(Debug)]
struct Panicking {
    entered: Sender<()>,
    go: Mutex<Receiver<()>>,
}

impl BlockDevice for Panicking {
    fn params(&self) -> Params {
        Params::new(SIZE, 512).operations(Operations::all())
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
        assert_eq!(offset, 0, "planted");
        self.entered.send(()).unwrap();
        self.go.lock().unwrap().recv().unwrap();
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_method_that_panics_fails_its_request_only() {
    let driver = FakeDriver::new();
    let ((entered, wait), (start, go)) = (channel(), channel());
    let disk = Arc::new(Panicking { entered, go: Mutex::new(go) });
    let device = server(&driver, 1).start(disk, &options(1, 8)).unwrap();
    let client = driver.disk(device.id());
    let first = client.send(0, 0, 512, &[]).unwrap();
    wait.recv().unwrap();
    // These are handled in one round.
    let panicking = client.send(0, 512, 512, &[]).unwrap();
    let write = client.send(1, 4096, 512, &[1; 512]).unwrap();
    start.send(()).unwrap();
    client.wait(first).unwrap();
    assert_eq!(client.wait(panicking), Err(Errno::EIO));
    client.wait(write).unwrap();
    finish(&driver, device);
}
