// SPDX-License-Identifier: MIT OR Apache-2.0

//! Mapped memory: the buffers of requests and the descriptors that the driver writes.
//!
//! Invariants that the `unsafe` blocks of this file refer to:
//!
//! 1. A [`Region`] is one live mapping of exactly `len` bytes, made by `mmap` and unmapped only when
//!    the last owner drops it. Nothing else unmaps or moves it.
//! 2. An [`IoBuffer`] is a page-aligned slice of a region that it keeps alive; no two live `IoBuffer`s
//!    overlap.
//! 3. The bytes of an `IoBuffer` are touched by one side at a time: the driver while the tag is armed,
//!    the server while it owns the request. References to them are made only from a
//!    [`Request`](crate::Request), which exists only while the server owns the tag. Memory that clients share is never an
//!    `IoBuffer`, and no reference to it is ever made.
//! 4. Descriptors are written by the driver before it completes the tag's command, and not again
//!    before the tag is committed. They are read by volatile loads into an owned copy; no reference to
//!    them is ever made.

use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};

use crate::uapi::ublksrv_io_desc;
use crate::units::{QueueId, Tag};

/// Page size of the platforms that ublk servers run on here.
pub(crate) const PAGE_SIZE: usize = 4096;

/// One mapping.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a `Region` is only an address range (1); code that reads or writes through it states why that is race free (3, 4).
unsafe impl Send for Region {}
// SAFETY: as above; `&Region` gives out nothing but addresses.
unsafe impl Sync for Region {}

impl Region {
    /// Zeroed private memory. Pages are taken from the system only when touched.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        let size = NonZeroUsize::new(len.next_multiple_of(PAGE_SIZE)).ok_or(io::ErrorKind::InvalidInput)?;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new private mapping at an address of the kernel's choice affects no other memory.
        let start = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags) }?;
        Ok(Region { start: start.cast(), len: size.get() })
    }

    /// The driver's descriptors, read-only and shared with it. Forked children do not inherit the
    /// mapping: it would keep the device open after the server is gone.
    fn of_file(fd: impl AsFd, len: usize, offset: u64) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: as in `anonymous`.
        let start = unsafe { mmap(None, size, ProtFlags::PROT_READ, MapFlags::MAP_SHARED, fd, offset as i64) }?;
        let region = Region { start: start.cast(), len: size.get() };
        region.advise(0, region.len, MmapAdvise::MADV_DONTFORK);
        Ok(region)
    }

    /// A file's bytes, shared with other processes that map them.
    pub(crate) fn shared_file(file: impl AsFd, len: usize, writable: bool) -> io::Result<Self> {
        let size = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut access = ProtFlags::PROT_READ;
        access.set(ProtFlags::PROT_WRITE, writable);
        // SAFETY: as in `anonymous`.
        let start = unsafe { mmap(None, size, access, MapFlags::MAP_SHARED, file, 0) }?;
        Ok(Region { start: start.cast(), len: size.get() })
    }

    fn advise(&self, offset: usize, len: usize, advice: MmapAdvise) {
        assert!(offset + len <= self.len);
        // SAFETY: the range is in the mapping (1, assertion above). DONTFORK changes no content; DONTNEED is used only on a
        // slice that nothing refers to any more (2).
        let result = unsafe { madvise(self.start.add(offset).cast(), len, advice) };
        if let Err(errno) = result {
            log::debug!("madvise({advice:?}) on {len} bytes: {errno}");
        }
    }

    pub(crate) fn address(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: (1) this owner is the last, and the range is the one that `mmap` returned.
        if let Err(errno) = unsafe { munmap(self.start.cast(), self.len) } {
            log::error!("munmap of {} bytes: {errno}", self.len);
        }
    }
}

/// Bytes that a forked child shares with its parent.
#[derive(Debug)]
pub(crate) struct SharedBytes {
    region: Option<Region>,
    len: usize,
}

