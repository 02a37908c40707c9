//! Pins: what keeps a freed cluster from being used again while a request may still touch it.
//!
//! Every request pins the epoch of its disk before it looks anything up and unpins when its last
//! host operation has completed. Pinning writes only the queue's own cache line, and only when the
//! queue was idle. A freed cluster is stamped with the epoch that it ends; it may be punched and used
//! again once every queue's oldest pin is younger.
//!
//! The same pins are what [drain](Pins::drain) waits for: with admission closed, no request pins,
//! and the disk is still when none is pinned.

use std::{
    cell::RefCell,
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering, fence},
    },
};

use crate::sync::{Notify, lock};

/// No request of the queue is pinned.
const IDLE: u64 = u64::MAX;

/// The oldest pin of one queue, on a cache line of its own.
#[derive(Debug)]
#[repr(align(128))]
pub(crate) struct PinSlot {
    oldest: AtomicU64,
}

/// The pins of a disk.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    epoch: AtomicU64,
    slots: Mutex<Vec<Arc<PinSlot>>>,
    /// Nested drains that keep admission closed.
    closed: AtomicU32,
    changed: Notify,
}

impl Pins {
    /// A place for a new queue.
    pub(crate) fn register(&self) -> QueuePins {
        let slot = Arc::new(PinSlot {
            oldest: AtomicU64::new(IDLE),
        });
        lock(&self.slots).push(Arc::clone(&slot));
        QueuePins {
            slot,
            pinned: RefCell::new(VecDeque::new()),
        }
    }

    /// Gives a queue's place back; it has no pins.
    pub(crate) fn unregister(&self, queue: &QueuePins) {
        debug_assert!(queue.pinned.borrow().is_empty(), "a queue ended with pins");
        lock(&self.slots).retain(|slot| !Arc::ptr_eq(slot, &queue.slot));
    }

    /// Ends the current epoch. What was unmapped before this call is out of reach once
    /// [`released`](Self::released) says so for the stamp returned.
    pub(crate) fn stamp(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.epoch.fetch_add(1, Ordering::SeqCst)
    }

    /// Stamps up to and excluding this one are out of every request's reach.
    pub(crate) fn released(&self) -> u64 {
        fence(Ordering::SeqCst);
        lock(&self.slots)
            .iter()
            .map(|slot| slot.oldest.load(Ordering::SeqCst))
            .min()
            .unwrap_or(IDLE)
    }

    /// Whether requests may start.
    pub(crate) fn is_open(&self) -> bool {
        self.closed.load(Ordering::SeqCst) == 0
    }

    /// Closes admission and waits until no request is pinned. Admission reopens when the guard is
    /// dropped; drains nest.
    pub(crate) async fn drain(self: &Arc<Self>) -> Drained {
        self.closed.fetch_add(1, Ordering::SeqCst);
        let drained = Drained {
            pins: Arc::clone(self),
        };
        self.changed
            .until(|| (self.released() == IDLE).then_some(()))
            .await;
        drained
    }

    /// Waits until requests may start.
    pub(crate) async fn opened(&self) {
        self.changed.until(|| self.is_open().then_some(())).await;
    }
}

/// The disk is still while this exists.
#[derive(Debug)]
pub(crate) struct Drained {
    pins: Arc<Pins>,
}

impl Drop for Drained {
    fn drop(&mut self) {
        self.pins.closed.fetch_sub(1, Ordering::SeqCst);
        self.pins.changed.notify_all();
    }
}

/// The pins of one queue.
#[derive(Debug)]
pub(crate) struct QueuePins {
    slot: Arc<PinSlot>,
    /// Epochs with requests in flight, oldest first, and how many.
    pinned: RefCell<VecDeque<(u64, u32)>>,
}

/// The epoch that a request pinned.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pin(u64);

