// SPDX-License-Identifier: MIT OR Apache-2.0

//! State files of devices, `/run/ublk/ublkbN.json`: what a device's next server needs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::backing_files::{self, BackingFile};
use super::failure::{Failure, Outcome};
use super::instance::Instance;
use super::run_dir::RunDir;
use crate::device::Device;
use crate::error::Error;
use crate::units::DeviceId;

/// Version of the format. A program refuses a file of another version.
const VERSION: u32 = 1;

/// Content of a state file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct StateFile {
    version: u32,
    /// Distinguishes the device from a later one with the same number.
    instance: Instance,
    /// The directory that relative paths refer to.
    directory: PathBuf,
    /// The arguments of `ublk add`.
    arguments: Vec<String>,
    /// The files that the disk is stored in. Older versions do not record them.
    #[serde(default)]
    files: Vec<BackingFile>,
    /// How data moves, and why this way was chosen.
    pub(super) data: String,
    pub(super) reason: String,
}

impl StateFile {
    /// The state of a device that was created by `line`, stored in `files`, which this process has open.
    pub(super) fn new(device: &Device, line: &CommandLine, files: &[PathBuf]) -> Result<Self, Failure> {
        let arguments = line.arguments.iter().map(|word| word.to_str().map(str::to_owned));
        let arguments = arguments.collect::<Option<Vec<_>>>().ok_or_else(|| {
            Failure::Text("the command line is not UTF-8 and cannot be stored for the device's next server".into())
        })?;
        let (data, reason) = device.data_movement();
        let files: Vec<_> = files.iter().map(|file| line.directory.join(file)).collect();
        let identify =
            |path: &PathBuf| BackingFile::find(path).map_err(|e| Failure::Error(Error::file("identify", path, &e)));
        let recorded: Vec<_> = files.iter().map(identify).collect::<Result<_, _>>()?;
        // They may have been replaced since they were opened.
        backing_files::check_open(&files, std::process::id() as i32)?;
        Ok(StateFile {
            version: VERSION,
            instance: device.instance().map(Instance::from).unwrap_or_default(),
            directory: line.directory.clone(),
            arguments,
            files: recorded.into_iter().flatten().collect(),
            data: data.to_string(),
            reason: reason.to_owned(),
        })
    }

    /// Writes the file atomically.
    pub(super) fn save(&self, id: DeviceId) -> Outcome {
        let path = RunDir::location().join(name(id));
        let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("{what} {}: {e}", path.display()));
        let directory = RunDir::create().map_err(|e| failed("creating the directory of", &e))?;
        let mut text = serde_json::to_vec_pretty(self).map_err(|e| failed("encoding", &e))?;
        text.push(b'\n');
        directory.replace(&name(id), &text).map_err(|e| failed("writing", &e))
    }

    /// Reads the file of a device. `None` if there is none, or if it is of an earlier device with the same number.
    pub(super) fn find(id: DeviceId) -> Result<Option<Self>, Failure> {
        let Some(directory) = RunDir::find() else { return Ok(None) };
        let path = directory.path_of(&name(id));
        let text = match directory.read(&name(id)) {
            Ok(Some(text)) => text,
            Ok(None) => return Ok(None),
            Err(e) => return Err(Failure::Text(format!("reading {}: {e}", path.display()))),
        };
        let state: StateFile = serde_json::from_slice(&text)
            .map_err(|e| Failure::Text(format!("{} is not a valid state file: {e}", path.display())))?;
        if state.version != VERSION {
            return Err(Failure::Text(format!("{} was written by another version of ublk", path.display())));
        }
        Ok(Instance::of(id).is_none_or(|instance| instance == state.instance).then_some(state))
    }

    /// Reads the file of a device that must have one.
    pub(super) fn load(id: DeviceId) -> Result<Self, Failure> {
        Self::find(id)?.ok_or_else(|| {
            Failure::Text(format!(
                "device {id}: no state file {}: only devices created by `ublk add --recovery` have one",
                RunDir::location().join(name(id)).display()
            ))
        })
    }

    /// The command line that created the device.
    pub(super) fn command_line(&self) -> CommandLine {
        CommandLine {
            arguments: self.arguments.iter().map(OsString::from).collect(),
            directory: self.directory.clone(),
            files: self.files.clone(),
            accepts_replaced: false,
        }
    }

    /// Returns whether this is the file of a device. An instance that cannot be determined is not recorded either.
    fn is_of(&self, instance: Option<Instance>) -> bool {
        self.instance == instance.unwrap_or_default()
    }

    /// Removes the file of a device that was deleted. `instance` is that of the deleted device, whose number may be another
    /// device's by now.
    pub(super) fn remove(id: DeviceId, instance: Option<Instance>) {
        // The file is that of a later device, or will be.
        if instance.is_some() && Instance::of(id).is_some_and(|now| Some(now) != instance) {
            return;
        }
        // Files in a directory that other users can write to are not this user's.
        let Some(directory) = RunDir::find() else { return };
        let text = directory.read(&name(id)).ok().flatten();
        let found = text.and_then(|text| serde_json::from_slice::<StateFile>(&text).ok());
        if found.is_some_and(|state| !state.is_of(instance)) {
            return;
        }
        if let Err(e) = directory.remove(&name(id)) {
            log::warn!("removing {}: {e}", directory.path_of(&name(id)).display());
        }
    }
}

