//! Platter beside its peers: fio, `qemu-img bench`, `qemu-storage-daemon`.
//!
//! `cargo bench -p platter-benches --bench peers -- --help` says how to run it.

mod peers_lab;

use std::{fs, io::Write as _, path::PathBuf, time::Duration};

use block::Format;
use peers_lab::{Fresh, Lab, Set};
use platter_benches::{
    Direction, Result, Work,
    report::{Contest, HEAD, Plan, Row, compare, line},
    side::Side,
    stride::Pattern,
};

const HELP: &str = "\
usage: peers [--pairs N] [--slice MS] [--size MIB] [--dir DIR] [--only TEXT] [--write DIR]
             [--platter PATH] [--qemu DIR] [--client PATH]

Compares Platter with fio, QEMU and qemu-storage-daemon in pairs of slices of time, in turn, and prints
a table of ratios.

  --pairs N       pairs of slices for each row (15)
  --slice MS      length of a slice (1000)
  --size MIB      size of each image (1024)
  --dir DIR       where the images go: a disk file system (below the target directory)
  --only TEXT     only rows with this in their name
  --write DIR     also writes peers.md and peers.json there
  --platter PATH  the program (target/release/platter: cargo build --release)
  --qemu DIR      where qemu-img and qemu-storage-daemon are (.cache/lab/reference)
  --client PATH   a qemu-img with the driver virtio-blk-vhost-user (.cache/lab/bin/qemu-img)";

struct Options {
    pairs: usize,
    slice: Duration,
    only: String,
    write: Option<PathBuf>,
    lab: peers_lab::Options,
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        pairs: 15,
        slice: Duration::from_secs(1),
        only: String::new(),
        write: None,
        lab: peers_lab::Options::default(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            let value = arguments.next();
            value.ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            // cargo says so.
            "--bench" => {}
            "--help" | "-h" => return Ok(None),
            "--pairs" => options.pairs = value()?.parse()?,
            "--slice" => options.slice = Duration::from_millis(value()?.parse()?),
            "--size" => options.lab.size = value()?.parse::<u64>()? << 20,
            "--dir" => options.lab.dir = PathBuf::from(value()?),
            "--only" => options.only = value()?,
            "--write" => options.write = Some(PathBuf::from(value()?)),
            "--platter" => options.lab.platter = PathBuf::from(value()?),
            "--qemu" => options.lab.qemu = PathBuf::from(value()?),
            "--client" => options.lab.client = PathBuf::from(value()?),
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    Ok(Some(options))
}

/// The table, as it grows.
struct Table<'a> {
    options: &'a Options,
    lab: &'a Lab,
    rows: Vec<Row>,
}

/// How accesses go around the disk without coming back soon: an odd number of clusters and blocks.
const STEP: u64 = (65536 + 4096) * 1237;

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

type Sides<'a> = (&'a str, Box<dyn Side>);

