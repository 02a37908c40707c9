//! Doorbells: what the host wrote last, for the worker of the queue.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU32, Ordering},
};

/// Doorbells in memory, which a driver writes without telling anybody: [`NvmeController::poll_doorbells`]
/// looks at them.
///
/// [`NvmeController::poll_doorbells`]: super::NvmeController::poll_doorbells
pub trait DoorbellPage: Send + Sync {
    /// The doorbell `index`, counted in dwords from the first, as it is now. It is called at every look.
    fn load(&self, index: usize) -> u32;

    /// Sets a doorbell: its queue is new.
    fn store(&self, index: usize, value: u32);
}

/// Doorbells in memory, and what was found there last.
struct Watched {
    page: Arc<dyn DoorbellPage>,
    seen: Vec<u32>,
}

impl Watched {
    fn set(&mut self, index: usize, value: u32) {
        self.page.store(index, value);
        self.seen[index] = value;
    }
}

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
pub(super) struct Doorbells {
    pairs: Box<[Pair]>,
    /// Also held while a queue is opened, so that no look takes an old value for a new queue's.
    watched: Mutex<Option<Watched>>,
}

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
        Self {
            pairs: (0..queues).map(|_| Pair::default()).collect(),
            watched: Mutex::default(),
        }
    }

    fn watched(&self) -> MutexGuard<'_, Option<Watched>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Doorbells are written to `page` as well from now on.
    pub(super) fn watch(&self, page: Arc<dyn DoorbellPage>) {
        let seen = vec![0; 2 * self.pairs.len()];
        *self.watched() = Some(Watched { page, seen });
    }

    pub(super) fn unwatch(&self) {
        *self.watched() = None;
    }

    /// Calls `ring` for every doorbell in memory that has changed, with its place in bytes behind the
    /// first and its value; returns whether there were any.
    pub(super) fn look(&self, mut ring: impl FnMut(u64, u32)) -> bool {
        let mut watched = self.watched();
        let Some(watched) = &mut *watched else {
            return false;
        };
        let mut any = false;
        for (id, pair) in self.pairs.iter().enumerate() {
            for (half, size) in [&pair.sq_size, &pair.cq_size].into_iter().enumerate() {
                if size.load(Ordering::SeqCst) == 0 {
                    continue;
                }
                let index = 2 * id + half;
                let value = watched.page.load(index);
                if value != watched.seen[index] {
                    watched.seen[index] = value;
                    any = true;
                    ring(4 * index as u64, value);
                }
            }
        }
        any
    }

    /// The number of queue identifiers.
    pub(super) fn queues(&self) -> usize {
        self.pairs.len()
    }

    pub(super) fn open_sq(&self, id: u16, size: u32, worker: usize, tail: u32) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            let mut watched = self.watched();
            if let Some(watched) = &mut *watched {
                watched.set(2 * usize::from(id), tail);
            }
            pair.sq_tail.store(tail, Ordering::Release);
            pair.sq_worker.store(worker as u32, Ordering::Release);
            pair.sq_size.store(size, Ordering::SeqCst);
        }
    }

    pub(super) fn open_cq(&self, id: u16, size: u32, worker: usize, head: u32) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            let mut watched = self.watched();
            if let Some(watched) = &mut *watched {
                watched.set(2 * usize::from(id) + 1, head);
            }
            pair.cq_head.store(head, Ordering::Release);
            pair.cq_tail.store(head, Ordering::Release);
            pair.cq_worker.store(worker as u32, Ordering::Release);
            pair.cq_size.store(size, Ordering::SeqCst);
        }
    }

    pub(super) fn close_sq(&self, id: u16) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            pair.sq_size.store(0, Ordering::SeqCst);
        }
    }

    pub(super) fn close_cq(&self, id: u16) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            pair.cq_size.store(0, Ordering::SeqCst);
        }
    }

    /// The host wrote `value` to the doorbell at `offset` bytes behind the first.
    pub(super) fn ring(&self, offset: u64, value: u32) -> Rung {
        let index = offset / 4;
        let id = usize::try_from(index / 2).unwrap_or(usize::MAX);
        let Some(pair) = self.pairs.get(id) else {
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
        self.pairs
            .get(usize::from(id))
            .map_or(0, |pair| pair.sq_tail.load(Ordering::SeqCst))
    }

    pub(super) fn head(&self, id: u16) -> u32 {
        self.pairs
            .get(usize::from(id))
            .map_or(0, |pair| pair.cq_head.load(Ordering::SeqCst))
    }

    /// The worker has posted up to `tail`.
    pub(super) fn posted(&self, id: u16, tail: u32) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            pair.cq_tail.store(tail, Ordering::SeqCst);
        }
    }

    /// Takes over a head that came by another way.
    pub(super) fn set_head(&self, id: u16, head: u32) {
        if let Some(pair) = self.pairs.get(usize::from(id)) {
            pair.cq_head.store(head, Ordering::SeqCst);
        }
    }

    /// Whether the host has taken everything that was posted.
    pub(super) fn is_empty(&self, id: u16) -> bool {
        self.pairs.get(usize::from(id)).is_none_or(|pair| {
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
    /// Whether both begin with a page: so they have to, and so nothing behind them is beyond the end of
    /// all addresses.
    pub(super) fn is_aligned(&self) -> bool {
        self.doorbells.is_multiple_of(4096) && self.event_index.is_multiple_of(4096)
    }

    /// Guest addresses of value and event index of a tail (`false`) or head (`true`).
    pub(super) fn at(&self, queue: u16, head: bool) -> (u64, u64) {
        let offset = u64::from(queue) * 8 + u64::from(head) * 4;
        (self.doorbells + offset, self.event_index + offset)
    }
}
