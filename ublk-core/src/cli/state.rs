// SPDX-License-Identifier: MIT OR Apache-2.0

//! What a served device needs to come back with another server: `/run/ublk/ublkbN.json`.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::run_dir::RunDir;
use super::{Cli, Command, Failure, Outcome, add};
use crate::device::Device;
use crate::units::DeviceId;
use clap::Parser;

/// Form of the file; a program that does not know it must not guess.
const VERSION: u32 = 1;

/// The file's content.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct State {
    version: u32,
    /// Tells the device from a later one of the same number.
    instance: u64,
    /// Where relative paths begin.
    directory: PathBuf,
    /// The command line of `ublk add`.
    arguments: Vec<String>,
    /// How data moves, and why so.
    pub(super) data: String,
    pub(super) reason: String,
}

impl State {
    /// The state of a device that was made by `origin`.
    pub(super) fn of(device: &Device, origin: &Origin) -> Result<Self, Failure> {
        let arguments = origin.arguments.iter().map(|word| word.to_str().map(str::to_owned));
        let arguments = arguments.collect::<Option<Vec<_>>>().ok_or_else(|| {
            Failure::Text("the command line is not UTF-8 and cannot be stored for the device's next server".into())
        })?;
        let (data, reason) = device.data_movement();
        Ok(State {
            version: VERSION,
            instance: instance(device.id()).unwrap_or(0),
            directory: origin.directory.clone(),
            arguments,
            data: data.to_string(),
            reason: reason.to_owned(),
        })
    }

    /// Writes the file, whole or not at all.
    pub(super) fn save(&self, id: DeviceId) -> Outcome {
        let path = RunDir::place().join(name(id));
        let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("{what} {}: {e}", path.display()));
        let directory = RunDir::make().map_err(|e| failed("making the directory of", &e))?;
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| failed("making", &e))?;
        text.push(b'\n');
        directory.replace(&name(id), &text).map_err(|e| failed("writing", &e))
    }

    /// Reads the file of a device; `None` if there is none, or one of an earlier device of that number.
    pub(super) fn find(id: DeviceId) -> Result<Option<Self>, Failure> {
        let Some(directory) = RunDir::find() else { return Ok(None) };
        let path = directory.name(&name(id));
        let text = match directory.read(&name(id)) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(None),
            Err(e) => return Err(Failure::Text(format!("reading {}: {e}", path.display()))),
        };
        let state: State = serde_json::from_slice(&text)
            .map_err(|e| Failure::Text(format!("{} is not a valid state file: {e}", path.display())))?;
        if state.version != VERSION {
            return Err(Failure::Text(format!("{} was written by another version of ublk", path.display())));
        }
        Ok(instance(id).is_none_or(|instance| instance == state.instance).then_some(state))
    }

    /// As [`find`](State::find), where it is needed.
    pub(super) fn load(id: DeviceId) -> Result<Self, Failure> {
        Self::find(id)?.ok_or_else(|| {
            Failure::Text(format!(
                "device {id}: no state file {}: only devices created by `ublk add --recovery` have one",
                RunDir::place().join(name(id)).display()
            ))
        })
    }

    /// The command line that made the device.
    pub(super) fn origin(&self) -> Origin {
        Origin { arguments: self.arguments.iter().map(OsString::from).collect(), directory: self.directory.clone() }
    }

    /// That command line, understood.
    pub(super) fn add_args(&self) -> Result<add::Args, Failure> {
        self.origin().add_args()
    }
}

/// The command line that made a device, and where its relative paths begin.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    arguments: Vec<OsString>,
    directory: PathBuf,
}

impl Origin {
    /// This process's own.
    pub(super) fn here(arguments: &[OsString]) -> Result<Self, Failure> {
        let directory = std::env::current_dir().map_err(|e| Failure::Text(format!("the current directory: {e}")))?;
        Ok(Origin { arguments: arguments.to_vec(), directory })
    }

    /// The command line, parsed, with absolute paths.
    pub(super) fn add_args(&self) -> Result<add::Args, Failure> {
        let words = std::iter::once("ublk".into()).chain(self.arguments.iter().cloned());
        match Cli::try_parse_from(words) {
            Ok(Cli { command: Command::Add(mut args) }) => {
                args.resolve(&self.directory);
                Ok(*args)
            }
            _ => Err(Failure::Text(format!("the stored command line is not one of `ublk add`: {:?}", self.arguments))),
        }
    }
}

/// Removes the file of a device that is gone; `instance` is what [`instance`] said while it was there. Its
/// number may be another device's by now.
pub(super) fn remove(id: DeviceId, instance: Option<u64>) {
    // In a directory that is not this user's alone, nothing is this user's.
    let Some(directory) = RunDir::find() else { return };
    let text = directory.read(&name(id)).ok().flatten();
    let theirs = text.and_then(|text| serde_json::from_slice::<State>(&text).ok());
    if theirs.is_some_and(|state| instance.is_some_and(|instance| instance != state.instance)) {
        return;
    }
    if let Err(e) = directory.remove(&name(id)) {
        log::warn!("removing {}: {e}", directory.name(&name(id)).display());
    }
}

fn name(id: DeviceId) -> String {
    format!("ublkb{id}.json")
}

/// A number that a later device with the same id does not have: that of its directory in sysfs.
pub(super) fn instance(id: DeviceId) -> Option<u64> {
    fs::metadata(format!("/sys/class/ublk-char/ublkc{id}/")).ok().map(|metadata| metadata.ino())
}
