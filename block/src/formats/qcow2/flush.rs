//! The order in which everything reaches the disk.
//!
//! Nothing of the tables is written outside a flush, except the first content of new L2 tables.
//! A flush
//!
//! 1. takes the list of freed clusters, then copies the dirty slices of L1 and L2 tables: the
//!    copies rely on nothing that happens later;
//! 2. writes the reference counts, and, if a new block of them was made, syncs and writes the table
//!    that names it (and the header, if that table moved);
//! 3. syncs: guest data, copied data, new tables and reference counts are durable;
//! 4. writes the copies of step 1, and syncs;
//! 5. stamps the freed clusters: no mapping on the disk names them any more. Once every request
//!    that may still touch them has ended they are punched, if asked, and lose their reference.
//!
//! With no dirty table that is one sync, otherwise two. But the sync of step 3 is left out, and that
//! of step 4 covers everything, where the tables rely on nothing that is not durable: no count changed
//! (they are [made ahead](super::refcount)), and all that was linked is clusters in the place of
//! zeroes that were never written, of a part of the file that is durably there. If power fails before
//! their data is durable they read as zeroes, as before.

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
};

use super::{
    Qcow2,
    counts::{write_counts, write_pieces},
    l2::Compressed,
    overlap::Metadata,
};
use crate::{
    Result,
    faults::Event,
    io::{FallocateMode, Io},
    sync::{join_all, lock},
    table::{SliceChange, TableSlice},
};

/// Whether the host gets a freed cluster's space back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Punch {
    /// It does: a discard asked for it.
    Yes,
    /// It stays with the image, to be used again, unless the options say otherwise.
    No,
}

/// Host clusters that no mapping in memory names any more.
#[derive(Clone, Copy, Debug)]
struct Freed {
    first: u64,
    count: u64,
    punch: Punch,
    /// Their decompressed content is forgotten with them.
    compressed: Option<Compressed>,
    /// It was a table: a late reader may have put slices of it into the cache once more.
    table: bool,
}

/// Whether the L1 table on the disk is that in memory.
mod l1_state {
    pub(super) const CLEAN: u8 = 0;
    pub(super) const DIRTY: u8 = 1;
    pub(super) const WRITING: u8 = 2;
}

/// What the next flush has to do.
#[derive(Debug, Default)]
pub(super) struct Pending {
    dirty: Mutex<Vec<Arc<TableSlice>>>,
    freed: Mutex<Vec<Freed>>,
    /// Freed clusters whose mappings are gone from the disk, by stamp.
    limbo: Mutex<VecDeque<(u64, Freed)>>,
    l1: AtomicU8,
    /// No table was changed, since the last flush looked, in a way that relies on what is not durable.
    independent: AtomicBool,
    /// Everything that was in the file when it was opened is durable. Before the first sync it need
    /// not be: another process may have been killed with writes on their way.
    synced: AtomicBool,
}

impl Pending {
    /// A slice became dirty.
    pub(super) fn add_dirty(&self, slice: &Arc<TableSlice>) {
        lock(&self.dirty).push(Arc::clone(slice));
    }

    /// A table is being changed, and what it says relies on what the next sync makes durable. The
    /// caller holds the slice.
    pub(super) fn rely(&self) {
        self.independent.store(false, Ordering::Release);
    }

    /// A slice of the L1 table became dirty, or changed again.
    pub(super) fn l1_changed(&self) {
        self.l1.store(l1_state::DIRTY, Ordering::Release);
    }

    /// Whether the L1 table on the disk is that in memory.
    pub(super) fn l1_is_clean(&self) -> bool {
        self.l1.load(Ordering::Acquire) == l1_state::CLEAN
    }

    /// Whether what the file had when it was opened is durable.
    pub(super) fn is_synced(&self) -> bool {
        self.synced.load(Ordering::Acquire)
    }

    /// Dirty slices.
    pub(super) fn dirty_slices(&self) -> usize {
        lock(&self.dirty).len()
    }

    /// Clusters lose a reference once their mapping is gone from the disk.
    pub(super) fn free_clusters(&self, first: u64, count: u64, punch: Punch) {
        lock(&self.freed).push(Freed {
            first,
            count,
            punch,
            compressed: None,
            table: false,
        });
    }

