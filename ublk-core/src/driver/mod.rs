// SPDX-License-Identifier: MIT OR Apache-2.0

//! The interface to the ublk driver.
//!
//! The control plane, the life cycle of devices and the engine use a [`Driver`] and the [`Ring`]s that it creates. [`kernel`]
//! is the real one, on io_uring; `fake` is an in-process stand-in that enforces the driver's rules, so that the rest is tested
//! in milliseconds and without privileges.
//!
//! The engine's memory is safe only if implementations keep their promises, so the traits are `unsafe` to implement, and
//! calls that pass addresses to the kernel are `unsafe`.

#[cfg(any(test, feature = "fake"))]
pub mod fake;
pub(crate) mod kernel;

use std::fmt::Debug;
use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::errno::Errno;
use crate::memory::DescriptorMap;
use crate::units::{DeviceId, QueueId, Tag};

/// Returns the end of a time that begins now. A time beyond the range of the clock is shortened to 136 years.
pub(crate) fn deadline(timeout: Duration) -> Instant {
    const FOR_EVER: Duration = Duration::from_secs(1 << 32);
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + FOR_EVER)
}

/// A control command on its way to the driver.
#[derive(Debug)]
pub(crate) struct ControlCommand {
    /// Name in the UAPI, for messages.
    pub name: &'static str,
    /// ioctl-encoded number, `UBLK_U_CMD_*`.
    pub op: u32,
    /// The device, or `u32::MAX` for "any free id" and for commands without a device.
    pub dev_id: u32,
    /// The inline argument, `data[0]`.
    pub data: u64,
    /// The buffer that `addr` and `len` describe; the driver may fill it. Empty for none.
    pub payload: Vec<u8>,
    /// How many bytes at the payload's start are a path (unprivileged devices, `GET_DEV_INFO2`).
    pub path_len: u16,
    /// Whether the command may wait for requests that this process serves, by itself or for a lock that
    /// another such command holds: it must not keep this process from dying then.
    pub may_block: bool,
}

/// Why a control command did not succeed.
#[derive(Debug)]
pub(crate) enum ControlFailure {
    /// The driver's errno.
    Refused(Errno),
    /// The time limit was exceeded; the command was cancelled, and its memory is left to the kernel.
    Timeout,
    /// The caller gave up; likewise.
    GaveUp,
    /// The command could not be sent.
    Io(io::Error),
}

impl ControlFailure {
    /// Splits a command's result.
    pub(crate) fn check(result: i32) -> Result<i32, Self> {
        Errno::check(result).map(|_| result).map_err(|errno| ControlFailure::Refused(errno.known()))
    }
}

/// The ublk driver, or a stand-in for it.
///
/// # Safety
///
/// The engine's `unsafe` code trusts an implementation: its rings write only to memory that submissions name, and not
/// after they have completed; the descriptors of its char devices refer to these devices.
pub(crate) unsafe trait Driver: Send + Sync + Debug {
    /// Sends a control command and waits for its result, at most `timeout`, or until `give_up`, which is polled meanwhile,
    /// returns true.
    ///
    /// Returns the non-negative result and the payload, to which the driver may have written.
    ///
    /// # Safety
    ///
    /// Addresses in the payload (REG_BUF has one) must be those of memory that clients may use from then on.
    unsafe fn control(
        &self,
        command: ControlCommand,
        timeout: Duration,
        give_up: &dyn Fn() -> bool,
    ) -> Result<(i32, Vec<u8>), ControlFailure>;

    /// Opens `/dev/ublkcN`. The driver allows one opener at a time.
    fn open_char(&self, id: DeviceId) -> io::Result<Arc<dyn CharDevice>>;

    /// Creates a ring. It belongs to the calling thread.
    fn new_ring(&self) -> io::Result<Box<dyn Ring>>;

    /// Returns the path of the block device.
    fn block_path(&self, id: DeviceId) -> PathBuf;

    /// Returns whether the block device's node exists and may be read by this process.
    fn block_node_exists(&self, id: DeviceId) -> bool;

    /// Returns the ids of all devices, in ascending order.
    fn device_ids(&self) -> io::Result<Vec<DeviceId>>;

    /// Returns a number that distinguishes a device from earlier and later ones with the same id; `None` if there is no such
    /// device.
    ///
    /// # Errors
    ///
    /// If it cannot be determined: without sysfs, or by default. Callers then treat the device as the same one.
    fn instance(&self, _id: DeviceId) -> io::Result<Option<u64>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// An open `/dev/ublkcN`. Dropping the last handle closes it, by which the driver notices the server's exit.
///
/// # Safety
///
/// As for [`Driver`].
pub(crate) unsafe trait CharDevice: Send + Sync + Debug {
    /// Maps the descriptors of a queue.
    #[doc(hidden)]
    fn map_descriptors(&self, queue: QueueId, depth: u16) -> io::Result<DescriptorMap>;

