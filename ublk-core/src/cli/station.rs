// SPDX-License-Identifier: MIT OR Apache-2.0

//! Where a server can be asked what its devices do: the Unix socket `/run/ublk/server-PID.sock`, for its own user.
//!
//! A question is a line, an answer is a line of JSON, and then the connection ends. The server's side lives in the
//! thread that waits for signals and for the devices' ends, so it never waits for a client: each has a deadline, and
//! there is a limit to their number and their lines. The client's side waits a few seconds at most.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::geteuid;
use serde::{Deserialize, Serialize};

use super::Failure;
use super::run_dir::RunDir;
use crate::device::Device;
use crate::stats::{DeviceStats, OpStats};
use crate::units::DeviceId;

/// How long a client may take for its question, and then for taking the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// Clients at a time; more are sent away.
const MOST_CLIENTS: usize = 16;
/// Longest question.
const LONGEST: usize = 256;

/// How long a server may take to answer. It does little else than answer and wait, but ends devices, too.
const SERVER_PATIENCE: Duration = Duration::from_secs(5);
/// Longest answer, from a server with far more queues than there are.
const LONGEST_ANSWER: usize = 64 << 20;

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
    pub(super) fn of(stats: &DeviceStats) -> Self {
        let named = |all: &BTreeMap<crate::Op, OpStats>| {
            all.iter().map(|(op, stats)| (op.name().to_owned(), stats.clone())).collect()
        };
        Report {
            total: named(&stats.total),
            queues: stats.queues.iter().map(|(queue, all)| (*queue, named(all))).collect(),
            error: None,
        }
    }

    fn refusal(why: impl Into<String>) -> Self {
        Report { error: Some(why.into()), ..Report::default() }
    }
}

/// The server's end. Its descriptor is readable when somebody wants something.
#[derive(Debug)]
pub(super) struct Station {
    listener: UnixListener,
    directory: RunDir,
    name: String,
    epoll: Epoll,
    clients: Vec<Client>,
    /// It was said that clients cannot be served.
    complained: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    question: Vec<u8>,
    /// What is left of the answer, once there is one.
    answer: Option<Vec<u8>>,
    deadline: Instant,
}

/// What has become of a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Waits,
    Done,
}

impl Station {
    /// Makes this process's socket, for its user only, and removes those of dead ones.
    pub(super) fn open() -> io::Result<Self> {
        let directory = RunDir::make()?;
        sweep(&directory);
        Self::open_in(directory, name(std::process::id()))
    }

    fn open_in(directory: RunDir, name: String) -> io::Result<Self> {
        // A dead process's, whose number is this one's now.
        directory.remove(&name)?;
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // The node gets this mode, so that at no time other users can connect.
        fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(&directory.through(&name))?)?;
        listen(&listener, Backlog::MAXCONN)?;
        let listener = UnixListener::from(listener);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let station = Station { listener, directory, name, epoll, clients: Vec::new(), complained: false };
        station.listener.set_nonblocking(true)?;
        station.epoll.add(&station.listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(station)
    }

    /// How long there can be nothing to do.
    pub(super) fn patience(&self) -> PollTimeout {
        let Some(first) = self.clients.iter().map(|client| client.deadline).min() else { return PollTimeout::NONE };
        // Rounded up, so that the deadline has passed then.
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    /// Answers whoever has asked, without waiting for anybody.
    pub(super) fn answer<'a>(&mut self, devices: impl Iterator<Item = &'a Device> + Clone) {
        self.answer_from(&|id| {
            devices.clone().find(|device| device.id() == id).map(|device| Report::of(&device.stats()))
        });
    }

