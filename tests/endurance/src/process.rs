// SPDX-License-Identifier: MIT OR Apache-2.0

//! Processes that are killed, and whose end is waited for, but not for ever.

use std::io::{BufRead, BufReader};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::waiting::PATIENCE;

/// A child process. It is killed when it is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    what: String,
    child: Child,
    /// Readable when the process has ended.
    end: OwnedFd,
}

impl Process {
    pub(crate) fn start(what: &str, command: &mut Command) -> Result<Self> {
        let child = command.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {what}"))?;
        // SAFETY: a plain system call; the child has not been waited for, so the number is its.
        let end = unsafe { libc::syscall(libc::SYS_pidfd_open, child.id(), 0) };
        if end < 0 {
            return Err(std::io::Error::last_os_error()).context("pidfd_open");
        }
        // SAFETY: the descriptor is new and has no other owner.
        let end = unsafe { OwnedFd::from_raw_fd(end as i32) };
        Ok(Process { what: what.to_owned(), child, end })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The status, if the process has ended.
    pub(crate) fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    pub(crate) fn signal(&self, number: i32) {
        // SAFETY: a plain system call; the child is waited for by this object only, so the number is still its.
        unsafe { libc::kill(self.child.id() as i32, number) };
    }

    /// Waits for the end.
    pub(crate) fn wait(&mut self) -> Result<ExitStatus> {
        let begin = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            let left = PATIENCE.saturating_sub(begin.elapsed());
            if left.is_zero() {
                bail!("{} (process {}) does not end", self.what, self.id());
            }
            let mut poll = libc::pollfd { fd: self.end.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure, which is there.
            unsafe { libc::poll(&raw mut poll, 1, left.as_millis() as i32 + 1) };
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(libc::SIGKILL);
        // One that cannot die stays a zombie or worse: the caller that waited for it has reported that.
        let _ = self.child.try_wait();
    }
}

/// A process that says on its standard output how far it is.
#[derive(Debug)]
pub(crate) struct Talker {
    pub(crate) process: Process,
    words: Receiver<String>,
}

impl Talker {
    pub(crate) fn start(what: &str, command: &mut Command) -> Result<Self> {
        let mut process = Process::start(what, command.stdout(Stdio::piped()))?;
        let output = process.child.stdout.take().context("the output was just made")?;
        let (tell, words) = mpsc::channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Talker { process, words })
    }

    /// Waits for a word that has to come, over others.
    pub(crate) fn expect(&mut self, word: &str) -> Result<()> {
        let begin = Instant::now();
        loop {
            match self.words.recv_timeout(PATIENCE.saturating_sub(begin.elapsed())) {
                Ok(said) if said == word => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => bail!("{} never says '{word}'", self.process.what),
            }
        }
        let status = self.process.wait()?;
        bail!("{} ended before '{word}': {status}", self.process.what)
    }

    /// Waits for an end that has to be a success.
    pub(crate) fn succeed(&mut self) -> Result<()> {
        let status = self.process.wait()?;
        if status.success() { Ok(()) } else { bail!("{} ended with {status}", self.process.what) }
    }

    /// SIGKILL, and the wait for what it does.
    pub(crate) fn kill(&mut self) -> Result<Duration> {
        let begin = Instant::now();
        self.process.signal(libc::SIGKILL);
        self.dead()?;
        Ok(begin.elapsed())
    }

    /// Waits for an end by SIGKILL, or a peaceful one.
    pub(crate) fn dead(&mut self) -> Result<()> {
        let status = self.process.wait()?;
        if status.signal() == Some(libc::SIGKILL) || status.success() {
            return Ok(());
        }
        bail!("{} ended with {status}", self.process.what)
    }
}
