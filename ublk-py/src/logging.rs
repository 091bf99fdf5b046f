// SPDX-License-Identifier: MIT OR Apache-2.0

//! The core's log messages, sent to Python's logger `ublk`.

use std::sync::OnceLock;

use log::{Level, LevelFilter, Log, Metadata, Record};
use pyo3::prelude::*;

use crate::interpreter;
use crate::pending::unraisable;
use crate::stdio;

struct ToPython(Py<PyAny>);

/// Starts to forward messages, or adopts a changed level of the logger.
pub(crate) fn follow(py: Python<'_>) -> PyResult<()> {
    static LOGGER: OnceLock<ToPython> = OnceLock::new();
    let logger = py.import("logging")?.call_method1("getLogger", ("ublk",))?;
    let level: i32 = logger.call_method0("getEffectiveLevel")?.extract()?;
    let forward = LOGGER.get_or_init(|| ToPython(logger.unbind()));
    // Fails if a logger is set already: ours, by an earlier call.
    let _ = log::set_logger(forward);
    log::set_max_level(match level {
        ..=10 => LevelFilter::Debug,
        11..=20 => LevelFilter::Info,
        21..=30 => LevelFilter::Warn,
        31..=50 => LevelFilter::Error,
        _ => LevelFilter::Off,
    });
    Ok(())
}

fn number(level: Level) -> i32 {
    match level {
        Level::Error => 40,
        Level::Warn => 30,
        Level::Info => 20,
        Level::Debug | Level::Trace => 10,
    }
}

/// Returns whether the calling thread exists to end a device, which must not wait for handlers of the log.
fn ends_a_device() -> bool {
    std::thread::current().name().is_some_and(|name| matches!(name, "ublk-stop" | "ublk-drop"))
}

impl Log for ToPython {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let logged = interpreter::attach(|py| {
            // Messages may arrive while an exception is set, from an object that it drops.
            let pending = PyErr::take(py);
            let arguments = (number(record.level()), "%s", &text);
            let logged = if ends_a_device() {
                py.import("ublk._log").and_then(|module| module.call_method1("log_in_time", arguments)).map(drop)
            } else {
                self.0.call_method1(py, "log", arguments).map(drop)
            };
            if let Err(error) = logged {
                unraisable(py, error);
            }
            if let Some(pending) = pending {
                pending.restore(py);
            }
        });
        if logged.is_none() {
            // Without an interpreter, messages go to stderr.
            stdio::complain(&text);
        }
    }

    fn flush(&self) {}
}
