// SPDX-License-Identifier: MIT OR Apache-2.0

//! Requests that the engine carries out on files: which are in flight, and where their bytes are meanwhile.
//!
//! A request ends here, but is committed by its caller: methods that may end one return its [`End`].

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use super::cookie::Kind;
use super::inbox::Inbox;
use super::io::QueueIo;
use super::syncs::Waiter;
use super::transfer::{Next, Step, Transfer};
use crate::data::DataMovement;
use crate::data::shared::SharedRange;
use crate::driver::{Memory, Operation};
use crate::errno::Errno;
use crate::memory::{Descriptor, IoBuffer};
use crate::request::{Answer, FileRequest, Op};
use crate::uapi;
use crate::units::Tag;

/// What a request is to be committed with: its buffer and its result.
pub(super) type End = (Option<Arc<IoBuffer>>, Answer);

/// Where the bytes of a forwarded request are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// It has none.
    Nowhere,
    /// In memory of this process.
    Copied,
    /// In the request's own pages, which the driver has registered at this index of the ring's table, and unregisters with
    /// the commit.
    RegisteredByDriver(u16),
    /// To be registered at this index first.
    ToRegister(u16),
    /// Registered by the engine, which unregisters them before the commit.
    Registered(u16),
}

/// One forwarded request.
#[derive(Debug)]
struct Forwarded {
    transfer: Transfer,
    op: Op,
    pages: Pages,
    /// The client's shared memory, if its data is there.
    shared: Option<SharedRange>,
    /// A copy of the shared memory, which the file reads and writes instead.
    copy: Option<Arc<IoBuffer>>,
    /// Its sync has succeeded, and counts once those of others have ended.
    is_synced: bool,
}

/// The forwarded requests of one queue.
#[derive(Debug)]
pub(super) struct Forwarding {
    /// By tag.
    requests: RefCell<Vec<Option<Forwarded>>>,
    /// The inbox of the queue's thread.
    inbox: Arc<Inbox>,
    /// Zeros to write where a file cannot zero a range.
    zeros: Rc<IoBuffer>,
    /// An unexpected end of a file was logged.
    end_is_logged: Cell<bool>,
}

impl Forwarding {
    pub(super) fn new(depth: u16, inbox: Arc<Inbox>, zeros: Rc<IoBuffer>) -> Self {
        let requests = RefCell::new((0..depth).map(|_| None).collect());
        Forwarding { requests, inbox, zeros, end_is_logged: Cell::new(false) }
    }

    /// Begins to carry out a request. Returns its end if it has failed already.
    pub(super) fn start(
        &self,
        io: &QueueIo,
        tag: Tag,
        buffer: Option<Arc<IoBuffer>>,
        request: FileRequest,
    ) -> Option<End> {
        let FileRequest { op, descriptor, pieces, keep_alive, shared, durability } = request;
        // Where the client shares memory, the tag's own buffer stays with the tag, and this is a copy.
        let (copy, own) = if shared.is_some() { (buffer, None) } else { (None, buffer) };
        if let Some(Err(errno)) = durability.sync.as_ref().map(|sync| sync.write_back.check()) {
            return Some((own, Answer::error(errno)));
        }
        let Some(step) = Step::first(op, descriptor.op_flags) else {
            return Some((own, Answer::error(Errno::EOPNOTSUPP)));
        };
        let pages = match (io.registered(tag), &own) {
            _ if !op.has_data() => Pages::Nowhere,
            _ if shared.is_some() => Pages::Copied,
            (_, Some(_)) => Pages::Copied,
            (None, None) => match load(io, tag, op, &descriptor) {
                Ok(memory) => {
                    io.buffers.put(tag, memory);
                    Pages::Copied
                }
                Err(errno) => return Some((None, Answer::error(errno))),
            },
            (Some(index), None) => {
                let by_driver = io.context.data == DataMovement::AutoRegister
                    && descriptor.op_flags & uapi::UBLK_IO_F_NEED_REG_BUF == 0;
                if by_driver { Pages::RegisteredByDriver(index) } else { Pages::ToRegister(index) }
            }
        };
        if let Some(own) = own {
            io.buffers.put(tag, own);
        }
        let transfer = Transfer::new(step, &descriptor, pieces, keep_alive).durably(durability);
        let forwarded = &mut self.requests.borrow_mut()[tag.index()];
        let forwarded = forwarded.insert(Forwarded { transfer, op, pages, shared, copy, is_synced: false });
        self.push(io, tag, forwarded);
        None
    }

