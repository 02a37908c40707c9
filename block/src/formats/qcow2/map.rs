//! Looking up: from guest ranges to extents.

use super::{
    Qcow2,
    l2::{Entry, decode},
};
use crate::{
    GuestRange, Result,
    image::{BlockStatus, ExtentKind, Extents, Intent},
    io::Io,
    table::{MapCache, SliceState, TableSlice},
    types::HostOffset,
};
use std::sync::Arc;

/// What the queue's cache and the shared one know of a cluster's slice.
enum Cached {
    Slice(Arc<TableSlice>),
    /// There is no L2 table.
    NoTable,
    Unknown,
}

impl Qcow2 {
    /// The fast path: what is in memory, without waiting.
    pub(super) fn map_cached(
        &self,
        mut range: GuestRange,
        intent: Intent,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        while range.len > 0 && !out.is_full() {
            let cluster = self.geometry.cluster(range.start);
            let key = self.map_key(cluster);
            let slice = match cache.get(key) {
                Some(slice) => slice,
                None => match self.cached_slice(cluster)? {
                    Cached::Slice(slice) => cache.put(key, &slice),
                    Cached::NoTable if intent == Intent::Read => {
                        let run = self.until(range, self.geometry.table_end(cluster));
                        let before = out.len();
                        self.map_unallocated(run, cache, out)?;
                        let mapped = out.len() - before;
                        if mapped < run.len {
                            return Ok(());
                        }
                        range = range.skip(mapped);
                        continue;
                    }
                    Cached::NoTable | Cached::Unknown => return Ok(()),
                },
            };
            let run = self.until(range, self.geometry.slice_end(cluster));
            let mapped = match intent {
                Intent::Read => self.map_slice(slice, run, out)?,
                Intent::WriteInPlace => self.map_in_place(slice, run, out)?,
            };
            range = range.skip(mapped);
            if mapped == run.len {
                continue;
            }
            if intent == Intent::WriteInPlace || out.is_full() {
                return Ok(());
            }
            // The lookup goes on in the backing image, and comes back for the next cluster.
            let cluster = self.geometry.cluster(range.start);
            let part = self.until(range, cluster + 1);
            let wanted = out.len() + part.len;
            self.map_unallocated(part, cache, out)?;
            if out.len() < wanted {
                return Ok(());
            }
            range = range.skip(part.len);
        }
        Ok(())
    }

    /// The part of a range before a guest cluster.
    pub(super) fn until(&self, range: GuestRange, end_cluster: u64) -> GuestRange {
        // Beyond 2^64 there is no cluster: the range ends before.
        let end = end_cluster.saturating_mul(self.geometry.cluster_size());
        range.take(end - range.start.0)
    }

    fn cached_slice(&self, cluster: u64) -> Result<Cached> {
        Ok(match self.cached_l1(cluster)? {
            None => Cached::Unknown,
            Some(None) => Cached::NoTable,
            Some(Some(entry)) => {
                let offset = entry.table + self.geometry.slice_offset(cluster);
                match self.slices.get(offset) {
                    // Still the table, now that its slice can be told when it is not any more.
                    Some(slice) if self.cached_l1(cluster)? == Some(Some(entry)) => {
                        Cached::Slice(slice)
                    }
                    _ => Cached::Unknown,
                }
            }
        })
    }

    /// Maps the start of a run inside one slice for reading, up to a cluster that the backing image
    /// has; returns the bytes mapped.
    fn map_slice(&self, slice: &TableSlice, mut run: GuestRange, out: &mut Extents) -> Result<u64> {
        let before = out.len();
        while run.len > 0 && !out.is_full() {
            let cluster = self.geometry.cluster(run.start);
            let raw = slice.get(self.geometry.in_slice(cluster));
            let entry = decode(raw, cluster, &self.geometry)?;
            if entry == Entry::Unallocated && self.backing.is_some() {
                break;
            }
            let part = self.until(run, cluster + 1);
            self.push(entry, part, out);
            run = run.skip(part.len);
        }
        Ok(out.len() - before)
    }

