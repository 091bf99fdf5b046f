// SPDX-License-Identifier: MIT OR Apache-2.0

//! The real driver: `/dev/ublk-control`, `/dev/ublkcN` and io_uring.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. A control command's payload lives in a box that is dropped only after the command has completed,
//!    or leaked if that cannot be known.
//! 2. The addresses in a [`Submission`] point into memory that its sender keeps until the completion:
//!    the engine frees a queue's buffers only when no command of it is in flight, and otherwise leaks
//!    them.
//! 3. A ring is used by the thread that made it, as `IORING_SETUP_SINGLE_ISSUER` demands: [`Ring`] is
//!    not `Send`.

mod detached;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use io_uring::squeue::{Entry, Entry128};
use io_uring::{IoUring, cqueue, opcode, types};
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{
    CharDevice, Completion, ControlCommand, ControlFailure, Driver, FileSlot, MappedDescriptors, Operation, Ring,
    Submission, Waker,
};
use crate::error::{Error, Result, errno_of};
use crate::memory::DescriptorMap;
use crate::uapi::{self, ublksrv_ctrl_cmd, ublksrv_io_cmd};
use crate::units::{DeviceId, QueueId, Tag};

/// Entries of a ring thread's submission queue; more than that are submitted in portions.
const SUBMISSION_ENTRIES: u32 = 256;
/// Entries of its completion queue; what does not fit waits in the kernel and costs an extra call.
const COMPLETION_ENTRIES: u32 = 4096;
/// Places for char devices in a ring's file table.
const FILE_SLOTS: u32 = 1024;
/// How often a waiting control command asks whether to give up.
const CONTROL_SLICE: Duration = Duration::from_millis(100);
/// How long a cancelled control command may take to end before its memory is left to the kernel.
const CANCEL_GRACE: Duration = Duration::from_secs(1);

/// `user_data` of the poll for wake-ups; no other submission may use it.
const WAKE: u64 = u64::MAX;
/// `user_data` of a control command and of its cancellation.
const COMMAND: u64 = 1;
const CANCEL: u64 = 2;

/// The driver of the running kernel.
pub struct KernelDriver {
    control: File,
    dev: PathBuf,
    /// Control rings that are not in use. Each command takes one for itself, so that a long STOP_DEV
    /// holds up nobody.
    rings: Mutex<Vec<IoUring<Entry128, cqueue::Entry>>>,
    /// This process has, or had, a char device open: commands that may block go through a helper.
    serving: AtomicBool,
}

impl std::fmt::Debug for KernelDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelDriver").field("dev", &self.dev).finish_non_exhaustive()
    }
}

impl KernelDriver {
    /// Opens `/dev/ublk-control`.
    ///
    /// # Errors
    ///
    /// [`Error::DriverMissing`] if the node is not there, [`Error::File`] if it may not be opened,
    /// [`Error::Ring`] if io_uring is not to be had.
    pub fn open() -> Result<Self> {
        Self::open_in(Path::new("/dev"))
    }

    fn open_in(dev: &Path) -> Result<Self> {
        let path = dev.join("ublk-control");
        let control =
            OpenOptions::new().read(true).write(true).open(&path).map_err(|source| match errno_of(&source) {
                Errno::ENOENT => Error::DriverMissing { path: path.clone() },
                errno => Error::File {
                    operation: "open",
                    path: path.clone(),
                    errno,
                    hint: match errno {
                        Errno::EACCES | Errno::EPERM => "root (CAP_SYS_ADMIN) is needed".into(),
                        Errno::ENODEV | Errno::ENXIO => "the node is stale: the ublk driver is not loaded".into(),
                        _ => String::new(),
                    },
                },
            })?;
        // One ring up front, so that a system without io_uring is found out here.
        let ring = control_ring()?;
        Ok(KernelDriver {
            control,
            dev: dev.to_owned(),
            rings: Mutex::new(vec![ring]),
            serving: AtomicBool::new(false),
        })
    }

    fn take_ring(&self) -> io::Result<IoUring<Entry128, cqueue::Entry>> {
        let idle = self.rings.lock().unwrap_or_else(|e| e.into_inner()).pop();
        idle.map_or_else(|| control_ring().map_err(|e| io::Error::from_raw_os_error(e.errno() as i32)), Ok)
    }
}

