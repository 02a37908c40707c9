//! Changing what an image is: its version, the width of its reference counts, feature bits.
//!
//! Nobody else uses the image meanwhile. One write of the header makes each change true; until then
//! the image is as before, after it as asked, and in between clusters may be leaked at most.

use std::collections::BTreeSet;

use super::{
    header::{Autoclear, Compatible, ExtensionType, Header, Incompatible, MAX_REFCOUNT_TABLE_SIZE},
    l2::{COPIED, Entry, Geometry, L2Entry, OFFSET_MASK, decode},
    refcount::{Refcounts, read_count, write_count},
    snapshot::{
        SnapshotTable,
        ops::{Editor, open},
    },
};
use crate::{
    Error, FileId, Result,
    io::{AlignedBuf, Io},
};

/// Bits 9 to 63 of a reference count table entry: where the block is.
const BLOCK_OFFSET_MASK: u64 = !0x1ff;

/// What an image should become; what is `None` stays.
#[derive(Clone, Debug, Default)]
pub struct AmendOptions {
    /// 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: Option<u32>,
    /// Whether reference counts may be written late.
    pub lazy_refcounts: Option<bool>,
    /// Bits of a reference count: a power of two up to 64.
    pub refcount_bits: Option<u32>,
    /// The name of the external data file, where the image has one; empty for none in the header.
    pub data_file: Option<String>,
    /// Whether the external data file is the disk as a raw image; it can only be given up.
    pub data_file_raw: Option<bool>,
}

impl AmendOptions {
    /// Checks the options against each other and the image. The messages are QEMU's.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument).
    pub fn check(&self, header: &Header) -> Result<()> {
        let invalid = |message: &str| Err(Error::invalid_argument(message));
        let version = self.version.unwrap_or(header.version);
        if !(2..=3).contains(&version) {
            return invalid("Unknown compatibility level");
        }
        if let Some(bits) = self.refcount_bits {
            if !bits.is_power_of_two() || bits > 64 {
                return invalid("Refcount width must be a power of two and may not exceed 64 bits");
            }
            if bits != 16 && version < 3 {
                return Err(Error::invalid_argument(
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above \
                     (use compat=1.1 or greater)",
                )
                .field("refcount_bits", bits, "16 with version 2"));
            }
        }
        if self.lazy_refcounts == Some(true) && version < 3 {
            return Err(Error::invalid_argument(
                "Lazy refcounts only supported with compatibility level 1.1 and above (use \
                 compat=1.1 or greater)",
            )
            .field("lazy_refcounts", "on", "off with version 2"));
        }
        if self.data_file.is_some() && !header.has(Incompatible::DATA_FILE) {
            return invalid("data-file can only be set for images that use an external data file");
        }
        let raw = header.autoclear_features.contains(Autoclear::DATA_FILE_RAW);
        if self.data_file_raw == Some(true) && !raw {
            return invalid("data-file-raw cannot be set on existing images");
        }
        Ok(())
    }
}

/// Changes everything but a step down to version 2, which [`downgrade`] makes after a change of the
/// size. `step` is told of work done and all the work.
///
/// # Errors
/// As [`AmendOptions::check`]; tables that cannot be walked; the host's.
pub async fn amend(
    io: &Io,
    file: FileId,
    options: &AmendOptions,
    step: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    options.check(&Header::read(io, file).await?)?;
    let (mut header, counts) = open(io, file).await?;
    if options.version == Some(3) && header.version == 2 {
        complete_snapshots(io, file, &mut header, &counts).await?;
        header.upgrade();
        header.write(io, file).await?;
    }
    if let Some(bits) = options
        .refcount_bits
        .filter(|bits| *bits != header.refcount_bits())
    {
        drop(counts);
        change_width(io, file, &mut header, bits.trailing_zeros(), step).await?;
    }
    let before = header.clone();
    match options.lazy_refcounts {
        Some(true) => header
            .compatible_features
            .insert(Compatible::LAZY_REFCOUNTS),
        Some(false) => header
            .compatible_features
            .remove(Compatible::LAZY_REFCOUNTS),
        None => {}
    }
    if let Some(name) = &options.data_file {
        let name = Some(name.as_bytes().to_vec()).filter(|name| !name.is_empty());
        header.set_extension(ExtensionType::DATA_FILE, name);
    }
    if options.data_file_raw == Some(false) {
        header.autoclear_features.remove(Autoclear::DATA_FILE_RAW);
    }
    if header != before {
        header.write(io, file).await?;
    }
    Ok(())
}