impl SharedBytes {
    /// A shared copy of `bytes`; no mapping for none.
    pub(crate) fn new(bytes: &[u8]) -> io::Result<Self> {
        let Some(size) = NonZeroUsize::new(bytes.len().next_multiple_of(PAGE_SIZE)) else {
            return Ok(SharedBytes { region: None, len: 0 });
        };
        // SAFETY: as in `Region::anonymous`.
        let start =
            unsafe { mmap_anonymous(None, size, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED) }?;
        let region = Region { start: start.cast(), len: size.get() };
        // SAFETY: (1) the mapping is new, ours and at least as long.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), region.address(), bytes.len()) };
        Ok(SharedBytes { region: Some(region), len: bytes.len() })
    }

    /// The first four bytes as a number that the processes may change at any time; [`bytes`](Self::bytes) must not be used
    /// then. `None` if there are fewer.
    pub(crate) fn word(&self) -> Option<&AtomicU32> {
        let region = self.region.as_ref().filter(|_| self.len >= size_of::<AtomicU32>())?;
        // SAFETY: (1) the mapping begins with a page, which lives as long as `self`, and holds plain numbers.
        Some(unsafe { AtomicU32::from_ptr(region.address().cast()) })
    }

    /// Returns the bytes. No process may write them while the slice is used: the caller reads them before the child runs, and
    /// after the child has reported that it has finished.
    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.region {
            None => &[],
            // SAFETY: (1), and the length was checked against the mapping's when that was made.
            Some(region) => unsafe { std::slice::from_raw_parts(region.address(), self.len) },
        }
    }
}

/// Page-aligned memory for the data of one request.
///
/// The buffer stays valid as long as it is held, also after its device is deleted. Its pages go back to the system when the
/// last holder drops it.
#[derive(Debug)]
pub struct IoBuffer {
    region: Arc<Region>,
    offset: usize,
    len: usize,
}

impl IoBuffer {
    /// A buffer in a mapping of its own.
    pub fn new(len: usize) -> io::Result<Self> {
        let region = Arc::new(Region::anonymous(len)?);
        Ok(IoBuffer { region, offset: 0, len })
    }

    /// `count` buffers in one mapping.
    pub(crate) fn many(count: usize, len: usize) -> io::Result<Vec<Self>> {
        let stride = len.next_multiple_of(PAGE_SIZE);
        let total = stride.checked_mul(count).ok_or(io::ErrorKind::OutOfMemory)?;
        let region = Arc::new(Region::anonymous(total)?);
        Ok((0..count).map(|i| IoBuffer { region: region.clone(), offset: i * stride, len }).collect())
    }

    /// First byte. Reading or writing through it needs the right of invariant 3 in this file: the
    /// request that the buffer belongs to must be the caller's, or the buffer must have been taken
    /// out of its request by [`Request::replace_buffer`](crate::Request::replace_buffer).
    pub fn as_ptr(&self) -> *mut u8 {
        // SAFETY: (2) the offset is in the region.
        unsafe { self.region.address().add(self.offset) }
    }

    /// Capacity in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the capacity is zero.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Gives the pages back to the system; the content becomes zeros. Invariant 3: nothing uses the buffer
    /// meanwhile.
    pub(crate) fn give_back_pages(&self) {
        self.region.advise(self.offset, self.len.next_multiple_of(PAGE_SIZE), MmapAdvise::MADV_DONTNEED);
    }

