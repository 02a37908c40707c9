//! Platter and QEMU work on the same qcow2 image in turns; after each turn the contents are those
//! of a model, and QEMU's checker finds nothing.
//!
//! `cargo test --test differential -- --rounds N` runs N images. The first ones cross every value of
//! each [dimension](shapes::DIMENSIONS) with every value of each other one; those behind them are drawn
//! from all combinations that the format allows. `--start N` begins with image N, and `--round N`
//! is that image alone: what a failure names.

#![allow(clippy::unwrap_used)]

mod image;
mod model;
mod platter;
mod qemu;
mod random;
mod round;
mod shapes;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    process::ExitCode,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Instant,
};

use round::Round;
use shapes::Shapes;

/// Rounds that are drawn, behind those that cross everything.
const DRAWN: u64 = 36;

/// Rounds at the same time. Most of their time they wait for the disk.
const THREADS: usize = 4;

/// What the command line asks for.
struct Arguments {
    rounds: Option<u64>,
    start: u64,
    /// Names of tests to run; every name where there are none.
    filters: Vec<String>,
    list: bool,
}

impl Arguments {
    fn parse() -> Result<Self, String> {
        let mut all = Self {
            rounds: None,
            start: 0,
            filters: Vec::new(),
            list: false,
        };
        let mut words = env::args().skip(1);
        while let Some(word) = words.next() {
            let (name, inline) = match word.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (word, None),
            };
            let mut number = || -> Result<u64, String> {
                let text = inline.clone().or_else(|| words.next());
                let text = text.ok_or(format!("{name}: expected a number behind it"))?;
                text.parse()
                    .map_err(|_| format!("{name} {text}: expected a number"))
            };
            match name.as_str() {
                "--rounds" => all.rounds = Some(number()?),
                "--start" => all.start = number()?,
                "--round" => (all.start, all.rounds) = (number()?, Some(1)),
                // What the usual harness takes and what makes no difference here.
                "--test-threads" => drop(number()?),
                "--nocapture" | "--no-capture" | "--quiet" | "-q" => {}
                "--list" => all.list = true,
                _ if name.starts_with('-') => return Err(format!("{name}: not an option here")),
                _ => all.filters.push(name),
            }
        }
        Ok(all)
    }

    fn wants(&self, test: &str) -> bool {
        self.filters.is_empty() || self.filters.iter().any(|part| test.contains(part.as_str()))
    }
}

/// Plays the rounds, some at a time; the numbers of those that failed.
fn play(shapes: &Shapes, start: u64, rounds: u64) -> Vec<u64> {
    let next = AtomicU64::new(start);
    let failed = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= start.saturating_add(rounds) {
                        return;
                    }
                    let round = || Round::new(number, shapes.of(number)).play();
                    if catch_unwind(AssertUnwindSafe(round)).is_err() {
                        failed.lock().unwrap().push(number);
                    }
                }
            });
        }
    });
    failed.into_inner().unwrap()
}

fn main() -> ExitCode {
    const TEST: &str = "platter_and_qemu_agree";
    let arguments = match Arguments::parse() {
        Ok(arguments) => arguments,
        Err(text) => {
            eprintln!("{text}");
            return ExitCode::from(2);
        }
    };
    if arguments.list {
        println!("{TEST}: test");
        return ExitCode::SUCCESS;
    }
    if !arguments.wants(TEST) {
        println!("\nrunning 0 tests\n\ntest result: ok. 0 passed; 0 failed; 1 filtered out\n");
        return ExitCode::SUCCESS;
    }
    let began = Instant::now();
    let shapes = Shapes::new();
    let rounds = arguments.rounds.unwrap_or(shapes.crossing() + DRAWN);
    println!("\nrunning {rounds} rounds");
    let failed = play(&shapes, arguments.start, rounds);
    let seconds = began.elapsed().as_secs_f32();
    if failed.is_empty() {
        println!("test {TEST} ... ok");
        println!("\ntest result: ok. 1 passed; 0 failed; finished in {seconds:.2}s\n");
        return ExitCode::SUCCESS;
    }
    println!("test {TEST} ... FAILED: rounds {failed:?}");
    println!("\ntest result: FAILED. 0 passed; 1 failed; finished in {seconds:.2}s\n");
    ExitCode::from(101)
}
