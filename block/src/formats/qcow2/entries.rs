//! L2 entries in slices that are in memory.

use std::sync::Arc;

use super::{
    Qcow2,
    l2::{Entry, L2Entry, decode},
};
use crate::{
    Result,
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
