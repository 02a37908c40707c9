//! Snapshots and bitmaps.

use super::{Checker, Repair, scan};
use crate::{
    Result,
    formats::qcow2::{
        bitmaps::directory::parse_bitmap_directory,
        header::{Autoclear, ExtensionType},
        snapshot::{SnapshotTable, TableDamage},
    },
    io::AlignedBuf,
};

/// Bits of a bitmap table entry that must be 0.
const BITMAP_RESERVED: u64 = 0xff00_0000_0000_01fe;
const BITMAP_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const BITMAP_ALL_ONES: u64 = 1;

impl Checker<'_> {
    /// Reads the snapshot table. `None` when it cannot be read: then nothing can be counted.
    pub(super) async fn read_snapshots(&mut self) -> Result<Option<SnapshotTable>> {
        let mut damage = TableDamage::default();
        let read = if self.repair == Repair::All {
            SnapshotTable::read_for_repair(self.io, self.file, self.header, &mut damage).await
        } else {
            SnapshotTable::read(self.io, self.file, self.header).await
        };
        let mut table = match read {
            Ok(table) => table,
            Err(error) if error.kind() == crate::ErrorKind::Corrupt => {
                self.error(&format!(
                    "ERROR failed to read the snapshot table: {}",
                    error.message()
                ));
                self.report.corruptions += 1;
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        for message in &damage.messages {
            (self.say)(message);
        }
        self.damage.snapshots += u64::from(damage.dropped) + u64::from(damage.trimmed);
        if self.header.version >= 3 {
            let fixes = self.repair == Repair::All;
            let kind = if fixes { "Repairing" } else { "ERROR" };
            let size = self.header.size;
            for (index, snapshot) in table.snapshots.iter_mut().enumerate() {
                if !snapshot.is_complete() {
                    (self.say)(&format!(
                        "{kind} snapshot table entry {index} is incomplete"
                    ));
                    self.damage.snapshots += 1;
                    if fixes {
                        snapshot.complete(size);
                    }
                }
            }
        }
        self.snapshots_need_rewrite = self.damage.snapshots > 0;
        Ok(Some(table))
    }

    /// Writes the repaired snapshot table where it is, if its clusters have room for it and are
    /// nothing else.
    pub(super) async fn rewrite_snapshots(&mut self, table: &SnapshotTable) -> Result<()> {
        let bytes = table.to_bytes();
        let bits = self.header.cluster_bits;
        let len = bytes.len() as u64;
        let first = self.header.snapshots_offset >> bits;
        let fits = len <= table.len.next_multiple_of(1 << bits);
        let alone =
            (first..first + len.div_ceil(1 << bits)).all(|cluster| self.counted.get(cluster) == 1);
        if !fits || !alone {
            let reason = if fits {
                "Input/output error"
            } else {
                "No space left on device"
            };
            self.error(&format!("ERROR failed to update snapshot table: {reason}"));
            return Ok(());
        }
        let nb_snapshots = table.snapshots.len() as u32;
        if !bytes.is_empty() {
            let bytes = AlignedBuf::from_slice(&bytes);
            self.io
                .write(self.file, self.header.snapshots_offset, bytes)
                .await?;
            self.io.sync(self.file).await?;
        }
        if nb_snapshots != self.header.nb_snapshots {
            self.header.nb_snapshots = nb_snapshots;
            self.header.write(self.io, self.file).await?;
        }
        self.report.corruptions_fixed += self.damage.snapshots;
        self.damage.snapshots = 0;
        Ok(())
    }

    /// Counts the references of persistent bitmaps. `None` when their directory cannot be read.
    pub(super) async fn walk_bitmaps(&mut self) -> Result<Option<()>> {
        if !self.header.autoclear_features.contains(Autoclear::BITMAPS) {
            // Not consistent: as good as not there. A repair that frees their clusters also takes
            // away what names them.
            if self.repair != Repair::None
                && self.header.extension(ExtensionType::BITMAPS).is_some()
            {
                self.header.set_extension(ExtensionType::BITMAPS, None);
                self.header.write(self.io, self.file).await?;
            }
            return Ok(Some(()));
        }
        let Some(bitmaps) = self.header.bitmaps() else {
            return Ok(Some(()));
        };
        let (offset, size) = (
            bitmaps.bitmap_directory_offset,
            bitmaps.bitmap_directory_size,
        );
        if !self.reference(offset, size, 1) {
            self.report.check_errors += 1;
            return Ok(None);
        }
        let directory = self
            .io
            .read_padded(self.file, offset, size as usize)
            .await?;
        let cluster_size = self.header.cluster_size();
        match parse_bitmap_directory(
            &directory,
            bitmaps.nb_bitmaps,
            cluster_size,
            self.header.size,
        ) {
            Ok(bitmaps) => {
                for bitmap in bitmaps {
                    self.walk_bitmap_table(bitmap.table_offset, bitmap.table_size)
                        .await?;
                }
                Ok(Some(()))
            }
            Err(error) => {
                self.corruption(&format!(
                    "ERROR {}: bitmaps cannot be checked",
                    error.message()
                ));
                self.report.check_errors += 1;
                Ok(None)
            }
        }
    }

    async fn walk_bitmap_table(&mut self, offset: u64, entries: u32) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        let in_file = self.reference(offset, u64::from(entries) * 8, 1);
        let count = if in_file { u64::from(entries) } else { 0 };
        scan::for_each_number(self.io, self.file, offset, count, |index, entry| {
            let cluster = entry & BITMAP_OFFSET;
            if entry & BITMAP_RESERVED != 0
                || (cluster != 0 && entry & BITMAP_ALL_ONES != 0)
                || cluster & (cluster_size - 1) != 0
            {
                self.corruption(&format!(
                    "ERROR bitmap table entry {index} is invalid: {entry:x}"
                ));
            } else if cluster != 0 {
                self.reference(cluster, cluster_size, 1);
            }
        })
        .await
    }
}
