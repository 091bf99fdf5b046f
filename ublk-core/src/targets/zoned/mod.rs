// SPDX-License-Identifier: MIT OR Apache-2.0

//! `zoned`: a host-managed zoned disk, in memory or in a directory.
//!
//! * [`zones`]: write pointers, conditions, limits.
//! * [`store`]: the data.

mod store;
mod zones;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::store::{Files, Store};
use self::zones::{Start, Zones};
use super::sparse::Sparse;
use crate::errno::Errno;
use crate::error::{Error, Parameter, Result, errno_of};
use crate::identity::BackingIdentity;
use crate::params::{Operations, Params, ZonedLimits};
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// Options of a zoned disk.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ZonedOptions {
    /// Capacity in bytes, a multiple of the zone size.
    pub size: u64,
    /// Zone size in bytes, a power of two.
    pub zone_size: u32,
    /// Number of conventional zones at the start of the disk, which can be written at any position.
    pub conventional: u32,
    /// Maximum number of open zones; 0 for no limit.
    pub max_open: u32,
    /// Maximum number of active zones, open or closed; 0 for no limit.
    pub max_active: u32,
    /// Logical block size in bytes.
    pub logical_block_size: u32,
    /// Directory for the zones, with a file for each. `None` for a disk in memory.
    pub directory: Option<PathBuf>,
}

impl ZonedOptions {
    /// Options of a disk in memory with zones of 64 MiB and without conventional zones.
    pub fn new(size: u64) -> Self {
        ZonedOptions {
            size,
            zone_size: 64 << 20,
            conventional: 0,
            max_open: 0,
            max_active: 0,
            logical_block_size: 4096,
            directory: None,
        }
    }

    /// Sets the [size of a zone](field@Self::zone_size).
    pub fn zone_size(self, zone_size: u32) -> Self {
        ZonedOptions { zone_size, ..self }
    }

    /// Sets the number of [conventional zones](field@Self::conventional).
    pub fn conventional(self, conventional: u32) -> Self {
        ZonedOptions { conventional, ..self }
    }

    /// Limits [open zones](field@Self::max_open).
    pub fn max_open(self, max_open: u32) -> Self {
        ZonedOptions { max_open, ..self }
    }

    /// Limits [active zones](field@Self::max_active).
    pub fn max_active(self, max_active: u32) -> Self {
        ZonedOptions { max_active, ..self }
    }

    /// Sets the [logical block size](field@Self::logical_block_size).
    pub fn logical_block_size(self, logical_block_size: u32) -> Self {
        ZonedOptions { logical_block_size, ..self }
    }

    /// Keeps the zones in a [directory](field@Self::directory).
    pub fn directory(self, path: impl Into<PathBuf>) -> Self {
        ZonedOptions { directory: Some(path.into()), ..self }
    }
}

/// A host-managed zoned disk. The driver requires `USER_COPY` for it. Linux 6.6.
///
/// A disk in a directory without [`Operations::FLUSH`] has no write cache: each change is durable when it completes. Once a
/// sync of a zone has failed, each flush fails with `EIO` until the disk has a new server.
///
/// A new server knows only the files of the directory: zones that were open are closed. It may receive requests again that
/// the last server carried out but could not acknowledge ([`Recovery::Reissue`](crate::Recovery::Reissue)). A write that
/// begins below the write pointer and ends at or above it is accepted once per zone, if the zone has the same bytes up to
/// the pointer. Resets and other zone operations can be repeated. An append is written again, after the first one, because
/// it cannot be distinguished from another append of the same data.
#[derive(Debug)]
pub struct Zoned(Arc<Disk>);

#[derive(Debug)]
struct Disk {
    params: Params,
    zone_size: u64,
    zones: Mutex<Zones>,
    /// A lock for each zone, whose bytes and state change together.
    busy: Vec<Mutex<()>>,
    store: Store,
}

impl Zoned {
    /// Opens a disk: a new one, or the one in the directory.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] if the options are invalid, [`Error::Mismatch`] if they do not match the directory, [`Error::File`] if the directory
    /// cannot be used or another server uses it.
    pub fn open(options: &ZonedOptions) -> Result<Self> {
        Self::with_params(options, Self::shape(options))
    }

    /// Returns the parameters of a disk with these options.
    pub fn shape(options: &ZonedOptions) -> Params {
        let mut params = Params::new(options.size, options.logical_block_size);
        params.operations = Operations::WRITE;
        params.operations.set(Operations::FLUSH | Operations::FUA, options.directory.is_some());
        params.chunk_size = options.zone_size;
        params.zoned = Some(ZonedLimits {
            max_open: options.max_open,
            max_active: options.max_active,
            max_append_bytes: params.max_io_bytes,
        });
        params
    }

