// SPDX-License-Identifier: MIT OR Apache-2.0

//! The command line.

use std::ffi::OsString;
use std::iter::once;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};

use crate::driver::Driver;
use crate::qemu::Accelerator;

const EXIT_CODES: &str = "\
Exit status:
  that of the command, or
  123  the guest's kernel failed (panic, oops, BUG, WARNING, hung task or lockup), or the machine
       ended before the command did; the kernel's log is printed
  124  time-out; the state of the guest's tasks is printed
  125  the testbed itself failed: bad options, no kernel, no space, a failed build, ...
  128+N  ended by signal N (130 for Ctrl-C)

Environment:
  UBLK_VM_CACHE            directory of the cache
                           (default: ublk-vm in $XDG_CACHE_HOME or ~/.cache)
  UBLK_VM_MIRROR           Debian archive, if the host's apt has none
  UBLK_VM_SECURITY_MIRROR  the same for security updates
  CI                       passed on to the guest";

/// The action, selected by the name of the script that was called.
#[derive(Debug)]
pub(crate) enum Action {
    /// `vm/run`
    Run(Run),
    /// `vm/package`
    Package(Package),
    /// `vm/kmod`
    Kmod(Kmod),
}

impl Action {
    /// Parses the command line of this process: the script's name and its arguments.
    pub(crate) fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut arguments = arguments.skip(1);
        let name = arguments.next().unwrap_or_default();
        if name == "package" {
            Package::try_parse_from(once("vm/package".into()).chain(arguments)).map(Self::Package)
        } else if name == "kmod" {
            Kmod::try_parse_from(once("vm/kmod".into()).chain(arguments)).map(Self::Kmod)
        } else if name == "run" {
            Run::try_parse_from(once("vm/run".into()).chain(arguments)).map(Self::Run)
        } else {
            Err(Run::command().error(
                clap::error::ErrorKind::InvalidSubcommand,
                "this program is started by vm/run, vm/kmod and vm/package",
            ))
        }
    }
}

/// Fetch the newest version of a Debian package from any release, and print the directory that it is
/// unpacked in.
#[derive(Debug, Parser)]
#[command(name = "vm/package", bin_name = "vm/package")]
pub(crate) struct Package {
    /// Name of the package, such as linux-libc-dev.
    pub(crate) name: String,
}

/// Build the driver in kmod/ for each kernel with strict checks (W=1, sparse, warnings are errors), and
/// check its style with checkpatch.
#[derive(Debug, Parser)]
#[command(
    name = "vm/kmod",
    bin_name = "vm/kmod",
    after_help = "\
Exit status: 0: no warnings; 1: warnings, which are printed; 125: the testbed itself failed"
)]
pub(crate) struct Kmod {
    /// Linux version, as for vm/run; can be repeated [default: each series whose headers Debian has].
    #[arg(long = "kernel", value_name = "VERSION")]
    pub(crate) kernels: Vec<String>,
}

/// Boot a Debian kernel with ublk in a virtual machine, run a command there as root, and exit with its
/// status.
#[derive(Debug, Parser)]
#[command(name = "vm/run", bin_name = "vm/run", after_help = EXIT_CODES)]
pub(crate) struct Run {
    /// Linux version: the newest of a series in Debian (7.3), an exact one (6.12.107), or `debug`: the
    /// newest, built with checks of memory, locking and more.
    #[arg(long, default_value = "7.3", value_name = "VERSION")]
    pub(crate) kernel: String,
    /// The ublk_drv to load.
    #[arg(long, value_enum, default_value_t = Driver::Intree)]
    pub(crate) driver: Driver,
    /// Number of CPUs.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=255))]
    pub(crate) cpus: u32,
    /// Number of NUMA nodes, which share the CPUs and the memory.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=8))]
    pub(crate) nodes: u32,
    /// Memory: a number with M or G [default: 3G, 4G for the debug kernel].
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) memory: Option<u64>,
    /// Time limit in seconds from the start of the machine.
    #[arg(long, default_value = "1200", value_name = "SECONDS", value_parser = parse_timeout)]
    pub(crate) timeout: Duration,
    /// Host directory that receives the guest's /results and its console log.
    #[arg(long, value_name = "DIR")]
    pub(crate) results: Option<PathBuf>,
    /// Host directory that is copied to /opt/ublk/extra in the guest.
    #[arg(long, value_name = "DIR")]
    pub(crate) extra: Option<PathBuf>,
    /// Host file for the number of instructions that the guest had executed at each of its marks (vm/README.md);
    /// forces emulation, at half speed.
    #[arg(long, value_name = "FILE")]
    pub(crate) count: Option<PathBuf>,
    /// Let the guest's clock advance by 8 ns per instruction, and run its CPUs in turns: a busy host then changes neither
    /// times nor counts. With --count.
    #[arg(long, requires = "count")]
    pub(crate) icount: bool,
    /// Host file for a profile of the guest's programs between two marks: the address of each block of
    /// instructions and how many were executed there. With --count.
    #[arg(long, value_name = "FILE", requires = "count")]
    pub(crate) profile: Option<PathBuf>,
    /// Environment variable for the command; can be repeated.
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_variable)]
    pub(crate) variables: Vec<(String, String)>,
    /// Use the programs and the wheel of the last build.
    #[arg(long)]
    pub(crate) no_build: bool,
    /// Override the choice between KVM and emulation.
    #[arg(long, value_enum, value_name = "NAME")]
    pub(crate) accel: Option<Accelerator>,
    /// Open a shell instead of running a command; leaving it ends the machine.
    #[arg(long, conflicts_with = "command")]
    pub(crate) shell: bool,
    /// The command and its arguments.
    #[arg(last = true, required_unless_present = "shell", value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// A size in MiB.
