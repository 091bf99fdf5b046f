// SPDX-License-Identifier: MIT OR Apache-2.0

//! One run: everything is made ready, the machine is started, its verdict is waited for.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};

use crate::apt::Apt;
use crate::cache::{Cache, prune};
use crate::cli::Run;
use crate::counter::Counter;
use crate::kernel::Kernel;
use crate::process::{kill_group, run_quietly};
use crate::qemu::{Accelerator, Clock, Machine};
use crate::report::note;
use crate::{accel, catalog, console, host, initramfs, payload, repository, rootfs, terminal};

/// The guest's kernel failed, or the machine ended without a status.
const GUEST_FAILED: u8 = 123;
/// The time was over.
const TIMED_OUT: u8 = 124;

/// Memory of the machine, in MiB, where the user does not say.
const MEMORY: u64 = 3 << 10;

/// The same for the debug kernel, which keeps freed memory back and a record of all that is in use.
const DEBUG_MEMORY: u64 = 4 << 10;

/// How long the results may take to arrive.
const RESULTS: Duration = Duration::from_secs(30);

/// How long a machine that has reported its status may take to power off.
const POWER_OFF: Duration = Duration::from_secs(15);

/// Lines of the kernel's log that are shown when something is wrong.
const TAIL: usize = 60;

/// How often a machine is started whose kernel dies while it boots. Emulation with several CPUs is
/// not exact where a kernel patches its own code, which it does a lot at that stage.
const BOOT_TRIES: u32 = 3;

/// What became of a machine.
enum Outcome {
    /// The exit status.
    Status(u8),
    /// The kernel failed before anything of this project had run.
    DiedBooting,
}

enum Event {
    /// A line from the guest's init.
    Said(String),
    /// The end of QEMU.
    Ended(Result<ExitStatus>),
    /// Our own output cannot be written any more (a pipe was closed).
    OutputGone,
}

/// Makes everything ready and runs the machine; the exit status.
pub(crate) fn run(cache: &Cache, options: &Run) -> Result<u8> {
    let repository = &repository::find()?;
    if let Some(dir) = &options.results {
        check_writable(dir)?;
    }
    let extra = options.extra.as_deref().map(directory).transpose()?;
    if options.shell && terminal::size().is_none() {
        bail!("--shell needs a terminal on standard input");
    }
    host::require(host::MACHINE)?;
    let apt = Apt::open(cache)?;
    if !options.cpus.is_multiple_of(options.nodes) {
        bail!("{} CPUs cannot be divided evenly among {} NUMA nodes", options.cpus, options.nodes);
    }
    let kernel = catalog::obtain(cache, &apt, &options.kernel)?;
    let driver = options.driver.prepare(cache, &apt, repository, &kernel)?;
    let root = rootfs::obtain(cache)?;
    let payload = payload::obtain(cache, repository, driver, extra, !options.no_build)?;
    let counter = options.count.as_deref().map(|out| Counter::prepare(repository, out, options.profile.as_deref()));
    let counter = counter.transpose()?;
    let accelerator = match options.accel {
        Some(Accelerator::Kvm) if counter.is_some() => bail!("--count needs emulation (--accel tcg)"),
        _ if counter.is_some() => Accelerator::Tcg,
        Some(accelerator) => accelerator,
        None => accel::choose(cache, &kernel)?,
    };
    let clock = if options.icount { Clock::Instructions } else { Clock::Host };
    let memory = options.memory.unwrap_or(if kernel.debug { DEBUG_MEMORY } else { MEMORY });
    check_host_memory(memory);
    let scratch = cache.temporary("run")?;
    let initrd = scratch.path().join("initrd");
    initramfs::write(&initrd, &kernel, &job(options, &kernel))?;
    note(format_args!(
        "Linux {} ({}), {} driver, {} CPUs, {} MiB",
        kernel.release,
        accelerator.name(),
        options.driver.name(),
        options.cpus,
        memory
    ));
    let mut tries = if accelerator == Accelerator::Tcg && !options.shell { BOOT_TRIES } else { 1 };
    loop {
        let mut machine = Machine::new(accelerator, clock, options.cpus, memory, scratch.path());
        if options.nodes > 1 {
            machine.nodes(options.nodes, options.cpus, memory);
        }
        if let Some(counter) = &counter {
            machine.count(counter);
        }
        machine.expect(&kernel);
        machine.boot(&kernel.vmlinuz(), &initrd);
        machine.disk(&root, "root");
        machine.disk(&kernel.modules_image(), "modules");
        machine.disk(&payload, "payload");
        tries -= 1;
        let session = Session::start(machine, options, scratch.path(), tries > 0)?;
        match session.watch(cache, options)? {
            Outcome::Status(code) => return Ok(code),
            Outcome::DiedBooting => {}
        }
    }
}

