//! The reference counts on the disk.

use super::{Checker, scan};
use crate::Result;

/// Reserved bits of a reference count table entry.
const TABLE_RESERVED: u64 = 0x1ff;

/// The reference count table as it is used.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// The table's entries.
    pub(super) table: Vec<u64>,
    /// Indices of the entries whose block could be read, by offset of the block.
    pub(super) loaded: Vec<u32>,
    /// Whether the table's own clusters were counted.
    pub(super) table_counted: bool,
    /// Clusters of blocks that were counted.
    pub(super) counted: Vec<u64>,
}

impl Blocks {
    /// The block that counts a cluster.
    pub(super) fn offset(&self, index: u64) -> u64 {
        self.table.get(index as usize).copied().unwrap_or(0)
    }
}

impl Checker<'_> {
    /// Reads the reference counts of all clusters of the file.
    pub(super) async fn load_refcounts(&mut self) -> Result<Blocks> {
        let mut blocks = Blocks::default();
        let offset = self.header.refcount_table_offset;
        let cluster_size = self.header.cluster_size();
        let count = u64::from(self.header.refcount_table_clusters) * (cluster_size / 8);
        if count == 0 || offset == 0 || offset >= self.file_len {
            self.rebuild = true;
            return Ok(blocks);
        }
        scan::for_each_number(self.io, self.file, offset, count, |_, entry| {
            blocks.table.push(entry);
        })
        .await?;
        while blocks.table.last() == Some(&0) {
            blocks.table.pop();
        }
        // Each block once, the first one that names it: QEMU has no use for a second one either.
        let usable =
            |entry: u64| entry != 0 && entry & (cluster_size - 1) == 0 && entry < self.file_len;
        let table = &blocks.table;
        let mut loaded: Vec<u32> = (0..table.len() as u32)
            .filter(|index| usable(table[*index as usize]))
            .collect();
        loaded.sort_by_key(|index| table[*index as usize]);
        loaded.dedup_by_key(|index| table[*index as usize]);
        let offsets = loaded.iter().map(|index| table[*index as usize]);
        let order = self.header.refcount_order;
        let block_bits = self.header.refcount_block_bits();
        let (io, file) = (self.io, self.file);
        scan::for_each_table(io, file, offsets, cluster_size, |at, bytes| {
            let first = u64::from(loaded[at]) << block_bits;
            for (cluster, count) in entries(bytes, order) {
                if count != 0 {
                    self.disk.set(first + cluster, count);
                }
            }
        })
        .await?;
        blocks.loaded = loaded;
        Ok(blocks)
    }

    /// Counts the references that the reference counts themselves are, and checks the blocks.
    pub(super) fn reference_refcounts(&mut self, blocks: &mut Blocks) {
        let cluster_size = self.header.cluster_size();
        let clusters = u64::from(self.header.refcount_table_clusters);
        let before = self.damage.mapping;
        let offset = self.header.refcount_table_offset;
        blocks.table_counted = offset != 0 && self.reference(offset, clusters * cluster_size, 1);
        for (index, &entry) in blocks.table.iter().enumerate() {
            if entry == 0 {
                continue;
            }
            if entry & TABLE_RESERVED != 0 {
                self.structure(&format!(
                    "ERROR refcount table entry {index} has reserved bits set"
                ));
            } else if entry & (cluster_size - 1) != 0 {
                self.structure(&format!(
                    "ERROR refcount block {index} is not cluster aligned; refcount table entry \
                     corrupted"
                ));
            } else if entry >= self.file_len {
                self.outside(index);
            } else {
                self.reference(entry, cluster_size, 1);
                let cluster = entry >> self.header.cluster_bits;
                blocks.counted.push(cluster);
                let count = self.counted.get(cluster);
                if count != 1 {
                    self.structure(&format!("ERROR refcount block {index} refcount={count}"));
                }
            }
        }
        // A table outside the file is damage of the structure: a rebuild repairs it.
        let found = self.damage.mapping - before;
        self.damage.mapping = before;
        self.damage.structure += found;
        self.rebuild |= found > 0;
    }

    /// The structure of the reference counts is wrong where only a rebuild helps.
    fn structure(&mut self, line: &str) {
        (self.say)(line);
        self.damage.structure += 1;
        self.rebuild = true;
    }

    /// A block that is not in the file: what it would count is 0, so a repair forgets it.
    fn outside(&mut self, index: usize) {
        let fixes = self.repair == super::Repair::All;
        let kind = if fixes { "Repairing" } else { "ERROR" };
        (self.say)(&format!("{kind} refcount block {index} is outside image"));
        self.damage.structure += 1;
        self.forget_blocks |= fixes;
    }
}

/// The reference counts of a block that are not 0, or some that are, with their places.
fn entries(block: &[u8], order: u32) -> impl Iterator<Item = (u64, u64)> {
    // In words of 8 bytes: most words of most blocks are all zero or can be skipped at once.
    block
        .as_chunks::<8>()
        .0
        .iter()
        .enumerate()
        .filter(|(_, word)| **word != [0; 8])
        .flat_map(move |(at, word)| {
            let per_word = 64u64 >> order;
            let first = at as u64 * per_word;
            (0..per_word).map(move |n| (first + n, entry(word, n, order)))
        })
}

/// The `n`th reference count in `bytes`.
pub(super) fn entry(bytes: &[u8], n: u64, order: u32) -> u64 {
    let bits = 1u64 << order;
    if order < 3 {
        let byte = bytes.get((n * bits / 8) as usize).copied().unwrap_or(0);
        return u64::from(byte) >> (n * bits % 8) & ((1 << bits) - 1);
    }
    let width = (bits / 8) as usize;
    let at = n as usize * width;
    bytes
        .get(at..at + width)
        .unwrap_or_default()
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Sets the `n`th reference count in `bytes`.
pub(super) fn set_entry(bytes: &mut [u8], n: u64, order: u32, value: u64) {
    let bits = 1u64 << order;
    if order < 3 {
        if let Some(byte) = bytes.get_mut((n * bits / 8) as usize) {
            let shift = n * bits % 8;
            let mask = ((1u64 << bits) - 1) << shift;
            *byte = (u64::from(*byte) & !mask | value << shift & mask) as u8;
        }
        return;
    }
    let width = (bits / 8) as usize;
    let at = n as usize * width;
    if let Some(place) = bytes.get_mut(at..at + width) {
        place.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_every_width() {
        for order in 0..=6 {
            let max = u64::MAX >> (64 - (1u32 << order));
            let mut block = vec![0; 512];
            let count = (512 * 8) >> order;
            for n in [0, 1, 7, count - 1] {
                set_entry(&mut block, n, order, max);
                assert_eq!(entry(&block, n, order), max, "order {order}, entry {n}");
                set_entry(&mut block, n, order, 1);
            }
            let found: Vec<_> = entries(&block, order)
                .filter(|(_, count)| *count != 0)
                .collect();
            assert_eq!(
                found,
                [(0, 1), (1, 1), (7, 1), (count - 1, 1)],
                "order {order}"
            );
        }
        // As the specification has it: the least significant bits come first below a byte.
        assert_eq!(entry(&[0b0000_0010], 1, 0), 1);
        assert_eq!(entry(&[0b0011_0000], 2, 1), 3);
        assert_eq!(entry(&[0x12, 0x34], 0, 4), 0x1234);
    }
}
