//! The table of a run: a row of any kind, as text and as JSON.

use std::fmt::Write as _;

use serde::Serialize;

use crate::report::{Ceiling, HOST_BOUND_CPU, Judge, OF_CEILING, Row, Spread};

/// A bar, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    /// The least ratio of ours to the peer's.
    RatioAtLeast(f64),
    /// The largest ratio of ours to the peer's.
    RatioAtMost(f64),
    /// The largest value of ours, in the measure's own unit.
    AtMost(f64),
}

impl Bar {
    /// How well it is met: 1 is just met, more is better.
    fn score(self, ours: f64, ratio: f64) -> f64 {
        match self {
            Bar::RatioAtLeast(least) => ratio / least,
            Bar::RatioAtMost(most) => most / ratio,
            Bar::AtMost(most) => most / ours,
        }
    }

    fn met(self, ours: f64, ratio: f64) -> bool {
        match self {
            Bar::RatioAtLeast(least) => ratio >= least,
            Bar::RatioAtMost(most) => ratio <= most,
            Bar::AtMost(most) => ours <= most,
        }
    }

    fn text(self) -> String {
        match self {
            Bar::RatioAtLeast(least) => format!(">= {}", number(least)),
            Bar::RatioAtMost(most) => format!("<= {}", number(most)),
            Bar::AtMost(most) => format!("ours <= {}", number(most)),
        }
    }
}

/// Something that was measured of both sides.
#[derive(Clone, Debug, Serialize)]
pub struct Measure {
    /// What, with its unit.
    pub what: String,
    /// The median of our side.
    pub ours: f64,
    /// The median of the peer's, if it has one.
    pub peer: Option<f64>,
    /// Ours by the peer's, pair by pair.
    pub ratio: Option<Spread>,
    /// The bar that decides, if one does.
    pub bar: Option<Bar>,
    /// Whether the bar is met.
    pub met: Option<bool>,
}

impl Measure {
    /// Medians without a bar.
    #[must_use]
    pub fn note(what: &str, ours: f64, peer: Option<f64>) -> Self {
        Self {
            what: what.to_owned(),
            ours,
            peer,
            ratio: None,
            bar: None,
            met: None,
        }
    }

    /// What was measured in pairs: medians, and the ratios of the pairs.
    #[must_use]
    pub fn of_pairs(what: &str, pairs: &[(f64, f64)]) -> Self {
        let spread = |of: &dyn Fn(&(f64, f64)) -> f64| Spread::of(pairs.iter().map(of).collect());
        Self {
            ratio: Some(spread(&|(ours, peer)| ours / peer)),
            ..Self::note(
                what,
                spread(&|(ours, _)| *ours).median,
                Some(spread(&|(_, peer)| *peer).median),
            )
        }
    }

    /// With a bar.
    #[must_use]
    pub fn bar(self, bar: Bar) -> Self {
        let met = bar.met(self.ours, self.quotient());
        Self {
            bar: Some(bar),
            met: Some(met),
            ..self
        }
    }

    /// The ratio that counts.
    fn quotient(&self) -> f64 {
        match (self.ratio, self.peer) {
            (Some(ratio), _) => ratio.median,
            (None, Some(peer)) => self.ours / peer,
            (None, None) => f64::NAN,
        }
    }

    fn line(&self) -> String {
        let peer = self.peer.map(number).unwrap_or_default();
        let quotient = self.quotient();
        let ratio = if quotient.is_finite() {
            format!("{quotient:.2}")
        } else {
            String::new()
        };
        let (range, middle) = self.ratio.map_or_else(Default::default, |ratio| {
            (
                format!("{:.2}-{:.2}", ratio.min, ratio.max),
                format!("{:.0} %", ratio.middle_half() * 100.0),
            )
        });
        format!(
            "{} | {} | {peer} | {ratio} | {range} | {middle} | {} | {}",
            self.what,
            number(self.ours),
            self.bar.map(Bar::text).unwrap_or_default(),
            match self.met {
                Some(true) => "yes",
                Some(false) => "no",
                None => "",
            }
        )
    }
}

