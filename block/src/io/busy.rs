//! Requests in flight on the queues of a thread: a blocking call that would wait for them, on the
//! thread that has to move them on, is refused.

use std::{
    cell::{Cell, RefCell},
    rc::{Rc, Weak},
};

thread_local! {
    /// The queues of this thread: disk and requests in flight.
    static QUEUES: RefCell<Vec<(u64, Weak<Cell<usize>>)>> = const { RefCell::new(Vec::new()) };
}

/// The number of requests in flight on one queue.
#[derive(Debug)]
pub(crate) struct InFlight(Rc<Cell<usize>>);

impl InFlight {
    /// The counter of a new queue of the calling thread.
    pub(crate) fn register(disk: u64) -> Self {
        let count = Rc::new(Cell::new(0));
        QUEUES.with_borrow_mut(|queues| {
            queues.retain(|(_, queue)| queue.strong_count() > 0);
            queues.push((disk, Rc::downgrade(&count)));
        });
        Self(count)
    }

    pub(crate) fn get(&self) -> usize {
        self.0.get()
    }

    pub(crate) fn add(&self, requests: usize) {
        self.0.set(self.0.get() + requests);
    }

    pub(crate) fn remove(&self, requests: usize) {
        debug_assert!(requests <= self.0.get(), "more requests ended than started");
        self.0.set(self.0.get().saturating_sub(requests));
    }
}

/// Whether this thread has requests in flight on the disk.
pub(crate) fn thread_is_busy_with(disk: u64) -> bool {
    QUEUES.with_borrow(|queues| {
        queues
            .iter()
            .filter(|(other, _)| *other == disk)
            .filter_map(|(_, queue)| queue.upgrade())
            .any(|count| count.get() > 0)
    })
}
