// SPDX-License-Identifier: MIT OR Apache-2.0

//! `ublk list`.

use std::fmt::Write;

use serde::Serialize;

use super::failure::{Failure, Outcome};
use super::limits::Limits;
use super::output::print;
use super::state_file::StateFile;
use crate::control::{Control, DeviceInfo};
use crate::data::DataMovement;
use crate::errno::Errno;
use crate::error::Result;
use crate::options::Recovery;
use crate::params::{Operations, Params};
use crate::uapi::Features;
use crate::units::DeviceId;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Device number; may be repeated [default: all]
    #[arg(short = 'n', long = "number", visible_alias = "id", value_name = "ID")]
    ids: Vec<u32>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Accepted for compatibility with the reference tool; has no effect
    #[arg(short, long, hide = true)]
    verbose: bool,
}

/// A device as JSON.
#[derive(Debug, Serialize)]
struct Entry {
    id: u32,
    path: String,
    state: &'static str,
    /// The server's process. Null without a server: the driver's value, -1, would make `kill` end all processes.
    pid: Option<i32>,
    queues: u16,
    depth: u16,
    size: u64,
    block_size: u32,
    physical_block_size: u32,
    max_io_bytes: u32,
    read_only: bool,
    write_cache: bool,
    fua: bool,
    discard: bool,
    write_zeroes: bool,
    rotational: bool,
    flags: u64,
    features: Vec<&'static str>,
    owner_uid: u32,
    owner_gid: u32,
    queue_affinity: Vec<Vec<usize>>,
    /// How data moves, and why, if the state file has the reason.
    data: &'static str,
    data_reason: Option<String>,
    batch: bool,
    recovery: Option<&'static str>,
    partition_scan: bool,
    #[serde(flatten)]
    limits: Limits,
}

pub(super) fn run(args: &Args) -> Outcome {
    let control = Control::open()?;
    let asked = !args.ids.is_empty();
    let ids = if asked { args.ids.iter().copied().map(DeviceId).collect() } else { control.device_ids()? };
    let (mut entries, mut others) = (Vec::new(), 0);
    for id in ids {
        match entry(&control, id) {
            Ok(entry) => entries.push(entry),
            // It was deleted meanwhile.
            Err(error) if !asked && error.errno() == Errno::ENODEV => {}
            Err(error) if !asked && matches!(error.errno(), Errno::EACCES | Errno::EPERM) => others += 1,
            Err(error) => return Err(error.into()),
        }
    }
    if others != 0 {
        let devices = if others == 1 { "device" } else { "devices" };
        eprintln!("ublk: {others} {devices} owned by other users not shown (permission denied)");
    }
    let text = if args.json {
        let mut json =
            serde_json::to_string_pretty(&entries).map_err(|e| Failure::Text(format!("writing JSON: {e}")))?;
        json.push('\n');
        json
    } else {
        entries.iter().map(describe).collect()
    };
    print(&text)
}

fn entry(control: &Control, id: DeviceId) -> Result<Entry> {
    let info: DeviceInfo = control.info(id)?;
    let params: Params = control.params(id)?.params;
    let affinity =
        (0..info.queues).map(|queue| control.queue_affinity(id, crate::QueueId(queue))).collect::<Result<Vec<_>>>()?;
    let has = |operation| params.operations.contains(operation);
    Ok(Entry {
        id: id.0,
        path: control.block_path(id).display().to_string(),
        state: info.state.name(),
        pid: Some(info.pid).filter(|pid| *pid > 0),
        queues: info.queues,
        depth: info.depth,
        size: params.size,
        block_size: params.logical_block_size,
        physical_block_size: params.physical_block_size,
        max_io_bytes: info.max_io_bytes,
        read_only: params.read_only,
        write_cache: has(Operations::FLUSH),
        fua: has(Operations::FUA),
        discard: has(Operations::DISCARD),
        write_zeroes: has(Operations::WRITE_ZEROES),
        rotational: params.rotational,
        flags: info.features.bits(),
        features: info.features.iter_names().map(|(name, _)| name).collect(),
        owner_uid: info.owner_uid,
        owner_gid: info.owner_gid,
        queue_affinity: affinity,
        data: DataMovement::from(info.features).name(),
        // The device is listed even if its state file cannot be read.
        data_reason: StateFile::find(id).ok().flatten().map(|state| state.reason),
        batch: info.features.contains(Features::BATCH_IO),
        recovery: Recovery::from_features(info.features).map(Recovery::name),
        partition_scan: !info.features.contains(Features::NO_AUTO_PART_SCAN),
        limits: Limits::of(&params),
    })
}

