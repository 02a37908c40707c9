//! The metadata overlap check: nothing is written to a cluster of the image that is known to be
//! something else.
//!
//! An image whose reference counts or mappings lie can hand out a table's cluster for data. So every
//! cluster that is allocated, every table that is about to change and every place of guest data is looked
//! up among the clusters of the header, the tables of the disk and of its snapshots, and the reference
//! counts: QEMU's categories, and by default all but the L2 tables of snapshots, as there. A small filter of
//! bits answers "certainly not" without a lock, which is what a write in place asks.
//!
//! The set is built with the first change of the image, and anew when a table moved.

use std::{
    collections::HashMap,
    sync::{
        Mutex, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    Qcow2,
    header::{Header, MAX_L1_SIZE},
    refcount::Run,
};
use crate::{Error, ErrorKind, Result, io::Io, options::OverlapChecks, sync::lock};

/// What a cluster of metadata is, in the order in which QEMU names one of several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Metadata {
    Header,
    ActiveL1,
    ActiveL2,
    RefcountBlock,
    RefcountTable,
    SnapshotTable,
    InactiveL1,
    InactiveL2,
    BitmapDirectory,
}

impl Metadata {
    const ALL: [Self; 9] = [
        Self::Header,
        Self::ActiveL1,
        Self::ActiveL2,
        Self::RefcountBlock,
        Self::RefcountTable,
        Self::SnapshotTable,
        Self::InactiveL1,
        Self::InactiveL2,
        Self::BitmapDirectory,
    ];

    fn bit(self) -> u16 {
        1 << self as u8
    }

    fn name(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::ActiveL1 => "active L1 table",
            Self::ActiveL2 => "active L2 table",
            Self::RefcountBlock => "refcount block",
            Self::RefcountTable => "refcount table",
            Self::SnapshotTable => "snapshot table",
            Self::InactiveL1 => "inactive L1 table",
            Self::InactiveL2 => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
        }
    }
}

/// The bits of an L1 entry that are the offset of an L2 table.
const TABLE_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of the filter for each cluster that is known when it is made, and at least.
const FILTER_BITS: u64 = 16;
const MIN_FILTER_BITS: u64 = 1 << 16;

/// Most clusters of L1 tables of snapshots.
const MAX_INACTIVE_CLUSTERS: u64 = 1 << 22;

/// Where the tables are that have one place each: when it changes, the set is built anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Places {
    l1: u64,
    refcount_table: u64,
    snapshots: u64,
    bitmaps: u64,
}

#[derive(Debug, Default)]
struct Known {
    built_for: Option<Places>,
    clusters: HashMap<u64, u16>,
}

/// The clusters of an image that are metadata.
#[derive(Debug, Default)]
pub(super) struct Overlap {
    /// What is checked.
    mask: u16,
    filter: OnceLock<Box<[AtomicU64]>>,
    known: Mutex<Known>,
}

impl Overlap {
    /// Checks for these kinds of metadata.
    pub(super) fn new(checks: OverlapChecks) -> Self {
        let wanted = |kind: &Metadata| match kind {
            Metadata::Header => checks.main_header,
            Metadata::ActiveL1 => checks.active_l1,
            Metadata::ActiveL2 => checks.active_l2,
            Metadata::RefcountBlock => checks.refcount_block,
            Metadata::RefcountTable => checks.refcount_table,
            Metadata::SnapshotTable => checks.snapshot_table,
            Metadata::InactiveL1 => checks.inactive_l1,
            Metadata::InactiveL2 => checks.inactive_l2,
            Metadata::BitmapDirectory => checks.bitmap_directory,
        };
        let kinds = Metadata::ALL.iter().filter(|kind| wanted(kind));
        Self {
            mask: kinds.fold(0, |mask, kind| mask | kind.bit()),
            ..Self::default()
        }
    }

    /// Whether that kind is checked.
    fn checks(&self, kind: Metadata) -> bool {
        self.mask & kind.bit() != 0
    }

    /// The word and bit of the filter for a cluster.
    fn place(filter: &[AtomicU64], cluster: u64) -> (&AtomicU64, u64) {
        let hash = cluster.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        // A power of two of words.
        let word = (hash >> 6) as usize & (filter.len() - 1);
        (&filter[word], 1 << (hash & 63))
    }

