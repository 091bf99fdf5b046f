// SPDX-License-Identifier: MIT OR Apache-2.0

//! Memory that clients share with a server (`SHMEM_ZC`, Linux 7.1): requests whose data is in it are not
//! copied at all.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev};
use nix::unistd::Pid;

use crate::errno::Errno;
use crate::memory::Region;
use crate::uapi;

/// Time that a request waits for the registration of its memory to become known here.
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(2);

/// A file's memory, mapped by this process and by clients: a memfd, or a file on tmpfs or hugetlbfs.
///
/// A client's direct I/O from and to its mapping reaches the server without a copy if all of a request's
/// memory is in one such file, in order. Other requests move as they do anyway.
///
/// Clients can change the bytes at any time, also while a request is served, and the file's length too. So no handler gets a
/// reference to them: requests that are forwarded to files, or whose handlers
/// [copy](crate::Access::Copies) their data, move without another copy, and handlers that look at
/// [bytes](crate::Access::Bytes) get a copy of their own. Where the file is gone, requests fail.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    region: Arc<Region>,
    len: u64,
    read_only: bool,
}

impl SharedMemory {
    /// Maps the first `len` bytes of a file, whole pages of it, up to 4 GiB. With `read_only` only writes can
    /// use it: the server then never changes it.
    ///
    /// # Errors
    ///
    /// Errors of `mmap`; `EINVAL` for a length that is not whole pages.
    pub fn map(file: &File, len: u64, read_only: bool) -> io::Result<Self> {
        if len == 0 || !len.is_multiple_of(crate::memory::PAGE_SIZE as u64) || len > 1 << 32 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let size = usize::try_from(len).map_err(|_| io::ErrorKind::InvalidInput)?;
        let region = Arc::new(Region::shared_file(file, size, !read_only)?);
        let memory = SharedMemory { region, len, read_only };
        // It may be forbidden to copy it.
        memory.place(0, 1).read(0, &mut [0])?;
        Ok(memory)
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns whether it has no bytes; never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn address(&self) -> u64 {
        self.region.address() as u64
    }

    fn place(&self, offset: usize, len: usize) -> SharedRange {
        SharedRange { region: self.region.clone(), offset, len }
    }

    pub(crate) fn flags(&self) -> u32 {
        if self.read_only { uapi::UBLK_SHMEM_BUF_READ_ONLY } else { 0 }
    }
}

/// Range of a request's data in shared memory.
#[derive(Clone, Debug)]
pub(crate) struct SharedRange {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl SharedRange {
    pub(crate) fn user_address(&self) -> u64 {
        self.region.address() as u64 + self.offset as u64
    }

    /// Copies bytes from its byte `at` on.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) -> io::Result<()> {
        let remote = [self.part(at, into.len())?];
        let wanted = into.len();
        // By the kernel, which has an error for pages that are gone where an access would end the process.
        let read = process_vm_readv(Pid::this(), &mut [IoSliceMut::new(into)], &remote)?;
        if read == wanted { Ok(()) } else { Err(Errno::EFAULT.into()) }
    }

    /// Copies bytes there.
    pub(crate) fn write(&self, at: usize, from: &[u8]) -> io::Result<()> {
        let remote = [self.part(at, from.len())?];
        let written = process_vm_writev(Pid::this(), &[IoSlice::new(from)], &remote)?;
        if written == from.len() { Ok(()) } else { Err(Errno::EFAULT.into()) }
    }

