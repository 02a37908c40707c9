//! What a snapshot held alone gives its space back to the host.

use super::ops::{Editor, used};
use crate::{Result, formats::qcow2::l2::OFFSET_MASK, io::FallocateMode};

impl Editor<'_> {
    /// Punches the clusters that only these tables named. They are free, durably, and nobody takes clusters
    /// meanwhile. The work is done without it, so that a failure is not one of the work.
    pub(super) async fn punch_freed(&self, l1: &[u64]) {
        if !self.punches {
            return;
        }
        if let Err(error) = self.try_punch_freed(l1).await {
            tracing::debug!(%error, "no space given back");
        }
    }

    async fn try_punch_freed(&self, l1: &[u64]) -> Result<()> {
        for entry in used(l1) {
            let own = (entry & OFFSET_MASK) >> self.geometry.cluster_bits;
            if self.counts.get(self.io, own).await? > 0 {
                // Somebody else names the table, and so what it names.
                continue;
            }
            let table = self.read_l2(entry).await?;
            for (first, count) in self.runs(entry, &table)? {
                self.punch_free(first, count).await?;
            }
        }
        Ok(())
    }

    /// Punches those of a run of clusters that are free.
    async fn punch_free(&self, first: u64, count: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let mut free = 0;
        for cluster in first..=first + count {
            let last = cluster == first + count;
            if !last && self.counts.get(self.io, cluster).await? == 0 {
                free += 1;
                continue;
            }
            if free > 0 {
                let (start, len) = ((cluster - free) << bits, free << bits);
                let mode = FallocateMode::PunchHole;
                self.io.fallocate(self.file, mode, start, len).await?;
            }
            free = 0;
        }
        Ok(())
    }
}