    fn add(&self, first: u64, count: u64, kind: Metadata) {
        let mut known = lock(&self.known);
        for cluster in first..first.saturating_add(count) {
            *known.clusters.entry(cluster).or_default() |= kind.bit();
            if let Some(filter) = self.filter.get() {
                let (word, bit) = Self::place(filter, cluster);
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }

    /// A table is not at a cluster any more.
    pub(super) fn remove(&self, cluster: u64, kind: Metadata) {
        let mut known = lock(&self.known);
        if let Some(kinds) = known.clusters.get_mut(&cluster) {
            *kinds &= !kind.bit();
            if *kinds == 0 {
                known.clusters.remove(&cluster);
            }
        }
    }

    /// Snapshots changed which tables there are: what is known is found out anew.
    pub(super) fn forget(&self) {
        lock(&self.known).built_for = None;
    }

    /// What a cluster is known to be, of what is checked.
    fn find(&self, cluster: u64) -> u16 {
        let Some(filter) = self.filter.get() else {
            return 0;
        };
        let (word, bit) = Self::place(filter, cluster);
        if word.load(Ordering::Acquire) & bit == 0 {
            return 0;
        }
        let known = lock(&self.known);
        if known.built_for.is_none() {
            return 0;
        }
        known.clusters.get(&cluster).copied().unwrap_or(0) & self.mask
    }

    /// Whether guest data may be written to a cluster, as far as is known.
    pub(super) fn allows_data(&self, cluster: u64) -> bool {
        self.find(cluster) == 0
    }
}

fn refused(kinds: u16) -> Result<()> {
    match Metadata::ALL.iter().find(|kind| kinds & kind.bit() != 0) {
        None => Ok(()),
        Some(kind) => Err(Error::corrupt(format!(
            "Preventing invalid write on metadata (overlaps with {})",
            kind.name()
        ))),
    }
}

fn places(header: &Header, l1: u64) -> Places {
    Places {
        l1,
        refcount_table: header.refcount_table_offset,
        snapshots: header.snapshots_offset,
        bitmaps: header
            .bitmaps()
            .map_or(0, |bitmaps| bitmaps.bitmap_directory_offset),
    }
}

impl Qcow2 {
    /// Knows the metadata of the image, before the first change of it.
    pub(super) async fn know_metadata(&self, io: &Io) -> Result<()> {
        let wanted = places(&lock(&self.header), self.l1.offset());
        if lock(&self.overlap.known).built_for == Some(wanted) {
            return Ok(());
        }
        let _claim = self.overlap_claim.claim(0, 1).await;
        if lock(&self.overlap.known).built_for == Some(wanted) {
            return Ok(());
        }
        let header = lock(&self.header).clone();
        let blocks = self.refcounts.block_offsets();
        let expected = self.l1.entries() + blocks.len() as u64;
        self.overlap.filter.get_or_init(|| {
            let bits = expected
                .saturating_mul(FILTER_BITS)
                .max(MIN_FILTER_BITS)
                .next_power_of_two();
            (0..bits / 64).map(|_| AtomicU64::new(0)).collect()
        });
        {
            let mut known = lock(&self.overlap.known);
            known.built_for = None;
            known.clusters.clear();
        }
        self.add_places(&header)?;
        let bits = self.geometry.cluster_bits;
        for offset in blocks {
            self.overlap.add(offset >> bits, 1, Metadata::RefcountBlock);
        }
        for index in 0..self.l1.entries() {
            match self.l1_entry(io, index << self.geometry.l2_bits).await {
                Ok(Some(entry)) => self.overlap.add(entry.table >> bits, 1, Metadata::ActiveL2),
                Ok(None) => {}
                // A table that is not on a cluster boundary is found when it is used.
                Err(error) if error.kind() == ErrorKind::Corrupt => {}
                // Without it the set would have a hole for as long as the image is open.
                Err(error) => return Err(error),
            }
        }
        if self.overlap.checks(Metadata::InactiveL2) {
            self.add_inactive_tables(io).await?;
        }
        lock(&self.overlap.known).built_for = Some(wanted);
        Ok(())
    }

    /// Adds the L2 tables of snapshots.
    async fn add_inactive_tables(&self, io: &Io) -> Result<()> {
        const PIECE: u64 = 64 << 10;
        let tables: Vec<(u64, u64)> = lock(&self.snapshots)
            .snapshots
            .iter()
            .map(|one| (one.l1_table_offset, u64::from(one.l1_size) * 8))
            .filter(|(_, bytes)| *bytes <= MAX_L1_SIZE)
            .collect();
        for (offset, bytes) in tables {
            let mut at = 0;
            while at < bytes {
                let len = PIECE.min(bytes - at);
                let Some(place) = offset.checked_add(at) else {
                    break;
                };
                let piece = io.read_padded(self.file, place, len as usize).await?;
                for entry in piece.chunks_exact(8) {
                    let table = super::header::be64(entry, 0) & TABLE_OFFSET;
                    // One that is not on a cluster boundary is found when the snapshot is used.
                    if table != 0 && self.geometry.in_cluster(table) == 0 {
                        let cluster = table >> self.geometry.cluster_bits;
                        self.overlap.add(cluster, 1, Metadata::InactiveL2);
                    }
                }
                at += len;
            }
        }
        Ok(())
    }

    fn add_places(&self, header: &Header) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let size = self.geometry.cluster_size();
        let add = |offset: u64, bytes: u64, kind| {
            if offset != 0 && bytes != 0 {
                self.overlap.add(offset >> bits, bytes.div_ceil(size), kind);
            }
        };
        self.overlap.add(0, 1, Metadata::Header);
        add(self.l1.offset(), self.l1.entries() * 8, Metadata::ActiveL1);
        let table = u64::from(header.refcount_table_clusters) << bits;
        add(header.refcount_table_offset, table, Metadata::RefcountTable);
        let snapshots = lock(&self.snapshots);
        add(
            header.snapshots_offset,
            snapshots.byte_len(),
            Metadata::SnapshotTable,
        );
        let mut clusters = 0;
        for snapshot in &snapshots.snapshots {
            let bytes = u64::from(snapshot.l1_size) * 8;
            // A larger one cannot be: who goes back to that snapshot, or deletes it, is told.
            if bytes > MAX_L1_SIZE {
                continue;
            }
            clusters += bytes.div_ceil(size);
            if clusters > MAX_INACTIVE_CLUSTERS {
                return Err(Error::invalid_image(
                    "the snapshots' L1 tables are too large to write to the image",
                )
                .field(
                    "l1_size",
                    snapshot.l1_size,
                    "all snapshots' tables within 4194304 clusters",
                ));
            }
            add(snapshot.l1_table_offset, bytes, Metadata::InactiveL1);
        }
        drop(snapshots);
        if let Some(bitmaps) = header.bitmaps() {
            add(
                bitmaps.bitmap_directory_offset,
                bitmaps.bitmap_directory_size,
                Metadata::BitmapDirectory,
            );
        }
        Ok(())
    }

    /// Allocates clusters for `what`: none of them is metadata already, and none is the header, whichever
    /// checks were asked for.
    pub(super) async fn allocate(
        &self,
        io: &Io,
        what: &str,
        count: u64,
        exact: bool,
    ) -> Result<Run> {
        self.before_allocation(io).await?;
        let run = self.refcounts.allocate(io, count, exact).await;
        let run = run.map_err(|error| match (error.kind(), error.position()) {
            (ErrorKind::Corrupt, Some(0)) => Error::corrupt(format!(
                "Preventing invalid allocation of {what} at offset 0 (field {})",
                error.message()
            )),
            _ => error,
        })?;
        self.note_new_blocks()?;
        self.check_new(run.first, run.count)?;
        self.prepare_ahead(io, run).await;
        Ok(run)
    }

    /// Refuses clusters for data, or for a new table, that are metadata already.
    pub(super) fn check_new(&self, first: u64, count: u64) -> Result<()> {
        (first..first.saturating_add(count)).try_for_each(|at| refused(self.overlap.find(at)))
    }

    /// Refuses to write a table to a cluster that is something else as well.
    pub(super) fn check_table(&self, offset: u64, kind: Metadata) -> Result<()> {
        let cluster = offset >> self.geometry.cluster_bits;
        refused(self.overlap.find(cluster) & !kind.bit())
    }

    /// Refuses to write a slice of a table to a cluster that is something else as well.
    pub(super) fn check_slice(&self, offset: u64) -> Result<()> {
        let kinds = self.overlap.find(offset >> self.geometry.cluster_bits);
        let own = if kinds & Metadata::ActiveL2.bit() != 0 {
            Metadata::ActiveL2
        } else {
            Metadata::ActiveL1
        };
        refused(kinds & !own.bit())
    }

    /// Whether what is metadata was looked up once.
    pub(super) fn knows_metadata(&self) -> bool {
        self.overlap.filter.get().is_some()
    }

    /// A table has a new cluster.
    pub(super) fn added_table(&self, cluster: u64, kind: Metadata) {
        self.overlap.add(cluster, 1, kind);
    }

    /// Takes note of the reference count blocks that an allocation made.
    pub(super) fn note_new_blocks(&self) -> Result<()> {
        for offset in self.refcounts.take_new_blocks() {
            let cluster = offset >> self.geometry.cluster_bits;
            self.check_new(cluster, 1)?;
            self.overlap.add(cluster, 1, Metadata::RefcountBlock);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_known_is_found_and_named() {
        let overlap = Overlap::new(OverlapChecks::default());
        assert!(overlap.allows_data(0));
        let words = (0..1024).map(|_| AtomicU64::new(0)).collect();
        overlap.filter.set(words).unwrap();
        overlap.add(0, 1, Metadata::Header);
        overlap.add(7, 2, Metadata::ActiveL2);
        overlap.add(8, 1, Metadata::RefcountBlock);
        assert!(overlap.allows_data(0), "not before everything is known");
        lock(&overlap.known).built_for = Some(Places::default());
        assert!(!overlap.allows_data(0) && !overlap.allows_data(7) && overlap.allows_data(9));
        let error = refused(overlap.find(8) & !Metadata::ActiveL2.bit()).unwrap_err();
        assert_eq!(
            error.message(),
            "Preventing invalid write on metadata (overlaps with refcount block)"
        );
        overlap.remove(7, Metadata::ActiveL2);
        assert!(overlap.allows_data(7));
        overlap.add(9, 1, Metadata::InactiveL2);
        assert!(overlap.allows_data(9), "not checked by default");
    }
}