    /// Gives back many buffers: adjacent ones take one system call, each of which interrupts all
    /// CPUs that run this process.
    pub(crate) fn give_back_all<'b>(buffers: impl Iterator<Item = &'b IoBuffer>) {
        let mut run: Option<(&Region, usize, usize)> = None;
        for buffer in buffers {
            let (region, first) = (&*buffer.region, buffer.offset);
            let end = first + buffer.len.next_multiple_of(PAGE_SIZE);
            run = match run {
                Some((same, begin, last)) if std::ptr::eq(same, region) && last == first => Some((same, begin, end)),
                other => {
                    give_back(other);
                    Some((region, first, end))
                }
            };
        }
        give_back(run);
    }

    pub(crate) fn user_address(&self) -> u64 {
        self.as_ptr() as u64
    }

    /// The first `len` bytes.
    ///
    /// # Safety
    ///
    /// Invariant 3: the server owns the tag of this buffer for the lifetime of the slice, and no
    /// other reference to these bytes is alive.
    #[allow(clippy::mut_from_ref, reason = "exclusive access is the caller's promise, see Safety")]
    pub(crate) unsafe fn bytes_mut(&self, len: usize) -> &mut [u8] {
        assert!(len <= self.len);
        // SAFETY: (2) and the assertion: the range is mapped; (3) is the caller's promise. Anonymous
        // memory is initialised (zeroed) from the start.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr(), len) }
    }

    /// The first `len` bytes, to look at.
    ///
    /// # Safety
    ///
    /// Invariant 3: the server owns the tag of this buffer for the lifetime of the slice, and no
    /// mutable reference to these bytes is alive.
    pub(crate) unsafe fn bytes(&self, len: usize) -> &[u8] {
        assert!(len <= self.len);
        // SAFETY: as in `bytes_mut`.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), len) }
    }

    /// Copies the first `len` bytes of `from` to the start of this buffer.
    ///
    /// # Safety
    ///
    /// Invariant 3 for this buffer. `from` may have other readers or writers (it was handed out): its
    /// bytes are then those of some moment during the copy.
    pub(crate) unsafe fn copy_from(&self, from: &IoBuffer, len: usize) {
        assert!(len <= self.len && len <= from.len);
        // SAFETY: (2) both ranges are mapped and disjoint; the assertion bounds them.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.as_ptr(), len) };
    }
}

/// Gives a stretch of a region back to the system.
fn give_back(stretch: Option<(&Region, usize, usize)>) {
    if let Some((region, begin, end)) = stretch {
        region.advise(begin, end - begin, MmapAdvise::MADV_DONTNEED);
    }
}

impl Drop for IoBuffer {
    fn drop(&mut self) {
        // A buffer that outlived its queue's other buffers must not keep their pages; its own go here. The count only
        // saves a call: the pages are this buffer's, whichever others the mapping has.
        if Arc::strong_count(&self.region) > 1 {
            self.give_back_pages();
        }
    }
}

/// Descriptor of one request by the driver; an owned copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    /// Operation in bits 0 to 7, `UBLK_IO_F_*` flags above.
    pub(crate) op_flags: u32,
    /// Length in sectors.
    pub(crate) nr_sectors: u32,
    /// First sector.
    pub(crate) start_sector: u64,
    /// The buffer's address in copy mode.
    pub(crate) address: u64,
}

/// The array of descriptors of one queue.
#[derive(Debug)]
pub(crate) struct DescriptorMap {
    region: Arc<Region>,
    depth: u16,
}

impl DescriptorMap {
    /// Bytes of one descriptor.
    pub(crate) const STRIDE: usize = size_of::<ublksrv_io_desc>();
    /// Distance between the queues' arrays in the char device's offsets: always that of the largest
    /// depth, independently of the device's depth (uapi 3.7).
    const QUEUE_STRIDE: u64 = (4096 * Self::STRIDE as u64).next_multiple_of(PAGE_SIZE as u64);

    /// Bytes that the array of a queue takes; the driver wants exactly this length.
    pub(crate) fn len_for(depth: u16) -> usize {
        (usize::from(depth) * Self::STRIDE).next_multiple_of(PAGE_SIZE)
    }

    /// Maps a queue's array from the char device.
    pub(crate) fn of_char_device(fd: impl AsFd, queue: QueueId, depth: u16) -> io::Result<Self> {
        let offset = u64::from(queue.0) * Self::QUEUE_STRIDE;
        let region = Region::of_file(fd, Self::len_for(depth), offset)?;
        Ok(DescriptorMap { region: Arc::new(region), depth })
    }

    /// An array in memory shared with a stand-in for the driver.
    #[cfg(any(test, feature = "fake"))]
    pub(crate) fn shared(region: Arc<Region>, depth: u16) -> Self {
        assert!(region.len >= Self::len_for(depth));
        DescriptorMap { region, depth }
    }

