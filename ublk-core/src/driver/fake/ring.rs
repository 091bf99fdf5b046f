// SPDX-License-Identifier: MIT OR Apache-2.0

//! The ring: commands of tags, and operations on files, which it carries out at once.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{CLIENT_TIMEOUT, Command, FakeTag, HeldOperation, Shared};
use crate::driver::{CharDevice, Completion, Elements, FileSlot, Memory, Operation, Ring, Submission, Waker};
use crate::errno::Errno;
use crate::memory::IoBuffer;
use crate::units::{QueueId, Tag};

/// Completions of a ring, and other events that its thread waits for.
#[derive(Debug, Default)]
pub(super) struct Completions {
    state: Mutex<CompletionState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
pub(super) struct CompletionState {
    list: Vec<Completion>,
    woken: bool,
    /// When the timer ends.
    timer: Option<Instant>,
    /// Tags that completions of FETCH_IO_CMDS brought, by the number of their buffer.
    tags: HashMap<u16, Tag>,
    buffers: u16,
    /// Whose pages are registered where: device, queue, tag.
    pub(super) registered: HashMap<u16, (u32, QueueId, Tag)>,
}

impl Completions {
    pub(super) fn state(&self) -> MutexGuard<'_, CompletionState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, user_data: u64, result: i32) {
        self.state().list.push(Completion::last(user_data, result));
        self.changed.notify_all();
    }

    /// Delivers a tag of a batch.
    pub(super) fn deliver(&self, user_data: u64, tag: Tag) {
        let mut state = self.state();
        state.buffers = state.buffers.wrapping_add(1);
        let buffer = state.buffers;
        state.tags.insert(buffer, tag);
        let bytes = size_of::<u16>() as i32;
        state.list.push(Completion { user_data, result: bytes, tags: Some(buffer), more: true });
        drop(state);
        self.changed.notify_all();
    }
}

impl Waker for Completions {
    fn wake(&self) {
        self.state().woken = true;
        self.changed.notify_all();
    }
}

/// A ring's table of files. It stays while operations of the ring are in flight, also if the ring is closed.
pub(super) type RingFiles = Arc<Mutex<Vec<Option<Arc<dyn CharDevice>>>>>;

#[derive(Debug)]
pub(super) struct FakeRing {
    shared: Arc<Shared>,
    completions: Arc<Completions>,
    files: RingFiles,
    queued: Vec<Submission>,
    /// Prompt submissions whose completions were not taken yet.
    prompt: usize,
    /// Places given out in the table of buffers.
    buffers: u16,
}

