//! Bitmap tables and the bits they name.

use crate::{
    DirtyBits, Error, FileId, Result,
    formats::qcow2::{l2::Geometry, refcount::Refcounts},
    io::{AlignedBuf, Io},
};

/// Bits of a table entry that must be 0.
const RESERVED: u64 = 0xff00_0000_0000_01fe;
/// Bits 9 to 55: where a cluster of bits is.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Without an offset: all bits are set, not clear.
const ALL_ONES: u64 = 1;

/// Bytes of bits written at a time.
const PIECE: u64 = 1 << 20;

/// Where the bits of a bitmap are in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stored {
    /// Where the bitmap table starts.
    pub(super) offset: u64,
    /// Its entries.
    pub(super) entries: u32,
}

impl Stored {
    fn bytes(self) -> u64 {
        u64::from(self.entries) * 8
    }
}

/// The image that bitmaps are read from and written to.
pub(super) struct Place<'a> {
    pub(super) io: &'a Io,
    pub(super) file: FileId,
    pub(super) geometry: Geometry,
}

/// Whether a table entry is one that the specification allows.
pub(in crate::formats::qcow2) fn is_valid(entry: u64, cluster_size: u64) -> bool {
    let offset = entry & OFFSET;
    entry & RESERVED == 0
        && (offset == 0 || entry & ALL_ONES == 0)
        && offset & (cluster_size - 1) == 0
}

/// The cluster that a table entry names.
pub(in crate::formats::qcow2) fn cluster_of(entry: u64) -> Option<u64> {
    Some(entry & OFFSET).filter(|offset| *offset != 0)
}

