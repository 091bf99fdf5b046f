// SPDX-License-Identifier: MIT OR Apache-2.0

//! A RAM disk whose requests are served by a pool of threads, in any order: the pull interface.
//!
//!     cargo run --release --package ublk-examples --bin pull_threads

use std::sync::{Arc, RwLock};

use ublk_core::{DetachedRequest, DeviceOptions, Errno, Op, Params, Server, pull};

const SIZE: u64 = 256 << 20;

fn serve(disk: &RwLock<Vec<u8>>, request: &mut DetachedRequest) -> Result<(), Errno> {
    let range = request.offset() as usize..(request.offset() + request.len()) as usize;
    match request.op() {
        Op::Read => request.write_data(0, &disk.read().unwrap()[range]),
        Op::Write => request.read_data(0, &mut disk.write().unwrap()[range]),
        _ => Err(Errno::EOPNOTSUPP),
    }
}

fn main() -> ublk_core::Result<()> {
    let disk = Arc::new(RwLock::new(vec![0; SIZE as usize]));
    let (target, queues) = pull(Params::new(SIZE, 512), 1)?;
    for queue in queues.into_iter().map(Arc::new) {
        for _ in 0..4 {
            let (queue, disk) = (queue.clone(), disk.clone());
            std::thread::spawn(move || {
                while let Some(batch) = queue.next_batch(8) {
                    for mut request in batch {
                        let result = serve(&disk, &mut request);
                        request.finish(result);
                    }
                }
            });
        }
    }
    let device = Server::new()?.start(target, &DeviceOptions::default())?;
    println!("{}", device.path().display());
    device.wait(None);
    device.stop()
}
