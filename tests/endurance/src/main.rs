// SPDX-License-Identifier: MIT OR Apache-2.0

//! Kills a ublk server again and again while fio works on its disk, and sees to it that nothing that was
//! acknowledged is lost, that nothing hangs, and that nothing is left.

#[cfg(not(target_os = "linux"))]
compile_error!("ublk is Linux's");

mod control;
mod load;
mod machine;
mod mode;
mod process;
mod report;
mod ring;
mod round;
mod server;
mod store;
mod waiting;
mod witness;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Error, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::control::Control;
use crate::mode::{Recovery, Setup, schedule};
use crate::report::{Report, Tally};
use crate::round::Rounds;
use crate::server::{Begin, End, Serve};
use ublk_test_common::random::Random;

/// Kills ublk servers under load. For a machine that can be thrown away.
#[derive(Debug, Parser)]
#[command(name = "ublk-endurance")]
struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// The test.
    Run(Options),
    /// One server; part of the test.
    Serve(Serve),
    /// Sends what makes a device LIVE; part of the test.
    Begin {
        /// The command.
        #[arg(value_enum)]
        command: Begin,
        /// Number of the device.
        #[arg(long)]
        device: u32,
        /// Process of its server.
        #[arg(long)]
        server: u32,
    },
    /// Sends what takes a disk away; part of the test.
    End {
        /// The command.
        #[arg(value_enum)]
        command: End,
        /// Number of the device.
        #[arg(long)]
        device: u32,
    },
}

/// The test.
#[derive(Debug, Args)]
struct Options {
    /// What all choices are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Servers to kill, for each way of recovery.
    #[arg(long, default_value_t = 200)]
    rounds: u32,
    /// Ways of recovery; may be given again [default: all].
    #[arg(long = "recovery", value_enum)]
    recoveries: Vec<Recovery>,
    /// Has the servers lose writes now and then, to see whether the test notices.
    #[arg(long)]
    lose_writes: bool,
}

/// What all parts of the test share.
#[derive(Debug)]
struct Test<'a> {
    options: &'a Options,
    features: u64,
    /// For files that outlive servers.
    directory: PathBuf,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().action {
        Action::Run(options) => run(&options),
        Action::Serve(options) => server::serve(&options).map(|()| true),
        Action::Begin { command, device, server } => server::begin(command, device, server).map(|()| true),
        Action::End { command, device } => server::end(command, device).map(|()| true),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("ublk-endurance: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let recoveries = if options.recoveries.is_empty() { Recovery::value_variants() } else { &options.recoveries };
    let features = Control::open()?.features().context("GET_FEATURES")?;
    let directory = std::env::temp_dir().join(format!("ublk-endurance-{}", std::process::id()));
    std::fs::create_dir(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let test = Test { options, features, directory };
    let mut tallies = Vec::new();
    for &recovery in recoveries {
        let mut tally = Tally::new(recovery);
        let usable = test.mode(&mut tally);
        println!("{tally}");
        for failure in &tally.failures {
            println!("    {failure}");
        }
        tallies.push(tally);
        test.write(&tallies)?;
        if !usable {
            println!("what is left of this machine is of no use");
            break;
        }
    }
    std::fs::remove_dir_all(&test.directory).context("cannot remove the files")?;
    Ok(good(&tallies) && tallies.len() == recoveries.len())
}

fn good(tallies: &[Tally]) -> bool {
    tallies.iter().all(|tally| tally.failures.is_empty())
}

/// Why a setup failed.
#[derive(Debug)]
struct Failure {
    why: Error,
    /// Why the machine cannot be used any more.
    stuck: Option<Error>,
}

impl Test<'_> {
    fn write(&self, tallies: &[Tally]) -> Result<()> {
        let Some(results) = machine::results() else { return Ok(()) };
        let variable = |name| std::env::var(name).ok();
        let report = Report {
            seed: self.options.seed,
            kernel: variable("UBLK_KERNEL"),
            driver: variable("UBLK_DRIVER"),
            features: self.features,
            good: good(tallies),
            modes: tallies,
        };
        let text = serde_json::to_string_pretty(&report)?;
        std::fs::write(results.join("endurance.json"), text).context("cannot write the results")
    }

    /// All rounds of one way of recovery. False if the machine cannot be used any more.
    fn mode(&self, tally: &mut Tally) -> bool {
        let begin = Instant::now();
        let mut random = Random::new(self.options.seed, tally.recovery as u64);
        let schedule = schedule(tally.recovery, self.features, self.options.rounds, &mut random);
        if schedule.is_empty() {
            tally.skipped = Some("this driver cannot do it".to_owned());
            return true;
        }
        for (at, (setup, count)) in schedule.into_iter().enumerate() {
            let random = Random::new(random.next(), 0);
            if let Err(failure) = self.segment(setup, count, random, tally, at) {
                tally.failures.push(format!("{setup}: {:#}", failure.why));
                if let Some(stuck) = failure.stuck {
                    tally.failures.push(format!("{setup}: what is left cannot be removed: {stuck:#}"));
                    return false;
                }
            }
        }
        let reloaded = machine::reload_module();
        if let Err(error) = &reloaded {
            tally.failures.push(format!("{error:#}"));
        }
        tally.seconds = begin.elapsed().as_secs();
        reloaded.is_ok()
    }

    /// Rounds of one setup, and a look at what they leave.
    fn segment(
        &self,
        setup: Setup,
        count: u32,
        random: Random,
        tally: &mut Tally,
        at: usize,
    ) -> std::result::Result<(), Failure> {
        let broken = |why| Failure { why, stuck: None };
        eprintln!("{setup}: {count} rounds");
        tally.setups.push(setup.to_string());
        let mut control = Control::open().map_err(|error| broken(error.into()))?;
        let rounds = Rounds::new(&mut control, self.features, setup, random, &self.directory, tally);
        let mut rounds = rounds.map_err(broken)?;
        rounds.lose_writes = self.options.lose_writes;
        let Err(why) = rounds.run(count).and_then(|()| clean()) else { return Ok(()) };
        eprintln!("{setup}: {why:#}");
        if let Err(error) = machine::show_blocked_tasks(&format!("failure-{}-{at}", setup.recovery.name())) {
            eprintln!("the kernel's log: {error:#}");
        }
        Err(Failure { why, stuck: rounds.clean_up().and_then(|()| clean()).err() })
    }
}

/// Nothing is left of any device, and nothing hangs.
fn clean() -> Result<()> {
    machine::no_devices()?;
    machine::no_hung_task()
}
