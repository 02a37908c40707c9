//! Reference counts and the allocation of host clusters (specification: "Host cluster management").
//!
//! Everything here happens in memory, under one lock that is never held across I/O. Reference count
//! blocks are read when they are needed and written by a flush, before the tables that rely on them.

mod growth;
mod reserve;
mod width;

use std::{collections::BTreeMap, sync::Mutex};

use super::l2::{Geometry, hex};
use crate::{Error, ErrorKind, FileId, Result, io::Io, sync::lock};

use reserve::Reserve;

pub(super) use width::{read_count, write_count};

/// Bits 9 to 63 of a reference count table entry: where the block is.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// Bytes of clean reference count blocks kept in memory.
const MAX_CLEAN_BYTES: u64 = 4 << 20;

/// Host offsets in L1 and L2 entries have 56 bits.
const MAX_HOST_OFFSET: u64 = 1 << 56;

/// The unit in which changed blocks are written.
const WRITE_UNIT: usize = 4096;

/// A reference count block is needed that is not in memory: its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NeedBlock(u64);

enum Stop {
    Need(NeedBlock),
    Failed(Error),
}

impl From<NeedBlock> for Stop {
    fn from(need: NeedBlock) -> Self {
        Stop::Need(need)
    }
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Stop::Failed(error)
    }
}

/// A block of reference counts, as the file has it.
struct Block {
    bytes: Vec<u8>,
    /// The bytes that changed since they were written: first, and first after.
    dirty: Option<(usize, usize)>,
}

/// A place that the reference count table moved away from. The header may still name it.
struct OldTable {
    offset: u64,
    clusters: u64,
}

struct State {
    table: Vec<u64>,
    table_offset: u64,
    table_clusters: u64,
    /// Entries of the table that changed.
    table_dirty: Option<(usize, usize)>,
    /// Where it was, oldest first, as long as the header may name these places.
    moved: Vec<OldTable>,
    /// The active L1 table: first cluster, and how many.
    l1: (u64, u64),
    blocks: BTreeMap<u64, Block>,
    /// Where new blocks are that the overlap check does not know yet.
    new_blocks: Vec<u64>,
    /// Where the search for free clusters goes on: all clusters before are in use.
    cursor: u64,
    /// Clusters from here on were never written: the file reads as zeroes there.
    virgin: u64,
    /// The host cluster that compressed data is being packed into, and the next free byte of it.
    packing: u64,
    reserve: Reserve,
}

/// The reference counts of an image.
pub(super) struct Refcounts {
    geometry: Geometry,
    order: u32,
    file: FileId,
    state: Mutex<State>,
}

/// A run of host clusters that were free and have one reference now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first host cluster.
    pub(super) first: u64,
    /// How many.
    pub(super) count: u64,
    /// The file reads as zeroes there: they were never written.
    pub(super) virgin: bool,
}

/// What a flush must write about reference counts.
pub(super) struct DirtyCounts {
    /// Offset and bytes of changed parts of blocks.
    pub(super) blocks: Vec<(u64, Vec<u8>)>,
    /// Offset and bytes of the changed part of the table; it names new blocks.
    pub(super) table: Option<(u64, Vec<u8>)>,
    /// The table's new place, for the header.
    pub(super) moved: Option<MovedTable>,
}

/// The reference count table has a new place.
#[derive(Clone, Copy, Debug)]
pub(super) struct MovedTable {
    pub(super) offset: u64,
    pub(super) clusters: u32,
    /// Old places that nothing names once the header names the new one.
    pub(super) left: usize,
}

impl Refcounts {
    pub(super) fn new(
        geometry: Geometry,
        order: u32,
        file: FileId,
        table_offset: u64,
        table: Vec<u64>,
        l1: (u64, u64),
        file_len: u64,
    ) -> Self {
        let table_clusters = (table.len() as u64 * 8).div_ceil(geometry.cluster_size());
        Self {
            geometry,
            order,
            file,
            state: Mutex::new(State {
                table,
                table_offset,
                table_clusters,
                table_dirty: None,
                moved: Vec::new(),
                l1,
                blocks: BTreeMap::new(),
                new_blocks: Vec::new(),
                cursor: 0,
                virgin: file_len.div_ceil(geometry.cluster_size()),
                packing: 0,
                reserve: Reserve::default(),
            }),
        }
    }

    /// Counts in one block.
    fn block_len(&self) -> u64 {
        (self.geometry.cluster_size() * 8) >> self.order
    }

    /// The largest count.
    fn max(&self) -> u64 {
        let bits = 1u32 << self.order;
        if bits == 64 {
            u64::MAX
        } else {
            (1 << bits) - 1
        }
    }

