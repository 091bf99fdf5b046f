// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk stat` for the devices of this process.

use ublk_core::cli::StatsService;
use ublk_core::{Device, DeviceId, PerProcess};

/// The service while there are devices. The socket and the thread are those of one process.
static SERVICE: PerProcess<Option<StatsService>> = PerProcess::new();

/// Starts to answer for a device. Not to be called attached.
pub(crate) fn publish(device: &Device) {
    let mut service = SERVICE.lock();
    if service.is_none() {
        match StatsService::start() {
            Ok(made) => *service = Some(made),
            Err(error) => return log::debug!("`ublk stat` is not available: {error}"),
        }
    }
    if let Some(service) = service.as_ref() {
        service.add(device.stats_handle());
    }
}

/// Stops answering for a device, and ends the service after the last one. Not to be called attached.
pub(crate) fn withdraw(id: DeviceId) {
    let mut service = SERVICE.lock();
    if service.as_ref().is_some_and(|service| service.remove(id)) {
        *service = None;
    }
}
