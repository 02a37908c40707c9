//! The counters of queues, as JSON.

use serde_json::{Map, Value, json};
use virtio_devices::stats::{Op, QueueStats};

/// One queue, or one worker. Operations that never happened are left out; times are nanoseconds.
pub(crate) fn counters(stats: &QueueStats) -> Value {
    let mut operations = Map::new();
    for op in Op::ALL {
        let of = stats.op(op);
        if of.completed() == 0 {
            continue;
        }
        let latency = of.latency();
        operations.insert(
            op.name().to_owned(),
            json!({
                "completed": of.completed(),
                "failed": of.failed(),
                "bytes": of.bytes(),
                "latency": {
                    "mean": latency.mean(),
                    "p50": latency.p50(),
                    "p99": latency.p99(),
                    "max": latency.max(),
                },
            }),
        );
    }
    json!({
        "operations": operations,
        "batches": stats.batches(),
        "stalls": stats.stalls(),
        "faults": stats.faults(),
        "interrupts": stats.interrupts(),
        "interrupt-errors": stats.interrupt_errors(),
    })
}
