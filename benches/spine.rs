//! The spine, measured: `AsyncIo` beside fio, qcow2 beside raw, virtio-blk beside `AsyncIo`.
//!
//! `cargo bench -p platter-benches --bench spine -- --help` says how to run it, `benches/README.md`
//! how to read what it prints.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use block::{
    Disk, DiskFile, Format, Locking, OpenOptions,
    formats::qcow2::create::{CreateOptions, create},
    io::{AlignedBuf, EngineKind},
    offline::{self, OfflineOptions},
};
use platter_benches::{
    Direction, Result, Work,
    fio::Fio,
    load::{Random, Straight, Virtio},
    report::{Bars, Contest, HEAD, Plan, Row, compare, line},
    scratch::Scratch,
    side::{OnThread, Side, Slice},
};

const HELP: &str = "\
usage: spine [--pairs N] [--slice MS] [--size MIB] [--depth N] [--dir DIR]
             [--only TEXT] [--output human|json]
       spine --alone LOAD [--ios N] [--size MIB] [--depth N] [--dir DIR]

Compares in pairs of slices of time, in turn, and prints a table of ratios.

  --pairs N      pairs of slices for each row (15)
  --slice MS     length of a slice (1000)
  --size MIB     size of each image (1024)
  --depth N      accesses in flight (32)
  --dir DIR      where the images go: a disk file system (below the target directory)
  --only TEXT    only rows with this in their name; several, separated by commas
  --output KIND  human (a table) or json

  --alone LOAD   run one load and nothing else, for a profiler: FRONT-FORMAT-DIRECTION-CACHE, such
                 as async-raw-read-cached or virtio-qcow2-write-direct
  --ios N        its number of accesses (200000)";

struct Options {
    pairs: usize,
    slice: Duration,
    size: u64,
    depth: u32,
    dir: PathBuf,
    only: Vec<String>,
    json: bool,
    alone: Option<String>,
    ios: u64,
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        pairs: 15,
        slice: Duration::from_secs(1),
        size: 1 << 30,
        depth: 32,
        dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
        only: Vec::new(),
        json: false,
        alone: None,
        ios: 200_000,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            // cargo says so.
            "--bench" => {}
            "--help" | "-h" => return Ok(None),
            "--pairs" => options.pairs = value()?.parse()?,
            "--slice" => options.slice = Duration::from_millis(value()?.parse()?),
            "--size" => options.size = value()?.parse::<u64>()? << 20,
            "--depth" => options.depth = value()?.parse()?,
            "--dir" => options.dir = PathBuf::from(value()?),
            "--only" => options.only = value()?.split(',').map(str::to_owned).collect(),
            "--output" => options.json = value()? == "json",
            "--alone" => options.alone = Some(value()?),
            "--ios" => options.ios = value()?.parse()?,
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    Ok(Some(options))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Front {
    Async,
    Virtio,
    /// With guest memory pinned.
    Pinned,
}

/// A load inside this process.
#[derive(Clone, Copy, Debug)]
struct Load {
    front: Front,
    format: Format,
    work: Work,
}

impl Load {
    fn parse(name: &str, options: &Options) -> Result<Self> {
        let parts: Vec<&str> = name.split('-').collect();
        let [front, format, direction, cache] = parts[..] else {
            return Err(format!("{name}: expected FRONT-FORMAT-DIRECTION-CACHE").into());
        };
        let unknown = |what: &str| format!("{name}: unknown {what}");
        Ok(Self {
            front: match front {
                "async" => Front::Async,
                "virtio" => Front::Virtio,
                "pinned" => Front::Pinned,
                _ => return Err(unknown("front").into()),
            },
            format: Format::from_name(format).ok_or_else(|| unknown("format"))?,
            work: Work {
                direction: match direction {
                    "read" => Direction::Read,
                    "write" => Direction::Write,
                    _ => return Err(unknown("direction").into()),
                },
                direct: match cache {
                    "direct" => true,
                    "cached" => false,
                    _ => return Err(unknown("cache").into()),
                },
                block: 4096,
                depth: options.depth,
                size: options.size,
            },
        })
    }
}

/// The images, gone when dropped. Each is filled with data that is not zero.
struct Images {
    dir: Scratch,
    size: u64,
}

impl Images {
    fn new(options: &Options) -> Result<Self> {
        Ok(Self {
            dir: Scratch::new_in(&options.dir)?,
            size: options.size,
        })
    }

    /// The path of an image, which is made when it is asked for first. Direct and cached loads have
    /// images of their own: one that is in the page cache is no test of direct I/O.
    fn path(&self, format: Format, direct: bool) -> Result<PathBuf> {
        let cache = if direct { "direct" } else { "cached" };
        let path = self.dir.path().join(format!("{format}.{cache}"));
        if path.exists() {
            return Ok(path);
        }
        match format {
            Format::Raw => fs::File::create(&path)?.set_len(self.size)?,
            Format::Qcow2 => {
                let image = CreateOptions {
                    size: self.size,
                    ..CreateOptions::default()
                };
                offline::with_file(&path, OfflineOptions::create(), async |io, file| {
                    create(io, file, &image).await
                })?;
            }
            other => return Err(format!("no {other} image is made here").into()),
        }
        // Written past the page cache, which then gets cached images in one way, whatever the format:
        // by reading them from front to end.
        let disk = open(&path, format, true)?;
        let mut random = Random::seeded(1);
        let mut data = AlignedBuf::zeroed(1 << 20);
        for byte in data.iter_mut() {
            *byte = random.below(256) as u8;
        }
        for offset in (0..self.size).step_by(data.len()) {
            disk.write_at(&data, offset)?;
        }
        disk.close()?;
        if !direct {
            io::copy(&mut fs::File::open(&path)?, &mut io::sink())?;
        }
        Ok(path)
    }