/// Makes a version 3 image a version 2 one. Zero clusters, which version 2 does not have, become clusters
/// of zeroes, or nothing where there is no backing file. `step` is told of work done and all the work.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for what version 2 cannot express; tables that
/// cannot be walked; the host's. The image is version 3 then and reads as before.
pub async fn downgrade(io: &Io, file: FileId, step: &mut dyn FnMut(u64, u64)) -> Result<()> {
    let (mut header, counts) = open(io, file).await?;
    if header.version < 3 {
        return Ok(());
    }
    let snapshots = SnapshotTable::read(io, file, &header).await?;
    check_downgrade(&header, &snapshots)?;
    expand_zeroes(io, file, &mut header, &counts, &snapshots, step).await?;
    header.downgrade();
    header.write(io, file).await
}

/// Whether version 2 can express the image.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument), in QEMU's words.
fn check_downgrade(header: &Header, snapshots: &SnapshotTable) -> Result<()> {
    let refuse = |message: String| Err(Error::invalid_argument(message));
    let with_features = |error: Error| {
        error.field(
            "incompatible_features",
            format_args!("{:#x}", header.incompatible_features.0),
            "0 for version 2",
        )
    };
    if header.has(Incompatible::DATA_FILE) {
        return refuse("Cannot downgrade an image with a data file".into()).map_err(with_features);
    }
    if header.refcount_order != 4 {
        let error = Error::invalid_argument("compat=0.10 requires refcount_bits=16");
        let expected = "4 for version 2";
        return Err(error.field("refcount_order", header.refcount_order, expected));
    }
    let mut features = header.incompatible_features;
    features.remove(Incompatible::DIRTY);
    if features != Incompatible::default() {
        return refuse(format!(
            "Cannot downgrade an image with incompatible features {:#x} set",
            features.0
        ))
        .map_err(with_features);
    }
    // The size of the disk at a snapshot, and a large VM state, are extra data that an implementation
    // of version 2 may not look at.
    let fits = |snapshot: &super::snapshot::Snapshot| {
        snapshot.disk_size().is_none_or(|size| size == header.size)
            && u32::try_from(snapshot.vm_state_size()).is_ok()
    };
    if !snapshots.snapshots.iter().all(fits) {
        return refuse("Internal snapshots prevent downgrade of image".into());
    }
    Ok(())
}

/// Gives every snapshot the extra data that version 3 demands.
async fn complete_snapshots(
    io: &Io,
    file: FileId,
    header: &mut Header,
    counts: &Refcounts,
) -> Result<()> {
    let mut table = SnapshotTable::read(io, file, header).await?;
    let size = header.size;
    let mut changed = false;
    for snapshot in &mut table.snapshots {
        let before = snapshot.clone();
        snapshot.complete(size);
        changed |= *snapshot != before;
    }
    if changed {
        Editor::new(io, file, header, counts)
            .replace_table(&table)
            .await?;
    }
    Ok(())
}

/// Turns the zero clusters of all L2 tables, those of snapshots too, into what version 2 has.
async fn expand_zeroes(
    io: &Io,
    file: FileId,
    header: &mut Header,
    counts: &Refcounts,
    snapshots: &SnapshotTable,
    step: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let backed = header.backing_file.is_some();
    let geometry = Geometry::of(header);
    let mut editor = Editor::new(io, file, header, counts);
    let active = editor.active_l1().await?;
    let entries = |table: &super::snapshot::Snapshot| u64::from(table.l1_size);
    let total = active.len() as u64 + snapshots.snapshots.iter().map(entries).sum::<u64>();
    let mut done = 0;
    // An L2 table that several name is changed once.
    let mut seen = BTreeSet::new();
    for at in 0..=snapshots.snapshots.len() {
        let l1 = match at.checked_sub(1) {
            None => active.clone(),
            Some(at) => editor.snapshot_l1(&snapshots.snapshots[at]).await?,
        };
        for entry in l1 {
            let offset = entry & OFFSET_MASK;
            if offset != 0 && seen.insert(offset) {
                let mut table = ZeroTable {
                    io,
                    file,
                    counts,
                    geometry,
                    backed,
                    active: at == 0,
                    references: counts.get(io, offset >> geometry.cluster_bits).await?,
                    freed: Vec::new(),
                };
                let mut bytes = editor.read_l2(entry).await?;
                if table.expand(&mut bytes).await? {
                    editor.write_counts().await?;
                    io.write(file, offset, bytes).await?;
                    // Gone from the disk before they are free.
                    io.sync(file).await?;
                    for (cluster, times) in table.freed {
                        for _ in 0..times {
                            counts.release(io, cluster, 1).await?;
                        }
                    }
                }
            }
            done += 1;
            step(done, total);
        }
    }
    editor.write_counts().await?;
    // What a snapshot gave up may be the disk's alone now.
    editor.set_copied(&active).await?;
    io.sync(file).await
}