fn control_ring() -> Result<IoUring<Entry128, cqueue::Entry>> {
    IoUring::<Entry128, cqueue::Entry>::builder().dontfork().build(4).map_err(|source| ring_error(&source))
}

/// An io_uring set-up error with the reason that people meet in practice.
fn ring_error(source: &io::Error) -> Error {
    let errno = errno_of(source);
    let hint = match errno {
        Errno::ENOSYS => "this kernel or sandbox has no io_uring".to_owned(),
        Errno::EPERM | Errno::EACCES => {
            let setting = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default();
            match setting.trim() {
                "" | "0" => "io_uring is forbidden here (a seccomp filter of a container?)".to_owned(),
                value => format!("kernel.io_uring_disabled is {value}; `sysctl kernel.io_uring_disabled=0` allows it"),
            }
        }
        Errno::ENOMEM => "not enough lockable memory (`ulimit -l`)".to_owned(),
        _ => String::new(),
    };
    Error::Ring { errno, hint }
}

impl Driver for KernelDriver {
    fn control(
        &self,
        command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>), ControlFailure> {
        if command.may_block && self.serving.load(Ordering::Relaxed) {
            return detached::control(self.control.as_fd(), &command, timeout, give_up);
        }
        let bytes = control_bytes(&command, &command.payload);
        let payload = command.payload.into_boxed_slice();
        let mut ring = self.take_ring().map_err(ControlFailure::Io)?;
        let entry = opcode::UringCmd80::new(types::Fd(self.control.as_raw_fd()), command.op)
            .cmd(bytes)
            .build()
            .user_data(COMMAND);
        // SAFETY: (1) the payload is a box that this function drops only after the completion.
        unsafe { ring.submission().push(&entry) }.map_err(|e| ControlFailure::Io(io::Error::other(e)))?;

        let deadline = Instant::now() + timeout;
        let failure = loop {
            let now = Instant::now();
            match wait_for_command(&mut ring, deadline.saturating_duration_since(now).min(CONTROL_SLICE)) {
                Ok(Some(result)) => {
                    self.rings.lock().unwrap_or_else(|e| e.into_inner()).push(ring);
                    return if result >= 0 {
                        Ok((result, payload.into_vec()))
                    } else {
                        Err(ControlFailure::Refused(Errno::from_raw(-result)))
                    };
                }
                Ok(None) if give_up() => break ControlFailure::GaveUp,
                Ok(None) if now >= deadline => break ControlFailure::Timeout,
                Ok(None) => {}
                Err(error) => break ControlFailure::Io(error),
            }
        };
        if cancel(&mut ring) {
            self.rings.lock().unwrap_or_else(|e| e.into_inner()).push(ring);
        } else {
            // The kernel may still write to the payload when the command ends some day.
            log::warn!("{} does not end; its {} bytes are left to the kernel", command.name, payload.len());
            std::mem::forget(payload);
        }
        Err(failure)
    }

    fn open_char(&self, id: DeviceId) -> io::Result<Arc<dyn CharDevice>> {
        let path = self.dev.join(format!("ublkc{id}"));
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)?;
        self.serving.store(true, Ordering::Relaxed);
        Ok(Arc::new(KernelCharDevice(file)))
    }

    fn new_ring(&self) -> io::Result<Box<dyn Ring>> {
        Ok(Box::new(KernelRing::new()?))
    }

    fn block_path(&self, id: DeviceId) -> PathBuf {
        self.dev.join(format!("ublkb{id}"))
    }

    fn block_node_exists(&self, id: DeviceId) -> bool {
        std::fs::metadata(self.block_path(id)).is_ok_and(|m| m.file_type().is_block_device())
    }

    fn device_ids(&self) -> io::Result<Vec<DeviceId>> {
        let mut ids = Vec::new();
        let entries = match std::fs::read_dir("/sys/class/ublk-char") {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(ids),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let name = entry?.file_name();
            ids.extend(name.to_str().and_then(|n| n.strip_prefix("ublkc")?.parse().ok()).map(DeviceId));
        }
        ids.sort_unstable();
        Ok(ids)
    }
}

