// SPDX-License-Identifier: MIT OR Apache-2.0

//! Waits, all of which end.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything may take. An emulated machine on a busy host is slow; what hangs, hangs for longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Time between two looks at a condition without a notification.
const PAUSE: Duration = Duration::from_millis(2);

/// Looks until there is an answer; how long it took goes with it.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Result<Option<T>>) -> Result<(T, Duration)> {
    let begin = Instant::now();
    loop {
        if let Some(answer) = look()? {
            return Ok((answer, begin.elapsed()));
        }
        if begin.elapsed() > PATIENCE {
            bail!("{what}: not within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(PAUSE);
    }
}