    /// The descriptor of a tag whose command has just completed.
    pub(crate) fn read(&self, tag: Tag) -> Descriptor {
        assert!(tag.0 < self.depth);
        // SAFETY: (1) the array holds `depth` descriptors, the assertion bounds the index. The driver
        // writes it only while the tag is armed (4), and the completion that got us here was read with
        // acquire ordering. The union of sectors and zones is read through its sector view; both
        // members are u32.
        unsafe {
            let at = self.region.address().cast::<ublksrv_io_desc>().add(tag.index());
            Descriptor {
                op_flags: (&raw const (*at).op_flags).read_volatile(),
                nr_sectors: (&raw const (*at).anon_1.nr_sectors).read_volatile(),
                start_sector: (&raw const (*at).start_sector).read_volatile(),
                address: (&raw const (*at).addr).read_volatile(),
            }
        }
    }
}

#[cfg(any(test, feature = "fake"))]
impl Region {
    /// Writes a descriptor as the driver would.
    pub(crate) fn write_descriptor(&self, tag: Tag, value: Descriptor) {
        assert!((tag.index() + 1) * DescriptorMap::STRIDE <= self.len);
        // SAFETY: (1) and the assertion: the slot is mapped and writable (fakes map it so); the tag is
        // armed, so the server does not read it now (4).
        unsafe {
            let at = self.address().cast::<ublksrv_io_desc>().add(tag.index());
            (&raw mut (*at).op_flags).write_volatile(value.op_flags);
            (&raw mut (*at).anon_1.nr_sectors).write_volatile(value.nr_sectors);
            (&raw mut (*at).start_sector).write_volatile(value.start_sector);
            (&raw mut (*at).addr).write_volatile(value.address);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_one_region_do_not_overlap_and_are_page_aligned() {
        let buffers = IoBuffer::many(3, 5000).unwrap();
        let addresses: Vec<u64> = buffers.iter().map(IoBuffer::user_address).collect();
        assert!(addresses.iter().all(|a| a.is_multiple_of(PAGE_SIZE as u64)));
        assert!(addresses.windows(2).all(|pair| pair[1] - pair[0] >= 5000));
    }

    #[test]
    fn memory_is_given_back_of_just_the_buffers_that_were_named() {
        let buffers = IoBuffer::many(5, 5000).unwrap();
        let others = IoBuffer::many(1, 4096).unwrap();
        for buffer in buffers.iter().chain(&others) {
            // SAFETY: nothing else refers to this buffer.
            unsafe { buffer.bytes_mut(4096) }.fill(7);
        }
        IoBuffer::give_back_all([&buffers[0], &buffers[1], &others[0], &buffers[3]].into_iter());
        // SAFETY: as above.
        let first = |buffer: &IoBuffer| unsafe { buffer.bytes(4096)[4095] };
        assert_eq!(buffers.iter().map(first).collect::<Vec<_>>(), [0, 0, 7, 0, 7]);
        assert_eq!(first(&others[0]), 0);
    }

    #[test]
    fn a_kept_buffer_outlives_its_queue_and_keeps_its_bytes() {
        let mut buffers = IoBuffer::many(2, 4096).unwrap();
        let kept = buffers.pop().unwrap();
        // SAFETY: nothing else refers to this buffer.
        unsafe { kept.bytes_mut(4) }.copy_from_slice(b"kept");
        drop(buffers);
        // SAFETY: as above.
        assert_eq!(unsafe { kept.bytes_mut(4) }, b"kept");
    }

    #[test]
    fn a_written_descriptor_is_read_back() {
        let region = Arc::new(Region::anonymous(DescriptorMap::len_for(8)).unwrap());
        let map = DescriptorMap::shared(region.clone(), 8);
        let value = Descriptor { op_flags: 0x2001, nr_sectors: 8, start_sector: 1 << 40, address: 0xdead_f000 };
        region.write_descriptor(Tag(7), value);
        assert_eq!(map.read(Tag(7)), value);
        assert_eq!(map.read(Tag(6)).nr_sectors, 0);
    }

    #[test]
    fn the_array_of_a_queue_is_whole_pages() {
        assert_eq!(DescriptorMap::len_for(1), 4096);
        assert_eq!(DescriptorMap::len_for(170), 4096);
        assert_eq!(DescriptorMap::len_for(171), 8192);
        assert_eq!(DescriptorMap::QUEUE_STRIDE, 98304);
    }
}
