// SPDX-License-Identifier: MIT OR Apache-2.0

//! The pull interface for tasks of tokio.

use std::io;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::PullQueue;
use crate::request::DetachedRequest;

/// A [`PullQueue`] whose requests are awaited by tasks of tokio.
///
/// ```no_run
/// use ublk_core::pull::AsyncPullQueue;
/// use ublk_core::{DetachedRequest, Op};
///
/// async fn serve(mut request: DetachedRequest) {
///     tokio::time::sleep(std::time::Duration::from_millis(10)).await; // a round trip
///     let result = match request.op() {
///         Op::Read => request.write_data(0, &vec![0; request.len() as usize]),
///         _ => Ok(()),
///     };
///     request.finish(result);
/// }
///
/// async fn serve_all(queue: AsyncPullQueue) -> std::io::Result<()> {
///     while let Some(batch) = queue.next_batch(usize::MAX).await? {
///         for request in batch {
///             tokio::spawn(serve(request));
///         }
///     }
///     Ok(())
/// }
/// ```
#[derive(Debug)]
pub struct AsyncPullQueue(AsyncFd<PullQueue>);

impl AsyncPullQueue {
    /// Registers a queue with the current runtime.
    ///
    /// # Errors
    ///
    /// Those of `epoll`, after which the queue is dropped.
    ///
    /// # Panics
    ///
    /// Outside a runtime, or in one without I/O.
    pub fn new(queue: PullQueue) -> io::Result<Self> {
        // SAFETY: the queue owns its descriptor and never replaces it, and `AsyncFd` owns the queue.
        let queue = unsafe { AsyncFd::register_with_interest(queue, Interest::READABLE)? };
        Ok(AsyncPullQueue(queue))
    }

    /// Awaits requests and takes all that are there, at most `max`, in the order in which they arrived. Returns `None` once the
    /// device has ended and no more requests will arrive. A `max` of 0 takes none and does not wait.
    ///
    /// If the future is dropped, the requests stay in the queue. Several tasks may wait at the same time.
    ///
    /// # Errors
    ///
    /// If the runtime is shutting down.
    pub async fn next_batch(&self, max: usize) -> io::Result<Option<Vec<DetachedRequest>>> {
        if max == 0 {
            return Ok(self.0.get_ref().next_batch(0));
        }
        loop {
            let mut ready = self.0.readable().await?;
            match self.0.get_ref().next_batch_timeout(max, Duration::ZERO) {
                Some(batch) if batch.is_empty() => ready.clear_ready(),
                batch => return Ok(batch),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::AsyncPullQueue;
    use crate::driver::fake::FakeDriver;
    use crate::pull::tests::start;
    use crate::{Device, Errno, Op};

    const LONG: Duration = Duration::from_secs(60);

    fn start_async(driver: &FakeDriver) -> (Device, AsyncPullQueue) {
        let (device, queue) = start(driver, 64);
        (device, AsyncPullQueue::new(queue).unwrap())
    }

    #[tokio::test]
    async fn tasks_get_requests_until_the_device_ends() {
        let driver = FakeDriver::new();
        let (device, queue) = start_async(&driver);
        let disk = driver.disk(device.id());
        let client = std::thread::spawn(move || {
            let done: Vec<_> = (0..100u64).map(|n| disk.write(n * 512, &[n as u8; 512])).collect();
            device.stop().unwrap();
            done
        });
        let mut served = 0;
        while let Some(batch) = timeout(LONG, queue.next_batch(7)).await.expect("a request or the end").unwrap() {
            for request in batch {
                assert_eq!((request.op(), request.offset()), (Op::Write, served * 512));
                served += 1;
                tokio::task::yield_now().await;
                request.complete();
            }
        }
        assert_eq!(served, 100);
        assert_eq!(client.join().unwrap(), vec![Ok(()); 100]);
    }

    #[tokio::test]
    async fn a_dropped_wait_loses_no_request() {
        let driver = FakeDriver::new();
        let (device, queue) = start_async(&driver);
        assert!(timeout(Duration::ZERO, queue.next_batch(1)).await.is_err());
        let disk = driver.disk(device.id());
        let client = std::thread::spawn(move || disk.write(0, &[1; 512]));
        let mut batch = timeout(LONG, queue.next_batch(1)).await.expect("a request").unwrap().unwrap();
        batch.remove(0).fail(Errno::ENOSPC);
        assert_eq!(client.join().unwrap(), Err(Errno::ENOSPC));
        assert!(queue.next_batch(0).await.unwrap().is_some_and(|batch| batch.is_empty()));
        tokio::task::spawn_blocking(move || device.stop()).await.unwrap().unwrap();
        assert!(timeout(LONG, queue.next_batch(1)).await.expect("the end").unwrap().is_none());
    }
}
