// SPDX-License-Identifier: MIT OR Apache-2.0

//! The server's end of the statistics socket.
//!
//! It runs in the thread that waits for signals and for the ends of devices, so it never blocks on a client: each client
//! has a deadline, and their number and the length of their requests are limited.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use nix::poll::PollTimeout;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket};
use nix::sys::stat::{Mode, fchmod};

use super::client;
use super::protocol::{Report, socket_name};
use crate::cli::run_dir::RunDir;
use crate::device::Device;
use crate::units::DeviceId;

/// How long a client may take to send its request, and then to receive the answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum number of clients at a time; further ones are disconnected.
const MAX_CLIENTS: usize = 16;
/// Maximum length of a request in bytes.
const MAX_REQUEST: usize = 256;

/// The listening socket of a server, and its clients. Its descriptor is readable when there is work to do.
#[derive(Debug)]
pub(in crate::cli) struct StatsSocket {
    listener: UnixListener,
    directory: RunDir,
    name: String,
    epoll: Epoll,
    clients: Vec<Client>,
    /// Whether a failure to accept clients was logged.
    has_logged: bool,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    request: Vec<u8>,
    /// The rest of the answer, once there is one.
    answer: Option<Vec<u8>>,
    deadline: Instant,
}

/// State of a client after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Pending,
    Done,
}

impl StatsSocket {
    /// Creates this process's socket, which only its user can connect to, and removes those of dead processes.
    pub(in crate::cli) fn open() -> io::Result<Self> {
        let directory = RunDir::create()?;
        client::remove_stale(&directory);
        Self::open_in(directory, socket_name(std::process::id()))
    }

    fn open_in(directory: RunDir, name: String) -> io::Result<Self> {
        // That of a dead process that had the same number.
        directory.remove(&name)?;
        let listener = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // The node gets this mode when it is created, so other users can connect at no time.
        fchmod(&listener, Mode::S_IRUSR | Mode::S_IWUSR)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(&directory.through(&name))?)?;
        listen(&listener, Backlog::MAXCONN)?;
        let listener = UnixListener::from(listener);
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let socket = StatsSocket { listener, directory, name, epoll, clients: Vec::new(), has_logged: false };
        socket.listener.set_nonblocking(true)?;
        socket.epoll.add(&socket.listener, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        Ok(socket)
    }

    /// How long a poll may wait at most: until the first client's deadline.
    pub(in crate::cli) fn timeout(&self) -> PollTimeout {
        let Some(first) = self.clients.iter().map(|client| client.deadline).min() else { return PollTimeout::NONE };
        // Rounded up, so that the deadline has passed afterwards.
        let left = first.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    }

    /// Accepts clients, and reads and writes as far as possible without blocking.
    pub(in crate::cli) fn serve<'a>(&mut self, devices: impl Iterator<Item = &'a Device> + Clone) {
        self.serve_with(&|id| {
            devices.clone().find(|device| device.id() == id).map(|device| Report::new(&device.stats()))
        });
    }

    /// Does what [`StatsSocket::serve`] does, with reports from a function.
    pub(super) fn serve_with(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) {
        self.accept();
        let now = Instant::now();
        let mut clients = std::mem::take(&mut self.clients);
        clients.retain_mut(|client| {
            let had_answer = client.answer.is_some();
            let progress = client.advance(report);
            if progress == Progress::Pending && client.answer.is_some() && !had_answer {
                let mut event = EpollEvent::new(EpollFlags::EPOLLOUT, 0);
                if let Err(errno) = self.epoll.modify(&client.stream, &mut event) {
                    log::warn!("accepting a connection of `ublk stat`: {errno}");
                    return false;
                }
            }
            // Closing the descriptor removes it from the epoll instance.
            progress == Progress::Pending && now < client.deadline
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
                Ok(stream) if self.clients.len() < MAX_CLIENTS => self.clients.push(Client {
                    stream,
                    request: Vec::new(),
                    answer: None,
                    deadline: Instant::now() + CLIENT_TIMEOUT,
                }),
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return,
                Err(e) => {
                    // For example, no descriptors are left. The client stays in the socket's queue.
                    if !std::mem::replace(&mut self.has_logged, true) {
                        log::warn!("cannot answer `ublk stat`: {e}");
                    }
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
            }
        }
    }
}

impl AsFd for StatsSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.0.as_fd()
    }
}

impl Drop for StatsSocket {
    fn drop(&mut self) {
        if let Err(e) = self.directory.remove(&self.name) {
            log::warn!("removing {}: {e}", self.directory.path_of(&self.name).display());
        }
    }
}

impl Client {
    /// Reads and writes as far as possible without blocking.
    fn advance(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) -> Progress {
        loop {
            let progress = match &mut self.answer {
                None => self.read(report),
                Some(rest) => self.stream.write(rest).map(|written| {
                    rest.drain(..written);
                    if rest.is_empty() || written == 0 { Progress::Done } else { Progress::Pending }
                }),
            };
            match progress {
                Ok(Progress::Pending) => {}
                Ok(Progress::Done) => return Progress::Done,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Progress::Pending,
                Err(e) => {
                    log::debug!("answering `ublk stat`: {e}");
                    return Progress::Done;
                }
            }
        }
    }

