//! Ratios of pairs, and what is said about them.

use std::{fmt, time::Duration};

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
    /// The ratio of processor time an access: the other was too unsteady, or has no bar.
    Cpu,
    /// What the host can do: we reach it, with much less processor time than the peer.
    #[serde(rename = "host-bound")]
    HostBound,
}

impl Judge {
    /// Its name in a table.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Judge::Iops => "IOPS",
            Judge::Cpu => "CPU",
            Judge::HostBound => "host-bound",
        }
    }
}

/// The middle half of the ratios of accesses a second may be spread by this much for them to decide.
pub const STEADY: f64 = 0.1;

/// Where the bar in accesses a second is missed: how much of the host's ceiling is enough.
pub const OF_CEILING: f64 = 0.9;

/// And how much of the peer's processor time an access is allowed then.
pub const HOST_BOUND_CPU: f64 = 0.7;

/// What a row has to reach.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Bars {
    /// The least ratio of accesses a second.
    pub rate: Option<f64>,
    /// The largest ratio of processor time an access.
    pub cpu: Option<f64>,
}

impl Bars {
    /// A bar for accesses a second.
    #[must_use]
    pub fn rate(least: f64) -> Self {
        Self {
            rate: Some(least),
            cpu: None,
        }
    }

    /// A bar for processor time an access alone.
    #[must_use]
    pub fn cpu(most: f64) -> Self {
        Self {
            rate: None,
            cpu: Some(most),
        }
    }

    /// And a bar for processor time an access, which has to be met too.
    #[must_use]
    pub fn and_cpu(self, most: f64) -> Self {
        Self {
            cpu: Some(most),
            ..self
        }
    }

    /// What decides, and whether it is met. `ceiling` is the ratio to what the host can do.
    fn judge(self, iops: &Spread, cpu: &Spread, ceiling: Option<&Spread>) -> (Judge, bool) {
        let cpu_met = self.cpu.is_none_or(|most| cpu.median <= most);
        let Some(least) = self.rate else {
            return (Judge::Cpu, cpu_met);
        };
        let (judge, met) = if iops.middle_half() > STEADY {
            (Judge::Cpu, cpu.median <= 1.0 / least)
        } else {
            (Judge::Iops, iops.median >= least)
        };
        let at_ceiling = ceiling.is_some_and(|ratio| ratio.median >= OF_CEILING);
        if !met && at_ceiling && cpu.median <= HOST_BOUND_CPU {
            return (Judge::HostBound, cpu_met);
        }
        (judge, met && cpu_met)
    }
}

impl fmt::Display for Bars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.rate, self.cpu) {
            (Some(rate), None) => write!(f, "{rate}"),
            (Some(rate), Some(cpu)) => write!(f, "{rate}; CPU {cpu:.2}"),
            (None, Some(cpu)) => write!(f, "CPU {cpu:.2}"),
            (None, None) => Ok(()),
        }
    }
}

/// What the host can do with the same operations, measured in the same run.
#[derive(Clone, Debug, Serialize)]
pub struct Ceiling {
    /// Who measured it.
    pub name: String,
    /// Median accesses a second, as far as its operations go; a note.
    pub iops: f64,
    /// Accesses a second, ours by it.
    pub ratio: Spread,
    /// Median processor time of its operations for an access, in nanoseconds; a note.
    pub cpu_ns: f64,
    /// Accesses a second, its by the peer's.
    pub peer_iops_ratio: Spread,
    /// Processor time an access, its by the peer's.
    pub peer_cpu_ratio: Spread,
    /// Whether it meets the bars in our place.
    pub met: bool,
}

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
    /// What the host can do, where that was measured.
    pub ceiling: Option<Ceiling>,
    /// What has to be reached.
    pub bars: Bars,
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
    /// What has to be reached.
    pub bars: Bars,
}

/// A side that shows what the host can do.
pub struct Host<'a> {
    /// Its name.
    pub name: &'a str,
    /// It.
    pub side: &'a mut dyn Side,
    /// Its accesses that make up one of ours.
    pub operations: f64,
}

/// What is compared: a name, and the sides with theirs.
pub struct Contest<'a> {
    /// What is done.
    pub name: &'a str,
    /// Ours.
    pub ours: (&'a str, &'a mut dyn Side),
    /// The peer.
    pub peer: (&'a str, &'a mut dyn Side),
    /// What the host can do, if that is of interest.
    pub host: Option<Host<'a>>,
}

