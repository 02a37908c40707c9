//! The references of everything an L1 table names, and the COPIED flags that follow from them.

use super::{Editor, RELIEVE, Taken, used};
use crate::{
    Result,
    formats::qcow2::l2::{COPIED, L2Entry, OFFSET_MASK, decode},
};

impl Editor<'_> {
    /// Adds a reference to everything an L1 table names; `taken` says how far it got.
    pub(super) async fn add_references(
        &mut self,
        l1: &[u64],
        taken: &mut Vec<Taken>,
    ) -> Result<()> {
        taken.push(Taken::References(0));
        let mut since = 0;
        for entry in used(l1) {
            let table = self.read_l2(entry).await?;
            for (first, count) in self.runs(entry, &table)? {
                for cluster in first..first + count {
                    self.counts.add_reference(self.io, cluster).await?;
                    if let Some(Taken::References(done)) = taken.last_mut() {
                        *done += 1;
                    }
                }
                since += 1;
            }
            if since >= RELIEVE {
                self.write_counts().await?;
                since = 0;
            }
        }
        self.write_counts().await
    }

    /// Takes the reference of everything an L1 table named.
    pub(super) async fn drop_references(&mut self, l1: &[u64]) -> Result<()> {
        self.drop_some(l1, u64::MAX).await
    }

    /// Takes the first `limit` references of what an L1 table names.
    pub(super) async fn drop_some(&mut self, l1: &[u64], mut limit: u64) -> Result<()> {
        let mut since = 0;
        for entry in used(l1) {
            if limit == 0 {
                break;
            }
            let table = self.read_l2(entry).await?;
            for (first, count) in self.runs(entry, &table)? {
                let count = count.min(limit);
                self.counts.release(self.io, first, count).await?;
                limit -= count;
                since += 1;
            }
            if since >= RELIEVE {
                self.write_counts().await?;
                since = 0;
            }
        }
        Ok(())
    }

    /// Clears the COPIED flags of an L1 table and of the L2 tables it names, which are written.
    /// Returns the L1 table.
    pub(super) async fn clear_copied(&self, l1: &[u64]) -> Result<Vec<u64>> {
        for entry in used(l1) {
            let mut table = self.read_l2(entry).await?;
            let mut changed = false;
            for entry in table.chunks_exact_mut(self.geometry.entry_bytes() as usize) {
                changed |= entry[0] & 0x80 != 0;
                entry[0] &= 0x7f;
            }
            if changed {
                self.io.write(self.file, entry & OFFSET_MASK, table).await?;
            }
        }
        Ok(l1.iter().map(|entry| entry & !COPIED).collect())
    }

    /// Makes the COPIED flags of the active tables say what the reference counts say.
    pub(in crate::formats::qcow2) async fn set_copied(&self, l1: &[u64]) -> Result<()> {
        self.io.sync(self.file).await?;
        let bits = self.geometry.cluster_bits;
        let mut flagged = l1.to_vec();
        for entry in &mut flagged {
            let offset = *entry & OFFSET_MASK;
            if offset == 0 {
                continue;
            }
            let mut table = self.read_l2(*entry).await?;
            let mut changed = false;
            let entries: Vec<L2Entry> = self.geometry.entries(&table).collect();
            let stride = self.geometry.entry_bytes() as usize;
            for (index, raw) in entries.into_iter().enumerate() {
                let decoded = decode(raw, index as u64, &self.geometry)?;
                let Some(host) = decoded.host() else {
                    continue;
                };
                let copied = raw.word & COPIED != 0;
                if (self.counts.get(self.io, host >> bits).await? == 1) != copied {
                    let flipped = (raw.word ^ COPIED).to_be_bytes();
                    table[index * stride..index * stride + 8].copy_from_slice(&flipped);
                    changed = true;
                }
            }
            if changed {
                self.io.write(self.file, offset, table).await?;
            }
            let one = self.counts.get(self.io, offset >> bits).await? == 1;
            *entry = if one {
                *entry | COPIED
            } else {
                *entry & !COPIED
            };
        }
        self.write_l1(self.header.l1_table_offset, &flagged).await
    }
}
