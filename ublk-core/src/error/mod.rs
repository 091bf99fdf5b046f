// SPDX-License-Identifier: MIT OR Apache-2.0

//! Errors of this crate, with the values and the likely cause in the message.

mod parameter;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

pub use self::parameter::Parameter;
use crate::errno::Errno;
use crate::units::{DeviceId, QueueId};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of the control plane, the life cycle or a target's set-up. Failures of single
/// requests are [`Errno`] values and go to the block layer instead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A value is outside its limits. The driver was not asked.
    #[error("{parameter} = {value}: {reason}")]
    InvalidValue {
        /// What the value is for.
        parameter: Parameter,
        /// The value.
        value: String,
        /// Which rule it breaks, with the limits.
        reason: String,
    },

    /// A value cannot be combined with another one. The driver was not asked.
    #[error("{parameter} = {value}: {reason}")]
    Conflict {
        /// What the value is for.
        parameter: Parameter,
        /// The value.
        value: String,
        /// What it cannot be combined with.
        reason: String,
    },

    /// A target does not fit what exists: a disk that it should serve, or files that it should use.
    #[error("{parameter} = {value}: {reason}")]
    Mismatch {
        /// In what they differ.
        parameter: Parameter,
        /// The target's value.
        value: String,
        /// What exists.
        reason: String,
    },

    /// Something was asked for that requires CAP_SYS_ADMIN. The driver was not asked.
    #[error("{parameter} = {value}: needs root (CAP_SYS_ADMIN)")]
    NeedsPrivilege {
        /// What the value is for.
        parameter: Parameter,
        /// The value.
        value: String,
    },

    /// `/dev/ublk-control` does not exist.
    #[error(
        "{} does not exist: the ublk driver is not loaded (try `modprobe ublk_drv`; Linux 6.5 or newer has it if built \
         with CONFIG_BLK_DEV_UBLK)",
        path.display()
    )]
    DriverMissing {
        /// The node that was looked for.
        path: PathBuf,
    },

    /// A file or node could not be opened or used.
    #[error("{operation} {}: {}{}", path.display(), describe(*errno), hint_suffix(hint))]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        errno: Errno,
        /// Likely cause, or empty.
        hint: String,
    },

    /// An io_uring instance could not be made.
    #[error("io_uring set-up: {}{}", describe(*errno), hint_suffix(hint))]
    Ring {
        /// The kernel's answer.
        errno: Errno,
        /// Likely cause, or empty.
        hint: String,
    },

    /// The driver refused a control command.
    #[error("{command}{}: {}{}", on_device(*device), describe(*errno), hint_suffix(hint))]
    Control {
        /// The command's name in the UAPI.
        command: &'static str,
        /// The device it was for, if one existed by then.
        device: Option<DeviceId>,
        /// The driver's answer.
        errno: Errno,
        /// Likely cause, or empty.
        hint: String,
    },

    /// Something did not happen in time.
    #[error("{waiting_for} did not happen within {:.1} s{}", waited.as_secs_f64(), hint_suffix(hint))]
    Timeout {
        /// What was waited for.
        waiting_for: String,
        /// How long.
        waited: Duration,
        /// Likely cause, or empty.
        hint: String,
    },

    /// A queue stopped serving for a reason other than the device being stopped.
    #[error("queue {queue} of device {device}: {reason}")]
    Queue {
        /// The device.
        device: DeviceId,
        /// The queue.
        queue: QueueId,
        /// Why.
        reason: String,
    },

    /// The driver at hand lacks something that was asked for.
    #[error("{feature} is not supported by this driver (needs Linux {since} or newer)")]
    Unsupported {
        /// The feature's name.
        feature: &'static str,
        /// First kernel with it.
        since: &'static str,
    },

    /// This process cannot be what it should be.
    #[error("{operation}: {}{}", describe(*errno), hint_suffix(hint))]
    Process {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        errno: Errno,
        /// Likely cause, or empty.
        hint: String,
    },

    /// The target itself could not be set up.
    #[error("{context}: {source}")]
    Target {
        /// What the target was doing.
        context: String,
        /// Its reason.
        source: io::Error,
    },
}