/// The command as it stands in a submission, with its payload at the given place.
fn control_bytes(command: &ControlCommand, payload: &[u8]) -> [u8; 80] {
    let header = ublksrv_ctrl_cmd {
        dev_id: command.dev_id,
        queue_id: u16::MAX,
        len: u16::try_from(payload.len()).expect("control payloads are small"),
        addr: if payload.is_empty() { 0 } else { payload.as_ptr() as u64 },
        data: [command.data],
        dev_path_len: command.path_len,
        ..Default::default()
    };
    let mut bytes = [0; 80];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, dev_id), &header.dev_id.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, queue_id), &header.queue_id.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, len), &header.len.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, addr), &header.addr.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, data), &header.data[0].to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_ctrl_cmd, dev_path_len), &header.dev_path_len.to_ne_bytes());
    bytes
}

/// Waits for the control command's completion, at most `slice`.
fn wait_for_command(ring: &mut IoUring<Entry128, cqueue::Entry>, slice: Duration) -> io::Result<Option<i32>> {
    let slice = types::Timespec::from(slice);
    let arguments = types::SubmitArgs::new().timespec(&slice);
    match ring.submitter().submit_with_args(1, &arguments) {
        Ok(_) => {}
        Err(e) if matches!(errno_of(&e), Errno::ETIME | Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => {}
        Err(e) => return Err(e),
    }
    Ok(ring.completion().find(|c| c.user_data() == COMMAND).map(|c| c.result()))
}

/// Asks the kernel to end a control command; true if it has ended.
fn cancel(ring: &mut IoUring<Entry128, cqueue::Entry>) -> bool {
    let entry: Entry128 = opcode::AsyncCancel::new(COMMAND).build().user_data(CANCEL).into();
    // SAFETY: a cancellation refers to no memory.
    if unsafe { ring.submission().push(&entry) }.is_err() {
        return false;
    }
    let deadline = Instant::now() + CANCEL_GRACE;
    while Instant::now() < deadline {
        match wait_for_command(ring, CONTROL_SLICE) {
            Ok(Some(_)) => return true,
            Ok(None) => {}
            Err(_) => return false,
        }
    }
    false
}

#[derive(Debug)]
struct KernelCharDevice(File);

impl CharDevice for KernelCharDevice {
    fn map_descriptors(&self, queue: QueueId, depth: u16) -> io::Result<MappedDescriptors> {
        DescriptorMap::of_char_device(self.0.as_fd(), queue, depth).map(MappedDescriptors)
    }

    fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

#[derive(Debug)]
struct EventWaker(EventFd);

impl Waker for EventWaker {
    fn wake(&self) {
        if let Err(errno) = self.0.write(1) {
            log::error!("waking a ring thread: {errno}");
        }
    }
}

/// An io_uring with a table of char devices and a wake-up.
struct KernelRing {
    uring: IoUring<Entry, cqueue::Entry>,
    waker: Arc<EventWaker>,
    /// Whether the ring watches the waker's event.
    wake_armed: bool,
    /// Char devices are in the ring's table; else a slot is their descriptor's number.
    fixed_files: bool,
    free_slots: Vec<u32>,
    /// Entries that found no room in the submission queue.
    backlog: VecDeque<Entry>,
}

impl std::fmt::Debug for KernelRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelRing").field("fd", &self.uring.as_raw_fd()).finish_non_exhaustive()
    }
}

impl KernelRing {
    fn new() -> io::Result<Self> {
        let mut builder = IoUring::<Entry, cqueue::Entry>::builder();
        // A forked child's mappings would keep the ring, and with it the char devices, open.
        builder.dontfork().setup_cqsize(COMPLETION_ENTRIES).setup_single_issuer();
        let uring = match builder.clone().setup_defer_taskrun().build(SUBMISSION_ENTRIES) {
            // DEFER_TASKRUN came with Linux 6.1, SINGLE_ISSUER with 6.0.
            Err(e) if errno_of(&e) == Errno::EINVAL => {
                builder.setup_coop_taskrun().build(SUBMISSION_ENTRIES).map_err(|e| describe_ring_error(&e))?
            }
            other => other.map_err(|e| describe_ring_error(&e))?,
        };
        let fixed_files = fixed_files_are_released();
        if fixed_files {
            uring.submitter().register_files_sparse(FILE_SLOTS)?;
        }
        let event = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(KernelRing {
            uring,
            waker: Arc::new(EventWaker(event)),
            wake_armed: false,
            fixed_files,
            free_slots: (0..FILE_SLOTS).rev().collect(),
            backlog: VecDeque::new(),
        })
    }

