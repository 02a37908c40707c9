//! virtio-blk over vhost-user.

use block::Format;
use platter_benches::{
    Direction, Result,
    report::{Bars, pairs},
    table::{Bar, Entry, Measure},
};

use super::{Bench, DIRECTIONS, Rows, Sides, cache, steps, word};
use crate::peers_lab::client::{Client, Latency, pread};

pub(super) fn add(rows: &mut Rows) {
    for format in [Format::Raw, Format::Qcow2] {
        for direction in DIRECTIONS {
            for direct in [true, false] {
                let what = format!("vhost-user {format} {} {}", word(direction), cache(direct));
                rows.add(format!("{what} 32, QEMU"), move |bench, name| {
                    let work = bench.work(direction, direct, 32);
                    let pattern = steps(4096, 0);
                    let ours = bench.lab.served_by_platter(format, work, pattern)?;
                    let peer = bench.lab.served_by_qemu(format, work, pattern)?;
                    let sides = Sides::new(("platter", ours), ("qemu-storage-daemon", peer));
                    let sides = sides.host(bench.lab.fio(work)?, 1.0);
                    bench.compare(name, Bars::rate(1.5).and_cpu(0.6), sides)
                });
                rows.add(format!("{what} 1, latency, QEMU"), move |bench, name| {
                    latency(bench, name, format, (direction, direct))
                });
            }
        }
    }
}

/// A slice's latencies, and the median of a plain `pread` right after.
type Slice = (Latency, f64);

fn latency(
    bench: &Bench,
    name: &str,
    format: Format,
    (direction, direct): (Direction, bool),
) -> Result<Entry> {
    let work = bench.work(direction, direct, 1);
    let path = bench.lab.served_path(format, direct)?;
    let (mut ours, mut peer) = bench.lab.one_by_one(format, work)?;
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
