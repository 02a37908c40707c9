//! Rows of the result, as a table and as JSON.

use block::io::EngineKind;
use serde::Serialize;
use virtio_devices::histogram::Bucket;

use crate::{
    bench::{Case, load::Measured},
    say,
    util::{json, size},
};

/// Percentiles of the time from submission to completion, in nanoseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Latency {
    p50: u64,
    p99: u64,
    p999: u64,
}

/// A measurement.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    format: &'static str,
    front_end: String,
    engine: &'static str,
    rw: &'static str,
    bs: u64,
    iodepth: usize,
    numjobs: usize,
    iops: f64,
    mib_per_s: f64,
    lat_ns: Latency,
    cpu_ns_per_io: f64,
    lat_hist_ns: Vec<Bucket>,
}

#[derive(Serialize)]
struct Rows<'a> {
    rows: &'a [Row],
}

impl Row {
    /// The row of a measurement.
    pub(super) fn new(case: &Case, measured: &Measured) -> Self {
        let iops = measured.ios as f64 / measured.time.as_secs_f64().max(1e-9);
        Self {
            format: case.format.name(),
            front_end: case.front_end.to_string(),
            engine: case.engine.name(),
            rw: case.load.mix.name,
            bs: case.load.bs,
            iodepth: case.load.depth,
            numjobs: case.load.jobs,
            iops,
            mib_per_s: iops * case.load.bs as f64 / f64::from(1 << 20),
            lat_ns: Latency {
                p50: measured.latency.p50(),
                p99: measured.latency.p99(),
                p999: measured.latency.p999(),
            },
            cpu_ns_per_io: measured.cpu.as_nanos() as f64 / measured.ios.max(1) as f64,
            lat_hist_ns: measured.latency.buckets().collect(),
        }
    }

    /// Whether the engine was this one.
    pub(super) fn is_of(&self, engine: EngineKind) -> bool {
        self.engine == engine.name()
    }
}

fn time(nanoseconds: u64) -> String {
    match nanoseconds as f64 {
        ns if ns < 1e6 => format!("{:.1} us", ns / 1e3),
        ns if ns < 1e9 => format!("{:.2} ms", ns / 1e6),
        ns => format!("{:.2} s", ns / 1e9),
    }
}

/// The widest bar of a histogram, in characters.
const WIDEST: u64 = 50;

/// A line of a histogram for people: latencies from one time up to, not including, another.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    from: u64,
    to: u64,
    count: u64,
}

/// Buckets put together: every power of two is cut in the middle, which is where buckets end, too.
fn steps(buckets: &[Bucket]) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for bucket in buckets {
        match steps.last_mut() {
            Some(step) if bucket.from < step.to => step.count += bucket.count,
            _ => {
                let power = 1_u64 << (63 - (bucket.from | 1).leading_zeros());
                let middle = power + power / 2;
                let (from, to) = match bucket.from {
                    0 => (0, 1),
                    from if from < middle => (power, middle),
                    _ => (middle, 2 * power),
                };
                steps.push(Step {
                    from,
                    to,
                    count: bucket.count,
                });
            }
        }
    }
    steps
}

/// Prints how the latencies of a row lie.
fn print_histogram(row: &Row) {
    let steps = steps(&row.lat_hist_ns);
    let total: u64 = steps.iter().map(|step| step.count).sum();
    let most = steps.iter().map(|step| step.count).max().unwrap_or(1);
    say!("\nlatency, {} {}:", row.front_end, row.rw);
    for Step { from, to, count } in steps {
        let share = count as f64 / total as f64 * 100.0;
        let width = (u128::from(count) * u128::from(WIDEST)).div_ceil(u128::from(most)) as usize;
        say!(
            "{:>10} -{:>10} {count:>10} {share:>6.2} % {}",
            time(from),
            time(to),
            "#".repeat(width)
        );
    }
}

/// Prints the rows; with `histograms`, for people, also how the latencies of each lie.
pub(super) fn print(rows: &[Row], as_json: bool, histograms: bool) {
    if as_json {
        json::print(&Rows { rows });
        return;
    }
    print_table(rows);
    if histograms {
        rows.iter().for_each(print_histogram);
    }
}

fn print_table(rows: &[Row]) {
    say!(
        "{:<7} {:<11} {:<10} {:<10} {:>8} {:>9} {:>10} {:>9} {:>10} {:>10} {:>10} {:>9}",
        "format",
        "front end",
        "engine",
        "rw",
        "bs",
        "depth",
        "IOPS",
        "MiB/s",
        "p50",
        "p99",
        "p99.9",
        "CPU/IO"
    );
    for row in rows {
        let depth = format!("{}x{}", row.numjobs, row.iodepth);
        say!(
            "{:<7} {:<11} {:<10} {:<10} {:>8} {depth:>9} {:>10.0} {:>9.1} {:>10} {:>10} {:>10} {:>9}",
            row.format,
            row.front_end,
            row.engine,
            row.rw,
            size::human(row.bs),
            row.iops,
            row.mib_per_s,
            time(row.lat_ns.p50),
            time(row.lat_ns.p99),
            time(row.lat_ns.p999),
            time(row.cpu_ns_per_io as u64)
        );
    }
}

#[cfg(test)]
mod tests {
    use virtio_devices::histogram::Histogram;

    use super::*;

    #[test]
    fn steps_hold_every_latency_once() {
        let mut histogram = Histogram::new();
        let values = [0, 1, 5, 63, 64, 95, 96, 127, 128, 1_000_000, 1_048_576];
        for value in values {
            histogram.record(value);
        }
        let buckets: Vec<Bucket> = histogram.buckets().collect();
        let steps = steps(&buckets);
        for Step { from, to, count } in &steps {
            let inside = values.iter().filter(|value| (*from..*to).contains(*value));
            assert_eq!(inside.count() as u64, *count, "{from} to {to}");
        }
        let sum: u64 = steps.iter().map(|step| step.count).sum();
        assert_eq!(sum, values.len() as u64);
        assert!(steps.windows(2).all(|pair| pair[0].to <= pair[1].from));
    }
}