    pub(super) fn answer_from(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) {
        self.accept();
        let now = Instant::now();
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| {
            let had_answer = client.answer.is_some();
            let step = client.advance(report);
            if step == Step::Waits && client.answer.is_some() && !had_answer {
                let mut event = EpollEvent::new(EpollFlags::EPOLLOUT, 0);
                if let Err(errno) = self.epoll.modify(&client.stream, &mut event) {
                    log::warn!("accepting a connection of `ublk stat`: {errno}");
                    return false;
                }
            }
            // Closing its descriptor takes it out of the epoll instance.
            step == Step::Waits && now < client.deadline
        });
        self.clients = clients;
    }

    fn accept(&mut self) {
        loop {
            let accepted = self.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                self.epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
                Ok(stream)
            });
            match accepted {
                Ok(stream) if self.clients.len() < MOST_CLIENTS => self.clients.push(Client {
                    stream,
                    question: Vec::new(),
                    answer: None,
                    deadline: Instant::now() + CLIENT_PATIENCE,
                }),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    // Out of descriptors, say; the client stays in the socket's queue.
                    if !std::mem::replace(&mut self.complained, true) {
                        log::warn!("cannot answer `ublk stat`: {e}");
                    }
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
            }
        }
    }
}

impl AsFd for Station {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Drop for Station {
    fn drop(&mut self) {
        if let Err(e) = self.directory.remove(&self.name) {
            log::warn!("removing {}: {e}", self.directory.name(&self.name).display());
        }
    }
}

impl Client {
    /// Reads and writes what can be without waiting.
    fn advance(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) -> Step {
        loop {
            let progress = match &mut self.answer {
                None => self.read(report),
                Some(rest) => self.stream.write(rest).map(|written| {
                    rest.drain(..written);
                    if rest.is_empty() || written == 0 { Step::Done } else { Step::Waits }
                }),
            };
            match progress {
                Ok(Step::Waits) => {}
                Ok(Step::Done) => return Step::Done,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Step::Waits,
                Err(e) => {
                    log::debug!("answering `ublk stat`: {e}");
                    return Step::Done;
                }
            }
        }
    }

    fn read(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) -> io::Result<Step> {
        let mut bytes = [0; LONGEST];
        let len = self.stream.read(&mut bytes)?;
        self.question.extend_from_slice(&bytes[..len]);
        let Some(end) = self.question.iter().position(|byte| *byte == b'\n') else {
            return Ok(if len == 0 || self.question.len() > LONGEST { Step::Done } else { Step::Waits });
        };
        let question = String::from_utf8_lossy(&self.question[..end]);
        let device = question.trim_end().strip_prefix("stat ").and_then(|id| id.parse().ok()).map(DeviceId);
        let answer = match device.map(report) {
            Some(Some(report)) => report,
            Some(None) => Report::refusal("this server does not have the device"),
            None => Report::refusal(format!("no such question: {question:?}")),
        };
        let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
        text.push(b'\n');
        self.answer = Some(text);
        self.deadline = Instant::now() + CLIENT_PATIENCE;
        Ok(Step::Waits)
    }
}

/// The name of a server's socket.
fn name(pid: u32) -> String {
    format!("server-{pid}.sock")
}

/// Removes the sockets of servers that are dead.
pub(super) fn sweep_all() {
    if let Some(directory) = RunDir::find() {
        sweep(&directory);
    }
}

fn sweep(directory: &RunDir) {
    for name in directory.names() {
        let name = name.to_str().unwrap_or_default();
        let pid = name.strip_prefix("server-").and_then(|name| name.strip_suffix(".sock"));
        let Some(pid) = pid.and_then(|pid| pid.parse::<u32>().ok()) else { continue };
        // One of another pid namespace may live.
        let is_gone = !Path::new(&format!("/proc/{pid}")).exists();
        if is_gone && matches!(call(directory, name, Instant::now()), Err(Silence::Dead)) {
            log::debug!("{} belongs to a server that has exited", directory.name(name).display());
            if let Err(e) = directory.remove(name) {
                log::debug!("removing {}: {e}", directory.name(name).display());
            }
        }
    }
}

/// Why there is no answer.
#[derive(Debug)]
enum Silence {
    /// There is no socket.
    NoSocket,
    /// Nobody listens at it any more.
    Dead,
    /// Anything else.
    Failed(String),
}

/// Asks the server with the given process id for a device's numbers.
pub(super) fn ask(pid: u32, id: DeviceId) -> Result<Report, Failure> {
    let name = name(pid);
    let directory = RunDir::find();
    let asked = directory.as_ref().map_or(Err(Silence::NoSocket), |directory| ask_at(directory, &name, id));
    asked.map_err(|silence| {
        let why = match silence {
            Silence::NoSocket => format!(
                "process {pid} serves it, which is not a server of this program or has no {} (another mount \
                 namespace, another user?)",
                RunDir::place().join(&name).display()
            ),
            Silence::Dead => {
                let _ = directory.as_ref().map(|directory| directory.remove(&name));
                format!("process {pid} served it, and is gone")
            }
            Silence::Failed(why) => format!("process {pid} serves it: {why}"),
        };
        Failure::Text(format!("no server answers for device {id}: {why}"))
    })
}

fn ask_at(directory: &RunDir, name: &str, id: DeviceId) -> Result<Report, Silence> {
    let deadline = Instant::now() + SERVER_PATIENCE;
    let path = directory.name(name);
    let failed = |what: &str, e: &dyn std::fmt::Display| Silence::Failed(format!("{what} {}: {e}", path.display()));
    let mut stream = call(directory, name, deadline)?;
    // It fits into the socket's buffer.
    stream.write_all(format!("stat {id}\n").as_bytes()).map_err(|e| failed("asking at", &e))?;
    let mut answer = Vec::new();
    let mut part = vec![0; 64 << 10];
    while answer.last() != Some(&b'\n') {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(failed("asking at", &format!("no answer within {} s", SERVER_PATIENCE.as_secs())));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| failed("asking at", &e))?;
        match stream.read(&mut part) {
            Ok(0) => return Err(failed("asking at", &"the server hung up")),
            Ok(len) if answer.len() + len <= LONGEST_ANSWER => answer.extend_from_slice(&part[..len]),
            Ok(_) => return Err(failed("asking at", &"the answer does not end")),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted | ErrorKind::TimedOut) => {}
            Err(e) => return Err(failed("asking at", &e)),
        }
    }
    let report: Report = serde_json::from_slice(&answer).map_err(|e| failed("understanding", &e))?;
    match report.error {
        Some(error) => Err(failed("it says at", &error)),
        None => Ok(report),
    }
}

