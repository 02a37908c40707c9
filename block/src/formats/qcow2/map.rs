//! Looking up: from guest ranges to extents.

use super::{
    Qcow2,
    l2::{Entry, Piece},
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
        range: GuestRange,
        intent: Intent,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        if intent == Intent::Read && self.map_within_cluster(range, cache, out)? {
            return Ok(());
        }
        self.map_all_cached(range, intent, cache, out)
    }

    /// What almost every read is: of one kind inside one cluster, whose slice the queue has. Whether it was
    /// that.
    fn map_within_cluster(
        &self,
        range: GuestRange,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<bool> {
        let rest = self.geometry.cluster_size() - self.geometry.in_cluster(range.start.0);
        let cluster = self.geometry.cluster(range.start);
        let fits = (1..=rest).contains(&range.len);
        let (true, Some(slice)) = (fits, cache.get(self.map_key(cluster))) else {
            return Ok(false);
        };
        let entry = self.read_entry(slice, cluster)?;
        match entry.piece(range, &self.geometry) {
            (_, len) if len < range.len => return Ok(false),
            (Piece::Unallocated(_), _) => self.map_unallocated(range, cache, out)?,
            (piece, len) => self.push(piece, len, out),
        }
        Ok(true)
    }

    /// Any range, as far as it is known.
    fn map_all_cached(
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
            let (mapped, below) = match intent {
                Intent::Read => self.map_slice(slice, run, out)?,
                Intent::WriteInPlace => (self.map_in_place(slice, run, out)?, 0),
            };
            range = range.skip(mapped);
            if mapped == run.len {
                continue;
            }
            if intent == Intent::WriteInPlace || out.is_full() {
                return Ok(());
            }
            // The lookup goes on in the backing image, and comes back for what follows.
            let part = range.take(below);
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

    /// Maps the start of a run inside one slice for reading, up to what the backing image has;
    /// returns the bytes mapped, and the bytes behind them that are the backing image's.
    fn map_slice(
        &self,
        slice: &TableSlice,
        mut run: GuestRange,
        out: &mut Extents,
    ) -> Result<(u64, u64)> {
        let before = out.len();
        while run.len > 0 && !out.is_full() {
            let cluster = self.geometry.cluster(run.start);
            let entry = self.read_entry(slice, cluster)?;
            let part = self.until(run, cluster + 1);
            let (piece, len) = entry.piece(part, &self.geometry);
            if matches!(piece, Piece::Unallocated(_)) && self.backing.is_some() {
                return Ok((out.len() - before, len));
            }
            self.push(piece, len, out);
            run = run.skip(len);
        }
        Ok((out.len() - before, 0))
    }

    /// Appends an extent; what is unallocated has nothing below it.
    fn push(&self, piece: Piece, len: u64, out: &mut Extents) {
        match piece {
            Piece::Data(offset) => self.push_data(offset, len, out),
            Piece::Compressed => out.push_opaque(len),
            Piece::Zero(_) | Piece::Unallocated(_) => out.push(len, ExtentKind::Zero),
        }
    }

    /// Appends data at `offset` of the file with the guest's data.
    fn push_data(&self, offset: u64, len: u64, out: &mut Extents) {
        let (file, offset) = (self.data_file, HostOffset(offset));
        if self.crypt.encryption.is_some() {
            out.push_encrypted(len, file, offset);
        } else {
            out.push(len, ExtentKind::Data { file, offset });
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
        if self.marks.is_corrupt() || !self.knows_metadata() {
            return Ok(0);
        }
        while run.len > 0 && !out.is_full() {
            let cluster = self.geometry.cluster(run.start);
            let entry = self.read_entry(slice, cluster)?;
            let Some(host) = entry.own_host() else { break };
            let data_file = self.geometry.data_file;
            if !data_file && !self.overlap.allows_data(host >> self.geometry.cluster_bits) {
                break;
            }
            let part = self.until(run, cluster + 1);
            let (piece, len) = entry.piece(part, &self.geometry);
            if !matches!(piece, Piece::Data(_)) {
                break;
            }
            self.push(piece, len, out);
            run = run.skip(len);
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
        // An error is met again below, by who is concerned.
        let _ = self.map_cached(range, Intent::Read, &mut io.cache.borrow_mut(), out);
        if out.len() > before {
            return Ok(());
        }
        let run = self.map_own(io, range, out).await;
        let Some(run) = self.note_corruption(io, run).await? else {
            return Ok(());
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

    /// Maps the start of a range that this image has, or returns the run that it does not have.
    async fn map_own(
        &self,
        io: &Io,
        range: GuestRange,
        out: &mut Extents,
    ) -> Result<Option<GuestRange>> {
        let cluster = self.geometry.cluster(range.start);
        Ok(Some(match self.l2_slice(io, cluster).await? {
            None => self.until(range, self.geometry.table_end(cluster)),
            Some(slice) => {
                let part = self.until(range, cluster + 1);
                let entry = self.read_entry(&slice, cluster)?;
                match entry.piece(part, &self.geometry) {
                    (Piece::Unallocated(_), _) => self.unallocated_run(&slice, range)?,
                    (piece, len) => {
                        self.push(piece, len, out);
                        return Ok(None);
                    }
                }
            }
        }))
    }

    /// The part of a range, inside one slice, from its start that is unallocated.
    fn unallocated_run(&self, slice: &TableSlice, range: GuestRange) -> Result<GuestRange> {
        let first = self.geometry.cluster(range.start);
        let mut rest = self.until(range, self.geometry.slice_end(first));
        let mut len = 0;
        while rest.len > 0 {
            let cluster = self.geometry.cluster(rest.start);
            let part = self.until(rest, cluster + 1);
            let entry = self.read_entry(slice, cluster)?;
            let (Piece::Unallocated(_), run) = entry.piece(part, &self.geometry) else {
                break;
            };
            len += run;
            rest = rest.skip(run);
        }
        Ok(range.take(len))
    }

    /// What a guest cluster's L2 entry says; unallocated where there is no table.
    pub(super) async fn entry(&self, io: &Io, cluster: u64) -> Result<Entry> {
        match self.l2_slice(io, cluster).await? {
            Some(slice) => self.read_entry(&slice, cluster),
            None => Ok(Entry::Unallocated),
        }
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
        let Some(slice) = self.l2_slice(io, cluster).await? else {
            let run = self.until(range, self.geometry.table_end(cluster));
            return self.status_below(io, run).await;
        };
        let part = self.until(range, cluster + 1);
        let entry = self.read_entry(&slice, cluster)?;
        let (piece, mut len) = entry.piece(part, &self.geometry);
        if let Piece::Unallocated(_) = piece {
            let run = self.unallocated_run(&slice, range)?;
            return self.status_below(io, run).await;
        }
        // What goes on in the same way, contiguous in the file where that matters.
        let mut rest = self
            .until(range, self.geometry.slice_end(cluster))
            .skip(len);
        while rest.len > 0 {
            let next = self.geometry.cluster(rest.start);
            let part = self.until(rest, next + 1);
            let (other, more) = self.read_entry(&slice, next)?.piece(part, &self.geometry);
            if !continues(piece, len, other) {
                break;
            }
            len += more;
            rest = rest.skip(more);
        }
        let offset = match piece {
            Piece::Data(offset) => Some(HostOffset(offset)),
            Piece::Zero(place) => place.map(HostOffset),
            Piece::Unallocated(_) | Piece::Compressed => None,
        }
        // What lies there encrypted is not what the guest sees.
        .filter(|_| self.crypt.encryption.is_none());
        Ok(BlockStatus {
            len,
            depth: 0,
            present: true,
            zero: matches!(piece, Piece::Zero(_)),
            data: !matches!(piece, Piece::Zero(_)),
            compressed: piece == Piece::Compressed,
            offset,
            file: offset.map(|_| self.data_file),
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

/// Whether a piece goes on as another one `len` bytes behind its start.
fn continues(piece: Piece, len: u64, next: Piece) -> bool {
    match (piece, next) {
        (Piece::Data(at), Piece::Data(next)) | (Piece::Zero(Some(at)), Piece::Zero(Some(next))) => {
            at.checked_add(len) == Some(next)
        }
        (Piece::Zero(None), Piece::Zero(None)) | (Piece::Compressed, Piece::Compressed) => true,
        _ => false,
    }
}
