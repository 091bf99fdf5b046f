// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk man`: man pages, generated from the definition of the command line.

use std::io;
use std::path::{Path, PathBuf};

use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::failure::{Failure, Outcome};

/// The section of the manual for commands of system administrators.
const SECTION: &str = "8";

/// The definition of the apostrophe that `roff` writes: the ASCII character in groff, where `'` is a quotation mark.
const APOSTROPHE: &str = ".ie \\n(.g .ds Aq \\(aq\n.el .ds Aq '\n";

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Directory for the pages ublk.8, ublk-add.8 etc.; created if it does not exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

pub(super) fn run(args: &Args, command: clap::Command) -> Outcome {
    let failed = |path: &Path, e: io::Error| Failure::Text(format!("writing {}: {e}", path.display()));
    std::fs::create_dir_all(&args.directory).map_err(|e| failed(&args.directory, e))?;
    for (name, page) in pages(command).map_err(|e| failed(&args.directory, e))? {
        let path = args.directory.join(name);
        std::fs::write(&path, page).map_err(|e| failed(&path, e))?;
    }
    Ok(())
}

/// Renders the page of a command and those of its subcommands, each with its file name.
fn pages(command: clap::Command) -> io::Result<Vec<(String, String)>> {
    let mut command = with_aliases(command).disable_help_subcommand(true);
    command.build();
    let command = with_usage(command.mut_subcommands(with_usage));
    let subcommands = command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set());
    let of_subcommands = subcommands.map(|subcommand| page(subcommand, Some(&command)));
    std::iter::once(page(&command, None)).chain(of_subcommands).collect()
}

fn page(command: &clap::Command, parent: Option<&clap::Command>) -> io::Result<(String, String)> {
    let source = format!("ublk {}", env!("CARGO_PKG_VERSION"));
    let man = Man::new(command.clone()).section(SECTION).source(source).manual("ublk");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    match parent {
        Some(parent) => see_also(parent).to_writer(&mut page)?,
        None => {
            man.render_subcommands_section(&mut page)?;
            exit_status().to_writer(&mut page)?;
            files().to_writer(&mut page)?;
        }
    }
    // Each section begins with the definition of the apostrophe.
    let text = String::from_utf8(page).map_err(io::Error::other)?;
    let page = format!("{APOSTROPHE}{}", text.replace(APOSTROPHE, ""));
    Ok((man.get_filename(), page))
}

/// Uses the usage line of `--help` as the synopsis, which otherwise lists all options.
fn with_usage(mut command: clap::Command) -> clap::Command {
    let usage = command.render_usage().to_string();
    command.override_usage(usage.trim_start_matches("Usage: ").to_owned())
}

/// Adds the visible aliases of options to their help texts, as `--help` does.
fn with_aliases(command: clap::Command) -> clap::Command {
    let with_aliases_of = |argument: clap::Arg| {
        let aliases = argument.get_visible_aliases().unwrap_or_default();
        if aliases.is_empty() {
            return argument;
        }
        let aliases: Vec<_> = aliases.iter().map(|alias| format!("--{alias}")).collect();
        let help = argument.get_help().map_or_else(String::new, ToString::to_string);
        argument.help(format!("{help} [alias: {}]", aliases.join(", ")))
    };
    command.mut_args(with_aliases_of).mut_subcommands(with_aliases)
}

fn exit_status() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["EXIT STATUS"]);
    for (status, meaning) in [("0", "Success."), ("1", "Failure."), ("2", "Wrong usage.")] {
        roff.control("TP", []).text([bold(status)]).text([roman(meaning)]);
    }
    roff
}

fn files() -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["FILES"]);
    for (path, content) in [
        ("/run/ublk/ublkbN.json", "Options of a recoverable device, for its next server."),
        ("/run/ublk/ublkbN.log", "Messages of a background server, unless --log names another file."),
        ("/run/ublk/server-PID.sock", "Socket of a server, for ublk stat."),
    ] {
        roff.control("TP", []).text([bold(path)]).text([roman(content)]);
    }
    roff.control("PP", []);
    roff.text([roman("Users who are not root have these in $XDG_RUNTIME_DIR/ublk, or /tmp/ublk-UID.")]);
    roff
}

fn see_also(parent: &clap::Command) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold(parent.get_name()), roman(format!("({SECTION})"))]);
    roff
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::tests::example;

    /// The text of a page without the escapes of troff.
    fn page_of(command: &str) -> String {
        let name = if command.is_empty() { "ublk.8".to_owned() } else { format!("ublk-{command}.8") };
        let pages = pages(example()).unwrap();
        let (_, text) = pages.into_iter().find(|(found, _)| *found == name).unwrap_or_else(|| panic!("no {name}"));
        text.replace(r"\-", "-").replace(r"\fB", "").replace(r"\fI", "").replace(r"\fR", "").replace(r"\*(Aq", "'")
    }

    /// The options in a help text: words that begin with a hyphen.
    fn options(help: &str) -> Vec<&str> {
        let words = help.split(|c: char| c.is_whitespace() || "[]<>,;.`=()|".contains(c));
        words.filter(|word| word.len() > 1 && word.starts_with('-') && *word != "--").collect()
    }

    #[test]
    fn every_option_of_the_help_is_in_the_man_page() {
        for mut command in example().get_subcommands().cloned().chain([example()]) {
            if command.is_hide_set() {
                continue;
            }
            let name = if command.get_name() == "ublk" { String::new() } else { command.get_name().to_owned() };
            let page = page_of(&name);
            let help = command.render_long_help().to_string();
            let found = options(&page);
            let options = options(&help);
            assert!(options.contains(&"--help"), "{help}");
            for option in options {
                assert!(found.contains(&option), "ublk {name}: {option} is missing in\n{page}");
            }
        }
    }

    #[test]
    fn every_help_text_is_in_the_man_page() {
        for command in example().get_subcommands().filter(|command| !command.is_hide_set()) {
            let page = page_of(command.get_name());
            for argument in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let help = argument.get_help().map(ToString::to_string).unwrap_or_default();
                assert!(page.contains(help.lines().next().unwrap_or_default()), "{}: {help}", command.get_name());
            }
        }
    }

    #[test]
    fn hidden_commands_and_options_have_no_page() {
        let names: Vec<_> = pages(example()).unwrap().into_iter().map(|(name, _)| name).collect();
        assert!(names.contains(&"ublk-run.8".to_owned()) && !names.contains(&"ublk-owner.8".to_owned()), "{names:?}");
        assert!(!page_of("add").contains("--report-fd"));
    }

    #[test]
    fn pages_are_written_to_a_new_directory() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("share/man/man8");
        run(&Args { directory: directory.clone() }, example()).unwrap();
        let page = std::fs::read_to_string(directory.join("ublk.8")).unwrap();
        for part in [".TH ublk 8", "\\fBublk\\fR <COMMAND>", ".SH \"EXIT STATUS\"", ".SH FILES", "ublk\\-add(8)"] {
            assert!(page.contains(part), "{part}: {page}");
        }
        assert!(page.starts_with(APOSTROPHE) && page.matches(APOSTROPHE).count() == 1, "{page}");
        assert!(std::fs::read_to_string(directory.join("ublk-del.8")).unwrap().contains("SEE ALSO"));
    }
}
