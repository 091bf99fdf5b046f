// SPDX-License-Identifier: MIT OR Apache-2.0

//! Writing to standard output and to pipes.

use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;

use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;

use super::failure::{Failure, Outcome};

/// Writes to standard output.
pub(super) fn print(text: &str) -> Outcome {
    let mut out = io::stdout().lock();
    printed(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

/// Outcome of a write to standard output. A closed pipe is no failure: its reader needs no more.
pub(super) fn printed(written: io::Result<()>) -> Outcome {
    match written {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::Text(format!("standard output: {e}"))),
        _ => Ok(()),
    }
}

/// Writes text on a separate thread, and returns when that is done or when one of `interrupts` is readable: a pipe may be
/// full, and its reader may never read. The thread then continues.
pub(super) fn write_interruptibly(
    mut out: impl Write + Send + 'static,
    text: String,
    interrupts: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::Builder::new().name("ublk-output".into()).spawn(move || {
        let _ = sender.send(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
        drop(writer);
    })?;
    let fds = std::iter::once(reader.as_fd()).chain(interrupts.iter().copied());
    let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
    loop {
        match poll(&mut fds, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
            Ok(_) if fds[0].any() == Some(true) => {
                return receiver.recv().unwrap_or_else(|_| Err(io::Error::other("the thread that writes failed")));
            }
            Ok(_) => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Read;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// A signal, for example, while standard output is a pipe that nothing reads.
    #[test]
    fn a_write_to_a_full_pipe_is_interrupted() {
        let (_unread, full) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let text = "x".repeat(1 << 20);
        let (signal, mut sender) = std::os::unix::net::UnixStream::pair().unwrap();
        let (done, ended) = channel();
        thread::spawn(move || done.send(write_interruptibly(File::from(full), text, &[signal.as_fd()])));
        assert!(ended.recv_timeout(Duration::from_millis(100)).is_err(), "nothing interrupts it yet");
        sender.write_all(&[15]).unwrap();
        ended.recv_timeout(Duration::from_secs(20)).unwrap().unwrap();
    }

    #[test]
    fn text_is_written_or_an_error_returned() {
        let (mut reader, writer) = io::pipe().unwrap();
        write_interruptibly(writer, "/dev/ublkb7\n".into(), &[]).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "/dev/ublkb7\n");
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        printed(write_interruptibly(full, text.clone(), &[])).unwrap_err();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        printed(write_interruptibly(writer, text, &[])).unwrap();
    }
}
