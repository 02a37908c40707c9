//! The active L1 table and the way from a guest cluster to its slice.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use super::{
    Qcow2,
    l2::{COPIED, OFFSET_MASK, hex},
    overlap::Metadata,
    refcount::Run,
    slices::Missing,
};
use crate::{
    Error, Result,
    io::{AlignedBuf, Io},
    table::{TableSlice, WritePin},
};

/// Entries of an L1 slice: the table is paged like any other, so that opening an image does not
/// read it.
const L1_SLICE_ENTRIES: u64 = 512;

/// Where the active L1 table is.
#[derive(Debug)]
pub(super) struct L1 {
    offset: AtomicU64,
    entries: AtomicU32,
}

impl L1 {
    pub(super) fn new(offset: u64, entries: u32) -> Self {
        Self {
            offset: AtomicU64::new(offset),
            entries: AtomicU32::new(entries),
        }
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset.load(Ordering::Acquire)
    }

    pub(super) fn entries(&self) -> u64 {
        u64::from(self.entries.load(Ordering::Acquire))
    }

    /// The table moved, or its size changed. The disk is drained.
    pub(super) fn set(&self, offset: u64, entries: u32) {
        self.offset.store(offset, Ordering::Release);
        self.entries.store(entries, Ordering::Release);
    }

    /// Where the slice with an entry is, and its bytes.
    fn slice(&self, index: u64) -> (u64, u64) {
        let first = index / L1_SLICE_ENTRIES * L1_SLICE_ENTRIES;
        let entries = (self.entries() - first.min(self.entries())).min(L1_SLICE_ENTRIES);
        (self.offset() + first * 8, entries * 8)
    }
}

/// The place of an L1 entry in its slice.
fn in_l1_slice(index: u64) -> usize {
    (index % L1_SLICE_ENTRIES) as usize
}

/// What an L1 entry says: where the L2 table is, and whether it is ours alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L1Entry {
    pub(super) table: u64,
    pub(super) copied: bool,
}

impl Qcow2 {
    /// Reads an L1 entry; `None` when there is no L2 table.
    fn decode_l1(&self, raw: u64, index: u64) -> Result<Option<L1Entry>> {
        let table = raw & OFFSET_MASK;
        if table == 0 {
            return Ok(None);
        }
        if self.geometry.in_cluster(table) != 0 {
            return Err(Error::corrupt(format!(
                "L2 table offset {} unaligned (L1 index: {}) (field L1 entry {index}: value \
                 {raw:#018x}, expected a table on a cluster boundary)",
                hex(table),
                hex(index)
            )));
        }
        Ok(Some(L1Entry {
            table,
            copied: raw & COPIED != 0,
        }))
    }

    /// The L1 entry for a guest cluster, if its slice is in memory: `None` when it is not.
    pub(super) fn cached_l1(&self, cluster: u64) -> Result<Option<Option<L1Entry>>> {
        let index = self.geometry.l1_index(cluster);
        if index >= self.l1.entries() {
            return Ok(Some(None));
        }
        let (offset, _) = self.l1.slice(index);
        let Some(slice) = self.slices.get(offset) else {
            return Ok(None);
        };
        let raw = slice.get(in_l1_slice(index));
        Ok(Some(self.decode_l1(raw, index)?))
    }

    async fn l1_slice(&self, io: &Io, index: u64) -> Result<Arc<TableSlice>> {
        let (offset, bytes) = self.l1.slice(index);
        // An image that was just made may end inside its L1 table.
        let missing = Missing::Read { padded: true };
        self.slices
            .get_or_load(io, self.file, offset, bytes, missing)
            .await
    }

    /// The L1 entry for a guest cluster.
    pub(super) async fn l1_entry(&self, io: &Io, cluster: u64) -> Result<Option<L1Entry>> {
        let index = self.geometry.l1_index(cluster);
        if index >= self.l1.entries() {
            return Ok(None);
        }
        let raw = self.l1_slice(io, index).await?.get(in_l1_slice(index));
        self.decode_l1(raw, index)
    }