    /// Runs a step that may need blocks from the file.
    async fn with_blocks<T>(
        &self,
        io: &Io,
        mut step: impl FnMut(&mut State) -> Result<T, Stop>,
    ) -> Result<T> {
        loop {
            let stop = match step(&mut lock(&self.state)) {
                Ok(value) => return Ok(value),
                Err(stop) => stop,
            };
            match stop {
                Stop::Failed(error) => return Err(error),
                Stop::Need(NeedBlock(number)) => self.load(io, number).await?,
            }
        }
    }

    async fn load(&self, io: &Io, number: u64) -> Result<()> {
        let offset = {
            let state = lock(&self.state);
            self.block_offset(&state, number)?
        };
        let Some(offset) = offset else { return Ok(()) };
        let size = self.geometry.cluster_size() as usize;
        let bytes = io.read(self.file, offset, size).await.map_err(|error| {
            Error::of_table(format!("refcount block {number} at {offset:#x}"), error)
        })?;
        let mut state = lock(&self.state);
        self.evict_clean(&mut state);
        // Another task may have loaded, and changed, it meanwhile.
        state.blocks.entry(number).or_insert_with(|| Block {
            bytes: bytes.to_vec(),
            dirty: None,
        });
        Ok(())
    }

    fn evict_clean(&self, state: &mut State) {
        let limit = (MAX_CLEAN_BYTES / self.geometry.cluster_size()).max(2) as usize;
        let mut excess = state.blocks.len().saturating_sub(limit);
        if excess == 0 {
            return;
        }
        let current = state.cursor / self.block_len();
        state.blocks.retain(|number, block| {
            let evict = excess > 0 && block.dirty.is_none() && *number != current;
            excess -= usize::from(evict);
            !evict
        });
    }

    /// Where a block is; `None` when the table has none.
    fn block_offset(&self, state: &State, number: u64) -> Result<Option<u64>> {
        let Some(entry) = usize::try_from(number)
            .ok()
            .and_then(|index| state.table.get(index))
        else {
            return Ok(None);
        };
        let offset = entry & BLOCK_OFFSET_MASK;
        if self.geometry.in_cluster(offset) != 0 || offset >= MAX_HOST_OFFSET {
            return Err(Error::corrupt(format!(
                "Refblock offset {} unaligned (reftable index: {}) (field refcount table entry \
                 {number}: value {entry:#x}, expected a cluster boundary)",
                hex(offset),
                hex(number)
            )));
        }
        Ok((offset != 0).then_some(offset))
    }

    fn count(&self, state: &State, cluster: u64) -> Result<u64, Stop> {
        let number = cluster / self.block_len();
        match state.blocks.get(&number) {
            Some(block) => Ok(read_count(
                &block.bytes,
                self.order,
                cluster % self.block_len(),
            )),
            None if self.block_offset(state, number)?.is_none() => Ok(0),
            None => Err(NeedBlock(number).into()),
        }
    }

    fn set_count(&self, state: &mut State, cluster: u64, count: u64) -> Result<(), Stop> {
        let number = cluster / self.block_len();
        let Some(block) = state.blocks.get_mut(&number) else {
            return Err(NeedBlock(number).into());
        };
        let index = cluster % self.block_len();
        write_count(&mut block.bytes, self.order, index, count);
        let byte = (index << self.order) as usize / 8;
        let width = (1usize << self.order).div_ceil(8);
        block.dirty = Some(match block.dirty {
            Some((start, end)) => (start.min(byte), end.max(byte + width)),
            None => (byte, byte + width),
        });
        Ok(())
    }

    /// Makes sure that the table names a block for `cluster`, which is free. A new block lives in
    /// the first cluster of the region that it counts.
    fn ensure_block(&self, state: &mut State, cluster: u64) -> Result<(), Stop> {
        let number = cluster / self.block_len();
        if self.block_offset(state, number)?.is_some() {
            return match state.blocks.contains_key(&number) {
                true => Ok(()),
                false => Err(NeedBlock(number).into()),
            };
        }
        let index = usize::try_from(number).map_err(|_| Error::new(ErrorKind::NoSpace))?;
        if index >= state.table.len() {
            self.grow_table(state, index)?;
            if state.table[index] & BLOCK_OFFSET_MASK != 0 {
                return Ok(());
            }
        }
        self.add_block(state, number)
    }

    /// A new block in the first cluster of its region.
    fn add_block(&self, state: &mut State, number: u64) -> Result<(), Stop> {
        self.add_regions(state, number, 1, 0)
    }

    /// Allocates up to `wanted` contiguous clusters: the first free run found, which may be
    /// shorter unless `exact`.
    pub(super) async fn allocate(&self, io: &Io, wanted: u64, exact: bool) -> Result<Run> {
        self.with_blocks(io, |state| self.try_allocate(state, wanted, exact))
            .await
    }