/// Runs two things in turn, `pairs` times; within a pair the order alternates. What is run gets a seed.
///
/// # Errors
/// Those of the two.
pub fn pairs<T>(
    pairs: usize,
    mut ours: impl FnMut(u64) -> Result<T>,
    mut peer: impl FnMut(u64) -> Result<T>,
) -> Result<Vec<(T, T)>> {
    (0..pairs)
        .map(|pair| {
            let seed = 1 + pair as u64;
            if pair % 2 == 0 {
                let first = ours(seed)?;
                Ok((first, peer(seed)?))
            } else {
                let first = peer(seed)?;
                Ok((ours(seed)?, first))
            }
        })
        .collect()
}

/// Runs the pairs; what the host can do is measured right after each.
///
/// # Errors
/// Those of the sides.
pub fn compare(contest: Contest<'_>, plan: Plan) -> Result<Row> {
    let (ours, peer) = (contest.ours.1, contest.peer.1);
    let mut host = contest.host;
    // Caches, clocks and the device get used to the work.
    ours.slice(plan.slice / 2, 0)?;
    peer.slice(plan.slice / 2, 0)?;
    let mut slices: Vec<(Slice, Slice)> = Vec::new();
    let mut hosts = Vec::new();
    for pair in 0..plan.pairs {
        let seed = 1 + pair as u64;
        let slice = if pair % 2 == 0 {
            let first = ours.slice(plan.slice, seed)?;
            (first, peer.slice(plan.slice, seed)?)
        } else {
            let first = peer.slice(plan.slice, seed)?;
            (ours.slice(plan.slice, seed)?, first)
        };
        if let Some(host) = &mut host {
            hosts.push(host.side.slice(plan.slice, seed)?);
        }
        slices.push(slice);
    }
    let spread = |of: &dyn Fn(&(Slice, Slice)) -> f64| Spread::of(slices.iter().map(of).collect());
    let cpu = |slice: &Slice| slice.cpu_per_io(plan.with_workers);
    let iops_ratio = spread(&|(a, b)| a.iops() / b.iops());
    let cpu_ratio = spread(&|(a, b)| cpu(a) / cpu(b));
    let ceiling = host.map(|host| ceiling(&host, &slices, &hosts, plan));
    let at_ceiling = ceiling.as_ref().map(|ceiling| &ceiling.ratio);
    let (judge, met) = plan.bars.judge(&iops_ratio, &cpu_ratio, at_ceiling);
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
        ceiling,
        bars: plan.bars,
        judge,
        met,
    })
}

