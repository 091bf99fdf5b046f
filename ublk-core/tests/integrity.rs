// SPDX-License-Identifier: MIT OR Apache-2.0

//! Integrity metadata on the stand-in driver, which keeps none: a request's metadata is the beginning of its data.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use ublk_core::fake::FakeDriver;
use ublk_core::targets::Mem;
use ublk_core::{Errno, Integrity, Params, QueueHandler, QueueInfo, Requests, Result, Target};

mod support;
use support::{SIZE, finish, options, server};

/// `UBLK_IO_OP_WRITE` and `UBLK_IO_F_INTEGRITY`.
const WRITE: u32 = 1;
const INTEGRITY: u32 = 1 << 18;

fn params() -> Params {
    let mut params = Params::new(SIZE, 512);
    params.integrity = Some(Integrity::new(8, 512));
    params
}

type Outcomes = Arc<Mutex<Vec<Vec<std::result::Result<(), Errno>>>>>;

/// Asks for metadata in and beside each request.
#[derive(Debug, Default)]
struct Curious(Outcomes);

impl Target for Curious {
    fn kind(&self) -> &str {
        "curious"
    }

    fn params(&self) -> Params {
        params()
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(CuriousQueue(self.0.clone())))
    }
}

struct CuriousQueue(Outcomes);

impl QueueHandler for CuriousQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        for mut request in requests {
            let mut bytes = [0; 8];
            // Two blocks have 16 bytes.
            let outcomes = [0, 8, 9, 16, 1 << 25, u64::MAX]
                .into_iter()
                .flat_map(|at| [request.read_integrity(at, &mut bytes), request.write_integrity(at, &bytes)]);
            self.0.lock().unwrap().push(outcomes.collect());
            request.complete();
        }
    }
}

#[test]
fn metadata_beyond_the_request_is_out_of_reach() {
    let driver = FakeDriver::new();
    let target = Curious::default();
    let outcomes = target.0.clone();
    let device = server(&driver, 1).start(Arc::new(target), &options(1, 2)).unwrap();
    let disk = driver.disk(device.id());
    for flags in [INTEGRITY, 0] {
        let sent = disk.send(WRITE | flags, 0, 1024, &[7; 1024]).unwrap();
        disk.wait(sent).unwrap();
    }
    let outcomes = std::mem::take(&mut *outcomes.lock().unwrap());
    assert_eq!(outcomes[0][..4], [Ok(()); 4]);
    assert_eq!(outcomes[0][4..], [Err(Errno::EINVAL); 8]);
    assert_eq!(outcomes[1], [Err(Errno::EINVAL); 12], "it has no metadata");
    finish(&driver, device);
}

#[test]
fn readers_beside_a_writer_see_whole_writes() {
    // More than what the RAM disk keeps under one lock.
    const LEN: usize = 512 << 10;
    let driver = FakeDriver::new();
    let target = Arc::new(Mem::with_params(params()).unwrap());
    let device = server(&driver, 2).start(target, &options(2, 4)).unwrap();
    let disk = driver.disk(device.id());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // The stand-in driver chooses the queue by the number of the page.
        for page in [1, 3] {
            let (disk, done) = (&disk, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let bytes = disk.read(page << 12, LEN - (4 << 12)).unwrap();
                    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "a read saw parts of two writes");
                }
            });
        }
        for value in 0..200 {
            disk.write(0, &vec![value; LEN]).unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    finish(&driver, device);
}