    /// Returns the descriptor for the kernel's ring; stand-ins use it as a number of their own.
    fn raw_fd(&self) -> RawFd;

    /// Copies a write's data, from its byte `place.offset` on, on a device with `USER_COPY`. From any thread, while the server
    /// owns the request; `EINVAL` if it does not.
    fn copy_from_request(&self, place: RequestPlace, into: &mut [u8]) -> io::Result<()>;

    /// Returns the byte that [cleared](crate::Request::clear) memory is filled with.
    #[doc(hidden)]
    fn unwritten_byte(&self) -> u8 {
        0
    }

    /// Copies to a read request's memory, as above.
    fn copy_to_request(&self, place: RequestPlace, from: &[u8]) -> io::Result<()>;
}

/// A position in a request's memory, for [`CharDevice::copy_from_request`] and its counterpart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestPlace {
    /// Queue.
    pub queue: QueueId,
    /// Tag.
    pub tag: Tag,
    /// First byte; less than 32 MiB.
    pub offset: u64,
    /// The request's integrity metadata instead of its data (7.0, devices with `INTEGRITY`).
    pub integrity: bool,
}

/// A char device's index in a ring's table of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSlot(pub u32);

/// One entry for a ring's submission queue.
///
/// `user_data` comes back with the completion. Addresses must stay valid until then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Submission {
    /// Echoed in the completion.
    pub user_data: u64,
    /// What to do.
    pub operation: Operation,
    /// The driver carries it out during the submission, and nothing depends on its completion unless that is a failure: the
    /// completion alone need not end a wait.
    pub prompt: bool,
}

/// Memory of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Memory {
    /// In this process.
    At(u64),
    /// In a request's own pages, which are registered in the ring's table of buffers.
    Registered {
        /// Index in the table.
        index: u16,
        /// First byte of the request.
        offset: u64,
    },
}

impl Memory {
    /// Returns the memory that begins `bytes` later.
    pub(crate) fn skip(self, bytes: u64) -> Self {
        match self {
            Memory::At(address) => Memory::At(address + bytes),
            Memory::Registered { index, offset } => Memory::Registered { index, offset: offset + bytes },
        }
    }
}

/// An array of `struct ublk_elem_header` with what follows each, for the commands of `BATCH_IO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Elements {
    /// First element.
    pub address: u64,
    /// How many.
    pub count: u16,
    /// Bytes of one.
    pub stride: u8,
    /// `UBLK_BATCH_F_*`.
    pub flags: u16,
}

/// Operation of a submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// `FETCH_REQ`: fetch a tag for the first time.
    Fetch {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tag.
        tag: Tag,
        /// The tag's buffer in copy mode, else 0.
        address: u64,
        /// Index in the ring's table of buffers for the driver to register a request's pages at (`AUTO_BUF_REG`).
        register: Option<u16>,
    },
    /// `COMMIT_AND_FETCH_REQ`: end the request and fetch the tag again.
    Commit {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tag.
        tag: Tag,
        /// Bytes done, 0 for operations without data, or a negative errno.
        result: i32,
        /// The tag's buffer in copy mode: a read's data is taken from here, the next write's data goes
        /// here. The sector where the data landed for a zone append. Else 0.
        address: u64,
        /// As in `Fetch`.
        register: Option<u16>,
    },
    /// `NEED_GET_DATA`: have a write's data copied to a buffer.
    GetData {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tag.
        tag: Tag,
        /// The buffer.
        address: u64,
    },
    /// `REGISTER_IO_BUF`: put a request's pages into the ring's table of buffers.
    Register {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tag.
        tag: Tag,
        /// Index in the table.
        index: u16,
    },
    /// `UNREGISTER_IO_BUF`: remove a request's pages from the table. A request ends only after that.
    Unregister {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tag.
        tag: Tag,
        /// Index in the table.
        index: u16,
    },
    /// `PREP_IO_CMDS`: fetch tags for the first time.
    Prepare {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// The tags.
        elements: Elements,
    },
    /// `COMMIT_IO_CMDS`: end requests and fetch their tags again.
    CommitBatch {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
        /// Tags and results.
        elements: Elements,
    },
    /// `FETCH_IO_CMDS`: deliver tags with requests until further notice; each completion delivers some, for
    /// [`Ring::take_tags`].
    FetchBatch {
        /// The char device.
        file: FileSlot,
        /// Queue.
        queue: QueueId,
    },
    /// Read from a file into memory.
    Read {
        /// File.
        fd: RawFd,
        /// Where the data goes.
        memory: Memory,
        /// Bytes.
        len: u32,
        /// Position in the file.
        offset: u64,
    },
    /// Write memory to a file.
    Write {
        /// File.
        fd: RawFd,
        /// Where the data is.
        memory: Memory,
        /// Bytes.
        len: u32,
        /// Position in the file.
        offset: u64,
        /// Whether the data must be durable when the write completes (`RWF_DSYNC`).
        durable: bool,
    },
    /// `fdatasync`.
    SyncData {
        /// File.
        fd: RawFd,
    },
    /// `fallocate`.
    Allocate {
        /// File.
        fd: RawFd,
        /// `FALLOC_FL_*`.
        mode: i32,
        /// First byte.
        offset: u64,
        /// Bytes.
        len: u64,
    },
}