    /// Opens a disk with changed parameters of [`shape`](Zoned::shape).
    ///
    /// # Errors
    ///
    /// As [`open`](Zoned::open).
    pub fn with_params(options: &ZonedOptions, mut params: Params) -> Result<Self> {
        if let Some(zoned) = &mut params.zoned {
            zoned.max_append_bytes = zoned.max_append_bytes.min(params.max_io_bytes);
        }
        params.validate()?;
        let zone_size = u64::from(options.zone_size);
        if !options.size.is_multiple_of(zone_size) {
            return Err(Error::invalid(
                Parameter::Size,
                options.size,
                format!("not a multiple of the zone size of {zone_size} bytes"),
            ));
        }
        let count = (options.size / zone_size) as usize;
        let conventional = options.conventional as usize;
        if conventional >= count {
            let rule = format!("of {count} zones at least one has to be sequential");
            return Err(Error::invalid(Parameter::ConventionalZones, conventional, rule));
        }
        let (store, written) = match &options.directory {
            Some(directory) => {
                let (files, written) =
                    Files::open(directory, zone_size, params.logical_block_size, conventional, count)?;
                (Store::Files(files), written)
            }
            None => {
                let sparse = Sparse::new(options.size);
                let sparse =
                    sparse.ok_or_else(|| Error::invalid(Parameter::Size, options.size, "too large for a RAM disk"))?;
                (Store::Memory(sparse), (0..count).map(|index| (index >= conventional).then_some(0)).collect())
            }
        };
        let zones = Mutex::new(Zones::new(zone_size, &written, options.max_open, options.max_active));
        Ok(Zoned(Arc::new(Disk {
            params,
            zone_size,
            zones,
            busy: (0..count).map(|_| Mutex::default()).collect(),
            store,
        })))
    }
}

impl Disk {
    fn zones(&self) -> MutexGuard<'_, Zones> {
        self.zones.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Locks the bytes and the state of a zone.
    fn busy(&self, offset: u64) -> MutexGuard<'_, ()> {
        self.busy[(offset / self.zone_size) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut request: Request<'_>) {
        let offset = request.offset();
        let result = match request.op() {
            Op::Read => self.store.read(offset, request.data_mut()).map_err(|e| failed(&e)),
            Op::Write => self.write(offset, request.data(), self.durably(&request)),
            Op::ZoneAppend => match self.append(&request) {
                Ok(landed) => return request.complete_append(landed),
                Err(errno) => Err(errno),
            },
            Op::Flush => self.store.flush().map_err(|e| failed(&e)),
            Op::ZoneOpen => self.zones().open(offset),
            Op::ZoneClose => self.zones().close(offset),
            Op::ZoneFinish => self.finish(offset, self.durably(&request)),
            Op::ZoneReset => self.reset(offset, self.durably(&request)),
            Op::ZoneResetAll => self.reset_all(self.durably(&request)),
            Op::ReportZones => {
                self.report(offset, request.data_mut());
                Ok(())
            }
            Op::Discard | Op::WriteZeroes => Err(Errno::EOPNOTSUPP),
        };
        request.finish(result);
    }

    /// Returns whether a request's change has to be durable when it completes. Without a write cache there are no flushes.
    fn durably(&self, request: &Request<'_>) -> bool {
        request.force_unit_access() || !self.params.operations.contains(Operations::FLUSH)
    }

    /// Writes to a zone at its write pointer, which moves only if the write succeeds.
    ///
    /// A server can exit after it has carried out a write and before it has acknowledged it. With `--recovery reissue`, the
    /// next server receives that write again, below the write pointer, and accepts it if the zone has the same bytes there.
    /// An append that is sent again is written after the first one: it cannot be distinguished from another append of the
    /// same data.
    fn write(&self, offset: u64, data: &[u8], durably: bool) -> Result<(), Errno> {
        let _busy = self.busy(offset);
        let start = self.zones().place_write(offset, data.len() as u64)?;
        match start {
            Start::Anywhere => return self.store.write(offset, data, durably).map_err(|e| failed(&e)),
            Start::AtPointer => {}
            Start::BelowPointer(bytes) => {
                let there = self.store.holds(offset, &data[..bytes as usize]).map_err(|e| failed(&e))?;
                if !there {
                    return Err(Errno::EIO);
                }
            }
        }
        self.write_sequentially(offset, data, durably)
    }

    fn append(&self, request: &Request<'_>) -> Result<u64, Errno> {
        let _busy = self.busy(request.offset());
        let landed = self.zones().place_append(request.offset(), request.len())?;
        self.write_sequentially(landed, request.data(), self.durably(request))?;
        Ok(landed)
    }

    /// Writes to a sequential zone that the caller has locked.
    fn write_sequentially(&self, offset: u64, data: &[u8], durably: bool) -> Result<(), Errno> {
        let (index, present) = {
            let mut zones = self.zones();
            let index = zones.index(offset);
            zones.begin_write(index)?;
            (index, zones.written_to(index))
        };
        let written = self.store.trim(index, present).and_then(|()| self.store.write(offset, data, durably));
        if written.is_err() {
            self.store.undo(index, present);
        }
        let end = offset + data.len() as u64 - index as u64 * self.zone_size;
        self.zones().end_write(index, written.is_ok().then_some(end));
        written.map_err(|e| failed(&e))
    }

