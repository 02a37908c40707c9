//! Repairing reference counts: where they are, or from nothing.

use super::{
    Checker, Repair,
    refcounts::{Blocks, set_entry},
};
use crate::{
    Result,
    formats::qcow2::header::MAX_REFCOUNT_TABLE_SIZE,
    io::{AlignedBuf, FallocateMode},
};

/// Where the header names the reference count table: offset, then clusters.
const TABLE_FIELDS: u64 = 48;

/// Most runs of freed clusters whose space is given back.
const MAX_HOLES: usize = 1 << 16;

impl Checker<'_> {
    /// Sets reference counts to what was found, where they are.
    pub(super) async fn fix_refcounts(&mut self, blocks: &Blocks) -> Result<()> {
        let order = self.header.refcount_order;
        let block_bits = self.header.refcount_block_bits();
        let max = self.header.refcount_max();
        let all = self.repair == Repair::All;
        let (mut low, mut leaks) = (0, 0);
        let mut holes: Vec<(u64, u64)> = Vec::new();
        for index in 0..blocks.table.len() as u64 {
            let first = index << block_bits;
            let mut changes: Vec<(u64, u64)> = Vec::new();
            let say = &mut self.say;
            let end = first + (1 << block_bits);
            self.disk
                .for_each_difference(&self.counted, first, end, |cluster, disk, counted| {
                    let counted = u64::from(counted).min(max);
                    let is_low = u64::from(disk) < counted;
                    if u64::from(disk) == counted {
                        return;
                    }
                    let kind = if is_low && !all { "ERROR" } else { "Repairing" };
                    say(&format!(
                        "{kind} cluster {cluster} refcount={disk} reference={counted}"
                    ));
                    if is_low && !all {
                        return;
                    }
                    if is_low {
                        low += 1;
                    } else {
                        leaks += 1;
                    }
                    changes.push((cluster, counted));
                });
            if changes.is_empty() {
                continue;
            }
            // A block that could not be read counts nothing, and then a rebuild was needed.
            let offset = blocks.offset(index);
            let len = self.header.cluster_size() as usize;
            let mut bytes = self.io.read_padded(self.file, offset, len).await?;
            for &(cluster, count) in &changes {
                set_entry(&mut bytes, cluster - first, order, count);
                self.disk.set(cluster, count);
                if count == 0 {
                    let room = holes.len() < MAX_HOLES;
                    match holes.last_mut() {
                        Some((start, len)) if *start + *len == cluster => *len += 1,
                        _ if room => holes.push((cluster, 1)),
                        _ => {}
                    }
                }
            }
            self.io.write(self.file, offset, bytes).await?;
        }
        self.damage.low -= low;
        self.report.leaks -= leaks;
        self.report.corruptions_fixed += low;
        self.report.leaks_fixed += leaks;
        self.needs_copied_pass = true;
        if self.damage.mapping == 0 {
            self.punch(holes).await?;
        }
        Ok(())
    }

    /// Gives the host space of freed clusters back; where the host cannot, it stays.
    async fn punch(&self, holes: Vec<(u64, u64)>) -> Result<()> {
        // Free in the image before it is free on the host.
        self.io.sync(self.file).await?;
        let bits = self.header.cluster_bits;
        for (cluster, clusters) in holes {
            let len = clusters << bits;
            let hole = self
                .io
                .fallocate(self.file, FallocateMode::PunchHole, cluster << bits, len);
            if hole.await.is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Takes blocks outside the file out of the table.
    pub(super) async fn forget_outside(&mut self, blocks: &mut Blocks) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let mut forgotten = 0;
        for entry in &mut blocks.table {
            if *entry & (cluster_size - 1) == 0 && *entry >= self.file_len {
                *entry = 0;
                forgotten += 1;
            }
        }
        let bytes: Vec<u8> = blocks
            .table
            .iter()
            .flat_map(|entry| entry.to_be_bytes())
            .collect();
        let bytes = AlignedBuf::from_slice(&bytes);
        self.io
            .write(self.file, self.header.refcount_table_offset, bytes)
            .await?;
        self.damage.structure -= forgotten;
        self.report.corruptions_fixed += forgotten;
        Ok(())
    }

    /// Writes new reference counts behind everything in use, then makes the header name them. Until
    /// then nothing that was there changes.
    pub(super) async fn rebuild_refcounts(&mut self, blocks: &Blocks) -> Result<()> {
        (self.say)("Rebuilding refcount structure");
        let bits = self.header.cluster_bits;
        // Where the mapping is damaged, clusters that nobody names may still be of use to somebody.
        let in_use = if self.damage.mapping > 0 {
            self.file_len.div_ceil(1 << bits).checked_sub(1)
        } else {
            self.counted.highest()
        };
        let start = in_use
            .max(self.counted.highest())
            .map_or(0, |last| last + 1);
        self.forget_structure(blocks);
        let Some((used, table_clusters)) = self.plan_blocks(start) else {
            self.error("ERROR allocating reftable: File too large");
            return Ok(());
        };
        let end = start + used.len() as u64 + table_clusters;
        self.counted.grow(end);
        self.disk.grow(end);
        for cluster in start..end {
            self.counted.set(cluster, 1);
        }
        self.write_blocks(start, &used).await?;
        let table_at = (start + used.len() as u64) << bits;
        let mut table = AlignedBuf::zeroed((table_clusters << bits) as usize);
        for (n, index) in used.iter().enumerate() {
            let at = *index as usize * 8;
            let offset = (start + n as u64) << bits;
            table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        }
        self.io.write(self.file, table_at, table).await?;
        self.io.sync(self.file).await?;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&table_at.to_be_bytes());
        fields[8..].copy_from_slice(&(table_clusters as u32).to_be_bytes());
        self.io
            .write(self.file, TABLE_FIELDS, AlignedBuf::from_slice(&fields))
            .await?;
        self.io.sync(self.file).await?;
        self.header.refcount_table_offset = table_at;
        self.header.refcount_table_clusters = table_clusters as u32;
        self.finish_rebuild();
        Ok(())
    }

    /// What the old structure took is not referenced any more.
    fn forget_structure(&mut self, blocks: &Blocks) {
        let mut old = blocks.counted.clone();
        if blocks.table_counted {
            let first = self.header.refcount_table_offset >> self.header.cluster_bits;
            old.extend(first..first + u64::from(self.header.refcount_table_clusters));
        }
        old.sort_unstable();
        for cluster in &old {
            self.counted.remove(*cluster);
        }
        old.dedup();
        for cluster in old {
            if self.counted.get(cluster) == 0 {
                (self.say)(&format!(
                    "Repairing cluster {cluster} refcount=1 reference=0"
                ));
            }
        }
    }

    /// Which blocks the references need when the new structure starts at `start`, and the clusters
    /// of its table. `None` when there would be too many.
    fn plan_blocks(&self, start: u64) -> Option<(Vec<u64>, u64)> {
        let block_bits = self.header.refcount_block_bits();
        let bits = self.header.cluster_bits;
        let mut used: Vec<u64> = (0..start.div_ceil(1 << block_bits))
            .filter(|index| {
                self.counted
                    .any(index << block_bits, (index + 1) << block_bits)
            })
            .collect();
        let mut table_clusters = 0;
        loop {
            let end = start + used.len() as u64 + table_clusters;
            let (len, table) = (used.len(), table_clusters);
            for index in start >> block_bits..end.div_ceil(1 << block_bits) {
                if let Err(at) = used.binary_search(&index) {
                    used.insert(at, index);
                }
            }
            table_clusters = (used.last()? * 8 + 8).div_ceil(1 << bits);
            if table_clusters << bits > MAX_REFCOUNT_TABLE_SIZE || end > 1 << (56 - bits) {
                return None;
            }
            if used.len() == len && table_clusters == table {
                return Some((used, table_clusters));
            }
        }
    }

    async fn write_blocks(&mut self, start: u64, used: &[u64]) -> Result<()> {
        let bits = self.header.cluster_bits;
        let block_bits = self.header.refcount_block_bits();
        let order = self.header.refcount_order;
        let mut buf = AlignedBuf::zeroed(1 << bits);
        for (n, index) in used.iter().enumerate() {
            buf.fill(0);
            let first = index << block_bits;
            for at in 0..1 << block_bits {
                let count = self.counted.get(first + at);
                if count != 0 {
                    set_entry(&mut buf, at, order, u64::from(self.wanted(count)));
                }
            }
            buf = self
                .io
                .write(self.file, (start + n as u64) << bits, buf)
                .await?;
        }
        Ok(())
    }

    fn finish_rebuild(&mut self) {
        // What is on the disk now is what was counted.
        let max = self.header.refcount_max();
        let mut changes: Vec<(u64, u64)> = Vec::new();
        let mut from = 0;
        loop {
            changes.clear();
            let end = (from + (1 << 20)).min(self.counted.len());
            self.disk
                .for_each_difference(&self.counted, from, end, |cluster, _, counted| {
                    changes.push((cluster, u64::from(counted).min(max)));
                });
            for (cluster, count) in &changes {
                self.disk.set(*cluster, *count);
            }
            if end >= self.counted.len() {
                break;
            }
            from = end;
        }
        self.report.corruptions_fixed += self.damage.structure + self.damage.low;
        self.report.leaks_fixed += self.report.leaks;
        self.damage.structure = 0;
        self.damage.low = 0;
        self.report.leaks = 0;
        self.needs_copied_pass = true;
        self.set_image_end();
    }
}