impl Place<'_> {
    /// Bits in a cluster.
    fn bits_in_cluster(&self) -> u64 {
        self.geometry.cluster_size() * 8
    }

    /// Reads and checks a bitmap table.
    pub(super) async fn read_table(&self, name: &str, stored: Stored) -> Result<Vec<u64>> {
        let file_len = self.io.file_len(self.file)?;
        let cluster_size = self.geometry.cluster_size();
        let damaged = |what: String| Err(Error::corrupt(format!("Bitmap '{name}': {what}")));
        let end = stored.offset.saturating_add(stored.bytes());
        if end > file_len.next_multiple_of(cluster_size) {
            return damaged(format!(
                "bitmap table of {} entries at {:#x}, expected one inside the file of {file_len} bytes",
                stored.entries, stored.offset
            ));
        }
        let bytes = self
            .io
            .read_padded(self.file, stored.offset, stored.bytes() as usize)
            .await?;
        let table: Vec<u64> = bytes
            .as_chunks()
            .0
            .iter()
            .map(|entry| u64::from_be_bytes(*entry))
            .collect();
        for (index, &entry) in table.iter().enumerate() {
            let in_file = cluster_of(entry).is_none_or(|offset| offset < file_len);
            if !is_valid(entry, cluster_size) || !in_file {
                return damaged(format!(
                    "bitmap table entry {index}: {entry:#018x}, expected 0, 1 or the offset of a \
                     cluster of the file"
                ));
            }
        }
        let named = table.iter().filter_map(|entry| cluster_of(*entry)).count() as u64;
        if named > file_len.div_ceil(cluster_size) {
            return damaged(format!(
                "{named} clusters of bits, expected at most the {} of the file",
                file_len.div_ceil(cluster_size)
            ));
        }
        Ok(table)
    }

    /// Adds the bits that are stored.
    pub(super) async fn read_bits(
        &self,
        name: &str,
        stored: Stored,
        bits: &mut DirtyBits,
    ) -> Result<()> {
        let table = self.read_table(name, stored).await?;
        let needed = bits.bits().div_ceil(self.bits_in_cluster());
        if (table.len() as u64) < needed {
            return Err(Error::corrupt(format!(
                "Bitmap '{name}': bitmap table of {} entries, expected {needed}",
                table.len()
            )));
        }
        for (index, entry) in table.iter().enumerate() {
            let first = index as u64 * self.bits_in_cluster();
            match cluster_of(*entry) {
                Some(offset) => {
                    let size = self.geometry.cluster_size() as usize;
                    let bytes = self.io.read_padded(self.file, offset, size).await?;
                    bits.set_bytes(first, &bytes);
                }
                None if entry & ALL_ONES != 0 => {
                    bits.set_all(first, first + self.bits_in_cluster());
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Writes bits and their table to new clusters. After an error nothing is taken.
    pub(super) async fn write_bits(&self, counts: &Refcounts, bits: &DirtyBits) -> Result<Stored> {
        let mut taken = Vec::new();
        let result = self.write_new(counts, bits, &mut taken).await;
        if result.is_err() {
            for (first, count) in taken {
                counts.release(self.io, first, count).await?;
            }
        }
        result
    }

    async fn write_new(
        &self,
        counts: &Refcounts,
        bits: &DirtyBits,
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<Stored> {
        let (mut table, mixed) = self.plan(bits);
        let mut left = &mixed[..];
        while !left.is_empty() {
            let most = (PIECE >> self.geometry.cluster_bits).max(1);
            let wanted = (left.len() as u64).min(most);
            let run = counts.allocate(self.io, wanted, false).await?;
            taken.push((run.first, run.count));
            let size = self.geometry.cluster_size() as usize;
            let mut data = AlignedBuf::zeroed(run.count as usize * size);
            let (now, later) = left.split_at(run.count as usize);
            for (at, (index, out)) in now.iter().zip(data.chunks_exact_mut(size)).enumerate() {
                bits.get_bytes(*index as u64 * self.bits_in_cluster(), out);
                table[*index] = (run.first + at as u64) << self.geometry.cluster_bits;
            }
            let offset = run.first << self.geometry.cluster_bits;
            self.io.write(self.file, offset, data).await?;
            left = later;
        }
        let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        let offset = self.write_clusters(counts, &bytes, taken).await?;
        Ok(Stored {
            offset,
            entries: table.len() as u32,
        })
    }

    /// The table of some bits, and which of its entries need a cluster.
    fn plan(&self, bits: &DirtyBits) -> (Vec<u64>, Vec<usize>) {
        let per_cluster = self.bits_in_cluster();
        let entries = bits.bits().div_ceil(per_cluster).max(1);
        let mut table = vec![0; entries as usize];
        let mut mixed = Vec::new();
        let mut at = 0;
        while let Some(bit) = bits.next_set(at) {
            let index = bit / per_cluster;
            let (first, end) = (index * per_cluster, (index + 1) * per_cluster);
            if bits.next_clear(first) >= end {
                table[index as usize] = ALL_ONES;
            } else {
                mixed.push(index as usize);
            }
            at = end;
        }
        (table, mixed)
    }

    /// Writes bytes to new clusters and returns where.
    pub(super) async fn write_clusters(
        &self,
        counts: &Refcounts,
        bytes: &[u8],
        taken: &mut Vec<(u64, u64)>,
    ) -> Result<u64> {
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_size());
        let run = counts.allocate(self.io, clusters, true).await?;
        taken.push((run.first, run.count));
        let mut padded = AlignedBuf::zeroed((clusters << self.geometry.cluster_bits) as usize);
        padded[..bytes.len()].copy_from_slice(bytes);
        let offset = run.first << self.geometry.cluster_bits;
        self.io.write(self.file, offset, padded).await?;
        Ok(offset)
    }

    /// Gives back the clusters of a bitmap that nothing names any more.
    pub(super) async fn free(&self, counts: &Refcounts, name: &str, stored: Stored) -> Result<()> {
        for offset in self
            .read_table(name, stored)
            .await?
            .into_iter()
            .filter_map(cluster_of)
        {
            let cluster = offset >> self.geometry.cluster_bits;
            counts.release(self.io, cluster, 1).await?;
        }
        let first = stored.offset >> self.geometry.cluster_bits;
        let clusters = stored.bytes().div_ceil(self.geometry.cluster_size());
        counts.release(self.io, first, clusters).await
    }
}
