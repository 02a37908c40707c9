//! Changing the size of the disk, and what is below it.

use std::sync::atomic::Ordering;

use super::{
    Qcow2,
    change::Becomes,
    header::{Header, MAX_L1_SIZE},
    l2::{L2Entry, Units},
};
use crate::{
    Error, GuestRange, Result,
    io::{AlignedBuf, Io},
    serve,
    sync::lock,
};

impl Qcow2 {
    /// Names another backing file in the header. No request is in flight.
    pub(super) async fn name_backing(
        &self,
        io: &Io,
        name: Option<&str>,
        format: Option<&str>,
    ) -> Result<()> {
        self.check_writable()?;
        if self.raw_data && name.is_some() {
            return Err(Error::unsupported(
                "a backing file together with data-file-raw: the data file would not be the disk",
            ));
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

    /// Changes the size of the disk. No request is in flight.
    pub(super) async fn change_size(&self, io: &Io, size: u64) -> Result<()> {
        self.check_writable()?;
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
        if size < old_size {
            let cluster_size = self.geometry.cluster_size();
            let first = size.next_multiple_of(cluster_size);
            let end = old_size.next_multiple_of(cluster_size);
            self.change_units(io, first, end, Becomes::Gone).await?;
        } else {
            let mut header = lock(&self.header).clone();
            let entries = header.l1_entries_for(size);
            if entries > self.l1.entries() {
                self.move_l1(io, entries, size, &mut header).await?;
            }
            self.clear_growth(io, old_size, size).await?;
            self.grow_data_file(io, size).await?;
            self.map_growth(io, old_size, size).await?;
        }
        self.settle(io).await?;
        // Flushing may have moved the reference count table.
        let mut header = lock(&self.header).clone();
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
        if self.raw_data && size < old_size {
            // A raw disk is as long as its file. What is too long is too late to be an error.
            if let Err(error) = io.set_len(self.data_file, size).await {
                tracing::warn!(%error, "the data file is longer than the disk");
            }
        }
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

    async fn grow_data_file(&self, io: &Io, size: u64) -> Result<()> {
        if self.data_file != self.file && io.file_len(self.data_file)? < size {
            io.set_len(self.data_file, size).await?;
        }
        Ok(())
    }

    /// The clusters of a raw data file are mapped before they are written, as when the image was made:
    /// what the disk reads is what the file has. An encrypted file is no disk by itself, and its new
    /// clusters would read as noise.
    async fn map_growth(&self, io: &Io, old_size: u64, size: u64) -> Result<()> {
        if !self.raw_data || self.crypt.encryption.is_some() {
            return Ok(());
        }
        let cluster_size = self.geometry.cluster_size();
        let (mut first, end) = (old_size.div_ceil(cluster_size), size.div_ceil(cluster_size));
        while first < end {
            self.relieve(io).await?;
            let stop = end.min(self.geometry.slice_end(first));
            let _claim = self.claims.claim(first, stop).await;
            let slice = self.l2_slice_for_change(io, first).await?;
            let change = slice.change();
            for cluster in first..stop {
                let (raw, _) = self.read_change(&change, cluster)?;
                if raw == L2Entry::default() {
                    let host = self.geometry.start(cluster);
                    // Its subclusters count as written with the first write.
                    let entry = L2Entry::of_units(host, Units::NONE, Units::NONE, &self.geometry);
                    self.set_l2_entry(&slice, &change, cluster, entry);
                }
            }
            drop(change);
            first = stop;
        }
        Ok(())
    }

    /// What the last cluster still has beyond the old end, from when the disk was larger, and what
    /// the backing file has there, must not appear when the disk grows.
    async fn clear_growth(&self, io: &Io, old_size: u64, size: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let first = old_size.next_multiple_of(cluster_size);
        let end = size.next_multiple_of(cluster_size);
        let uncovered =
            first < end && self.in_backing(GuestRange::new(first, size - first)).len > 0;
        if uncovered && !self.geometry.zero_flag {
            return Err(Error::unsupported(format!(
                "size: growing from {old_size} to {size} bytes would uncover data of the backing file"
            )));
        }
        if old_size < first {
            let rest = GuestRange::new(old_size, first.min(size) - old_size);
            serve::write_zeroes(self, io, rest, false).await?;
        }
        if uncovered {
            self.change_units(io, first, end, Becomes::ZeroUnmapped)
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
        let offset = self.copy_l1(io, entries, size).await?;
        // Flushing may have moved the reference count table.
        *header = lock(&self.header).clone();
        header.l1_table_offset = offset;
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
        let run = self.allocate(io, "L1 table", clusters, true).await?;
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
