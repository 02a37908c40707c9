//! Who may write to a namespace: everybody at once, or one fused command alone.
//!
//! A write counts itself in and then looks whether somebody wants to be alone; whoever wants to be
//! alone says so and then looks at the counts. One of the two sees the other, whichever comes
//! first. Nobody waits here: a command that may not go on is parked by its queue and tried again
//! when the queue is woken.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// Counters, so that queues on different threads do not share a cache line.
const LANES: usize = 32;

#[derive(Debug, Default)]
#[repr(align(64))]
struct Lane(AtomicU32);

/// The gate of one namespace.
#[derive(Debug, Default)]
pub(super) struct Gate {
    exclusive: AtomicBool,
    lanes: [Lane; LANES],
}

impl Gate {
    fn lane(&self, worker: usize) -> &AtomicU32 {
        &self.lanes[worker % LANES].0
    }

    /// Begins a write of `worker`; false if somebody is alone in there, or wants to be.
    pub(super) fn enter(&self, worker: usize) -> bool {
        self.lane(worker).fetch_add(1, Ordering::SeqCst);
        if self.exclusive.load(Ordering::SeqCst) {
            self.lane(worker).fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        true
    }

    /// Ends a write; returns whether somebody waits to be alone and has to be woken.
    pub(super) fn leave(&self, worker: usize) -> bool {
        self.lane(worker).fetch_sub(1, Ordering::SeqCst);
        self.exclusive.load(Ordering::SeqCst)
    }

    /// Asks to be alone: from now on no write begins. False if another one asked before.
    pub(super) fn claim(&self) -> bool {
        !self.exclusive.swap(true, Ordering::SeqCst)
    }

    /// Whether whoever [claimed](Self::claim) the gate is alone by now.
    pub(super) fn is_quiet(&self) -> bool {
        let mut lanes = self.lanes.iter();
        lanes.all(|lane| lane.0.load(Ordering::SeqCst) == 0)
    }

    /// Lets everybody in again; those who were parked have to be woken.
    pub(super) fn release(&self) {
        self.exclusive.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    };

    use super::*;

    #[test]
    fn who_claims_waits_for_writes_and_keeps_new_ones_out() {
        let gate = Gate::default();
        assert!(gate.enter(0));
        assert!(gate.enter(1));
        assert!(gate.claim());
        assert!(!gate.claim());
        assert!(!gate.is_quiet());
        assert!(!gate.enter(2));
        assert!(gate.leave(0));
        assert!(!gate.is_quiet());
        assert!(gate.leave(1));
        assert!(gate.is_quiet());
        gate.release();
        assert!(gate.enter(2));
        assert!(!gate.leave(2));
    }

    #[test]
    fn nobody_writes_while_another_is_alone() {
        let gate = Arc::new(Gate::default());
        let (inside, alone) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU64::new(0)));
        std::thread::scope(|scope| {
            for worker in 0..3 {
                let (gate, inside) = (Arc::clone(&gate), Arc::clone(&inside));
                scope.spawn(move || {
                    for _ in 0..20_000 {
                        if gate.enter(worker) {
                            inside.fetch_add(1, Ordering::SeqCst);
                            inside.fetch_sub(1, Ordering::SeqCst);
                            gate.leave(worker);
                        }
                    }
                });
            }
            let (gate, inside, alone) =
                (Arc::clone(&gate), Arc::clone(&inside), Arc::clone(&alone));
            scope.spawn(move || {
                for _ in 0..2_000 {
                    if !gate.claim() {
                        continue;
                    }
                    while !gate.is_quiet() {
                        std::thread::yield_now();
                    }
                    assert_eq!(inside.load(Ordering::SeqCst), 0);
                    alone.fetch_add(1, Ordering::SeqCst);
                    gate.release();
                }
            });
        });
        assert_eq!(alone.load(Ordering::SeqCst), 2_000);
    }
}