    fn try_allocate(&self, state: &mut State, wanted: u64, exact: bool) -> Result<Run, Stop> {
        if exact && wanted >= self.block_len() {
            return self.allocate_regions(state, wanted);
        }
        // A run is asked for as a whole by tables alone: it goes where everything is free.
        let scattered = !exact || wanted == 1;
        let mut cluster = if scattered {
            state.cursor
        } else {
            state.cursor.max(state.virgin)
        };
        let mut first = cluster;
        let mut count = 0;
        while count < wanted {
            let start = if count == 0 { cluster } else { first };
            if state.reserve.has(start, cluster) {
                first = start;
                count += 1;
                cluster += 1;
                continue;
            }
            if cluster >= MAX_HOST_OFFSET >> self.geometry.cluster_bits {
                return Err(Error::with_message(
                    ErrorKind::NoSpace,
                    "the image file would grow beyond what host offsets can name",
                )
                .into());
            }
            if self.count(state, cluster)? == 0 {
                self.ensure_block(state, cluster)?;
            }
            // Making a block may have taken this very cluster.
            if self.count(state, cluster)? == 0 {
                self.check_free(state, cluster)?;
                if count == 0 {
                    first = cluster;
                }
                count += 1;
            } else if count > 0 && !exact {
                break;
            } else {
                count = 0;
                if scattered {
                    // The search may have to stop for a block: it does not begin again then.
                    state.cursor = cluster + 1;
                }
            }
            cluster += 1;
        }
        for cluster in first..first + count {
            if !state.reserve.has(first, cluster) {
                self.set_count(state, cluster, 1)?;
            }
        }
        if scattered {
            state.cursor = state.cursor.max(first + count);
        }
        let run = Run {
            first,
            count,
            virgin: first >= state.virgin || state.reserve.is_virgin(first, count),
        };
        state.virgin = state.virgin.max(first + count);
        state.reserve.give_out(run);
        if scattered && run.virgin {
            self.reserve_behind(state, run);
        }
        Ok(run)
    }

    /// Refuses a cluster that is counted as free but holds what the image cannot do without: guest
    /// data would become the header, and a header names files.
    fn check_free(&self, state: &State, cluster: u64) -> Result<()> {
        let table = state.table_offset >> self.geometry.cluster_bits;
        let holds = |(first, count): (u64, u64)| (first..first + count).contains(&cluster);
        let what = if cluster == 0 {
            "header"
        } else if holds((table, state.table_clusters)) {
            "refcount table"
        } else if holds(state.l1) {
            "L1 table"
        } else {
            return Ok(());
        };
        Err(Error::corrupt(format!(
            "refcount of host cluster {cluster}: 0, expected at least 1 for the {what}"
        ))
        .offset(cluster << self.geometry.cluster_bits))
    }

    /// The active L1 table has a new place.
    pub(super) fn l1_moved(&self, first: u64, clusters: u64) {
        lock(&self.state).l1 = (first, clusters);
    }

