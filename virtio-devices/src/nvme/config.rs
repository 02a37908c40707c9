//! How a controller is made.

use std::time::Duration;

use crate::{Error, Result, worker::DEFAULT_POLL_MAX};

/// How a controller is made.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// I/O queue pairs, 1 to 128.
    pub io_queues: u16,
    /// Workers for them, 1 to as many as there are pairs. A completion queue and its submission
    /// queues belong to one worker.
    pub workers: usize,
    /// Interrupt vectors, 1 to 2048.
    pub vectors: u16,
    /// Block requests in flight, for each worker and namespace.
    pub ring_depth: u32,
    /// The largest transfer: 4 KiB times 2 to this power, 8 (1 MiB) to 13.
    pub mdts: u8,
    /// PCI vendor and subsystem vendor, as Identify shows them.
    pub vendor: u16,
    /// Whoever writes a doorbell also calls the workers: they need not be woken.
    pub inline: bool,
    /// How long a worker looks for commands before it sleeps, at most; zero: never. See
    /// [`Worker::set_poll_max`](crate::worker::Worker::set_poll_max).
    pub poll_max: Duration,
}

impl Default for NvmeConfig {
    fn default() -> Self {
        Self {
            io_queues: 16,
            workers: 1,
            vectors: 17,
            ring_depth: 256,
            mdts: 9,
            // With device identifiers 10f0h to 10ffh this vendor's numbers are free for experiments.
            vendor: 0x1af4,
            inline: false,
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

impl NvmeConfig {
    /// Bytes of the largest transfer.
    pub(super) fn max_transfer(&self) -> u64 {
        4096 << self.mdts
    }

    pub(super) fn check(&self) -> Result<()> {
        let bad = |what: &str, value: u64, expected: &str| {
            Err(Error::Config(format!("{what} is {value}, not {expected}")))
        };
        if !(1..=128).contains(&self.io_queues) {
            return bad("io_queues", self.io_queues.into(), "1 to 128");
        }
        if !(1..=usize::from(self.io_queues)).contains(&self.workers) {
            return bad("workers", self.workers as u64, "1 to the number of queues");
        }
        if !(1..=2048).contains(&self.vectors) {
            return bad("vectors", self.vectors.into(), "1 to 2048");
        }
        if !(8..=13).contains(&self.mdts) {
            return bad("mdts", self.mdts.into(), "8 to 13");
        }
        if self.ring_depth == 0 {
            return bad("ring_depth", 0, "at least 1");
        }
        Ok(())
    }
}
