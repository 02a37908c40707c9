//! The maintenance commands beside qemu-img's: the same image, the same work, in turn.
//!
//! `cargo bench -p platter-benches --bench images -- --help` says how to run it.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use platter_benches::{
    Result,
    command::Program,
    load::Random,
    report::{Contest, Plan, Row, Spread, compare},
};

const HELP: &str = "\
usage: images [--pairs N] [--size MIB] [--dir DIR] [--only TEXT] [--output human|json]
              [--platter PATH] [--qemu-img PATH]

Runs commands of platter, called by the name qemu-img, and of qemu-img itself in pairs on the same
page-cached image, and prints the ratios of their times and of their processor times.

  --pairs N        pairs of runs for each row (5)
  --size MIB       size of the image (4096): two thirds files of this machine, a part of random
                   bytes, the rest never written
  --dir DIR        where the images go: a disk file system (below the target directory)
  --only TEXT      only rows with this in their name
  --output KIND    human (a table) or json
  --platter PATH   the program (target/release/platter: cargo build --release)
  --qemu-img PATH  the peer (qemu-img)";

struct Options {
    pairs: usize,
    size: u64,
    dir: PathBuf,
    only: String,
    json: bool,
    platter: PathBuf,
    peer: PathBuf,
}

fn options() -> Result<Option<Options>> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
    let mut options = Options {
        pairs: 5,
        size: 4 << 30,
        dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
        only: String::new(),
        json: false,
        platter: target
            .unwrap_or(Path::new("target"))
            .join("release/platter"),
        peer: PathBuf::from("qemu-img"),
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
            "--size" => options.size = value()?.parse::<u64>()? << 20,
            "--dir" => options.dir = PathBuf::from(value()?),
            "--only" => options.only = value()?,
            "--output" => options.json = value()? == "json",
            "--platter" => options.platter = PathBuf::from(value()?),
            "--qemu-img" => options.peer = PathBuf::from(value()?),
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    if !options.platter.exists() {
        let path = options.platter.display();
        return Err(format!("{path} does not exist: cargo build --release makes it").into());
    }
    options.platter = options.platter.canonicalize()?;
    Ok(Some(options))
}

/// The images, gone when dropped, and the two programs.
struct Lab {
    dir: tempfile::TempDir,
    ours: PathBuf,
    peer: PathBuf,
}

impl Lab {
    fn new(options: &Options) -> Result<Self> {
        let dir = tempfile::tempdir_in(&options.dir)?;
        let ours = dir.path().join("qemu-img");
        std::os::unix::fs::symlink(&options.platter, &ours)?;
        let lab = Self {
            dir,
            ours,
            peer: options.peer.clone(),
        };
        lab.fill(options.size)?;
        lab.qemu(&["convert", "-O", "qcow2", "RAW", "QCOW2"])?;
        lab.qemu(&["convert", "-c", "-O", "qcow2", "QCOW2", "ZLIB"])?;
        let zstd = "compression_type=zstd";
        lab.qemu(&["convert", "-c", "-O", "qcow2", "-o", zstd, "QCOW2", "ZSTD"])?;
        lab.qemu(&["create", "-f", "qcow2", "SPARSE", "64T"])?;
        let full = "preallocation=metadata";
        lab.qemu(&["create", "-f", "qcow2", "-o", full, "FULL", "1T"])?;
        Ok(lab)
    }

