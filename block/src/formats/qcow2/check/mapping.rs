//! The walk over L1 and L2 tables.

use std::collections::BTreeMap;

use super::{Checker, Geometry, Repair, scan};
use crate::{
    Result,
    formats::qcow2::{header::MAX_L1_SIZE, snapshot::SnapshotTable},
};

/// Offsets in L1 and L2 entries.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;
/// The reference count of the target is exactly one.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// L2 tables to remember before equal ones are put together.
const COMPACT: usize = 1 << 20;

/// An L2 table and who uses it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct L2Table {
    pub(super) offset: u64,
    /// Entries in all L1 tables.
    times: u64,
    /// Entries in the active L1 table.
    active: u64,
}

/// The tables that were found.
#[derive(Debug, Default)]
pub(super) struct Mapping {
    /// The active L1 table.
    pub(super) l1: Vec<u64>,
    /// The L2 tables, ascending and distinct.
    pub(super) l2: Vec<L2Table>,
    /// There are zero clusters with a misaligned allocation.
    misaligned_zeroes: bool,
}

impl Mapping {
    fn push(&mut self, table: L2Table) {
        self.l2.push(table);
        if self.l2.len() >= COMPACT && self.l2.len().is_power_of_two() {
            self.compact();
        }
    }

    fn compact(&mut self) {
        self.l2.sort_unstable_by_key(|table| table.offset);
        self.l2.dedup_by(|next, first| {
            let same = next.offset == first.offset;
            if same {
                first.times = first.times.saturating_add(next.times);
                first.active = first.active.saturating_add(next.active);
            }
            same
        });
    }

    /// How often the table at `offset` is used.
    fn times(&self, offset: u64) -> u64 {
        self.l2
            .binary_search_by_key(&offset, |table| table.offset)
            .map_or(0, |at| self.l2[at].times)
    }
}

/// What an L2 entry says.
enum Entry {
    /// Nothing is allocated.
    Unallocated,
    /// A cluster of the image, perhaps reading as zeroes.
    Standard {
        offset: u64,
        zero: bool,
    },
    Compressed {
        offset: u64,
        len: u64,
    },
}