    /// Queues the next step of a request.
    fn push(&self, io: &QueueIo, tag: Tag, forwarded: &mut Forwarded) {
        let memory = match forwarded.pages {
            Pages::ToRegister(index) => {
                let operation = Operation::Register { file: io.file, queue: io.context.queue, tag, index };
                return io.push(Kind::Transfer, tag, operation);
            }
            Pages::RegisteredByDriver(index) | Pages::Registered(index) => Memory::Registered { index, offset: 0 },
            Pages::Copied | Pages::Nowhere => {
                let shared = || forwarded.shared.as_ref().map(SharedRange::user_address);
                let copy = forwarded.copy.as_ref().map(|buffer| buffer.user_address());
                Memory::At(copy.or_else(shared).unwrap_or_else(|| io.buffers.address(tag)))
            }
        };
        forwarded.transfer.begin();
        io.push(Kind::Transfer, tag, forwarded.transfer.operation(memory, self.zeros.user_address()));
    }

    /// Takes the result of a request's step. Returns the request's end if that was the last one.
    pub(super) fn completed(&self, io: &QueueIo, tag: Tag, result: i32) -> Option<End> {
        let mut all = self.requests.borrow_mut();
        let slot = &mut all[tag.index()];
        let forwarded = slot.as_mut().expect("a completed transfer was started");
        let running = forwarded.transfer.take_running();
        let next = match forwarded.pages {
            Pages::ToRegister(index) => match Errno::check(result) {
                Err(errno) => Next::Finished(Err(errno)),
                Ok(_) => {
                    forwarded.pages = Pages::Registered(index);
                    Next::Continue
                }
            },
            _ => forwarded.transfer.completed(result),
        };
        let outcome = match next {
            Next::Continue => {
                self.push(io, tag, forwarded);
                return None;
            }
            Next::Finished(outcome) => outcome,
        };
        if result == 0 && outcome.is_err() && !self.end_is_logged.replace(true) {
            let (fd, offset) = forwarded.transfer.position();
            log::error!(
                "{}: unexpected end of file on descriptor {fd} at offset {offset}; request failed (further occurrences on this \
                 queue are not logged)",
                io.name(tag)
            );
        }
        match (running, outcome) {
            (Some(running), Ok(())) => {
                forwarded.is_synced = true;
                let waiter = Waiter { inbox: self.inbox.clone(), queue: io.index, tag };
                drop(all);
                if running.succeeded(&waiter) { self.sync_counts(io, tag) } else { None }
            }
            (running, outcome) => {
                let forwarded = slot.take()?;
                drop(all);
                if let (Some(write_back), Err(errno)) = (forwarded.transfer.syncing(), outcome) {
                    write_back.fail(errno.known());
                }
                drop(running);
                Some(finish(io, tag, forwarded, outcome))
            }
        }
    }

    /// Ends a request whose sync counts: none of those that could have taken its error is in flight any more.
    pub(super) fn sync_counts(&self, io: &QueueIo, tag: Tag) -> Option<End> {
        let forwarded = self.requests.borrow_mut()[tag.index()].take_if(|forwarded| forwarded.is_synced)?;
        let outcome = forwarded.transfer.syncing().map_or(Ok(()), |files| files.check());
        Some(finish(io, tag, forwarded, outcome))
    }

    /// Takes the result of a step after the queue was abandoned: it only ends what was in flight.
    pub(super) fn completed_late(&self, io: &QueueIo, tag: Tag, result: i32) {
        let ended = self.requests.borrow_mut()[tag.index()].take();
        let Some(Forwarded { transfer, pages, .. }) = ended else { return };
        transfer.ended_late(result);
        // Its pages may have been registered only now.
        if matches!(pages, Pages::ToRegister(_)) {
            io.unregister(tag);
        }
    }