    /// The cluster of a table that was replaced loses a reference likewise.
    pub(super) fn free_table(&self, cluster: u64) {
        lock(&self.freed).push(Freed {
            first: cluster,
            count: 1,
            punch: Punch::No,
            compressed: None,
            table: true,
        });
    }

    /// The clusters of compressed data lose a reference likewise.
    pub(super) fn free_compressed(&self, data: Compressed, first: u64, last: u64) {
        lock(&self.freed).push(Freed {
            first,
            count: last - first + 1,
            // Other compressed data may share the cluster.
            punch: Punch::No,
            compressed: Some(data),
            table: false,
        });
    }

    fn is_idle(&self) -> bool {
        lock(&self.dirty).is_empty() && lock(&self.freed).is_empty()
    }
}

impl Qcow2 {
    /// Changes an entry of a table. The slice is listed as dirty before its lock is given back:
    /// a flush on another thread never sees the change, or what it freed, without the slice.
    pub(super) fn set_entry(
        &self,
        slice: &Arc<TableSlice>,
        change: &SliceChange<'_>,
        place: usize,
        value: u64,
    ) {
        self.pending.rely();
        if change.set(place, value) {
            self.pending.add_dirty(slice);
        }
    }
}

/// Slices on their way to the disk; put back as dirty if the flush fails or is dropped.
struct Taken<'a> {
    image: &'a Qcow2,
    slices: Vec<Arc<TableSlice>>,
    freed: Vec<Freed>,
    done: bool,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if self.done {
            return;
        }
        let pending = &self.image.pending;
        for slice in &self.slices {
            if slice.write_failed() {
                pending.add_dirty(slice);
            }
        }
        lock(&pending.freed).append(&mut self.freed);
        pending.l1_changed();
        pending.rely();
        self.image.refcounts.write_failed();
    }
}

