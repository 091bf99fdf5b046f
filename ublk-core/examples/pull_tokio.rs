// SPDX-License-Identifier: MIT OR Apache-2.0

//! A disk whose every request takes 10 ms, as one across a network would, served by tasks of tokio: a
//! hundred of them wait at the same time on one thread.
//!
//!     cargo run --release --package ublk-examples --bin pull_tokio

use std::time::Duration;

use tokio::io::unix::AsyncFd;
use ublk_core::pull::PullQueue;
use ublk_core::{DetachedRequest, DeviceOptions, Op, Params, Server, pull};

async fn serve(mut request: DetachedRequest) {
    tokio::time::sleep(Duration::from_millis(10)).await;
    let result = match request.op() {
        Op::Read => request.write_data(0, &vec![0; request.len() as usize]),
        _ => Ok(()),
    };
    request.finish(result);
}

async fn take(queue: PullQueue) -> std::io::Result<()> {
    // SAFETY: the descriptor is the queue's own, and open for as long as the queue lives.
    let queue = unsafe { AsyncFd::register(queue)? };
    loop {
        let mut ready = queue.readable().await?;
        match queue.get_ref().next_batch_timeout(usize::MAX, Duration::ZERO) {
            None => return Ok(()),
            Some(batch) if batch.is_empty() => ready.clear_ready(),
            Some(batch) => batch.into_iter().for_each(|request| drop(tokio::spawn(serve(request)))),
        }
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (target, mut queues) = pull(Params::new(1 << 30, 512), 1)?;
    let taking = tokio::spawn(take(queues.remove(0)));
    // Starting waits for the driver, which is no work for this thread.
    let start = move || Server::new()?.start(target, &DeviceOptions::default());
    let device = tokio::task::spawn_blocking(start).await??;
    println!("{}", device.path().display());
    // Until somebody deletes the device.
    taking.await??;
    tokio::task::spawn_blocking(move || device.stop()).await??;
    Ok(())
}
