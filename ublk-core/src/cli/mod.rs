// SPDX-License-Identifier: MIT OR Apache-2.0

//! The `ublk` command.
//!
//! It is a library function, so that the Python package contains the same command. `add`, `bench`, `completions`, `del`,
//! `features`, `list`, `man`, `owner`, `quiesce`, `recover`, `resize`, `stat` and `upgrade` are the commands. They use:
//!
//! * `target`: the kinds of disk of `ublk add`, with their options and constructors.
//! * `server`: serves devices to their end; `background` starts it as a process of its own.
//! * `state_file`: what the next server of a device needs; `backing_files`: whether the files of its disk are the same;
//!   `run_dir`: the directory for state files.
//! * `stats`: the socket through which servers answer `ublk stat`.
//! * `usage`: how a disk is used; `force_stop`: stops a device whose server does not complete its requests.
//! * `failure`, `host`, `instance`, `output`, `size`: small things that several commands need.

mod add;
mod background;
mod backing_files;
mod bench;
mod completions;
mod del;
mod failure;
mod features;
mod force_stop;
mod host;
mod instance;
mod limits;
mod list;
mod man;
mod output;
mod owner;
mod quiesce;
mod recover;
mod resize;
mod run_dir;
mod server;
mod size;
mod stat;
mod state_file;
mod stats;
mod target;
mod upgrade;
mod usage;

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

pub use self::host::{BenchDisk, ExtraArgument, ExtraCommand, Host};
pub use self::stats::StatsService;

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
    ///
    /// The server runs in the background. Errors before the device is ready are printed, later ones are written to the log
    /// file.
    Add(Box<add::Args>),
    /// Stop and remove devices
    ///
    /// A disk that is mounted, used as swap, part of another block device (LVM, RAID) or opened exclusively is not removed. At
    /// a terminal, neither is a disk that a process has open, and the message names the process. In scripts, such a disk is
    /// removed, as the reference tool does, and its users get I/O errors; --unused refuses it there, too.
    ///
    /// --force removes any disk. After 20 seconds it kills a server that does not complete its requests, unless the server
    /// also serves other disks in use that the same command does not remove. A server that waits for its own disk cannot be
    /// killed: this project's driver aborts its requests; with Linux's own driver, the process and the device stay until the
    /// next reboot.
    Del(del::Args),
    /// Serve a device whose server has exited, and print its path when it is ready
    Recover(recover::Args),
    /// Hand a device over to a new server while it is in use
    ///
    /// The new server takes over while the disk is mounted and busy, without a failed request. Needs Linux 6.16 or
    /// this project's driver.
    Upgrade(upgrade::Args),
    /// Stop the server and hold I/O until another one recovers the device
    ///
    /// If the server does not complete its requests within a minute, because it is stopped, for example, it leaves when it
    /// can, and the command reports that this is pending. Needs Linux 6.16 or this project's driver.
    Quiesce(quiesce::Args),
    /// Change the size of a disk while it is in use (Linux 6.16, or this project's driver)
    Resize(resize::Args),
    /// List devices
    List(list::Args),
    /// Show I/O statistics of a device
    Stat(stat::Args),
    /// Measure the speed of disks on this machine
    ///
    /// Without a DISK, disks of this project are created, measured and removed, and with them what else the machine has to
    /// compare: null_blk, brd, a loop device, kublk and rublk. No module is loaded, and no setting changed.
    ///
    /// Disks that existed before are only read, also while they are in use, unless --write is given. Each job runs for a
    /// warm-up and some windows; the figures are the medians of the windows.
    Bench(bench::Args),
    /// Show the features that the driver supports
    Features(features::Args),
    /// Print a completion script for a shell
    Completions(completions::Args),
    /// Write the man pages to a directory
    Man(man::Args),
    /// Print the owner of a device, for udev rules
    #[command(hide = true)]
    Owner(owner::Args),
}

/// Runs the `ublk` binary with this process's arguments.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_else(|| "ublk".into());
    let program = std::env::current_exe().map_or(name, OsString::from);
    let mut logger = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn"));
    logger.format(|out, record| writeln!(out, "ublk: {}: {}", record.level().as_str().to_lowercase(), record.args()));
    logger.init();
    ExitCode::from(run(arguments.collect(), &Host { relaunch: vec![program], ..Host::default() }))
}

/// Runs the command with the given arguments (without a program name) and returns its exit status: 0,
/// 1 for a failure, 2 for wrong usage.
pub fn run(arguments: Vec<OsString>, host: &Host) -> u8 {
    if arguments.first().is_some_and(|first| first == "run") && !host.handles("run") {
        eprintln!(
            "ublk: `run` serves disks written in Python; it is part of the Python package: `python3 -m ublk run`"
        );
        return 2;
    }
    let named = std::iter::once(OsString::from("ublk")).chain(arguments.iter().cloned());
    let parsed = command_line(host).try_get_matches_from(named).and_then(|matches| Cli::from_arg_matches(&matches));
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
        Command::Bench(args) => bench::run(&args, host),
        Command::Features(args) => features::run(&args),
        Command::Completions(args) => completions::run(&args, &command_line(host)),
        Command::Man(args) => man::run(&args, command_line(host)),
        Command::Owner(args) => owner::run(&args),
    };
    match result {
        Ok(()) => 0,
        Err(failure) => {
            failure.report();
            1
        }
    }
}

/// Returns the definition of the command line, with the commands of the host.
fn command_line(host: &Host) -> clap::Command {
    host.extend(Cli::command())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// The command line of a program that has a command of its own.
    pub(super) fn example() -> clap::Command {
        let size = ExtraArgument {
            names: vec!["-s".into(), "--size".into(), "--bytes".into()],
            value: Some("SIZE".into()),
            help: "size of the disk".into(),
        };
        let what = ExtraArgument { value: Some("WHAT".into()), help: "class".into(), ..ExtraArgument::default() };
        let run = ExtraCommand {
            name: "run".into(),
            about: "Serve a disk".into(),
            description: "Serve a disk until a signal arrives".into(),
            usage: "ublk run [options] WHAT [-- COMMAND]".into(),
            arguments: vec![size, what],
        };
        command_line(&Host { extra: vec![run], ..Host::default() })
    }

    #[test]
    fn commands_of_the_host_are_in_the_help() {
        let mut command = example();
        command.clone().debug_assert();
        assert!(command.render_help().to_string().contains("Serve a disk"));
        let help = command.find_subcommand_mut("run").unwrap().render_long_help().to_string();
        for part in ["until a signal arrives", "[-- COMMAND]", "-s, --size <SIZE>", "--bytes]", "[WHAT]\n"] {
            assert!(help.contains(part), "{part}: {help}");
        }
    }

    #[test]
    fn wrong_usage_is_status_2() {
        assert_eq!(run(vec!["frobnicate".into()], &Host::default()), 2);
        assert_eq!(run(vec!["del".into()], &Host::default()), 2);
        assert_eq!(run(vec!["run".into(), "disk.py:Disk".into()], &Host::default()), 2);
    }
}
