// SPDX-License-Identifier: MIT OR Apache-2.0

//! The engine: ring threads that serve any number of queues.
//!
//! * [`tags`] — the state machine of a queue's tags, without I/O.
//! * [`queue`] — one queue and its handler: turns completions into requests.
//! * [`core`] — what its requests refer to: memory, and the way back to the driver.
//! * [`batch`] — commits gathered into one command, without I/O.
//! * [`forward`], [`transfer`] — requests that the engine carries out itself on a file.
//! * [`syncs`] — which sync of a file can be believed.
//! * [`pace`] — when finished requests are submitted before their batch is done.
//! * [`coalescing`] — whether requests are to gather before the thread looks for them.
//! * [`guard`] — user code, whose panics are its own.
//! * [`cookie`] — what a completion says about its submission.
//! * [`ring_thread`] — the loop around one ring: one system call per wake-up, whatever came.
//! * [`pool`] — which queue is served by which thread.
//! * [`events`] — what queues tell whoever waits for their device.

mod batch;
mod coalescing;
mod cookie;
mod core;
mod events;
mod forward;
mod guard;
mod pace;
mod pool;
mod queue;
mod ring_thread;
mod syncs;
mod tags;
mod transfer;

pub(crate) use self::core::QueueCore;
pub(crate) use events::QueueEvents;
pub(crate) use guard::drop_guarded;
pub(crate) use pool::{Inbox, Successor, ThreadPool};
pub use pool::{Spawn, StdSpawn};
pub(crate) use queue::QueueSetup;
pub(crate) use syncs::SyncOrder;
