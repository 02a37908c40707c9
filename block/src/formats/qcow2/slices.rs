//! The shared cache of table slices: bounded, sharded, no lock held across I/O.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
};

use crate::{
    FileId, Result,
    io::{AlignedBuf, Io},
    sync::{Notify, lock},
    table::TableSlice,
};

const SHARDS: usize = 16;

enum Slot {
    Ready(Arc<TableSlice>),
    Loading,
}

#[derive(Default)]
struct Shard {
    slots: HashMap<u64, Slot>,
    /// Keys in the order of the clock hand; retired keys are skipped.
    clock: Vec<u64>,
    hand: usize,
}

/// What to do about a slice that is not in the cache.
pub(super) enum Missing {
    /// The file has it: read it, zeroes past the end of the file if `padded`.
    Read { padded: bool },
}

/// The table slices of one image that are in memory, by host offset.
pub(super) struct SliceCache {
    shards: Vec<Mutex<Shard>>,
    loaded: Notify,
    capacity_per_shard: usize,
}

/// Ends a load, whatever became of it.
struct Load<'a> {
    cache: &'a SliceCache,
    offset: u64,
    slice: Option<Arc<TableSlice>>,
}

impl Drop for Load<'_> {
    fn drop(&mut self) {
        let mut shard = lock(self.cache.shard(self.offset));
        match self.slice.take() {
            Some(slice) => {
                shard.slots.insert(self.offset, Slot::Ready(slice));
                shard.clock.push(self.offset);
            }
            None => {
                shard.slots.remove(&self.offset);
            }
        }
        drop(shard);
        self.cache.loaded.notify_all();
    }
}

impl SliceCache {
    /// A cache of at most `bytes`, in slices of `slice_bytes`.
    pub(super) fn new(bytes: u64, slice_bytes: u64) -> Self {
        let slices = usize::try_from(bytes / slice_bytes).unwrap_or(usize::MAX);
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            loaded: Notify::default(),
            capacity_per_shard: (slices / SHARDS).max(2),
        }
    }

    /// The most slices that may be dirty before they are written.
    pub(super) fn dirty_limit(&self) -> usize {
        (self.capacity_per_shard * SHARDS / 2).max(8)
    }

    fn shard(&self, offset: u64) -> &Mutex<Shard> {
        // Slices are 512 bytes or more apart.
        &self.shards[(offset >> 9).wrapping_mul(0x9e37_79b9_7f4a_7c15) as usize >> 7 & (SHARDS - 1)]
    }

    /// The slice at a host offset, if it is here.
    pub(super) fn get(&self, offset: u64) -> Option<Arc<TableSlice>> {
        match lock(self.shard(offset)).slots.get(&offset) {
            Some(Slot::Ready(slice)) => {
                slice.touch();
                Some(Arc::clone(slice))
            }
            _ => None,
        }
    }

    /// The slice at a host offset, loaded if need be.
    pub(super) async fn get_or_load(
        &self,
        io: &Io,
        file: FileId,
        offset: u64,
        bytes: u64,
        missing: Missing,
    ) -> Result<Arc<TableSlice>> {
        enum Found {
            Slice(Arc<TableSlice>),
            LoadIt,
        }
        let found = self
            .loaded
            .until(|| {
                let mut shard = lock(self.shard(offset));
                match shard.slots.get(&offset) {
                    Some(Slot::Ready(slice)) => {
                        slice.touch();
                        Some(Found::Slice(Arc::clone(slice)))
                    }
                    Some(Slot::Loading) => None,
                    None => {
                        shard.make_room(self.capacity_per_shard);
                        shard.slots.insert(offset, Slot::Loading);
                        Some(Found::LoadIt)
                    }
                }
            })
            .await;
        if let Found::Slice(slice) = found {
            return Ok(slice);
        }
        let mut load = Load {
            cache: self,
            offset,
            slice: None,
        };
        let Missing::Read { padded } = missing;
        let buffer: AlignedBuf = if padded {
            io.read_padded(file, offset, bytes as usize).await?
        } else {
            io.read(file, offset, bytes as usize).await?
        };
        let entries = buffer.chunks_exact(8).map(|entry| {
            u64::from_be_bytes([
                entry[0], entry[1], entry[2], entry[3], entry[4], entry[5], entry[6], entry[7],
            ])
        });
        let slice = Arc::new(TableSlice::new(offset, entries));
        load.slice = Some(Arc::clone(&slice));
        Ok(slice)
    }

    /// Ends the life of the slices between two host offsets: their table moved. Nobody changes them
    /// and none is dirty.
    pub(super) fn retire(&self, start: u64, end: u64) {
        for shard in &self.shards {
            let mut shard = lock(shard);
            shard.slots.retain(|offset, slot| match slot {
                Slot::Ready(slice) if (start..end).contains(offset) => {
                    slice.retire();
                    false
                }
                _ => true,
            });
        }
    }
}

impl Shard {
    /// Evicts slices that the file has, were not used lately and nobody is changing.
    fn make_room(&mut self, capacity: usize) {
        // Two rounds of the clock: the first may only find used ones.
        let mut steps = self.clock.len() * 2;
        while self.slots.len() >= capacity && steps > 0 && !self.clock.is_empty() {
            steps -= 1;
            if self.hand >= self.clock.len() {
                self.hand = 0;
            }
            let offset = self.clock[self.hand];
            let evict = match self.slots.get(&offset) {
                Some(Slot::Ready(slice)) => !slice.take_used() && slice.try_retire(),
                Some(Slot::Loading) => false,
                None => {
                    self.clock.swap_remove(self.hand);
                    continue;
                }
            };
            if evict {
                self.slots.remove(&offset);
                self.clock.swap_remove(self.hand);
            } else {
                self.hand += 1;
            }
        }
    }
}