    fn read(&mut self, report: &dyn Fn(DeviceId) -> Option<Report>) -> io::Result<Progress> {
        let mut bytes = [0; MAX_REQUEST];
        let len = self.stream.read(&mut bytes)?;
        self.request.extend_from_slice(&bytes[..len]);
        let Some(end) = self.request.iter().position(|byte| *byte == b'\n') else {
            let is_over = len == 0 || self.request.len() > MAX_REQUEST;
            return Ok(if is_over { Progress::Done } else { Progress::Pending });
        };
        let request = String::from_utf8_lossy(&self.request[..end]);
        let device = request.trim_end().strip_prefix("stat ").and_then(|id| id.parse().ok()).map(DeviceId);
        let answer = match device.map(report) {
            Some(Some(report)) => report,
            Some(None) => Report::refusal("this server does not serve the device"),
            None => Report::refusal(format!("unknown request {request:?}")),
        };
        let mut text = serde_json::to_vec(&answer).map_err(io::Error::other)?;
        text.push(b'\n');
        self.answer = Some(text);
        self.deadline = Instant::now() + CLIENT_TIMEOUT;
        Ok(Progress::Pending)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::JoinHandle;

    use nix::poll::{PollFd, PollFlags, poll};

    use super::super::client::{QueryError, query_socket, remove_stale};
    use super::*;
    use crate::stats::OpStats;

    /// Long enough for a machine under load.
    const TIMEOUT: Duration = Duration::from_secs(60);

    /// The report of device `id`: that many queues.
    fn report(id: u32) -> Report {
        let queue = |n| (n, BTreeMap::from([("read".to_owned(), OpStats::default())]));
        Report { queues: (0..id as u16).map(queue).collect(), ..Report::default() }
    }

    /// A socket that is served on a thread until this is dropped. It has the devices below 20000.
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
            let mut socket = StatsSocket::open_in(RunDir::open(directory.path()).unwrap(), "sock".into()).unwrap();
            let end = Arc::new(AtomicBool::new(false));
            let ended = end.clone();
            let thread = std::thread::spawn(move || {
                while !ended.load(Ordering::Relaxed) {
                    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
                    // So that the test's end is noticed.
                    poll(&mut fds, PollTimeout::from(10u8)).unwrap();
                    socket.serve_with(&|id| (id.0 < 20_000).then(|| report(id.0)));
                }
            });
            Running { end, thread: Some(thread), path, directory }
        }

        fn query(&self, id: u32) -> Result<Report, QueryError> {
            query_socket(&RunDir::open(self.directory.path()).unwrap(), "sock", DeviceId(id), TIMEOUT)
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.end.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap();
            assert!(!self.path.exists(), "a server removes its socket when it ends");
        }
    }

    #[test]
    fn a_server_answers_for_each_of_its_devices() {
        let server = Running::new();
        assert_eq!(fs::metadata(&server.path).unwrap().permissions().mode() & 0o777, 0o600);
        for id in [1, 7] {
            assert_eq!(server.query(id).unwrap().queues.len(), id as usize);
        }
        let Err(QueryError::Failed(why)) = server.query(20_000) else { panic!("it has no such device") };
        assert!(why.contains("does not serve the device"), "{why}");
    }

    #[test]
    fn an_answer_may_be_larger_than_the_sockets_buffer() {
        assert_eq!(Running::new().query(19_999).unwrap().queues.len(), 19_999);
    }

    #[test]
    fn silent_slow_and_verbose_clients_delay_no_others() {
        let server = Running::new();
        let silent: Vec<_> = (0..MAX_CLIENTS - 3).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
        let mut verbose = UnixStream::connect(&server.path).unwrap();
        let _ = verbose.write_all(&[b'x'; 4 * MAX_REQUEST]);
        let mut slow = UnixStream::connect(&server.path).unwrap();
        for byte in *b"sta" {
            // On a machine under load, it may be disconnected by now.
            let _ = slow.write_all(&[byte]);
            assert_eq!(server.query(3).unwrap().queues.len(), 3);
        }
        // The others are disconnected in the end.
        for mut stream in silent.into_iter().chain([slow]) {
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
        }
    }

    #[test]
    fn too_many_clients_are_disconnected_and_later_ones_served() {
        let server = Running::new();
        let silent: Vec<_> = (0..MAX_CLIENTS).map(|_| UnixStream::connect(&server.path).unwrap()).collect();
        assert!(matches!(server.query(1), Err(QueryError::Failed(_))));
        drop(silent);
        let deadline = Instant::now() + TIMEOUT;
        while server.query(1).is_err() {
            assert!(Instant::now() < deadline, "the closed connections still count");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn an_unknown_request_is_refused() {
        let server = Running::new();
        let mut stream = UnixStream::connect(&server.path).unwrap();
        stream.write_all(b"time\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("unknown request"), "{answer}");
    }

    #[test]
    fn the_socket_of_a_dead_server_is_removed_or_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let dir = || RunDir::open(directory.path()).unwrap();
        let dead = |name: &str| {
            // Closed without being removed, as by a kill.
            drop(UnixListener::bind(directory.path().join(name)).unwrap());
            directory.path().join(name)
        };
        // More than any process's number.
        let stale = dead("server-4194305.sock");
        let name = socket_name(std::process::id());
        let own = dead(&name);
        let living = directory.path().join("server-4194306.sock");
        let _listener = UnixListener::bind(&living).unwrap();
        let other = dead("other.sock");
        assert!(matches!(query_socket(&dir(), "server-4194305.sock", DeviceId(0), TIMEOUT), Err(QueryError::Exited)));
        remove_stale(&dir());
        assert!(!stale.exists());
        assert!(own.exists() && living.exists() && other.exists());
        drop(StatsSocket::open_in(dir(), name.clone()).unwrap());
        assert!(!own.exists());
        assert!(matches!(query_socket(&dir(), &name, DeviceId(0), TIMEOUT), Err(QueryError::NoSocket)));
    }
}
