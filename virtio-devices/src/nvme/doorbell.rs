//! Doorbells: what the host wrote last, for the worker of the queue.

use std::sync::atomic::{AtomicU32, Ordering};

/// The doorbells of one queue identifier.
#[derive(Debug, Default)]
struct Pair {
    /// Entries; 0: there is no such queue.
    sq_size: AtomicU32,
    sq_tail: AtomicU32,
    sq_worker: AtomicU32,
    cq_size: AtomicU32,
    cq_head: AtomicU32,
    /// What the worker has posted.
    cq_tail: AtomicU32,
    cq_worker: AtomicU32,
}

/// The doorbells of a controller.
#[derive(Debug)]
pub(super) struct Doorbells(Box<[Pair]>);

/// Which doorbell was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rung {
    /// The tail of a submission queue: its worker has something to do.
    Tail { worker: usize },
    /// The head of a completion queue.
    Head { queue: u16, worker: usize },
    /// There is no such queue.
    NoQueue,
    /// The value is not an entry of the queue.
    BadValue,
}

impl Doorbells {
    pub(super) fn new(queues: u16) -> Self {
        Self((0..queues).map(|_| Pair::default()).collect())
    }

    /// The number of queue identifiers.
    pub(super) fn queues(&self) -> usize {
        self.0.len()
    }

    pub(super) fn open_sq(&self, id: u16, size: u32, worker: usize, tail: u32) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.sq_tail.store(tail, Ordering::Release);
            pair.sq_worker.store(worker as u32, Ordering::Release);
            pair.sq_size.store(size, Ordering::SeqCst);
        }
    }

    pub(super) fn open_cq(&self, id: u16, size: u32, worker: usize, head: u32) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.cq_head.store(head, Ordering::Release);
            pair.cq_tail.store(head, Ordering::Release);
            pair.cq_worker.store(worker as u32, Ordering::Release);
            pair.cq_size.store(size, Ordering::SeqCst);
        }
    }

    pub(super) fn close_sq(&self, id: u16) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.sq_size.store(0, Ordering::SeqCst);
        }
    }

    pub(super) fn close_cq(&self, id: u16) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.cq_size.store(0, Ordering::SeqCst);
        }
    }

    /// The host wrote `value` to the doorbell at `offset` bytes behind the first.
    pub(super) fn ring(&self, offset: u64, value: u32) -> Rung {
        let index = offset / 4;
        let id = usize::try_from(index / 2).unwrap_or(usize::MAX);
        let Some(pair) = self.0.get(id) else {
            return Rung::NoQueue;
        };
        let (size, place, worker) = if index.is_multiple_of(2) {
            (&pair.sq_size, &pair.sq_tail, &pair.sq_worker)
        } else {
            (&pair.cq_size, &pair.cq_head, &pair.cq_worker)
        };
        let size = size.load(Ordering::SeqCst);
        if size == 0 {
            return Rung::NoQueue;
        }
        if value >= size {
            return Rung::BadValue;
        }
        place.store(value, Ordering::SeqCst);
        let worker = worker.load(Ordering::Acquire) as usize;
        if index.is_multiple_of(2) {
            Rung::Tail { worker }
        } else {
            Rung::Head {
                queue: id as u16,
                worker,
            }
        }
    }

    pub(super) fn tail(&self, id: u16) -> u32 {
        self.0
            .get(usize::from(id))
            .map_or(0, |pair| pair.sq_tail.load(Ordering::SeqCst))
    }

    pub(super) fn head(&self, id: u16) -> u32 {
        self.0
            .get(usize::from(id))
            .map_or(0, |pair| pair.cq_head.load(Ordering::SeqCst))
    }

    /// The worker has posted up to `tail`.
    pub(super) fn posted(&self, id: u16, tail: u32) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.cq_tail.store(tail, Ordering::SeqCst);
        }
    }

    /// Takes over a head that came by another way.
    pub(super) fn set_head(&self, id: u16, head: u32) {
        if let Some(pair) = self.0.get(usize::from(id)) {
            pair.cq_head.store(head, Ordering::SeqCst);
        }
    }

    /// Whether the host has taken everything that was posted.
    pub(super) fn is_empty(&self, id: u16) -> bool {
        self.0.get(usize::from(id)).is_none_or(|pair| {
            pair.cq_tail.load(Ordering::SeqCst) == pair.cq_head.load(Ordering::SeqCst)
        })
    }
}

/// Where the shadow doorbells of a controller are (base specification 2.0, 5.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Shadow {
    pub(super) doorbells: u64,
    pub(super) event_index: u64,
}

impl Shadow {
    /// Guest addresses of value and event index of a tail (`false`) or head (`true`).
    pub(super) fn at(&self, queue: u16, head: bool) -> (u64, u64) {
        let offset = u64::from(queue) * 8 + u64::from(head) * 4;
        (self.doorbells + offset, self.event_index + offset)
    }
}
