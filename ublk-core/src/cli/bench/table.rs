// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results as a table.

use super::document::{Document, JobResult};
use super::figures::Figure;

/// A column: its heading, and its text for a job.
type Column = (&'static str, fn(&JobResult) -> String);

/// The columns after those of the disk and the job.
const COLUMNS: [Column; 10] = [
    ("requests/s", |job| figure(job, Figure::Iops, grouped)),
    ("min..max", spread),
    ("MiB/s", |job| figure(job, Figure::BytesPerSecond, |rate| format!("{:.1}", rate / f64::from(1 << 20)))),
    ("p50 us", |job| figure(job, Figure::P50Us, digits)),
    ("p99 us", |job| figure(job, Figure::P99Us, digits)),
    ("p99.9 us", |job| figure(job, Figure::P999Us, digits)),
    ("client us", |job| figure(job, Figure::ClientUs, digits)),
    ("server us", |job| figure(job, Figure::ServerUs, digits)),
    ("instructions", |job| figure(job, Figure::Instructions, grouped)),
    ("cycles", |job| figure(job, Figure::Cycles, grouped)),
];

/// Formats the results, one line per disk and job. Columns without any value are left out.
pub(super) fn table(document: &Document) -> String {
    let mut text = rows(document);
    if !document.absent.is_empty() {
        text += if text.is_empty() { "Not measured:\n" } else { "\nNot measured:\n" };
        let mut reasons: Vec<(&String, Vec<&str>)> = Vec::new();
        for (name, reason) in &document.absent {
            match reasons.iter_mut().find(|(known, _)| *known == reason) {
                Some((_, names)) => names.push(name),
                None => reasons.push((reason, vec![name])),
            }
        }
        text.extend(reasons.iter().map(|(reason, names)| format!("  {}: {reason}\n", names.join(", "))));
    }
    text
}

fn rows(document: &Document) -> String {
    let jobs: Vec<_> = document.disks.iter().flat_map(|disk| disk.jobs.iter().map(move |job| (disk, job))).collect();
    if jobs.is_empty() {
        return String::new();
    }
    let mut columns = vec![
        column("disk", jobs.iter().map(|(disk, _)| disk.name.clone())),
        column("job", jobs.iter().map(|(_, job)| job.job.clone())),
    ];
    if document.marks {
        columns.push(column("windows", jobs.iter().map(|(_, job)| job.windows.len().to_string())));
    }
    for (heading, text) in COLUMNS {
        let cells = column(heading, jobs.iter().map(|(_, job)| text(job)));
        if cells[1..].iter().any(|cell| cell != "-") {
            columns.push(cells);
        }
    }
    let widths: Vec<_> =
        columns.iter().map(|cells| cells.iter().map(|cell| cell.chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in 0..=jobs.len() {
        let cells = columns.iter().zip(&widths).enumerate().map(|(index, (cells, &width))| {
            // Names are aligned to the left, numbers to the right.
            if index < 2 { format!("{:<width$}", cells[row]) } else { format!("{:>width$}", cells[row]) }
        });
        text += cells.collect::<Vec<_>>().join("  ").trim_end();
        text += "\n";
    }
    text
}

fn column(heading: &str, cells: impl Iterator<Item = String>) -> Vec<String> {
    std::iter::once(heading.to_owned()).chain(cells).collect()
}

/// Formats the median of a figure, or `-` without one.
fn figure(job: &JobResult, figure: Figure, format: impl Fn(f64) -> String) -> String {
    job.summary.median.get(&figure).map_or_else(|| "-".into(), |value| format(*value))
}

fn spread(job: &JobResult) -> String {
    match (job.summary.min.get(&Figure::Iops), job.summary.max.get(&Figure::Iops)) {
        (Some(min), Some(max)) if job.windows.len() > 1 => format!("{}..{}", grouped(*min), grouped(*max)),
        _ => "-".into(),
    }
}

/// Formats a number with three digits, or more before the decimal point.
fn digits(value: f64) -> String {
    let decimals = match value {
        value if value >= 99.95 => 0,
        value if value >= 9.995 => 1,
        _ => 2,
    };
    format!("{value:.decimals$}")
}

/// Formats a rounded number with commas between thousands.
pub(super) fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::conditions::Conditions;
    use super::super::document::DiskResult;
    use super::super::figures::{Figures, Summary, Window};
    use super::*;

    pub(in super::super) fn job(name: &str, values: &[f64]) -> JobResult {
        let window = |iops: &f64| {
            let figures = Figures::from([
                (Figure::Iops, *iops),
                (Figure::BytesPerSecond, iops * 4096.0),
                (Figure::P50Us, 12.345),
                (Figure::P99Us, 123.45),
                (Figure::P999Us, 0.5),
                (Figure::ClientUs, 3.0),
            ]);
            Window { figures, ..Window::marked(1, 0) }
        };
        let windows: Vec<_> = values.iter().map(window).collect();
        let failed = windows.is_empty().then(|| "read of 4096 bytes at offset 0: EIO".to_owned());
        JobResult { job: name.into(), failed, summary: Summary::of(&windows), windows }
    }

    pub(in super::super) fn document(jobs: Vec<JobResult>) -> Document {
        let disk = DiskResult { name: "null".into(), path: "/dev/ublkb0".into(), server_cpus: None, jobs };
        Document {
            conditions: Conditions::default(),
            marks: false,
            disks: vec![disk],
            absent: [].into(),
            errors: vec![],
        }
    }

    #[test]
    fn a_row_has_medians_and_the_spread() {
        let text = table(&document(vec![
            job("randread-4k-qd1", &[1000.0, 3000.0, 2000.0]),
            job("read-128k-qd32", &[1_234_567.0]),
            job("randwrite-4k-qd1", &[]),
        ]));
        let expected = "\
disk  job               requests/s      min..max   MiB/s  p50 us  p99 us  p99.9 us  client us
null  randread-4k-qd1        2,000  1,000..3,000     7.8    12.3     123      0.50       3.00
null  read-128k-qd32     1,234,567             -  4822.5    12.3     123      0.50       3.00
null  randwrite-4k-qd1           -             -       -       -       -         -          -
";
        assert_eq!(text, expected);
    }

    #[test]
    fn disks_that_are_absent_are_listed_with_the_reason() {
        let absent = ["rublk-loop", "rublk-null"].map(|name| (name.to_owned(), "rublk is not installed".to_owned()));
        let mut document = document(vec![job("randread-4k-qd1", &[10.0])]);
        document.absent.extend(absent);
        assert!(table(&document).ends_with("\n\nNot measured:\n  rublk-loop, rublk-null: rublk is not installed\n"));
        document.disks.clear();
        assert_eq!(table(&document), "Not measured:\n  rublk-loop, rublk-null: rublk is not installed\n");
    }

    #[test]
    fn failures_name_the_disk_and_the_job() {
        let document = document(vec![job("randread-4k-qd1", &[1.0]), job("randwrite-4k-qd1", &[])]);
        let failures: Vec<_> = document.failures().collect();
        assert_eq!(failures, ["null randwrite-4k-qd1: read of 4096 bytes at offset 0: EIO"]);
    }

    #[test]
    fn the_document_has_the_documented_fields() {
        let json = serde_json::to_value(document(vec![job("randread-4k-qd1", &[10.0, 30.0])])).unwrap();
        let job = &json["disks"][0]["jobs"][0];
        assert_eq!((&json["disks"][0]["name"], &json["disks"][0]["path"]), (&"null".into(), &"/dev/ublkb0".into()));
        assert_eq!((&job["job"], &job["failed"]), (&"randread-4k-qd1".into(), &serde_json::Value::Null));
        assert_eq!((&job["windows"][1]["iops"], &job["median"]["iops"]), (&30.0.into(), &20.0.into()));
        assert_eq!((&job["min"]["iops"], &job["max"]["iops"]), (&10.0.into(), &30.0.into()));
        assert!(json["conditions"].is_object() && json["absent"].is_object() && json["marks"] == false);
    }

    #[test]
    fn numbers_have_separators_and_three_digits() {
        for (value, text) in [(0.0, "0"), (999.0, "999"), (1000.0, "1,000"), (1_234_567.4, "1,234,567")] {
            assert_eq!(grouped(value), text);
        }
        for (value, text) in [(0.123, "0.12"), (9.99, "9.99"), (9.996, "10.0"), (99.96, "100"), (12345.6, "12346")] {
            assert_eq!(digits(value), text);
        }
    }
}
