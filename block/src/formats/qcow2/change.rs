//! Discard, write zeroes and resize.

use std::sync::atomic::Ordering;

use super::{
    Qcow2,
    flush::Punch,
    header::{Header, MAX_L1_SIZE},
    l2::{Entry, ZERO, decode},
    read_only,
};
use crate::{
    Error, GuestOffset, GuestRange, Result,
    io::{AlignedBuf, Buffers, Io},
    serve,
    sync::lock,
};

/// Clusters changed under one claim.
const CLUSTERS_AT_A_TIME: u64 = 512;

/// What whole clusters become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Becomes {
    /// Not needed any more: zero, or nothing where that reads the same; space is given back.
    Discarded,
    /// Zero, keeping host clusters that are theirs alone.
    ZeroKept,
    /// Zero, giving space back.
    ZeroUnmapped,
    /// Not part of the disk any more, or VM state that is not needed any more.
    Gone,
}

impl Qcow2 {
    /// Forgets whole clusters; what they read afterwards is zero, never older data.
    pub(super) async fn discard_clusters(&self, io: &Io, range: GuestRange) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        // Without the zero flag, an unallocated cluster would show the backing file again.
        if !self.geometry.zero_flag && self.backing.is_some() {
            return Ok(());
        }
        let size = self.geometry.cluster_size();
        let first = range.start.0.div_ceil(size);
        let end = if range.end() == self.size.load(Ordering::Acquire) {
            range.end().div_ceil(size)
        } else {
            range.end() / size
        };
        self.change_clusters(io, first, end, Becomes::Discarded)
            .await
    }

    /// Makes the start of a range zero through the map alone; returns the bytes done, 0 where plain
    /// zeroes must be written.
    pub(super) async fn zero_clusters(
        &self,
        io: &Io,
        range: GuestRange,
        may_unmap: bool,
    ) -> Result<u64> {
        if !self.writable {
            return Err(read_only());
        }
        let size = self.geometry.cluster_size();
        let first = self.geometry.cluster(range.start);
        let at_end = range.end() == self.size.load(Ordering::Acquire);
        let end = if at_end {
            range.end().div_ceil(size)
        } else {
            range.end() / size
        };
        let becomes = if may_unmap {
            Becomes::ZeroUnmapped
        } else {
            Becomes::ZeroKept
        };
        if self.geometry.in_cluster(range.start.0) != 0 || end <= first {
            let part = self.until(range, first + 1);
            return self.zero_part(io, first, part, becomes).await;
        }
        if !self.geometry.zero_flag {
            return Ok(0);
        }
        self.change_clusters(io, first, end, becomes).await?;
        Ok(self.until(range, end).len)
    }

    /// Makes a part of a cluster zero where the rest of it reads as zeroes without data of its own: then
    /// the whole cluster can say so. Returns the bytes done.
    async fn zero_part(
        &self,
        io: &Io,
        cluster: u64,
        part: GuestRange,
        becomes: Becomes,
    ) -> Result<u64> {
        let entry = self.entry(io, cluster).await?;
        let without_data = matches!(entry, Entry::Unallocated | Entry::Zero { .. });
        if !without_data {
            return Ok(0);
        }
        if !self.geometry.zero_flag {
            return Ok(if self.reads_zero(entry, cluster) {
                part.len
            } else {
                0
            });
        }
        if entry == Entry::Unallocated && !self.rest_below_is_zero(io, cluster, part).await? {
            return Ok(0);
        }
        {
            // A write may have come in between: only what is still without data is changed.
            let _claim = self.claims.claim(cluster, cluster + 1).await;
            let slice = self.l2_slice_for_change(io, cluster).await?;
            let change = slice.change();
            let place = self.geometry.in_slice(cluster);
            let raw = change.get(place);
            let now = decode(raw, cluster, &self.geometry)?;
            if !matches!(now, Entry::Unallocated | Entry::Zero { .. }) {
                return Ok(0);
            }
            if let Some((after, punch)) = self.changed_entry(raw, now, cluster, becomes) {
                self.set_entry(&slice, &change, place, after);
                if let Some(punch) = punch {
                    self.unlink(now, punch);
                }
            }
        }
        Ok(part.len)
    }

    /// Whether the backing chain is known to read as zeroes in what `part` leaves of a cluster.
    async fn rest_below_is_zero(&self, io: &Io, cluster: u64, part: GuestRange) -> Result<bool> {
        let Some(backing) = &self.backing else {
            return Ok(true);
        };
        let start = self.geometry.start(cluster);
        let end = start + self.geometry.cluster_size();
        for (from, to) in [(start, part.start.0), (part.end(), end)] {
            let mut range = self.in_backing(GuestRange::new(from, to - from));
            while range.len > 0 {
                let status = backing.block_status(io, range).await?;
                if !status.zero {
                    return Ok(false);
                }
                range = range.skip(status.len.clamp(1, range.len));
            }
        }
        Ok(true)
    }

    /// Unallocates every cluster: the disk shows the backing file alone. No request is in flight.
    pub(super) async fn empty_clusters(&self, io: &Io) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        let size = self.size.load(Ordering::Acquire);
        let end = size.div_ceil(self.geometry.cluster_size());
        self.change_clusters(io, 0, end, Becomes::Gone).await?;
        self.settle(io).await
    }

    /// Names another backing file in the header. No request is in flight.
    pub(super) async fn name_backing(
        &self,
        io: &Io,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        let mut header = lock(&self.header).clone();
        header.set_backing(name.map(str::as_bytes), format)?;
        // Fits before anything is written, and what the new chain relies on is durable.
        header.to_bytes()?;
        self.settle(io).await?;
        // Flushing may have moved the reference count table.
        let mut header = lock(&self.header).clone();
        header.set_backing(name.map(str::as_bytes), format)?;
        header.write(io, self.file).await?;
        *lock(&self.header) = header;
        Ok(())
    }

    /// Forgets clusters that are not part of the disk.
    pub(super) async fn forget_clusters(&self, io: &Io, first: u64, end: u64) -> Result<()> {
        self.change_clusters(io, first, end, Becomes::Gone).await
    }

    async fn change_clusters(
        &self,
        io: &Io,
        mut first: u64,
        end: u64,
        becomes: Becomes,
    ) -> Result<()> {
        while first < end {
            self.relieve(io).await?;
            let stop = end
                .min(self.geometry.slice_end(first))
                .min(first + CLUSTERS_AT_A_TIME);
            let stop = self.change_run(io, first, stop, end, becomes).await?;
            first = stop;
        }
        Ok(())
    }

    /// Changes clusters inside one slice; returns the first cluster after those done.
    async fn change_run(
        &self,
        io: &Io,
        first: u64,
        stop: u64,
        end: u64,
        becomes: Becomes,
    ) -> Result<u64> {
        let _claim = self.claims.claim(first, stop).await;
        let no_table = self.l1_entry(io, first).await?.is_none();
        if no_table {
            let rest = end.min(self.geometry.table_end(first));
            let run = self.until(
                GuestRange::new(
                    self.geometry.start(first),
                    u64::MAX - self.geometry.start(first),
                ),
                rest,
            );
            // Nothing there, and nothing below to hide: all of the table's range is as it should be.
            let forgotten = matches!(becomes, Becomes::Gone | Becomes::Discarded);
            if becomes == Becomes::Gone || (forgotten && self.in_backing(run).len == 0) {
                return Ok(rest);
            }
        }
        let slice = self.l2_slice_for_change(io, first).await?;
        let change = slice.change();
        for cluster in first..stop {
            let place = self.geometry.in_slice(cluster);
            let raw = change.get(place);
            let before = decode(raw, cluster, &self.geometry)?;
            let Some((after, punch)) = self.changed_entry(raw, before, cluster, becomes) else {
                continue;
            };
            self.set_entry(&slice, &change, place, after);
            if let Some(punch) = punch {
                self.unlink(before, punch);
            }
        }
        Ok(stop)
    }

    /// The entry that a cluster gets, and whether what it named is given up; `None` to leave it.
    fn changed_entry(
        &self,
        raw: u64,
        before: Entry,
        cluster: u64,
        becomes: Becomes,
    ) -> Option<(u64, Option<Punch>)> {
        let nothing_below = self.reads_zero(Entry::Unallocated, cluster);
        match (becomes, before) {
            (Becomes::Gone, Entry::Unallocated) => None,
            (Becomes::Gone, _) => Some((0, Some(Punch::Yes))),
            // What has no cluster and reads as zeroes stays; where zeroes were asked for the entry says
            // so, whatever the backing file is some day.
            (_, Entry::Zero { host: None, .. }) => None,
            (Becomes::Discarded, Entry::Unallocated) if nothing_below => None,
            (_, Entry::Unallocated) => Some((ZERO, None)),
            (
                Becomes::ZeroKept,
                Entry::Zero { copied: true, .. } | Entry::Data { copied: true, .. },
            ) => (raw & ZERO == 0).then_some((raw | ZERO, None)),
            (Becomes::ZeroKept, Entry::Zero { .. }) => None,
            (Becomes::ZeroKept, _) => Some((ZERO, Some(Punch::No))),
            (Becomes::Discarded | Becomes::ZeroUnmapped, _) => {
                let after = if self.geometry.zero_flag { ZERO } else { 0 };
                Some((after, Some(Punch::Yes)))
            }
        }
    }

    /// Changes the size of the disk. No request is in flight.
    pub(super) async fn change_size(&self, io: &Io, size: u64) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        if !size.is_multiple_of(512) {
            return Err(Error::invalid_argument(format!(
                "size: {size}, expected a multiple of 512"
            )));
        }
        let old_size = self.size.load(Ordering::Acquire);
        self.refuse_resize(old_size, size)?;
        self.prepare_bitmaps_for(io, size).await?;
        self.settle(io).await?;
        self.drop_vm_state(io).await?;
        let mut header = lock(&self.header).clone();
        if size < old_size {
            let cluster_size = self.geometry.cluster_size();
            let first = size.div_ceil(cluster_size);
            let end = old_size.div_ceil(cluster_size);
            self.change_clusters(io, first, end, Becomes::Gone).await?;
        } else {
            let entries = header.l1_entries_for(size);
            if entries > self.l1.entries() {
                self.move_l1(io, entries, size, &mut header).await?;
            }
            self.clear_growth(io, old_size, size).await?;
        }
        self.settle(io).await?;
        header.size = size;
        if let Err(error) = header.write(io, self.file).await {
            // It may be there all the same: a failed resize should not come true with the next open.
            let old = lock(&self.header).clone();
            if let Err(error) = old.write(io, self.file).await {
                tracing::warn!(%error, "the header may have the new size");
            }
            return Err(error);
        }
        self.size.store(size, Ordering::Release);
        *lock(&self.header) = header;
        self.resize_bitmaps(size);
        Ok(())
    }

    /// A version 2 snapshot does not say how large the disk was.
    fn refuse_resize(&self, old_size: u64, size: u64) -> Result<()> {
        let header = lock(&self.header);
        if header.version < 3 && header.nb_snapshots > 0 && size != old_size {
            return Err(Error::unsupported(
                "Can't resize a v2 image which has snapshots",
            ));
        }
        Ok(())
    }

    /// What the last cluster still has beyond the old end, from when the disk was larger, and what
    /// the backing file has there, must not appear when the disk grows.
    async fn clear_growth(&self, io: &Io, old_size: u64, size: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let first = old_size.div_ceil(cluster_size);
        let end = size.div_ceil(cluster_size);
        let uncovered = first < end && {
            let start = self.geometry.start(first);
            self.in_backing(GuestRange::new(start, size - start)).len > 0
        };
        if uncovered && !self.geometry.zero_flag {
            return Err(Error::unsupported(format!(
                "size: growing from {old_size} to {size} bytes would uncover data of the backing file"
            )));
        }
        let old_end = GuestOffset(old_size);
        let last = self.geometry.cluster(old_end);
        let in_last = self.geometry.in_cluster(old_size);
        if in_last != 0 && !self.reads_zero(self.entry(io, last).await?, last) {
            let rest = (cluster_size - in_last).min(size - old_size);
            let zeroes = Buffers::owned(AlignedBuf::zeroed(rest as usize));
            let range = GuestRange::new(old_size, rest);
            serve::write_image(self, io, range, &zeroes, false).await?;
        }
        if uncovered {
            self.change_clusters(io, first, end, Becomes::ZeroUnmapped)
                .await?;
        }
        Ok(())
    }

    /// Moves the L1 table to where it has room for more entries.
    pub(super) async fn move_l1(
        &self,
        io: &Io,
        entries: u64,
        size: u64,
        header: &mut Header,
    ) -> Result<()> {
        let (old_offset, old_bytes) = (self.l1.offset(), self.l1.entries() * 8);
        header.l1_table_offset = self.copy_l1(io, entries, size).await?;
        header.l1_size = u32::try_from(entries).unwrap_or(u32::MAX);
        let new_clusters = (entries * 8).div_ceil(self.geometry.cluster_size());
        let new_first = header.l1_table_offset >> self.geometry.cluster_bits;
        if let Err(error) = header.write(io, self.file).await {
            // The new place is free again once the header is sure to name the old one.
            let old = lock(&self.header).clone();
            if old.write(io, self.file).await.is_ok() {
                self.refcounts.release(io, new_first, new_clusters).await?;
            }
            return Err(error);
        }
        self.slices
            .retire(old_offset, old_offset + old_bytes.max(1));
        self.l1.set(header.l1_table_offset, header.l1_size);
        *lock(&self.header) = header.clone();
        let clusters = old_bytes.div_ceil(self.geometry.cluster_size());
        let first = old_offset >> self.geometry.cluster_bits;
        self.refcounts.l1_moved(new_first, new_clusters);
        self.refcounts.release(io, first, clusters).await
    }

    /// Writes a longer L1 table to a new place; returns where.
    async fn copy_l1(&self, io: &Io, entries: u64, size: u64) -> Result<u64> {
        let bytes = entries * 8;
        if bytes > MAX_L1_SIZE {
            return Err(Error::invalid_argument(format!(
                "size: {size}, expected at most what an L1 table of {MAX_L1_SIZE} bytes maps at this cluster size"
            )));
        }
        let clusters = bytes.div_ceil(self.geometry.cluster_size());
        let run = self.refcounts.allocate(io, clusters, true).await?;
        let offset = self.geometry.start(run.first);
        let filled = self.fill_l1(io, offset, clusters).await;
        if let Err(error) = filled {
            self.refcounts.release(io, run.first, run.count).await?;
            return Err(error);
        }
        Ok(offset)
    }

    async fn fill_l1(&self, io: &Io, offset: u64, clusters: u64) -> Result<()> {
        let old_bytes = (self.l1.entries() * 8) as usize;
        let old = io
            .read_padded(self.file, self.l1.offset(), old_bytes)
            .await?;
        let mut table = AlignedBuf::zeroed((clusters << self.geometry.cluster_bits) as usize);
        table[..old_bytes].copy_from_slice(&old);
        io.write(self.file, offset, table).await?;
        // The reference counts of the new table, and the table, are durable before the header
        // names it.
        self.settle(io).await
    }
}