/// Formats a device as text. Scripts of blktests and of the kernel's selftests take the pid and the state from the second
/// line by position, words 7 and 11, and kill that process: without a server there must be no number.
fn describe(entry: &Entry) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "dev id {}: {} queues {} depth {} block size {} size {} ({})",
        entry.id,
        entry.path,
        entry.queues,
        entry.depth,
        entry.block_size,
        entry.size,
        human(entry.size)
    );
    let _ = writeln!(
        text,
        "\tmax rq size {} daemon pid {} flags {:#x} state {}",
        entry.max_io_bytes,
        entry.pid.map_or_else(|| "none".to_owned(), |pid| pid.to_string()),
        entry.flags,
        entry.state
    );
    let abilities = [
        (entry.read_only, "read-only"),
        (entry.rotational, "rotational"),
        (entry.write_cache, "write cache"),
        (entry.fua, "FUA"),
        (entry.discard, "discard"),
        (entry.write_zeroes, "write zeroes"),
        (!entry.partition_scan, "no partition scan"),
    ];
    let abilities: Vec<_> = abilities.iter().filter(|(has, _)| *has).map(|(_, name)| *name).collect();
    if !abilities.is_empty() {
        let _ = writeln!(text, "\t{}", abilities.join(", "));
    }
    let limits = entry.limits.describe(entry.physical_block_size);
    if !limits.is_empty() {
        let _ = writeln!(text, "\t{}", limits.join(", "));
    }
    let reason = entry.data_reason.as_ref().map_or_else(String::new, |reason| format!(" ({reason})"));
    let batch = if entry.batch { ", batches" } else { "" };
    let recovery = entry.recovery.map_or_else(String::new, |how| format!(", recovery {how}"));
    let _ = writeln!(text, "\tdata {}{reason}{batch}{recovery}", entry.data);
    for (queue, cpus) in entry.queue_affinity.iter().enumerate() {
        let cpus: Vec<_> = cpus.iter().map(usize::to_string).collect();
        let _ = writeln!(text, "\tqueue {queue}: CPUs {}", cpus.join(" "));
    }
    text
}

/// Formats a size with at most one decimal, in powers of 1024.
fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let unit = (bytes.max(1).ilog2() / 10) as usize;
    let tenths = (u128::from(bytes) * 10) >> (10 * unit);
    match (tenths / 10, tenths % 10) {
        (whole, 0) => format!("{whole} {}", UNITS[unit]),
        (whole, tenth) => format!("{whole}.{tenth} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Entry {
        Entry {
            id: 3,
            path: "/dev/ublkb3".into(),
            state: "LIVE",
            pid: Some(4711),
            queues: 2,
            depth: 128,
            size: 3 << 29,
            block_size: 512,
            physical_block_size: 4096,
            max_io_bytes: 524288,
            read_only: false,
            write_cache: true,
            fua: false,
            discard: true,
            write_zeroes: false,
            rotational: false,
            flags: 0x42,
            features: vec![],
            owner_uid: 0,
            owner_gid: 0,
            queue_affinity: vec![vec![0], vec![1]],
            data: "copy",
            data_reason: Some("the target looks at the bytes".into()),
            batch: true,
            recovery: None,
            partition_scan: true,
            limits: Limits::of(&Params::new(3 << 29, 512)),
        }
    }

    #[test]
    fn scripts_find_pid_and_state_by_word() {
        let text = describe(&sample());
        let line = text.lines().find(|l| l.contains("state") && l.contains("pid")).unwrap();
        let words: Vec<_> = line.split_whitespace().collect();
        assert_eq!((words[6], words[10]), ("4711", "LIVE"));
        assert_eq!(text.matches("state").count(), 1);
        assert_eq!(text.matches("pid").count(), 1);
    }

    #[test]
    fn without_a_server_there_is_no_number_to_kill() {
        let text = describe(&Entry { pid: None, state: "QUIESCED", ..sample() });
        let words: Vec<_> = text.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!((words[6], words[10]), ("none", "QUIESCED"));
        let json = serde_json::to_value(Entry { pid: None, ..sample() }).unwrap();
        assert!(json["pid"].is_null());
    }

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in
            [(0, "0 B"), (512, "512 B"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (u64::MAX, "15.9 EiB")]
        {
            assert_eq!(human(bytes), text);
        }
    }
}
