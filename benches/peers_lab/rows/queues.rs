//! Two queues beside one.

use block::Format;
use platter_benches::{
    Direction, Result, Work,
    cases::{Case, MAPPED},
    lanes::Lanes,
    load::Straight,
    report::{STEADY, pairs},
    side::{Side, Slice},
    table::{Bar, Entry, Measure},
};
use std::sync::Arc;

use super::{Bench, DIRECTIONS, Rows, word};
use crate::peers_lab::Set;

pub(super) fn add(rows: &mut Rows) {
    for direction in DIRECTIONS {
        let name = format!("two queues, qcow2 {} in memory", word(direction));
        rows.add(name, move |bench, name| in_memory(bench, name, direction));
    }
    for direction in DIRECTIONS {
        let name = format!("two queues, qcow2 {} cached, fio", word(direction));
        rows.add(name, move |bench, name| cached(bench, name, direction));
    }
}

/// Files that are memory: what mapping and queues cost.
fn in_memory(bench: &Bench, name: &str, direction: Direction) -> Result<Entry> {
    let case: &Case = &MAPPED;
    let work = Work {
        size: case.work().size,
        ..bench.work(direction, false, 32)
    };
    let disk = Arc::new(case.disk()?);
    let lanes = |count| {
        let disk = Arc::clone(&disk);
        Lanes::start(count, move || Straight::new(&**disk, work))
    };
    let (mut one, mut two) = (lanes(1)?, lanes(2)?);
    let gains = bench.gains(&mut one, &mut two)?;
    let measure = Measure::of_pairs("kIOPS, peer: one queue", &gains);
    let measures = vec![measure.bar(Bar::RatioAtLeast(1.8))];
    let sides = ("two queues", "one queue");
    Ok(Entry::new(name, sides, bench.pairs, measures))
}

/// A page-cached file: what fio gains by a second job is what there is to gain.
fn cached(bench: &Bench, name: &str, direction: Direction) -> Result<Entry> {
    let work = bench.work(direction, false, 32);
    let image = Set::Plain(Format::Qcow2);
    let mut one = bench.lab.lanes(image, work, 1)?;
    let mut two = bench.lab.lanes(image, work, 2)?;
    let mut fio_one = bench.lab.fio(work)?.jobs(1);
    let mut fio_two = bench.lab.fio(work)?.jobs(2);
    let all: [&mut dyn Side; 4] = [&mut *one, &mut *two, &mut fio_one, &mut fio_two];
    for side in all {
        side.slice(bench.slice / 2, 0)?;
    }
    let both = pairs(
        bench.pairs,
        |seed| bench.gain(&mut *one, &mut *two, seed),
        |seed| bench.gain(&mut fio_one, &mut fio_two, seed),
    )?;
    let of = |what: &str, of: &dyn Fn(&Gain) -> f64| {
        let pairs: Vec<_> = both.iter().map(|(our, fio)| (of(our), of(fio))).collect();
        Measure::of_pairs(what, &pairs)
    };
    let mut rate = of("gain by a second queue", &Gain::rate);
    let mut cpu = of("CPU of an access, two queues by one", &Gain::cpu);
    // As for any row: where the rates are too unsteady, processor time decides.
    if rate.ratio.is_some_and(|ratio| ratio.middle_half() > STEADY) {
        cpu = cpu.bar(Bar::RatioAtMost(1.0 / OF_FIO));
    } else {
        rate = rate.bar(Bar::RatioAtLeast(OF_FIO));
    }
    let rates = |what: &str, of: fn(&(Gain, Gain)) -> (&Slice, &Slice)| {
        let thousands = |slice: &Slice| slice.iops() / 1e3;
        let pairs: Vec<_> = both.iter().map(of).collect();
        let pairs: Vec<_> = pairs
            .into_iter()
            .map(|(one, other)| (thousands(one), thousands(other)))
            .collect();
        Measure::of_pairs(what, &pairs)
    };
    let measures = vec![
        rate,
        cpu,
        rates("kIOPS, peer: one queue", |(our, _)| (&our.two, &our.one)),
        rates("fio's kIOPS with two jobs, peer: one", |(_, fio)| {
            (&fio.two, &fio.one)
        }),
        rates("kIOPS of two, peer: fio", |(our, fio)| (&our.two, &fio.two)),
    ];
    Ok(Entry::new(
        name,
        ("Qcow2Async", "fio"),
        bench.pairs,
        measures,
    ))
}

/// The least part of fio's gain.
const OF_FIO: f64 = 0.95;

/// A slice with one queue and one with two.
struct Gain {
    one: Slice,
    two: Slice,
}

impl Gain {
    /// Accesses a second, two queues by one.
    fn rate(&self) -> f64 {
        self.two.iops() / self.one.iops()
    }

    /// Processor time an access, two queues by one.
    fn cpu(&self) -> f64 {
        self.two.cpu_per_io(true) / self.one.cpu_per_io(true)
    }
}

impl Bench {
    fn gain(&self, one: &mut dyn Side, two: &mut dyn Side, seed: u64) -> Result<Gain> {
        let one = one.slice(self.slice, seed)?;
        Ok(Gain {
            one,
            two: two.slice(self.slice, seed)?,
        })
    }

    fn gains(&self, one: &mut dyn Side, two: &mut dyn Side) -> Result<Vec<(f64, f64)>> {
        one.slice(self.slice / 2, 0)?;
        two.slice(self.slice / 2, 0)?;
        let slice = |side: &mut dyn Side, seed| -> Result<f64> {
            Ok(side.slice(self.slice, seed)?.iops() / 1e3)
        };
        pairs(self.pairs, |seed| slice(two, seed), |seed| slice(one, seed))
    }
}
