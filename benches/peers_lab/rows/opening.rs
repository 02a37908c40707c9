//! Opening images, and idle disks.

use block::Format;
use platter_benches::{
    Result,
    report::Bars,
    table::{Bar, Entry, Measure},
};

use super::{Bench, Rows, Sides};

/// Sizes of images, and their names.
const SIZES: [(u64, &str); 5] = [
    (1 << 30, "1 GiB"),
    (64 << 30, "64 GiB"),
    (1 << 40, "1 TiB"),
    (16 << 40, "16 TiB"),
    (64 << 40, "64 TiB"),
];

/// What opening may cost, in KiB.
const MEMORY: f64 = 4096.0;

pub(super) fn add(rows: &mut Rows) {
    for (size, what) in SIZES {
        rows.add(format!("open {what}, qemu-img info"), move |bench, name| {
            open(bench, name, size)
        });
    }
    for format in [Format::Raw, Format::Qcow2] {
        rows.add(format!("idle {format} disk"), move |bench, name| {
            let (ours, peer) = bench.lab.idle(format)?;
            let none = Bar::AtMost(0.0);
            let measures = vec![
                Measure::note("wake-ups a second", ours.switches, Some(peer.switches)).bar(none),
                Measure::note("CPU us a second", ours.cpu_us, Some(peer.cpu_us)).bar(none),
            ];
            let sides = ("platter", "qemu-storage-daemon");
            Ok(Entry::new(name, sides, 1, measures))
        });
    }
}

fn open(bench: &Bench, name: &str, size: u64) -> Result<Entry> {
    let image = bench.lab.empty_image(size)?;
    let growth = bench.lab.growth(&image)?;
    let (ours, peer) = bench.lab.infos(&image);
    let sides = Sides::new(
        ("platter info", Box::new(ours)),
        ("qemu-img info", Box::new(peer)),
    );
    let mut entry = bench.compare(name, Bars::rate(1.0), sides)?.of_runs();
    let memory = Measure::note("KiB of memory to open", growth, None);
    entry.push(memory.bar(Bar::AtMost(MEMORY)));
    Ok(entry)
}