impl Qcow2 {
    /// Makes everything that completed before durable. Flushes at the same time share one run that
    /// has not started yet.
    pub(super) async fn flush_all(&self, io: &Io) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.flushing.run(|| self.flush_now(io)).await
    }

    async fn flush_now(&self, io: &Io) -> Result<()> {
        // First the freed clusters, then the slices: what freed them is in the copies.
        let mut taken = Taken {
            image: self,
            freed: std::mem::take(&mut lock(&self.pending.freed)),
            slices: Vec::new(),
            done: false,
        };
        let _ = self.pending.l1.compare_exchange(
            l1_state::DIRTY,
            l1_state::WRITING,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        taken.slices = std::mem::take(&mut lock(&self.pending.dirty));
        let copies: Vec<(u64, Vec<u8>)> = taken
            .slices
            .iter()
            .map(|slice| (slice.host_offset, slice.copy_for_writing()))
            .collect();
        for (offset, _) in &copies {
            self.check_slice(*offset)?;
        }
        // After the copies: what they rely on and was not durable by now is in the sync.
        let mut relies = !self.pending.independent.swap(true, Ordering::AcqRel);
        if !self.counts_wait() && self.refcounts.is_dirty() {
            self.write_refcounts(io).await?;
            relies = true;
        }
        let reaches = self.ahead.end();
        if relies || copies.is_empty() || self.data_file != self.file {
            self.sync_files(io).await?;
            self.pending.synced.store(true, Ordering::Release);
        }
        if !copies.is_empty() {
            if !io.never_syncs() {
                self.ahead.flushed();
            }
            if self.pending.l1.load(Ordering::Acquire) == l1_state::WRITING {
                io.event(self.file, Event::L1Update).await;
            }
            io.event(self.file, Event::L2Update).await;
            write_pieces(io, self.file, copies).await?;
            io.sync(self.file).await?;
            self.ahead.synced(reaches);
        }
        for slice in &taken.slices {
            slice.written();
        }
        let _ = self.pending.l1.compare_exchange(
            l1_state::WRITING,
            l1_state::CLEAN,
            Ordering::AcqRel,
            Ordering::Acquire,
        );
        taken.done = true;
        let freed = std::mem::take(&mut taken.freed);
        if !freed.is_empty() {
            let stamp = io.core.pins.stamp();
            lock(&self.pending.limbo).extend(freed.into_iter().map(|item| (stamp, item)));
        }
        self.reclaim(io).await;
        Ok(())
    }

    /// Makes everything durable that the tables about to be written rely on, in every file.
    async fn sync_files(&self, io: &Io) -> Result<()> {
        let mut files = vec![self.file];
        if self.data_file != self.file {
            files.push(self.data_file);
        }
        let syncs = files.into_iter().map(|file| io.sync(file));
        join_all(syncs).await.into_iter().collect()
    }

    /// Writes changed reference counts, in their order.
    pub(super) async fn write_refcounts(&self, io: &Io) -> Result<()> {
        let _claim = self.marks.claim_header().await;
        for offset in self.refcounts.dirty_blocks() {
            self.check_table(offset, Metadata::RefcountBlock)?;
        }
        let mut header = lock(&self.header).clone();
        write_counts(io, self.file, &self.refcounts, &mut header).await?;
        *lock(&self.header) = header;
        Ok(())
    }

    /// Gives clusters back whose mapping is gone from the disk and that no request can touch any
    /// more: punched first, if asked, and only then free.
    async fn reclaim(&self, io: &Io) {
        let released = io.core.pins.released();
        loop {
            let ready = {
                let mut limbo = lock(&self.pending.limbo);
                match limbo.front() {
                    Some((stamp, _)) if *stamp < released => limbo.pop_front(),
                    _ => None,
                }
            };
            let Some((_, freed)) = ready else { return };
            if let Some(data) = freed.compressed {
                self.decompressed.forget(data);
            }
            if freed.table {
                let end = self.geometry.start(freed.first + freed.count);
                self.slices.retire(self.geometry.start(freed.first), end);
            }
            if let Err(error) = self.give_back(io, freed).await {
                // Everything is durable, which is what the flush was about.
                tracing::warn!(%error, "freed clusters stay allocated: a check will find them");
            }
        }
    }

    async fn give_back(&self, io: &Io, freed: Freed) -> Result<()> {
        let passed = match freed.punch {
            Punch::Yes => self.pass_discards.request,
            Punch::No => self.pass_discards.other,
        };
        if passed {
            self.punch(io, freed).await?;
        }
        self.refcounts.release(io, freed.first, freed.count).await
    }

    /// Punches the clusters that have one reference, the one about to go. What a snapshot still
    /// names stays.
    async fn punch(&self, io: &Io, freed: Freed) -> Result<()> {
        let mut run = (freed.first, 0);
        for cluster in freed.first..=freed.first + freed.count {
            let last = cluster == freed.first + freed.count;
            if !last && self.refcounts.get(io, cluster).await? == 1 {
                run.1 += 1;
                continue;
            }
            if run.1 > 0 {
                let offset = self.geometry.start(run.0);
                let len = run.1 << self.geometry.cluster_bits;
                let punched = io
                    .fallocate(self.file, FallocateMode::PunchHole, offset, len)
                    .await;
                if let Err(error) = punched {
                    // The cluster is free either way; the space comes back when it is used again.
                    tracing::debug!(%error, "no space given back");
                }
            }
            run = (cluster + 1, 0);
        }
        Ok(())
    }

    /// Writes what is pending before there is too much of it.
    pub(super) async fn relieve(&self, io: &Io) -> Result<()> {
        if self.pending.dirty_slices() >= self.slices.dirty_limit() {
            return self.flush_all(io).await;
        }
        Ok(())
    }

    /// Flushes until nothing is left to do. The disk is drained.
    pub(super) async fn settle(&self, io: &Io) -> Result<()> {
        self.refcounts.end_reserving(io).await?;
        loop {
            self.flush_all(io).await?;
            if self.refcounts.is_dirty() {
                self.write_refcounts(io).await?;
                io.sync(self.file).await?;
            }
            // Reclaimed clusters changed reference counts once more.
            if self.pending.is_idle() && !self.refcounts.is_dirty() {
                return Ok(());
            }
        }
    }

    /// Leaves the file as a cleanly closed image.
    pub(super) async fn close_image(&self, io: &Io) -> Result<()> {
        if !self.writable {
            return Ok(());
        }
        self.refcounts.end_packing();
        self.settle(io).await?;
        self.store_bitmaps(io).await?;
        self.refcounts.end_reserving(io).await?;
        if self.refcounts.is_dirty() {
            self.write_refcounts(io).await?;
            io.sync(self.file).await?;
        }
        self.end_growing(io).await?;
        self.after_settling(io).await
    }
}
