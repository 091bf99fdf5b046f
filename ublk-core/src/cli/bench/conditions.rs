// SPDX-License-Identifier: MIT OR Apache-2.0

//! The machine that results are from.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::helper;
use crate::control::Control;

/// The conditions of a measurement. What is not known is null.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Conditions {
    /// When it began, in UTC: `2026-01-31T12:00:00Z`.
    pub(super) date: String,
    /// Version of this program.
    pub(super) version: &'static str,
    /// Release of the kernel.
    pub(super) kernel: String,
    /// Architecture that this program was built for.
    pub(super) architecture: &'static str,
    pub(super) driver: Option<Driver>,
    /// Model of the CPU.
    pub(super) cpu: Option<String>,
    /// Number of CPUs that this process may use.
    pub(super) cpus: usize,
    /// Frequency governor of the first CPU.
    pub(super) governor: Option<String>,
    /// Whether this is a virtual machine.
    pub(super) virtual_machine: Option<bool>,
    /// The kernel's mitigations of CPU vulnerabilities, without those that do not affect this CPU.
    pub(super) mitigations: BTreeMap<String, String>,
    /// CPU that the client is pinned to.
    pub(super) client_cpu: Option<usize>,
    /// What hardware counters count: `system` or `processes`.
    pub(super) counters: Option<&'static str>,
    /// Why there are no counters.
    pub(super) counters_error: Option<String>,
    /// Versions of the other programs that serve disks.
    pub(super) versions: BTreeMap<String, String>,
}

/// The ublk driver.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Driver {
    /// The checksum of the module's sources, if it is a module.
    pub(super) srcversion: Option<String>,
    /// The features that it offers.
    pub(super) features: Vec<&'static str>,
}

impl Conditions {
    /// Reads the conditions of this machine.
    pub(super) fn read() -> Self {
        let kernel = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let versions = ["kublk", "rublk", "losetup"].iter().filter_map(|program| {
            let output = helper::run(&[program, "--version"]).ok()?;
            Some(((*program).to_owned(), output.lines().next()?.trim().to_owned()))
        });
        Conditions {
            date: utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())),
            version: env!("CARGO_PKG_VERSION"),
            kernel: kernel.unwrap_or_default(),
            architecture: std::env::consts::ARCH,
            driver: Driver::read(),
            cpu: field(&cpuinfo, "model name").map(str::to_owned),
            cpus: std::thread::available_parallelism().map_or(0, usize::from),
            governor: line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor".as_ref()),
            virtual_machine: field(&cpuinfo, "flags").map(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
            mitigations: mitigations("/sys/devices/system/cpu/vulnerabilities".as_ref()),
            versions: versions.collect(),
            ..Conditions::default()
        }
    }
}

impl Driver {
    fn read() -> Option<Self> {
        let features = Control::open().ok()?.features().ok()?;
        let names = features.iter().filter_map(|feature| feature.name()).collect();
        Some(Driver { srcversion: line("/sys/module/ublk_drv/srcversion".as_ref()), features: names })
    }
}

/// Returns the value of a field of `/proc/cpuinfo`.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map(|(_, text)| text.trim())
}

/// Reads a file of one line.
fn line(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok().map(|text| text.trim().to_owned()).filter(|text| !text.is_empty())
}

fn mitigations(directory: &Path) -> BTreeMap<String, String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let read = entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, line(&entry.path())?)));
    read.filter(|(_, state)| state != "Not affected").collect()
}

/// Formats a time in seconds since 1970 as ISO 8601 has it.
fn utc(time: u64) -> String {
    let (days, second) = (time / 86_400, time % 86_400);
    // Years begin in March here, so that a leap day is the last day of one; there are 719,468 days between the first of March
    // of the year 0 and 1970. Eras are 400 years.
    let (era, day) = ((days + 719_468) / 146_097, (days + 719_468) % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month) = (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (time, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_735_689_599, "2024-12-31T23:59:59Z"),
            (1_796_083_200, "2026-12-01T00:00:00Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(time), text);
        }
    }

    #[test]
    fn this_machine_has_a_kernel_and_cpus() {
        let conditions = Conditions::read();
        assert!(!conditions.kernel.is_empty() && conditions.cpus > 0, "{conditions:?}");
    }

    #[test]
    fn fields_and_mitigations_are_read() {
        let text = "processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: fpu hypervisor\n";
        assert_eq!((field(text, "model name"), field(text, "none")), (Some("A CPU: fast"), None));
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("meltdown"), "Mitigation: PTI\n").unwrap();
        fs::write(directory.path().join("mds"), "Not affected\n").unwrap();
        assert_eq!(mitigations(directory.path()), [("meltdown".to_owned(), "Mitigation: PTI".to_owned())].into());
    }
}
