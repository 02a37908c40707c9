//! Slices of mapping tables and the small per-queue cache of them.
//!
//! One table slice has one live copy, shared by all queues behind an `Arc`. Entries are atomic: a
//! lookup takes no lock. Changes go through the slice's lock and check the entry again.
//!
//! An entry of two words is read and changed as a pair: the slice counts its changes of pairs, up when
//! one begins and up again when it ended. A reader that finds the count even, and the same before and
//! after it loaded both words, has a pair that was there at one time. Otherwise it looks again, and
//! after a few times asks under the lock, which is only ever held for a few stores.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering, fence},
};

use crate::sync::lock;

/// Whether what a slice says is on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SliceState {
    /// The file has it, durably.
    Clean,
    /// Changed since it was last copied for writing.
    Dirty,
    /// A copy is on its way to the disk and nothing changed since.
    Writing,
}

/// A run of entries of a mapping table, in host byte order.
#[derive(Debug)]
pub(crate) struct TableSlice {
    /// Where the slice is in the image file.
    pub(crate) host_offset: u64,
    entries: Box<[AtomicU64]>,
    /// Changes of pairs begun and ended: odd while one is going on.
    pair_changes: AtomicU32,
    state: AtomicU8,
    retired: AtomicBool,
    used: AtomicBool,
    write_pins: AtomicU32,
    change: Mutex<()>,
}

impl TableSlice {
    /// A slice that the file has as it is.
    pub(crate) fn new(host_offset: u64, entries: impl IntoIterator<Item = u64>) -> Self {
        Self {
            host_offset,
            entries: entries.into_iter().map(AtomicU64::new).collect(),
            pair_changes: AtomicU32::new(0),
            state: AtomicU8::new(SliceState::Clean as u8),
            retired: AtomicBool::new(false),
            used: AtomicBool::new(true),
            write_pins: AtomicU32::new(0),
            change: Mutex::new(()),
        }
    }

    /// The entry at `index`; 0 beyond the end, which no table has a meaning for but "nothing".
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.entries
            .get(index)
            .map_or(0, |entry| entry.load(Ordering::Acquire))
    }

    /// The two words at `index` and behind it, as they were together at one time.
    pub(crate) fn get_pair(&self, index: usize) -> (u64, u64) {
        for _ in 0..PAIR_ATTEMPTS {
            let before = self.pair_changes.load(Ordering::Acquire);
            let pair = (self.get(index), self.get(index + 1));
            // The loads above do not move behind the second look at the count: both are acquiring.
            if before.is_multiple_of(2) && self.pair_changes.load(Ordering::Acquire) == before {
                return pair;
            }
            std::hint::spin_loop();
        }
        let _guard = lock(&self.change);
        (self.get(index), self.get(index + 1))
    }

    /// Opens the slice for changes.
    pub(crate) fn change(&self) -> SliceChange<'_> {
        SliceChange {
            slice: self,
            _guard: lock(&self.change),
        }
    }

    /// Whether what it says is on the disk.
    pub(crate) fn state(&self) -> SliceState {
        match self.state.load(Ordering::Acquire) {
            0 => SliceState::Clean,
            1 => SliceState::Dirty,
            _ => SliceState::Writing,
        }
    }

    /// Copies the entries for writing, big-endian, and starts the state `Writing`.
    pub(crate) fn copy_for_writing(&self) -> Vec<u8> {
        let _guard = lock(&self.change);
        self.state
            .store(SliceState::Writing as u8, Ordering::Release);
        self.entries
            .iter()
            .flat_map(|entry| entry.load(Ordering::Acquire).to_be_bytes())
            .collect()
    }

    /// The copy is durable: clean, unless it changed meanwhile.
    pub(crate) fn written(&self) {
        // A change meanwhile made it dirty again, and then it stays so.
        let _ = self.state.compare_exchange(
            SliceState::Writing as u8,
            SliceState::Clean as u8,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
    }

    /// Writing failed: dirty again. Returns whether the caller must list it as dirty.
    pub(crate) fn write_failed(&self) -> bool {
        self.state
            .compare_exchange(
                SliceState::Writing as u8,
                SliceState::Dirty as u8,
                Ordering::AcqRel,
                Ordering::Acquire,
            )
            .is_ok()
    }

    /// Ends its life: queues that still hold it look it up again. The caller made sure that nobody
    /// is going to change it.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::SeqCst);
    }

    /// Ends its life if the file has what it says and nobody is going to change it.
    pub(crate) fn try_retire(&self) -> bool {
        // A pinner counts first and looks at `retired` then; here it is the other way round.
        self.retired.store(true, Ordering::SeqCst);
        let idle = self.write_pins.load(Ordering::SeqCst) == 0 && self.state() == SliceState::Clean;
        if !idle {
            self.retired.store(false, Ordering::SeqCst);
        }
        idle
    }

    /// Keeps the slice alive for a change; `None` when its life just ended.
    pub(crate) fn write_pin(self: &Arc<Self>) -> Option<WritePin> {
        self.write_pins.fetch_add(1, Ordering::SeqCst);
        let pin = WritePin(Arc::clone(self));
        (!self.retired.load(Ordering::SeqCst)).then_some(pin)
    }

    /// Whether its life ended.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Notes that it was used lately.
    pub(crate) fn touch(&self) {
        // Most touches find it set: no shared write then.
        if !self.used.load(Ordering::Relaxed) {
            self.used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it was used since this was last asked.
    pub(crate) fn take_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }
}

