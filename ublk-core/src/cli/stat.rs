// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk stat`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use super::failure::{Failure, Outcome};
use super::output::print;
use super::stats::{Report, query};
use crate::control::Control;
use crate::stats::OpStats;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// Print the activity of each interval until Ctrl-C or deletion of the device
    #[arg(short, long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    watch: Option<Duration>,
    /// Print JSON; with --watch, one line with all counters per interval
    #[arg(long)]
    json: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.1..=86_400.0).contains(&number) {
        Ok(Duration::from_secs_f64(number))
    } else {
        Err("must be from 0.1 to 86400 seconds".into())
    }
}

pub(super) fn run(args: &Args) -> Outcome {
    let control = Control::open()?;
    let id = DeviceId(args.id);
    let mut before = (Instant::now(), report(&control, id)?);
    let Some(interval) = args.watch else {
        return print(&if args.json { json(&before.1, true)? } else { table(&before.1.total, None) });
    };
    loop {
        thread::sleep(interval);
        let now = match report(&control, id) {
            Ok(report) => (Instant::now(), report),
            Err(Failure::Error(error)) if error.errno() == crate::Errno::ENODEV => return Ok(()),
            Err(failure) => return Err(failure),
        };
        let text = if args.json {
            json(&now.1, false)?
        } else {
            table(&now.1.total, Some((&before.1.total, now.0 - before.0)))
        };
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => {}
            // The reader needs no more.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => return Ok(()),
            Err(e) => return Err(Failure::Text(format!("standard output: {e}"))),
        }
        before = now;
    }
}

fn report(control: &Control, id: DeviceId) -> Result<Report, Failure> {
    let info = control.info(id)?;
    match u32::try_from(info.pid) {
        Ok(pid) if pid > 0 => query(pid, id),
        _ => Err(Failure::Text(format!("device {id} has no server: it is {}", info.state.name()))),
    }
}

fn json(report: &Report, pretty: bool) -> Result<String, Failure> {
    let text = if pretty { serde_json::to_string_pretty(report) } else { serde_json::to_string(report) };
    text.map(|text| text + "\n").map_err(|e| Failure::Text(format!("writing JSON: {e}")))
}

/// Formats counters as a table, or as rates since earlier counters.
fn table(now: &BTreeMap<String, OpStats>, before: Option<(&BTreeMap<String, OpStats>, Duration)>) -> String {
    let mut text = String::new();
    let per = if before.is_some() { ["requests/s", "MiB/s"] } else { ["requests", "MiB"] };
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{:<14} {:>12} {:>10} {:>8} {:>10} {:>10} {:>10} {:>10}",
        "operation", per[0], per[1], "errors", "p50", "p99", "p99.9", "max"
    );
    let nothing = OpStats::default();
    for (op, stats) in now {
        let stats = stats.since(before.and_then(|(before, _)| before.get(op)).unwrap_or(&nothing));
        let seconds = before.map_or(1.0, |(_, interval)| interval.as_secs_f64());
        let latency = &stats.latency_ns;
        let _ = writeln!(
            text,
            "{op:<14} {:>12.0} {:>10.1} {:>8} {:>10} {:>10} {:>10} {:>10}",
            stats.requests as f64 / seconds,
            stats.bytes as f64 / seconds / f64::from(1 << 20),
            stats.errors,
            time(latency.p50),
            time(latency.p99),
            time(latency.p99_9),
            time(latency.max)
        );
    }
    text
}

/// Formats a time with three digits.
fn time(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    let (value, unit) = match nanoseconds {
        0..1_000 => (value, "ns"),
        1_000..1_000_000 => (value / 1e3, "us"),
        1_000_000..1_000_000_000 => (value / 1e6, "ms"),
        _ => (value / 1e9, "s"),
    };
    let digits = if unit == "ns" || value >= 100.0 {
        0
    } else if value >= 10.0 {
        1
    } else {
        2
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        for (nanoseconds, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_234, "1.23 us"),
            (45_678, "45.7 us"),
            (123_456_789, "123 ms"),
            (2_000_000_000, "2.00 s"),
        ] {
            assert_eq!(time(nanoseconds), text);
        }
    }

    #[test]
    fn a_watch_shows_rates_since_the_last_report() {
        let stats =
            |requests, bytes| BTreeMap::from([("read".to_owned(), OpStats { requests, bytes, ..OpStats::default() })]);
        let text = table(&stats(300, 3 << 20), Some((&stats(100, 1 << 20), Duration::from_secs(2))));
        let line = text.lines().nth(1).unwrap();
        assert_eq!(line.split_whitespace().take(3).collect::<Vec<_>>(), ["read", "100", "1.0"]);
    }

    #[test]
    fn intervals_have_bounds() {
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for bad in ["0", "-1", "x", "1e9", "nan"] {
            assert!(seconds(bad).is_err(), "{bad}");
        }
    }
}
