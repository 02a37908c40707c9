//! Platter beside its peers: fio, `qemu-img bench`, `qemu-storage-daemon`, the crates imago
//! and qcow2-rs.
//!
//! `benches/peers` installs what this needs and runs it; `benches/peers --help` says how.

mod peers_lab;

use std::{
    fs,
    io::Write as _,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use peers_lab::{
    Lab, opening,
    rows::{self, Bench, Row},
};
use platter_benches::{
    Result, chart,
    table::{Entry, HEAD, summary},
};

const HELP: &str = "\
usage: peers [--list] [--only TEXT]... [--pairs N] [--slice MS] [--size MIB] [--dir DIR]
             [--write [DIR]] [--platter PATH] [--qemu DIR] [--client PATH]

Compares Platter with fio, QEMU, qemu-storage-daemon and the crates imago and qcow2-rs in pairs of slices of
time, in turn, and prints a table of ratios. A row that fails says why, and the run goes on.

  --list          only prints the names of the rows
  --only TEXT     only rows with this in their name; more than once: with any of these
  --pairs N       pairs of slices for each row (15)
  --slice MS      length of a slice (1000)
  --size MIB      size of each image (1024)
  --dir DIR       where the images go: a disk file system (below the target directory)
  --write [DIR]   also writes peers.md, peers.json and peers.svg there (docs/performance)
  --platter PATH  the program (target/release/platter)
  --qemu DIR      where qemu-img and qemu-storage-daemon are (.cache/lab/reference)
  --client PATH   a qemu-img with the driver virtio-blk-vhost-user (.cache/lab/bin/qemu-img)

Exit status: 0 if every row was measured, whether it met its bars or not; 1 if one failed.";

struct Options {
    list: bool,
    only: Vec<String>,
    pairs: usize,
    slice: Duration,
    write: Option<PathBuf>,
    lab: peers_lab::Options,
}

fn options() -> Result<Option<Options>> {
    let mut options = Options {
        list: false,
        only: Vec::new(),
        pairs: 15,
        slice: Duration::from_secs(1),
        write: None,
        lab: peers_lab::Options::default(),
    };
    let mut arguments = std::env::args().skip(1).peekable();
    while let Some(argument) = arguments.next() {
        if argument == "--write" {
            let dir = arguments.next_if(|next| !next.starts_with("--"));
            let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/performance");
            options.write = Some(dir.map_or_else(default, PathBuf::from));
            continue;
        }
        let mut value = || {
            let value = arguments.next();
            value.ok_or_else(|| format!("{argument} needs a value"))
        };
        match argument.as_str() {
            // cargo says so.
            "--bench" => {}
            "--help" | "-h" => return Ok(None),
            "--list" => options.list = true,
            "--only" => options.only.push(value()?),
            "--pairs" => options.pairs = value()?.parse()?,
            "--slice" => options.slice = Duration::from_millis(value()?.parse()?),
            "--size" => options.lab.size = value()?.parse::<u64>()? << 20,
            "--dir" => options.lab.dir = PathBuf::from(value()?),
            "--platter" => options.lab.platter = PathBuf::from(value()?),
            "--qemu" => options.lab.qemu = PathBuf::from(value()?),
            "--client" => options.lab.client = PathBuf::from(value()?),
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    if options.pairs == 0 {
        return Err("--pairs 0: expected at least 1".into());
    }
    Ok(Some(options))
}

impl Options {
    fn wants(&self, row: &Row) -> bool {
        self.only.is_empty() || self.only.iter().any(|text| row.name.contains(text))
    }
}

/// Measures a row, whatever happens.
fn measure(row: &Row, bench: &Bench) -> Entry {
    catch_unwind(AssertUnwindSafe(|| row.run(bench)))
        .unwrap_or_else(|_| Entry::failure(&row.name, "it panicked"))
}

/// What a table says about itself.
fn about(bench: &Bench) -> Result<String> {
    let few = if bench.pairs < 15 {
        ": too few for more than a try"
    } else {
        ""
    };
    Ok(format!(
        "{}; {} MiB, {} pairs of {} ms{few}",
        bench.lab.about()?,
        bench.lab.size() >> 20,
        bench.pairs,
        bench.slice.as_millis()
    ))
}

fn write(dir: &Path, bench: &Bench, about: &str, entries: &[Entry]) -> Result<()> {
    fs::create_dir_all(dir)?;
    let lines: String = entries.iter().map(Entry::lines).collect();
    let text = format!(
        "# Platter beside its peers\n\n{about}\n\n{}\n\n{HEAD}\n{lines}",
        summary(entries)
    );
    fs::write(dir.join("peers.md"), text)?;
    let document = serde_json::json!({
        "about": about,
        "pairs": bench.pairs,
        "slice_ms": bench.slice.as_millis() as u64,
        "size": bench.lab.size(),
        "rows": entries,
    });
    let json = serde_json::to_string_pretty(&document)?;
    fs::write(dir.join("peers.json"), json + "\n")?;
    fs::write(dir.join("peers.svg"), chart::draw(entries, about)?)?;
    Ok(())
}

fn run(options: Options) -> Result<bool> {
    let rows: Vec<Row> = rows::all()
        .into_iter()
        .filter(|row| options.wants(row))
        .collect();
    if options.list {
        for row in &rows {
            println!("{}", row.name);
        }
        return Ok(true);
    }
    if rows.is_empty() {
        return Err("no row has that in its name; --list shows them".into());
    }
    let bench = Bench {
        lab: Lab::new(options.lab)?,
        pairs: options.pairs,
        slice: options.slice,
    };
    let about = about(&bench)?;
    println!("{about}\n\n{HEAD}");
    let mut entries = Vec::new();
    for row in &rows {
        let entry = measure(row, &bench);
        print!("{}", entry.lines());
        std::io::stdout().flush()?;
        entries.push(entry);
        // A run takes long: what there is stays if it is ended.
        if let Some(dir) = &options.write {
            write(dir, &bench, &about, &entries)?;
        }
    }
    println!("\n{}", summary(&entries));
    Ok(entries.iter().all(|entry| entry.failed.is_none()))
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [option, first, second] = arguments.as_slice()
        && option == opening::OPEN
    {
        opening::open_and_tell(Path::new(first), Path::new(second))?;
        return Ok(ExitCode::SUCCESS);
    }
    let Some(options) = options()? else {
        println!("{HELP}");
        return Ok(ExitCode::SUCCESS);
    };
    Ok(if run(options)? {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
