//! New regions: ranges of clusters that get their first reference count block, and a larger table
//! when there is no entry left for it.

use super::{BLOCK_OFFSET_MASK, Block, OldTable, Refcounts, Run, State, Stop};
use crate::{Error, ErrorKind, formats::qcow2::header::MAX_REFCOUNT_TABLE_SIZE};

impl Refcounts {
    /// Takes regions that have no block yet: their blocks live together at the start of the first
    /// one, and `more` clusters after them are in use too.
    pub(super) fn add_regions(
        &self,
        state: &mut State,
        number: u64,
        blocks: u64,
        more: u64,
    ) -> Result<(), Stop> {
        let own = number * self.block_len();
        let size = self.geometry.cluster_size() as usize;
        for index in 0..blocks {
            state.blocks.insert(
                number + index,
                Block {
                    bytes: vec![0; size],
                    // A block that was never written is written whole.
                    dirty: Some((0, size)),
                },
            );
            let offset = (own + index) << self.geometry.cluster_bits;
            self.set_table(state, (number + index) as usize, offset);
        }
        let end = own + blocks + more;
        for cluster in own..end {
            self.set_count(state, cluster, 1)?;
        }
        state.virgin = state.virgin.max(end);
        Ok(())
    }

    /// How many blocks count themselves and `more` clusters behind them.
    fn blocks_for(&self, more: u64) -> u64 {
        let mut blocks = 1;
        while blocks * self.block_len() < blocks + more {
            blocks = (blocks + more).div_ceil(self.block_len());
        }
        blocks
    }

    pub(super) fn set_table(&self, state: &mut State, index: usize, entry: u64) {
        state.table[index] = entry;
        state.new_blocks.push(entry);
        state.table_dirty = Some(match state.table_dirty {
            Some((start, end)) => (start.min(index), end.max(index + 1)),
            None => (index, index + 1),
        });
    }

    /// Gives the table a larger place, in the region of the entry `index` that it gets: there the
    /// blocks that count this place come first, then the table.
    pub(super) fn grow_table(&self, state: &mut State, index: usize) -> Result<(), Stop> {
        let per_cluster = self.geometry.cluster_size() / 8;
        let first = index as u64;
        let mut blocks = 1;
        let clusters = loop {
            let wanted = (first + blocks).max(state.table.len() as u64 * 3 / 2);
            let clusters = wanted.div_ceil(per_cluster);
            if clusters * self.geometry.cluster_size() > MAX_REFCOUNT_TABLE_SIZE {
                return Err(Error::with_message(
                    ErrorKind::NoSpace,
                    "the refcount table has its largest size; a larger cluster size is needed",
                )
                .into());
            }
            let needed = self.blocks_for(clusters);
            if needed == blocks {
                break clusters;
            }
            blocks = needed;
        };
        state.moved.push(OldTable {
            offset: state.table_offset,
            clusters: state.table_clusters,
        });
        state.table.resize((clusters * per_cluster) as usize, 0);
        self.add_regions(state, first, blocks, clusters)?;
        state.table_offset = (first * self.block_len() + blocks) << self.geometry.cluster_bits;
        state.table_clusters = clusters;
        state.table_dirty = Some((0, state.table.len()));
        Ok(())
    }

    /// Takes a run that is longer than one block can count: behind everything, after its blocks.
    pub(super) fn allocate_regions(&self, state: &mut State, wanted: u64) -> Result<Run, Stop> {
        let blocks = self.blocks_for(wanted);
        loop {
            // Behind the last region that has a block.
            let counted = state
                .table
                .iter()
                .rposition(|entry| entry & BLOCK_OFFSET_MASK != 0)
                .map_or(0, |last| last as u64 + 1);
            let number = counted.max(state.virgin.div_ceil(self.block_len()));
            let last = number + blocks - 1;
            let index = usize::try_from(last).map_err(|_| Error::new(ErrorKind::NoSpace))?;
            if index >= state.table.len() {
                self.grow_table(state, index)?;
                continue;
            }
            self.add_regions(state, number, blocks, wanted)?;
            return Ok(Run {
                first: number * self.block_len() + blocks,
                count: wanted,
                virgin: true,
            });
        }
    }
}
