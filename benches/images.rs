//! The maintenance commands beside qemu-img's: the same image, the same work, in turn.
//!
//! `cargo bench -p platter-benches --bench images -- --help` says how to run it.

use std::{
    path::{Path, PathBuf},
    process,
    time::Duration,
};

use platter_benches::{
    Result,
    maintenance::{COMMANDS, Images},
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
    Ok(Some(options))
}

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
        row.bars,
        if row.met { "yes" } else { "no" },
    )
}

fn main() -> Result<()> {
    let Some(options) = options()? else {
        println!("{HELP}");
        return Ok(());
    };
    let version = process::Command::new(&options.peer)
        .arg("--version")
        .output()?;
    let images = Images::new(&options.dir, options.size, &options.platter, &options.peer)?;
    let mut rows = Vec::new();
    if !options.json {
        let version = String::from_utf8_lossy(&version.stdout);
        println!("{}\n", version.lines().next().unwrap_or_default());
        println!(
            "| what | ours / qemu-img, s | times as fast | min-max | ours / qemu-img, CPU s | CPU ratio | min-max | output | bar | met |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
        );
    }
    for command in COMMANDS {
        if !command.name.contains(&options.only) {
            continue;
        }
        let (mut ours, mut peer) = images.sides(command);
        let contest = Contest {
            name: command.name,
            ours: ("platter", &mut ours),
            peer: ("qemu-img", &mut peer),
            host: None,
        };
        let plan = Plan {
            pairs: options.pairs,
            // A run is as long as it is.
            slice: Duration::ZERO,
            with_workers: true,
            bars: command.bars(),
        };
        let row = compare(contest, plan)?;
        let sizes = images.outputs();
        if !options.json {
            println!("{}", line(&row, sizes));
        }
        rows.push(row);
    }
    if options.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    }
    Ok(())
}