/// A slice that stays alive while it is being changed.
#[derive(Debug)]
pub(crate) struct WritePin(Arc<TableSlice>);

impl std::ops::Deref for WritePin {
    type Target = Arc<TableSlice>;

    fn deref(&self) -> &Arc<TableSlice> {
        &self.0
    }
}

impl Drop for WritePin {
    fn drop(&mut self) {
        self.0.write_pins.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A slice opened for changes.
pub(crate) struct SliceChange<'a> {
    slice: &'a TableSlice,
    _guard: MutexGuard<'a, ()>,
}

impl SliceChange<'_> {
    /// The entry at `index`.
    pub(crate) fn get(&self, index: usize) -> u64 {
        self.slice.get(index)
    }

    /// The two words at `index` and behind it. Nobody else changes them meanwhile.
    pub(crate) fn get_pair(&self, index: usize) -> (u64, u64) {
        (self.slice.get(index), self.slice.get(index + 1))
    }

    /// Changes an entry of two words. Returns what [`set`](Self::set) returns.
    #[must_use]
    pub(crate) fn set_pair(&self, index: usize, (first, second): (u64, u64)) -> bool {
        let changes = &self.slice.pair_changes;
        let begun = changes.load(Ordering::Relaxed).wrapping_add(1);
        changes.store(begun, Ordering::Relaxed);
        // Whoever sees one of the new words sees that a change began.
        fence(Ordering::Release);
        let became_dirty = self.set(index, first);
        let dirty_again = self.set(index + 1, second);
        debug_assert!(!dirty_again, "dirty since the first word");
        changes.store(begun.wrapping_add(1), Ordering::Release);
        became_dirty
    }

    /// Changes an entry. Returns whether the slice just became dirty: the caller lists it then.
    #[must_use]
    pub(crate) fn set(&self, index: usize, value: u64) -> bool {
        if let Some(entry) = self.slice.entries.get(index) {
            entry.store(value, Ordering::Release);
        }
        self.slice
            .state
            .swap(SliceState::Dirty as u8, Ordering::AcqRel)
            != SliceState::Dirty as u8
    }
}

/// Lookups of a pair that is being changed before the reader takes the lock.
const PAIR_ATTEMPTS: u32 = 8;

/// What a queue's cache knows a slice by: the image and the slice's number in guest order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MapKey {
    /// The image, unique in the process.
    pub(crate) image: u32,
    /// The slice.
    pub(crate) slice: u64,
}

/// Places of a queue's cache; a power of two.
const PLACES: usize = 512;

type Place = Option<(MapKey, Arc<TableSlice>)>;

/// A small direct-mapped cache of table slices that belongs to one queue: a hit touches no shared
/// lock or count.
#[derive(Debug)]
pub struct MapCache {
    places: Box<[Place]>,
}

impl Default for MapCache {
    fn default() -> Self {
        Self {
            places: (0..PLACES).map(|_| None).collect(),
        }
    }
}

impl MapCache {
    fn place(key: MapKey) -> usize {
        // Neighbouring slices get neighbouring places; images are spread by an odd factor.
        (key.slice as usize).wrapping_add((key.image as usize).wrapping_mul(0x9e37)) & (PLACES - 1)
    }

    /// The slice, if it is here and still alive.
    pub(crate) fn get(&self, key: MapKey) -> Option<&Arc<TableSlice>> {
        match &self.places[Self::place(key)] {
            Some((found, slice)) if *found == key && !slice.is_retired() => Some(slice),
            _ => None,
        }
    }

    /// Remembers a slice, forgetting another that had its place.
    pub(crate) fn put(&mut self, key: MapKey, slice: &Arc<TableSlice>) -> &Arc<TableSlice> {
        let (_, slice) = self.places[Self::place(key)].insert((key, Arc::clone(slice)));
        slice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_while_writing_stays_dirty() {
        let slice = TableSlice::new(0, [1, 2]);
        assert!(slice.change().set(0, 7));
        assert!(!slice.change().set(1, 8));
        assert_eq!(slice.copy_for_writing()[7], 7);
        assert!(slice.change().set(1, 9));
        slice.written();
        assert_eq!(slice.state(), SliceState::Dirty);
        let _ = slice.copy_for_writing();
        slice.written();
        assert_eq!(slice.state(), SliceState::Clean);
    }

    #[test]
    fn pairs_are_never_seen_by_half() {
        let slice = Arc::new(TableSlice::new(0, [0; 64]));
        let writer = {
            let slice = Arc::clone(&slice);
            std::thread::spawn(move || {
                for value in 1..50_000 {
                    let _ = slice.change().set_pair(6, (value, value << 20));
                }
            })
        };
        while !writer.is_finished() {
            let (first, second) = slice.get_pair(6);
            assert_eq!(first << 20, second);
        }
        writer.join().unwrap();
        assert_eq!(slice.get_pair(6), (49_999, 49_999 << 20));
    }

    #[test]
    fn a_retired_slice_is_not_found() {
        let mut cache = MapCache::default();
        let key = MapKey { image: 1, slice: 5 };
        let slice = Arc::new(TableSlice::new(0, [0]));
        cache.put(key, &slice);
        assert!(cache.get(key).is_some());
        assert!(cache.get(MapKey { image: 2, slice: 5 }).is_none());
        slice.retire();
        assert!(cache.get(key).is_none());
    }
}
