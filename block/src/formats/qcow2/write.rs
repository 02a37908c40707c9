//! Writing where nothing can be overwritten: prepare, write, commit.

use super::{
    Qcow2,
    claims::Claim,
    flush::Punch,
    l2::{Entry, L2Entry, Piece, Units},
};
use crate::{
    Error, GuestRange, Result,
    image::{Commit, Prepared},
    io::Io,
    sync::{LocalFuture, lock},
    table::WritePin,
    types::HostOffset,
};

/// The most bytes one preparation covers.
const MAX_PREPARED: u64 = 4 << 20;

/// Where the clusters of a prepared write come from.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// New clusters: given back if the write is not committed. Virgin ones were never written.
    New { first: u64, virgin: bool },
    /// The clusters that the guest clusters have already: kept for zeroes, or with some subclusters
    /// in use.
    Kept { first: u64 },
    /// Clusters of a data file. They have no reference counts: a guest cluster lives at its own offset.
    DataFile { first: u64 },
}

impl Target {
    fn first(self) -> u64 {
        match self {
            Target::New { first, .. } | Target::Kept { first } | Target::DataFile { first } => {
                first
            }
        }
    }
}

/// What a prepared write covers of a cluster that it does not fill.
#[derive(Clone, Copy, Debug)]
struct Cover {
    /// Units that are data afterwards.
    units: Units,
    /// Bytes written before the data of the request.
    head: u64,
    /// Bytes written after it.
    tail: u64,
}

/// A write on its way: its guest clusters are claimed, its host clusters reserved.
struct Allocation<'a> {
    image: &'a Qcow2,
    /// The first guest cluster, and how many.
    cluster: u64,
    count: u64,
    target: Target,
    /// The units covered of the first cluster, and of the last.
    ends: (Units, Units),
    slice: WritePin,
    committed: bool,
    _claim: Claim<'a>,
}

impl Commit for Allocation<'_> {
    fn commit<'a>(mut self: Box<Self>, _io: &'a Io) -> LocalFuture<'a, Result<()>>
    where
        Self: 'a,
    {
        Box::pin(async move {
            self.committed = true;
            self.image.link(&self)
        })
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        if let (false, Target::New { first, .. }) = (self.committed, self.target) {
            // No mapping ever named them. They lose their reference with the next flush.
            self.image
                .pending
                .free_clusters(first, self.count, Punch::No);
        }
    }
}

