// SPDX-License-Identifier: MIT OR Apache-2.0

//! The real driver: `/dev/ublk-control`, `/dev/ublkcN` and io_uring.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. A control command's payload lives in a box that is dropped only after the command has completed,
//!    or leaked if that cannot be known.
//!
//! `ring` is the ring of a queue's thread, `entries` builds what it submits, `helper` sends commands from a process of their
//! own.

mod entries;
mod helper;
mod ring;
mod tag_buffers;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};

use self::ring::KernelRing;
use super::{CharDevice, ControlCommand, ControlFailure, Driver, RequestPlace, Ring};
use crate::errno::Errno;
use crate::error::{Error, Result, errno_of};
use crate::fork::PerProcess;
use crate::memory::DescriptorMap;
use crate::uapi::{self, ublksrv_ctrl_cmd};
use crate::units::{DeviceId, QueueId};

/// Interval in which a waiting control command checks whether to give up.
const CONTROL_SLICE: Duration = Duration::from_millis(100);
/// Time limit for the end of a cancelled control command, after which its memory is left to the kernel.
const CANCEL_GRACE: Duration = Duration::from_secs(1);

/// `user_data` of a control command and of its cancellation.
const COMMAND: u64 = 1;
const CANCEL: u64 = 2;

/// The driver of the running kernel.
pub(crate) struct KernelDriver {
    control: File,
    dev: PathBuf,
    /// Control rings that are not in use. Each command takes one for itself, so that a long STOP_DEV holds up no other.
    ///
    /// A forked child has neither the rings' memory ([`control_ring`] keeps it from that) nor a right to them.
    idle_rings: PerProcess<Vec<ControlRing>>,
    helpers: helper::Helpers,
}

type ControlRing = IoUring<Entry128, cqueue::Entry>;

/// Whether this process has, or had, a char device open. If so, commands that may block go through a helper, for every
/// [`KernelDriver`] of the process.
static SERVING: AtomicBool = AtomicBool::new(false);

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
    /// [`Error::DriverMissing`] if the node does not exist, [`Error::File`] if it may not be opened,
    /// [`Error::Ring`] if io_uring is not available.
    pub(crate) fn open() -> Result<Self> {
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
                        Errno::EACCES | Errno::EPERM => {
                            "needs root (CAP_SYS_ADMIN) or the udev rules for unprivileged devices".into()
                        }
                        Errno::ENODEV | Errno::ENXIO => "the node is stale: the ublk driver is not loaded".into(),
                        _ => String::new(),
                    },
                },
            })?;
        // One ring up front, so that a missing io_uring is an error here.
        let ring = control_ring()?;
        let helpers = helper::Helpers::default();
        helpers.reserve();
        let idle_rings = PerProcess::<Vec<ControlRing>>::new();
        idle_rings.lock().push(ring);
        Ok(KernelDriver { control, dev: dev.to_owned(), idle_rings, helpers })
    }

    fn take_ring(&self) -> io::Result<ControlRing> {
        let idle = self.idle_rings.lock().pop();
        idle.map_or_else(|| control_ring().map_err(|e| io::Error::from(e.errno())), Ok)
    }

    /// Returns whether a command must be sent from a helper process: this one could not exit while the command waits for
    /// requests that this process serves.
    fn needs_helper(command: &ControlCommand) -> bool {
        command.may_block && SERVING.load(Ordering::Relaxed)
    }
}

/// Creates a ring that forked children do not inherit.
fn control_ring() -> Result<ControlRing> {
    IoUring::<Entry128, cqueue::Entry>::builder().dontfork().build(4).map_err(|source| ring_error(&source))
}

