// SPDX-License-Identifier: MIT OR Apache-2.0

//! The client's end of the statistics socket.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, socket, sockopt};
use nix::unistd::geteuid;

use super::protocol::{Report, socket_name};
use crate::cli::failure::Failure;
use crate::cli::run_dir::RunDir;
use crate::errno::Errno;
use crate::units::DeviceId;

/// How long a server may take to answer. While it ends devices, it may be slower than usual.
const SERVER_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum length of an answer in bytes: more than the largest number of queues needs.
const MAX_ANSWER: usize = 64 << 20;

/// Why a server did not answer.
#[derive(Debug)]
pub(super) enum QueryError {
    /// There is no socket.
    NoSocket,
    /// The process that listened at the socket has exited.
    Exited,
    /// Anything else.
    Failed(String),
}

/// Asks the server with the given process id for a device's statistics.
pub(in crate::cli) fn query(pid: u32, id: DeviceId) -> Result<Report, Failure> {
    let name = socket_name(pid);
    let directory = RunDir::find();
    let queried = directory
        .as_ref()
        .map_or(Err(QueryError::NoSocket), |directory| query_socket(directory, &name, id, SERVER_TIMEOUT));
    queried.map_err(|error| {
        let reason = match error {
            QueryError::NoSocket => format!(
                "process {pid} serves it, which is not a server of this program or has no {} (another mount \
                 namespace, another user?)",
                RunDir::location().join(&name).display()
            ),
            QueryError::Exited => {
                let _ = directory.as_ref().map(|directory| directory.remove(&name));
                format!("process {pid} served it, and has exited")
            }
            QueryError::Failed(reason) => format!("process {pid} serves it: {reason}"),
        };
        Failure::Text(format!("no server answers for device {id}: {reason}"))
    })
}

/// Sends a request to a socket and receives the answer, until `timeout` at most.
pub(super) fn query_socket(
    directory: &RunDir,
    name: &str,
    id: DeviceId,
    timeout: Duration,
) -> Result<Report, QueryError> {
    let deadline = Instant::now() + timeout;
    let path = directory.path_of(name);
    let failed = |what: &str, e: &dyn std::fmt::Display| QueryError::Failed(format!("{what} {}: {e}", path.display()));
    let mut stream = open(directory, name, deadline)?;
    // It fits into the socket's buffer.
    stream.write_all(format!("stat {id}\n").as_bytes()).map_err(|e| failed("writing to", &e))?;
    let mut answer = Vec::new();
    let mut part = vec![0; 64 << 10];
    while answer.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("reading from", &format!("no answer within {} s", timeout.as_secs())));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| failed("reading from", &e))?;
        match stream.read(&mut part) {
            Ok(0) => return Err(failed("reading from", &"the server closed the connection")),
            Ok(len) if answer.len() + len <= MAX_ANSWER => answer.extend_from_slice(&part[..len]),
            Ok(_) => return Err(failed("reading from", &format!("the answer exceeds {MAX_ANSWER} bytes"))),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::TimedOut) => {}
            Err(e) => return Err(failed("reading from", &e)),
        }
    }
    let report: Report = serde_json::from_slice(&answer).map_err(|e| failed("decoding the answer from", &e))?;
    match report.error {
        Some(error) => Err(failed("refused at", &error)),
        None => Ok(report),
    }
}

/// Connects to a server of this user. If its queue of connections is full, waits until `deadline` at most.
fn open(directory: &RunDir, name: &str, deadline: Instant) -> Result<UnixStream, QueryError> {
    let path = directory.path_of(name);
    let failed = |errno: Errno| QueryError::Failed(format!("connecting to {}: {}", path.display(), errno.desc()));
    let address = UnixAddr::new(&directory.through(name)).map_err(Errno::from).map_err(failed)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(Errno::from).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address).map_err(Errno::from) {
            Ok(()) => break,
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::ENOENT) => return Err(QueryError::NoSocket),
            Err(Errno::ECONNREFUSED) => return Err(QueryError::Exited),
            Err(errno) => return Err(failed(errno)),
        }
    }
    let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(Errno::from).map_err(failed)?;
    if peer.uid() != geteuid().as_raw() {
        let reason = format!("process {} of user {} listens at {}", peer.pid(), peer.uid(), path.display());
        return Err(QueryError::Failed(reason));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|e| failed(crate::error::errno_of(&e)))?;
    Ok(stream)
}

/// Removes the sockets of this user's servers that are dead.
pub(in crate::cli) fn remove_stale_sockets() {
    if let Some(directory) = RunDir::find() {
        remove_stale(&directory);
    }
}

/// Removes the sockets of dead servers from a directory.
pub(super) fn remove_stale(directory: &RunDir) {
    for name in directory.names() {
        let name = name.to_str().unwrap_or_default();
        let pid = name.strip_prefix("server-").and_then(|name| name.strip_suffix(".sock"));
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        // A server in another pid namespace may be running.
        let has_exited = !Path::new(&format!("/proc/{pid}")).exists();
        if has_exited && matches!(open(directory, name, Instant::now()), Err(QueryError::Exited)) {
            log::debug!("{} belongs to a server that has exited", directory.path_of(name).display());
            if let Err(e) = directory.remove(name) {
                log::debug!("removing {}: {e}", directory.path_of(name).display());
            }
        }
    }
}
