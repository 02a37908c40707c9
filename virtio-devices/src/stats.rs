//! Counters of a queue: written by its own thread, read by any.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::histogram::{Histogram, SharedHistogram, add};

/// What a guest asked for, in the words that all devices share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(usize)]
pub enum Op {
    /// Bytes from the disk.
    Read,
    /// Bytes to the disk.
    Write,
    /// Make it durable.
    Flush,
    /// The range is not needed any more.
    Discard,
    /// The range reads as zeroes.
    WriteZeroes,
    /// Everything that does not touch the disk, and everything invalid.
    #[default]
    Other,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 6] = [
        Op::Read,
        Op::Write,
        Op::Flush,
        Op::Discard,
        Op::WriteZeroes,
        Op::Other,
    ];

    /// The name as `platter` prints it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Flush => "flush",
            Op::Discard => "discard",
            Op::WriteZeroes => "write-zeroes",
            Op::Other => "other",
        }
    }
}

/// The counters of one operation of one queue.
#[derive(Debug, Default)]
pub struct OpStats {
    completed: AtomicU64,
    failed: AtomicU64,
    bytes: AtomicU64,
    latency: SharedHistogram,
}

impl OpStats {
    /// Requests that ended, well or not.
    #[must_use]
    pub fn completed(&self) -> u64 {
        self.completed.load(Ordering::Relaxed)
    }

    /// Requests that ended with an error.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Bytes of the requests that ended well.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Nanoseconds from taking a request off the ring to its status.
    #[must_use]
    pub fn latency(&self) -> Histogram {
        self.latency.snapshot()
    }
}

/// The counters of one queue. Only the queue's thread writes them, so counting takes no locked
/// instruction.
#[derive(Debug, Default)]
pub struct QueueStats {
    ops: [OpStats; Op::ALL.len()],
    interrupts: AtomicU64,
    interrupt_errors: AtomicU64,
    batches: AtomicU64,
    stalls: AtomicU64,
    faults: AtomicU64,
}

impl QueueStats {
    /// The counters of one operation.
    #[must_use]
    pub fn op(&self, op: Op) -> &OpStats {
        &self.ops[op as usize]
    }

    /// Interrupts sent.
    #[must_use]
    pub fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Relaxed)
    }

    /// Interrupts that could not be sent.
    #[must_use]
    pub fn interrupt_errors(&self) -> u64 {
        self.interrupt_errors.load(Ordering::Relaxed)
    }

    /// Drains of the ring that found something.
    #[must_use]
    pub fn batches(&self) -> u64 {
        self.batches.load(Ordering::Relaxed)
    }

    /// Drains that stopped because the data plane was full.
    #[must_use]
    pub fn stalls(&self) -> u64 {
        self.stalls.load(Ordering::Relaxed)
    }

    /// Times the driver broke the queue.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    pub(crate) fn record(&self, op: Op, ok: bool, bytes: u64, nanoseconds: u64) {
        let stats = self.op(op);
        add(&stats.completed, 1);
        if ok {
            add(&stats.bytes, bytes);
        } else {
            add(&stats.failed, 1);
        }
        stats.latency.record(nanoseconds);
    }

    pub(crate) fn interrupted(&self, sent: bool) {
        add(
            if sent {
                &self.interrupts
            } else {
                &self.interrupt_errors
            },
            1,
        );
    }

    pub(crate) fn batch(&self) {
        add(&self.batches, 1);
    }

    pub(crate) fn stalled(&self) {
        add(&self.stalls, 1);
    }

    pub(crate) fn fault(&self) {
        add(&self.faults, 1);
    }
}
