//! Writing where nothing can be overwritten: prepare, write, commit.

use super::{
    Qcow2,
    claims::Claim,
    flush::Punch,
    l2::{Entry, data_entry, decode},
    read_only,
};
use crate::{
    GuestRange, Result,
    image::{Commit, Prepared},
    io::Io,
    sync::LocalFuture,
    table::WritePin,
    types::HostOffset,
};

/// The most bytes one preparation covers.
const MAX_PREPARED: u64 = 4 << 20;

/// Where the clusters of a prepared write come from.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// New clusters: given back if the write is not committed.
    New { first: u64 },
    /// The cluster kept for a zero cluster, with one reference.
    Kept { first: u64 },
}

impl Target {
    fn first(self) -> u64 {
        match self {
            Target::New { first } | Target::Kept { first } => first,
        }
    }
}

/// A write on its way: its guest clusters are claimed, its host clusters reserved.
struct Allocation<'a> {
    image: &'a Qcow2,
    /// The first guest cluster, and how many.
    cluster: u64,
    count: u64,
    target: Target,
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
        if let (false, Target::New { first }) = (self.committed, self.target) {
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
        if !self.writable {
            return Err(read_only());
        }
        self.relieve(io).await?;
        let first = self.geometry.cluster(range.start);
        let range = self.until(range.take(MAX_PREPARED), self.geometry.slice_end(first));
        let (_, end) = self.geometry.touched(range);
        let claim = self.claims.claim(first, end).await;
        let slice = self.l2_slice_for_change(io, first).await?;
        let read = |cluster: u64| {
            let raw = slice.get(self.geometry.in_slice(cluster));
            decode(raw, cluster, &self.geometry)
        };
        let entry = read(first)?;
        let (target, count, virgin) = match entry {
            Entry::Data { copied: true, .. } => return Ok(None),
            Entry::Zero {
                host: Some(host),
                copied: true,
            } => {
                let target = Target::Kept {
                    first: host >> self.geometry.cluster_bits,
                };
                (target, 1, false)
            }
            _ => {
                let mut wanted = 1;
                while first + wanted < end && needs_clusters(read(first + wanted)?) {
                    wanted += 1;
                }
                let run = self.refcounts.allocate(io, wanted, false).await?;
                (Target::New { first: run.first }, run.count, run.virgin)
            }
        };
        let allocation = Allocation {
            image: self,
            cluster: first,
            count,
            target,
            slice,
            committed: false,
            _claim: claim,
        };
        let part = self.until(range, first + count);
        let head = self.geometry.in_cluster(part.start.0);
        let tail = self.geometry.start(first + count) - part.end();
        let last = first + count - 1;
        let read = |cluster: u64| {
            let raw = allocation.slice.get(self.geometry.in_slice(cluster));
            decode(raw, cluster, &self.geometry)
        };
        let fill_zero = (head == 0 || self.reads_zero(read(first)?, first))
            && (tail == 0 || self.reads_zero(read(last)?, last));
        // The file has zeroes already where nothing was ever written; encrypted zeroes it has not.
        let (head, tail) = if fill_zero && virgin && self.crypt.encryption.is_none() {
            (0, 0)
        } else {
            (head, tail)
        };
        let in_first = self.geometry.in_cluster(part.start.0);
        Ok(Some(Prepared {
            len: part.len,
            file: self.file,
            offset: HostOffset(self.geometry.start(target.first()) + in_first),
            head,
            tail,
            fill_zero,
            commit: Box::new(allocation),
        }))
    }

    /// Whether a cluster reads as zeroes, as far as its entry and the backing image's size tell.
    pub(super) fn reads_zero(&self, entry: Entry, cluster: u64) -> bool {
        match entry {
            Entry::Zero { .. } => true,
            Entry::Unallocated => {
                let size = self.geometry.cluster_size();
                let range = GuestRange::new(self.geometry.start(cluster), size);
                self.in_backing(range).len == 0
            }
            Entry::Data { .. } | Entry::Compressed(_) => false,
        }
    }

    /// Makes a written allocation visible.
    fn link(&self, allocation: &Allocation<'_>) -> Result<()> {
        let change = allocation.slice.change();
        for index in 0..allocation.count {
            let cluster = allocation.cluster + index;
            let place = self.geometry.in_slice(cluster);
            let before = decode(change.get(place), cluster, &self.geometry)?;
            let host = self.geometry.start(allocation.target.first() + index);
            self.set_entry(&allocation.slice, &change, place, data_entry(host));
            let kept = matches!(allocation.target, Target::Kept { .. });
            if !kept {
                self.unlink(before, Punch::No);
            }
        }
        Ok(())
    }

    /// What an entry named loses a reference with the next flush. The entry is gone from memory.
    pub(super) fn unlink(&self, before: Entry, punch: Punch) {
        match before {
            Entry::Unallocated | Entry::Zero { host: None, .. } => {}
            Entry::Data { host, .. }
            | Entry::Zero {
                host: Some(host), ..
            } => {
                let first = host >> self.geometry.cluster_bits;
                self.pending.free_clusters(first, 1, punch);
            }
            Entry::Compressed(data) => {
                let (first, last) = data.clusters(&self.geometry);
                self.pending.free_compressed(data, first, last);
            }
        }
    }

    /// Writes one compressed cluster; `false` when it does not shrink.
    pub(super) async fn write_compressed_cluster(
        &self,
        io: &Io,
        range: GuestRange,
        data: &[u8],
    ) -> Result<bool> {
        if !self.writable {
            return Err(read_only());
        }
        if self.crypt.encryption.is_some() {
            return Err(crate::Error::unsupported(
                "Compression and encryption not supported at the same time",
            ));
        }
        let size = self.geometry.cluster_size();
        let whole = data.len() as u64 == size || range.end() == self.disk_size();
        if self.geometry.in_cluster(range.start.0) != 0 || !whole || data.len() as u64 > size {
            return Err(crate::Error::invalid_argument(format!(
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
        let offset = self.refcounts.allocate_bytes(io, bytes).await?;
        let first = offset >> self.geometry.cluster_bits;
        let last = (offset + bytes - 1) >> self.geometry.cluster_bits;
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
        let place = self.geometry.in_slice(cluster);
        let change = slice.change();
        let before = decode(change.get(place), cluster, &self.geometry)?;
        self.set_entry(&slice, &change, place, entry);
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

/// Whether writing to a cluster needs a new host cluster.
fn needs_clusters(entry: Entry) -> bool {
    !matches!(
        entry,
        Entry::Data { copied: true, .. }
            | Entry::Zero {
                host: Some(_),
                copied: true
            }
    )
}