/// A number with three digits that count.
fn number(number: f64) -> String {
    let places = match number.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{number:.places$}");
    if !text.contains('.') {
        return text;
    }
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A row: what became of it, and what was measured.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    /// What was done.
    pub name: String,
    /// The side that is judged.
    pub ours: String,
    /// The side it is measured against.
    pub peer: String,
    /// The number of pairs.
    pub pairs: usize,
    /// What was measured.
    pub measures: Vec<Measure>,
    /// What decided: a measure's name, or a rule's.
    pub decided_by: String,
    /// Whether all its bars are met.
    pub met: bool,
    /// Whether what the host can do was measured, and misses the bars too.
    pub host_misses: bool,
    /// Why nothing was measured.
    pub failed: Option<String>,
}

impl Entry {
    /// A row that meets its bars when each measure meets its own.
    #[must_use]
    pub fn new(name: &str, sides: (&str, &str), pairs: usize, measures: Vec<Measure>) -> Self {
        let decided_by: Vec<&str> = measures
            .iter()
            .filter(|measure| measure.bar.is_some())
            .map(|measure| measure.what.as_str())
            .collect();
        Self {
            name: name.to_owned(),
            ours: sides.0.to_owned(),
            peer: sides.1.to_owned(),
            pairs,
            decided_by: decided_by.join(", "),
            met: measures.iter().all(|measure| measure.met != Some(false)),
            measures,
            host_misses: false,
            failed: None,
        }
    }

    /// A row that could not be measured.
    #[must_use]
    pub fn failure(name: &str, reason: &str) -> Self {
        Self {
            met: false,
            failed: Some(reason.trim().replace('\n', "; ")),
            ..Self::new(name, ("", ""), 0, Vec::new())
        }
    }

    /// With another measure, whose bar counts too.
    pub fn push(&mut self, measure: Measure) {
        if measure.bar.is_some() {
            self.decided_by = format!("{}, {}", self.decided_by, measure.what);
        }
        self.met &= measure.met != Some(false);
        self.measures.push(measure);
    }

    /// For a comparison whose accesses are runs of a program: seconds in the place of accesses a
    /// second. The ratio stays: times as fast.
    #[must_use]
    pub fn of_runs(mut self) -> Self {
        if let [rate, cpu, ..] = self.measures.as_mut_slice() {
            "ms a run; ratio: times as fast".clone_into(&mut rate.what);
            rate.ours = 1.0 / rate.ours;
            rate.peer = rate.peer.map(|peer| 1.0 / peer);
            "CPU ms a run".clone_into(&mut cpu.what);
            cpu.ours /= 1e3;
            cpu.peer = cpu.peer.map(|peer| peer / 1e3);
        }
        self
    }

    /// How well the worst of its bars is met: 1 is just met. None if it failed or has no bar.
    #[must_use]
    pub fn score(&self) -> Option<f64> {
        self.measures
            .iter()
            .filter_map(|measure| Some(measure.bar?.score(measure.ours, measure.quotient())))
            .filter(|score| !score.is_nan())
            .min_by(f64::total_cmp)
    }

    /// What became of it, in a word or two.
    #[must_use]
    pub fn verdict(&self) -> &'static str {
        match (&self.failed, self.met, self.decided_by.is_empty()) {
            (Some(_), ..) => "failed",
            (None, _, true) => "note",
            (None, true, _) if self.decided_by.starts_with(Judge::HostBound.name()) => "host-bound",
            (None, true, _) => "met",
            (None, false, _) if self.host_misses => "missed, by the host too",
            (None, false, _) => "missed",
        }
    }

    /// Its lines in a table: one for each measure.
    #[must_use]
    pub fn lines(&self) -> String {
        let mut text = String::new();
        if let Some(reason) = &self.failed {
            let reason = reason.replace('|', "/");
            let _ = writeln!(text, "| **{}** | failed: {reason} |", self.name);
            return text;
        }
        let _ = writeln!(
            text,
            "| **{}**: {} ({} / {}) |",
            self.name,
            self.verdict(),
            self.ours,
            self.peer
        );
        for measure in &self.measures {
            let _ = writeln!(text, "| {} |", measure.line());
        }
        text
    }
}