    fn push_entry(&mut self, entry: Entry) -> io::Result<()> {
        if !self.backlog.is_empty() || !self.queue(&entry) {
            self.backlog.push_back(entry);
            self.submit()?;
        }
        Ok(())
    }

    /// Puts an entry into the submission queue; false if that is full.
    fn queue(&mut self, entry: &Entry) -> bool {
        // SAFETY: (2): whatever the entry refers to outlives its completion.
        unsafe { self.uring.submission().push(entry) }.is_ok()
    }

    /// Submits once and waits for `want` completions; how many entries the kernel took.
    fn enter(&mut self, want: usize) -> io::Result<usize> {
        match self.uring.submit_and_wait(want) {
            // Completions have to be taken first; the ring thread does that next.
            Err(e) if matches!(errno_of(&e), Errno::EBUSY | Errno::EAGAIN | Errno::EINTR) => Ok(0),
            other => other,
        }
    }
}

fn describe_ring_error(source: &io::Error) -> io::Error {
    log::error!("{}", ring_error(source));
    io::Error::from_raw_os_error(errno_of(source) as i32)
}

impl Ring for KernelRing {
    fn add_file(&mut self, file: &Arc<dyn CharDevice>) -> io::Result<FileSlot> {
        if !self.fixed_files {
            return Ok(FileSlot(file.raw_fd() as u32));
        }
        let slot = self.free_slots.pop().ok_or_else(|| {
            io::Error::other(format!("a ring thread serves at most {FILE_SLOTS} queues; use more threads"))
        })?;
        match self.uring.submitter().register_files_update(slot, &[file.raw_fd()]) {
            Ok(_) => Ok(FileSlot(slot)),
            Err(e) => {
                self.free_slots.push(slot);
                Err(e)
            }
        }
    }

    fn remove_file(&mut self, slot: FileSlot) -> io::Result<()> {
        if !self.fixed_files {
            return Ok(());
        }
        self.uring.submitter().register_files_update(slot.0, &[-1])?;
        self.free_slots.push(slot.0);
        Ok(())
    }

    fn push(&mut self, submission: Submission) -> io::Result<()> {
        let entry = match submission.operation {
            Operation::Fetch { file, queue, tag, address } => {
                io_command(self.fixed_files, file, uapi::UBLK_U_IO_FETCH_REQ, queue, tag, 0, address)
            }
            Operation::Commit { file, queue, tag, result, address } => {
                io_command(self.fixed_files, file, uapi::UBLK_U_IO_COMMIT_AND_FETCH_REQ, queue, tag, result, address)
            }
            Operation::Read { fd, address, len, offset } => {
                opcode::Read::new(types::Fd(fd), address as *mut u8, len).offset(offset).build()
            }
            Operation::Write { fd, address, len, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Write::new(types::Fd(fd), address as *const u8, len).offset(offset).rw_flags(flags).build()
            }
            Operation::SyncData { fd } => opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Allocate { fd, mode, offset, len } => {
                opcode::Fallocate::new(types::Fd(fd), len).offset(offset).mode(mode).build()
            }
        };
        debug_assert_ne!(submission.user_data, WAKE);
        self.push_entry(entry.user_data(submission.user_data))
    }