    /// Writes the raw image that everything starts from.
    fn fill(&self, size: u64) -> Result<()> {
        let mut raw = File::create(self.path("RAW"))?;
        let mut left = size * 2 / 3;
        let mut folders = vec![PathBuf::from("/usr")];
        while let Some(folder) = folders.pop() {
            let mut entries: Vec<_> = fs::read_dir(&folder)?.collect::<std::io::Result<_>>()?;
            entries.sort_by_key(fs::DirEntry::path);
            for entry in entries {
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() && left > 0 {
                    let file = File::open(entry.path())?;
                    left -= std::io::copy(&mut file.take(left), &mut raw)?;
                }
            }
        }
        let mut random = Random::seeded(1);
        let mut block = vec![0; 1 << 20];
        for _ in 0..(size / 16) >> 20 {
            block.fill_with(|| random.below(256) as u8);
            raw.write_all(&block)?;
        }
        raw.set_len(size)?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Arguments with the names in capitals as paths; `OUT` is what the command makes.
    fn program(&self, program: &Path, arguments: &[&str], out: &str) -> Program {
        let out = self.path(out);
        let path = |name: &&str| match *name {
            "RAW" | "QCOW2" | "ZLIB" | "ZSTD" | "SPARSE" | "FULL" => {
                self.path(name).display().to_string()
            }
            "OUT" => out.display().to_string(),
            other => other.to_owned(),
        };
        Program {
            program: program.to_owned(),
            arguments: arguments.iter().map(path).collect(),
            output: Some(out),
        }
    }

    fn qemu(&self, arguments: &[&str]) -> Result<()> {
        self.program(&self.peer, arguments, "none").run()
    }
}

/// What is run, and how many times as fast as qemu-img it has to be.
const ROWS: &[(&str, &[&str], f64)] = &[
    ("info, 64 TiB sparse", &["info", "SPARSE"], 1.0),
    ("info, 1 TiB of metadata", &["info", "FULL"], 1.0),
    ("check", &["check", "QCOW2"], 1.5),
    ("check, compressed", &["check", "ZLIB"], 1.5),
    ("check, 1 TiB of metadata", &["check", "FULL"], 1.5),
    ("map", &["map", "--output=json", "QCOW2"], 1.5),
    (
        "map, 1 TiB of metadata",
        &["map", "--output=json", "FULL"],
        1.5,
    ),
    ("compare", &["compare", "RAW", "QCOW2"], 1.0),
    (
        "raw to qcow2",
        &["convert", "-O", "qcow2", "RAW", "OUT"],
        1.0,
    ),
    (
        "qcow2 to raw",
        &["convert", "-O", "raw", "QCOW2", "OUT"],
        1.0,
    ),
    ("zlib to raw", &["convert", "-O", "raw", "ZLIB", "OUT"], 1.0),
    ("zstd to raw", &["convert", "-O", "raw", "ZSTD", "OUT"], 1.0),
    (
        "qcow2 to zstd",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "QCOW2",
            "OUT",
        ],
        1.0,
    ),
    (
        "qcow2 to zlib",
        &["convert", "-c", "-O", "qcow2", "QCOW2", "OUT"],
        1.5,
    ),
];

fn line(row: &Row, sizes: Option<(u64, u64)>) -> String {
    let spread =
        |spread: &Spread| format!("{:.2} | {:.2}-{:.2}", spread.median, spread.min, spread.max);
    let size = sizes.map_or_else(String::new, |(ours, peer)| {
        format!("{:+.1} %", (ours as f64 / peer as f64 - 1.0) * 100.0)
    });
    format!(
        "| {} | {:.3} / {:.3} | {} | {:.3} / {:.3} | {} | {size} | {} | {} |",
        row.name,
        1.0 / row.ours_iops,
        1.0 / row.peer_iops,
        spread(&row.iops_ratio),
        row.ours_cpu_ns / 1e9,
        row.peer_cpu_ns / 1e9,
        spread(&row.cpu_ratio),
        row.bar,
        if row.met { "yes" } else { "no" },
    )
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{HELP}");
        return Ok(());
    };
    let version = Command::new(&options.peer).arg("--version").output()?;
    let lab = Lab::new(&options)?;
    let mut rows = Vec::new();
    if !options.json {
        let version = String::from_utf8_lossy(&version.stdout);
        println!("{}\n", version.lines().next().unwrap_or_default());
        println!(
            "| what | ours / qemu-img, s | times as fast | min-max | ours / qemu-img, CPU s | CPU ratio | min-max | output | bar | met |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
    }
    for (name, arguments, bar) in ROWS {
        if !name.contains(&options.only) {
            continue;
        }
        let mut ours = lab.program(&lab.ours, arguments, "ours");
        let mut peer = lab.program(&lab.peer, arguments, "peer");
        let contest = Contest {
            name,
            ours: ("platter", &mut ours),
            peer: ("qemu-img", &mut peer),
        };
        let plan = Plan {
            pairs: options.pairs,
            // A run is as long as it is.
            slice: Duration::ZERO,
            with_workers: true,
            bar: *bar,
        };
        let row = compare(contest, plan)?;
        let size = |name| fs::metadata(lab.path(name)).map(|meta| meta.len()).ok();
        if !options.json {
            println!("{}", line(&row, size("ours").zip(size("peer"))));
        }
        rows.push(row);
        for output in ["ours", "peer"] {
            let _ = fs::remove_file(lab.path(output));
        }
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}
