//! Ratios of pairs, and what is said about them.

use std::time::Duration;

use serde::Serialize;

use crate::{
    Result,
    side::{Side, Slice},
};

/// How numbers lie.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    /// The middle one; it counts.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
    /// A quarter of them is below.
    pub q1: f64,
    /// A quarter of them is above.
    pub q3: f64,
}

impl Spread {
    /// The spread of some numbers.
    #[must_use]
    pub fn of(mut numbers: Vec<f64>) -> Self {
        numbers.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let place = share * (numbers.len().saturating_sub(1)) as f64;
            let low = numbers.get(place.floor() as usize).copied().unwrap_or(0.0);
            let high = numbers.get(place.ceil() as usize).copied().unwrap_or(low);
            low + (high - low) * place.fract()
        };
        Self {
            median: at(0.5),
            min: at(0.0),
            max: at(1.0),
            q1: at(0.25),
            q3: at(0.75),
        }
    }

    /// How far the middle half is spread, as a part of the median.
    #[must_use]
    pub fn middle_half(&self) -> f64 {
        (self.q3 - self.q1) / self.median
    }
}

/// What decides about a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Judge {
    /// The ratio of accesses a second.
    Iops,
    /// The ratio of processor time an access: the other was too unsteady.
    Cpu,
}

/// The middle half of the ratios of accesses a second may be spread by this much for them to decide.
const STEADY: f64 = 0.1;

/// A comparison.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was done.
    pub name: String,
    /// The side that is judged.
    pub ours: String,
    /// The side it is measured against.
    pub peer: String,
    /// The number of pairs.
    pub pairs: usize,
    /// Median accesses a second of our side; a note.
    pub ours_iops: f64,
    /// The same of the peer.
    pub peer_iops: f64,
    /// Median processor time an access of our side, in nanoseconds; a note.
    pub ours_cpu_ns: f64,
    /// The same of the peer.
    pub peer_cpu_ns: f64,
    /// Whether processor time includes the kernel's workers; otherwise it is the driving thread's.
    pub cpu_with_workers: bool,
    /// Accesses a second, ours by the peer's.
    pub iops_ratio: Spread,
    /// Processor time an access, ours by the peer's: less is better.
    pub cpu_ratio: Spread,
    /// The least ratio of accesses a second.
    pub bar: f64,
    /// What decided.
    pub judge: Judge,
    /// Whether the bar is met.
    pub met: bool,
}

/// How a comparison is made.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How many pairs.
    pub pairs: usize,
    /// The length of a slice.
    pub slice: Duration,
    /// Whether to count the processor time of the kernel's workers too.
    pub with_workers: bool,
    /// The least ratio of accesses a second.
    pub bar: f64,
}

/// What is compared: a name, and the sides with theirs.
pub struct Contest<'a> {
    /// What is done.
    pub name: &'a str,
    /// Ours.
    pub ours: (&'a str, &'a mut dyn Side),
    /// The peer.
    pub peer: (&'a str, &'a mut dyn Side),
}

/// Runs the pairs. Within a pair the order alternates.
///
/// # Errors
/// Those of the sides.
pub fn compare(contest: Contest<'_>, plan: Plan) -> Result<Row> {
    let (ours, peer) = (contest.ours.1, contest.peer.1);
    // Caches, clocks and the device get used to the work.
    ours.slice(plan.slice / 2, 0)?;
    peer.slice(plan.slice / 2, 0)?;
    let mut slices: Vec<(Slice, Slice)> = Vec::new();
    for pair in 0..plan.pairs {
        let seed = 1 + pair as u64;
        slices.push(if pair % 2 == 0 {
            let first = ours.slice(plan.slice, seed)?;
            (first, peer.slice(plan.slice, seed)?)
        } else {
            let first = peer.slice(plan.slice, seed)?;
            (ours.slice(plan.slice, seed)?, first)
        });
    }
    let spread = |of: &dyn Fn(&(Slice, Slice)) -> f64| Spread::of(slices.iter().map(of).collect());
    let cpu = |slice: &Slice| slice.cpu_per_io(plan.with_workers);
    let iops_ratio = spread(&|(a, b)| a.iops() / b.iops());
    let cpu_ratio = spread(&|(a, b)| cpu(a) / cpu(b));
    let judge = if iops_ratio.middle_half() > STEADY {
        Judge::Cpu
    } else {
        Judge::Iops
    };
    Ok(Row {
        name: contest.name.to_owned(),
        ours: contest.ours.0.to_owned(),
        peer: contest.peer.0.to_owned(),
        pairs: slices.len(),
        ours_iops: spread(&|(a, _)| a.iops()).median,
        peer_iops: spread(&|(_, b)| b.iops()).median,
        ours_cpu_ns: spread(&|(a, _)| cpu(a)).median,
        peer_cpu_ns: spread(&|(_, b)| cpu(b)).median,
        cpu_with_workers: plan.with_workers,
        iops_ratio,
        cpu_ratio,
        bar: plan.bar,
        judge,
        met: match judge {
            Judge::Iops => iops_ratio.median >= plan.bar,
            Judge::Cpu => cpu_ratio.median <= 1.0 / plan.bar,
        },
    })
}

/// The head of the table that [`line()`] fills.
pub const HEAD: &str = "\
| what | ours / peer, kIOPS | IOPS ratio | min-max | middle half | ours / peer, CPU ns | CPU ratio | min-max | bar | decided by | met |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |";

/// A row of the table.
#[must_use]
pub fn line(row: &Row) -> String {
    let (iops, cpu) = (&row.iops_ratio, &row.cpu_ratio);
    format!(
        "| {} ({} / {}) | {:.0} / {:.0} | {:.2} | {:.2}-{:.2} | {:.0} % | {:.0} / {:.0} | {:.2} | {:.2}-{:.2} | {} | {} | {} |",
        row.name,
        row.ours,
        row.peer,
        row.ours_iops / 1e3,
        row.peer_iops / 1e3,
        iops.median,
        iops.min,
        iops.max,
        iops.middle_half() * 100.0,
        row.ours_cpu_ns,
        row.peer_cpu_ns,
        cpu.median,
        cpu.min,
        cpu.max,
        row.bar,
        match row.judge {
            Judge::Iops => "IOPS",
            Judge::Cpu => "CPU",
        },
        if row.met { "yes" } else { "no" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_finds_middle_and_ends() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(
            (spread.min, spread.q1, spread.median, spread.q3, spread.max),
            (1.0, 2.0, 3.0, 4.0, 5.0)
        );
        assert!((spread.middle_half() - 2.0 / 3.0).abs() < 1e-9);
    }

    /// A side that does so many accesses a second.
    struct Steady(u64);

    impl Side for Steady {
        fn slice(&mut self, length: Duration, _seed: u64) -> Result<Slice> {
            Ok(Slice {
                ios: self.0,
                wall: length,
                thread_cpu: length,
                all_cpu: length,
            })
        }
    }

    #[test]
    fn a_steady_ratio_is_judged_by_iops() {
        let plan = Plan {
            pairs: 3,
            slice: Duration::from_secs(1),
            with_workers: false,
            bar: 0.9,
        };
        let row = |ours| {
            let contest = Contest {
                name: "steady",
                ours: ("a", &mut Steady(ours)),
                peer: ("b", &mut Steady(100)),
            };
            compare(contest, plan).unwrap()
        };
        assert_eq!(row(89).judge, Judge::Iops);
        assert!(!row(89).met && row(90).met);
    }
}