    fn finish(&self, offset: u64, durably: bool) -> Result<(), Errno> {
        let _busy = self.busy(offset);
        let (index, written) = {
            let zones = self.zones();
            let index = zones.sequential(offset)?;
            (index, zones.written_to(index))
        };
        let filled = self.store.trim(index, written).and_then(|()| self.store.fill(index, self.zone_size));
        filled.map_err(|e| failed(&e))?;
        // The state follows the file, durable or not.
        self.zones().finish(index);
        self.store.changed(index, durably).map_err(|e| failed(&e))
    }

    fn reset(&self, offset: u64, durably: bool) -> Result<(), Errno> {
        let _busy = self.busy(offset);
        let index = self.zones().sequential(offset)?;
        self.store.clear(index, self.zone_size).map_err(|e| failed(&e))?;
        // As in `finish`.
        self.zones().reset(index);
        self.store.changed(index, durably).map_err(|e| failed(&e))
    }

    fn reset_all(&self, durably: bool) -> Result<(), Errno> {
        let written = self.zones().written();
        written.into_iter().try_for_each(|index| self.reset(index as u64 * self.zone_size, durably))
    }

    fn report(&self, offset: u64, into: &mut [u8]) {
        into.fill(0);
        let zones = self.zones();
        for (index, place) in (zones.index(offset)..zones.len()).zip(into.chunks_exact_mut(64)) {
            place.copy_from_slice(&zones.describe(index));
        }
    }
}

/// Logs an error of the store and returns its errno.
fn failed(error: &io::Error) -> Errno {
    log::error!("zoned: {error}");
    errno_of(error)
}

impl Target for Zoned {
    fn kind(&self) -> &str {
        "zoned"
    }

    fn params(&self) -> Params {
        self.0.params
    }

    fn backing(&self) -> Option<BackingIdentity> {
        self.0.store.backing()
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(ZonedQueue(self.0.clone())))
    }
}

struct ZonedQueue(Arc<Disk>);

impl QueueHandler for ZonedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| self.0.serve(request));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};

    use super::*;

    const ZONE: u32 = 1 << 20;

    fn disk(directory: &std::path::Path) -> Arc<Disk> {
        let mut options = ZonedOptions::new(4 << 20);
        options.zone_size = ZONE;
        options.directory = Some(directory.to_owned());
        Zoned::open(&options).unwrap().0
    }

    fn write(disk: &Disk, offset: u64, data: &[u8]) -> Result<(), Errno> {
        disk.write(offset, data, false)
    }

    #[test]
    fn a_failed_write_does_not_move_the_write_pointer() {
        let directory = tempfile::tempdir().unwrap();
        // A file that can be prevented from growing, as on a full file system.
        let file = File::from(memfd_create(c"zone", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        std::os::unix::fs::symlink(path, directory.path().join("seq-000001")).unwrap();
        let disk = disk(directory.path());
        let first = u64::from(ZONE);
        write(&disk, first, &[1; 8192]).unwrap();
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_GROW)).unwrap();
        for _ in 0..2 {
            assert_eq!(write(&disk, first + 8192, &[2; 4096]), Err(Errno::EPERM));
            assert_eq!(disk.zones().written_to(1), 8192);
        }
        assert_eq!(disk.finish(first, false), Err(Errno::EPERM));
        assert_eq!(disk.zones().written_to(1), 8192, "the zone is not full");
        assert_eq!(file.metadata().unwrap().len(), 8192, "as a new server sees it");
    }

    #[test]
    fn a_new_server_accepts_the_last_write_again() {
        let directory = tempfile::tempdir().unwrap();
        let server = disk(directory.path());
        write(&server, 0, &[1; 8192]).unwrap();
        write(&server, 8192, &[2; 8192]).unwrap();
        drop(server);
        let server = disk(directory.path());
        assert_eq!(write(&server, 8192, &[3; 8192]), Err(Errno::EIO), "other data");
        write(&server, 8192, &[2; 8192]).unwrap();
        assert_eq!(server.zones().written_to(0), 16384);
        assert_eq!(write(&server, 8192, &[2; 8192]), Err(Errno::EIO), "only once");
        drop(server);
        // The last server was killed during a write of three blocks, within the second one.
        let zone = File::options().write(true).open(directory.path().join("seq-000000")).unwrap();
        zone.set_len(16384).unwrap();
        zone.write_all_at(&[4; 5000], 16384).unwrap();
        let server = disk(directory.path());
        assert_eq!(server.zones().written_to(0), 20480);
        write(&server, 16384, &[4; 12288]).unwrap();
        write(&server, 28672, &[5; 4096]).unwrap();
        let mut bytes = [0; 16384];
        server.store.read(16384, &mut bytes).unwrap();
        assert_eq!(bytes, [[4; 4096], [4; 4096], [4; 4096], [5; 4096]].concat()[..]);
        assert_eq!(zone.metadata().unwrap().len(), 32768);
    }
}
