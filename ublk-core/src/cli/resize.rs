// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk resize`.

use std::fs;
use std::path::{Path, PathBuf};

use super::add;
use super::backing_files::is_same;
use super::failure::{Failure, Outcome};
use super::size;
use super::state_file::StateFile;
use crate::control::Control;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    id: u32,
    /// New size, e.g. 2G [default: that of the backing file]
    #[arg(short, long, value_parser = size::parse)]
    size: Option<u64>,
}

pub(super) fn run(args: &Args) -> Outcome {
    let id = DeviceId(args.id);
    let control = Control::open()?;
    let instance = control.instance(id);
    let current = control.params(id)?.params.size;
    let stored = add::Args::parse(&StateFile::load(id)?.command_line())?;
    let backing = match stored.target().file() {
        Some(path) => Some(opened_by_server(id, control.info(id)?.pid, path)?),
        None => None,
    };
    let bytes = stored.target().new_size(args.size, current, backing.as_deref())?;
    // By now, the number may be another device's.
    control.require_instance("UPDATE_SIZE", id, instance)?;
    control.update_size(id, bytes)?;
    Ok(())
}

/// Returns a path to the file that a device's server has open. By now, the name may be that of another file of another size.
fn opened_by_server(id: DeviceId, pid: i32, path: &Path) -> Result<PathBuf, Failure> {
    if pid <= 0 {
        // There is no server. The next one opens the file by its name.
        return Ok(path.to_owned());
    }
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::Text(format!("{what}: {e}"));
    let named = fs::metadata(path).map_err(|e| failed(&path.display().to_string(), &e))?;
    if named.is_dir() {
        return Ok(path.to_owned());
    }
    let directory = format!("/proc/{pid}/fd");
    for fd in fs::read_dir(&directory).map_err(|e| failed(&directory, &e))?.flatten() {
        if fs::metadata(fd.path()).is_ok_and(|open| is_same(&open, &named)) {
            return Ok(fd.path());
        }
    }
    Err(Failure::Text(format!(
        "the server of device {id} (process {pid}) does not have {} open: the file has been replaced",
        path.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_replaced_the_servers_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("disk.img");
        let file = fs::File::create(&path).unwrap();
        file.set_len(4096).unwrap();
        let own = std::process::id() as i32;
        let found = opened_by_server(DeviceId(0), own, &path).unwrap();
        assert_eq!(fs::metadata(found).unwrap().len(), 4096);
        let new = place.path().join("new.img");
        fs::write(&new, vec![0; 8192]).unwrap();
        fs::rename(&new, &path).unwrap();
        let Err(Failure::Text(why)) = opened_by_server(DeviceId(0), own, &path) else {
            panic!("the file was replaced")
        };
        assert!(why.contains("has been replaced"), "{why}");
        drop(file);
    }
}