fn decode(entry: u64, geometry: Geometry) -> Entry {
    if entry & COMPRESSED != 0 {
        let shift = 62 - (geometry.cluster_bits - 8);
        let offset = entry & ((1 << shift) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> shift;
        return Entry::Compressed {
            offset: offset & !511,
            len: (sectors + 1) * 512,
        };
    }
    let offset = entry & OFFSET_MASK;
    // With a data file offset 0 is a place like others; COPIED tells it from nothing.
    if offset == 0 && !(geometry.data_file && entry & COPIED != 0) {
        return Entry::Unallocated;
    }
    Entry::Standard {
        offset,
        zero: !geometry.extended_l2 && entry & ZERO != 0,
    }
}

impl Checker<'_> {
    /// Counts all references of L1 and L2 tables.
    pub(super) async fn walk_mapping(&mut self, snapshots: &SnapshotTable) -> Result<Mapping> {
        let mut mapping = Mapping::default();
        // Snapshots may share an L1 table; none is walked twice.
        let mut tables: BTreeMap<(u64, u32), u64> = BTreeMap::new();
        for snapshot in &snapshots.snapshots {
            let (offset, size) = (snapshot.l1_table_offset, snapshot.l1_size);
            let (id, name) = (snapshot.id_text(), snapshot.name_text());
            if offset & (self.header.cluster_size() - 1) != 0 {
                self.corruption(&format!(
                    "ERROR snapshot {id} ({name}) l1_offset={offset:#x}: L1 table is not cluster \
                     aligned; snapshot table entry corrupted"
                ));
            } else if u64::from(size) > MAX_L1_SIZE / 8 {
                self.corruption(&format!(
                    "ERROR snapshot {id} ({name}) l1_size={size:#x}: L1 table is too large; \
                     snapshot table entry corrupted"
                ));
            } else {
                *tables.entry((offset, size)).or_default() += 1;
            }
        }
        let active = (self.header.l1_table_offset, self.header.l1_size);
        self.walk_l1(active, 1, true, &mut mapping).await?;
        for (table, times) in tables {
            self.walk_l1(table, times, false, &mut mapping).await?;
        }
        mapping.compact();
        self.walk_l2(&mut mapping).await?;
        Ok(mapping)
    }

    async fn walk_l1(
        &mut self,
        (offset, size): (u64, u32),
        times: u64,
        active: bool,
        mapping: &mut Mapping,
    ) -> Result<()> {
        let in_file = self.reference(offset, u64::from(size) * 8, times);
        let count = if in_file { u64::from(size) } else { 0 };
        let cluster_size = self.header.cluster_size();
        let (io, file) = (self.io, self.file);
        scan::for_each_number(io, file, offset, count, |_, entry| {
            if active {
                mapping.l1.push(entry);
            }
            if entry == 0 {
                return;
            }
            if entry & L1_RESERVED != 0 {
                self.corruption(&format!(
                    "ERROR found L1 entry with reserved bits set: {entry:x}"
                ));
            }
            let table = entry & OFFSET_MASK;
            if table & (cluster_size - 1) != 0 {
                self.corruption(&format!(
                    "ERROR l2_offset={table:x}: Table is not cluster aligned; L1 entry corrupted"
                ));
            }
            let in_file = self.reference(table, cluster_size, times);
            if active && table != 0 {
                let one = self.disk.get(table >> self.header.cluster_bits) == 1;
                self.needs_copied_pass |= one != (entry & COPIED != 0);
            }
            if in_file {
                mapping.push(L2Table {
                    offset: table,
                    times,
                    active: u64::from(active),
                });
            }
        })
        .await
    }

    async fn walk_l2(&mut self, mapping: &mut Mapping) -> Result<()> {
        let geometry = self.geometry();
        let tables = std::mem::take(&mut mapping.l2);
        let offsets = tables.iter().map(|table| table.offset);
        let (io, file) = (self.io, self.file);
        let mut misaligned = false;
        scan::for_each_table(io, file, offsets, geometry.cluster_size, |at, bytes| {
            misaligned |= self.visit_l2(tables[at], bytes, geometry);
        })
        .await?;
        mapping.l2 = tables;
        mapping.misaligned_zeroes = misaligned;
        Ok(())
    }

    /// Counts the references of one L2 table. Returns whether it has zero clusters with misaligned
    /// allocation that were left out because they will be repaired.
    fn visit_l2(&mut self, table: L2Table, bytes: &[u8], geometry: Geometry) -> bool {
        let mut misaligned = false;
        let mut next = 0;
        let (mut allocated, mut fragmented, mut compressed) = (0, 0, 0);
        let stride = if geometry.extended_l2 { 2 } else { 1 };
        let (numbers, _) = bytes.as_chunks::<8>();
        for entry_bytes in numbers.chunks_exact(stride) {
            let entry = u64::from_be_bytes(entry_bytes[0]);
            let bitmap = entry_bytes
                .get(1)
                .map_or(0, |bits| u64::from_be_bytes(*bits));
            if entry == 0 && bitmap == 0 {
                continue;
            }
            match decode(entry, geometry) {
                Entry::Unallocated => {
                    self.check_reserved(entry);
                    if bitmap & 0xffff_ffff != 0 {
                        self.corruption(
                            "ERROR: Unallocated cluster has non-zero subcluster allocation map",
                        );
                    }
                }
                Entry::Compressed { offset, len } => {
                    self.visit_compressed(entry, bitmap, geometry);
                    if !geometry.data_file {
                        self.reference(offset, len, table.times);
                    }
                    allocated += 1;
                    compressed += 1;
                    fragmented += 1;
                }
                Entry::Standard { offset, zero } => {
                    self.check_reserved(entry);
                    if bitmap & (bitmap >> 32) & 0xffff_ffff != 0 {
                        self.corruption(&format!(
                            "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster \
                             allocation bitmap"
                        ));
                    }
                    if offset & (geometry.cluster_size - 1) != 0 {
                        let has_data = if geometry.extended_l2 {
                            bitmap & 0xffff_ffff != 0
                        } else {
                            !zero
                        };
                        if self.misaligned(offset, has_data, geometry) {
                            misaligned = true;
                            continue;
                        }
                    }
                    allocated += 1;
                    if next != 0 && next != offset {
                        fragmented += 1;
                    }
                    next = offset.wrapping_add(geometry.cluster_size);
                    self.visit_standard(table, entry, offset, geometry);
                }
            }
        }
        self.report.allocated_clusters += allocated * table.active;
        self.report.fragmented_clusters += fragmented * table.active;
        self.report.compressed_clusters += compressed * table.active;
        misaligned
    }

    #[inline]
    fn visit_standard(&mut self, table: L2Table, entry: u64, offset: u64, geometry: Geometry) {
        let copied = entry & COPIED != 0;
        if geometry.data_file {
            // Clusters of the data file are not counted: each is used once.
            self.needs_copied_pass |= table.active > 0 && !copied;
            return;
        }
        let cluster = offset >> geometry.cluster_bits;
        let aligned = offset & (geometry.cluster_size - 1) == 0;
        if aligned && offset.saturating_add(geometry.cluster_size) <= self.file_len {
            self.count(cluster, table.times);
        } else {
            self.reference(offset, geometry.cluster_size, table.times);
        }
        if table.active > 0 && (self.disk.get(cluster) == 1) != copied {
            self.needs_copied_pass = true;
        }
    }

    #[inline]
    fn check_reserved(&mut self, entry: u64) {
        if entry & L2_RESERVED != 0 {
            self.corruption(&format!(
                "ERROR found l2 entry with reserved bits set: {entry:x}"
            ));
        }
    }

    fn visit_compressed(&mut self, entry: u64, bitmap: u64, geometry: Geometry) {
        if entry & COPIED != 0 {
            let shift = 62 - (geometry.cluster_bits - 8);
            let offset = entry & ((1 << shift) - 1);
            self.corruption(&format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        if geometry.data_file {
            self.corruption(&format!(
                "ERROR compressed cluster with data file, entry={entry:#x}"
            ));
        }
        if bitmap != 0 {
            self.corruption(&format!(
                "ERROR compressed cluster with non-zero subcluster allocation bitmap, \
                 entry={entry:#x}"
            ));
        }
    }

    /// A cluster that is not where clusters are. Returns whether a repair takes the allocation away.
    fn misaligned(&mut self, offset: u64, has_data: bool, geometry: Geometry) -> bool {
        if has_data {
            self.corruption(&format!(
                "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry corrupted."
            ));
            return false;
        }
        let fixes = self.repair == Repair::All && geometry.version >= 3;
        let kind = if fixes { "Repairing" } else { "ERROR" };
        self.corruption(&format!(
            "{kind} offset={offset:x}: Preallocated cluster is not properly aligned; L2 entry \
             corrupted."
        ));
        fixes
    }

    /// Takes the misaligned allocations of zero clusters away that [`misaligned`](Self::misaligned)
    /// announced.
    pub(super) async fn fix_misaligned_zeroes(&mut self, mapping: &Mapping) -> Result<()> {
        if !mapping.misaligned_zeroes {
            return Ok(());
        }
        let geometry = self.geometry();
        let stride = if geometry.extended_l2 { 2 } else { 1 };
        for table in &mapping.l2 {
            let offset = table.offset;
            let mut bytes = self
                .io
                .read_padded(self.file, offset, geometry.cluster_size as usize)
                .await?;
            let mut fixed = 0;
            for entry in bytes.as_chunks_mut::<8>().0.chunks_exact_mut(stride) {
                let number = u64::from_be_bytes(entry[0]);
                let Entry::Standard { offset, zero } = decode(number, geometry) else {
                    continue;
                };
                let no_data = match entry.get(1) {
                    Some(bitmap) => u64::from_be_bytes(*bitmap) & 0xffff_ffff == 0,
                    None => zero,
                };
                if no_data && offset & (geometry.cluster_size - 1) != 0 {
                    entry[0] = (if geometry.extended_l2 { 0 } else { ZERO }).to_be_bytes();
                    fixed += 1;
                }
            }
            if fixed > 0 && self.write_l2(mapping, offset, bytes).await? {
                self.damage.mapping -= fixed;
                self.report.corruptions_fixed += fixed;
            }
        }
        Ok(())
    }

    /// Writes an L2 table, unless its cluster is something else too. Returns whether it did.
    async fn write_l2(
        &mut self,
        mapping: &Mapping,
        offset: u64,
        bytes: crate::io::AlignedBuf,
    ) -> Result<bool> {
        let cluster = offset >> self.header.cluster_bits;
        let only_l2 = offset & (self.header.cluster_size() - 1) == 0
            && cluster != 0
            && u64::from(self.counted.get(cluster)) == mapping.times(offset);
        if !only_l2 {
            self.error(
                "ERROR: Could not write L2 table; metadata overlap check failed: Input/output error",
            );
            return Ok(false);
        }
        self.io.write(self.file, offset, bytes).await?;
        Ok(true)
    }

    /// Compares the COPIED flags of the active tables with the reference counts, and repairs them.
    pub(super) async fn check_copied(&mut self, mapping: &Mapping) -> Result<()> {
        let geometry = self.geometry();
        let fixes = self.repair == Repair::All;
        let kind = if fixes { "Repairing" } else { "ERROR" };
        if fixes {
            // Flags rely on reference counts.
            self.io.sync(self.file).await?;
        }
        let mut new_l1 = mapping.l1.clone();
        let mut l1_changed = false;
        // As many tables at a time as changed ones may be kept.
        let step = ((8 << 20) >> geometry.cluster_bits).max(4) as usize;
        for (chunk_at, chunk) in mapping.l1.chunks(step).enumerate() {
            let used: Vec<(usize, u64)> = chunk
                .iter()
                .enumerate()
                .filter(|(_, entry)| *entry & OFFSET_MASK != 0)
                .map(|(at, entry)| (chunk_at * step + at, *entry))
                .collect();
            let mut changed = Vec::new();
            let offsets = used.iter().map(|(_, entry)| entry & OFFSET_MASK);
            let (io, file) = (self.io, self.file);
            scan::for_each_table(io, file, offsets, geometry.cluster_size, |at, bytes| {
                let (index, entry) = used[at];
                let table = entry & OFFSET_MASK;
                let count = self.disk.get(table >> geometry.cluster_bits);
                if (count == 1) != (entry & COPIED != 0) {
                    (self.say)(&format!(
                        "{kind} OFLAG_COPIED L2 cluster: l1_index={index} l1_entry={entry:x} \
                         refcount={count}"
                    ));
                    new_l1[index] = entry ^ COPIED;
                    l1_changed = true;
                    self.damage.copied += 1;
                }
                if table < self.file_len
                    && let Some(fixed) = self.check_copied_l2(bytes, geometry, kind)
                {
                    changed.push((table, fixed));
                }
            })
            .await?;
            if !fixes {
                continue;
            }
            for (table, (flags, bytes)) in changed {
                let bytes = crate::io::AlignedBuf::from_slice(&bytes);
                if self.write_l2(mapping, table, bytes).await? {
                    self.damage.copied -= flags;
                    self.report.corruptions_fixed += flags;
                }
            }
        }
        if fixes && l1_changed && self.only_l1() {
            let flags = new_l1
                .iter()
                .zip(&mapping.l1)
                .filter(|(new, old)| new != old)
                .count();
            let bytes: Vec<u8> = new_l1
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            let bytes = crate::io::AlignedBuf::from_slice(&bytes);
            self.io
                .write(self.file, self.header.l1_table_offset, bytes)
                .await?;
            self.damage.copied -= flags as u64;
            self.report.corruptions_fixed += flags as u64;
        }
        Ok(())
    }

    /// Whether the active L1 table can be written: its clusters are nothing else.
    fn only_l1(&mut self) -> bool {
        let bits = self.header.cluster_bits;
        let start = self.header.l1_table_offset;
        let end = start + u64::from(self.header.l1_size) * 8;
        let alone =
            (start >> bits..end.div_ceil(1 << bits)).all(|cluster| self.counted.get(cluster) == 1);
        if !alone {
            self.error(
                "ERROR: Could not write L1 table; metadata overlap check failed: Input/output error",
            );
        }
        alone
    }

    /// The COPIED flags of one active L2 table: the number of wrong ones and the repaired table.
    fn check_copied_l2(
        &mut self,
        bytes: &[u8],
        geometry: Geometry,
        kind: &str,
    ) -> Option<(u64, Vec<u8>)> {
        let stride = if geometry.extended_l2 { 2 } else { 1 };
        let mut fixed: Option<(u64, Vec<u8>)> = None;
        for (at, bytes_of) in bytes.as_chunks::<8>().0.iter().enumerate().step_by(stride) {
            let entry = u64::from_be_bytes(*bytes_of);
            let Entry::Standard { offset, .. } = decode(entry, geometry) else {
                continue;
            };
            let count = if geometry.data_file {
                1
            } else {
                self.disk.get(offset >> geometry.cluster_bits)
            };
            if (count == 1) == (entry & COPIED != 0) {
                continue;
            }
            (self.say)(&format!(
                "{kind} OFLAG_COPIED data cluster: l2_entry={entry:x} refcount={count}"
            ));
            self.damage.copied += 1;
            let (flags, table) = fixed.get_or_insert_with(|| (0, bytes.to_vec()));
            *flags += 1;
            table[at * 8..at * 8 + 8].copy_from_slice(&(entry ^ COPIED).to_be_bytes());
        }
        fixed
    }
}
