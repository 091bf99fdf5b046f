// SPDX-License-Identifier: MIT OR Apache-2.0

//! `zoned`: a host-managed zoned disk, in memory or in a directory.
//!
//! * [`zones`] — the rules: write pointers, conditions, limits.
//! * [`store`] — where the bytes are.

mod store;
mod zones;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use self::store::{Files, Store};
use self::zones::Zones;
use super::sparse::Sparse;
use crate::error::{Error, Result, errno_of};
use crate::params::{Operations, Params, ZonedLimits};
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// How a zoned disk is made.
#[derive(Clone, Debug)]
pub struct ZonedOptions {
    /// Capacity in bytes, a multiple of the zone size.
    pub size: u64,
    /// Bytes of a zone, a power of two.
    pub zone_size: u32,
    /// How many zones at the disk's beginning can be written anywhere.
    pub conventional: u32,
    /// Most open zones; 0 for no limit.
    pub max_open: u32,
    /// Most active zones, open or closed; 0 for no limit.
    pub max_active: u32,
    /// Logical block size in bytes.
    pub logical_block_size: u32,
    /// Where the zones are kept, a file for each; in memory without.
    pub directory: Option<PathBuf>,
}

impl ZonedOptions {
    /// A disk in memory, with zones of 64 MiB and no conventional ones.
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
}

/// A zoned disk. Data that is written to it moves by `USER_COPY`, as the driver demands (6.6).
///
/// One in a directory without [`Operations::FLUSH`] has no write cache: each change is durable when it ends. Once a sync
/// of a zone has failed, every flush fails with `EIO` until the disk has a new server.
#[derive(Debug)]
pub struct Zoned(Arc<Disk>);

#[derive(Debug)]
struct Disk {
    params: Params,
    zone_size: u64,
    zones: Mutex<Zones>,
    /// A zone's own: its bytes and its state change together.
    busy: Vec<Mutex<()>>,
    store: Store,
}

impl Zoned {
    /// A disk, new or as its directory holds it.
    ///
    /// # Errors
    ///
    /// [`Error::InvalidValue`] for an impossible shape, or another one than the directory's;
    /// [`Error::File`] if the directory cannot be used, or is by another server.
    pub fn open(options: &ZonedOptions) -> Result<Self> {
        Self::with_params(options, Self::shape(options))
    }

    /// The shape of such a disk.
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

    /// A disk of a shape that was made from [`shape`](Zoned::shape).
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
                "size",
                options.size,
                format!("not a multiple of the zone size of {zone_size} bytes"),
            ));
        }
        let count = (options.size / zone_size) as usize;
        let conventional = options.conventional as usize;
        if conventional >= count {
            let rule = format!("of {count} zones at least one has to be sequential");
            return Err(Error::invalid("conventional zones", conventional, rule));
        }
        let (store, written) = match &options.directory {
            Some(directory) => {
                let (files, written) = Files::open(directory, zone_size, conventional, count)?;
                (Store::Files(files), written)
            }
            None => {
                let sparse = Sparse::new(options.size);
                let sparse = sparse.ok_or_else(|| Error::invalid("size", options.size, "too large for a RAM disk"))?;
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

    /// Keeps others from a zone's bytes and state.
    fn busy(&self, offset: u64) -> MutexGuard<'_, ()> {
        self.busy[(offset / self.zone_size) as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, mut request: Request<'_>) {
        let offset = request.offset();
        let result = match request.op() {
            Op::Read => self.store.read(offset, request.data_mut()).map_err(|e| failed(&e)),
            Op::Write => self.write(&request),
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

    /// Whether what a request changes has to be durable when it ends. Without a write cache no flush will come.
    fn durably(&self, request: &Request<'_>) -> bool {
        request.force_unit_access() || !self.params.operations.contains(Operations::FLUSH)
    }

    fn write(&self, request: &Request<'_>) -> Result<(), Errno> {
        let _busy = self.busy(request.offset());
        self.zones().write(request.offset(), request.len())?;
        let written = self.store.write(request.offset(), request.data(), self.durably(request));
        written.map_err(|e| failed(&e))
    }

    fn append(&self, request: &Request<'_>) -> Result<u64, Errno> {
        let _busy = self.busy(request.offset());
        let landed = self.zones().append(request.offset(), request.len())?;
        let written = self.store.write(landed, request.data(), self.durably(request));
        written.map(|()| landed).map_err(|e| failed(&e))
    }

    fn finish(&self, offset: u64, durably: bool) -> Result<(), Errno> {
        let _busy = self.busy(offset);
        let index = self.zones().finish(offset)?;
        self.store.fill(index, self.zone_size, durably).map_err(|e| failed(&e))
    }

    fn reset(&self, offset: u64, durably: bool) -> Result<(), Errno> {
        let _busy = self.busy(offset);
        let index = self.zones().reset(offset)?;
        self.store.clear(index, self.zone_size, durably).map_err(|e| failed(&e))
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

/// The errno of a store that does not do what it should.
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

    fn open_queue(&self, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(ZonedQueue(self.0.clone())))
    }
}

struct ZonedQueue(Arc<Disk>);

impl QueueHandler for ZonedQueue {
    fn handle(&mut self, requests: Requests<'_>) {
        requests.for_each(|request| self.0.serve(request));
    }
}
