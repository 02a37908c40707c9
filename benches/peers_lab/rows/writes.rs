//! Writes that allocate, and writes with flushes between them.

use block::Format;
use platter_benches::{
    Direction, Result, Work,
    report::Bars,
    stride::Pattern,
    table::{Bar, Measure},
};

use super::{Bench, Rows, STEP, Sides, cache, depth, steps};
use crate::peers_lab::{Set, fresh::Fresh, host::Target};

pub(super) fn add(rows: &mut Rows) {
    allocating(rows);
    sequential(rows);
    in_place(rows);
}

/// The part of a name that tells of flushes.
fn flushes(every: u64) -> String {
    match every {
        0 => String::new(),
        every => format!(", a flush every {every}"),
    }
}

fn allocating(rows: &mut Rows) {
    for direct in [true, false] {
        for (what, fresh) in [("fresh", Fresh::Empty), ("overlay", Fresh::Overlay)] {
            for (every, bar) in [(0, 2.0), (1, 1.5), (8, 1.5), (64, 1.5)] {
                let flushes = flushes(every);
                let name = format!("qcow2 {what} write {}{flushes}, QEMU", cache(direct));
                rows.add(name, move |bench, name| {
                    let pattern = steps(STEP, every);
                    let work = bench.work(Direction::Write, direct, depth(every));
                    let target = Target::Fresh(fresh);
                    let each = bench.lab.operations(target, work, pattern)?;
                    let ours = bench.lab.fresh(fresh, work, pattern)?;
                    let peer = bench.lab.fresh_qemu(fresh, work, pattern)?;
                    let (host, operations) = bench.lab.same_operations(work, each)?;
                    let sides = Sides {
                        host: Some((host, operations)),
                        ..Sides::new(("Qcow2Async", ours), ("qemu-img", peer))
                    };
                    let mut entry = bench.compare(name, Bars::rate(bar), sides)?;
                    entry.push(Measure::note("host writes/write", each.writes, None));
                    entry.push(Measure::note("host bytes/write", each.bytes, None));
                    if each.reads_data() {
                        entry.push(Measure::note(
                            "host bytes read/write",
                            each.read_bytes,
                            None,
                        ));
                    }
                    if every > 0 {
                        entry.push(host_flushes(bench, target, (work, pattern))?);
                    }
                    Ok(entry)
                });
            }
        }
    }
}

fn sequential(rows: &mut Rows) {
    for direct in [true, false] {
        for block in [64 << 10, 1 << 20] {
            let name = format!(
                "qcow2 sequential write {} {} KiB, raw",
                cache(direct),
                block >> 10
            );
            rows.add(name, move |bench, name| {
                let mut work = bench.work(Direction::Write, direct, 32);
                work.block = block;
                let ours = bench.lab.fresh(Fresh::Empty, work, steps(block, 0))?;
                let peer = bench.lab.fresh(Fresh::Raw, work, steps(block, 0))?;
                let sides = Sides::new(("Qcow2Async", ours), ("RawAsync", peer));
                bench.compare(name, Bars::rate(0.9), sides)
            });
        }
    }
}

fn in_place(rows: &mut Rows) {
    for direct in [true, false] {
        for every in [1, 8, 64] {
            let flushes = flushes(every);
            let name = format!("qcow2 write {}{flushes}, raw", cache(direct));
            rows.add(name, move |bench, name| {
                let image = Set::Plain(Format::Qcow2);
                let pattern = steps(STEP, every);
                let (start, size) = bench.lab.data_run(image, direct)?;
                let work = Work {
                    size,
                    ..bench.work(Direction::Write, direct, depth(every))
                };
                let ours = bench.lab.strided(image, work, pattern)?;
                let peer = bench.lab.strided_beneath(image, start, work, pattern)?;
                let sides = Sides::new(("Qcow2Async", ours), ("RawAsync", peer));
                let mut entry = bench.compare(name, Bars::rate(0.95), sides)?;
                let flushes = host_flushes(bench, Target::Stays(image), (work, pattern))?;
                entry.push(flushes.bar(Bar::RatioAtMost(1.0)));
                Ok(entry)
            });
        }
    }
}

/// Host flushes per guest flush, ours and QEMU's.
fn host_flushes(bench: &Bench, target: Target, how: (Work, Pattern)) -> Result<Measure> {
    let (work, pattern) = how;
    let ours = bench.lab.operations(target, work, pattern)?.flushes * pattern.flush_every as f64;
    let peer = bench.lab.qemu_flushes(target, work, pattern)?;
    let what = "host flushes per guest flush, peer: QEMU";
    Ok(Measure::note(what, ours, Some(peer)))
}