impl Qcow2 {
    /// Prepares the start of a write.
    pub(super) async fn prepare_write<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> Result<Option<Prepared<'a>>> {
        self.check_writable()?;
        self.know_metadata(io).await?;
        self.relieve(io).await?;
        let first = self.geometry.cluster(range.start);
        let range = self.until(range.take(MAX_PREPARED), self.geometry.slice_end(first));
        let (_, end) = self.geometry.touched(range);
        let claim = self.claims.claim(first, end).await;
        let slice = self.l2_slice_for_change(io, first).await?;
        let entry = self.read_entry(&slice, first)?;
        let in_first = self.until(range, first + 1);
        if let Some(host) = entry.own_host() {
            if !self.geometry.data_file {
                self.check_new(host >> self.geometry.cluster_bits, 1)?;
            }
            if matches!(entry.piece(in_first, &self.geometry).0, Piece::Data(_)) {
                return Ok(None);
            }
        }
        let (target, count) = self.find_target(io, &slice, first, end).await?;
        let mut allocation = Allocation {
            image: self,
            cluster: first,
            count,
            target,
            ends: (Units::NONE, Units::NONE),
            slice,
            committed: false,
            _claim: claim,
        };
        let mut part = self.until(range, first + count);
        let kept = matches!(target, Target::Kept { .. });
        if kept {
            part = self.before_data(&allocation.slice, part)?;
            allocation.count = self.geometry.touched(part).1 - first;
        }
        let count = allocation.count;
        let head_part = self.until(part, first + 1);
        let tail_part = if count == 1 {
            part
        } else {
            part.skip(self.until(part, first + count - 1).len)
        };
        let last_entry = self.read_entry(&allocation.slice, first + count - 1)?;
        let at_head = self.cover(entry, kept, head_part);
        let at_tail = self.cover(last_entry, kept, tail_part);
        allocation.ends = (at_head.units, at_tail.units);
        let head = at_head.head;
        let mut tail = at_tail.tail;
        if self.geometry.data_file {
            // The file of a raw disk does not become longer than the disk.
            tail = tail.min(self.disk_size().saturating_sub(part.end()));
        }
        let before = GuestRange::new(part.start.0 - head, head);
        let fill_zero = self.reads_zero(entry, before)
            && self.reads_zero(last_entry, GuestRange::new(part.end(), tail));
        let (head, tail) = if fill_zero && self.is_zero_already(target) {
            (0, 0)
        } else {
            (head, tail)
        };
        let in_first = self.geometry.in_cluster(part.start.0);
        Ok(Some(Prepared {
            len: part.len,
            file: self.data_file,
            offset: HostOffset(self.geometry.start(target.first()) + in_first),
            head,
            tail,
            fill_zero,
            commit: Box::new(allocation),
        }))
    }

    /// Whether the disk would read zeroes from the new place of a cluster, if nothing were written there:
    /// the file has zeroes where nothing was ever written, but no encrypted ones.
    fn is_zero_already(&self, target: Target) -> bool {
        let virgin = matches!(target, Target::New { virgin: true, .. });
        virgin && self.crypt.encryption.is_none()
    }

    /// Finds host clusters for guest clusters from `first` on, up to `end`: which, and how many.
    async fn find_target(
        &self,
        io: &Io,
        slice: &WritePin,
        first: u64,
        end: u64,
    ) -> Result<(Target, u64)> {
        let mut count = 1;
        if let Some(host) = self.read_entry(slice, first)?.own_host() {
            while first + count < end {
                let next = self.read_entry(slice, first + count)?;
                let follows = host.checked_add(self.geometry.start(count));
                if matches!(next, Entry::Data { .. })
                    || next.own_host().is_none()
                    || next.own_host() != follows
                {
                    break;
                }
                count += 1;
            }
            let first = host >> self.geometry.cluster_bits;
            if !self.geometry.data_file {
                self.check_new(first, count)?;
            }
            return Ok((Target::Kept { first }, count));
        }
        while first + count < end && self.read_entry(slice, first + count)?.own_host().is_none() {
            count += 1;
        }
        if self.geometry.data_file {
            return Ok((Target::DataFile { first }, count));
        }
        let run = self.allocate(io, "data cluster", count, false).await?;
        let target = Target::New {
            first: run.first,
            virgin: run.virgin,
        };
        Ok((target, run.count))
    }

    /// A run for clusters that stay where they are, without a last unit that it fills in part and that
    /// has data: that part can be written in place.
    fn before_data(&self, slice: &WritePin, run: GuestRange) -> Result<GuestRange> {
        let unit = self.geometry.unit();
        let start = run.end() / unit * unit;
        if start == run.end() || start <= run.start.0 {
            return Ok(run);
        }
        let part = GuestRange::new(start, run.end() - start);
        let cluster = self.geometry.cluster(part.start);
        let entry = self.read_entry(slice, cluster)?;
        Ok(match entry.piece(part, &self.geometry).0 {
            Piece::Data(_) => run.take(start - run.start.0),
            _ => run,
        })
    }

    /// What a write to a part of a cluster covers of it: whole units, and when the cluster moves to a
    /// new place all that have data.
    fn cover(&self, entry: Entry, kept: bool, part: GuestRange) -> Cover {
        let geometry = &self.geometry;
        let from = geometry.in_cluster(part.start.0);
        let to = from + part.len;
        let touched = geometry.units(from, to);
        let (data, _) = entry.units(geometry);
        let mut units = touched;
        if !kept && !data.is_empty() {
            units = Units::range(
                touched.first().min(data.first()),
                touched.end().max(data.end()),
            );
        }
        let bits = geometry.unit_bits();
        Cover {
            units,
            head: from - (u64::from(units.first()) << bits),
            tail: (u64::from(units.end()) << bits) - to,
        }
    }

    /// Whether a range inside a cluster reads as zeroes, as far as its entry and the backing image's
    /// size tell.
    pub(super) fn reads_zero(&self, entry: Entry, mut range: GuestRange) -> bool {
        while range.len > 0 {
            let (piece, len) = entry.piece(range, &self.geometry);
            let zero = match piece {
                Piece::Zero(_) => true,
                Piece::Unallocated(_) => self.in_backing(range.take(len)).len == 0,
                Piece::Data(_) | Piece::Compressed => false,
            };
            if !zero {
                return false;
            }
            range = range.skip(len);
        }
        true
    }

    /// Makes a written allocation visible.
    fn link(&self, allocation: &Allocation<'_>) -> Result<()> {
        let change = allocation.slice.change();
        let kept = matches!(allocation.target, Target::Kept { .. });
        let host_end = allocation.target.first() + allocation.count;
        let zero_anyway = self.is_zero_already(allocation.target)
            && self.ahead.is_durable(self.geometry.start(host_end));
        for index in 0..allocation.count {
            let cluster = allocation.cluster + index;
            let (_, before) = self.read_change(&change, cluster)?;
            let mut written = self.geometry.all_units();
            if index == 0 {
                written.0 &= allocation.ends.0.0;
            }
            if index + 1 == allocation.count {
                written.0 &= allocation.ends.1.0;
            }
            let whole = GuestRange::new(self.geometry.start(cluster), self.geometry.cluster_size());
            // If power fails with the entry on the disk and the data not, the cluster reads as before.
            if !zero_anyway || !self.reads_zero(before, whole) {
                self.pending.rely();
            }
            let (data, zero) = before.units(&self.geometry);
            let host = self.geometry.start(allocation.target.first() + index);
            let after = L2Entry::of_units(
                host,
                Units(data.0 | written.0),
                Units(zero.0 & !written.0),
                &self.geometry,
            );
            self.put_l2_entry(&allocation.slice, &change, cluster, after);
            if !kept {
                self.unlink(before, Punch::No);
            }
        }
        Ok(())
    }

    /// What an entry named loses a reference with the next flush. The entry is gone from memory.
    pub(super) fn unlink(&self, before: Entry, punch: Punch) {
        if self.geometry.data_file {
            // Clusters of a data file have no reference counts.
            return;
        }
        if let Entry::Compressed(data) = before {
            let (first, last) = data.clusters(&self.geometry);
            self.pending.free_compressed(data, first, last);
        } else if let Some(host) = before.host() {
            let first = host >> self.geometry.cluster_bits;
            self.pending.free_clusters(first, 1, punch);
        }
    }

    /// Writes one compressed cluster; `false` when it does not shrink.
    pub(super) async fn write_compressed_cluster(
        &self,
        io: &Io,
        range: GuestRange,
        data: &[u8],
    ) -> Result<bool> {
        self.check_writable()?;
        if self.crypt.encryption.is_some() {
            return Err(Error::unsupported(
                "Compression and encryption not supported at the same time",
            )
            .field(
                "crypt_method",
                lock(&self.header).crypt_method as u32,
                "0 for compressed clusters",
            ));
        }
        if self.geometry.data_file {
            return Err(Error::unsupported(
                "compressed clusters together with an external data file",
            )
            .field(
                "incompatible_features",
                format_args!("{:#x}", lock(&self.header).incompatible_features.0),
                "bit 2 to be clear",
            ));
        }
        let size = self.geometry.cluster_size();
        let whole = data.len() as u64 == size || range.end() == self.disk_size();
        if self.geometry.in_cluster(range.start.0) != 0 || !whole || data.len() as u64 > size {
            return Err(Error::invalid_argument(format!(
                "compressed write of {} bytes at {}: expected one whole cluster of {size} bytes",
                data.len(),
                range.start.0
            )));
        }
        let Some(packed) = self.compress(io, data).await? else {
            return Ok(false);
        };
        self.relieve(io).await?;
        let cluster = self.geometry.cluster(range.start);
        let _claim = self.claims.claim(cluster, cluster + 1).await;
        let slice = self.l2_slice_for_change(io, cluster).await?;
        let bytes = packed.len() as u64;
        self.before_allocation(io).await?;
        let offset = self.refcounts.allocate_bytes(io, bytes).await?;
        let first = offset >> self.geometry.cluster_bits;
        let last = (offset + bytes - 1) >> self.geometry.cluster_bits;
        self.note_new_blocks()?;
        self.check_new(first, last - first + 1)?;
        let entry = super::l2::Compressed::entry(offset, bytes, &self.geometry);
        let written = match entry {
            Some(_) => self.write_packed(io, offset, &packed).await,
            None => Ok(()),
        };
        let (Some(entry), Ok(())) = (entry, &written) else {
            self.pending
                .free_clusters(first, last - first + 1, Punch::No);
            written?;
            return Ok(false);
        };
        let change = slice.change();
        let (_, before) = self.read_change(&change, cluster)?;
        let entry = L2Entry {
            word: entry,
            bitmap: 0,
        };
        self.set_l2_entry(&slice, &change, cluster, entry);
        self.unlink(before, Punch::No);
        Ok(true)
    }

    fn disk_size(&self) -> u64 {
        crate::image::Image::size(self)
    }

    /// Compresses a cluster on the pool.
    async fn compress(&self, io: &Io, data: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut cluster = vec![0; self.geometry.cluster_size() as usize];
        cluster[..data.len()].copy_from_slice(data);
        let codec = self.decompressed.codec();
        io.run(move || codec.compress(&cluster)).await
    }

    async fn write_packed(&self, io: &Io, offset: u64, packed: &[u8]) -> Result<()> {
        let buffer = crate::io::AlignedBuf::from_slice(packed);
        io.write(self.file, offset, buffer).await.map(drop)
    }
}
