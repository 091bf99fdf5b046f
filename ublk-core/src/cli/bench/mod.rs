// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk bench`: measures disks on this machine.
//!
//! * `job`: which requests a job sends; `requests`: their sequence. `client`: sends them with io_uring.
//! * `windows`: what of a run is measured; `work`: the CPU time meanwhile; `perf`: hardware counters; `marks`: windows for an
//!   instruction counter. `pin`: the client's CPU.
//! * `disk`: an open disk; `measure`: runs a job on it.
//! * `candidates`: the disks that are measured if none is given; `created`: creates and removes them, with programs that
//!   `helper` runs; `backing_file`: the temporary file below them.
//! * `figures`: the results of windows and jobs; `conditions`: of which machine; `document`: all results; `table` and
//!   `plot`: their formats.

mod backing_file;
mod candidates;
mod client;
mod conditions;
mod created;
mod disk;
mod document;
mod figures;
mod helper;
mod job;
mod marks;
mod measure;
mod perf;
mod pin;
mod plot;
mod requests;
mod table;
mod windows;
mod work;

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use self::backing_file::BackingFile;
use self::candidates::{Candidate, Ready};
use self::client::Stop;
use self::conditions::Conditions;
use self::created::{Created, NotCreated};
use self::disk::{Access, Disk};
use self::document::{DiskResult, Document};
use self::job::Job;
use self::marks::Marks;
use self::measure::{Interrupted, Method, fill};
use self::perf::Scope;
use self::pin::Pinned;
use self::windows::Amount;
use super::failure::{Failure, Outcome};
use super::host::Host;
use super::output::print;
use super::server::Signals;
use super::size;
use crate::control::Control;

/// Maximum length of a window in seconds.
const MAX_SECONDS: f64 = 86_400.0;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Block devices to measure [default: disks of this project, and others that are available]
    #[arg(value_name = "DISK")]
    disks: Vec<PathBuf>,
    /// Job to run, (randread|randwrite|read|write|mixed)-SIZE-qdDEPTH; may be repeated; 70 % of mixed requests are reads
    /// [default: randread-4k-qd1, randread-4k-qd32, randwrite-4k-qd32 where writes are allowed, read-128k-qd32]
    #[arg(long = "job", value_name = "JOB")]
    jobs: Vec<Job>,
    /// Run jobs that write also on disks that existed before, which destroys their data; refuses disks in use
    #[arg(long)]
    write: bool,
    /// Size of the created disks that store data, in memory and in a file
    #[arg(long, value_name = "SIZE", default_value = "256M", value_parser = file_size, conflicts_with = "disks")]
    size: u64,
    /// Directory for the temporary file of these disks [default: $TMPDIR or /tmp]
    #[arg(long, value_name = "DIR", conflicts_with = "disks")]
    directory: Option<PathBuf>,
    /// Length of a window
    #[arg(long, value_name = "SECONDS", default_value = "2", value_parser = seconds, conflicts_with = "requests")]
    seconds: Duration,
    /// Length of a window as a number of requests
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    requests: Option<u64>,
    /// Number of windows per job
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    windows: u32,
    /// Pin the client to a CPU
    #[arg(long, value_name = "CPU")]
    cpu: Option<usize>,
    /// Write all results as JSON to a file; `-` for standard output, instead of the table
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw a bar chart of the requests per second as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Mark the begin and the end of each window for the instruction counter of this project's testbed, instead of measuring
    /// times
    #[arg(long, requires = "requests", hide = true)]
    marks: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    if (0.001..=MAX_SECONDS).contains(&number) {
        Ok(Duration::from_secs_f64(number))
    } else {
        Err(format!("must be from 0.001 to {MAX_SECONDS} seconds"))
    }
}

/// Parses the size of a file: at least that of a request of any job that runs by default.
fn file_size(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    if bytes >= 1 << 20 && bytes.is_multiple_of(4096) {
        Ok(bytes)
    } else {
        Err("must be at least 1M, and a multiple of 4096".into())
    }
}

