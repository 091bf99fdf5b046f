// SPDX-License-Identifier: MIT OR Apache-2.0

//! `file`: a disk in a regular file or on another block device. The engine moves the data with the queue's own ring.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::FlockArg;

use super::file_properties::{can_discard, direct_alignment, memory_alignment, size_of, syncs_cover_the_file};
use super::files::sync_name;
use super::protected_file::{ProtectedFile, ProtectedQueue};
use super::protection::Metadata;
use crate::data::Access;
use crate::engine::SyncOrder;
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result, errno_of};
use crate::identity::BackingIdentity;
use crate::memory::PAGE_SIZE;
use crate::params::{Integrity, Operations, Params};
use crate::request::{Durability, FileRange, FileSync, Requests, WriteBack};
use crate::target::{QueueHandler, QueueInfo, Target};

/// Time that udev gets to release its shared lock on a block device that it inspects.
const UDEV_TIMEOUT: Duration = Duration::from_secs(5);
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// Whether data goes through the page cache of the backing file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// Direct if the file system supports it, otherwise buffered.
    #[default]
    Auto,
    /// `O_DIRECT`.
    Direct,
    /// Through the page cache.
    Buffered,
}

/// Options for opening a backing file.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct FileOptions {
    /// Direct or buffered.
    pub io: Io,
    /// Open the file read-only and create a read-only disk.
    pub read_only: bool,
    /// Logical block size in bytes. By default the smallest that the file supports.
    pub logical_block_size: Option<u32>,
}

impl FileOptions {
    /// The default options.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether I/O is [direct](field@Self::io).
    pub fn io(self, io: Io) -> Self {
        FileOptions { io, ..self }
    }

    /// Opens the file [for reading only](field@Self::read_only), or not.
    pub fn read_only(self, read_only: bool) -> Self {
        FileOptions { read_only, ..self }
    }

    /// Sets the [logical block size](field@Self::logical_block_size).
    pub fn logical_block_size(self, bytes: u32) -> Self {
        FileOptions { logical_block_size: Some(bytes), ..self }
    }
}

/// Purpose that a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    Serving,
    #[cfg(feature = "cli")]
    Examination,
}

/// A disk backed by a file.
///
/// Once a sync of the file has failed, each flush of the disk fails with `EIO` until it has a new server: writes may be
/// lost, and the kernel reports that only once. A new server does not know about an error that was reported to its
/// predecessor. The exception is direct I/O on a block device, where the next flush covers the same writes.
#[derive(Debug)]
pub struct File {
    path: PathBuf,
    file: Arc<fs::File>,
    params: Params,
    direct: bool,
    is_block: bool,
    options: FileOptions,
    purpose: Purpose,
    metadata: Option<Arc<Metadata>>,
    write_back: Arc<WriteBack>,
    /// Order of syncs of `file` itself, which all queues share if a sync covers only writes by the same open file.
    order: Arc<SyncOrder>,
}

impl File {
    /// Opens the backing file or block device, and locks it against a second server (`flock`, and `O_EXCL` on a block
    /// device, which fails if it is mounted). Waits up to five seconds while udev inspects a block device.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be opened or is in use, [`Error::InvalidValue`] if its size or the block size is
    /// invalid.
    pub fn open(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        Self::open_for(path.as_ref(), options, Purpose::Serving)
    }

    /// Opens a file that another server may be using, to check whether a disk can be served from it. Does not test whether
    /// holes can be punched, and assumes that they can.
    #[cfg(feature = "cli")]
    pub(crate) fn examine(path: impl AsRef<Path>, options: &FileOptions) -> Result<Self> {
        Self::open_for(path.as_ref(), options, Purpose::Examination)
    }

