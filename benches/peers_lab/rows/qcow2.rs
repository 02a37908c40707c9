//! qcow2 in place: beside our raw disk, QEMU, and the crates.

use block::Format;
use platter_benches::{Direction, Work, report::Bars};

use super::{COLD, DIRECTIONS, Rows, STEP, Sides, cache, steps, word};
use crate::peers_lab::Set;

const IMAGE: Set = Set::Plain(Format::Qcow2);

pub(super) fn add(rows: &mut Rows) {
    beside_raw(rows);
    beside_qemu(rows);
    beside_crates(rows);
    cold_metadata(rows);
}

/// The raw disk works on the same part of the same file: where a file lies on the disk below makes a
/// difference of a fifth.
fn beside_raw(rows: &mut Rows) {
    for direct in [true, false] {
        for direction in DIRECTIONS {
            for depth in [1, 32, 128] {
                let name = format!("qcow2 {} {} {depth}, raw", word(direction), cache(direct));
                rows.add(name, move |bench, name| {
                    let (start, size) = bench.lab.data_run(IMAGE, direct)?;
                    let work = Work {
                        size,
                        ..bench.work(direction, direct, depth)
                    };
                    let ours = bench.lab.random(IMAGE, work)?;
                    let peer = bench.lab.random_beneath(IMAGE, start, work)?;
                    let sides = Sides::new(("Qcow2Async", ours), ("RawAsync", peer));
                    bench.compare(name, Bars::rate(0.95), sides)
                });
            }
        }
    }
}

fn beside_qemu(rows: &mut Rows) {
    for direct in [true, false] {
        for depth in [1, 32, 128] {
            let name = format!("qcow2 read {} {depth}, QEMU", cache(direct));
            rows.add(name, move |bench, name| {
                let work = bench.work(Direction::Read, direct, depth);
                let ours = bench.lab.strided(IMAGE, work, steps(STEP, 0))?;
                let peer = bench.lab.qemu_bench(IMAGE, work, steps(STEP, 0))?;
                let sides = Sides::new(("Qcow2Async", ours), ("qemu-img", peer));
                bench.compare(name, Bars::rate(2.0), sides.host(bench.lab.fio(work)?, 1.0))
            });
        }
    }
}

fn beside_crates(rows: &mut Rows) {
    for direct in [true, false] {
        for depth in [1, 32, 128] {
            for peer in ["imago", "qcow2-rs"] {
                let name = format!("qcow2 read {} {depth}, {peer}", cache(direct));
                rows.add(name, move |bench, name| {
                    let work = bench.work(Direction::Read, direct, depth);
                    let ours = bench.lab.random(IMAGE, work)?;
                    let side = match peer {
                        "imago" => bench.lab.imago(work)?,
                        _ => bench.lab.qcow2_rs(work)?,
                    };
                    let sides = Sides::new(("Qcow2Async", ours), (peer, side));
                    bench.compare(name, Bars::rate(2.0), sides.host(bench.lab.fio(work)?, 1.0))
                });
            }
        }
    }
}

fn cold_metadata(rows: &mut Rows) {
    for (depth, bar) in [(1, 1.0), (32, 2.0)] {
        let name = format!("qcow2 read direct {depth}, cold metadata, QEMU");
        rows.add(name, move |bench, name| {
            let mut work = bench.work(Direction::Read, true, depth);
            work.size = 1 << 40;
            let ours = bench.lab.strided(Set::Huge, work, COLD)?;
            let peer = bench.lab.qemu_bench(Set::Huge, work, COLD)?;
            let sides = Sides {
                host: Some(bench.lab.same_reads(Set::Huge, work, COLD)?),
                ..Sides::new(("Qcow2Async", ours), ("qemu-img", peer))
            };
            bench.compare(name, Bars::rate(bar), sides)
        });
    }
}