/// Files for the guest's init.
fn job(options: &Run, kernel: &Kernel) -> Vec<(&'static str, String)> {
    let mut environment = String::new();
    let mut export = |name: &str, value: &str| {
        environment.push_str(&format!("export {name}={}\n", quote(value)));
    };
    export("PYTHONPATH", "/opt/ublk/python");
    export("UBLK_KERNEL", &kernel.series());
    export("UBLK_DRIVER", options.driver.name());
    if kernel.debug {
        export("UBLK_DEBUG", "1");
    }
    let term = std::env::var("TERM").unwrap_or_default();
    export("TERM", if term.is_empty() { "dumb" } else { &term });
    if let Ok(ci) = std::env::var("CI") {
        export("CI", &ci);
    }
    for (name, value) in &options.variables {
        export(name, value);
    }
    let mut job = vec![("environment", environment)];
    if options.results.is_some() {
        job.push(("results", String::new()));
    }
    if options.shell {
        job.push(("shell", String::new()));
        if let Some(size) = terminal::size() {
            job.push(("size", format!("{size}\n")));
        }
    } else {
        let words: Vec<String> = options.command.iter().map(|word| quote(word)).collect();
        job.push(("command", format!("exec {}\n", words.join(" "))));
    }
    job
}

/// The text as one word of a shell.
fn quote(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

fn check_writable(dir: &Path) -> Result<()> {
    let explain = || format!("the results directory {} is not writable", dir.display());
    fs::create_dir_all(dir).with_context(explain)?;
    let probe = dir.join(format!(".ublk-vm-{}", std::process::id()));
    File::create(&probe).with_context(explain)?;
    fs::remove_file(&probe).with_context(explain)
}

/// The directory, also if it is named by a link.
fn directory(dir: &Path) -> Result<PathBuf> {
    let found = dir.canonicalize().with_context(|| format!("cannot find {}", dir.display()))?;
    if !found.is_dir() {
        bail!("{} is not a directory", dir.display());
    }
    Ok(found)
}

/// A guest that is bigger than the host's free memory may be killed in the middle.
fn check_host_memory(wanted: u64) {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = info.lines().find_map(|line| {
        let kibibytes = line.strip_prefix("MemAvailable:")?.trim();
        kibibytes.strip_suffix(" kB")?.parse::<u64>().ok()
    });
    if let Some(available) = available.map(|kibibytes| kibibytes >> 10)
        && available < wanted
    {
        note(format_args!("the guest may need {wanted} MiB, but only {available} MiB are available"));
    }
}

/// A machine that runs.
struct Session {
    pid: nix::unistd::Pid,
    events: Receiver<Event>,
    monitor: UnixStream,
    console: UnixStream,
    control: UnixStream,
    log: PathBuf,
    archive: PathBuf,
    /// A kernel that dies while it boots may be given another chance.
    may_start_again: bool,
    /// The guest's init has begun its work.
    up: bool,
    /// Threads that end with QEMU, when all it wrote has been passed on.
    pumps: Vec<JoinHandle<()>>,
}

impl Session {
    fn start(mut machine: Machine, options: &Run, scratch: &Path, may_start_again: bool) -> Result<Self> {
        let console = machine.console()?;
        let monitor = machine.monitor()?;
        let terminal = options.shell.then(|| machine.terminal()).transpose()?;
        let status = machine.port("status")?;
        let control = machine.port("control")?;
        let results = machine.port("results")?;
        let output = machine.port("stdout")?;
        let errors = machine.port("stderr")?;

        let log = scratch.join("console.log");
        let archive = scratch.join("results.tar");
        let log_file = File::create(&log).context("cannot make the console log")?;
        let archive_file = File::create(&archive).context("cannot make the results archive")?;

        let qemu = machine.start()?;
        let pid = qemu.pid();
        let (sender, events) = mpsc::channel();
        let pumps = vec![
            pump(console.try_clone()?, log_file, None),
            pump(results, archive_file, None),
            pump(output, std::io::stdout(), Some(sender.clone())),
            pump(errors, std::io::stderr(), Some(sender.clone())),
            listen(status, sender.clone()),
        ];
        if let Some(terminal) = terminal {
            terminal::make_raw()?;
            terminal::follow_size(control.try_clone()?);
            pump(terminal.try_clone()?, std::io::stdout(), None);
            pump(std::io::stdin(), terminal, None);
        }
        thread::spawn(move || {
            let _ = sender.send(Event::Ended(qemu.wait()));
        });
        Ok(Self { pid, events, monitor, console, control, log, archive, may_start_again, up: false, pumps })
    }

    /// Waits for the verdict.
    fn watch(mut self, cache: &Cache, options: &Run) -> Result<Outcome> {
        let deadline = Instant::now() + options.timeout;
        let mut verdict = None;
        let mut trouble = None;
        let mut output_gone = false;
        loop {
            let until = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(until) {
                Ok(Event::Said(line)) => {
                    self.up = true;
                    if let Some(code) = line.strip_prefix("exit ") {
                        verdict = code.parse::<u8>().ok();
                        break;
                    }
                    if let Some(bytes) = line.strip_prefix("results ") {
                        self.receive_results(bytes.parse().unwrap_or(0));
                    }
                    if let Some(reason) = line.strip_prefix("setup ") {
                        trouble = Some(reason.to_owned());
                        break;
                    }
                }
                Ok(Event::Ended(status)) => {
                    // What the guest said last may still be on its way.
                    verdict = self.late_verdict();
                    let status = status?;
                    if verdict.is_none() && !status.success() {
                        terminal::restore();
                        bail!("QEMU itself failed ({status})");
                    }
                    return self.conclude(cache, options, verdict, trouble, false);
                }
                Ok(Event::OutputGone) => {
                    output_gone = true;
                    break;
                }
                Err(RecvTimeoutError::Timeout) => {
                    terminal::restore();
                    note(format_args!(
                        "time-out after {} s: asking the guest's kernel for its blocked tasks",
                        options.timeout.as_secs()
                    ));
                    self.ask_for_tasks();
                    if options.results.is_some() {
                        self.ask_for_results();
                    }
                    kill_group(self.pid);
                    self.until_end(POWER_OFF);
                    return self.conclude(cache, options, None, None, true);
                }
                Err(RecvTimeoutError::Disconnected) => bail!("all of QEMU's channels are closed"),
            }
        }
        if output_gone || !self.until_end(POWER_OFF) {
            if !output_gone {
                note(format_args!("the machine did not power off within {} s: stopped", POWER_OFF.as_secs()));
            }
            kill_group(self.pid);
            self.until_end(POWER_OFF);
        }
        if output_gone {
            bail!("cannot pass on the command's output: the reader has closed it");
        }
        self.conclude(cache, options, verdict, trouble, false)
    }

    /// Waits for QEMU's end; whether it came in time.
    fn until_end(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Ended(_)) | Err(RecvTimeoutError::Disconnected) => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
            }
        }
    }

    fn late_verdict(&mut self) -> Option<u8> {
        while let Ok(event) = self.events.recv_timeout(Duration::from_millis(500)) {
            if let Event::Said(line) = event {
                self.up = true;
                if let Some(code) = line.strip_prefix("exit ") {
                    return code.parse().ok();
                }
            }
        }
        None
    }

    /// Magic SysRq over the serial line: it works as long as interrupts do.
    fn ask_for_tasks(&mut self) {
        let _ = self.monitor.write_all(b"{\"execute\":\"qmp_capabilities\"}\n");
        // 7: everything to the console; w: blocked tasks; l: what runs; t: all tasks.
        for key in [b'7', b'w', b'l', b't'] {
            let _ =
                self.monitor.write_all(b"{\"execute\":\"chardev-send-break\",\"arguments\":{\"id\":\"console\"}}\n");
            thread::sleep(Duration::from_millis(300));
            let _ = self.console.write_all(&[key]);
            self.until_quiet(Duration::from_secs(1), Duration::from_secs(10));
        }
    }

    /// Waits until the console has been silent for `pause`, but no longer than `limit`.
    fn until_quiet(&self, pause: Duration, limit: Duration) {
        let size = || fs::metadata(&self.log).map_or(0, |meta| meta.len());
        let deadline = Instant::now() + limit;
        let mut last = (size(), Instant::now());
        while Instant::now() < deadline && last.1.elapsed() < pause {
            thread::sleep(Duration::from_millis(50));
            let now = size();
            if now != last.0 {
                last = (now, Instant::now());
            }
        }
    }

    /// Lets the guest go on when its archive of so many bytes is here.
    fn receive_results(&mut self, bytes: u64) {
        let deadline = Instant::now() + RESULTS;
        while fs::metadata(&self.archive).map_or(0, |meta| meta.len()) < bytes && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
        // If the guest is gone, its end is the next that is heard of it.
        let _ = self.control.write_all(b"received\n");
    }

    /// What the command left in /results so far.
    fn ask_for_results(&mut self) {
        if self.control.write_all(b"collect\n").is_err() {
            return;
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::Said(line)) if line == "collected" => return,
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }

    /// Passes the rest on, judges the kernel's log, and turns all of it into an exit status.
    fn conclude(
        self,
        cache: &Cache,
        options: &Run,
        verdict: Option<u8>,
        trouble: Option<String>,
        timed_out: bool,
    ) -> Result<Outcome> {
        terminal::restore();
        // Our ends that are only written to; then the threads see the end of all the others.
        for channel in [&self.monitor, &self.control] {
            let _ = channel.shutdown(Shutdown::Both);
        }
        for pump in self.pumps {
            let _ = pump.join();
        }
        let bytes = fs::read(&self.log).context("cannot read the console log")?;
        let log = String::from_utf8_lossy(&bytes).replace('\r', "");
        if let Some(dir) = &options.results {
            fs::write(dir.join("console.log"), &log)
                .with_context(|| format!("cannot write the console log to {}", dir.display()))?;
            unpack(&self.archive, dir, verdict.is_some())?;
        }
        let fault = console::fault(&log);
        if self.may_start_again
            && !self.up
            && verdict.is_none()
            && !timed_out
            && let Some(fault) = fault
        {
            note(format_args!(
                "the kernel died while booting ({fault}), as emulated ones sometimes do; restarting; log: {}",
                keep(cache, &log)?.display()
            ));
            return Ok(Outcome::DiedBooting);
        }
        let code = match (verdict, &fault) {
            (Some(code), None) => return Ok(Outcome::Status(code)),
            _ if timed_out => TIMED_OUT,
            _ => GUEST_FAILED,
        };
        if let Some(around) = console::around_fault(&log) {
            note("the guest's kernel says:");
            eprintln!("{around}");
        }
        if timed_out && fault.is_none() {
            note("the guest's kernel log, with the tasks that wait for it:");
            eprintln!("{}", console::blocked(&log));
        } else if fault.is_none() || verdict.is_none() {
            note(format_args!("the last {TAIL} lines of the kernel's log:"));
            eprintln!("{}", console::tail(&log, TAIL));
        }
        let kept = keep(cache, &log)?;
        note(format_args!("the whole log: {}", kept.display()));
        if timed_out {
            note("the command did not end in time");
        } else {
            match (verdict, trouble, fault) {
                (Some(code), _, Some(fault)) => {
                    note(format_args!("the command ended with status {code}, but the guest's kernel failed: {fault}"))
                }
                (None, Some(trouble), _) => note(format_args!("the machine ended early: {trouble}")),
                (_, _, Some(fault)) => note(format_args!("the guest's kernel failed: {fault}")),
                (_, _, None) => note("the machine ended before the command did"),
            }
        }
        Ok(Outcome::Status(code))
    }
}

