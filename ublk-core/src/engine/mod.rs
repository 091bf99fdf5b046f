// SPDX-License-Identifier: MIT OR Apache-2.0

//! The engine: ring threads that serve any number of queues.
//!
//! * [`tags`] — the state machine of a queue's tags, without I/O.
//! * [`queue`] — one queue: its descriptors, buffers, handler; turns completions into requests and
//!   requests into commits.
//! * [`transfer`] — requests that the engine carries out itself on a file.
//! * [`ring_thread`] — the loop around one ring: one system call per wake-up, whatever came.
//! * [`pool`] — which queue is served by which thread.
//! * [`events`] — what queues tell whoever waits for their device.

mod events;
mod pool;
mod queue;
mod ring_thread;
mod tags;
mod transfer;

pub(crate) use events::QueueEvents;
pub(crate) use pool::ThreadPool;
pub use pool::{Spawn, StdSpawn};
pub(crate) use queue::{QueueCore, QueueSetup};