impl Table<'_> {
    fn work(&self, direction: Direction, direct: bool, depth: u32) -> Work {
        Work {
            direction,
            direct,
            block: 4096,
            depth,
            size: self.lab.size(),
        }
    }

    /// Adds a row, unless others were asked for.
    fn add<'s>(
        &mut self,
        name: &str,
        bar: f64,
        make: impl FnOnce(&Lab) -> Result<(Sides<'s>, Sides<'s>)>,
    ) -> Result<()> {
        if !name.contains(&self.options.only) {
            return Ok(());
        }
        let ((ours_name, mut ours), (peer_name, mut peer)) = make(self.lab)?;
        let contest = Contest {
            name,
            ours: (ours_name, &mut *ours),
            peer: (peer_name, &mut *peer),
        };
        let plan = Plan {
            pairs: self.options.pairs,
            slice: self.options.slice,
            with_workers: true,
            bar,
        };
        let row = compare(contest, plan)?;
        println!("{}", line(&row));
        std::io::stdout().flush()?;
        self.rows.push(row);
        Ok(())
    }

    fn raw_beside_fio(&mut self) -> Result<()> {
        for direct in [true, false] {
            for direction in [Direction::Read, Direction::Write] {
                for depth in [1, 32, 128] {
                    let work = self.work(direction, direct, depth);
                    let name = format!("raw {} {} {depth}", word(direction), cache(direct));
                    self.add(&name, 0.95, |lab| {
                        let ours = lab.random(Set::Plain(Format::Raw), work)?;
                        Ok((("RawAsync", ours), ("fio", lab.fio(work)?)))
                    })?;
                }
            }
        }
        Ok(())
    }

    fn qcow2_beside_raw(&mut self) -> Result<()> {
        for direct in [true, false] {
            for direction in [Direction::Read, Direction::Write] {
                let work = self.work(direction, direct, 32);
                let name = format!("qcow2 {} {} 32, raw", word(direction), cache(direct));
                self.add(&name, 0.95, |lab| {
                    let ours = lab.random(Set::Plain(Format::Qcow2), work)?;
                    let peer = lab.random(Set::Plain(Format::Raw), work)?;
                    Ok((("Qcow2Async", ours), ("RawAsync", peer)))
                })?;
            }
        }
        Ok(())
    }

    fn warm_reads_beside_qemu(&mut self) -> Result<()> {
        let pattern = Pattern {
            step: STEP,
            flush_every: 0,
        };
        for direct in [true, false] {
            for depth in [1, 32, 128] {
                let work = self.work(Direction::Read, direct, depth);
                let name = format!("qcow2 read {} {depth}, QEMU", cache(direct));
                self.add(&name, 2.0, |lab| {
                    let image = Set::Plain(Format::Qcow2);
                    let ours = lab.strided(image, work, pattern)?;
                    let peer = lab.qemu_bench(image, work, pattern)?;
                    Ok((("Qcow2Async", ours), ("qemu-img", peer)))
                })?;
            }
        }
        Ok(())
    }

    fn cold_metadata(&mut self) -> Result<()> {
        // An odd number of slices and blocks: each access needs a slice that was not needed lately.
        let pattern = Pattern {
            step: (32 << 20) * 37 + 4096,
            flush_every: 0,
        };
        for (depth, bar) in [(1, 1.0), (32, 2.0)] {
            let mut work = self.work(Direction::Read, true, depth);
            work.size = 1 << 40;
            let name = format!("qcow2 read direct {depth}, cold metadata, QEMU");
            self.add(&name, bar, |lab| {
                let ours = lab.strided(Set::Huge, work, pattern)?;
                let peer = lab.qemu_bench(Set::Huge, work, pattern)?;
                Ok((("Qcow2Async", ours), ("qemu-img", peer)))
            })?;
        }
        Ok(())
    }

    fn allocating_writes(&mut self) -> Result<()> {
        for direct in [true, false] {
            for (what, fresh) in [("fresh", Fresh::Empty), ("overlay", Fresh::Overlay)] {
                for (flush_every, bar) in [(0, 2.0), (1, 1.5), (8, 1.5), (64, 1.5)] {
                    let pattern = Pattern {
                        step: STEP,
                        flush_every,
                    };
                    let work = self.work(Direction::Write, direct, depth(flush_every));
                    let flushes = match flush_every {
                        0 => String::new(),
                        n => format!(", a flush every {n}"),
                    };
                    let name = format!("qcow2 {what} write {}{flushes}, QEMU", cache(direct));
                    self.add(&name, bar, |lab| {
                        let ours = lab.fresh(fresh, work, pattern)?;
                        let peer = lab.fresh_qemu(fresh, work, pattern)?;
                        Ok((("Qcow2Async", ours), ("qemu-img", peer)))
                    })?;
                }
            }
        }
        Ok(())
    }

    fn sequential_writes(&mut self) -> Result<()> {
        for direct in [true, false] {
            for block in [64 << 10, 1 << 20] {
                let pattern = Pattern {
                    step: block,
                    flush_every: 0,
                };
                let mut work = self.work(Direction::Write, direct, 32);
                work.block = block;
                let name = format!(
                    "qcow2 sequential write {} {} KiB, raw",
                    cache(direct),
                    block >> 10
                );
                self.add(&name, 0.9, |lab| {
                    let ours = lab.fresh(Fresh::Empty, work, pattern)?;
                    let peer = lab.fresh(Fresh::Raw, work, pattern)?;
                    Ok((("Qcow2Async", ours), ("RawAsync", peer)))
                })?;
            }
        }
        Ok(())
    }

    fn flush_mixes(&mut self) -> Result<()> {
        for flush_every in [1, 8, 64] {
            let pattern = Pattern {
                step: STEP,
                flush_every,
            };
            let work = self.work(Direction::Write, true, depth(flush_every));
            let name = format!("qcow2 write direct, a flush every {flush_every}, raw");
            self.add(&name, 0.95, |lab| {
                let ours = lab.strided(Set::Plain(Format::Qcow2), work, pattern)?;
                let peer = lab.strided(Set::Plain(Format::Raw), work, pattern)?;
                Ok((("Qcow2Async", ours), ("RawAsync", peer)))
            })?;
        }
        Ok(())
    }

    fn compressed_reads(&mut self) -> Result<()> {
        for (codec, bar) in [("zlib", 1.5), ("zstd", 1.0)] {
            for (what, block, step, bar) in [
                ("sequential 4 KiB", 4 << 10, 4 << 10, 4.0),
                ("sequential 1 MiB", 1 << 20, 1 << 20, bar),
                ("random 4 KiB", 4 << 10, STEP, bar),
            ] {
                let pattern = Pattern {
                    step,
                    flush_every: 0,
                };
                let mut work = self.work(Direction::Read, false, 8);
                work.block = block;
                let name = format!("{codec} {what} read, QEMU");
                self.add(&name, bar, |lab| {
                    let image = Set::Compressed(codec);
                    let ours = lab.strided(image, work, pattern)?;
                    let peer = lab.qemu_bench(image, work, pattern)?;
                    Ok((("Qcow2Async", ours), ("qemu-img", peer)))
                })?;
            }
        }
        Ok(())
    }

    fn served_disks(&mut self) -> Result<()> {
        let pattern = Pattern {
            step: 4096,
            flush_every: 0,
        };
        for format in [Format::Raw, Format::Qcow2] {
            for direction in [Direction::Read, Direction::Write] {
                for depth in [1, 32] {
                    for direct in [true, false] {
                        let work = self.work(direction, direct, depth);
                        let name = format!(
                            "vhost-user {format} {} {} {depth}, QEMU",
                            word(direction),
                            cache(direct)
                        );
                        let bar = if depth == 1 { 1.0 } else { 1.5 };
                        self.add(&name, bar, |lab| {
                            let ours = lab.served_by_platter(format, work, pattern)?;
                            let peer = lab.served_by_qemu(format, work, pattern)?;
                            Ok((("platter", ours), ("qemu-storage-daemon", peer)))
                        })?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{HELP}");
        return Ok(());
    };
    let lab = Lab::new(options.lab.clone())?;
    println!("{}\n\n{HEAD}", lab.about()?);
    let mut table = Table {
        options: &options,
        lab: &lab,
        rows: Vec::new(),
    };
    table.raw_beside_fio()?;
    table.qcow2_beside_raw()?;
    table.warm_reads_beside_qemu()?;
    table.cold_metadata()?;
    table.allocating_writes()?;
    table.sequential_writes()?;
    table.flush_mixes()?;
    table.compressed_reads()?;
    table.served_disks()?;
    if let Some(dir) = &options.write {
        fs::create_dir_all(dir)?;
        let text: String = table.rows.iter().map(|row| line(row) + "\n").collect();
        fs::write(
            dir.join("peers.md"),
            format!(
                "# Platter beside its peers\n\n{}\n\n{HEAD}\n{text}",
                lab.about()?
            ),
        )?;
        let json = serde_json::to_string_pretty(&table.rows)?;
        fs::write(dir.join("peers.json"), json + "\n")?;
    }
    Ok(())
}
