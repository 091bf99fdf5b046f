// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk completions`: scripts for shells, generated from the definition of the command line.

use clap_complete::Shell;

use super::failure::Outcome;
use super::output::print;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Shell to print the script for
    #[arg(value_enum)]
    shell: Shell,
}

pub(super) fn run(args: &Args, command: &clap::Command) -> Outcome {
    print(&script(args.shell, command))
}

fn script(shell: Shell, command: &clap::Command) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(command), command.get_name(), &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

/// Copies a command without its hidden options and subcommands, which the scripts would offer.
fn visible(command: &clap::Command) -> clap::Command {
    let arguments = command.get_arguments().filter(|argument| !argument.is_hide_set()).cloned();
    let subcommands = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()).map(visible);
    let mut copy = clap::Command::new(command.get_name().to_owned()).args(arguments).subcommands(subcommands);
    if let Some(version) = command.get_version() {
        copy = copy.version(version.to_owned());
    }
    match command.get_about() {
        Some(about) => copy.about(about.clone()),
        None => copy,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::ValueEnum;

    use super::*;
    use crate::cli::tests::example;

    /// Completes the last word in bash, as the shell does.
    fn complete(words: &[&str]) -> Vec<String> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ublk");
        std::fs::write(&path, script(Shell::Bash, &example())).unwrap();
        let last = words.len() - 1;
        let program = format!(
            r#"set -eu; source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD={last}
            _ublk ublk "${{@: -1}}" "${{@: -2:1}}" || true; printf '%s\n' "${{COMPREPLY[@]}}""#
        );
        let done = Command::new("bash").args(["-c", &program, "bash"]).arg(&path).args(words).output().unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        let text = String::from_utf8(done.stdout).unwrap();
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    #[test]
    fn bash_accepts_its_script() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ublk");
        std::fs::write(&path, script(Shell::Bash, &example())).unwrap();
        let done = Command::new("bash").arg("-n").arg(&path).output().unwrap();
        assert!(done.status.success() && done.stderr.is_empty(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    #[test]
    fn bash_completes_commands_options_and_values() {
        let commands = complete(&["ublk", ""]);
        for command in ["add", "del", "completions", "run"] {
            assert!(commands.iter().any(|found| found == command), "{command}: {commands:?}");
        }
        assert_eq!(complete(&["ublk", "add", "--zone"]), ["--zone-size"]);
        assert_eq!(complete(&["ublk", "run", "--si"]), ["--size"]);
        assert_eq!(complete(&["ublk", "add", "--type", ""]), ["null", "mem", "file", "zoned"]);
    }

    #[test]
    fn hidden_options_and_commands_are_not_completed() {
        assert!(!complete(&["ublk", ""]).contains(&"owner".to_owned()));
        assert_eq!(complete(&["ublk", "add", "--report"]), [""; 0]);
    }

    #[test]
    fn every_option_is_completed_in_every_shell() {
        let command = visible(&example());
        for shell in Shell::value_variants() {
            let script = script(*shell, &command);
            for argument in command.get_subcommands().flat_map(clap::Command::get_arguments) {
                let Some(long) = argument.get_long() else { continue };
                assert!(script.contains(long), "{shell}: --{long}");
            }
        }
    }
}
