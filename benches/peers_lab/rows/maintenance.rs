//! The maintenance commands beside qemu-img.

use std::{cell::OnceCell, rc::Rc};

use platter_benches::{
    Result,
    maintenance::{COMMANDS, Command, Images, LARGER},
    table::{Bar, Entry, Measure},
};

use super::{Bench, Rows, Sides};

pub(super) fn add(rows: &mut Rows) {
    // Made by the first of them that is measured.
    let images: Rc<OnceCell<Images>> = Rc::default();
    for command in COMMANDS {
        let images = Rc::clone(&images);
        rows.add(format!("{}, qemu-img", command.name), move |bench, name| {
            let images = match images.get() {
                Some(images) => images,
                None => {
                    let made = bench.lab.maintenance()?;
                    images.get_or_init(|| made)
                }
            };
            run(bench, name, command, images)
        });
    }
}

fn run(bench: &Bench, name: &str, command: &Command, images: &Images) -> Result<Entry> {
    let (ours, peer) = images.sides(command);
    let sides = Sides::new(("platter", Box::new(ours)), ("qemu-img", Box::new(peer)));
    let mut entry = bench.compare(name, command.bars(), sides)?.of_runs();
    if let Some((ours, peer)) = images.outputs() {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        let size = Measure::note("MiB of output", mib(ours), Some(mib(peer)));
        entry.push(size.bar(Bar::RatioAtMost(LARGER)));
    }
    Ok(entry)
}