impl QueuePins {
    /// Pins the current epoch for a request; `None` while the disk is drained.
    pub(crate) fn pin(&self, pins: &Pins) -> Option<Pin> {
        let epoch = pins.epoch.load(Ordering::Acquire);
        let mut pinned = self.pinned.borrow_mut();
        if pinned.is_empty() {
            self.slot.oldest.store(epoch, Ordering::SeqCst);
        }
        match pinned.back_mut() {
            Some((last, count)) if *last == epoch => *count += 1,
            _ => pinned.push_back((epoch, 1)),
        }
        drop(pinned);
        // The pin is visible before anything is looked up.
        fence(Ordering::SeqCst);
        let pin = Pin(epoch);
        if pins.closed.load(Ordering::Relaxed) != 0 {
            self.unpin(pins, pin);
            return None;
        }
        Some(pin)
    }

    /// Pins what `held`, a pin of this queue, pins: without a fence, because whatever is looked up
    /// under the new pin is looked up under that one, too.
    pub(crate) fn pin_along(&self, held: Pin) -> Pin {
        let mut pinned = self.pinned.borrow_mut();
        let entry = pinned
            .iter_mut()
            .rev()
            .find(|(epoch, _)| *epoch == held.0)
            .expect("the pin that is held");
        entry.1 += 1;
        held
    }

    /// Ends a request's pin.
    pub(crate) fn unpin(&self, pins: &Pins, pin: Pin) {
        let mut pinned = self.pinned.borrow_mut();
        if let Some((epoch, count @ 2..)) = pinned.front_mut()
            && *epoch == pin.0
        {
            *count -= 1;
            return;
        }
        let Some(entry) = pinned.iter_mut().find(|(epoch, _)| *epoch == pin.0) else {
            debug_assert!(false, "unpinned an epoch that was not pinned");
            return;
        };
        entry.1 -= 1;
        let was_front = pinned.front().map(|(epoch, _)| *epoch);
        while pinned.front().is_some_and(|(_, count)| *count == 0) {
            pinned.pop_front();
        }
        let front = pinned.front().map(|(epoch, _)| *epoch);
        if front == was_front {
            return;
        }
        drop(pinned);
        self.slot
            .oldest
            .store(front.unwrap_or(IDLE), Ordering::SeqCst);
        if front.is_none() && pins.closed.load(Ordering::SeqCst) != 0 {
            pins.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_released_only_after_older_pins_end() {
        let pins = Pins::default();
        let queue = pins.register();
        let older = queue.pin(&pins).unwrap();
        let stamp = pins.stamp();
        let younger = queue.pin(&pins).unwrap();
        assert!(pins.released() <= stamp);
        queue.unpin(&pins, younger);
        assert!(pins.released() <= stamp);
        queue.unpin(&pins, older);
        assert!(pins.released() > stamp);
    }

    #[test]
    fn an_older_pin_ending_leaves_the_younger() {
        let pins = Pins::default();
        let queue = pins.register();
        let older = queue.pin(&pins).unwrap();
        let stamp = pins.stamp();
        let younger = queue.pin(&pins).unwrap();
        queue.unpin(&pins, older);
        assert!(pins.released() > stamp);
        assert_ne!(pins.released(), IDLE);
        queue.unpin(&pins, younger);
        assert_eq!(pins.released(), IDLE);
    }

    #[test]
    fn a_pin_along_another_outlives_it() {
        let pins = Pins::default();
        let queue = pins.register();
        let batch = queue.pin(&pins).unwrap();
        let stamp = pins.stamp();
        let other = queue.pin(&pins).unwrap();
        let request = queue.pin_along(batch);
        queue.unpin(&pins, batch);
        queue.unpin(&pins, other);
        assert!(pins.released() <= stamp);
        queue.unpin(&pins, request);
        assert_eq!(pins.released(), IDLE);
    }

    #[test]
    fn nothing_pins_while_drained() {
        let pins = Arc::new(Pins::default());
        let queue = pins.register();
        let mut drain = std::pin::pin!(pins.drain());
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let pin = queue.pin(&pins).unwrap();
        assert!(drain.as_mut().poll(&mut context).is_pending());
        assert!(queue.pin(&pins).is_none());
        queue.unpin(&pins, pin);
        let std::task::Poll::Ready(drained) = drain.as_mut().poll(&mut context) else {
            panic!("drained when the last pin ended");
        };
        assert!(queue.pin(&pins).is_none());
        drop(drained);
        assert!(queue.pin(&pins).is_some());
    }
}