impl FakeRing {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        FakeRing {
            shared,
            completions: Arc::default(),
            files: Arc::default(),
            queued: Vec::new(),
            prompt: 0,
            buffers: 0,
        }
    }

    fn files(&self) -> MutexGuard<'_, Vec<Option<Arc<dyn CharDevice>>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the device at a place in the ring's table of files.
    fn device(&self, file: FileSlot) -> u32 {
        self.files()[file.0 as usize].as_ref().map_or(-1, |f| f.raw_fd()) as u32
    }

    /// A command of one tag, made here and now.
    fn command(&self, user_data: u64, address: u64, register: Option<u16>) -> Command {
        let daemon = Some(std::thread::current().id());
        Command { ring: self.completions.clone(), user_data, address, register, daemon }
    }

    /// Carries an operation out. What it gives is a completion's result; commands that stay pending give none.
    fn carry_out(&self, user_data: u64, operation: Operation) -> Result<Option<i32>, Errno> {
        let mut state = self.shared.state();
        match operation {
            Operation::Fetch { file, queue, tag, address, register } => {
                let command = self.command(user_data, address, register);
                state.io_command(self.device(file), queue, tag, command, None)?;
                Ok(None)
            }
            Operation::Commit { file, queue, tag, result, address, register } => {
                let command = self.command(user_data, address, register);
                state.io_command(self.device(file), queue, tag, command, Some(result))?;
                Ok(None)
            }
            Operation::GetData { file, queue, tag, address } => {
                state.get_data(self.device(file), queue, tag, address)?;
                Ok(Some(0))
            }
            Operation::Register { file, queue, tag, index } => {
                let id = self.device(file);
                state.pages(id, queue, tag)?;
                self.completions.state().registered.insert(index, (id, queue, tag));
                Ok(Some(0))
            }
            Operation::Unregister { index, .. } => {
                let gone = self.completions.state().registered.remove(&index);
                gone.map(|_| Some(0)).ok_or(Errno::EINVAL)
            }
            Operation::Prepare { file, queue, elements } => {
                if let Some(errno) = state.refusals.get_mut("PREP_IO_CMDS").and_then(VecDeque::pop_front) {
                    return Err(errno);
                }
                for element in self.elements(elements) {
                    let command = Command { daemon: None, ..self.command(user_data, element.tail, element.register) };
                    state.io_command(self.device(file), queue, element.tag, command, None)?;
                }
                Ok(Some(0))
            }
            Operation::CommitBatch { file, queue, elements } => {
                let mut done = 0;
                for element in self.elements(elements) {
                    let command = Command { daemon: None, ..self.command(user_data, element.tail, element.register) };
                    match state.io_command(self.device(file), queue, element.tag, command, Some(element.result)) {
                        Ok(()) => done += i32::from(elements.stride),
                        Err(errno) if done == 0 => return Err(errno),
                        Err(_) => break,
                    }
                }
                Ok(Some(done))
            }
            Operation::FetchBatch { file, queue } => {
                let device = state.devices.get_mut(&self.device(file)).ok_or(Errno::ENODEV)?;
                let queue = device.queues.get_mut(usize::from(queue.0)).ok_or(Errno::EINVAL)?;
                // A stop that came before the command has taken the tags back.
                if queue.tags.iter().all(|tag| matches!(tag, FakeTag::Idle)) {
                    return Err(Errno::ENODEV);
                }
                queue.delivery = Some((self.completions.clone(), user_data));
                Ok(None)
            }
            Operation::Read { fd, memory: Memory::Registered { index, offset }, len, offset: at } => {
                // Aligned, for direct I/O.
                let memory = IoBuffer::new(len as usize).map_err(|_| Errno::ENOMEM)?;
                let read =
                    file_operation(Operation::Read { fd, memory: Memory::At(memory.user_address()), len, offset: at });
                let (id, queue, tag) = self.registered(index)?;
                let count = usize::try_from(read).unwrap_or(0);
                // SAFETY: the buffer is this function's own.
                let bytes = unsafe { memory.bytes(count) };
                state.pages(id, queue, tag)?[offset as usize..][..count].copy_from_slice(bytes);
                Ok(Some(read))
            }
            Operation::Write { fd, memory: Memory::Registered { index, offset }, len, offset: at, durable } => {
                let (id, queue, tag) = self.registered(index)?;
                let buffer = IoBuffer::new(len as usize).map_err(|_| Errno::ENOMEM)?;
                let bytes = &state.pages(id, queue, tag)?[offset as usize..][..len as usize];
                // SAFETY: as above.
                unsafe { buffer.bytes_mut(len as usize) }.copy_from_slice(bytes);
                let memory = Memory::At(buffer.user_address());
                Ok(Some(file_operation(Operation::Write { fd, memory, len, offset: at, durable })))
            }
            other => {
                let is_data = matches!(other, Operation::Read { .. } | Operation::Write { .. });
                if let Some(errno) = state.files.refusal.filter(|_| is_data) {
                    return Ok(Some(-errno.get()));
                }
                if !state.files.holding
                    && let Some(errno) = state.refusal_of(other)
                {
                    return Err(errno);
                }
                if state.files.holding {
                    let (ring, files) = (self.completions.clone(), self.files.clone());
                    state.files.held.push(HeldOperation { ring, user_data, operation: other, files });
                    self.shared.changed.notify_all();
                    return Ok(None);
                }
                let delay = state.files.delay;
                drop(state);
                std::thread::sleep(delay);
                Ok(Some(file_operation(other)))
            }
        }
    }

    fn registered(&self, index: u16) -> Result<(u32, QueueId, Tag), Errno> {
        self.completions.state().registered.get(&index).copied().ok_or(Errno::EFAULT)
    }

    fn elements(&self, elements: Elements) -> Vec<FakeElement> {
        let stride = usize::from(elements.stride);
        // SAFETY: an array of elements is its sender's until the command has completed (see `Submission`).
        let bytes =
            unsafe { std::slice::from_raw_parts(elements.address as *const u8, stride * usize::from(elements.count)) };
        let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let element = |bytes: &[u8]| FakeElement {
            tag: Tag(number(&bytes[..2]) as u16),
            register: Some(number(&bytes[2..4]) as u16),
            result: number(&bytes[4..8]) as i32,
            tail: number(&bytes[8..]),
        };
        bytes.chunks(stride).map(element).collect()
    }
}

/// One element of a batch.
struct FakeElement {
    tag: Tag,
    register: Option<u16>,
    result: i32,
    tail: u64,
}

