// SPDX-License-Identifier: MIT OR Apache-2.0

//! What servers send to `ublk stat`, and where.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::stats::{DeviceStats, OpStats};

/// Statistics of a device, as a server sends them.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(in crate::cli) struct Report {
    /// All queues together, by operation.
    pub(in crate::cli) total: BTreeMap<String, OpStats>,
    pub(in crate::cli) queues: BTreeMap<u16, BTreeMap<String, OpStats>>,
    /// Why there are no statistics.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

impl Report {
    pub(super) fn new(stats: &DeviceStats) -> Self {
        let named = |all: &BTreeMap<crate::Op, OpStats>| {
            all.iter().map(|(op, stats)| (op.name().to_owned(), stats.clone())).collect()
        };
        Report {
            total: named(&stats.total),
            queues: stats.queues.iter().map(|(queue, all)| (*queue, named(all))).collect(),
            error: None,
        }
    }

    pub(super) fn refusal(reason: impl Into<String>) -> Self {
        Report { error: Some(reason.into()), ..Report::default() }
    }
}

/// Name of a server's socket in the runtime directory.
pub(super) fn socket_name(pid: u32) -> String {
    format!("server-{pid}.sock")
}
