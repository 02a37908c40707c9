//! What the benchmarks share: sides to compare, slices of time, ratios.
//!
//! A benchmark compares two [`side::Side`]s that do the same work. It lets them run in turn, a slice of
//! time each, many times over; every pair of neighbouring slices gives one ratio. The machine may
//! become slower or faster meanwhile: a pair hardly notices, and the median of the ratios less.

pub mod cases;
pub mod chart;
pub mod command;
pub mod counting;
pub mod cpu;
pub mod fio;
pub mod lanes;
pub mod load;
pub mod maintenance;
pub mod memory;
pub mod nvme;
pub mod patience;
pub mod qemu;
pub mod report;
pub mod scratch;
pub mod server;
pub mod side;
pub mod strace;
pub mod stride;
pub mod table;

use std::error::Error;

/// A result of a benchmark; the error is printed and ends it.
pub type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

/// What a side does during its slices: random accesses of one size.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// Which way the data goes.
    pub direction: Direction,
    /// Whether the page cache is bypassed.
    pub direct: bool,
    /// Bytes of an access; accesses are aligned to it.
    pub block: u64,
    /// Accesses in flight.
    pub depth: u32,
    /// Bytes of the disk.
    pub size: u64,
}