impl FakeRing {
    /// Carries out queued operations. Returns whether one that is not prompt has completed.
    fn submit_all(&mut self) -> bool {
        let mut news = false;
        for Submission { user_data, operation, prompt } in std::mem::take(&mut self.queued) {
            let result = match self.carry_out(user_data, operation) {
                Ok(None) => continue,
                Ok(Some(result)) => result,
                Err(errno) => -errno.get(),
            };
            self.prompt += usize::from(prompt);
            news |= !prompt;
            self.completions.push(user_data, result);
        }
        self.shared.changed.notify_all();
        news
    }
}

// SAFETY: as for the driver; `carry_out` states the rest.
unsafe impl Ring for FakeRing {
    fn add_file(&mut self, file: &Arc<dyn CharDevice>) -> io::Result<FileSlot> {
        let mut files = self.files();
        let slot = files.iter().position(Option::is_none).unwrap_or_else(|| {
            files.push(None);
            files.len() - 1
        });
        files[slot] = Some(file.clone());
        Ok(FileSlot(slot as u32))
    }

    fn remove_file(&mut self, slot: FileSlot) -> io::Result<()> {
        let file = self.files()[slot.0 as usize].take();
        // Closing it takes another lock.
        drop(file);
        Ok(())
    }

    unsafe fn push(&mut self, submission: Submission) -> io::Result<()> {
        self.queued.push(submission);
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        self.submit_all();
        let refusal = self.shared.state().refusals.get_mut("io_uring_enter").and_then(VecDeque::pop_front);
        refusal.map_or(Ok(()), |errno| Err(errno.into()))
    }

    fn is_submitted(&mut self) -> bool {
        self.queued.is_empty()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.submit_all();
        let mut state = self.completions.state();
        while (state.list.len() <= self.prompt || self.shared.holding.load(Ordering::Relaxed)) && !state.woken {
            let left = state.timer.map(|end| end.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            let left = left.unwrap_or(CLIENT_TIMEOUT);
            state = self.completions.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.woken = false;
        Ok(())
    }

    fn has_prompt(&self) -> bool {
        self.prompt != 0
    }

    fn coalesce(&mut self, window: Duration) -> io::Result<bool> {
        let news = self.submit_all();
        if !news {
            std::thread::sleep(window);
        }
        Ok(news)
    }

    fn take_completions(&mut self, into: &mut Vec<Completion>) -> io::Result<()> {
        self.prompt = 0;
        into.append(&mut self.completions.state().list);
        Ok(())
    }

    fn start_timer(&mut self, after: Duration) -> io::Result<()> {
        self.completions.state().timer = Some(Instant::now() + after);
        Ok(())
    }

    fn timer_ended(&mut self) -> bool {
        self.completions.state().timer.take_if(|end| *end <= Instant::now()).is_some()
    }

    /// Clients' threads act as the driver, but they copy at once.
    fn is_quiet(&mut self) -> bool {
        self.queued.is_empty() && self.completions.state().list.is_empty() && self.shared.state().quiet
    }

    fn reserve_buffers(&mut self, count: u16) -> io::Result<u16> {
        let first = self.buffers;
        self.buffers = first.checked_add(count).ok_or(Errno::ENOSPC)?;
        Ok(first)
    }

    fn release_buffers(&mut self, _: u16, _: u16) {}

    unsafe fn take_tags(&mut self, buffer: u16, _: usize, into: &mut Vec<Tag>) {
        into.extend(self.completions.state().tags.remove(&buffer));
    }

    fn waker(&self) -> Arc<dyn Waker> {
        self.completions.clone()
    }
}

/// Carries a file operation out at once.
pub(super) fn file_operation(operation: Operation) -> i32 {
    // SAFETY: plain system calls; memory is that of the submission, which its sender keeps valid until
    // the completion (see `Submission`).
    let result = unsafe {
        match operation {
            Operation::Read { fd, memory: Memory::At(address), len, offset } => {
                libc::pread(fd, address as *mut libc::c_void, len as usize, offset as i64)
            }
            Operation::Write { fd, memory: Memory::At(address), len, offset, .. } => {
                libc::pwrite(fd, address as *const libc::c_void, len as usize, offset as i64)
            }
            Operation::SyncData { fd } => libc::fdatasync(fd) as isize,
            Operation::Allocate { fd, mode, offset, len } => {
                libc::fallocate(fd, mode, offset as i64, len as i64) as isize
            }
            _ => unreachable!("handled by the ring"),
        }
    };
    if result < 0 { -nix::errno::Errno::last_raw() } else { result as i32 }
}
