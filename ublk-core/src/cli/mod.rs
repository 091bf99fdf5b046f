// SPDX-License-Identifier: MIT OR Apache-2.0

//! The `ublk` command.
//!
//! It is a library function, so that the Python package's `ublk` is the same program.

mod add;
mod claim;
mod daemon;
mod del;
mod features;
mod holders;
mod limits;
mod list;
mod owner;
mod quiesce;
mod recover;
mod resize;
mod run_dir;
mod serve;
mod shape;
mod size;
mod stat;
mod state;
mod station;
mod stats_service;
mod stuck;
mod target;
mod upgrade;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::stats_service::StatsService;
use crate::control::Control;
use crate::driver::kernel::KernelDriver;
use crate::error::{Error, Result};

/// Create and manage block devices served by user-space processes (Linux ublk).
#[derive(Debug, Parser)]
#[command(name = "ublk", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a device, serve it, and print its path when it is ready
    Add(Box<add::Args>),
    /// Stop and remove devices
    Del(del::Args),
    /// Serve a device whose server has exited, and print its path when it is ready
    Recover(recover::Args),
    /// Hand a device over to a new server while it is in use
    Upgrade(upgrade::Args),
    /// Stop the server and hold I/O until another one recovers the device
    Quiesce(quiesce::Args),
    /// Change the size of a disk while it is in use
    Resize(resize::Args),
    /// List devices
    List(list::Args),
    /// Show I/O statistics of a device
    Stat(stat::Args),
    /// Show the features that the driver supports
    Features(features::Args),
    /// Print the owner of a device, for udev rules
    #[command(hide = true)]
    Owner(owner::Args),
}

/// The program that the command is part of.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// How to start it again, to run a server in the background: the program and the arguments that
    /// come before the command's own.
    pub relaunch: Vec<OsString>,
    /// Commands that it handles itself, for the help text.
    pub extra: Vec<Extension>,
}

/// A command that is not this crate's.
#[derive(Clone, Debug)]
pub struct Extension {
    /// Its name.
    pub name: String,
    /// What it does, in a line.
    pub about: String,
}

/// The whole program, on this process's arguments.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "ublk".into());
    let program = std::env::current_exe().map_or(name, OsString::from);
    let mut logger = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"));
    logger.format(|out, record| writeln!(out, "ublk: {}: {}", record.level().as_str().to_lowercase(), record.args()));
    logger.init();
    ExitCode::from(run(arguments.collect(), &Host { relaunch: vec![program], extra: vec![] }))
}

/// Runs the command with the given arguments (without a program name) and returns its exit status: 0,
/// 1 for a failure, 2 for wrong usage.
pub fn run(arguments: Vec<OsString>, host: &Host) -> u8 {
    if arguments.first().is_some_and(|first| first == "run") && !host.extra.iter().any(|extra| extra.name == "run") {
        eprintln!(
            "ublk: `run` serves disks written in Python; it is part of the Python package: `python3 -m ublk run`"
        );
        return 2;
    }
    let named = std::iter::once(OsString::from("ublk")).chain(arguments.iter().cloned());
    let parsed = with_extra(host).try_get_matches_from(named).and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are "errors" for standard output with status 0.
            let _ = error.print();
            return error.exit_code() as u8;
        }
    };
    let result = match cli.command {
        Command::Add(args) => add::run(&args, &arguments, host),
        Command::Del(args) => del::run(&args),
        Command::Recover(args) => recover::run(&args, &arguments, host),
        Command::Upgrade(args) => upgrade::run(&args, host),
        Command::Quiesce(args) => quiesce::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::List(args) => list::run(&args),
        Command::Stat(args) => stat::run(&args),
        Command::Features(args) => features::run(&args),
        Command::Owner(args) => owner::run(&args),
    };
    match result {
        Ok(()) => 0,
        Err(Failure::Reported) => 1,
        Err(Failure::Error(error)) => {
            eprintln!("ublk: {error}");
            1
        }
        Err(Failure::Text(text)) => {
            eprintln!("ublk: {text}");
            1
        }
    }
}

/// The command line, with the commands that the host handles.
fn with_extra(host: &Host) -> clap::Command {
    host.extra.iter().cloned().fold(Cli::command(), |command, Extension { name, about }| {
        command.subcommand(clap::Command::new(name).about(about))
    })
}

/// Why a command failed.
#[derive(Debug)]
enum Failure {
    /// Said already.
    Reported,
    Error(Error),
    Text(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

type Outcome = std::result::Result<(), Failure>;

/// The control plane of the running kernel.
fn control() -> Result<Control> {
    Ok(Control::new(Arc::new(KernelDriver::open()?)))
}

/// Writes to standard output.
fn print(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    printed(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Outcome of a write to standard output. A reader that has gone away wants no more: that is no failure.
fn printed(written: std::io::Result<()>) -> Outcome {
    match written {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Failure::Text(format!("standard output: {e}"))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_hosts_own_commands_are_in_the_help() {
        let mut command = with_extra(&Host {
            relaunch: vec![],
            extra: vec![Extension { name: "knit".into(), about: "Make a pullover".into() }],
        });
        assert!(command.render_help().to_string().contains("Make a pullover"));
    }

    #[test]
    fn wrong_usage_is_status_2() {
        assert_eq!(run(vec!["frobnicate".into()], &Host::default()), 2);
        assert_eq!(run(vec!["del".into()], &Host::default()), 2);
        assert_eq!(run(vec!["run".into(), "disk.py:Disk".into()], &Host::default()), 2);
    }
}