/// The arguments of `ublk add`, the directory that their relative paths refer to, and the files that they named.
#[derive(Clone, Debug)]
pub(super) struct CommandLine {
    arguments: Vec<OsString>,
    directory: PathBuf,
    files: Vec<BackingFile>,
    /// Whether other files may have taken the names of those that the disk was stored in.
    accepts_replaced: bool,
}

impl CommandLine {
    /// A command line in the current directory.
    pub(super) fn new(arguments: &[OsString]) -> Result<Self, Failure> {
        let directory = std::env::current_dir().map_err(|e| Failure::Text(format!("the current directory: {e}")))?;
        Ok(CommandLine { arguments: arguments.to_vec(), directory, files: Vec::new(), accepts_replaced: false })
    }

    /// The words, with `add` as the first one.
    pub(super) fn arguments(&self) -> &[OsString] {
        &self.arguments
    }

    /// The files that the disk was stored in. Empty if they were not recorded.
    pub(super) fn files(&self) -> &[BackingFile] {
        &self.files
    }

    /// Forgets the files that the disk was stored in, so that others may have taken their names.
    pub(super) fn accept_replaced(mut self) -> Self {
        self.files.clear();
        self.accepts_replaced = true;
        self
    }

    /// Returns whether files are recorded or any are accepted. Otherwise, only the driver may know which file the disk was
    /// stored in.
    pub(super) fn decides_about_files(&self) -> bool {
        self.accepts_replaced || !self.files.is_empty()
    }

    /// The directory that relative paths refer to.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }
}

fn name(id: DeviceId) -> String {
    format!("ublkb{id}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_file_of_an_older_version_is_read() {
        let state = StateFile {
            version: VERSION,
            instance: Instance::default(),
            directory: "/".into(),
            arguments: vec!["add".into()],
            files: BackingFile::find(Path::new("/")).unwrap().into_iter().collect(),
            data: String::new(),
            reason: String::new(),
        };
        let mut json = serde_json::to_value(&state).unwrap();
        assert!(state.is_of(None) && !state.is_of(Some(7.into())), "nothing is recorded");
        let read = |json: &serde_json::Value| serde_json::from_value::<StateFile>(json.clone()).unwrap().command_line();
        assert_eq!(read(&json).files(), state.files);
        assert!(read(&json).decides_about_files());
        let accepting = read(&json).accept_replaced();
        assert!(accepting.files().is_empty() && accepting.decides_about_files());
        json.as_object_mut().unwrap().remove("files").unwrap();
        assert!(read(&json).files().is_empty() && !read(&json).decides_about_files());
    }
}