impl Error {
    /// Returns the corresponding errno, which a C program or a Python `OSError` would report.
    pub fn errno(&self) -> Errno {
        match self {
            Error::InvalidValue { .. } | Error::Conflict { .. } | Error::Mismatch { .. } => Errno::EINVAL,
            Error::NeedsPrivilege { .. } => Errno::EPERM,
            Error::DriverMissing { .. } => Errno::ENOENT,
            Error::File { errno, .. }
            | Error::Ring { errno, .. }
            | Error::Control { errno, .. }
            | Error::Process { errno, .. } => *errno,
            Error::Timeout { .. } => Errno::ETIMEDOUT,
            Error::Queue { .. } => Errno::EIO,
            Error::Unsupported { .. } => Errno::EOPNOTSUPP,
            Error::Target { source, .. } => errno_of(source),
        }
    }

    /// Returns whether the device cannot do what it was asked to, or there is none: nothing has begun. After any other failure
    /// of a command it may yet be carried out.
    pub fn is_refusal(&self) -> bool {
        match self {
            Error::Unsupported { .. } => true,
            Error::Control { errno, .. } => {
                matches!(*errno, Errno::EACCES | Errno::EINVAL | Errno::ENODEV | Errno::EOPNOTSUPP | Errno::EPERM)
            }
            _ => false,
        }
    }

    /// Returns whether the caller's values are wrong: nothing has begun, and the same call will fail again.
    pub fn is_invalid_input(&self) -> bool {
        matches!(
            self,
            Error::InvalidValue { .. } | Error::Conflict { .. } | Error::Mismatch { .. } | Error::NeedsPrivilege { .. }
        )
    }

    pub(crate) fn invalid(parameter: Parameter, value: impl ToString, reason: impl Into<String>) -> Self {
        Error::InvalidValue { parameter, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn conflict(parameter: Parameter, value: impl ToString, reason: impl Into<String>) -> Self {
        Error::Conflict { parameter, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn mismatch(parameter: Parameter, value: impl ToString, reason: impl Into<String>) -> Self {
        Error::Mismatch { parameter, value: value.to_string(), reason: reason.into() }
    }

    pub(crate) fn file(operation: &'static str, path: impl Into<PathBuf>, source: &io::Error) -> Self {
        Error::File { operation, path: path.into(), errno: errno_of(source), hint: String::new() }
    }
}

/// The errno inside an [`io::Error`], as one that is [known](Errno::known). `EIO` if it has none.
pub(crate) fn errno_of(error: &io::Error) -> Errno {
    Errno::from(error).known()
}

/// An errno with its name: `Invalid argument (EINVAL)`.
fn describe(errno: Errno) -> String {
    format!("{} ({errno:?})", errno.desc())
}

fn hint_suffix(hint: &str) -> String {
    if hint.is_empty() { String::new() } else { format!(": {hint}") }
}

fn on_device(device: Option<DeviceId>) -> String {
    device.map_or_else(String::new, |id| format!(" on device {id}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_control_error_names_command_device_errno_and_cause() {
        let error = Error::Control {
            command: "ADD_DEV",
            device: Some(DeviceId(7)),
            errno: Errno::EEXIST,
            hint: "the id is in use".into(),
        };
        assert_eq!(error.to_string(), "ADD_DEV on device 7: File exists (EEXIST): the id is in use");
        assert_eq!(error.errno(), Errno::EEXIST);
    }

    #[test]
    fn wrong_input_is_no_refusal_of_the_driver() {
        let size = Parameter::Size;
        let missing = Error::NeedsPrivilege { parameter: Parameter::Recovery, value: "queue".into() };
        assert_eq!(missing.errno(), Errno::EPERM);
        assert_eq!(missing.to_string(), "recovery = queue: needs root (CAP_SYS_ADMIN)");
        for error in [
            Error::invalid(size, 0, "must be at least one block"),
            Error::conflict(size, 1, "cannot be combined"),
            Error::mismatch(size, 1, "has 2 bytes"),
            missing,
        ] {
            assert!(error.is_invalid_input() && !error.is_refusal(), "{error:?}");
        }
        let refused = Error::Control { command: "ADD_DEV", device: None, errno: Errno::EINVAL, hint: String::new() };
        assert!(!refused.is_invalid_input() && refused.is_refusal());
    }

    #[test]
    fn an_invalid_value_is_einval_and_names_the_value() {
        let error = Error::invalid(Parameter::Depth, 0, "must be from 1 to 4096");
        assert_eq!(error.errno(), Errno::EINVAL);
        assert_eq!(error.to_string(), "queue depth = 0: must be from 1 to 4096");
    }
}
