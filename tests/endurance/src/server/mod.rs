// SPDX-License-Identifier: MIT OR Apache-2.0

//! The server: a process of its own that is there to be killed.
//!
//! It says on its standard output how far it is, one word a line: `open`, `fetched`, `command`, `live`.

mod batch;
mod commands;
mod device;
mod single;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::control::Control;
use crate::mode::{Data, MAX_IO};
use crate::store::Store;
use crate::waiting::PATIENCE;
pub(crate) use commands::{Begin, End, begin, end};
use device::{CharDevice, Wish};
use ublk_test_common::uapi::UBLK_IO_OP_WRITE;

/// A server.
#[derive(Debug, Args)]
pub(crate) struct Serve {
    /// Number of the device.
    #[arg(long)]
    device: u32,
    /// The file with the disk's content.
    #[arg(long)]
    store: PathBuf,
    /// How the device moves data.
    #[arg(long, value_enum)]
    data: Data,
    /// Threads that serve.
    #[arg(long)]
    threads: u16,
    /// Kills itself when it has fetched so many tags.
    #[arg(long)]
    die_after: Option<u32>,
    /// Sends this command when all tags are fetched.
    #[arg(long, value_enum)]
    begin: Option<Begin>,
    /// Loses a write now and then, to see whether the test notices.
    #[arg(long)]
    lose_writes: bool,
}

/// What the threads of a server have in common.
#[derive(Debug)]
struct Shared {
    char_device: CharDevice,
    store: Store,
    data: Data,
    threads: u16,
    die_after: Option<u32>,
    fetched: AtomicU32,
    lose_writes: bool,
}

impl Shared {
    /// Is called before `count` tags are fetched: ends the process if it is to end among them. True if the
    /// fetches have to go to the kernel one by one, so that the end finds them there.
    fn about_to_fetch(&self, count: u32) -> bool {
        let Some(limit) = self.die_after else { return false };
        if self.fetched.fetch_add(count, Ordering::Relaxed) + count > limit {
            // SAFETY: a plain system call.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        }
        true
    }

    /// Whether this request is to be acknowledged and not carried out.
    fn loses(&self, wish: Wish, dice: u32) -> bool {
        self.lose_writes && wish.op == UBLK_IO_OP_WRITE && dice.is_multiple_of(61)
    }

    /// Makes some requests slow, so that others are found at the server when it dies.
    fn dawdle(&self, dice: &mut u32) {
        *dice = dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        if *dice >> 25 == 0 {
            std::thread::sleep(Duration::from_millis(u64::from(*dice >> 22 & 7) + 1));
        }
    }
}

/// What a thread reports.
enum Event {
    Ready,
    Ended(Result<()>),
}

/// Reports progress to the test's main program, which may be gone already.
fn say(word: &str) -> Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{word}").context("the test is gone")
}

pub(crate) fn serve(options: &Serve) -> Result<()> {
    // SAFETY: a plain system call.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    let info = Control::open()?.info(options.device).context("GET_DEV_INFO")?;
    if info.max_io_buf_bytes != MAX_IO {
        bail!("requests may have {} bytes", info.max_io_buf_bytes);
    }
    let shared = Arc::new(Shared {
        char_device: CharDevice::open(info)?,
        store: Store::open(&options.store)?,
        data: options.data,
        threads: options.threads,
        die_after: options.die_after,
        fetched: AtomicU32::new(0),
        lose_writes: options.lose_writes,
    });
    say("open")?;

    let (events, from_threads) = mpsc::channel();
    let prepared = Arc::new(std::sync::Barrier::new(usize::from(options.threads)));
    for number in 0..options.threads {
        let shared = Arc::clone(&shared);
        let events = events.clone();
        let prepared = Arc::clone(&prepared);
        std::thread::spawn(move || {
            let ready = || events.send(Event::Ready).context("the main thread is gone");
            let result = if shared.data.is_batch() {
                batch::run(&shared, number, &prepared, ready)
            } else {
                single::run(&shared, number, ready)
            };
            // Only a process that ends does not listen.
            let _ = events.send(Event::Ended(result));
        });
    }
    drop(events);

    for _ in 0..options.threads {
        match from_threads.recv_timeout(PATIENCE).context("the threads are not ready")? {
            Event::Ready => {}
            Event::Ended(result) => {
                result?;
                bail!("a thread ended before the device was started");
            }
        }
    }
    say("fetched")?;
    if let Some(command) = options.begin {
        begin(command, options.device, std::process::id())?;
    }
    wait_for_end(&from_threads, options.threads)
}

/// Until the driver sends the threads away. Not every thread may hear of that: one will do.
fn wait_for_end(from_threads: &mpsc::Receiver<Event>, threads: u16) -> Result<()> {
    let ended = |event| match event {
        Event::Ready => bail!("a thread is ready twice"),
        Event::Ended(result) => result,
    };
    ended(from_threads.recv().context("the threads are gone")?)?;
    for _ in 1..threads {
        match from_threads.recv_timeout(Duration::from_secs(1)) {
            Ok(event) => ended(event)?,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
        }
    }
    Ok(())
}
