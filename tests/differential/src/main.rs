// SPDX-License-Identifier: MIT OR Apache-2.0

//! Runs the same commands, generated from a seed, against whatever ublk driver is loaded, writes down
//! what it did, and compares two such traces.

#[cfg(not(target_os = "linux"))]
compile_error!("ublk is Linux's");

mod agent;
mod compare;
mod machine;
mod pattern;
mod ring;
mod sequence;
mod trace;
mod userdata;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};

use crate::compare::{Explained, compare};
use crate::sequence::{Crew, Sequence};
use crate::trace::{Writer, read};

/// Devices that cannot be removed are a sign that the rest of the run means nothing.
const MOST_STUCK: usize = 3;

/// Compares what two ublk drivers do with the same commands.
#[derive(Debug, Parser)]
#[command(name = "ublk-differential")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Runs sequences against the loaded driver, as root in a throw-away machine.
    Run {
        /// What the sequences are generated from.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Number of the first sequence.
        #[arg(long, default_value_t = 0)]
        first: u64,
        /// How many sequences.
        #[arg(long, default_value_t = 1000)]
        sequences: u64,
        /// The trace.
        #[arg(long)]
        out: PathBuf,
    },
    /// Compares two traces; fails if there is an unexplained difference.
    Compare {
        /// Trace of the first driver.
        first: PathBuf,
        /// Trace of the second driver.
        second: PathBuf,
        /// File of explained differences.
        #[arg(long)]
        explained: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().action {
        Action::Run { seed, first, sequences, out } => run(seed, first, sequences, &out).map(|()| true),
        Action::Compare { first, second, explained } => judge(&first, &second, explained.as_deref()),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ublk-differential: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(seed: u64, first: u64, sequences: u64, out: &std::path::Path) -> Result<()> {
    machine::prepare()?;
    // Conductor and agents take turns; where they share a processor, that is quick.
    agent::stay_on(0);
    let mut crew = Crew::start()?;
    let mut trace = Writer::create(out)?;
    let begin = Instant::now();
    for number in first..first + sequences {
        Sequence::run(seed, number, &mut crew, &mut trace)?;
        if crew.stuck.len() >= MOST_STUCK {
            trace.flush()?;
            bail!("sequence {number}: too many devices are stuck: {:?}", crew.stuck);
        }
        if (number - first + 1).is_multiple_of(100) {
            trace.flush()?;
            let seconds = begin.elapsed().as_secs_f64();
            eprintln!(
                "{} sequences, {} commands, {:.0} per second",
                number - first + 1,
                trace.lines,
                trace.lines as f64 / seconds
            );
        }
    }
    trace.flush()?;
    let seconds = begin.elapsed().as_secs_f64();
    for (name, count, time) in trace.times().into_iter().take(12) {
        println!(
            "{:8.2} s  {:6} x {:5.1} ms  {name}",
            time.as_secs_f64(),
            count,
            time.as_secs_f64() * 1e3 / f64::from(count)
        );
    }
    println!("{} commands in {seconds:.1} s: {:.0} per second", trace.lines, trace.lines as f64 / seconds);
    Ok(())
}

fn judge(first: &std::path::Path, second: &std::path::Path, explained: Option<&std::path::Path>) -> Result<bool> {
    let explained = explained.map_or_else(|| Ok(Explained::default()), Explained::read)?;
    let report = compare(&read(first)?, &read(second)?, &explained);
    for (kind, (count, story)) in &report.unexplained {
        println!("{count} x {kind}\n{story}");
    }
    println!("{} commands in {} sequences agree", report.commands, report.sequences);
    for (reason, count) in &report.explained {
        println!("{count} explained differences: {reason}");
    }
    println!("{} kinds of unexplained differences", report.unexplained.len());
    Ok(report.good())
}
