//! virtio-blk over vhost-user.

use block::Format;
use platter_benches::{
    Direction, Result, Work,
    report::{Bars, pairs},
    table::{Bar, Entry, Measure},
};

use super::{Bench, COLD, DIRECTIONS, Rows, Sides, cache, steps, word};
use crate::peers_lab::{
    Set,
    client::{Client, Latency, pread},
};

pub(super) fn add(rows: &mut Rows) {
    for format in [Format::Raw, Format::Qcow2] {
        let set = Set::Plain(format);
        for direction in DIRECTIONS {
            for direct in [true, false] {
                let what = format!("vhost-user {format} {} {}", word(direction), cache(direct));
                rows.add(format!("{what} 32, QEMU"), move |bench, name| {
                    let work = bench.work(direction, direct, 32);
                    let pattern = steps(4096, 0);
                    let ours = bench.lab.served_by_platter(set, work, pattern)?;
                    let peer = bench.lab.served_by_qemu(set, work, pattern)?;
                    let sides = Sides::new(("platter", ours), ("qemu-storage-daemon", peer));
                    let sides = sides.host(bench.lab.fio(work)?, 1.0);
                    bench.compare(name, Bars::rate(1.5).and_cpu(0.6), sides)
                });
                rows.add(format!("{what} 1, latency, QEMU"), move |bench, name| {
                    let work = bench.work(direction, direct, 1);
                    latency(bench, name, set, work)
                });
            }
        }
    }
    cold_metadata(rows);
}

/// Tables that the cache does not hold: in steps as beside `qemu-img bench`, and at random.
fn cold_metadata(rows: &mut Rows) {
    let cold = |bench: &Bench, depth| Work {
        size: 1 << 40,
        ..bench.work(Direction::Read, true, depth)
    };
    let what = "vhost-user qcow2 read direct";
    rows.add(
        format!("{what} 32, cold metadata, QEMU"),
        move |bench, name| {
            let work = cold(bench, 32);
            let ours = bench.lab.served_by_platter(Set::Huge, work, COLD)?;
            let peer = bench.lab.served_by_qemu(Set::Huge, work, COLD)?;
            let sides = Sides {
                host: Some(bench.lab.same_reads(Set::Huge, work, COLD)?),
                ..Sides::new(("platter", ours), ("qemu-storage-daemon", peer))
            };
            bench.compare(name, Bars::rate(2.0), sides)
        },
    );
    rows.add(
        format!("{what} 1, random cold metadata, latency, QEMU"),
        move |bench, name| latency(bench, name, Set::Huge, cold(bench, 1)),
    );
}

/// A slice's latencies, and the median of a plain `pread` right after.
type Slice = (Latency, f64);

fn latency(bench: &Bench, name: &str, set: Set, work: Work) -> Result<Entry> {
    let direct = work.direct;
    let path = bench.lab.served_path(set, direct)?;
    let (mut ours, mut peer) = bench.lab.one_by_one(set, work)?;
    ours.slice(bench.slice / 2, 0)?;
    peer.slice(bench.slice / 2, 0)?;
    let slice = |client: &mut Client, seed| -> Result<Slice> {
        let latency = client.slice(bench.slice, seed)?;
        // Through the page cache it says something; past it the disk's own time would be in it.
        let plain = if direct {
            0.0
        } else {
            pread(&path, work.block, bench.slice / 4, seed)?
        };
        Ok((latency, plain))
    };
    let slices = pairs(
        bench.pairs,
        |seed| slice(&mut ours, seed),
        |seed| slice(&mut peer, seed),
    )?;
    let measure = |what: &str, of: &dyn Fn(&Slice) -> f64| {
        let pairs: Vec<_> = slices.iter().map(|(a, b)| (of(a), of(b))).collect();
        Measure::of_pairs(what, &pairs)
    };
    let most = Bar::RatioAtMost(1.0);
    let mut measures = vec![
        measure("p50 us", &|(latency, _)| latency.p50).bar(most),
        measure("p99 us", &|(latency, _)| latency.p99).bar(most),
        measure("CPU us/IO", &|(latency, _)| latency.cpu),
    ];
    if !direct {
        let over = measure("p50 us less pread's", &|(latency, plain)| {
            latency.p50 - plain
        });
        measures.push(over.bar(Bar::RatioAtMost(0.8)));
        measures.push(measure("p50 us of a pread", &|(_, plain)| *plain));
    }
    let sides = ("platter", "qemu-storage-daemon");
    Ok(Entry::new(name, sides, bench.pairs, measures))
}
