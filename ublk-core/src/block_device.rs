// SPDX-License-Identifier: MIT OR Apache-2.0

//! Disks of plain methods.

use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use crate::engine::guarded;
use crate::error::Result;
use crate::identity::BackingIdentity;
use crate::params::Params;
use crate::request::{Op, Request, Requests};
use crate::target::{QueueHandler, QueueInfo, Target};

/// A disk whose methods each carry out one request, for prototypes: every one is a [`Target`].
///
/// The methods are called on the threads that serve the queues, so with several queues by several threads at once. While a
/// method runs, its queue's other requests wait. A target that should do more (move data without copying it, finish requests
/// later, take several at a time) implements [`Target`] itself.
///
/// An error of a method fails the request with its [`raw_os_error`](io::Error::raw_os_error), or with the errno that
/// [`Errno`](crate::Errno) has for its kind. A method that panics fails its request, and no
/// other one, with `EIO`. The first error or panic of each queue is logged.
///
/// A RAM disk:
///
/// ```
/// use std::io;
/// use std::sync::Mutex;
/// use ublk_core::{BlockDevice, Params};
///
/// #[derive(Debug)]
/// struct Ram(Mutex<Vec<u8>>);
///
/// impl BlockDevice for Ram {
///     fn params(&self) -> Params {
///         Params::new(self.0.lock().unwrap().len() as u64, 512)
///     }
///     fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
///         Ok(buffer.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buffer.len()]))
///     }
///     fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
///         Ok(self.0.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data))
///     }
/// }
/// ```
pub trait BlockDevice: Send + Sync + Debug + 'static {
    /// Returns the disk's shape. The kernel sends only requests of its [`operations`](Params::operations).
    fn params(&self) -> Params;

    /// Returns a short name for lists and messages. By default the name of the type.
    fn name(&self) -> &str {
        short(std::any::type_name::<Self>())
    }

    /// Returns the identity of what the disk is stored in, see [`Target::backing`].
    fn backing(&self) -> Option<BackingIdentity> {
        None
    }

    /// Reads `buffer.len()` bytes at `offset`. The buffer is zeroed before.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data` at `offset`.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let _ = (data, offset);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes everything durable that was written before, by any thread. Called if the operations have
    /// [`FLUSH`](crate::Operations::FLUSH), and after each write with [`FUA`](crate::Operations::FUA).
    fn flush(&self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Discards a range, whose content is then undefined.
    fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let _ = (offset, length);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes a range read as zeros. If `may_unmap` is false, later writes to it must not fail for lack of space.
    fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        let _ = (offset, length, may_unmap);
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// The last part of a type's path, without its parameters.
fn short(name: &str) -> &str {
    let name = name.split_once('<').map_or(name, |(name, _)| name);
    name.rsplit_once("::").map_or(name, |(_, name)| name)
}

impl<D: BlockDevice> Target for D {
    fn kind(&self) -> &str {
        self.name()
    }

    fn params(&self) -> Params {
        BlockDevice::params(self)
    }

    fn backing(&self) -> Option<BackingIdentity> {
        BlockDevice::backing(self)
    }

    fn open_queue(self: Arc<Self>, _: &QueueInfo) -> Result<Box<dyn QueueHandler>> {
        Ok(Box::new(BlockDeviceQueue { disk: self, has_failed: false }))
    }
}

/// Calls the disk's methods.
struct BlockDeviceQueue<D> {
    disk: Arc<D>,
    /// A request failed, which is logged once.
    has_failed: bool,
}

impl<D: BlockDevice> QueueHandler for BlockDeviceQueue<D> {
    fn handle(&mut self, requests: Requests<'_>) {
        for mut request in requests {
            // A panic is this request's: those that came with it are carried out.
            let outcome = guarded(|| carry_out(&*self.disk, &mut request))
                .unwrap_or_else(|panic| Err(io::Error::other(format!("the method panicked: {panic}"))));
            match outcome {
                Ok(()) => request.complete(),
                Err(error) => {
                    if !std::mem::replace(&mut self.has_failed, true) {
                        let name = self.disk.name();
                        log::warn!("{name}: {request:?}: {error} (further errors of this queue are not logged)");
                    }
                    request.fail(&error);
                }
            }
        }
    }
}

fn carry_out(disk: &impl BlockDevice, request: &mut Request<'_>) -> io::Result<()> {
    let (offset, length) = (request.offset(), request.len());
    match request.op() {
        Op::Read => {
            request.clear();
            disk.read_at(request.data_mut(), offset)
        }
        Op::Write => {
            disk.write_at(request.data(), offset)?;
            if request.force_unit_access() { disk.flush() } else { Ok(()) }
        }
        Op::Flush => disk.flush(),
        Op::Discard => disk.discard(offset, length),
        Op::WriteZeroes => {
            disk.write_zeroes(offset, length, !request.no_unmap())?;
            if request.force_unit_access() { disk.flush() } else { Ok(()) }
        }
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::short;

    #[test]
    fn the_short_name_has_neither_path_nor_parameters() {
        assert_eq!(["a::b::Ram", "Ram", "a::Ram<b::C<d::E>>"].map(short), ["Ram"; 3]);
    }
}