    /// Appends the extent of an allocated cluster.
    fn push(&self, entry: Entry, part: GuestRange, out: &mut Extents) {
        match entry {
            Entry::Data { host, .. } => self.push_data(host, part, out),
            Entry::Compressed(_) => out.push_opaque(part.len),
            Entry::Zero { .. } | Entry::Unallocated => out.push(part.len, ExtentKind::Zero),
        }
    }

    /// Appends a part of the data cluster at `host`.
    fn push_data(&self, host: u64, part: GuestRange, out: &mut Extents) {
        let (file, offset) = (
            self.file,
            HostOffset(host + self.geometry.in_cluster(part.start.0)),
        );
        if self.crypt.encryption.is_some() {
            out.push_encrypted(part.len, file, offset);
        } else {
            out.push(part.len, ExtentKind::Data { file, offset });
        }
    }

    /// Maps what this image does not have: the backing image's, and zeroes beyond its end.
    fn map_unallocated(
        &self,
        range: GuestRange,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        let below = self.in_backing(range);
        if let Some(backing) = &self.backing
            && below.len > 0
        {
            let wanted = out.len() + below.len;
            out.below(|out| backing.try_map(below, Intent::Read, cache, out))?;
            if out.len() < wanted {
                return Ok(());
            }
        }
        if below.len < range.len {
            out.push(range.len - below.len, ExtentKind::Zero);
        }
        Ok(())
    }

    /// Maps the start of a run that may be overwritten where it is; returns the bytes mapped.
    fn map_in_place(
        &self,
        slice: &TableSlice,
        mut run: GuestRange,
        out: &mut Extents,
    ) -> Result<u64> {
        let before = out.len();
        while run.len > 0 && !out.is_full() {
            let cluster = self.geometry.cluster(run.start);
            let raw = slice.get(self.geometry.in_slice(cluster));
            let Entry::Data { host, copied: true } = decode(raw, cluster, &self.geometry)? else {
                break;
            };
            let part = self.until(run, cluster + 1);
            self.push_data(host, part, out);
            run = run.skip(part.len);
        }
        Ok(out.len() - before)
    }

    /// The slow path: loads what is missing.
    pub(super) async fn map_loading(
        &self,
        io: &Io,
        range: GuestRange,
        out: &mut Extents,
    ) -> Result<()> {
        let before = out.len();
        self.map_cached(range, Intent::Read, &mut io.cache.borrow_mut(), out)?;
        if out.len() > before {
            return Ok(());
        }
        let cluster = self.geometry.cluster(range.start);
        let run = match self.l2_slice(io, cluster).await? {
            None => self.until(range, self.geometry.table_end(cluster)),
            Some(slice) => {
                let part = self.until(range, cluster + 1);
                let raw = slice.get(self.geometry.in_slice(cluster));
                match decode(raw, cluster, &self.geometry)? {
                    Entry::Unallocated => self.unallocated_run(&slice, range)?,
                    entry => {
                        self.push(entry, part, out);
                        return Ok(());
                    }
                }
            }
        };
        let below = self.in_backing(run);
        match &self.backing {
            Some(backing) if below.len > 0 => {
                out.below_async(async |out| backing.map(io, below, out).await)
                    .await
            }
            _ => {
                out.push(run.len, ExtentKind::Zero);
                Ok(())
            }
        }
    }

    /// The part of a range, inside one slice, from its start that is unallocated.
    fn unallocated_run(&self, slice: &TableSlice, range: GuestRange) -> Result<GuestRange> {
        let first = self.geometry.cluster(range.start);
        let run = self.until(range, self.geometry.slice_end(first));
        let (_, end) = self.geometry.touched(run);
        let mut last = first + 1;
        while last < end {
            let raw = slice.get(self.geometry.in_slice(last));
            if decode(raw, last, &self.geometry)? != Entry::Unallocated {
                break;
            }
            last += 1;
        }
        Ok(self.until(run, last))
    }