    fn open_for(path: &Path, options: &FileOptions, purpose: Purpose) -> Result<Self> {
        let serves = purpose == Purpose::Serving;
        let metadata = fs::metadata(path).map_err(|e| Error::file("open", path, &e))?;
        let is_block = metadata.file_type().is_block_device();
        if !is_block && !metadata.is_file() {
            return Err(Error::File {
                operation: "open",
                path: path.to_owned(),
                errno: Errno::EINVAL,
                hint: "is neither a regular file nor a block device".into(),
            });
        }
        let (file, direct) = if serves || !is_block {
            open(path, options, is_block)?
        } else {
            // udev inspects a block device again after it was open for writing.
            open(path, &FileOptions { read_only: true, ..*options }, is_block)?
        };
        if serves {
            lock(&file, path, options, if is_block { UDEV_TIMEOUT } else { Duration::ZERO })?;
        }
        let size = size_of(&file, path)?;
        let smallest = if direct { direct_alignment(&file, path, size)? } else { 512 };
        let block = options.logical_block_size.unwrap_or(smallest);
        if block < smallest {
            return Err(Error::invalid(
                Parameter::LogicalBlockSize,
                block,
                format!("must be at least {smallest} bytes for direct I/O on {} (or use buffered I/O)", path.display()),
            ));
        }
        let mut params = Params::new(size, block);
        params.physical_block_size = block.max(PAGE_SIZE as u32);
        params.io_min = params.physical_block_size;
        params.read_only = options.read_only;
        params.operations = Operations::WRITE | Operations::FLUSH | Operations::FUA | Operations::WRITE_ZEROES;
        let can_discard = !serves && !is_block || can_discard(&file, is_block, size, metadata.rdev());
        params.operations.set(Operations::DISCARD, can_discard);
        params.discard.granularity = block.max(u32::try_from(metadata.blksize()).unwrap_or(block));
        if !params.discard.granularity.is_multiple_of(block) {
            params.discard.granularity = block;
        }
        // A single request must not occupy the device for minutes.
        params.discard.max_discard_sectors = 1 << (30 - 9);
        params.discard.max_write_zeroes_sectors = 1 << (27 - 9);
        params.validate().map_err(|error| match error {
            Error::InvalidValue { parameter, value, reason } => {
                Error::InvalidValue { parameter, value, reason: format!("{reason} ({})", path.display()) }
            }
            other => other,
        })?;
        Ok(File {
            path: path.to_owned(),
            file: Arc::new(file),
            params,
            direct,
            is_block,
            options: *options,
            purpose,
            metadata: None,
            write_back: Arc::new(WriteBack::new(path.display().to_string())),
            order: Arc::default(),
        })
    }

    /// Changes the parameters of the disk, within the limits of the file. Without [`Operations::FLUSH`] the disk has no write
    /// cache: each write, discard and write-zeroes is durable when it completes.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] if the parameters are invalid, [`Error::Mismatch`] if they exceed the file.
    pub fn with_params(mut self, params: Params) -> Result<Self> {
        params.validate()?;
        if params.integrity != self.params.integrity {
            return Err(Error::conflict(
                Parameter::Integrity,
                "metadata",
                "use `with_integrity` to set where it is stored",
            ));
        }
        if params.size > self.params.size {
            return Err(Error::mismatch(
                Parameter::Size,
                params.size,
                format!("{} has {} bytes", self.path.display(), self.params.size),
            ));
        }
        if params.logical_block_size < self.params.logical_block_size {
            let least = self.params.logical_block_size;
            return Err(Error::mismatch(
                Parameter::LogicalBlockSize,
                params.logical_block_size,
                format!("at least {least}"),
            ));
        }
        self.params = params;
        Ok(self)
    }

    /// Stores integrity metadata of the disk in another file, which is created if it does not exist, and verifies it with
    /// each request. A mismatch fails the request with `EILSEQ`. The disk does not support write-zeroes then. If a write
    /// fails or its server is killed, its blocks have no metadata until they are written again, and are read without
    /// verification. After a crash of the machine, writes that were not flushed may have reached only one of the files.
    /// Linux 7.0.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if the file cannot be used, [`Error::InvalidValue`] if the metadata does not fit the blocks of the
    /// disk.
    pub fn with_integrity(mut self, integrity: Integrity, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut params = self.params;
        params.integrity = Some(integrity);
        params.operations -= Operations::WRITE_ZEROES;
        params.validate()?;
        let writable = !self.options.read_only;
        let is_new = !path.exists();
        if is_new && self.purpose != Purpose::Serving {
            // It will be created.
            self.params = params;
            return Ok(self);
        }
        let file = fs::OpenOptions::new().read(true).write(writable).create(writable).truncate(false).open(path);
        let file = file.map_err(|e| Error::file("open", path, &e))?;
        if self.purpose == Purpose::Serving {
            lock(&file, path, &self.options, Duration::ZERO)?;
        }
        if is_new {
            sync_name(path);
        }
        self.metadata = Some(Arc::new(Metadata::in_file(integrity, file)));
        self.params = params;
        Ok(self)
    }

