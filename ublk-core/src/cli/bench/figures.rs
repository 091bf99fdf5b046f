// SPDX-License-Identifier: MIT OR Apache-2.0

//! Figures of windows and of jobs, as the JSON document has them.

use std::collections::BTreeMap;

use serde::Serialize;

use super::windows::Interval;

/// Kind of figure. Its name in JSON has the unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Figure {
    /// Requests per second.
    Iops,
    BytesPerSecond,
    /// Latencies in microseconds.
    P50Us,
    P99Us,
    P999Us,
    /// CPU time per request in microseconds.
    ClientUs,
    ServerUs,
    /// Instructions and cycles of the CPUs per request.
    Instructions,
    Cycles,
}

/// Values of figures. Those that are not available are absent.
pub(super) type Figures = BTreeMap<Figure, f64>;

/// A window of a job.
#[derive(Debug, Serialize)]
pub(super) struct Window {
    pub(super) requests: u64,
    /// Number of the window among all of the process, if it is marked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) window: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) seconds: Option<f64>,
    #[serde(flatten)]
    pub(super) figures: Figures,
}

impl Window {
    /// A window with marks, in which nothing else was measured.
    pub(super) fn marked(requests: u64, window: u64) -> Self {
        Window { requests, window: Some(window), seconds: None, figures: Figures::new() }
    }

    /// A window of requests of `size` bytes.
    pub(super) fn measured(interval: &Interval, size: u32) -> Self {
        let (requests, seconds) = (interval.requests as f64, interval.duration.as_secs_f64());
        let latency = |quantile| interval.latencies.value_at_quantile(quantile) as f64 / 1e3;
        let per_request = |time: std::time::Duration| time.as_secs_f64() * 1e6 / requests;
        let mut figures = Figures::from([
            (Figure::P50Us, latency(0.5)),
            (Figure::P99Us, latency(0.99)),
            (Figure::P999Us, latency(0.999)),
            (Figure::ClientUs, per_request(interval.work.client)),
        ]);
        // One wait may have completed all of a few requests.
        if seconds > 0.0 {
            figures.insert(Figure::Iops, requests / seconds);
            figures.insert(Figure::BytesPerSecond, requests * f64::from(size) / seconds);
        }
        if let Some(server) = interval.work.server {
            figures.insert(Figure::ServerUs, per_request(server));
        }
        for (figure, count) in
            [(Figure::Instructions, interval.work.instructions), (Figure::Cycles, interval.work.cycles)]
        {
            figures.extend(count.map(|count| (figure, count as f64 / requests)));
        }
        Window { requests: interval.requests, window: None, seconds: Some(seconds), figures }
    }
}

/// The median of each figure, with the least and the greatest value.
#[derive(Debug, Default, PartialEq, Serialize)]
pub(super) struct Summary {
    pub(super) median: Figures,
    pub(super) min: Figures,
    pub(super) max: Figures,
}

impl Summary {
    /// Summarizes windows. A figure that one of them lacks is absent.
    pub(super) fn of(windows: &[Window]) -> Self {
        let mut summary = Summary::default();
        for &figure in windows.first().map(|window| &window.figures).into_iter().flat_map(BTreeMap::keys) {
            let values: Option<Vec<f64>> = windows.iter().map(|window| window.figures.get(&figure).copied()).collect();
            let Some(mut values) = values else { continue };
            values.sort_by(f64::total_cmp);
            summary.median.insert(figure, median(&values));
            summary.min.insert(figure, values[0]);
            summary.max.insert(figure, values[values.len() - 1]);
        }
        summary
    }
}

/// Returns the median of sorted values, of which there is at least one.
fn median(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len().is_multiple_of(2) { f64::midpoint(sorted[middle - 1], sorted[middle]) } else { sorted[middle] }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use hdrhistogram::Histogram;

    use super::super::work::Work;
    use super::*;

    fn interval(requests: u64, duration: Duration) -> Interval {
        let mut latencies = Histogram::new_with_bounds(1, 1_000_000_000, 3).unwrap();
        for request in 1..=requests {
            latencies.record(request * 1000).unwrap();
        }
        let work = Work {
            client: Duration::from_millis(5),
            server: Some(Duration::from_millis(20)),
            instructions: Some(requests * 7),
            cycles: None,
        };
        Interval { requests, duration, latencies, work }
    }

    #[test]
    fn figures_are_rates_percentiles_and_times_per_request() {
        let window = Window::measured(&interval(1000, Duration::from_millis(500)), 4096);
        let figure = |figure| window.figures[&figure];
        assert_eq!((window.requests, window.seconds), (1000, Some(0.5)));
        assert_eq!(figure(Figure::Iops), 2000.0);
        assert_eq!(figure(Figure::BytesPerSecond), 2000.0 * 4096.0);
        assert_eq!((figure(Figure::ClientUs), figure(Figure::ServerUs)), (5.0, 20.0));
        assert_eq!((figure(Figure::Instructions), window.figures.get(&Figure::Cycles)), (7.0, None));
        for (percentile, value) in [(Figure::P50Us, 500.0), (Figure::P99Us, 990.0), (Figure::P999Us, 999.0)] {
            assert!((figure(percentile) / value - 1.0).abs() < 0.002, "{percentile:?}: {}", figure(percentile));
        }
    }

    #[test]
    fn a_window_without_duration_has_no_rates() {
        let window = Window::measured(&interval(1, Duration::ZERO), 4096);
        assert!(!window.figures.contains_key(&Figure::Iops) && window.figures.contains_key(&Figure::P50Us));
    }

    #[test]
    fn a_summary_has_the_median_and_the_spread() {
        let windows = |values: &[f64]| -> Vec<Window> {
            values
                .iter()
                .map(|iops| Window { figures: [(Figure::Iops, *iops)].into(), ..Window::marked(1, 0) })
                .collect()
        };
        let triple = |values: &[f64]| {
            let summary = Summary::of(&windows(values));
            (summary.median[&Figure::Iops], summary.min[&Figure::Iops], summary.max[&Figure::Iops])
        };
        assert_eq!(triple(&[30.0, 10.0, 20.0]), (20.0, 10.0, 30.0));
        assert_eq!(triple(&[40.0, 10.0, 20.0, 30.0]), (25.0, 10.0, 40.0));
        assert_eq!(triple(&[7.0]), (7.0, 7.0, 7.0));
        assert_eq!(Summary::of(&[]), Summary::default());
        let mut different = windows(&[1.0, 2.0]);
        different[1].figures.clear();
        assert_eq!(Summary::of(&different), Summary::default(), "a figure that a window lacks has no median");
    }

    #[test]
    fn json_has_the_figures_beside_the_number_of_requests() {
        let window = Window { figures: [(Figure::P999Us, 1.5)].into(), ..Window::marked(10, 3) };
        let json = serde_json::to_value(window).unwrap();
        assert_eq!(json, serde_json::json!({ "requests": 10, "window": 3, "p999_us": 1.5 }));
    }
}
