// SPDX-License-Identifier: MIT OR Apache-2.0

//! Which [`Device`](super::Device) of this process serves a device of the driver, which knows no more than the process.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::fork::{Maker, PerProcess};

/// The latest server of each device of this process, by the device's [instance](crate::driver::Driver::instance).
static LATEST: PerProcess<BTreeMap<u64, u64>> = PerProcess::new();
static SERVERS: AtomicU64 = AtomicU64::new(0);

/// One server of a device.
#[derive(Debug)]
pub(super) struct Serving {
    /// `None` if the driver's instance is not known.
    pub(super) instance: Option<u64>,
    number: u64,
    maker: Maker,
}

impl Serving {
    /// A server of a device that has none, or whose last one is gone.
    pub(super) fn begin(instance: Option<u64>) -> Self {
        let number = SERVERS.fetch_add(1, Ordering::Relaxed);
        if let Some(instance) = instance {
            LATEST.lock().insert(instance, number);
        }
        Serving { instance, number, maker: Maker::here() }
    }

    /// Whether this process has had another server of the device since.
    pub(super) fn is_followed(&self) -> bool {
        self.instance.is_some_and(|instance| LATEST.lock().get(&instance) != Some(&self.number))
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // The copy in a forked child is no server.
        if self.maker.is_here()
            && let Some(instance) = self.instance
            && !self.is_followed()
        {
            LATEST.lock().remove(&instance);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_followed_by_a_later_one_of_the_same_device() {
        let first = Serving::begin(Some(u64::MAX));
        let other = Serving::begin(Some(u64::MAX - 1));
        assert!(!first.is_followed() && !other.is_followed());
        let second = Serving::begin(Some(u64::MAX));
        assert!(first.is_followed() && !second.is_followed() && !other.is_followed());
        drop(second);
        assert!(first.is_followed(), "also when that one is gone");
        drop(first);
        assert!(!LATEST.lock().contains_key(&u64::MAX));
    }
}
