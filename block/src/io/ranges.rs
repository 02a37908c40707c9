//! The range table of a file with direct I/O: a read-modify-write of a host block excludes every
//! other write to it, from any queue.
//!
//! Every direct write enters, so the table is cut into shards by the place in the file: writes to different places
//! rarely meet at a lock, and compare themselves with few others.

use std::sync::{Mutex, MutexGuard};

use smallvec::SmallVec;

use crate::sync::{Notify, lock};

/// Bytes in a row that share a shard, and the number of shards.
const REGION: u64 = 1 << 20;
const SHARDS: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    start: u64,
    end: u64,
    exclusive: bool,
}

impl Held {
    fn conflicts(&self, other: &Self) -> bool {
        (self.exclusive || other.exclusive) && other.start < self.end && self.start < other.end
    }

    /// Its shards, in ascending order, so that who locks several never waits in a circle.
    fn shards(&self) -> impl Iterator<Item = usize> {
        let first = self.start / REGION;
        let last = self.end.saturating_sub(1).max(self.start) / REGION;
        let count = (last - first).saturating_add(1).min(SHARDS as u64) as usize;
        let from = (first % SHARDS as u64) as usize;
        let wrapped = (from + count).saturating_sub(SHARDS);
        (0..wrapped).chain(from..(from + count).min(SHARDS))
    }
}

/// The ranges of one shard; a range that lies in several is in each.
#[derive(Debug, Default)]
struct Shard {
    held: Vec<Held>,
    /// Somebody was refused since waiters were last woken.
    refused: bool,
}

/// Writes in flight on one file, by host block.
#[derive(Debug)]
pub(crate) struct RangeTable {
    shards: Box<[Mutex<Shard>]>,
    changed: Notify,
}

impl Default for RangeTable {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            changed: Notify::default(),
        }
    }
}

/// A range held until this is dropped.
pub(crate) struct RangeGuard<'a> {
    table: &'a RangeTable,
    held: Held,
}

impl RangeTable {
    fn try_hold(&self, held: Held) -> bool {
        let mut shards: SmallVec<[MutexGuard<'_, Shard>; 2]> = held
            .shards()
            .map(|number| lock(&self.shards[number]))
            .collect();
        let conflict = shards
            .iter()
            .any(|shard| shard.held.iter().any(|other| held.conflicts(other)));
        for shard in &mut shards {
            if conflict {
                shard.refused = true;
            } else {
                shard.held.push(held);
            }
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
        let mut refused = false;
        for number in held.shards() {
            let mut shard = lock(&self.shards[number]);
            let place = shard.held.iter().position(|other| *other == held);
            debug_assert!(place.is_some(), "left a range that was not entered");
            if let Some(place) = place {
                shard.held.swap_remove(place);
            }
            // Who waits was refused after it was listed: either that is seen here, or it came later and
            // saw that this range is gone from this shard.
            refused |= std::mem::take(&mut shard.refused);
        }
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

#[cfg(test)]
mod tests {
    use std::{future::Future, pin::pin, task};

    use super::*;

    fn shards(start: u64, end: u64) -> Vec<usize> {
        let exclusive = false;
        let held = Held {
            start,
            end,
            exclusive,
        };
        held.shards().collect()
    }

    #[test]
    fn shards_are_found_in_order_and_once() {
        assert_eq!(shards(0, 4096), [0]);
        assert_eq!(shards(REGION - 512, REGION + 512), [0, 1]);
        assert_eq!(shards(65 * REGION, 66 * REGION), [1]);
        assert_eq!(shards(63 * REGION, 66 * REGION), [0, 1, 63]);
        let all: Vec<usize> = (0..SHARDS).collect();
        assert_eq!(shards(5, 5 + 63 * REGION), all);
        assert_eq!(shards(7 * REGION, 7 * REGION + (1 << 40)), all);
        assert_eq!(shards(u64::MAX - 1, u64::MAX), [63]);
        assert_eq!(shards(4096, 4096), [0], "nothing is somewhere");
    }

    #[test]
    fn plain_writes_meet_and_exclusive_ones_do_not() {
        let table = RangeTable::default();
        let long = (REGION / 2, 3 * REGION);
        assert!(table.try_enter(long.0, long.1));
        assert!(table.try_enter(2 * REGION, 2 * REGION + 4096));
        let mut context = task::Context::from_waker(task::Waker::noop());
        {
            // It lies in the last of three shards, and waits for both.
            let mut exclusive = pin!(table.hold(2 * REGION, 2 * REGION + 512, true));
            assert!(exclusive.as_mut().poll(&mut context).is_pending());
            table.leave(2 * REGION, 2 * REGION + 4096);
            assert!(exclusive.as_mut().poll(&mut context).is_pending());
            table.leave(long.0, long.1);
            let task::Poll::Ready(guard) = exclusive.as_mut().poll(&mut context) else {
                panic!("nobody else is there");
            };
            assert!(!table.try_enter(long.0, long.1));
            assert!(table.try_enter(long.0, 2 * REGION), "what lies before it");
            table.leave(long.0, 2 * REGION);
            drop(guard);
        }
        assert!(table.try_enter(long.0, long.1));
        table.leave(long.0, long.1);
        let empty = |shard: &Mutex<Shard>| lock(shard).held.is_empty();
        assert!(table.shards.iter().all(empty));
    }
}
