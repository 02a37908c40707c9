//! The state of a virtual machine: guest clusters behind the disk (specification: "Snapshots").
//!
//! It begins where the first L2 table begins that maps no byte of the disk. Nothing of it is ever in
//! the backing file.

use super::{Qcow2, header::MAX_L1_SIZE, l2::Entry, read_only};
use crate::{
    Error, GuestRange, Result,
    io::{AlignedBuf, Buffers, Io},
    serve,
    sync::lock,
};

/// Bytes read or written at a time; a multiple of every cluster size.
const PIECE: u64 = 4 << 20;

impl Qcow2 {
    /// The guest range of bytes of the VM state.
    fn vm_state_range(&self, offset: u64, len: u64) -> Result<GuestRange> {
        let header = lock(&self.header).clone();
        let per_table = self.geometry.table_end(0) << self.geometry.cluster_bits;
        let start = header.l1_entries_for(header.size) * per_table;
        let limit = (MAX_L1_SIZE / 8).saturating_mul(per_table);
        let first = start.checked_add(offset);
        match first.and_then(|first| Some((first, first.checked_add(len)?))) {
            Some((first, end)) if end <= limit => Ok(GuestRange::new(first, len)),
            _ => Err(Error::invalid_argument(format!(
                "VM state: {len} bytes at {offset}, expected them below {}",
                limit.saturating_sub(start)
            ))),
        }
    }

    /// Reads VM state.
    pub(super) async fn vm_state(&self, io: &Io, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut range = self.vm_state_range(offset, buf.len() as u64)?;
        let mut rest = buf;
        while range.len > 0 {
            let cluster = self.geometry.cluster(range.start);
            let part = self.until(range, cluster + 1);
            let (out, later) = rest.split_at_mut(part.len as usize);
            self.read_vm_cluster(io, part, out).await?;
            rest = later;
            range = range.skip(part.len);
        }
        Ok(())
    }

    /// Reads a part of one cluster of VM state.
    async fn read_vm_cluster(&self, io: &Io, part: GuestRange, out: &mut [u8]) -> Result<()> {
        let cluster = self.geometry.cluster(part.start);
        if self.entry(io, cluster).await? == Entry::Unallocated {
            out.fill(0);
            return Ok(());
        }
        let buffers = Buffers::owned(AlignedBuf::zeroed(out.len()));
        serve::read(self, io, part, &buffers, 0).await?;
        buffers.copy_out(0, out);
        Ok(())
    }

    /// Writes VM state. The disk is drained.
    pub(super) async fn set_vm_state(&self, io: &Io, offset: u64, data: &[u8]) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        let mut range = self.vm_state_range(offset, data.len() as u64)?;
        self.make_room_for_vm_state(io, range).await?;
        let mut rest = data;
        while range.len > 0 {
            let first = self.geometry.cluster(range.start);
            let most = first + (PIECE >> self.geometry.cluster_bits);
            let part = self.until(range, most);
            let (now, later) = rest.split_at(part.len as usize);
            self.write_vm_clusters(io, part, now).await?;
            rest = later;
            range = range.skip(part.len);
        }
        Ok(())
    }

    /// Writes whole clusters: nothing is copied from below, where there is no VM state.
    async fn write_vm_clusters(&self, io: &Io, part: GuestRange, data: &[u8]) -> Result<()> {
        let size = self.geometry.cluster_size();
        let (first, end) = self.geometry.touched(part);
        let mut whole = AlignedBuf::zeroed(((end - first) * size) as usize);
        let start = self.geometry.start(first);
        let head = part.start.0 - start;
        if head > 0 {
            let range = GuestRange::new(start, head);
            self.read_vm_cluster(io, range, &mut whole[..head as usize])
                .await?;
        }
        let after = (head + part.len) as usize;
        if after < whole.len() {
            let range = GuestRange::new(part.end(), (whole.len() - after) as u64);
            self.read_vm_cluster(io, range, &mut whole[after..]).await?;
        }
        whole[head as usize..after].copy_from_slice(data);
        let range = GuestRange::new(start, whole.len() as u64);
        let buffers = Buffers::owned(whole);
        serve::write_image(self, io, range, &buffers, false)
            .await
            .map(drop)
    }

    /// Makes the L1 table long enough.
    async fn make_room_for_vm_state(&self, io: &Io, range: GuestRange) -> Result<()> {
        let (_, end) = self.geometry.touched(range);
        let entries = end.div_ceil(self.geometry.table_end(0));
        if entries <= self.l1.entries() {
            return Ok(());
        }
        self.settle(io).await?;
        let mut header = lock(&self.header).clone();
        let size = header.size;
        self.move_l1(io, entries, size, &mut header).await
    }

    /// Forgets the VM state of the disk as it is now; snapshots keep theirs.
    pub(super) async fn drop_vm_state(&self, io: &Io) -> Result<()> {
        let first_table = {
            let header = lock(&self.header);
            header.l1_entries_for(header.size)
        };
        let per_table = self.geometry.table_end(0);
        let (first, end) = (
            first_table.saturating_mul(per_table),
            self.l1.entries().saturating_mul(per_table),
        );
        if first < end {
            self.forget_clusters(io, first, end).await?;
        }
        Ok(())
    }
}