    fn submit(&mut self) -> io::Result<()> {
        loop {
            let taken = self.enter(0)?;
            while let Some(entry) = self.backlog.pop_front() {
                if !self.queue(&entry) {
                    self.backlog.push_front(entry);
                    break;
                }
            }
            if taken == 0 || self.uring.submission().is_empty() {
                return Ok(());
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        if !self.wake_armed {
            let fd = types::Fd(self.waker.0.as_fd().as_raw_fd());
            let entry = opcode::PollAdd::new(fd, libc::POLLIN as u32).build().user_data(WAKE);
            self.push_entry(entry)?;
            self.wake_armed = true;
        }
        if !self.backlog.is_empty() {
            self.submit()?;
        }
        // What the kernel does not take now it takes when completions were taken: no sleep before that.
        self.enter(usize::from(self.backlog.is_empty())).map(drop)
    }

    fn take_completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        for entry in self.uring.completion() {
            if entry.user_data() == WAKE {
                self.wake_armed = false;
                // Empty already if two polls saw the same event.
                let _ = self.waker.0.read();
            } else {
                into.push(Completion { user_data: entry.user_data(), result: entry.result() });
            }
        }
        Ok(())
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.waker.clone()
    }
}

/// Builds an I/O command; its argument is a `struct ublksrv_io_cmd`.
fn io_command(fixed: bool, file: FileSlot, op: u32, queue: QueueId, tag: Tag, result: i32, address: u64) -> Entry {
    let mut bytes = [0; size_of::<ublksrv_io_cmd>()];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(std::mem::offset_of!(ublksrv_io_cmd, q_id), &queue.0.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, tag), &tag.0.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, result), &result.to_ne_bytes());
    put(std::mem::offset_of!(ublksrv_io_cmd, anon_1), &address.to_ne_bytes());
    if fixed {
        opcode::UringCmd16::new(types::Fixed(file.0), op).cmd(bytes).build()
    } else {
        opcode::UringCmd16::new(types::Fd(file.0 as RawFd), op).cmd(bytes).build()
    }
}

/// Whether a file that was taken out of a ring's table is released although other commands of the ring
/// are pending. Before Linux 6.13 it is not: a stopped device would stay open for as long as another
/// one of its thread lives.
fn fixed_files_are_released() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| at_least(&release, (6, 13)))
}

/// Compares a kernel's release, `6.12.57+deb13-amd64` say, with a version.
fn at_least(release: &str, version: (u32, u32)) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= version
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_control_node_says_how_to_load_the_driver() {
        let empty = tempfile::tempdir().unwrap();
        let error = KernelDriver::open_in(empty.path()).unwrap_err();
        assert!(matches!(error, Error::DriverMissing { .. }), "{error:?}");
        assert!(error.to_string().contains("modprobe ublk_drv"), "{error}");
    }

    #[test]
    fn more_submissions_than_the_queue_holds_all_complete() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        let count = u64::from(SUBMISSION_ENTRIES) * 5;
        let fd = file.as_file().as_raw_fd();
        for user_data in 0..count {
            ring.push(Submission { user_data, operation: Operation::SyncData { fd } }).unwrap();
        }
        let mut completions = Vec::new();
        while (completions.len() as u64) < count {
            ring.wait().unwrap();
            ring.take_completions(&mut completions).unwrap();
        }
        let mut seen: Vec<u64> = completions.iter().map(|c| c.user_data).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
        assert!(completions.iter().all(|c| c.result == 0));
    }

    #[test]
    fn a_wake_up_from_another_thread_ends_a_wait() {
        let Ok(mut ring) = KernelRing::new() else { panic!("io_uring is needed to test the ring") };
        for _ in 0..3 {
            let waker = ring.waker();
            let other = std::thread::spawn(move || waker.wake());
            let mut completions = Vec::new();
            ring.wait().unwrap();
            ring.take_completions(&mut completions).unwrap();
            other.join().unwrap();
            assert_eq!(completions, []);
        }
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert!(at_least("6.13.0", (6, 13)) && at_least("7.3.4+deb13-cloud-amd64", (6, 13)));
        assert!(!at_least("6.12.117+deb13", (6, 13)) && !at_least("6.2", (6, 13)) && !at_least("", (6, 13)));
    }

    #[test]
    fn the_control_header_is_laid_out_as_the_uapi_says() {
        let payload = vec![0; 0x0605];
        let command = ControlCommand {
            name: "",
            op: 0,
            dev_id: 0x0403_0201,
            data: 0x2122_2324_2526_2728,
            payload: vec![],
            path_len: 0x3132,
            may_block: false,
        };
        let bytes = control_bytes(&command, &payload);
        assert_eq!(&bytes[0..8], &[1, 2, 3, 4, 0xff, 0xff, 5, 6]);
        assert_eq!(bytes[8..16], (payload.as_ptr() as u64).to_ne_bytes());
        assert_eq!(bytes[16..24], 0x2122_2324_2526_2728u64.to_ne_bytes());
        assert_eq!(bytes[24..26], 0x3132u16.to_ne_bytes());
        assert!(bytes[26..].iter().all(|b| *b == 0));
    }
}
