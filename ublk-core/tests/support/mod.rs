// SPDX-License-Identifier: MIT OR Apache-2.0

//! What tests on the stand-in driver share.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test uses a part of it")]

use std::sync::Arc;

use ublk_core::driver::fake::FakeDriver;
use ublk_core::{
    Device, DeviceOptions, Operations, Params, QueueHandler, QueueInfo, Request, Requests, Result, Server, StdSpawn,
    Target,
};

pub const SIZE: u64 = 1 << 20;

pub fn server(driver: &FakeDriver, threads: usize) -> Server {
    Server::with_driver(Arc::new(driver.clone()), Arc::new(StdSpawn), threads)
}

pub fn options(queues: u32, depth: u32) -> DeviceOptions {
    DeviceOptions::new().queues(queues).depth(depth)
}

/// A target made of a closure that gets each request.
struct Custom<F>(F, Operations);

impl<F> std::fmt::Debug for Custom<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Custom")
    }
}

impl<F: Fn(Request<'_>) + Clone + Send + Sync + 'static> Target for Custom<F> {
    fn kind(&self) -> &str {
        "custom"
    }

    fn params(&self) -> Params {
        let mut params = Params::new(SIZE, 512);
        params.operations = self.1;
        params
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(CustomQueue(self.0.clone())))
    }
}

struct CustomQueue<F>(F);

impl<F: Fn(Request<'_>)> QueueHandler for CustomQueue<F> {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(&self.0);
    }
}

pub fn custom(handler: impl Fn(Request<'_>) + Clone + Send + Sync + 'static) -> Arc<dyn Target> {
    Arc::new(Custom(handler, Operations::all()))
}

/// Stops the device and checks that nothing is left and no rule was broken.
pub fn finish(driver: &FakeDriver, device: Device) {
    device.stop().expect("the device stops");
    drop(device);
    use ublk_core::driver::Driver;
    assert_eq!(driver.device_ids().unwrap(), []);
    assert_eq!(driver.violations(), Vec::<String>::new());
}
