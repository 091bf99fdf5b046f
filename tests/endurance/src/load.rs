// SPDX-License-Identifier: MIT OR Apache-2.0

//! fio: one session after the other, each of which writes its part of the disk once, reads in between, and
//! verifies what was acknowledged.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::process::Process;
use crate::report::Tally;
use crate::store::LOAD_BYTES;
use ublk_test_common::random::Random;

/// What is to be expected of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Errors {
    /// No request may fail.
    Never,
    /// Requests may fail while there is no server; the session goes on.
    Endured,
    /// The disk goes with its server, and the session with the disk.
    Fatal,
}

/// A running session.
#[derive(Debug)]
pub(crate) struct Load {
    fio: Process,
    errors: Errors,
    output: PathBuf,
    complaints: PathBuf,
}

impl Load {
    pub(crate) fn start(disk: &str, errors: Errors, directory: &Path, random: &mut Random) -> Result<Self> {
        let output = directory.join("fio.json");
        let complaints = directory.join("fio.err");
        let engine = if random.chance(50) { "libaio" } else { "io_uring" };
        let mut command = Command::new("fio");
        command
            .args(["--name=load", "--thread", "--direct=1", "--rw=randrw", "--iodepth=16"])
            .args(["--bssplit=4k/80:16k/15:64k/5", "--randrepeat=0", "--allow_file_create=0"])
            .args(["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=64", "--do_verify=1"])
            .args(["--output-format=json", "--eta=never"])
            .arg(format!("--filename={disk}"))
            .arg(format!("--ioengine={engine}"))
            .arg(format!("--size={LOAD_BYTES}"))
            .arg(format!("--randseed={}", random.below(1 << 31)))
            .arg(format!("--output={}", output.display()));
        if errors == Errors::Endured {
            // Not those of verification.
            command.arg("--continue_on_error=io");
        }
        command.stdout(File::create(directory.join("fio.out"))?).stderr(File::create(&complaints)?);
        Ok(Load { fio: Process::start("fio", &mut command)?, errors, output, complaints })
    }

    /// Judges the session if it has come to its end. True if so.
    pub(crate) fn ended(&mut self, tally: &mut Tally) -> Result<bool> {
        match self.fio.ended()? {
            Some(_) => self.judge(false, tally).map(|()| true),
            None => Ok(false),
        }
    }

    /// Waits until the session is through.
    pub(crate) fn finish(mut self, tally: &mut Tally) -> Result<()> {
        self.fio.wait()?;
        self.judge(false, tally)
    }

    /// The disk is gone: all requests have ended, so the session can.
    pub(crate) fn disk_gone(mut self, tally: &mut Tally) -> Result<()> {
        if self.errors == Errors::Endured {
            self.fio.signal(libc::SIGTERM);
        }
        self.fio.wait()?;
        self.judge(true, tally)
    }

    fn judge(&self, disk_gone: bool, tally: &mut Tally) -> Result<()> {
        let complaints = String::from_utf8_lossy(&std::fs::read(&self.complaints)?).into_owned();
        let text = std::fs::read_to_string(&self.output).unwrap_or_default();
        // Messages may stand before the report.
        let (messages, report) = text.split_at(text.find("\n{").map_or(0, |at| at + 1));
        // Reads from a disk that is gone move nothing and fail not: fio then verifies what was in its buffer before.
        if !disk_gone {
            let mut lines = complaints.lines().chain(messages.lines());
            if let Some(line) = lines.find(|line| line.contains("verif")) {
                bail!("fio finds other data than was acknowledged: {line}");
            }
        }
        if disk_gone && report.is_empty() {
            // It had only begun.
            return Ok(());
        }
        let report: Value = serde_json::from_str(report)
            .with_context(|| format!("fio's report: {}", complaints.lines().last().unwrap_or("nothing")))?;
        let job = &report["jobs"][0];
        let count = |value: &Value| value.as_u64().context("fio's report lacks a number");
        if disk_gone && job.is_null() {
            // The disk went before the session could begin.
            return Ok(());
        }
        let error = count(&job["error"])?;
        // Counted only where sessions go on after errors.
        let errors = job["total_err"].as_u64().unwrap_or(u64::from(error != 0));
        tally.load_ios += count(&job["read"]["total_ios"])? + count(&job["write"]["total_ios"])?;
        tally.load_errors += errors;
        if !disk_gone && error == libc::EILSEQ as u64 {
            bail!("fio finds other data than was acknowledged");
        }
        if self.errors == Errors::Never && !disk_gone && error != 0 {
            let what = complaints.lines().chain(messages.lines()).next().unwrap_or("no message");
            bail!("fio sees an error: {} ({what})", std::io::Error::from_raw_os_error(error as i32));
        }
        if !disk_gone {
            tally.sessions += 1;
        }
        Ok(())
    }
}