/// One completed submission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Completion {
    /// From the submission.
    pub user_data: u64,
    /// Result or negative errno.
    pub result: i32,
    /// The buffer that holds the tags which a [`Operation::FetchBatch`] delivers.
    pub tags: Option<u16>,
    /// Whether more completions of the same submission will follow.
    pub more: bool,
}

#[cfg(any(test, feature = "fake"))]
impl Completion {
    /// Creates the only completion of a submission.
    pub(crate) fn last(user_data: u64, result: i32) -> Self {
        Completion { user_data, result, tags: None, more: false }
    }
}

/// Ends a ring's [wait](Ring::wait), from any thread.
pub(crate) trait Waker: Send + Sync + Debug {
    /// Ends the ring's current or next wait.
    fn wake(&self);
}

/// A submission queue and a completion queue. Belongs to the thread that made it.
///
/// # Safety
///
/// As for [`Driver`].
pub(crate) unsafe trait Ring: Debug {
    /// Adds a char device to the ring's table of files.
    fn add_file(&mut self, file: &Arc<dyn CharDevice>) -> io::Result<FileSlot>;

    /// Removes a char device from the table, so that the ring does not keep it open.
    fn remove_file(&mut self, slot: FileSlot) -> io::Result<()>;

    /// Queues a submission; submits what is queued if there is no room.
    ///
    /// # Safety
    ///
    /// Addresses in the operation must be those of memory that is the ring's until the completion, or, of a tag's buffer,
    /// until the driver gives the tag back. Descriptors must be the caller's to use, and open until the ring has been
    /// [submitted](Ring::is_submitted).
    unsafe fn push(&mut self, submission: Submission) -> io::Result<()>;

    /// Submits what is queued, without waiting.
    fn submit(&mut self) -> io::Result<()>;

    /// Returns whether the kernel has taken everything that was queued.
    fn is_submitted(&mut self) -> bool;

    /// Submits what is queued and waits for a completion, a wake-up or the timer. Completions of what is
    /// [prompt](Submission::prompt) need not end the wait.
    fn wait(&mut self) -> io::Result<()>;

    /// Returns whether something prompt was queued since completions were last taken. Its outcome may be known only when the
    /// next wait ends.
    fn has_prompt(&self) -> bool;

    /// Submits what is queued, and sleeps for `window`, which completions do not end: they are coalesced, and the driver need
    /// not wake the thread. If something other than what is prompt has completed during the submission, it does not sleep
    /// and returns true: there is no need to wait then.
    fn coalesce(&mut self, window: Duration) -> io::Result<bool>;

    /// Starts the ring's timer; it must not be running.
    fn start_timer(&mut self, after: Duration) -> io::Result<()>;

    /// Returns whether the timer has ended since the last call.
    fn timer_ended(&mut self) -> bool;

    /// Returns whether the driver uses requests' buffers only during calls of this ring, all completions have been taken, and
    /// nothing is left to be submitted: memory of idle tags can be given back until the next call.
    fn is_quiet(&mut self) -> bool;

    /// Reserves `count` consecutive entries of the ring's table of buffers.
    fn reserve_buffers(&mut self, count: u16) -> io::Result<u16>;

    /// Releases reserved entries.
    fn release_buffers(&mut self, first: u16, count: u16);

    /// Moves the tags that a completion delivered to the end of `into` and frees their buffer. `bytes` is the completion's
    /// result.
    ///
    /// # Safety
    ///
    /// `buffer` and `bytes` must be those of a completion of this ring. Once for each.
    unsafe fn take_tags(&mut self, buffer: u16, bytes: usize, into: &mut Vec<Tag>);

    /// Moves all completions to the end of `into`.
    fn take_completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()>;

    /// Returns a handle that wakes this ring's thread.
    fn waker(&self) -> Arc<dyn Waker>;
}