/// What the host can do beside both sides of each pair.
fn ceiling(host: &Host<'_>, slices: &[(Slice, Slice)], hosts: &[Slice], plan: Plan) -> Ceiling {
    let iops = |slice: &Slice| slice.iops() / host.operations;
    let cpu = |slice: &Slice| slice.cpu_per_io(plan.with_workers) * host.operations;
    let spread = |of: &dyn Fn(&Slice, &(Slice, Slice)) -> f64| {
        let each = hosts.iter().zip(slices).map(|(host, pair)| of(host, pair));
        Spread::of(each.collect())
    };
    let peer_iops_ratio = spread(&|host, (_, peer)| iops(host) / peer.iops());
    let peer_cpu_ratio = spread(&|host, (_, peer)| cpu(host) / peer.cpu_per_io(plan.with_workers));
    let itself = Spread::of(vec![1.0]);
    let (_, met) = plan
        .bars
        .judge(&peer_iops_ratio, &peer_cpu_ratio, Some(&itself));
    Ceiling {
        name: host.name.to_owned(),
        iops: spread(&|host, _| iops(host)).median,
        ratio: spread(&|host, (ours, _)| ours.iops() / iops(host)),
        cpu_ns: spread(&|host, _| cpu(host)).median,
        peer_iops_ratio,
        peer_cpu_ratio,
        met,
    }
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
        row.bars,
        row.judge.name(),
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

    /// A side that does so many accesses a second, with so many nanoseconds of processor time each.
    struct Steady(u64, u64);

    impl Side for Steady {
        fn slice(&mut self, length: Duration, _seed: u64) -> Result<Slice> {
            let cpu = Duration::from_nanos(self.0 * self.1);
            Ok(Slice {
                ios: self.0,
                wall: length,
                thread_cpu: cpu,
                all_cpu: cpu,
            })
        }
    }

    /// A side that does twice as many accesses in every other slice.
    struct Unsteady(u64);

    impl Side for Unsteady {
        fn slice(&mut self, length: Duration, seed: u64) -> Result<Slice> {
            Steady(self.0 << (seed % 2), 1000).slice(length, seed)
        }
    }

    fn row(bars: Bars, ours: &mut dyn Side, peer: &mut dyn Side, host: Option<u64>) -> Row {
        let plan = Plan {
            pairs: 15,
            slice: Duration::from_secs(1),
            with_workers: false,
            bars,
        };
        let mut side = host.map(|iops| Steady(iops, 1000));
        let contest = Contest {
            name: "steady",
            ours: ("a", ours),
            peer: ("b", peer),
            host: side.as_mut().map(|side| Host {
                name: "fio",
                side,
                operations: 2.0,
            }),
        };
        compare(contest, plan).unwrap()
    }

    #[test]
    fn a_steady_ratio_is_judged_by_iops() {
        let row = |ours| {
            let mut peer = Steady(100, 1000);
            row(Bars::rate(0.9), &mut Steady(ours, 9000), &mut peer, None)
        };
        assert_eq!(row(89).judge, Judge::Iops);
        assert!(!row(89).met && row(90).met);
    }

    #[test]
    fn an_unsteady_ratio_is_judged_by_processor_time() {
        let row = |cpu| {
            let mut peer = Unsteady(100);
            row(Bars::rate(2.0), &mut Steady(100, cpu), &mut peer, None)
        };
        assert_eq!(row(500).judge, Judge::Cpu);
        assert!(row(500).met && !row(501).met);
    }

    #[test]
    fn a_bar_for_processor_time_has_to_be_met_too() {
        let row = |iops, cpu| {
            let bars = Bars::rate(1.5).and_cpu(0.6);
            row(bars, &mut Steady(iops, cpu), &mut Steady(100, 1000), None)
        };
        assert!(row(150, 600).met);
        assert!(!row(150, 601).met && !row(149, 600).met);
        let alone = |cpu| {
            let mut peer = Unsteady(100);
            self::row(Bars::cpu(0.5), &mut Steady(1, cpu), &mut peer, None)
        };
        assert_eq!(alone(500).judge, Judge::Cpu);
        assert!(alone(500).met && !alone(501).met);
    }

    #[test]
    fn nine_tenths_of_what_the_host_can_do_is_enough_with_little_processor_time() {
        // The host's 200 operations a second are 100 accesses.
        let row = |iops, cpu| {
            let mut peer = Steady(80, 1000);
            row(
                Bars::rate(2.0),
                &mut Steady(iops, cpu),
                &mut peer,
                Some(200),
            )
        };
        assert_eq!(row(90, 700).judge, Judge::HostBound);
        assert!(row(90, 700).met);
        for missed in [row(89, 700), row(90, 701)] {
            assert_eq!(missed.judge, Judge::Iops);
            assert!(!missed.met);
        }
        assert_eq!(row(160, 2000).judge, Judge::Iops);
        assert!(row(160, 2000).met);
    }

    #[test]
    fn a_bar_for_processor_time_holds_at_the_ceiling_too() {
        let row = |cpu| {
            let bars = Bars::rate(2.0).and_cpu(0.6);
            row(bars, &mut Steady(95, cpu), &mut Steady(80, 1000), Some(200))
        };
        assert!(row(600).met && !row(650).met);
    }

    #[test]
    fn the_host_is_judged_in_our_place() {
        // Its 220 operations a second are 110 accesses of 2000 ns.
        let row = |peer, cpu| {
            let bars = Bars::rate(2.0);
            let mut peer = Steady(peer, cpu);
            let row = row(bars, &mut Steady(100, 9000), &mut peer, Some(220));
            row.ceiling.unwrap()
        };
        let near = row(100, 2800);
        assert!((near.peer_iops_ratio.median - 1.1).abs() < 1e-9);
        assert!((near.peer_cpu_ratio.median - 2000.0 / 2800.0).abs() < 1e-9);
        assert!(!near.met, "neither the rate nor 0.7 of the processor time");
        assert!(row(100, 2900).met && row(55, 2000).met);
    }

    #[test]
    fn the_order_within_pairs_alternates() {
        let order = std::cell::RefCell::new(Vec::new());
        let note = |who: &'static str| {
            let order = &order;
            move |seed: u64| -> Result<u64> {
                order.borrow_mut().push(who);
                Ok(seed)
            }
        };
        assert_eq!(pairs(2, note("a"), note("b")).unwrap(), [(1, 1), (2, 2)]);
        assert_eq!(order.into_inner(), ["a", "b", "b", "a"]);
    }
}
