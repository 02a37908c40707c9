//! Where synchronous writes wait until a test lets them through.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Inside {
    closed: bool,
    /// Writes that may pass all the same.
    permits: usize,
    waiting: usize,
}

/// A gate, open at first.
#[derive(Debug, Default)]
pub(super) struct Gate {
    inside: Mutex<Inside>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it may go on.
    pub(super) fn pass(&self) {
        let mut inside = self.lock();
        inside.waiting += 1;
        while inside.closed && inside.permits == 0 {
            inside = self
                .changed
                .wait(inside)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inside.waiting -= 1;
        inside.permits = inside.permits.saturating_sub(1);
    }

    pub(super) fn close(&self, closed: bool) {
        let mut inside = self.lock();
        (inside.closed, inside.permits) = (closed, 0);
        self.changed.notify_all();
    }

    pub(super) fn permit(&self, writes: usize) {
        self.lock().permits += writes;
        self.changed.notify_all();
    }

    pub(super) fn waiting(&self) -> usize {
        self.lock().waiting
    }
}