pub(super) fn run(args: &Args, host: &Host) -> Outcome {
    args.check()?;
    if args.marks && !Marks::AVAILABLE {
        return Err(Failure::Text("--marks: the instruction counter is for x86-64 only".into()));
    }
    let signals = Signals::block()?;
    // Fails now rather than after the first disk was created.
    drop(args.pin()?);
    let counters = if args.marks { Err("windows have marks instead".to_owned()) } else { Scope::find() };
    let mut document = Document {
        conditions: Conditions {
            client_cpu: args.cpu,
            counters: counters.as_ref().ok().map(|scope| scope.name()),
            counters_error: counters.as_ref().err().cloned(),
            ..Conditions::read()
        },
        marks: args.marks,
        disks: Vec::new(),
        absent: BTreeMap::new(),
        errors: Vec::new(),
    };
    let interrupted = args.measure(host, counters.ok(), &signals, &mut document).is_err();
    let printed = args.print(&document);
    let failures: Vec<_> = document.failures().collect();
    failures.iter().for_each(|failure| eprintln!("ublk: {failure}"));
    if let (Some(reason), false) = (&document.conditions.counters_error, args.marks) {
        eprintln!("ublk: instructions and cycles are not available: {reason}");
    }
    printed?;
    match (interrupted, signals.next()) {
        (true, Some(signal)) => Err(Failure::Text(format!("interrupted by {signal}"))),
        _ if failures.is_empty() => Ok(()),
        _ => Err(Failure::Reported),
    }
}

impl Args {
    /// Refuses jobs that write if that is not allowed.
    fn check(&self) -> Outcome {
        match self.jobs.iter().find(|job| job.writes() && !self.write) {
            Some(job) if !self.disks.is_empty() => {
                Err(Failure::Text(format!("{job} destroys the data of the disk; --write allows it")))
            }
            _ => Ok(()),
        }
    }

    /// The jobs for a disk that may or may not be written to.
    fn jobs(&self, write: bool) -> Vec<Job> {
        let jobs = if self.jobs.is_empty() { &Job::DEFAULT[..] } else { &self.jobs };
        jobs.iter().copied().filter(|job| write || !job.writes()).collect()
    }

    /// Measures all disks. Failures are part of the results.
    fn measure(
        &self,
        host: &Host,
        counters: Option<Scope>,
        signals: &Signals,
        document: &mut Document,
    ) -> Result<(), Interrupted> {
        let amount = self.requests.map_or(Amount::Time(self.seconds), Amount::Requests);
        let marks = self.marks.then(Marks::default);
        let mut method = Method { amount, windows: self.windows, marks, counters };
        if self.disks.is_empty() {
            return self.measure_candidates(host, &mut method, signals, document);
        }
        let access = Access { write: self.write, unused: self.write };
        for path in &self.disks {
            let name = path.display().to_string();
            match Disk::open(&name, path, access) {
                Ok(disk) => self.measure_disk(&disk, self.write, &mut method, signals, document)?,
                Err(failure) => {
                    let reason = failure.message().unwrap_or_default();
                    document.errors.push(reason.clone());
                    document.absent.insert(name, reason);
                }
            }
        }
        Ok(())
    }

    /// Measures disks of this project and of others, one after the other, each of which exists only meanwhile.
    fn measure_candidates(
        &self,
        host: &Host,
        method: &mut Method,
        signals: &Signals,
        document: &mut Document,
    ) -> Result<(), Interrupted> {
        let driver = Control::open().map_err(|error| error.to_string());
        document.errors.extend(driver.as_ref().err().cloned());
        let directory = self.directory.clone().unwrap_or_else(std::env::temp_dir);
        let file = match BackingFile::create(&directory, self.size, signals.as_fd()) {
            Ok(file) => Some(file),
            Err(NotCreated::Interrupted) => return Err(Interrupted),
            Err(NotCreated::Absent(reason)) => {
                document.errors.push(reason);
                None
            }
        };
        let path = file.as_ref().map(BackingFile::path);
        for candidate in Candidate::all(host, path.unwrap_or(Path::new("")), self.size) {
            if let Some(reason) = candidate.missing(driver.as_ref().err(), path.is_some()) {
                document.absent.insert(candidate.name, reason);
                continue;
            }
            match candidate.create(host, self.write, signals.as_fd()) {
                Ok(ready) => self.measure_candidate(&candidate, ready, method, signals, document)?,
                Err(NotCreated::Interrupted) => return Err(Interrupted),
                Err(NotCreated::Absent(reason)) => {
                    if candidate.is_own() {
                        document.errors.push(format!("{}: {reason}", candidate.name));
                    }
                    document.absent.insert(candidate.name, reason);
                }
            }
        }
        Ok(())
    }

