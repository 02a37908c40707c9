//! The range table of a file with direct I/O: a read-modify-write of a host block excludes every
//! other write to it, from any queue.

use std::sync::Mutex;

use crate::sync::{Notify, lock};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    start: u64,
    end: u64,
    exclusive: bool,
}

#[derive(Debug, Default)]
struct State {
    held: Vec<Held>,
    /// Somebody was refused since waiters were last woken.
    refused: bool,
}

/// Writes in flight on one file, by host block.
#[derive(Debug, Default)]
pub(crate) struct RangeTable {
    state: Mutex<State>,
    changed: Notify,
}

/// A range held until this is dropped.
pub(crate) struct RangeGuard<'a> {
    table: &'a RangeTable,
    held: Held,
}

impl RangeTable {
    fn try_hold(&self, held: Held) -> bool {
        let mut state = lock(&self.state);
        let conflict = state.held.iter().any(|other| {
            (other.exclusive || held.exclusive) && other.start < held.end && held.start < other.end
        });
        if conflict {
            state.refused = true;
        } else {
            state.held.push(held);
        }
        !conflict
    }

    /// Enters a plain write, if no read-modify-write is going on there.
    pub(crate) fn try_enter(&self, start: u64, end: u64) -> bool {
        self.try_hold(Held {
            start,
            end,
            exclusive: false,
        })
    }

    /// Leaves what [`try_enter`](Self::try_enter) entered.
    pub(crate) fn leave(&self, start: u64, end: u64) {
        self.release(Held {
            start,
            end,
            exclusive: false,
        });
    }

    fn release(&self, held: Held) {
        let mut state = lock(&self.state);
        let place = state.held.iter().position(|other| *other == held);
        debug_assert!(place.is_some(), "left a range that was not entered");
        if let Some(place) = place {
            state.held.swap_remove(place);
        }
        // Who waits was refused after it was listed: either that is seen here, or it came later and
        // saw that this range is gone.
        let refused = std::mem::take(&mut state.refused);
        drop(state);
        if refused {
            self.changed.notify_all();
        }
    }

    /// Waits for the range and holds it. `start` and `end` are multiples of the host block.
    pub(crate) async fn hold(&self, start: u64, end: u64, exclusive: bool) -> RangeGuard<'_> {
        let held = Held {
            start,
            end,
            exclusive,
        };
        self.changed
            .until(|| self.try_hold(held).then_some(()))
            .await;
        RangeGuard { table: self, held }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        self.table.release(self.held);
    }
}