fn parse_memory(text: &str) -> Result<u64, String> {
    let explain = || format!("'{text}' is not a size such as 512M or 3G");
    let (number, shift) = match text.as_bytes().last() {
        Some(b'M' | b'm') => (&text[..text.len() - 1], 0),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 10),
        _ => return Err(explain()),
    };
    let number: u64 = number.parse().map_err(|_| explain())?;
    let mebibytes = number.checked_mul(1 << shift).ok_or_else(explain)?;
    if !(512..=1 << 20).contains(&mebibytes) {
        return Err(format!("{text} is out of range: the guest takes from 512M to 1024G"));
    }
    Ok(mebibytes)
}

fn parse_timeout(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(seconds @ 1..=604_800) => Ok(Duration::from_secs(seconds)),
        _ => Err(format!("'{text}' is not a number of seconds from 1 to 604800")),
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("'{text}' has no '=' (expected NAME=VALUE)"))?;
    let starts = |c: char| c.is_ascii_alphabetic() || c == '_';
    if !name.starts_with(starts) || !name.chars().all(|c| starts(c) || c.is_ascii_digit()) {
        return Err(format!("'{name}' cannot be the name of a variable"));
    }
    Ok((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Result<Run, clap::Error> {
        let all = ["ublk-vm", "run"].iter().chain(arguments);
        match Action::parse(all.map(OsString::from))? {
            Action::Run(run) => Ok(run),
            Action::Package(_) | Action::Kmod(_) => unreachable!("the first argument is 'run'"),
        }
    }

    #[test]
    fn the_script_decides_what_is_done() {
        let parse = |words: &[&str]| Action::parse(words.iter().map(OsString::from));
        assert!(matches!(parse(&["x", "package", "p"]), Ok(Action::Package(package)) if package.name == "p"));
        assert!(matches!(parse(&["x", "kmod", "--kernel", "a", "--kernel", "b"]),
            Ok(Action::Kmod(kmod)) if kmod.kernels == ["a", "b"]));
        assert!(parse(&["x", "package"]).is_err());
        assert!(parse(&["x", "other"]).is_err());
        assert!(parse(&["x"]).is_err());
    }

    #[test]
    fn the_definition_is_sound() {
        Run::command().debug_assert();
        Package::command().debug_assert();
        Kmod::command().debug_assert();
    }

    #[test]
    fn defaults() -> Result<(), clap::Error> {
        let run = run(&["--", "true"])?;
        assert_eq!(run.kernel, "7.3");
        assert_eq!(run.driver, Driver::Intree);
        assert_eq!((run.cpus, run.nodes, run.memory), (2, 1, None));
        assert_eq!(run.timeout, Duration::from_secs(1200));
        assert_eq!(run.command, ["true"]);
        Ok(())
    }

    #[test]
    fn everything_behind_the_dashes_is_the_command() -> Result<(), clap::Error> {
        let run = run(&["--kernel", "6.12", "--", "sh", "-c", "--kernel", "--", "x"])?;
        assert_eq!(run.kernel, "6.12");
        assert_eq!(run.command, ["sh", "-c", "--kernel", "--", "x"]);
        Ok(())
    }

    #[test]
    fn shell_or_command_but_not_both_and_not_neither() {
        assert!(run(&["--shell"]).is_ok());
        assert!(run(&["--shell", "--", "true"]).is_err());
        assert!(run(&[]).is_err());
        assert!(run(&["--"]).is_err());
        assert!(run(&["true"]).is_err());
    }

    #[test]
    fn memory_is_mebibytes() {
        assert_eq!(parse_memory("3G"), Ok(3072));
        assert_eq!(parse_memory("512m"), Ok(512));
        for bad in ["", "G", "3", "3T", "-1G", "1.5G", "0G", "511M", "99999999999999999999G", "17592186044416G"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables_have_a_name_and_a_value() {
        assert_eq!(parse_variable("A=b=c"), Ok(("A".into(), "b=c".into())));
        assert_eq!(parse_variable("_9="), Ok(("_9".into(), String::new())));
        for bad in ["", "A", "=x", "9A=x", "A B=x", "A;x=y"] {
            assert!(parse_variable(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn time_is_bounded() {
        assert_eq!(parse_timeout("5"), Ok(Duration::from_secs(5)));
        for bad in ["0", "-1", "x", "", "604801"] {
            assert!(parse_timeout(bad).is_err(), "{bad}");
        }
    }
}
