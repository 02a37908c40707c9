//! What SMART counts over the life of a controller (base specification 2.0, 5.16.1.3).

use serde::{Deserialize, Serialize};

use super::command::put;

/// The counters. They only grow, and wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counters {
    pub(super) bytes_read: u64,
    pub(super) bytes_written: u64,
    pub(super) reads: u64,
    pub(super) writes: u64,
    /// Reads and writes that failed.
    pub(super) failed: u64,
    /// Nanoseconds with commands in flight.
    pub(super) busy: u64,
    pub(super) power_on_seconds: u64,
    pub(super) power_cycles: u64,
}

impl Counters {
    /// Each counter with the other's.
    pub(super) fn zip(self, other: Self, with: fn(u64, u64) -> u64) -> Self {
        Self {
            bytes_read: with(self.bytes_read, other.bytes_read),
            bytes_written: with(self.bytes_written, other.bytes_written),
            reads: with(self.reads, other.reads),
            writes: with(self.writes, other.writes),
            failed: with(self.failed, other.failed),
            busy: with(self.busy, other.busy),
            power_on_seconds: with(self.power_on_seconds, other.power_on_seconds),
            power_cycles: with(self.power_cycles, other.power_cycles),
        }
    }

    /// Puts them where log page 02h has them.
    pub(super) fn show(&self, page: &mut [u8]) {
        // Units of 1000 sectors of 512 bytes, rounded up.
        let units = |bytes: u64| bytes.div_ceil(512_000);
        for (at, value) in [
            (32, units(self.bytes_read)),
            (48, units(self.bytes_written)),
            (64, self.reads),
            (80, self.writes),
            // In minutes.
            (96, self.busy / 60_000_000_000),
            (112, self.power_cycles),
            (128, self.power_on_seconds / 3600),
            (160, self.failed),
        ] {
            put(page, at, &u128::from(value).to_le_bytes());
        }
    }
}
