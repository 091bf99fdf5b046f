// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results as a bar chart: requests per second of each disk, a chart per job.

use std::fmt::Write;

use super::document::Document;
use super::figures::Figure;
use super::table::grouped;

// Lengths in pixels.
const WIDTH: usize = 760;
const LEFT: usize = 170;
const RIGHT: usize = 110;
const BAR: usize = 14;
const GAP: usize = 6;
const TITLE: usize = 44;

const BAR_COLOR: &str = "#4878a8";
const OWN_COLOR: &str = "#1a7030";
const TEXT_COLOR: &str = "#333";

/// A bar: a disk's median, and its spread.
struct Bar<'d> {
    disk: &'d str,
    median: f64,
    min: f64,
    max: f64,
}

/// Draws the results as an SVG document.
pub(super) fn svg(document: &Document) -> String {
    let mut parts = String::new();
    let mut y = 0;
    for (job, bars) in charts(document) {
        chart(&mut parts, &mut y, job, &bars);
    }
    if parts.is_empty() {
        y = TITLE;
        text(&mut parts, (LEFT, 20), "", "nothing was measured");
    }
    let conditions = &document.conditions;
    let cpu = conditions.cpu.as_deref().unwrap_or("unknown CPU");
    let footer = format!("Linux {}, {cpu}, {} CPUs, {}", conditions.kernel, conditions.cpus, conditions.date);
    y += 20;
    text(&mut parts, (10, y), "", &footer);
    let height = y + 10;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"{TEXT_COLOR}\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n{parts}</svg>\n"
    )
}

/// Returns the bars of each job, in the order of the jobs, the longest first.
fn charts(document: &Document) -> Vec<(&str, Vec<Bar<'_>>)> {
    let mut charts: Vec<(&str, Vec<Bar<'_>>)> = Vec::new();
    for disk in &document.disks {
        for job in &disk.jobs {
            let figure = |figures: &super::figures::Figures| figures.get(&Figure::Iops).copied();
            let summary = &job.summary;
            let (Some(median), Some(min), Some(max)) =
                (figure(&summary.median), figure(&summary.min), figure(&summary.max))
            else {
                continue;
            };
            let bar = Bar { disk: &disk.name, median, min, max };
            match charts.iter_mut().find(|(name, _)| *name == job.job) {
                Some((_, bars)) => bars.push(bar),
                None => charts.push((&job.job, vec![bar])),
            }
        }
    }
    for (_, bars) in &mut charts {
        bars.sort_by(|a, b| b.median.total_cmp(&a.median));
    }
    charts
}

/// Adds a job's chart below `y`, and moves `y` to its end. Writing to a string does not fail.
fn chart(parts: &mut String, y: &mut usize, job: &str, bars: &[Bar<'_>]) {
    let longest = bars.iter().map(|bar| bar.max).fold(1.0, f64::max);
    let scale = (WIDTH - LEFT - RIGHT) as f64 / longest;
    text(parts, (LEFT, *y + 20), "font-size=\"14\"", &format!("{job}: requests per second"));
    *y += TITLE - 10;
    for bar in bars {
        let own = bar.disk.starts_with("ublk-") || bar.disk.starts_with("python-");
        let (baseline, middle) = (*y + BAR - 3, *y + BAR / 2);
        let (width, min, max) = (bar.median * scale, LEFT as f64 + bar.min * scale, LEFT as f64 + bar.max * scale);
        let color = if own { OWN_COLOR } else { BAR_COLOR };
        text(parts, (LEFT - 8, baseline), "text-anchor=\"end\"", bar.disk);
        let _ = writeln!(
            parts,
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{color}\"/>\n\
             <path d=\"M{min:.1} {middle}H{max:.1}\" stroke=\"black\"/>",
        );
        let label = (max + 6.0) as usize;
        text(parts, (label, baseline), "", &grouped(bar.median));
        *y += BAR + GAP;
    }
}

/// Adds a text. Its characters that have a meaning in XML are escaped.
fn text(parts: &mut String, (x, y): (usize, usize), attributes: &str, content: &str) {
    let escaped = content.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let space = if attributes.is_empty() { "" } else { " " };
    let _ = writeln!(parts, "<text x=\"{x}\" y=\"{y}\"{space}{attributes}>{escaped}</text>");
}

#[cfg(test)]
mod tests {
    use super::super::table::tests::{document, job};
    use super::*;

    #[test]
    fn each_job_has_a_chart_with_a_bar_per_disk() {
        let mut document = document(vec![job("randread-4k-qd1", &[1000.0, 3000.0]), job("randwrite-4k-qd1", &[])]);
        let mut second = document.disks[0].jobs.split_off(1);
        second.push(job("randread-4k-qd1", &[4000.0]));
        document.disks.push(super::super::document::DiskResult {
            name: "<&>".into(),
            path: "/dev/x".into(),
            server_cpus: None,
            jobs: second,
        });
        let svg = svg(&document);
        assert_eq!(svg.matches("requests per second").count(), 1, "a job without results has no chart");
        assert!(svg.contains(">&lt;&amp;&gt;</text>") && !svg.contains("<&>"));
        // The longest bar takes the whole width, and comes first; the other has half of it.
        let widths: Vec<_> = svg.lines().filter(|line| line.starts_with("<rect x=")).collect();
        assert!(widths[0].contains("width=\"480.0\"") && widths[1].contains("width=\"240.0\""), "{widths:?}");
        assert!(svg.contains("M290.0") && svg.contains("H530.0"), "{svg}");
    }

    #[test]
    fn a_plot_without_results_says_so() {
        assert!(svg(&document(vec![])).contains("nothing was measured"));
    }
}