    /// Returns how many requests wait for files.
    pub(super) fn in_flight(&self) -> usize {
        self.requests.borrow().iter().flatten().filter(|forwarded| !forwarded.is_synced).count()
    }

    /// Leaks the memory that files may still use. Returns the transfers in flight, which keep their files open.
    ///
    /// Their flights ([`crate::extents`]) go on until they end: extents that they read or write count as in use, and waiting
    /// for them may time out.
    pub(super) fn leak(&self) -> Vec<(Tag, Transfer)> {
        std::mem::forget(self.zeros.clone());
        let transfer = |(tag, forwarded): (usize, Option<Forwarded>)| {
            // One that is synced waits for other requests, and for no completion.
            let Forwarded { transfer, shared, copy, .. } = forwarded.filter(|forwarded| !forwarded.is_synced)?;
            std::mem::forget((shared, copy));
            Some((Tag(tag as u16), transfer))
        };
        self.requests.take().into_iter().enumerate().filter_map(transfer).collect()
    }
}

/// Allocates memory for a request that is forwarded without any, and copies a write's data there.
fn load(io: &QueueIo, tag: Tag, op: Op, descriptor: &Descriptor) -> Result<Arc<IoBuffer>, Errno> {
    let len = op.len(descriptor) as usize;
    let failed = |e: io::Error| {
        log::error!("{}: reading its data into memory: {e}", io.name(tag));
        Errno::from(&e)
    };
    let memory = io.buffers.take_pooled(len).map_err(failed)?;
    if !op.fills() {
        // SAFETY: memory.rs (3): nothing else uses this buffer.
        let bytes = unsafe { memory.bytes_mut(len) };
        io.context.file.copy_from_request(io.request_place(tag), bytes).map_err(failed)?;
    }
    Ok(memory)
}

/// What a request is to be committed with after its last step.
fn finish(io: &QueueIo, tag: Tag, forwarded: Forwarded, outcome: Result<(), Errno>) -> End {
    let Forwarded { transfer, op, pages, shared, copy, .. } = forwarded;
    if matches!(pages, Pages::Registered(_)) {
        io.unregister(tag);
    }
    if let Some(shared) = shared {
        // The tag's own buffer was not used.
        return (None, finish_shared(io, tag, &transfer, op, (&shared, copy), outcome));
    }
    let buffer = io.buffers.take(tag);
    let outcome = outcome.and_then(|()| match &buffer {
        Some(buffer) if op.fills() && !io.context.data.is_copied_by_driver() => {
            // SAFETY: memory.rs (3): the server owns the request, and the file's data is in place.
            let bytes = unsafe { buffer.bytes(transfer.data_len() as usize) };
            let copied = io.context.file.copy_to_request(io.request_place(tag), bytes);
            copied.map_err(|e| Errno::from(&e))
        }
        _ => Ok(()),
    });
    (buffer, answer(io, tag, &transfer, outcome))
}

/// As [`finish`], for a request in shared memory. If its handler had a copy made, the file has read into that.
fn finish_shared(
    io: &QueueIo,
    tag: Tag,
    transfer: &Transfer,
    op: Op,
    (shared, copy): (&SharedRange, Option<Arc<IoBuffer>>),
    outcome: Result<(), Errno>,
) -> Answer {
    let outcome = outcome.and_then(|()| match &copy {
        Some(copy) if op.fills() => {
            // SAFETY: memory.rs (3): the server owns the request, and the file's data is in place.
            let bytes = unsafe { copy.bytes(transfer.data_len() as usize) };
            shared.write(0, bytes).map_err(|e| Errno::from(&e))
        }
        _ => Ok(()),
    });
    copy.into_iter().for_each(|copy| io.buffers.put_pooled(copy));
    answer(io, tag, transfer, outcome)
}

fn answer(io: &QueueIo, tag: Tag, transfer: &Transfer, outcome: Result<(), Errno>) -> Answer {
    match outcome {
        Ok(()) => Answer::new(transfer.data_len()),
        Err(errno) => {
            log::debug!("{}: {transfer:?}: {errno}", io.name(tag));
            Answer::error(errno)
        }
    }
}
