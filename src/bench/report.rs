//! Rows of the result, as a table and as JSON.

use block::io::EngineKind;
use serde::Serialize;

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

/// Prints the rows.
pub(super) fn print(rows: &[Row], as_json: bool) {
    if as_json {
        json::print(&Rows { rows });
        return;
    }
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