    fn part(&self, at: usize, len: usize) -> io::Result<RemoteIoVec> {
        let fits = at.checked_add(len).is_some_and(|end| end <= self.len);
        fits.then(|| RemoteIoVec { base: self.user_address() as usize + at, len }).ok_or_else(|| Errno::EINVAL.into())
    }
}

/// A device's shared memory, by the driver's numbers.
#[derive(Debug, Default)]
pub(crate) struct SharedTable {
    state: Mutex<TableState>,
    changed: Condvar,
    /// One change at a time, driver and table together: the driver gives numbers anew.
    changing: Mutex<()>,
}

#[derive(Debug, Default)]
struct TableState {
    memory: Vec<Option<SharedMemory>>,
    /// Registrations whose number is not known yet.
    under_way: usize,
}

impl SharedTable {
    fn state(&self) -> MutexGuard<'_, TableState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers memory by `register`, which returns its index. Requests in it may come before that is known
    /// here; they wait.
    pub(crate) fn add<E>(
        &self,
        memory: SharedMemory,
        register: impl FnOnce(&SharedMemory) -> Result<u16, E>,
    ) -> Result<u16, E> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.state().under_way += 1;
        let registered = register(&memory);
        let mut state = self.state();
        state.under_way -= 1;
        if let Ok(index) = &registered {
            let index = usize::from(*index);
            if state.memory.len() <= index {
                state.memory.resize(index + 1, None);
            }
            state.memory[index] = Some(memory);
        }
        drop(state);
        self.changed.notify_all();
        registered
    }

    /// Ends a registration by `unregister`, and forgets the memory.
    pub(crate) fn remove<E>(&self, index: u16, unregister: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        unregister()?;
        if let Some(memory) = self.state().memory.get_mut(usize::from(index)) {
            *memory = None;
        }
        Ok(())
    }

    /// The memory of a request: `code` is the address in its descriptor (uapi 3.9).
    pub(crate) fn find(&self, code: u64, len: usize) -> Option<SharedRange> {
        let (offset, index) = (code & 0xffff_ffff, (code >> 32) as usize);
        let deadline = Instant::now() + REGISTRATION_TIMEOUT;
        let mut state = self.state();
        loop {
            if let Some(Some(memory)) = state.memory.get(index) {
                let fits = offset.checked_add(len as u64).is_some_and(|end| end <= memory.len);
                return fits.then(|| memory.place(offset as usize, len));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.under_way == 0 || left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> SharedMemory {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        SharedMemory::map(&file, 8192, false).unwrap()
    }

    #[test]
    fn a_code_names_memory_and_place() {
        let table = SharedTable::default();
        let memory = memory();
        assert_eq!(table.add(memory.clone(), |_| Ok::<_, ()>(3)), Ok(3));
        let buffer = table.find(3 << 32 | 4096, 512).unwrap();
        assert_eq!(buffer.user_address(), memory.address() + 4096);
        assert!(table.find(3 << 32 | 8000, 512).is_none(), "beyond its end");
        assert!(table.find(2 << 32, 512).is_none());
        table.remove(3, || Ok::<_, ()>(())).unwrap();
        assert!(table.find(3 << 32, 512).is_none());
    }

    #[test]
    fn a_request_that_is_quicker_than_its_registration_waits() {
        let table = Arc::new(SharedTable::default());
        let theirs = table.clone();
        table
            .add(memory(), |_| {
                let finder = std::thread::spawn(move || theirs.find(0, 512).is_some());
                std::thread::sleep(Duration::from_millis(50));
                assert!(!finder.is_finished());
                std::thread::spawn(move || assert!(finder.join().unwrap()));
                Ok::<_, ()>(0)
            })
            .unwrap();
    }

    #[test]
    fn memory_whose_file_is_gone_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let memory = SharedMemory::map(&file, 8192, false).unwrap();
        let place = memory.place(4096, 512);
        place.write(500, b"end").unwrap();
        let mut bytes = [1; 4];
        place.read(499, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0end");
        assert!(place.write(510, b"end").is_err(), "beyond the request");
        file.set_len(0).unwrap();
        assert!(place.read(0, &mut bytes).is_err());
        assert!(place.write(0, &bytes).is_err());
        file.set_len(8192).unwrap();
        place.read(499, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
    }

    #[test]
    fn only_whole_pages_are_shared() {
        let file = tempfile::tempfile().unwrap();
        for len in [0, 100, 4097] {
            assert!(SharedMemory::map(&file, len, false).is_err());
        }
    }
}