    /// Measures a disk and removes it.
    fn measure_candidate(
        &self,
        candidate: &Candidate<'_>,
        ready: Ready,
        method: &mut Method,
        signals: &Signals,
        document: &mut Document,
    ) -> Result<(), Interrupted> {
        let Ready { disk, created } = ready;
        let write = candidate.is_created() || self.write;
        let filled = if candidate.is_empty() && write { fill(&disk, signals.as_fd()) } else { Ok(()) };
        let measured = match filled {
            Ok(()) => self.measure_disk(&disk, write, method, signals, document),
            Err(Stop::Interrupted) => Err(Interrupted),
            Err(Stop::Failed(reason)) => {
                document.errors.push(format!("{}: filling it: {reason}", disk.name));
                Ok(())
            }
        };
        // Before its removal, which would wait for this.
        drop(disk);
        if let Some(Err(reason)) = created.map(Created::remove) {
            document.errors.push(reason);
        }
        measured
    }

    /// Pins the client, if that is wanted.
    fn pin(&self) -> Result<Option<Pinned>, Failure> {
        let pin =
            |cpu| Pinned::to(cpu).map_err(|errno| Failure::Text(format!("pinning the client to CPU {cpu}: {errno}")));
        self.cpu.map(pin).transpose()
    }

    /// Runs all jobs on a disk that may or may not be written to, and adds the results.
    fn measure_disk(
        &self,
        disk: &Disk,
        write: bool,
        method: &mut Method,
        signals: &Signals,
        document: &mut Document,
    ) -> Result<(), Interrupted> {
        // Servers were started before, and do not inherit it.
        let _pinned = self.pin().map_err(|failure| document.errors.extend(failure.message()));
        let mut result = DiskResult {
            name: disk.name.clone(),
            path: disk.path.clone(),
            server_cpus: disk.server_cpus(),
            jobs: Vec::new(),
        };
        let mut outcome = Ok(());
        for job in self.jobs(write) {
            eprintln!("ublk: measuring {} {job}", disk.name);
            let (job, ended) = method.measure(disk, job, signals.as_fd());
            result.jobs.push(job);
            if ended.is_err() {
                outcome = ended;
                break;
            }
        }
        document.disks.push(result);
        outcome
    }

    /// Writes the results to standard output or a file. If the file cannot be written, the table is still printed.
    fn print(&self, document: &Document) -> Outcome {
        let write = |path: &Path, text: String| {
            fs::write(path, text).map_err(|e| Failure::Text(format!("writing {}: {e}", path.display())))
        };
        let json = || document.json().map_err(|e| Failure::Text(format!("writing JSON: {e}")));
        let plotted = self.plot.as_ref().map_or(Ok(()), |path| write(path, plot::svg(document)));
        let (saved, text) = match &self.json {
            Some(path) if path.as_os_str() == "-" => (Ok(()), json()?),
            Some(path) => (json().and_then(|text| write(path, text)), table::table(document)),
            None => (Ok(()), table::table(document)),
        };
        print(&text).and(saved).and(plotted)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Line::try_parse_from(["bench"].iter().chain(line)).map(|line| line.args)
    }

    #[test]
    fn without_write_only_reads_are_measured() {
        let names = |line: &[&str]| {
            let args = parse(line).unwrap();
            args.check().map_err(|failure| failure.message().unwrap())?;
            Ok::<_, String>(args.jobs(args.write).iter().map(Job::to_string).collect::<Vec<_>>())
        };
        assert_eq!(names(&["/dev/x"]).unwrap(), ["randread-4k-qd1", "randread-4k-qd32", "read-128k-qd32"]);
        assert_eq!(names(&["/dev/x", "--write"]).unwrap().len(), 4);
        let error = names(&["/dev/x", "--job", "mixed-4k-qd1"]).unwrap_err();
        assert!(error.starts_with("mixed-4k-qd1 destroys the data"), "{error}");
        parse(&["--job", "mixed-4k-qd1"]).unwrap().check().unwrap();
        assert_eq!(names(&["/dev/x", "--job", "mixed-4k-qd1", "--write"]).unwrap(), ["mixed-4k-qd1"]);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for line in [
            &["/dev/x", "--job", "trim-4k-qd1"][..],
            &["/dev/x", "--marks"],
            &["/dev/x", "--seconds", "1", "--requests", "5"],
            &["/dev/x", "--seconds", "0"],
            &["/dev/x", "--requests", "0"],
            &["/dev/x", "--windows", "0"],
            &["/dev/x", "--size", "1G"],
            &["--size", "4K"],
        ] {
            parse(line).unwrap_err();
        }
        parse(&["/dev/x", "--marks", "--requests", "5"]).unwrap();
    }
}
