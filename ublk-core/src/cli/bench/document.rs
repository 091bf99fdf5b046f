// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results as a JSON document. Its format is stable: fields are only added.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use super::conditions::Conditions;
use super::figures::{Summary, Window};

/// The results of a run of the command.
#[derive(Debug, Serialize)]
pub(super) struct Document {
    pub(super) conditions: Conditions,
    /// Whether windows have marks for an instruction counter, and nothing else was measured.
    pub(super) marks: bool,
    pub(super) disks: Vec<DiskResult>,
    /// Disks that were not measured, and why.
    pub(super) absent: BTreeMap<String, String>,
    /// What failed, other than jobs.
    #[serde(skip)]
    pub(super) errors: Vec<String>,
}

/// The results of a disk.
#[derive(Debug, Serialize)]
pub(super) struct DiskResult {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// CPUs that the disk's server may use.
    pub(super) server_cpus: Option<String>,
    pub(super) jobs: Vec<JobResult>,
}

/// The result of a job.
#[derive(Debug, Serialize)]
pub(super) struct JobResult {
    pub(super) job: String,
    /// Why it failed. `windows` then has those before.
    pub(super) failed: Option<String>,
    pub(super) windows: Vec<Window>,
    #[serde(flatten)]
    pub(super) summary: Summary,
}

impl Document {
    /// Formats the document.
    pub(super) fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self).map(|text| text + "\n")
    }

    /// Returns all failures; those of jobs as `DISK JOB: REASON`.
    pub(super) fn failures(&self) -> impl Iterator<Item = String> + '_ {
        let jobs = self.disks.iter().flat_map(|disk| disk.jobs.iter().map(move |job| (disk, job)));
        let failed =
            jobs.filter_map(|(disk, job)| Some(format!("{} {}: {}", disk.name, job.job, job.failed.as_ref()?)));
        failed.chain(self.errors.iter().cloned())
    }
}