impl From<Row> for Entry {
    /// A comparison: accesses a second, processor time an access, and what the host can do. The bar
    /// stands at what decided.
    fn from(row: Row) -> Self {
        let by_rate = row.judge == Judge::Iops;
        let measure = |what: &str, ours, peer, ratio| Measure {
            ratio: Some(ratio),
            ..Measure::note(what, ours, Some(peer))
        };
        let mut rate = measure(
            "kIOPS",
            row.ours_iops / 1e3,
            row.peer_iops / 1e3,
            row.iops_ratio,
        );
        let mut cpu = measure(
            "CPU us/IO",
            row.ours_cpu_ns / 1e3,
            row.peer_cpu_ns / 1e3,
            row.cpu_ratio,
        );
        let mut limits = Vec::from_iter(row.bars.cpu);
        match (row.judge, row.bars.rate) {
            (Judge::HostBound, _) => limits.push(HOST_BOUND_CPU),
            (Judge::Cpu, Some(least)) => limits.push(1.0 / least),
            _ => {}
        }
        if let Some(least) = row.bars.rate.filter(|_| by_rate) {
            rate = rate.bar(Bar::RatioAtLeast(least));
        }
        if let Some(most) = limits.into_iter().min_by(f64::total_cmp) {
            cpu = cpu.bar(Bar::RatioAtMost(most));
        }
        let mut measures = vec![rate, cpu];
        measures.extend(
            row.ceiling
                .as_ref()
                .map_or_else(Vec::new, |ceiling| of_ceiling(&row, ceiling)),
        );
        let sides = (row.ours.as_str(), row.peer.as_str());
        Self {
            decided_by: row.judge.name().to_owned(),
            met: row.met,
            host_misses: row.ceiling.as_ref().is_some_and(|ceiling| !ceiling.met),
            ..Self::new(&row.name, sides, row.pairs, measures)
        }
    }
}

/// What the host can do, beside ours and beside the peer.
fn of_ceiling(row: &Row, ceiling: &Ceiling) -> Vec<Measure> {
    let measure = |what: &str, ours: f64, peer: f64, ratio| Measure {
        ratio: Some(ratio),
        ..Measure::note(&format!("{what}, {}", ceiling.name), ours, Some(peer))
    };
    let (ours, host, peer) = (row.ours_iops / 1e3, ceiling.iops / 1e3, row.peer_iops / 1e3);
    let mut reached = measure("kIOPS of the host", ours, host, ceiling.ratio);
    if row.judge == Judge::HostBound {
        reached = reached.bar(Bar::RatioAtLeast(OF_CEILING));
    }
    let cpu = (ceiling.cpu_ns / 1e3, row.peer_cpu_ns / 1e3);
    vec![
        reached,
        measure(
            "kIOPS of the host in our place",
            host,
            peer,
            ceiling.peer_iops_ratio,
        ),
        measure(
            "CPU us/IO of the host in our place",
            cpu.0,
            cpu.1,
            ceiling.peer_cpu_ratio,
        ),
    ]
}

/// The head of the table of [`Entry::lines`].
pub const HEAD: &str = "\
| measured | ours | peer | ratio | min-max | middle half | bar | met |
| --- | --- | --- | --- | --- | --- | --- | --- |";

