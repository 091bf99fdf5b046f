// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk upgrade`.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use super::failure::{Failure, Outcome};
use super::host::Host;
use super::recover::with_remedy;
use super::state_file::StateFile;
use super::{add, background};
use crate::control::Control;
use crate::control::DRAIN_TIMEOUT;
use crate::uapi::DeviceState;
use crate::units::DeviceId;

/// How long a program may take to report whether it can be the new server.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);
/// How long to wait for the rest of its messages after it has exited.
const MESSAGES_TIMEOUT: Duration = Duration::from_secs(1);
const CHECK_RETRY: Duration = Duration::from_millis(5);

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// Program of the new server [default: this one]
    #[arg(long, value_name = "PATH")]
    program: Option<PathBuf>,
}

pub(super) fn run(args: &Args, host: &Host) -> Outcome {
    let id = DeviceId(args.id);
    let control = Control::open()?;
    // What is checked is about this device, whose number may be another one's later.
    let instance = control.instance(id);
    let mut host = host.clone();
    // Everything that can be checked is checked while the old server is running.
    if let Some(program) = &args.program {
        check_program(program, id, CHECK_TIMEOUT)?;
        host.relaunch = vec![program.clone().into()];
    }
    let info = control.info(id)?;
    control.require_quiesce(&info)?;
    let line = StateFile::load(id)?.command_line();
    add::Args::parse(&line)?.check_successor(&line, &control, &info)?;
    let old = fs::read_link(format!("/proc/{}/exe", info.pid)).ok();
    control.quiesce_instance(id, instance, DRAIN_TIMEOUT)?;
    let recover = ["recover".into(), "-n".into(), id.to_string().into()];
    let outcome = background::start(&recover, &host, background::Devices::Existing);
    // Perhaps only the paths could not be printed.
    if outcome.is_err() && control.info(id).is_ok_and(|info| info.state == DeviceState::Live) {
        return outcome;
    }
    let new = host.relaunch.first().map(Path::new).and_then(|program| program.canonicalize().ok());
    outcome.map_err(|failure| with_remedy(failure, id, old.filter(|old| Some(old) != new.as_ref())))
}

/// Checks whether a program can be the new server of a device.
fn check_program(program: &Path, id: DeviceId, timeout: Duration) -> Outcome {
    let failed =
        |why: &dyn std::fmt::Display| Failure::Text(format!("{} cannot be the new server: {why}", program.display()));
    let run = |arguments: &[&str]| run_within(program, arguments, timeout).map_err(|e| failed(&e));
    let (status, messages) = run(&["recover", "--check", "-n", &id.to_string()])?;
    match status.code() {
        Some(0) => Ok(()),
        // An older version of this program, without `--check`.
        Some(2) if run(&["recover", "--help"])?.0.success() => Ok(()),
        Some(2) => Err(failed(&"it has no command `recover`")),
        _ => {
            let messages = messages.trim();
            Err(if messages.is_empty() { failed(&status) } else { failed(&messages) })
        }
    }
}

/// Runs a program and returns its standard error. Kills it if that takes too long.
fn run_within(program: &Path, arguments: &[&str], timeout: Duration) -> io::Result<(ExitStatus, String)> {
    let mut command = Command::new(program);
    let mut child =
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?;
    let (sender, receiver) = std::sync::mpsc::channel();
    let messages = child.stderr.take();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = messages.map(|mut messages| messages.read_to_end(&mut text));
        let _ = sender.send(String::from_utf8_lossy(&text).into_owned());
    });
    let deadline = Instant::now() + timeout;
    loop {
        if let Some(status) = child.try_wait()? {
            // Processes that it has started may keep its standard error open.
            return Ok((status, receiver.recv_timeout(MESSAGES_TIMEOUT).unwrap_or_default()));
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            return Err(io::Error::other(format!("it does not answer within {} s", timeout.as_secs_f32())));
        }
        std::thread::sleep(CHECK_RETRY);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn program(directory: &Path, script: &str) -> PathBuf {
        let path = directory.join("server");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_program_is_asked_whether_it_can_serve_the_device() {
        let directory = tempfile::tempdir().unwrap();
        let check = |script: &str| match check_program(&program(directory.path(), script), DeviceId(7), CHECK_TIMEOUT) {
            Ok(()) => "ok".to_owned(),
            Err(Failure::Text(text)) => text,
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(check(r#"[ "$*" = "recover --check -n 7" ]"#), "ok");
        let refused = check("echo 'ublk: size = 1: too small' >&2; exit 1");
        assert!(refused.ends_with("server cannot be the new server: ublk: size = 1: too small"), "{refused}");
        assert_eq!(check(r#"[ "$2" = --help ] || exit 2"#), "ok", "an older version");
        assert!(check("exit 2").ends_with("it has no command `recover`"));
        assert!(check("kill -9 $$").contains("signal: 9"));
    }

    #[test]
    fn a_program_that_does_not_answer_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let check = |script: &str, patience| {
            let began = Instant::now();
            let outcome = check_program(&program(directory.path(), script), DeviceId(7), patience);
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
            outcome
        };
        let Err(Failure::Text(why)) = check("exec sleep 60", Duration::from_millis(50)) else { panic!() };
        assert!(why.ends_with("server cannot be the new server: it does not answer within 0.05 s"), "{why}");
        check("sleep 60 & exit 0", CHECK_TIMEOUT).unwrap();
    }
}