/// Connects to a server of this user's; waits for other clients until `deadline` at most.
fn call(directory: &RunDir, name: &str, deadline: Instant) -> Result<UnixStream, Silence> {
    let path = directory.name(name);
    let failed = |errno: Errno| Silence::Failed(format!("connecting to {}: {}", path.display(), errno.desc()));
    let address = UnixAddr::new(&directory.through(name)).map_err(failed)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    loop {
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => break,
            Err(Errno::EAGAIN | Errno::EINTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(Errno::ENOENT) => return Err(Silence::NoSocket),
            Err(Errno::ECONNREFUSED) => return Err(Silence::Dead),
            Err(errno) => return Err(failed(errno)),
        }
    }
    let peer = getsockopt(&socket, sockopt::PeerCredentials).map_err(failed)?;
    if peer.uid() != geteuid().as_raw() {
        let why = format!("process {} of user {} listens at {}", peer.pid(), peer.uid(), path.display());
        return Err(Silence::Failed(why));
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(|e| failed(crate::error::errno_of(&e)))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;

    use nix::poll::{PollFd, PollFlags, poll};

    use super::*;

    /// The report of device `id`: that many queues.
    fn report(id: u32) -> Report {
        let queue = |n| (n, BTreeMap::from([("read".to_owned(), OpStats::default())]));
        Report { queues: (0..id as u16).map(queue).collect(), ..Report::default() }
    }

    /// A station on a thread of its own, as long as this lives. It knows devices below 20000.
    struct Running {
        end: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
        path: PathBuf,
        directory: tempfile::TempDir,
    }

    impl Running {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("sock");
            let mut station = Station::open_in(RunDir::open(directory.path()).unwrap(), "sock".into()).unwrap();
            let end = Arc::new(AtomicBool::new(false));
            let ended = end.clone();
            let thread = std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let mut fds = [PollFd::new(station.as_fd(), PollFlags::POLLIN)];
                    // To see the test's end.
                    poll(&mut fds, PollTimeout::from(10u8)).unwrap();
                    station.answer_from(&|id| (id.0 < 20_000).then(|| report(id.0)));
                }
            });
            Running { end, thread: Some(thread), path, directory }
        }

        fn ask(&self, id: u32) -> Result<Report, Silence> {
            ask_at(&RunDir::open(self.directory.path()).unwrap(), "sock", DeviceId(id))
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.end.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap();
            assert!(!self.path.exists(), "a server that ends takes its socket along");
        }
    }

    #[test]
    fn a_server_answers_for_each_of_its_devices() {
        let server = Running::new();
        assert_eq!(fs::metadata(&server.path).unwrap().permissions().mode() & 0o777, 0o600);
        for id in [1, 7] {
            assert_eq!(server.ask(id).unwrap().queues.len(), id as usize);
        }
        let Err(Silence::Failed(why)) = server.ask(20_000) else { panic!("it does not have that one") };
        assert!(why.contains("does not have the device"), "{why}");
    }

    #[test]
    fn an_answer_may_be_larger_than_the_sockets_buffer() {
        assert_eq!(Running::new().ask(19_999).unwrap().queues.len(), 19_999);
    }

    #[test]
    fn silent_dripping_and_babbling_clients_hold_up_nobody() {
        let server = Running::new();
        let silent: Vec<_> = (0..MOST_CLIENTS - 3).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
        let mut babbling = UnixStream::connect(&server.path).unwrap();
        let _ = babbling.write_all(&[b'x'; 4 * LONGEST]);
        let mut dripping = UnixStream::connect(&server.path).unwrap();
        for byte in *b"sta" {
            dripping.write_all(&[byte]).unwrap();
            let asked = Instant::now();
            assert_eq!(server.ask(3).unwrap().queues.len(), 3);
            assert!(asked.elapsed() < CLIENT_PATIENCE / 2, "{:?}", asked.elapsed());
        }
        // The silent ones are sent away in the end.
        for mut stream in silent.into_iter().chain([dripping]) {
            stream.set_read_timeout(Some(CLIENT_PATIENCE * 4)).unwrap();
            assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        }
    }

    #[test]
    fn too_many_clients_are_sent_away_and_others_served_again_later() {
        let server = Running::new();
        let silent: Vec<_> = (0..MOST_CLIENTS).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
        assert!(matches!(server.ask(1), Err(Silence::Failed(_))));
        drop(silent);
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(server.ask(1).unwrap().queues.len(), 1);
    }

    #[test]
    fn nonsense_is_told_from_questions() {
        let server = Running::new();
        let mut stream = UnixStream::connect(&server.path).unwrap();
        stream.write_all(b"what time is it?\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("no such question"), "{answer}");
    }

    #[test]
    fn a_dead_servers_socket_is_recognised_removed_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let dir = || RunDir::open(directory.path()).unwrap();
        let dead = |name: &str| {
            // Closed without being removed, as by a kill.
            drop(UnixListener::bind(directory.path().join(name)).unwrap());
            directory.path().join(name)
        };
        // More than any process's number.
        let stale = dead("server-4194305.sock");
        let own = dead(&name(std::process::id()));
        let living = directory.path().join("server-4194306.sock");
        let _listener = UnixListener::bind(&living).unwrap();
        let other = dead("other.sock");
        assert!(matches!(ask_at(&dir(), "server-4194305.sock", DeviceId(0)), Err(Silence::Dead)));
        sweep(&dir());
        assert!(!stale.exists());
        assert!(own.exists() && living.exists() && other.exists());
        drop(Station::open_in(dir(), name(std::process::id())).unwrap());
        assert!(!own.exists());
        assert!(matches!(ask_at(&dir(), &name(std::process::id()), DeviceId(0)), Err(Silence::NoSocket)));
    }
}
