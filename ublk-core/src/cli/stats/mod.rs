// SPDX-License-Identifier: MIT OR Apache-2.0

//! Statistics of running devices: each server answers `ublk stat` on the Unix socket `/run/ublk/server-PID.sock`, which
//! only its own user can connect to.
//!
//! A client sends a line, `stat ID`; the server sends a line of JSON, a [`Report`], and closes the connection.
//!
//! * `protocol`: the report, and the name of the socket.
//! * `socket`: the server's end, part of the main loop of a server.
//! * `service`: the same on a thread of its own, for programs that are not this command.
//! * `client`: the end of `ublk stat`.

mod client;
mod protocol;
mod service;
mod socket;

pub(super) use self::client::{query, remove_stale_sockets};
pub(super) use self::protocol::Report;
pub use self::service::StatsService;
pub(super) use self::socket::StatsSocket;
