// SPDX-License-Identifier: MIT OR Apache-2.0

//! Helpers for unit tests on the stand-in driver. Those of integration tests are in `tests/support`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::device::Server;
use crate::driver::fake::FakeDriver;
use crate::target::Target;
use crate::targets::Null;

/// Returns a server with one thread on the stand-in driver.
pub(crate) fn server(driver: &FakeDriver) -> Server {
    Server::with_fake(driver).with_threads(1)
}

/// Returns a disk that completes every request.
pub(crate) fn null_disk() -> Arc<dyn Target> {
    Arc::new(Null::new(1 << 20, 512).unwrap())
}

/// Waits until the condition holds; panics with its description if that takes a minute.
pub(crate) fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < deadline, "still waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