    /// Returns whether I/O bypasses the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    /// The path of the backing file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The current size of the open file in bytes. By now its path may be that of another file.
    ///
    /// # Errors
    ///
    /// [`Error::File`] if it cannot be determined.
    pub fn backing_size(&self) -> Result<u64> {
        size_of(&self.file, &self.path)
    }
}

fn open(path: &Path, options: &FileOptions, is_block: bool) -> Result<(fs::File, bool)> {
    let exclusive = if is_block && !options.read_only { libc::O_EXCL } else { 0 };
    let open = |flags: i32| {
        fs::OpenOptions::new()
            .read(true)
            .write(!options.read_only)
            .custom_flags(exclusive | flags)
            .open(path)
            .map_err(|e| errno_of(&e))
    };
    let failed = |errno: Errno| Error::File {
        operation: "open",
        path: path.to_owned(),
        errno,
        hint: match errno {
            Errno::EBUSY if is_block => "the block device is mounted or in use".into(),
            Errno::EINVAL if options.io == Io::Direct => "the file system does not support direct I/O".into(),
            _ => String::new(),
        },
    };
    if options.io != Io::Buffered {
        match open(libc::O_DIRECT) {
            Ok(file) => return Ok((file, true)),
            Err(Errno::EINVAL) if options.io == Io::Auto => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    open(0).map(|file| (file, false)).map_err(failed)
}

/// Locks the file. Waits up to `timeout` while another process has the lock.
fn lock(file: &fs::File, path: &Path, options: &FileOptions, timeout: Duration) -> Result<()> {
    let deadline = Instant::now() + timeout;
    let how = if options.read_only { FlockArg::LockSharedNonblock } else { FlockArg::LockExclusiveNonblock };
    loop {
        #[allow(deprecated, reason = "the replacement insists on owning the file")]
        match nix::fcntl::flock(file.as_raw_fd(), how).map_err(Errno::from) {
            Ok(()) => return Ok(()),
            Err(Errno::EWOULDBLOCK) if Instant::now() < deadline => thread::sleep(LOCK_RETRY),
            Err(errno @ Errno::EWOULDBLOCK) => {
                return Err(Error::File {
                    operation: "lock",
                    path: path.to_owned(),
                    errno,
                    hint: "another server uses this file".into(),
                });
            }
            Err(errno) => {
                log::warn!("cannot lock {} against a second server: {errno}", path.display());
                return Ok(());
            }
        }
    }
}

impl Target for File {
    fn kind(&self) -> &str {
        "file"
    }

    fn params(&self) -> Params {
        self.params
    }

    fn access(&self) -> Access {
        if self.metadata.is_some() {
            return Access::Bytes;
        }
        // I/O through the page cache needs no alignment.
        Access::Forwards { memory_alignment: if self.direct { memory_alignment(&self.file) } else { 1 } }
    }

    fn backing(&self) -> Option<BackingIdentity> {
        let disk = BackingIdentity::of(&self.file);
        match (disk, self.metadata.as_ref().and_then(|metadata| metadata.backing())) {
            (Some(disk), Some(metadata)) => Some(disk.and(metadata)),
            (disk, metadata) => disk.or(metadata),
        }
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(match &self.metadata {
            Some(metadata) => {
                metadata.locks().start()?;
                Box::new(ProtectedQueue(Arc::new(ProtectedFile {
                    file: self.file.clone(),
                    metadata: metadata.clone(),
                    at_once: self.is_durable_at_once(),
                    write_back: self.write_back.clone(),
                })))
            }
            None => Box::new(self.queue()?),
        })
    }
}

/// A queue. Keeps the file open as long as it has transfers.
struct FileQueue {
    file: Arc<fs::File>,
    durability: Durability,
}

impl File {
    /// Returns whether each change has to be durable when it completes: without a write cache there are no flushes.
    fn is_durable_at_once(&self) -> bool {
        !self.params.operations.contains(Operations::FLUSH)
    }

    fn queue(&self) -> Result<FileQueue> {
        // Direct I/O on a block device leaves nothing in the page cache: writes report their own errors, and a flush after
        // a failed one covers the same writes.
        let is_cached = !(self.direct && self.is_block);
        let sync = is_cached.then(|| self.sync(syncs_cover_the_file(&self.file))).transpose()?;
        let durability = Durability { at_once: self.is_durable_at_once(), sync };
        Ok(FileQueue { file: self.file.clone(), durability })
    }

    /// Returns how a queue syncs: with an open file of its own if a sync of that covers writes through the others.
    fn sync(&self, cover_the_file: bool) -> Result<FileSync> {
        let (file, order) = if cover_the_file {
            (Arc::new(self.open_again()?), Arc::default())
        } else {
            (self.file.clone(), self.order.clone())
        };
        // If errors of writes are kept per open file, a durable write takes those of earlier writes.
        let buffered = !self.direct || !cover_the_file;
        Ok(FileSync { file: Some(file.into()), buffered, write_back: self.write_back.clone(), order })
    }

    /// Opens the file again, by its descriptor, because its path may be that of another file by now.
    fn open_again(&self) -> Result<fs::File> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        // udev inspects a block device again after it was open for writing.
        let write = !self.options.read_only && !self.is_block;
        let file = fs::OpenOptions::new().read(true).write(write).open(path);
        file.map_err(|e| Error::file("reopen for fdatasync", &self.path, &e))
    }
}

impl QueueHandler for FileQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.serve_fast(|request| {
            let offset = request.offset();
            request.forward_durably(FileRange::new(&self.file, offset), &self.durability);
            None
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backing(size: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        file
    }

    #[test]
    fn a_file_that_does_not_exist_is_named() {
        let error = File::open("/nonexistent/disk.img", &FileOptions::default()).unwrap_err();
        assert_eq!(error.errno(), Errno::ENOENT);
        assert!(error.to_string().contains("/nonexistent/disk.img"), "{error}");
    }

    #[test]
    fn a_directory_is_refused() {
        let error = File::open("/", &FileOptions::default()).unwrap_err();
        assert!(error.to_string().contains("is neither a regular file nor a block device"), "{error}");
    }

    #[test]
    fn an_odd_size_is_refused() {
        let file = backing(1000);
        let options = FileOptions { io: Io::Buffered, ..FileOptions::default() };
        let error = File::open(file.path(), &options).unwrap_err();
        assert!(error.to_string().contains("multiple of the logical block size"), "{error}");
        assert!(error.to_string().contains(file.path().to_str().unwrap()), "{error}");
    }

    #[test]
    fn queues_share_a_file_whose_syncs_are_per_open_file() {
        let file = backing(1 << 20);
        let file = File::open(file.path(), &FileOptions::default()).unwrap();
        assert!(syncs_cover_the_file(&file.file), "tests do not run on FUSE");
        let [first, second] = [(); 2].map(|()| file.sync(false).unwrap());
        assert_eq!(first.raw_fd(), Some(file.file.as_raw_fd()));
        assert!(Arc::ptr_eq(&first.order, &second.order), "a queue may take the errors of another one's writes");
        let [first, second] = [(); 2].map(|()| file.sync(true).unwrap());
        assert_ne!(first.raw_fd(), second.raw_fd());
        assert_ne!(first.raw_fd(), Some(file.file.as_raw_fd()));
        assert!(!Arc::ptr_eq(&first.order, &second.order));
    }

    #[test]
    fn a_lock_that_is_held_briefly_is_waited_for() {
        let file = backing(1 << 20);
        let prober = File::open(file.path(), &FileOptions { read_only: true, ..FileOptions::default() }).unwrap();
        let waiter = fs::File::open(file.path()).unwrap();
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(Duration::from_millis(60));
                drop(prober);
            });
            lock(&waiter, file.path(), &FileOptions::default(), Duration::from_secs(60)).unwrap();
        });
    }

    #[test]
    fn a_file_is_served_by_one_writer_only() {
        let file = backing(1 << 20);
        let first = File::open(file.path(), &FileOptions::default()).unwrap();
        let error = File::open(file.path(), &FileOptions::default()).unwrap_err();
        assert!(error.to_string().contains("another server uses this file"), "{error}");
        drop(first);
        File::open(file.path(), &FileOptions::default()).unwrap();
    }

    #[test]
    fn readers_share_a_file() {
        let file = backing(1 << 20);
        let options = FileOptions { read_only: true, ..FileOptions::default() };
        let first = File::open(file.path(), &options).unwrap();
        let second = File::open(file.path(), &options).unwrap();
        assert!(first.params().read_only && second.params().read_only);
    }
}
