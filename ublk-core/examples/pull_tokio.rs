// SPDX-License-Identifier: MIT OR Apache-2.0

//! A disk on which each request takes 10 ms, as over a network, served by tasks of tokio: a hundred of them wait at the
//! same time on one thread.
//!
//!     cargo run --release --package ublk-examples --bin pull_tokio

#![forbid(unsafe_code)]

use std::time::Duration;

use ublk_core::pull::AsyncPullQueue;
use ublk_core::{DetachedRequest, DeviceOptions, Op, Params, Server, pull};

async fn serve(mut request: DetachedRequest) {
    tokio::time::sleep(Duration::from_millis(10)).await;
    let result = match request.op() {
        Op::Read => request.write_data(0, &vec![0; request.len() as usize]),
        _ => Ok(()),
    };
    request.finish(result);
}

async fn serve_all(queue: AsyncPullQueue) -> std::io::Result<()> {
    while let Some(batch) = queue.next_batch(usize::MAX).await? {
        for request in batch {
            tokio::spawn(serve(request));
        }
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (target, mut queues) = pull(Params::new(1 << 30, 512), 1)?;
    let serving = tokio::spawn(serve_all(AsyncPullQueue::new(queues.remove(0))?));
    // Starting waits for the driver, which is no work for this thread.
    let start = move || Server::new()?.start(target, &DeviceOptions::default());
    let device = tokio::task::spawn_blocking(start).await??;
    println!("{}", device.path().display());
    // Until the device is deleted.
    serving.await??;
    tokio::task::spawn_blocking(move || device.stop()).await??;
    Ok(())
}
