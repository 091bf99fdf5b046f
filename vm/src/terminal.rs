// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's terminal, handed to a shell in the guest: raw mode and window size.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

static FOLLOWER: Mutex<Option<UnixStream>> = Mutex::new(None);
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Passes every key through, Ctrl-C included, until [`restore`].
pub(crate) fn make_raw() -> Result<()> {
    let stdin = std::io::stdin();
    let before = tcgetattr(&stdin).context("standard input is not a terminal")?;
    let mut raw = before.clone();
    cfmakeraw(&mut raw);
    if let Ok(mut saved) = SAVED.lock() {
        saved.get_or_insert(before);
    }
    tcsetattr(&stdin, SetArg::TCSANOW, &raw).context("cannot put the terminal into raw mode")
}

/// Puts the terminal back as it was, if it was changed.
pub(crate) fn restore() {
    if let Ok(mut saved) = SAVED.lock()
        && let Some(before) = saved.take()
    {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &before);
    }
}

/// Rows and columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    rows: u16,
    columns: u16,
}

/// As stty takes it.
impl std::fmt::Display for Size {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rows {} cols {}", self.rows, self.columns)
    }
}

/// The size of the terminal, if standard input is one.
pub(crate) fn size() -> Option<Size> {
    let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output().ok()?;
    if !output.status.success() {
        return None;
    }
    parse_size(&String::from_utf8_lossy(&output.stdout))
}

/// From now on changes of the size are told to the guest.
pub(crate) fn follow_size(control: UnixStream) {
    if let Ok(mut follower) = FOLLOWER.lock() {
        *follower = Some(control);
    }
}

/// To be called when the size has changed.
pub(crate) fn size_changed() {
    if let Ok(mut follower) = FOLLOWER.lock()
        && let Some(control) = follower.as_mut()
        && let Some(size) = size()
    {
        let _ = writeln!(control, "size {size}");
    }
}

/// A terminal that does not know its size says 0.
fn parse_size(text: &str) -> Option<Size> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Size { rows: next()?, columns: next()? })
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn size_is_rows_then_columns() {
        let shown = |text| parse_size(text).map(|size| size.to_string());
        assert_eq!(shown("24 80\n").as_deref(), Some("rows 24 cols 80"));
        assert_eq!(shown("0 0\n").as_deref(), Some("rows 0 cols 0"));
        assert_eq!(shown(""), None);
        assert_eq!(shown("24"), None);
        assert_eq!(shown("24 x"), None);
    }
}
