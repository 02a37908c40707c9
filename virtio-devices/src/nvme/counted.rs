//! Where SMART's counters come from: the workers, and what a controller brought along from another process.

use std::sync::{PoisonError, atomic::Ordering};

use super::{core::Core, smart::Counters};
use crate::stats::{Op, QueueStats};

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
