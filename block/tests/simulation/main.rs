//! The format code on the simulation: random requests, snapshots, bitmaps, faults and power cuts against
//! a model.
//!
//! `PLATTER_SIM_SEEDS=N` runs N seeds of each mode; `PLATTER_SIM_SEED=S PLATTER_SIM_MODE=Exact`
//! replays one. A failing seed prints how.

#![allow(clippy::unwrap_used)] // A test ends where something unexpected happens.

mod extras;
mod model;
mod run;
mod setup;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
};

use setup::Mode;

/// Seeds of each mode.
const SEEDS: u64 = 500;

/// Failing seeds after which a run gives up.
const MOST_FAILURES: usize = 20;

/// Every so many seeds, QEMU judges too.
const JUDGED: u64 = 40;

fn seeds(mode: Mode) {
    let variable = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = variable("PLATTER_SIM_SEED") {
        if env::var("PLATTER_SIM_MODE").is_ok_and(|name| name == format!("{mode:?}")) {
            run::run(seed, mode, true);
        }
        return;
    }
    let start: u64 = variable("PLATTER_SIM_START").unwrap_or(0);
    let mut failed = Vec::new();
    for seed in start..start + variable("PLATTER_SIM_SEEDS").unwrap_or(SEEDS) {
        let run = || run::run(seed, mode, seed % JUDGED == 0);
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            failed.push(seed);
        }
        assert!(failed.len() < MOST_FAILURES, "{mode:?}: seeds {failed:?}");
    }
    assert!(failed.is_empty(), "{mode:?}: seeds {failed:?}");
}

#[test]
fn exact() {
    seeds(Mode::Exact);
}

#[test]
fn overlap() {
    seeds(Mode::Overlap);
}

#[test]
fn faults() {
    seeds(Mode::Faults);
}

#[test]
fn a_seed_replays_exactly() {
    for seed in 0..12 {
        for mode in [Mode::Exact, Mode::Overlap, Mode::Faults] {
            let first = run::run(seed, mode, false);
            assert_eq!(first, run::run(seed, mode, false), "seed {seed} {mode:?}");
        }
    }
}