/// Converts an error of `io_uring_setup`, with a hint at its usual cause.
pub(crate) fn ring_error(source: &io::Error) -> Error {
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

// SAFETY: (1), and those of `ring` and `helper`.
unsafe impl Driver for KernelDriver {
    unsafe fn control(
        &self,
        command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>), ControlFailure> {
        if Self::needs_helper(&command) {
            return helper::control(self.control.as_fd(), &self.helpers, &command, timeout, give_up);
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

        let deadline = super::deadline(timeout);
        let failure = loop {
            let now = Instant::now();
            match wait_for_command(&mut ring, deadline.saturating_duration_since(now).min(CONTROL_SLICE)) {
                Ok(Some(result)) => {
                    self.idle_rings.lock().push(ring);
                    return Ok((ControlFailure::check(result)?, payload.into_vec()));
                }
                Ok(None) if give_up() => break ControlFailure::GaveUp,
                Ok(None) if now >= deadline => break ControlFailure::Timeout,
                Ok(None) => {}
                Err(error) => break ControlFailure::Io(error),
            }
        };
        let Some(result) = cancel(&mut ring) else {
            // The kernel may still write to the payload when the command ends.
            log::warn!(
                "{} does not end; leaking its buffer of {} bytes, which the kernel may still use",
                command.name,
                payload.len()
            );
            std::mem::forget(payload);
            return Err(failure);
        };
        self.idle_rings.lock().push(ring);
        // The command may have been carried out before it was cancelled: a new device would be left that no program knows of.
        Ok((after_cancelling(result, failure)?, payload.into_vec()))
    }

    fn open_char(&self, id: DeviceId) -> io::Result<Arc<dyn CharDevice>> {
        let path = self.dev.join(format!("ublkc{id}"));
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_CLOEXEC).open(path)?;
        SERVING.store(true, Ordering::Relaxed);
        Ok(Arc::new(KernelCharDevice(file)))
    }

    fn new_ring(&self) -> io::Result<Box<dyn Ring>> {
        Ok(Box::new(KernelRing::new()?))
    }

    fn block_path(&self, id: DeviceId) -> PathBuf {
        self.dev.join(format!("ublkb{id}"))
    }

    fn block_node_exists(&self, id: DeviceId) -> bool {
        let path = self.block_path(id);
        let exists = std::fs::metadata(&path).is_ok_and(|m| m.file_type().is_block_device());
        // The node of an unprivileged device belongs to root until udev has changed that.
        exists && faccessat(AT_FDCWD, &path, AccessFlags::R_OK, AtFlags::AT_EACCESS).is_ok()
    }

    fn device_ids(&self) -> io::Result<Vec<DeviceId>> {
        let mut ids = Vec::new();
        let entries = match std::fs::read_dir("/sys/class/ublk-char") {
            Ok(entries) => entries,
            // The driver is not loaded, unless sysfs is missing.
            Err(e) if e.kind() == io::ErrorKind::NotFound && Path::new("/sys/class").exists() => return Ok(ids),
            Err(e) => return Err(e),
        };
        for entry in entries {
            let name = entry?.file_name();
            ids.extend(name.to_str().and_then(|n| n.strip_prefix("ublkc")?.parse().ok()).map(DeviceId));
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// Returns the inode number of the device's directory in sysfs, which the kernel counts up.
    fn instance(&self, id: DeviceId) -> io::Result<Option<u64>> {
        match std::fs::metadata(format!("/sys/class/ublk-char/ublkc{id}/")) {
            Ok(metadata) => Ok(Some(metadata.ino())),
            Err(e) if e.kind() == io::ErrorKind::NotFound && Path::new("/sys/class").exists() => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Encodes a command for a submission queue entry, with its payload at the given place.
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

/// Waits for the control command's completion, at most `slice`. Returns `None` if there is none yet.
fn wait_for_command(ring: &mut ControlRing, slice: Duration) -> io::Result<Option<i32>> {
    let slice = types::Timespec::from(slice);
    let arguments = types::SubmitArgs::new().timespec(&slice);
    match ring.submitter().submit_with_args(1, &arguments) {
        Ok(_) => {}
        Err(e) if matches!(errno_of(&e), Errno::ETIME | Errno::EINTR | Errno::EAGAIN | Errno::EBUSY) => {}
        Err(e) => return Err(e),
    }
    Ok(ring.completion().find(|c| c.user_data() == COMMAND).map(|c| c.result()))
}

/// Returns the outcome of a command that has ended after a request to cancel it: `failure` if it was cancelled, else its own.
fn after_cancelling(result: i32, failure: ControlFailure) -> Result<i32, ControlFailure> {
    match ControlFailure::check(result) {
        Err(ControlFailure::Refused(Errno::ECANCELED | Errno::EINTR)) => Err(failure),
        outcome => outcome,
    }
}

/// Cancels a control command. Returns its result, or `None` if it does not end in time.
fn cancel(ring: &mut ControlRing) -> Option<i32> {
    let entry: Entry128 = opcode::AsyncCancel::new(COMMAND).build().user_data(CANCEL).into();
    // SAFETY: a cancellation refers to no memory.
    unsafe { ring.submission().push(&entry) }.ok()?;
    let deadline = Instant::now() + CANCEL_GRACE;
    while Instant::now() < deadline {
        if let Some(result) = wait_for_command(ring, CONTROL_SLICE).ok()? {
            return Some(result);
        }
    }
    None
}

#[derive(Debug)]
struct KernelCharDevice(File);

// SAFETY: the file is the char device that was opened by its name, and open as long as this.
unsafe impl CharDevice for KernelCharDevice {
    fn map_descriptors(&self, queue: QueueId, depth: u16) -> io::Result<DescriptorMap> {
        DescriptorMap::of_char_device(self.0.as_fd(), queue, depth)
    }

    fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    fn copy_from_request(&self, place: RequestPlace, into: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(into, position(place)?)
    }

    fn copy_to_request(&self, place: RequestPlace, from: &[u8]) -> io::Result<()> {
        self.0.write_all_at(from, position(place)?)
    }
}

/// Returns the position of a request's memory in the char device (uapi 3.8). `EINVAL` for an offset that would name another
/// request.
fn position(place: RequestPlace) -> io::Result<u64> {
    if place.offset > uapi::UBLK_IO_BUF_BITS_MASK {
        return Err(Errno::EINVAL.into());
    }
    let within =
        place.offset | u64::from(place.tag.0) << uapi::UBLK_TAG_OFF | u64::from(place.queue.0) << uapi::UBLK_QID_OFF;
    let part = if place.integrity { uapi::UBLKSRV_IO_INTEGRITY_FLAG } else { 0 };
    Ok((uapi::UBLKSRV_IO_BUF_OFFSET + within) | part)
}

/// Returns whether a file that was taken out of a ring's table is released although other commands of the ring
/// are pending. Before Linux 6.13 it is not: a stopped device would stay open for as long as another
/// one of its thread lives.
fn fixed_files_are_released() -> bool {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| at_least(&release, (6, 13)))
}

/// Returns whether a kernel's release, for example `6.12.57+deb13-amd64`, is a version or later.
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

    /// A driver whose control device answers every command with 0 (`uring_cmd_null`, Linux 6.1), and has a char device.
    fn null_driver() -> (tempfile::TempDir, KernelDriver) {
        let dev = tempfile::tempdir().unwrap();
        for name in ["ublk-control", "ublkc0"] {
            std::os::unix::fs::symlink("/dev/null", dev.path().join(name)).unwrap();
        }
        let driver = KernelDriver::open_in(dev.path()).unwrap();
        (dev, driver)
    }

    fn command(may_block: bool) -> ControlCommand {
        ControlCommand { name: "TEST", op: 1, dev_id: 0, data: 0, payload: vec![7; 8], path_len: 0, may_block }
    }

    const TIMEOUT: Duration = Duration::from_secs(60);

    #[test]
    fn commands_of_a_serving_process_need_a_helper_by_any_driver() {
        let ((_dev, first), (_other, _second)) = (null_driver(), null_driver());
        let _file = first.open_char(DeviceId(0)).unwrap();
        assert!(KernelDriver::needs_helper(&command(true)));
        assert!(!KernelDriver::needs_helper(&command(false)));
    }

    #[test]
    fn a_forked_child_may_use_an_inherited_driver() {
        let (_dev, driver) = null_driver();
        let send = || {
            // SAFETY: the payload has no address.
            let sent = unsafe { driver.control(command(false), TIMEOUT, &|| false) };
            sent.is_ok_and(|(_, payload)| payload == [7; 8])
        };
        assert!(send());
        // SAFETY: the child allocates, which the C library makes work, sends a command, and ends without unwinding.
        match unsafe { nix::unistd::fork() }.unwrap() {
            nix::unistd::ForkResult::Child => {
                let sent = send() && send();
                // SAFETY: as above.
                unsafe { libc::_exit(i32::from(!sent)) }
            }
            nix::unistd::ForkResult::Parent { child } => {
                let status = nix::sys::wait::waitpid(child, None).unwrap();
                assert_eq!(status, nix::sys::wait::WaitStatus::Exited(child, 0));
            }
        }
        assert!(send(), "the parent goes on");
    }

    #[test]
    fn a_command_that_is_done_before_it_is_cancelled_is_done() {
        let (_dev, driver) = null_driver();
        let mut ring = control_ring().unwrap();
        let entry = opcode::UringCmd80::new(types::Fd(driver.control.as_raw_fd()), 1).build().user_data(COMMAND);
        // SAFETY: the command has no memory.
        unsafe { ring.submission().push(&entry) }.unwrap();
        ring.submit().unwrap();
        assert_eq!(cancel(&mut ring), Some(0));
        for (result, expected) in [(0, "Ok(0)"), (7, "Ok(7)"), (-125, "Err(Timeout)"), (-4, "Err(Timeout)")] {
            assert_eq!(format!("{:?}", after_cancelling(result, ControlFailure::Timeout)), expected, "{result}");
        }
        assert_eq!(format!("{:?}", after_cancelling(-libc::EEXIST, ControlFailure::GaveUp)), "Err(Refused(EEXIST))");
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert!(at_least("6.13.0", (6, 13)) && at_least("7.3.4+deb13-cloud-amd64", (6, 13)));
        assert!(!at_least("6.12.117+deb13", (6, 13)) && !at_least("6.2", (6, 13)) && !at_least("", (6, 13)));
    }

    #[test]
    fn an_offset_beyond_a_request_names_no_other_one() {
        for integrity in [false, true] {
            let place = |offset| RequestPlace { queue: QueueId(1), tag: crate::units::Tag(2), offset, integrity };
            let last = position(place((1 << 25) - 1)).unwrap();
            assert_eq!(last - position(place(0)).unwrap(), (1 << 25) - 1);
            assert_eq!(position(place(1 << 25)).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        }
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