/// How many rows met their bars and how many did not, as a sentence.
#[must_use]
pub fn summary(entries: &[Entry]) -> String {
    let count = |verdict| {
        let of = entries.iter().filter(|entry| entry.verdict() == verdict);
        of.count()
    };
    let too = count("missed, by the host too");
    format!(
        "{} rows: {} met, {} host-bound, {} missed ({too} of them by the host too), {} without a bar, {} failed.",
        entries.len(),
        count("met"),
        count("host-bound"),
        count("missed") + too,
        count("note"),
        count("failed")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Bars;

    fn spread(number: f64) -> Spread {
        Spread::of(vec![number])
    }

    fn row(judge: Judge, bars: Bars, iops: f64, cpu: f64) -> Row {
        Row {
            name: "row".to_owned(),
            ours: "a".to_owned(),
            peer: "b".to_owned(),
            pairs: 15,
            ours_iops: iops * 1e5,
            peer_iops: 1e5,
            ours_cpu_ns: cpu * 1e3,
            peer_cpu_ns: 1e3,
            cpu_with_workers: true,
            iops_ratio: spread(iops),
            cpu_ratio: spread(cpu),
            ceiling: None,
            bars,
            judge,
            met: true,
        }
    }

    #[test]
    fn numbers_have_three_digits() {
        for (value, text) in [
            (1234.5, "1234"),
            (12.34, "12.3"),
            (2.0, "2"),
            (1.5, "1.5"),
            (0.6667, "0.667"),
            (0.0, "0"),
            (100.0, "100"),
        ] {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn the_bar_stands_at_what_decided() {
        let bars = |judge, bars| {
            let entry = Entry::from(row(judge, bars, 1.2, 0.4));
            (entry.measures[0].bar, entry.measures[1].bar)
        };
        let rate = Bars::rate(2.0);
        let at_least = |least| Some(Bar::RatioAtLeast(least));
        let at_most = |most| Some(Bar::RatioAtMost(most));
        assert_eq!(bars(Judge::Iops, rate), (at_least(2.0), None));
        assert_eq!(bars(Judge::Cpu, rate), (None, at_most(0.5)));
        assert_eq!(
            bars(Judge::Iops, rate.and_cpu(0.6)),
            (at_least(2.0), at_most(0.6))
        );
        assert_eq!(bars(Judge::Cpu, rate.and_cpu(0.6)), (None, at_most(0.5)));
        assert_eq!(bars(Judge::HostBound, rate), (None, at_most(0.7)));
        assert_eq!(bars(Judge::Cpu, Bars::cpu(0.9)), (None, at_most(0.9)));
    }

    #[test]
    fn every_bar_of_a_row_counts() {
        let low = Measure::note("a", 1.0, None).bar(Bar::AtMost(2.0));
        let high = Measure::note("b", 3.0, None).bar(Bar::AtMost(2.0));
        let free = Measure::note("c", 9.0, None);
        let entry = |measures| Entry::new("row", ("x", "y"), 1, measures);
        assert_eq!(entry(vec![low.clone(), free.clone()]).verdict(), "met");
        assert_eq!(entry(vec![low.clone(), high.clone()]).verdict(), "missed");
        assert_eq!(entry(vec![free]).verdict(), "note");
        let mut grown = entry(vec![low]);
        assert_eq!(grown.score(), Some(2.0));
        grown.push(high);
        assert_eq!((grown.verdict(), grown.met), ("missed", false));
        assert!(grown.score().unwrap() < 1.0);
    }

    #[test]
    fn runs_are_told_in_milliseconds() {
        // 100000 accesses a second of ours are 0.01 ms each.
        let entry = Entry::from(row(Judge::Iops, Bars::rate(1.0), 1.0, 2.0)).of_runs();
        let (time, cpu) = (&entry.measures[0], &entry.measures[1]);
        assert!((time.ours - 0.01).abs() < 1e-9 && (cpu.ours - 0.002).abs() < 1e-9);
        assert!((cpu.peer.unwrap() - 0.001).abs() < 1e-9);
    }

    #[test]
    fn a_failed_row_says_why_on_one_line() {
        let entry = Entry::failure("row", "it crashed\nat a | bad place\n");
        assert_eq!(entry.verdict(), "failed");
        assert_eq!(
            entry.lines(),
            "| **row** | failed: it crashed; at a / bad place |\n"
        );
        assert_eq!(
            summary(&[entry]),
            "1 rows: 0 met, 0 host-bound, 0 missed (0 of them by the host too), 0 without a bar, 1 failed."
        );
    }

    #[test]
    fn a_ratio_that_is_no_number_meets_nothing() {
        let measure = Measure::of_pairs("a", &[(0.0, 0.0)]).bar(Bar::RatioAtMost(1.0));
        assert_eq!(measure.met, Some(false));
    }
}