    /// The slice with a cluster's L2 entry; `None` when there is no L2 table. Remembered in the
    /// queue's own cache.
    pub(super) async fn l2_slice(&self, io: &Io, cluster: u64) -> Result<Option<Arc<TableSlice>>> {
        let mut entry = self.l1_entry(io, cluster).await?;
        while let Some(found) = entry {
            let slice = self.load_slice(io, found.table, cluster).await?;
            // A writer may have taken a copy of a shared table meanwhile: this one is not ours any
            // more, and nobody would tell.
            entry = self.l1_entry(io, cluster).await?;
            if entry == Some(found) {
                io.cache.borrow_mut().put(self.map_key(cluster), &slice);
                return Ok(Some(slice));
            }
        }
        Ok(None)
    }

    async fn load_slice(&self, io: &Io, table: u64, cluster: u64) -> Result<Arc<TableSlice>> {
        let offset = table + self.geometry.slice_offset(cluster);
        let bytes = self.geometry.slice_bytes();
        let missing = Missing::Read { padded: false };
        self.slices
            .get_or_load(io, self.file, offset, bytes, missing)
            .await
            .map_err(|error| {
                let message = format!("L2 table at {table:#x} for guest cluster {cluster}");
                Error::of_table(message, error)
            })
    }

    /// The slice with a cluster's L2 entry, pinned for a change, in a table that is ours alone: an
    /// L2 table is made, or copied from one that a snapshot shares, as needed.
    pub(super) async fn l2_slice_for_change(&self, io: &Io, cluster: u64) -> Result<WritePin> {
        loop {
            let entry = match self.l1_entry(io, cluster).await? {
                Some(entry) if entry.copied => entry,
                _ => self.own_l2_table(io, cluster).await?,
            };
            self.check_table(entry.table, Metadata::ActiveL2)?;
            let slice = self.load_slice(io, entry.table, cluster).await?;
            if let Some(pin) = slice.write_pin() {
                io.cache.borrow_mut().put(self.map_key(cluster), &slice);
                return Ok(pin);
            }
            // Evicted between the two: load it again.
        }
    }

    /// Makes the L2 table for a cluster ours alone.
    async fn own_l2_table(&self, io: &Io, cluster: u64) -> Result<L1Entry> {
        let index = self.geometry.l1_index(cluster);
        if index >= self.l1.entries() {
            return Err(Error::corrupt(format!(
                "L1 table: {} entries, expected more than {index} for guest cluster {cluster}",
                self.l1.entries()
            )));
        }
        let _claim = self.l1_claims.claim(index, index + 1).await;
        let before = self.l1_entry(io, cluster).await?;
        if let Some(entry) = before
            && entry.copied
        {
            return Ok(entry);
        }
        let run = self.allocate(io, "L2 table", 1, true).await?;
        let filled = self.fill_l2_table(io, run, before).await;
        if let Err(error) = filled {
            self.refcounts.release(io, run.first, run.count).await?;
            return Err(error);
        }
        let table = self.geometry.start(run.first);
        let slice = loop {
            let slice = self.l1_slice(io, index).await?;
            if let Some(pin) = slice.write_pin() {
                break pin;
            }
        };
        let entry = L1Entry {
            table,
            copied: true,
        };
        let change = slice.change();
        self.set_entry(&slice, &change, in_l1_slice(index), table | COPIED);
        self.pending.l1_changed();
        drop(change);
        self.added_table(run.first, Metadata::ActiveL2);
        if let Some(old) = before {
            let size = self.geometry.cluster_size();
            self.overlap
                .remove(old.table >> self.geometry.cluster_bits, Metadata::ActiveL2);
            self.slices.retire(old.table, old.table + size);
            self.pending
                .free_table(old.table >> self.geometry.cluster_bits);
        }
        Ok(entry)
    }

    /// Writes the first content of a new L2 table: that of the shared one, or nothing. It is in
    /// the file before the sync that precedes the L1 entry.
    async fn fill_l2_table(&self, io: &Io, run: Run, before: Option<L1Entry>) -> Result<()> {
        let size = self.geometry.cluster_size() as usize;
        let content = match before {
            // Nobody changes a shared table, so the file has what it says, unless it was shared
            // just now: then its slices were flushed first.
            Some(old) => io.read(self.file, old.table, size).await?,
            None => AlignedBuf::zeroed(size),
        };
        let offset = self.geometry.start(run.first);
        io.write(self.file, offset, content).await.map(drop)
    }
}
