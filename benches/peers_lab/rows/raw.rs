//! Raw disks beside fio.

use std::time::Duration;

use block::Format;
use platter_benches::report::Bars;

use super::{DIRECTIONS, Rows, Sides, cache, word};
use crate::peers_lab::Set;

/// fio counts the processor time of a thread in whole milliseconds, user and system apart: a slice of this
/// length makes that less than half a percent.
const SLICE: Duration = Duration::from_millis(300);

pub(super) fn add(rows: &mut Rows) {
    for direct in [true, false] {
        for direction in DIRECTIONS {
            for depth in [1, 32, 128] {
                for queues in [1, 2] {
                    let more = if queues == 2 { ", 2 queues" } else { "" };
                    let name = format!("raw {} {} {depth}{more}", word(direction), cache(direct));
                    rows.add(name, move |bench, name| {
                        let work = bench.work(direction, direct, depth);
                        let fio = bench.lab.fio(work)?;
                        let set = Set::Plain(Format::Raw);
                        let sides = if queues == 1 {
                            let ours = bench.lab.random(set, work)?;
                            Sides::new(("RawAsync", ours), ("fio", Box::new(fio)))
                        } else {
                            let ours = bench.lab.lanes(set, work, queues)?;
                            Sides::new(("RawAsync", ours), ("fio", Box::new(fio.jobs(queues))))
                        };
                        let bars = Bars::rate(0.95).and_cpu(1.0);
                        bench.compare_in(bench.slice.max(SLICE), name, bars, sides)
                    });
                }
            }
        }
    }
}
