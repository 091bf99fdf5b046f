// SPDX-License-Identifier: MIT OR Apache-2.0

//! The program that contains the command.

use std::ffi::OsString;

/// The program that contains the command: the `ublk` binary, or the Python package.
#[derive(Clone, Debug, Default)]
pub struct Host {
    /// How to start the program again, to run a server in the background: the program, and the arguments that precede those
    /// of the command.
    pub relaunch: Vec<OsString>,
    /// Commands that the program handles itself. They appear in the help text, the man pages and the completions.
    pub extra: Vec<ExtraCommand>,
    /// Disks of the program that `ublk bench` measures.
    pub bench: Vec<BenchDisk>,
}

/// A disk of the [`Host`] that `ublk bench` measures.
#[derive(Clone, Debug, Default)]
pub struct BenchDisk {
    /// The disk's name in the results.
    pub name: String,
    /// A program with its arguments that creates a device, prints the path of its disk and a newline, serves it until
    /// SIGTERM, and then removes it.
    pub serve: Vec<OsString>,
}

/// Description of a command that the [`Host`] handles.
#[derive(Clone, Debug, Default)]
pub struct ExtraCommand {
    /// The command's name.
    pub name: String,
    /// What it does, in one line.
    pub about: String,
    /// What it does, in detail. By default as `about`.
    pub description: String,
    /// Its usage, in one line. By default it is derived from the arguments.
    pub usage: String,
    /// Its options and positional arguments.
    pub arguments: Vec<ExtraArgument>,
}

/// An option or positional argument of an [`ExtraCommand`].
#[derive(Clone, Debug, Default)]
pub struct ExtraArgument {
    /// The names of an option, with their hyphens: `-s`, `--size`. Empty for a positional argument.
    pub names: Vec<String>,
    /// The name of its value, if it has one.
    pub value: Option<String>,
    /// What it does.
    pub help: String,
}

impl ExtraCommand {
    fn to_clap(&self) -> clap::Command {
        let arguments = self.arguments.iter().enumerate().map(|(index, argument)| argument.to_clap(index));
        let mut command = clap::Command::new(self.name.clone()).about(self.about.clone()).args(arguments);
        if !self.description.is_empty() {
            command = command.long_about(self.description.clone());
        }
        if !self.usage.is_empty() {
            command = command.override_usage(self.usage.clone());
        }
        command
    }
}

impl ExtraArgument {
    fn to_clap(&self, index: usize) -> clap::Arg {
        let mut arg = clap::Arg::new(format!("extra-{index}")).help(self.help.clone());
        for name in &self.names {
            arg = match (name.strip_prefix("--"), name.strip_prefix('-').and_then(|name| name.chars().next())) {
                (Some(long), _) if arg.get_long().is_none() => arg.long(long.to_owned()),
                (Some(long), _) => arg.visible_alias(long.to_owned()),
                (None, Some(short)) => arg.short(short),
                (None, None) => arg,
            };
        }
        match &self.value {
            Some(value) => arg.value_name(value.clone()),
            None => arg.action(clap::ArgAction::SetTrue),
        }
    }
}

impl Host {
    /// Returns whether the program itself handles a command of this name.
    pub(super) fn handles(&self, name: &str) -> bool {
        self.extra.iter().any(|command| command.name == name)
    }

    /// Adds the program's own commands to the command line.
    pub(super) fn extend(&self, command: clap::Command) -> clap::Command {
        command.subcommands(self.extra.iter().map(ExtraCommand::to_clap))
    }
}
