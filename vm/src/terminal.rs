// SPDX-License-Identifier: MIT OR Apache-2.0

//! The host's terminal, handed to a shell in the guest: raw mode and window size.

use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

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

/// Rows and columns, if standard input is a terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let output = Command::new("stty").arg("size").stdin(Stdio::inherit()).stderr(Stdio::null()).output().ok()?;
    parse_size(&String::from_utf8_lossy(&output.stdout))
}

fn parse_size(text: &str) -> Option<(u16, u16)> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let size = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    (size.0 > 0 && size.1 > 0).then_some(size)
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn size_is_rows_then_columns() {
        assert_eq!(parse_size("24 80\n"), Some((24, 80)));
        assert_eq!(parse_size("0 0\n"), None);
        assert_eq!(parse_size(""), None);
        assert_eq!(parse_size("24"), None);
    }
}
