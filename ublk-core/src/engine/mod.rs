// SPDX-License-Identifier: MIT OR Apache-2.0

//! The engine: ring threads that serve any number of queues.
//!
//! Modules use only those listed before them:
//!
//! * [`guard`] — calls user code and catches its panics.
//! * [`events`] — what queues report to their device.
//! * [`inbox`] — messages to a ring thread.
//! * [`cookie`] — which submission a completion belongs to.
//! * [`tags`] — the state machine of a queue's tags, without I/O.
//! * [`batch`] — commits combined into one command, without I/O.
//! * [`schedule`] — when finished requests are submitted, and when a thread sleeps.
//! * [`accounting`] — statistics of requests.
//! * [`cork`] — requests that a thread sends back together.
//! * [`syncs`] — which sync of a file counts.
//! * [`transfer`] — the steps of a request that the engine carries out on a file, without I/O.
//! * [`buffers`] — the memory of a queue's requests.
//! * [`io`] — a queue's access to its ring and memory.
//! * [`forward`] — the requests in flight on files.
//! * [`core`] — the part of a queue that its requests refer to.
//! * [`queue`] — a queue and its handler: turns completions into requests.
//! * [`ring_thread`] — the loop around one ring: one system call per wake-up.
//! * [`pool`] — which queue is served by which thread.

mod accounting;
mod batch;
mod buffers;
mod cookie;
mod core;
mod cork;
mod events;
mod forward;
mod guard;
mod inbox;
mod io;
mod pool;
mod queue;
mod ring_thread;
mod schedule;
mod syncs;
mod tags;
mod transfer;

pub(crate) use self::core::QueueCore;
pub(crate) use cork::send;
pub use cork::{corked, uncork_if_slow};
pub(crate) use events::QueueEvents;
pub(crate) use guard::{drop_guarded, guarded};
pub(crate) use inbox::{Inbox, QueueSetup, Return, Successor};
pub(crate) use pool::ThreadPool;
pub use pool::{Spawn, StdSpawn};
pub(crate) use syncs::SyncOrder;
