//! The rows: what is compared with what, and the bars.

mod compressed;
mod maintenance;
mod opening;
mod qcow2;
mod queues;
mod raw;
mod served;
mod writes;

use std::{process::Command, time::Duration};

use platter_benches::{
    Direction, Result, Work,
    report::{Bars, Contest, Host, Plan, compare},
    side::Side,
    stride::Pattern,
    table::Entry,
};

use super::{Lab, sides::AnySide};

/// How rows are measured.
pub(crate) struct Bench {
    pub(crate) lab: Lab,
    pub(crate) pairs: usize,
    pub(crate) slice: Duration,
}

type Measured = Box<dyn Fn(&Bench, &str) -> Result<Entry>>;

/// A row that can be measured.
pub(crate) struct Row {
    pub(crate) name: String,
    measure: Measured,
}

impl Row {
    /// Measures it; what goes wrong is the row's.
    pub(crate) fn run(&self, bench: &Bench) -> Entry {
        settle()
            .and_then(|()| (self.measure)(bench, &self.name))
            .unwrap_or_else(|error| Entry::failure(&self.name, &error.to_string()))
    }
}

/// Lets what the rows before wrote reach the disk, so that it does not disturb the next.
fn settle() -> Result<()> {
    let status = Command::new("sync").status()?;
    match status.success() {
        true => Ok(()),
        false => Err(format!("sync: {status}").into()),
    }
}

/// The rows of the table, in its order.
#[derive(Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, name: String, measure: impl Fn(&Bench, &str) -> Result<Entry> + 'static) {
        let measure = Box::new(measure);
        self.0.push(Row { name, measure });
    }
}

/// All of them.
pub(crate) fn all() -> Vec<Row> {
    let mut rows = Rows::default();
    raw::add(&mut rows);
    qcow2::add(&mut rows);
    writes::add(&mut rows);
    compressed::add(&mut rows);
    queues::add(&mut rows);
    served::add(&mut rows);
    opening::add(&mut rows);
    maintenance::add(&mut rows);
    rows.0
}

/// The sides of a comparison.
struct Sides {
    ours: (&'static str, AnySide),
    peer: (&'static str, AnySide),
    /// What the host can do, and how many of its accesses are one of ours.
    host: Option<(AnySide, f64)>,
}

impl Sides {
    fn new(ours: (&'static str, AnySide), peer: (&'static str, AnySide)) -> Self {
        Self {
            ours,
            peer,
            host: None,
        }
    }

    /// fio, which does the same operations.
    fn host(self, side: impl Side + 'static, operations: f64) -> Self {
        Self {
            host: Some((Box::new(side), operations)),
            ..self
        }
    }
}

impl Bench {
    /// Accesses of 4 KiB to the whole image.
    fn work(&self, direction: Direction, direct: bool, depth: u32) -> Work {
        Work {
            direction,
            direct,
            block: 4096,
            depth,
            size: self.lab.size(),
        }
    }

    fn compare(&self, name: &str, bars: Bars, sides: Sides) -> Result<Entry> {
        self.compare_in(self.slice, name, bars, sides)
    }

    /// With slices of another length.
    fn compare_in(
        &self,
        slice: Duration,
        name: &str,
        bars: Bars,
        mut sides: Sides,
    ) -> Result<Entry> {
        let contest = Contest {
            name,
            ours: (sides.ours.0, &mut *sides.ours.1),
            peer: (sides.peer.0, &mut *sides.peer.1),
            host: sides.host.as_mut().map(|(side, operations)| Host {
                name: "fio",
                side: &mut **side,
                operations: *operations,
            }),
        };
        let plan = Plan {
            pairs: self.pairs,
            slice,
            with_workers: true,
            bars,
        };
        Ok(Entry::from(compare(contest, plan)?))
    }
}

/// How accesses go around the disk without coming back soon: an odd number of clusters and blocks.
const STEP: u64 = (65536 + 4096) * 1237;

/// An odd number of slices and blocks: each access needs a slice of a table that was not needed lately.
const COLD: Pattern = Pattern {
    step: (32 << 20) * 37 + 4096,
    flush_every: 0,
};

/// Accesses in steps, a flush after so many writes.
fn steps(step: u64, flush_every: u64) -> Pattern {
    Pattern { step, flush_every }
}

const DIRECTIONS: [Direction; 2] = [Direction::Read, Direction::Write];

fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Read => "read",
        Direction::Write => "write",
    }
}

fn cache(direct: bool) -> &'static str {
    if direct { "direct" } else { "cached" }
}

/// As many in flight as there are between two flushes.
fn depth(flush_every: u64) -> u32 {
    match flush_every {
        0 => 32,
        every => every.min(32) as u32,
    }
}
