//! What SMART counts over the life of a controller (base specification 2.0, 5.16.1.3): the counters of
//! its workers, and those that it brought along from another process.

use std::sync::{PoisonError, atomic::Ordering};

use serde::{Deserialize, Serialize};

use super::{command::put, core::Core};
use crate::stats::{Op, QueueStats};

/// The counters. They only grow, and wrap around.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counters {
    bytes_read: u64,
    bytes_written: u64,
    reads: u64,
    writes: u64,
    /// Reads and writes that failed.
    failed: u64,
    /// Nanoseconds with commands in flight.
    busy: u64,
    power_on_seconds: u64,
    power_cycles: u64,
}

impl Counters {
    fn zip(self, other: Self, with: fn(u64, u64) -> u64) -> Self {
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

impl Core {
    /// What has been counted in this process.
    fn counted_here(&self) -> Counters {
        let sum = |get: &dyn Fn(&QueueStats) -> u64| {
            let all = self.ports.iter().map(|port| get(&port.stats));
            all.fold(0, u64::wrapping_add)
        };
        let busy = self.ports.iter().map(|it| it.busy.load(Ordering::Relaxed));
        Counters {
            bytes_read: sum(&|stats| stats.op(Op::Read).bytes()),
            bytes_written: sum(&|stats| stats.op(Op::Write).bytes()),
            reads: sum(&|stats| stats.op(Op::Read).completed()),
            writes: sum(&|stats| stats.op(Op::Write).completed()),
            failed: sum(&|stats| {
                let failed = |op| stats.op(op).failed();
                failed(Op::Read).wrapping_add(failed(Op::Write))
            }),
            busy: busy.fold(0, u64::wrapping_add),
            power_on_seconds: self.started.elapsed().as_secs(),
            power_cycles: 1,
        }
    }

    /// What the host sees.
    pub(super) fn counters(&self) -> Counters {
        let brought = *self.brought.lock().unwrap_or_else(PoisonError::into_inner);
        brought.zip(self.counted_here(), u64::wrapping_add)
    }

    /// Goes on from there: what was counted in this process before was of somebody else.
    pub(super) fn set_counters(&self, counters: Counters) {
        let brought = counters.zip(self.counted_here(), u64::wrapping_sub);
        *self.brought.lock().unwrap_or_else(PoisonError::into_inner) = brought;
    }
}
