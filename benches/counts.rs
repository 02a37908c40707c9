//! Instructions that an access costs, counted by valgrind's callgrind: the same on every machine.
//!
//! `cargo bench -p platter-benches --bench counts -- --help` says how to run it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use platter_benches::{
    Result,
    cases::{CASES, Case},
    side::Stop,
};

const HELP: &str = "\
usage: counts [--check | --write] [--only TEXT]

Counts the instructions of each hot path, an access, under valgrind (which has to be installed) and prints
them beside those of the table in benches/counts.txt.

  --check      fails if a count is more than 3 % above or below that of the table. The table names the
               compiler that it was made with: with another one counts are printed, nothing is compared
  --write      writes the table anew
  --only TEXT  only rows with this in their name";

/// How far a count may be from that of the table.
const TOLERANCE: f64 = 0.03;

/// Accesses of the shorter and of the longer run; what both have in common cancels out.
const SHORT: u64 = 20_000;
const LONG: u64 = 60_000;

fn table_path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("counts.txt")
}

/// The compiler, as the table names it.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output()?;
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

/// Compiler and counts of the checked-in table.
fn read_table() -> Result<(String, BTreeMap<String, u64>)> {
    let text = fs::read_to_string(table_path())?;
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let compiler = lines.next().unwrap_or_default().to_owned();
    let row = |line: &str| -> Option<(String, u64)> {
        let (name, count) = line.rsplit_once(' ')?;
        Some((name.trim().to_owned(), count.parse().ok()?))
    };
    Ok((compiler, lines.filter_map(row).collect()))
}

fn write_table(counts: &BTreeMap<String, u64>) -> Result<()> {
    let mut text = String::from(
        "# Instructions of an access (512 bytes, 32 in flight, files in memory), by callgrind.\n\
         # Made by: cargo bench -p platter-benches --bench counts -- --write\n",
    );
    text += &compiler()?;
    text.push('\n');
    for (name, count) in counts {
        text += &format!("{name:<24} {count}\n");
    }
    fs::write(table_path(), text)?;
    Ok(())
}

/// Runs a case under callgrind; the instructions of the whole program.
fn instructions(case: &Case, ios: u64) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["--run", case.name, &ios.to_string()])
        .output()
        .map_err(|error| format!("valgrind: {error}"))?;
    let text = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("{}: {}\n{text}", case.name, output.status).into());
    }
    let collected = text
        .lines()
        .find_map(|line| line.split_once("Collected :"))
        .and_then(|(_, count)| count.trim().parse().ok());
    collected.ok_or_else(|| format!("{}: callgrind counted nothing:\n{text}", case.name).into())
}

/// What runs under callgrind.
fn run(name: &str, ios: u64) -> Result<()> {
    let case = CASES.iter().find(|case| case.name == name);
    let case = case.ok_or_else(|| format!("no case {name}"))?;
    case.load()?.run(Stop::After(ios), 1)?;
    Ok(())
}

fn main() -> Result<()> {
    let (mut check, mut write, mut only) = (false, false, String::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            // cargo says so.
            "--bench" => {}
            "--check" => check = true,
            "--write" => write = true,
            "--only" => only = value()?,
            "--run" => {
                let name = value()?;
                return run(&name, value()?.parse()?);
            }
            "--help" | "-h" => {
                println!("{HELP}");
                return Ok(());
            }
            other => return Err(format!("{other}: no such option\n{HELP}").into()),
        }
    }
    if write && !only.is_empty() {
        return Err("--write makes the whole table: expected no --only".into());
    }
    let (made_with, table) = match read_table() {
        Ok(table) => table,
        Err(_) if write => Default::default(),
        Err(error) => return Err(format!("{}: {error}", table_path().display()).into()),
    };
    let mut counts = BTreeMap::new();
    let mut off = Vec::new();
    println!("| path | instructions an access | table | change |\n| --- | --- | --- | --- |");
    for case in CASES.iter().filter(|case| case.name.contains(&only)) {
        let more = instructions(case, LONG)?.saturating_sub(instructions(case, SHORT)?);
        let count = more / (LONG - SHORT);
        let (before, change) = match table.get(case.name) {
            Some(&before) => {
                let change = count as f64 / before as f64 - 1.0;
                (before.to_string(), change)
            }
            None => ("-".to_owned(), f64::INFINITY),
        };
        println!(
            "| {} | {count} | {before} | {:+.1} % |",
            case.name,
            change * 100.0
        );
        if change.abs() > TOLERANCE {
            off.push(case.name);
        }
        counts.insert(case.name.to_owned(), count);
    }
    if write {
        return write_table(&counts);
    }
    let compiler = compiler()?;
    if made_with != compiler {
        println!(
            "the table was made with {made_with}, this is {compiler}: nothing is compared; --write makes it anew"
        );
    } else if check && !off.is_empty() {
        return Err(format!(
            "more than {} % from the table: {}; if that is meant, --write makes it anew",
            TOLERANCE * 100.0,
            off.join(", ")
        )
        .into());
    }
    Ok(())
}