/// One L2 table whose zero clusters go.
struct ZeroTable<'a> {
    io: &'a Io,
    file: FileId,
    counts: &'a Refcounts,
    geometry: Geometry,
    backed: bool,
    active: bool,
    /// How many L1 entries name it: what it names has as many references through it.
    references: u64,
    /// Clusters it does not name any more, and how many references they lose.
    freed: Vec<(u64, u64)>,
}

impl ZeroTable<'_> {
    /// Changes the table in memory and writes the zeroes it names then; whether there was any change.
    async fn expand(&mut self, table: &mut AlignedBuf) -> Result<bool> {
        let mut changed = false;
        for (index, bytes) in table.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let raw = L2Entry {
                word: u64::from_be_bytes(*bytes),
                bitmap: 0,
            };
            let Entry::Zero { host, .. } = decode(raw, index as u64, &self.geometry)? else {
                continue;
            };
            let entry = self.expanded(host).await?;
            *bytes = entry.to_be_bytes();
            changed = true;
        }
        Ok(changed)
    }

    /// The entry that stands for a zero cluster.
    async fn expanded(&mut self, host: Option<u64>) -> Result<u64> {
        let bits = self.geometry.cluster_bits;
        let references = match host {
            Some(host) => self.counts.get(self.io, host >> bits).await?,
            None => 0,
        };
        let host = match host {
            // Nobody else looks at it.
            Some(host) if self.backed && references <= self.references => host,
            other => {
                if let Some(host) = other {
                    self.freed
                        .push((host >> bits, self.references.min(references)));
                }
                if !self.backed {
                    return Ok(0);
                }
                let run = self.counts.allocate(self.io, 1, true).await?;
                for _ in 1..self.references {
                    self.counts.add_reference(self.io, run.first).await?;
                }
                run.first << bits
            }
        };
        let zeroes = AlignedBuf::zeroed(self.geometry.cluster_size() as usize);
        self.io.write(self.file, host, zeroes).await?;
        let alone = self.active && self.references == 1;
        Ok(if alone { host | COPIED } else { host & !COPIED })
    }
}

/// Writes all reference counts anew, with another width, behind everything else, and makes the header
/// name them. The clusters of the old ones are free then.
async fn change_width(
    io: &Io,
    file: FileId,
    header: &mut Header,
    order: u32,
    step: &mut dyn FnMut(u64, u64),
) -> Result<()> {
    let old = OldCounts::read(io, file, header).await?;
    let total = 2 * old.table.len() as u64;
    let bits = header.cluster_bits;
    let new_bits = bits + 3 - order;
    // Which new blocks have anything to count, and whether everything fits.
    let mut used = BTreeSet::new();
    let max = u64::MAX >> (64 - (1u64 << order));
    let mut highest = io.file_len(file)?.div_ceil(1 << bits).saturating_sub(1);
    for index in 0..old.table.len() {
        let block = old.block(io, index).await?;
        for (cluster, count) in old.counts(index, &block) {
            if count > max {
                return Err(Error::invalid_argument(format!(
                    "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has \
                     a refcount of {count}",
                    1u32 << order,
                    cluster << bits
                )));
            }
            used.insert(cluster >> new_bits);
            highest = highest.max(cluster);
        }
        step(index as u64 + 1, total);
    }
    // The new structure counts itself.
    let start = highest + 1;
    let mut table_clusters = 1;
    let end = loop {
        let end = start + used.len() as u64 + table_clusters;
        let before = (used.len(), table_clusters);
        used.extend(start >> new_bits..=(end - 1) >> new_bits);
        let last = used.last().copied().unwrap_or(0);
        table_clusters = ((last + 1) * 8).div_ceil(1 << bits);
        if table_clusters << bits > MAX_REFCOUNT_TABLE_SIZE || end > 1 << (56 - bits) {
            return Err(Error::invalid_argument(
                "the reference count table would be too large with this width",
            ));
        }
        if before == (used.len(), table_clusters) {
            break end;
        }
    };
    let table_at = (start + used.len() as u64) << bits;
    let mut table = AlignedBuf::zeroed((table_clusters << bits) as usize);
    let mut current: Option<(usize, AlignedBuf)> = None;
    for (n, number) in used.iter().enumerate() {
        let mut bytes = AlignedBuf::zeroed(1 << bits);
        let first = number << new_bits;
        for index in old.blocks_of(first, 1 << new_bits) {
            if current.as_ref().is_none_or(|(at, _)| *at != index) {
                current = Some((index, old.block(io, index).await?));
            }
            let Some((_, block)) = &current else { continue };
            for (cluster, count) in old.counts(index, block) {
                if cluster >> new_bits == *number {
                    write_count(&mut bytes, order, cluster - first, count);
                }
            }
        }
        for cluster in start.max(first)..end.min(first + (1 << new_bits)) {
            write_count(&mut bytes, order, cluster - first, 1);
        }
        let offset = (start + n as u64) << bits;
        io.write(file, offset, bytes).await?;
        let at = *number as usize * 8;
        table[at..at + 8].copy_from_slice(&offset.to_be_bytes());
        let share = (n as u64 + 1) * (total / 2) / used.len() as u64;
        step(total / 2 + share, total);
    }
    io.write(file, table_at, table).await?;
    io.sync(file).await?;
    let mut changed = header.clone();
    changed.refcount_table_offset = table_at;
    changed.refcount_table_clusters = table_clusters as u32;
    changed.refcount_order = order;
    changed.write(io, file).await?;
    *header = changed;
    Ok(())
}

