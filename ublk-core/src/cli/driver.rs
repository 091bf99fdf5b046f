// SPDX-License-Identifier: MIT OR Apache-2.0

//! The kernel's driver, as the commands use it.

use std::sync::Arc;

use crate::control::Control;
use crate::driver::kernel::KernelDriver;
use crate::error::{Error, Result};
use crate::units::DeviceId;

/// Opens the control device of the running kernel.
pub(super) fn control() -> Result<Control> {
    Ok(Control::new(Arc::new(KernelDriver::open()?)))
}

/// Lists the devices of all users.
pub(super) fn device_ids(control: &Control) -> Result<Vec<DeviceId>> {
    control.driver().device_ids().map_err(|e| Error::file("list", "/sys/class/ublk-char", &e))
}