    /// What a guest cluster's L2 entry says; unallocated where there is no table.
    pub(super) async fn entry(&self, io: &Io, cluster: u64) -> Result<Entry> {
        let Some(slice) = self.l2_slice(io, cluster).await? else {
            return Ok(Entry::Unallocated);
        };
        let raw = slice.get(self.geometry.in_slice(cluster));
        decode(raw, cluster, &self.geometry)
    }

    /// Whether everything that the mapping of a range relies on is on the disk.
    pub(super) fn is_mapping_durable(&self, range: GuestRange) -> bool {
        if !self.pending.is_synced() {
            return false;
        }
        let (first, end) = self.geometry.touched(range);
        let mut cluster = first;
        while cluster < end {
            // A slice that is not in memory is on the disk; so is the L1 slice that names it.
            if !self.pending.l1_is_clean() {
                return false;
            }
            if let Ok(Cached::Slice(slice)) = self.cached_slice(cluster)
                && slice.state() != SliceState::Clean
            {
                return false;
            }
            cluster = self.geometry.slice_end(cluster);
        }
        true
    }

    /// The state of a run, for `map` and `convert`.
    pub(super) async fn status_of(&self, io: &Io, range: GuestRange) -> Result<BlockStatus> {
        let cluster = self.geometry.cluster(range.start);
        let part = self.until(range, cluster + 1);
        let status = BlockStatus {
            len: part.len,
            depth: 0,
            present: true,
            zero: false,
            data: true,
            compressed: false,
            offset: None,
            file: None,
        };
        let slice = self.l2_slice(io, cluster).await?;
        let entry = match &slice {
            Some(slice) => {
                let raw = slice.get(self.geometry.in_slice(cluster));
                decode(raw, cluster, &self.geometry)?
            }
            None => Entry::Unallocated,
        };
        if entry == Entry::Unallocated {
            let run = match &slice {
                Some(slice) => self.unallocated_run(slice, range)?,
                None => self.until(range, self.geometry.table_end(cluster)),
            };
            return self.status_below(io, run).await;
        }
        let in_cluster = self.geometry.in_cluster(range.start.0);
        let host_of = |entry| match entry {
            Entry::Data { host, .. } => Some(host),
            Entry::Zero { host, .. } => host,
            _ => None,
        };
        let mut len = part.len;
        if let Some(slice) = &slice {
            // Clusters that go on in the same way, contiguous in the file where that matters.
            let first_host = host_of(entry);
            let run = self.until(range, self.geometry.slice_end(cluster));
            let (_, end) = self.geometry.touched(run);
            for next in cluster + 1..end {
                let raw = slice.get(self.geometry.in_slice(next));
                let other = decode(raw, next, &self.geometry)?;
                let same_kind = std::mem::discriminant(&other) == std::mem::discriminant(&entry);
                let distance = (next - cluster) << self.geometry.cluster_bits;
                let follows = host_of(other) == first_host.map(|host| host + distance);
                if !same_kind || !follows {
                    break;
                }
                len += self.until(run.skip(len), next + 1).len;
            }
        }
        // What lies there encrypted is not what the guest sees.
        let offset = host_of(entry)
            .filter(|_| self.crypt.encryption.is_none())
            .map(|host| HostOffset(host + in_cluster));
        Ok(BlockStatus {
            len,
            zero: matches!(entry, Entry::Zero { .. }),
            data: !matches!(entry, Entry::Zero { .. }),
            compressed: matches!(entry, Entry::Compressed(_)),
            offset,
            file: offset.map(|_| self.file),
            ..status
        })
    }

    async fn status_below(&self, io: &Io, run: GuestRange) -> Result<BlockStatus> {
        let below = self.in_backing(run);
        match &self.backing {
            Some(backing) if below.len > 0 => {
                let mut status = backing.block_status(io, below).await?;
                status.depth += 1;
                Ok(status)
            }
            backing => Ok(BlockStatus {
                len: run.len,
                // Beyond the end of a backing file the zeroes are its.
                depth: u32::from(backing.is_some()),
                present: false,
                zero: true,
                data: false,
                compressed: false,
                offset: None,
                file: None,
            }),
        }
    }
}
