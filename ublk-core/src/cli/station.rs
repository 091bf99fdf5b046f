// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a server can be asked what its devices do: the Unix socket `/run/ublk/server-PID.sock`.
//!
//! A question is a line, an answer is JSON, and then the connection ends. No side waits longer than a few
//! seconds for the other.

use std::collections::BTreeMap;
use std::fs::{self, Permissions};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Failure;
use super::daemon::RUN_DIR;
use crate::device::Device;
use crate::stats::{DeviceStats, OpStats};
use crate::units::DeviceId;

/// How long one side waits for the other.
const PATIENCE: Duration = Duration::from_secs(2);
/// Longest question.
const LONGEST: u64 = 256;

/// A device's numbers on their way.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Report {
    /// All queues together, by operation.
    pub(super) total: BTreeMap<String, OpStats>,
    pub(super) queues: BTreeMap<u16, BTreeMap<String, OpStats>>,
    /// What kept the server from answering.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

impl Report {
    fn of(stats: &DeviceStats) -> Self {
        let named =
            |all: &BTreeMap<crate::Op, OpStats>| all.iter().map(|(op, stats)| (op.name().to_owned(), *stats)).collect();
        Report {
            total: named(&stats.total),
            queues: stats.queues.iter().map(|(queue, all)| (*queue, named(all))).collect(),
            error: None,
        }
    }
}

fn path(pid: u32) -> PathBuf {
    Path::new(RUN_DIR).join(format!("server-{pid}.sock"))
}

/// The server's end.
#[derive(Debug)]
pub(super) struct Station {
    listener: UnixListener,
    path: PathBuf,
}

impl Station {
    /// Makes this process's socket, for its user only.
    pub(super) fn open() -> io::Result<Self> {
        let path = path(std::process::id());
        fs::create_dir_all(RUN_DIR)?;
        // A dead process's, whose number is this one's now.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        let station = Station { listener, path };
        fs::set_permissions(&station.path, Permissions::from_mode(0o600))?;
        station.listener.set_nonblocking(true)?;
        Ok(station)
    }

    /// Answers whoever has connected.
    pub(super) fn answer(&self, devices: &[Device]) {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) => return log::warn!("a question to the server: {e}"),
            };
            if let Err(e) = answer(&stream, devices) {
                log::debug!("a question to the server: {e}");
            }
        }
    }
}

impl AsFd for Station {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.path) {
            log::warn!("removing {}: {e}", self.path.display());
        }
    }
}

fn answer(mut stream: &UnixStream, devices: &[Device]) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut question = String::new();
    BufReader::new(stream.take(LONGEST)).read_line(&mut question)?;
    let device = question.trim_end().strip_prefix("stat ").and_then(|id| id.parse().ok()).map(DeviceId);
    let report = match device.map(|id| devices.iter().find(|device| device.id() == id)) {
        Some(Some(device)) => Report::of(&device.stats()),
        Some(None) => Report { error: Some("this server does not have the device".into()), ..Report::default() },
        None => Report { error: Some(format!("no such question: {question:?}")), ..Report::default() },
    };
    let mut text = serde_json::to_vec(&report).map_err(io::Error::other)?;
    text.push(b'\n');
    stream.write_all(&text)
}

/// Asks the server with the given process id for a device's numbers.
pub(super) fn ask(pid: u32, id: DeviceId) -> Result<Report, Failure> {
    let path = path(pid);
    let failed = |what: &str, e: &dyn std::fmt::Display| {
        let hint = "it is not a server of this program, or of another user";
        Failure::Text(format!("device {id} is served by process {pid}, {what} {}: {e} ({hint}?)", path.display()))
    };
    let ask = || {
        let mut stream = UnixStream::connect(&path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(format!("stat {id}\n").as_bytes())?;
        let mut text = Vec::new();
        stream.read_to_end(&mut text)?;
        Ok::<_, io::Error>(text)
    };
    let text = ask().map_err(|e| failed("which does not answer at", &e))?;
    let report: Report = serde_json::from_slice(&text).map_err(|e| failed("whose answer is not understood at", &e))?;
    match report.error {
        Some(error) => Err(failed("which says at", &error)),
        None => Ok(report),
    }
}