/// Copies until the end; a target that cannot be written to is told to `tell`, and the source is
/// read on, so that the guest never blocks on us.
fn pump(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    tell: Option<Sender<Event>>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        let mut writable = true;
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            if writable && to.write_all(&buffer[..count]).and_then(|()| to.flush()).is_err() {
                writable = false;
                if let Some(tell) = &tell {
                    let _ = tell.send(Event::OutputGone);
                }
            }
        }
    })
}

fn listen(status: UnixStream, sender: Sender<Event>) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(status).lines().map_while(Result::ok) {
            if sender.send(Event::Said(line)).is_err() {
                break;
            }
        }
    })
}

/// Brings /results to the host. An archive that was cut off by the machine's death gives what it
/// has; one that had to be `whole` and is not is an error.
fn unpack(archive: &Path, dir: &Path, whole: bool) -> Result<()> {
    if fs::metadata(archive).map_or(0, |meta| meta.len()) == 0 {
        return Ok(());
    }
    let unpacked =
        run_quietly(Command::new("tar").args(["-x", "--no-same-owner", "-f"]).arg(archive).arg("-C").arg(dir));
    match unpacked {
        Err(error) if whole => Err(error.context("the results are not complete")),
        Err(error) => {
            note(format_args!("the results are not complete: {error:#}"));
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Keeps the log of a run that failed.
fn keep(cache: &Cache, log: &str) -> Result<PathBuf> {
    let logs = cache.dir("logs")?;
    prune(&logs, 20);
    let stamp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let path = logs.join(format!("console-{stamp}-{}.log", std::process::id()));
    fs::write(&path, log).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::quote;

    #[test]
    fn quoted_words_come_back_as_they_were() {
        for word in ["", "a b", "it's", "$HOME `x` \\ \"", "a\nb", "-n", "''"] {
            let script = format!("printf %s {}", quote(word));
            let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8_lossy(&output.stdout), word);
        }
    }
}