    /// Takes one reference from each of `count` clusters. Nothing names them any more.
    pub(super) async fn release(&self, io: &Io, first: u64, count: u64) -> Result<()> {
        for cluster in first..first.saturating_add(count) {
            self.with_blocks(io, |state| {
                let value = self.count(state, cluster)?;
                let Some(value) = value.checked_sub(1) else {
                    return Err(Error::corrupt(format!(
                        "refcount of host cluster {cluster}: 0, expected at least 1"
                    ))
                    .into());
                };
                self.set_count(state, cluster, value)?;
                if value == 0 {
                    state.cursor = state.cursor.min(cluster);
                    if state.packing >> self.geometry.cluster_bits == cluster {
                        // Whoever takes the cluster next has it alone.
                        state.packing = 0;
                    }
                }
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Adds one reference to a cluster.
    pub(super) async fn add_reference(&self, io: &Io, cluster: u64) -> Result<()> {
        self.with_blocks(io, |state| self.try_add_reference(state, cluster))
            .await
    }

    fn try_add_reference(&self, state: &mut State, cluster: u64) -> Result<(), Stop> {
        let value = self.count(state, cluster)?;
        if value >= self.max() {
            return Err(Error::with_message(
                ErrorKind::NoSpace,
                format!(
                    "refcount of host cluster {cluster}: {value}, the most that {} bits can hold",
                    1u32 << self.order
                ),
            )
            .into());
        }
        if value == 0 {
            self.ensure_block(state, cluster)?;
        }
        self.set_count(state, cluster, value + 1)
    }

    /// The reference count of a cluster.
    pub(super) async fn get(&self, io: &Io, cluster: u64) -> Result<u64> {
        self.with_blocks(io, |state| self.count(state, cluster))
            .await
    }

    /// Finds room for `bytes` of compressed data: packed behind the last, or in new clusters. Every
    /// cluster touched has a reference for it. Returns the host offset.
    pub(super) async fn allocate_bytes(&self, io: &Io, bytes: u64) -> Result<u64> {
        self.with_blocks(io, |state| {
            let size = self.geometry.cluster_size();
            let used = self.geometry.in_cluster(state.packing);
            let room = if used == 0 { 0 } else { size - used };
            let current = state.packing >> self.geometry.cluster_bits;
            let shared_full = room > 0 && self.count(state, current)? >= self.max();
            if room >= bytes && !shared_full {
                self.try_add_reference(state, current)?;
                let offset = state.packing;
                state.packing += bytes;
                return Ok(offset);
            }
            let run = self.try_allocate(state, 1, true)?;
            let start = run.first << self.geometry.cluster_bits;
            let follows = room > 0 && !shared_full && run.first == current + 1;
            let offset = if follows {
                self.try_add_reference(state, current)?;
                state.packing
            } else {
                start
            };
            state.packing = offset + bytes;
            Ok(offset)
        })
        .await
    }

    /// The byte after the last cluster that was ever in use.
    pub(super) fn written_end(&self) -> u64 {
        self.geometry.start(lock(&self.state).virgin)
    }

    /// Nothing more is packed into the cluster begun for compressed data.
    pub(super) fn end_packing(&self) {
        lock(&self.state).packing = 0;
    }

    /// Takes what changed, for writing. A failed write must be followed by
    /// [`write_failed`](Self::write_failed).
    pub(super) fn take_dirty(&self) -> DirtyCounts {
        let mut state = lock(&self.state);
        let State { blocks, table, .. } = &mut *state;
        let mut dirty = Vec::new();
        for (number, block) in blocks.iter_mut() {
            let Some((start, end)) = block.dirty.take() else {
                continue;
            };
            let start = start / WRITE_UNIT * WRITE_UNIT;
            let end = end.next_multiple_of(WRITE_UNIT).min(block.bytes.len());
            let offset = table[*number as usize] & BLOCK_OFFSET_MASK;
            dirty.push((offset + start as u64, block.bytes[start..end].to_vec()));
        }
        let changed = state.table_dirty.take().map(|(start, end)| {
            let bytes = state.table[start..end]
                .iter()
                .flat_map(|entry| entry.to_be_bytes())
                .collect();
            (state.table_offset + start as u64 * 8, bytes)
        });
        DirtyCounts {
            blocks: dirty,
            table: changed,
            moved: (!state.moved.is_empty()).then(|| MovedTable {
                offset: state.table_offset,
                clusters: state.table_clusters as u32,
                left: state.moved.len(),
            }),
        }
    }

    /// The header names the place that [`take_dirty`](Self::take_dirty) gave, durably: returns the
    /// clusters of the places left, first and count.
    pub(super) fn move_done(&self, moved: MovedTable) -> Vec<(u64, u64)> {
        lock(&self.state)
            .moved
            .drain(..moved.left)
            .map(|old| (old.offset >> self.geometry.cluster_bits, old.clusters))
            .collect()
    }

    /// Writing failed: everything in memory is dirty again.
    pub(super) fn write_failed(&self) {
        let mut state = lock(&self.state);
        for block in state.blocks.values_mut() {
            block.dirty = Some((0, block.bytes.len()));
        }
        state.table_dirty = Some((0, state.table.len()));
    }

    /// Where all blocks are, as far as the table can be right.
    pub(super) fn block_offsets(&self) -> Vec<u64> {
        let mut state = lock(&self.state);
        state.new_blocks.clear();
        let offsets = state.table.iter().map(|entry| entry & BLOCK_OFFSET_MASK);
        offsets.filter(|offset| *offset != 0).collect()
    }

    /// Where the blocks are that were made since this was last asked.
    pub(super) fn take_new_blocks(&self) -> Vec<u64> {
        std::mem::take(&mut lock(&self.state).new_blocks)
    }

    /// Where changed blocks are going to be written.
    pub(super) fn dirty_blocks(&self) -> Vec<u64> {
        let state = lock(&self.state);
        let dirty = state
            .blocks
            .iter()
            .filter(|(_, block)| block.dirty.is_some());
        let entries = dirty.filter_map(|(number, _)| state.table.get(*number as usize));
        entries.map(|entry| entry & BLOCK_OFFSET_MASK).collect()
    }

    /// Bytes of changed blocks.
    pub(super) fn dirty_bytes(&self) -> u64 {
        let state = lock(&self.state);
        let dirty = state.blocks.values().filter(|block| block.dirty.is_some());
        dirty.count() as u64 * self.geometry.cluster_size()
    }

    /// Whether a flush has anything to write here.
    pub(super) fn is_dirty(&self) -> bool {
        let state = lock(&self.state);
        state.table_dirty.is_some() || state.blocks.values().any(|block| block.dirty.is_some())
    }
}
