// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk stat` for the devices of this process.

use std::sync::{Mutex, MutexGuard, PoisonError};

use ublk_core::cli::StatsService;
use ublk_core::{Device, DeviceId};

use crate::interpreter;

/// The service, and the generation of the process that created it.
static SERVICE: Mutex<Option<(usize, StatsService)>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<(usize, StatsService)>> {
    let mut service = SERVICE.lock().unwrap_or_else(PoisonError::into_inner);
    if service.as_ref().is_some_and(|(generation, _)| *generation != interpreter::generation()) {
        // The copy in a forked child: the socket and the thread are the parent's.
        std::mem::forget(service.take());
    }
    service
}

/// Starts to answer for a device. Not to be called attached.
pub(crate) fn publish(device: &Device) {
    let mut service = lock();
    if service.is_none() {
        match StatsService::start() {
            Ok(made) => *service = Some((interpreter::generation(), made)),
            Err(error) => return log::debug!("`ublk stat` is not available: {error}"),
        }
    }
    if let Some((_, service)) = service.as_ref() {
        service.add(device.stats_handle());
    }
}

/// Stops answering for a device, and ends the service after the last one. Not to be called attached.
pub(crate) fn withdraw(id: DeviceId) {
    let mut service = lock();
    if service.as_ref().is_some_and(|(_, service)| service.remove(id)) {
        *service = None;
    }
}