    fn load(&self, load: Load) -> Result<OnThread> {
        let path = self.path(load.format, load.work.direct)?;
        OnThread::start(move || start(&path, load))
    }
}

fn open(path: &Path, format: Format, direct: bool) -> Result<Disk> {
    // Two sides have the same raw image open.
    Ok(OpenOptions::new()
        .format(format)
        .engine(EngineKind::IoUring)
        .direct(direct)
        .locking(Locking::Off)
        .open_disk(path)?)
}

enum Any {
    Straight(Straight),
    Virtio(Box<Virtio>),
}

impl platter_benches::side::Load for Any {
    fn run(&mut self, stop: platter_benches::side::Stop, seed: u64) -> Result<u64> {
        match self {
            Any::Straight(load) => load.run(stop, seed),
            Any::Virtio(load) => load.run(stop, seed),
        }
    }
}

fn start(path: &Path, load: Load) -> Result<Any> {
    let disk = open(path, load.format, load.work.direct)?;
    Ok(match load.front {
        Front::Async => Any::Straight(Straight::new(&disk, load.work)?),
        Front::Virtio | Front::Pinned => {
            let pin = load.front == Front::Pinned;
            Any::Virtio(Box::new(Virtio::new(Box::new(disk), load.work, pin)?))
        }
    })
}

/// The comparisons.
#[derive(Clone, Copy)]
enum Kind {
    RawWithFio,
    Qcow2WithRaw,
    VirtioWithAsync,
    PinnedWithVirtio,
}

fn row(kind: Kind, work: Work, images: &Images, options: &Options) -> Result<Option<Row>> {
    let (what, bar) = match kind {
        Kind::RawWithFio => ("raw", 0.9),
        Kind::Qcow2WithRaw => ("qcow2", 0.85),
        Kind::VirtioWithAsync => ("virtio-blk", 0.85),
        Kind::PinnedWithVirtio => ("pinned memory", 1.0),
    };
    let name = format!(
        "{what} {} {}",
        match work.direction {
            Direction::Read => "read",
            Direction::Write => "write",
        },
        if work.direct { "direct" } else { "cached" }
    );
    if !options.only.is_empty() && !options.only.iter().any(|text| name.contains(text)) {
        return Ok(None);
    }
    let load = |front, format| {
        images.load(Load {
            front,
            format,
            work,
        })
    };
    let (mut ours, mut peer): (OnThread, Box<dyn Side>) = match kind {
        Kind::RawWithFio => (
            load(Front::Async, Format::Raw)?,
            Box::new(Fio::new(&images.path(Format::Raw, work.direct)?, work)?),
        ),
        Kind::Qcow2WithRaw => (
            load(Front::Async, Format::Qcow2)?,
            Box::new(load(Front::Async, Format::Raw)?),
        ),
        Kind::VirtioWithAsync => (
            load(Front::Virtio, Format::Raw)?,
            Box::new(load(Front::Async, Format::Raw)?),
        ),
        Kind::PinnedWithVirtio => (
            load(Front::Pinned, Format::Raw)?,
            Box::new(load(Front::Virtio, Format::Raw)?),
        ),
    };
    let (ours_name, peer_name) = match kind {
        Kind::RawWithFio => ("RawAsync", "fio"),
        Kind::Qcow2WithRaw => ("Qcow2Async", "RawAsync"),
        Kind::VirtioWithAsync => ("virtio-blk", "AsyncIo"),
        Kind::PinnedWithVirtio => ("pinned", "virtio-blk"),
    };
    let contest = Contest {
        name: &name,
        ours: (ours_name, &mut ours),
        peer: (peer_name, &mut *peer),
        host: None,
    };
    let plan = Plan {
        pairs: options.pairs,
        slice: options.slice,
        // The kernel hands buffered writes to its workers.
        with_workers: work.direction == Direction::Write && !work.direct,
        bars: Bars::rate(bar),
    };
    compare(contest, plan).map(Some)
}

fn alone(name: &str, options: &Options, images: &Images) -> Result<()> {
    let mut load = images.load(Load::parse(name, options)?)?;
    let slice: Slice = load.ios(options.ios, 1)?;
    println!(
        "{name}: {} accesses, {:.0} IOPS, {:.0} ns CPU of the thread and {:.0} ns of all an access",
        slice.ios,
        slice.iops(),
        slice.cpu_per_io(false),
        slice.cpu_per_io(true),
    );
    Ok(())
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{HELP}");
        return Ok(());
    };
    let images = Images::new(&options)?;
    if let Some(name) = &options.alone {
        return alone(name, &options, &images);
    }
    let mut rows = Vec::new();
    if !options.json {
        println!("{HEAD}");
    }
    for kind in [
        Kind::RawWithFio,
        Kind::Qcow2WithRaw,
        Kind::VirtioWithAsync,
        Kind::PinnedWithVirtio,
    ] {
        for direct in [true, false] {
            for direction in [Direction::Read, Direction::Write] {
                let work = Work {
                    direction,
                    direct,
                    block: 4096,
                    depth: options.depth,
                    size: options.size,
                };
                if let Some(row) = row(kind, work, &images, &options)? {
                    if !options.json {
                        println!("{}", line(&row));
                        io::stdout().flush()?;
                    }
                    rows.push(row);
                }
            }
        }
    }
    if options.json {
        let document = serde_json::json!({
            "pairs": options.pairs,
            "slice_ms": options.slice.as_millis() as u64,
            "size": options.size,
            "block": 4096,
            "depth": options.depth,
            "rows": rows,
        });
        println!("{}", serde_json::to_string_pretty(&document)?);
    }
    Ok(())
}