/// The reference counts as they are, without their own clusters.
struct OldCounts {
    file: FileId,
    table: Vec<u64>,
    /// Clusters of the table and of the blocks.
    own: BTreeSet<u64>,
    order: u32,
    block_bits: u32,
    cluster_bits: u32,
}

impl OldCounts {
    async fn read(io: &Io, file: FileId, header: &Header) -> Result<Self> {
        let mut table = super::read_refcount_table(io, file, header).await?;
        while table
            .last()
            .is_some_and(|entry| entry & BLOCK_OFFSET_MASK == 0)
        {
            table.pop();
        }
        let bits = header.cluster_bits;
        let len = io.file_len(file)?;
        for (index, entry) in table.iter().enumerate() {
            let offset = entry & BLOCK_OFFSET_MASK;
            if offset & (header.cluster_size() - 1) != 0 || offset >= len.max(1) {
                return Err(Error::corrupt(format!(
                    "refcount table entry {index}: {entry:#018x}, expected a cluster of the file"
                )));
            }
        }
        let first = header.refcount_table_offset >> bits;
        let mut own: BTreeSet<u64> =
            (first..first + u64::from(header.refcount_table_clusters)).collect();
        own.extend(
            table
                .iter()
                .map(|entry| (entry & BLOCK_OFFSET_MASK) >> bits),
        );
        // Cluster 0 is the header's; an entry of 0 names nothing.
        own.remove(&0);
        Ok(Self {
            file,
            table,
            own,
            order: header.refcount_order,
            block_bits: header.refcount_block_bits(),
            cluster_bits: bits,
        })
    }

    /// A block; nothing where there is none.
    async fn block(&self, io: &Io, index: usize) -> Result<AlignedBuf> {
        match self.table[index] & BLOCK_OFFSET_MASK {
            0 => Ok(AlignedBuf::zeroed(0)),
            offset => {
                io.read_padded(self.file, offset, 1 << self.cluster_bits)
                    .await
            }
        }
    }

    /// Clusters and their counts above 0.
    fn counts<'a>(
        &'a self,
        index: usize,
        block: &'a AlignedBuf,
    ) -> impl Iterator<Item = (u64, u64)> + 'a {
        let first = (index as u64) << self.block_bits;
        let entries = if block.is_empty() {
            0
        } else {
            1 << self.block_bits
        };
        (0..entries).filter_map(move |at| {
            let cluster = first + at;
            let count = read_count(block, self.order, at);
            (count > 0 && !self.own.contains(&cluster)).then_some((cluster, count))
        })
    }

    /// The old blocks that count some of `count` clusters.
    fn blocks_of(&self, first: u64, count: u64) -> std::ops::Range<usize> {
        let end = ((first + count - 1) >> self.block_bits) + 1;
        (first >> self.block_bits) as usize..(end as usize).min(self.table.len())
    }
}
