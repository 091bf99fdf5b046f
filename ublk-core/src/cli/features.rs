// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk features`.

use std::fmt::Write;

use super::failure::{Failure, Outcome};
use super::output::print;
use crate::control::Control;
use crate::uapi::Features;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Outcome {
    let features = Control::open()?.features()?;
    let text = if args.json { json(features)? } else { table(features) };
    print(&text)
}

fn table(features: Features) -> String {
    let mut text = format!("{:<24} {:<5} {}\n", "feature", "here", "since");
    // Writing to a string does not fail.
    for flag in Features::all() {
        let (name, here) = (flag.name().unwrap_or("?"), if features.contains(flag) { "yes" } else { "no" });
        let _ = writeln!(text, "{name:<24} {here:<5} {}", flag.since().unwrap_or("?"));
    }
    for bit in unknown(features) {
        let _ = writeln!(text, "{:<24} yes   newer than this program", format!("bit {bit}"));
    }
    text
}

fn json(features: Features) -> Result<String, Failure> {
    let mut map = serde_json::Map::new();
    for flag in Features::all() {
        let value = serde_json::json!({ "here": features.contains(flag), "since": flag.since() });
        map.insert(flag.name().unwrap_or("?").to_owned(), value);
    }
    for bit in unknown(features) {
        map.insert(format!("bit {bit}"), serde_json::json!({ "here": true, "since": null }));
    }
    let mut text = serde_json::to_string_pretty(&map).map_err(|e| Failure::Text(format!("writing JSON: {e}")))?;
    text.push('\n');
    Ok(text)
}

/// Returns the numbers of feature bits that the driver has and this program does not know.
fn unknown(features: Features) -> impl Iterator<Item = u32> {
    let rest = features.bits() & !Features::all().bits();
    (0..64).filter(move |bit| rest & (1 << bit) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_are_shown_by_number() {
        let text = table(Features::from_bits_retain(1 << 40) | Features::ZONED);
        assert!(text.lines().any(|l| l.starts_with("bit 40")), "{text}");
        assert!(text.lines().any(|l| l.starts_with("ZONED") && l.contains("yes")), "{text}");
        assert!(text.lines().any(|l| l.starts_with("BATCH_IO") && l.contains("no") && l.contains("7.0")), "{text}");
    }
}
