//! Compressed images.

use platter_benches::{
    Direction, Result,
    report::{Bars, pairs},
    side::Side,
    table::{Bar, Measure},
};

use super::{Bench, Rows, STEP, Sides, steps};
use crate::peers_lab::Set;

/// The largest part of the bare codec's processor time.
const OF_CODEC: f64 = 1.1;

pub(super) fn add(rows: &mut Rows) {
    for codec in ["zlib", "zstd"] {
        let beyond = match codec {
            "zlib" => Bars::cpu(1.0 / 1.5),
            _ => Bars::rate(1.0),
        };
        for (what, block, step, bars) in [
            ("sequential 4 KiB", 4 << 10, 4 << 10, Bars::rate(4.0)),
            ("sequential 1 MiB", 1 << 20, 1 << 20, beyond),
            ("random 4 KiB", 4 << 10, STEP, beyond),
        ] {
            let beside_codec = codec == "zstd" && what != "sequential 4 KiB";
            rows.add(format!("{codec} {what} read, QEMU"), move |bench, name| {
                let mut work = bench.work(Direction::Read, false, 8);
                work.block = block;
                let (image, pattern) = (Set::Compressed(codec), steps(step, 0));
                let ours = bench.lab.strided(image, work, pattern)?;
                let peer = bench.lab.qemu_bench(image, work, pattern)?;
                let sides = Sides::new(("Qcow2Async", ours), ("qemu-img", peer));
                let mut entry = bench.compare(name, bars, sides)?;
                if beside_codec {
                    let mut ours = bench.lab.strided(image, work, pattern)?;
                    let mut bare = bench.lab.bare_codec(codec, work, pattern, false)?;
                    let mut reading = bench.lab.bare_codec(codec, work, pattern, true)?;
                    let beside = |what, side: &mut dyn Side, peer: &mut dyn Side| {
                        processor_time(bench, &format!("CPU us/IO{what}"), side, peer)
                    };
                    let measure = beside(", peer: the bare codec", &mut *ours, &mut *bare)?;
                    entry.push(measure.bar(Bar::RatioAtMost(OF_CODEC)));
                    let least = " of pread and codec, peer: the bare codec";
                    entry.push(beside(least, &mut *reading, &mut *bare)?);
                }
                Ok(entry)
            });
        }
    }
}

/// Processor time beside that of the bare codec.
fn processor_time(
    bench: &Bench,
    what: &str,
    ours: &mut dyn Side,
    codec: &mut dyn Side,
) -> Result<Measure> {
    ours.slice(bench.slice / 2, 0)?;
    codec.slice(bench.slice / 2, 0)?;
    let slice = |side: &mut dyn Side, seed| -> Result<f64> {
        Ok(side.slice(bench.slice, seed)?.cpu_per_io(true) / 1e3)
    };
    let pairs = pairs(
        bench.pairs,
        |seed| slice(ours, seed),
        |seed| slice(codec, seed),
    )?;
    Ok(Measure::of_pairs(what, &pairs))
}
