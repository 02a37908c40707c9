//! L2 entries in slices that are in memory.

use std::sync::Arc;

use super::{
    Qcow2,
    l2::{Entry, L2Entry, OFFSET_MASK, decode, hex},
};
use crate::{
    Error, Result,
    table::{SliceChange, TableSlice},
};

impl Qcow2 {
    /// What a cluster's entry says.
    pub(super) fn read_entry(&self, slice: &TableSlice, cluster: u64) -> Result<Entry> {
        let index = self.geometry.in_slice(cluster);
        let raw = if self.geometry.extended {
            let (word, bitmap) = slice.get_pair(2 * index);
            L2Entry { word, bitmap }
        } else {
            L2Entry {
                word: slice.get(index),
                bitmap: 0,
            }
        };
        decode(raw, cluster, &self.geometry)
            .map_err(|error| self.in_table(slice, cluster, raw, &error))
    }

    /// An error about an entry with the words that QEMU has for it in front.
    fn in_table(&self, slice: &TableSlice, cluster: u64, raw: L2Entry, error: &Error) -> Error {
        let table = slice.host_offset - self.geometry.slice_offset(cluster);
        let index = cluster & ((1 << self.geometry.l2_bits) - 1);
        let offset = raw.word & OFFSET_MASK;
        let what = if self.geometry.in_cluster(offset) == 0 {
            "Invalid cluster entry found".to_owned()
        } else {
            format!("Cluster allocation offset {} unaligned", hex(offset))
        };
        Error::corrupt(format!(
            "{what} (L2 offset: {}, L2 index: {}) (field {})",
            hex(table),
            hex(index),
            error.message()
        ))
    }

    /// A cluster's entry in a slice that is open for changes, and what it says.
    pub(super) fn read_change(
        &self,
        change: &SliceChange<'_>,
        cluster: u64,
    ) -> Result<(L2Entry, Entry)> {
        let index = self.geometry.in_slice(cluster);
        let raw = if self.geometry.extended {
            let (word, bitmap) = change.get_pair(2 * index);
            L2Entry { word, bitmap }
        } else {
            L2Entry {
                word: change.get(index),
                bitmap: 0,
            }
        };
        Ok((raw, decode(raw, cluster, &self.geometry)?))
    }

    /// Changes a cluster's entry.
    pub(super) fn set_l2_entry(
        &self,
        slice: &Arc<TableSlice>,
        change: &SliceChange<'_>,
        cluster: u64,
        entry: L2Entry,
    ) {
        self.pending.rely();
        self.put_l2_entry(slice, change, cluster, entry);
    }

    /// Changes a cluster's entry to one that may reach the disk before anything else does.
    pub(super) fn put_l2_entry(
        &self,
        slice: &Arc<TableSlice>,
        change: &SliceChange<'_>,
        cluster: u64,
        entry: L2Entry,
    ) {
        let index = self.geometry.in_slice(cluster);
        let became_dirty = if self.geometry.extended {
            change.set_pair(2 * index, (entry.word, entry.bitmap))
        } else {
            change.set(index, entry.word)
        };
        if became_dirty {
            self.pending.add_dirty(slice);
        }
    }
}
