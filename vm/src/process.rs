// SPDX-License-Identifier: MIT OR Apache-2.0

//! Child processes: each runs in a process group of its own and is known here, so that a signal
//! to this program ends all of them and nothing is left behind.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;

/// How a child is ended when this program is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It has something to tidy up (apt, mmdebstrap, cargo): SIGTERM and a grace period.
    Term,
    /// It has nothing to lose (QEMU on throw-away disks): SIGKILL.
    Kill,
}

static CHILDREN: Mutex<BTreeMap<i32, End>> = Mutex::new(BTreeMap::new());
static TEMPORARY: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// A child process in a process group of its own.
#[derive(Debug)]
pub(crate) struct Supervised {
    child: Child,
    name: String,
}

/// Starts `command`; the registry knows it until it was waited for.
pub(crate) fn spawn(command: &mut Command, end: End) -> Result<Supervised> {
    let name = command.get_program().to_string_lossy().into_owned();
    // The lock spans the start, so that the signal thread never misses a child that is just born.
    let mut children = lock(&CHILDREN);
    let child = command.process_group(0).spawn().with_context(|| format!("cannot start {name}"))?;
    children.insert(pid_of(&child).as_raw(), end);
    Ok(Supervised { child, name })
}

fn pid_of(child: &Child) -> Pid {
    // A pid always fits: the kernel's pid_t is an i32.
    Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX))
}

impl Supervised {
    /// The process (and process group) id.
    pub(crate) fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Waits for the end.
    pub(crate) fn wait(mut self) -> Result<ExitStatus> {
        let pid = self.pid();
        // The zombie keeps its pid until the registry forgot it, so that nobody kills a stranger.
        while waitid(Id::Pid(pid), WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) == Err(nix::errno::Errno::EINTR) {}
        let mut children = lock(&CHILDREN);
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.name))?;
        children.remove(&pid.as_raw());
        drop(children);
        stop_here_if_interrupted();
        Ok(status)
    }

    /// What the child writes to its standard output, if it is piped.
    pub(crate) fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.child.stdout.take()
    }
}

/// Kills the process group of a child, if it still is ours.
pub(crate) fn kill_group(pid: Pid) {
    let children = lock(&CHILDREN);
    if children.contains_key(&pid.as_raw()) {
        let _ = killpg(pid, Signal::SIGKILL);
    }
}

/// Once a signal asked this program to end, only the signal thread goes on.
fn stop_here_if_interrupted() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        thread::park();
    }
}

/// A directory that is removed when the value is dropped or when a signal ends the program.
#[derive(Debug)]
pub(crate) struct TemporaryDir(PathBuf);

impl TemporaryDir {
    /// Takes over (and makes) the directory.
    pub(crate) fn create(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        lock(&TEMPORARY).push(path.clone());
        Ok(Self(path))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        remove_tree(&self.0);
        lock(&TEMPORARY).retain(|path| *path != self.0);
    }
}

/// Removes a directory tree but never crosses into another file system: a build that was killed
/// may have left `/dev` or `/proc` mounted inside.
pub(crate) fn remove_tree(path: &Path) {
    if path.symlink_metadata().is_ok() {
        let _ = Command::new("rm").args(["-rf", "--one-file-system", "--"]).arg(path).stderr(Stdio::null()).status();
    }
}

/// Takes SIGINT, SIGTERM and SIGHUP over: children end, temporary directories go, the terminal is
/// put back, and the exit status is 128 + the signal's number, as a shell has it. SIGWINCH, the
/// change of the terminal's size, goes to the shell in the guest.
///
/// To be called before any other thread exists: threads inherit the signal mask.
pub(crate) fn watch_signals() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGWINCH] {
        signals.add(signal);
    }
    signals.thread_block().context("cannot block signals")?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while let Ok(signal) = signals.wait() {
                match signal {
                    Signal::SIGWINCH => crate::terminal::size_changed(),
                    _ => end_by(signal),
                }
            }
        })
        .context("cannot start the signal thread")?;
    Ok(())
}

fn end_by(signal: Signal) -> ! {
    INTERRUPTED.store(true, Ordering::SeqCst);
    let victims: Vec<(i32, End)> = lock(&CHILDREN).iter().map(|(p, e)| (*p, *e)).collect();
    for &(pid, end) in &victims {
        let how = match end {
            End::Term => Signal::SIGTERM,
            End::Kill => Signal::SIGKILL,
        };
        let _ = killpg(Pid::from_raw(pid), how);
    }
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline && !lock(&CHILDREN).is_empty() {
        thread::sleep(Duration::from_millis(20));
    }
    for &(pid, _) in &victims {
        if lock(&CHILDREN).contains_key(&pid) && kill(Pid::from_raw(pid), None).is_ok() {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
    crate::terminal::restore();
    for path in lock(&TEMPORARY).iter() {
        remove_tree(path);
    }
    eprintln!("vm: ended by {signal}");
    std::process::exit(128 + signal as i32)
}

/// Runs a helper program to its end; its output goes to our standard error, because standard
/// output belongs to the command in the guest. The error says which program and how it ended.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    command.stdin(Stdio::null()).stdout(
        std::os::fd::AsFd::as_fd(&std::io::stderr()).try_clone_to_owned().context("cannot duplicate standard error")?,
    );
    let shown = show(command);
    let status = spawn(command, End::Term)?.wait()?;
    if !status.success() {
        bail!("`{shown}` failed ({status})");
    }
    Ok(())
}

/// Runs a helper program silently; its output is shown only when it fails.
pub(crate) fn run_quietly(command: &mut Command) -> Result<()> {
    output(command.stderr(Stdio::piped())).map(drop)
}

/// Runs a helper program and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let shown = show(command);
    let (status, text, errors) = collect(command)?;
    if !status.success() {
        bail!("`{shown}` failed ({status})\n{errors}{text}");
    }
    Ok(text)
}

/// Runs a helper program whose failure is an answer too: whether it succeeded, and what it wrote to
/// standard error and standard output.
pub(crate) fn answer(command: &mut Command) -> Result<(bool, String)> {
    let (status, text, errors) = collect(command.stderr(Stdio::piped()))?;
    Ok((status.success(), errors + &text))
}

/// The status, standard output and standard error (if that is piped) of a helper program.
fn collect(command: &mut Command) -> Result<(ExitStatus, String, String)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let shown = show(command);
    let mut child = spawn(command, End::Term)?;
    // Both pipes are drained at the same time, so that neither can fill up and block the child.
    let errors = child.child.stderr.take().map(|mut pipe| {
        thread::spawn(move || {
            let mut text = Vec::new();
            let _ = std::io::Read::read_to_end(&mut pipe, &mut text);
            text
        })
    });
    let mut bytes = Vec::new();
    if let Some(mut pipe) = child.take_stdout() {
        std::io::Read::read_to_end(&mut pipe, &mut bytes).with_context(|| format!("cannot read from `{shown}`"))?;
    }
    let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
    let status = child.wait()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((status, text(&bytes), text(&errors)))
}

/// The command line for a message; long ones are cut.
fn show(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        text.push(' ');
        text.push_str(&argument.to_string_lossy().replace('\n', " "));
    }
    if text.chars().count() > 300 {
        text = text.chars().take(300).collect();
        text.push_str(" ...");
    }
    text
}

/// Finds a program the way a shell does, and also where system tools live for non-root users.
pub(crate) fn which(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program.as_ref()))
        .find(|candidate| candidate.is_file())
}
