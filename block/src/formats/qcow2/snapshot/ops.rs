//! Creating, applying and deleting internal snapshots.
//!
//! Nobody else uses the image meanwhile: the disk is drained and flushed, and whoever keeps tables in
//! memory forgets them afterwards. Everything is read from the file and written to it here; reference
//! counts alone go through `Refcounts`, which an opened image shares with its data path.
//!
//! The order on the disk: COPIED flags are cleared before reference counts go up, which go up before
//! anything new is named; what is not named any more loses its references afterwards, and flags are
//! set again last. Between the first and the last step a version 3 image is marked dirty, and a version
//! 2 image has an extension of its header that says the same, so that an open for writing repairs
//! flags that say too little and counts that say too much.

mod references;

use super::{Snapshot, SnapshotTable};
use crate::{
    Error, FileId, Result,
    formats::qcow2::{
        counts::write_counts,
        header::{Autoclear, ExtensionType, Header, Incompatible, MAX_L1_SIZE, MAX_SNAPSHOTS},
        l2::{Entry, Geometry, OFFSET_MASK, decode},
        read_refcount_table,
        refcount::Refcounts,
    },
    io::{AlignedBuf, Io},
};

/// What a disk writes as a whole or not at all, in bytes.
const SECTOR: usize = 512;

/// Runs of clusters after which reference counts are written, so that they do not fill the memory.
const RELIEVE: usize = 1 << 16;

pub use crate::extras::NewSnapshot;

/// Makes a snapshot in an image that is not open. Returns its id.
///
/// # Errors
/// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for what the image cannot hold,
/// [`Corrupt`](crate::ErrorKind::Corrupt) for tables that cannot be walked, the host's. The image is
/// as before then.
pub async fn create_offline(io: &Io, file: FileId, new: &NewSnapshot) -> Result<String> {
    let (mut header, counts) = open(io, file).await?;
    Editor::new(io, file, &mut header, &counts)
        .create(new)
        .await
}

/// Makes the disk what it was at a snapshot, in an image that is not open.
///
/// # Errors
/// [`NotFound`](crate::ErrorKind::NotFound), and as [`create_offline`].
pub async fn apply_offline(io: &Io, file: FileId, id_or_name: &str) -> Result<()> {
    let (mut header, counts) = open(io, file).await?;
    if header.autoclear_features.contains(Autoclear::BITMAPS) {
        // They say what was written since; that would not be true any more.
        return Err(Error::invalid_argument("Device has active dirty bitmaps"));
    }
    Editor::new(io, file, &mut header, &counts)
        .apply(id_or_name)
        .await
}

/// Deletes a snapshot of an image that is not open.
///
/// # Errors
/// As [`apply_offline`].
pub async fn delete_offline(io: &Io, file: FileId, id_or_name: &str) -> Result<()> {
    let (mut header, counts) = open(io, file).await?;
    Editor::new(io, file, &mut header, &counts)
        .delete(id_or_name)
        .await
}

/// The header and the reference counts of an image that is to be changed.
pub(in crate::formats::qcow2) async fn open(io: &Io, file: FileId) -> Result<(Header, Refcounts)> {
    let mut header = Header::read(io, file).await?;
    header.check_supported(true)?;
    crate::formats::qcow2::repair::repair_dirty(io, file, &mut header).await?;
    if header.clear_for_writing() {
        header.write_features(io, file).await?;
    }
    let counts = Refcounts::new(
        Geometry::of(&header),
        header.refcount_order,
        file,
        header.refcount_table_offset,
        read_refcount_table(io, file, &header).await?,
        (
            header.l1_table_offset >> header.cluster_bits,
            (u64::from(header.l1_size) * 8).div_ceil(header.cluster_size()),
        ),
        io.file_len(file)?,
    );
    Ok((header, counts))
}

fn not_found(id_or_name: &str) -> Error {
    Error::with_message(
        crate::ErrorKind::NotFound,
        format!("Can't find the snapshot '{id_or_name}'"),
    )
}

/// A run of host clusters: first and count.
type Run = (u64, u64);

/// Changes the snapshots of one image.
pub(in crate::formats::qcow2) struct Editor<'a> {
    pub(super) io: &'a Io,
    pub(super) file: FileId,
    header: &'a mut Header,
    pub(super) counts: &'a Refcounts,
    pub(super) geometry: Geometry,
    was_dirty: bool,
    /// What a snapshot held alone gives its space back.
    pub(super) punches: bool,
    /// The header could be neither changed nor put back: the file has one of the two.
    torn: bool,
}

impl<'a> Editor<'a> {
    /// For an image whose tables are all in the file. `header` is what the file has, and what it has
    /// afterwards.
    pub(in crate::formats::qcow2) fn new(
        io: &'a Io,
        file: FileId,
        header: &'a mut Header,
        counts: &'a Refcounts,
    ) -> Self {
        Self {
            io,
            file,
            geometry: Geometry::of(header),
            was_dirty: header.has(Incompatible::DIRTY),
            torn: false,
            header,
            counts,
            punches: true,
        }
    }

    /// Whether what a snapshot held alone gives its space back; without this it does.
    pub(in crate::formats::qcow2) fn punching(mut self, punches: bool) -> Self {
        self.punches = punches;
        self
    }

    /// Makes a snapshot of the disk and returns its id.
    pub(in crate::formats::qcow2) async fn create(&mut self, new: &NewSnapshot) -> Result<String> {
        self.check_data_file()?;
        let mut table = SnapshotTable::read(self.io, self.file, self.header).await?;
        if table.snapshots.len() >= MAX_SNAPSHOTS as usize {
            return Err(Error::invalid_argument(format!(
                "too many snapshots: {}, expected below {MAX_SNAPSHOTS}",
                table.snapshots.len()
            )));
        }
        if self.header.refcount_order == 0 {
            return Err(Error::invalid_argument(
                "snapshots need reference counts of more than 1 bit",
            )
            .field("refcount_order", 0, "at least 1"));
        }
        if new.name.len() > usize::from(u16::MAX) {
            return Err(Error::invalid_argument(
                "snapshot name longer than 65535 bytes",
            ));
        }
        let active = self.active_l1().await?;
        self.check_tables(&active).await?;
        let id = table.next_id();
        let mut snapshot = Snapshot::new(&id, &new.name, self.header.size);
        snapshot.l1_size = self.header.l1_size;
        snapshot.date_sec = new.date_sec;
        snapshot.date_nsec = new.date_nsec;
        snapshot.vm_clock_nsec = new.vm_clock_nsec;
        snapshot.set_vm_state_size(new.vm_state_size);
        snapshot.set_icount(new.icount);

        self.begin().await?;
        let cleared = self.clear_copied(&active).await?;
        self.write_l1(self.header.l1_table_offset, &cleared).await?;
        self.io.sync(self.file).await?;
        let mut taken = Vec::new();
        let result = self
            .add_snapshot(&cleared, &mut table, snapshot, &mut taken)
            .await;
        if let Err(error) = result {
            if self.torn {
                return Err(error);
            }
            // As before. Where even that fails, the dirty bit stays and the next open repairs.
            self.give_back(&cleared, taken).await?;
            self.set_copied(&cleared).await?;
            self.end().await?;
            return Err(error);
        }
        self.end().await?;
        Ok(id)
    }

    async fn add_snapshot(
        &mut self,
        l1: &[u64],
        table: &mut SnapshotTable,
        mut snapshot: Snapshot,
        taken: &mut Vec<Taken>,
    ) -> Result<()> {
        self.add_references(l1, taken).await?;
        snapshot.l1_table_offset = self.place(&l1_bytes(l1), taken).await?;
        table.snapshots.push(snapshot);
        self.switch_table(table, taken).await
    }

    /// Makes the disk what it was at a snapshot; its size too.
    pub(in crate::formats::qcow2) async fn apply(&mut self, id_or_name: &str) -> Result<()> {
        self.check_data_file()?;
        let table = SnapshotTable::read(self.io, self.file, self.header).await?;
        let at = table
            .find(id_or_name)
            .ok_or_else(|| not_found(id_or_name))?;
        let snapshot = &table.snapshots[at];
        let size = snapshot.disk_size().unwrap_or(self.header.size);
        let mut l1 = self.snapshot_l1(snapshot).await?;
        let needed = self.header.l1_entries_for(size);
        if needed > MAX_L1_SIZE / 8 {
            return Err(Error::corrupt(format!(
                "snapshot '{id_or_name}': disk size {size}, expected one that an L1 table covers"
            )));
        }
        l1.resize(l1.len().max(needed as usize), 0);
        let old = self.active_l1().await?;
        let old_place = (self.header.l1_table_offset, old.len());
        self.check_tables(&l1).await?;
        self.check_tables(&old).await?;

        self.begin().await?;
        // All of it is shared from now on, so no flag may say otherwise.
        let l1 = self.clear_copied(&l1).await?;
        let mut taken = Vec::new();
        let result = self.switch_l1(&l1, size, &mut taken).await;
        if let Err(error) = result {
            if self.torn {
                return Err(error);
            }
            self.give_back(&l1, taken).await?;
            self.set_copied(&old).await?;
            self.end().await?;
            return Err(error);
        }
        self.drop_references(&old).await?;
        let (offset, entries) = old_place;
        self.release_bytes(offset, entries as u64 * 8).await?;
        self.write_counts().await?;
        self.set_copied(&l1).await?;
        self.end().await?;
        self.punch_freed(&old).await;
        Ok(())
    }

    async fn switch_l1(&mut self, l1: &[u64], size: u64, taken: &mut Vec<Taken>) -> Result<()> {
        self.io.sync(self.file).await?;
        self.add_references(l1, taken).await?;
        let offset = self.place(&l1_bytes(l1), taken).await?;
        self.write_counts().await?;
        let entries = l1.len() as u32;
        self.switch_header(taken, |header| {
            header.l1_table_offset = offset;
            header.l1_size = entries;
            header.size = size;
        })
        .await
    }

    /// Deletes a snapshot.
    pub(in crate::formats::qcow2) async fn delete(&mut self, id_or_name: &str) -> Result<()> {
        self.check_data_file()?;
        let mut table = SnapshotTable::read(self.io, self.file, self.header).await?;
        let at = table
            .find(id_or_name)
            .ok_or_else(|| not_found(id_or_name))?;
        let snapshot = table.snapshots.remove(at);
        let l1 = self.snapshot_l1(&snapshot).await?;
        let active = self.active_l1().await?;
        self.check_tables(&l1).await?;
        self.check_tables(&active).await?;

        self.begin().await?;
        let mut taken = Vec::new();
        if let Err(error) = self.switch_table(&table, &mut taken).await {
            if self.torn {
                return Err(error);
            }
            self.give_back(&[], taken).await?;
            self.end().await?;
            return Err(error);
        }
        self.drop_references(&l1).await?;
        self.release_bytes(snapshot.l1_table_offset, l1.len() as u64 * 8)
            .await?;
        self.write_counts().await?;
        self.set_copied(&active).await?;
        self.end().await?;
        self.punch_freed(&l1).await;
        Ok(())
    }

    /// Nobody counts the references to clusters of an external data file.
    fn check_data_file(&self) -> Result<()> {
        if self.header.has(Incompatible::DATA_FILE) {
            return Err(Error::unsupported(
                "internal snapshots: expected an image without an external data file",
            )
            .field(
                "incompatible_features",
                format_args!("{:#x}", self.header.incompatible_features.0),
                "bit 2 to be clear",
            ));
        }
        Ok(())
    }

    pub(in crate::formats::qcow2) async fn active_l1(&self) -> Result<Vec<u64>> {
        self.read_l1(self.header.l1_table_offset, self.header.l1_size)
            .await
    }

    pub(in crate::formats::qcow2) async fn snapshot_l1(
        &self,
        snapshot: &Snapshot,
    ) -> Result<Vec<u64>> {
        let (offset, size) = (snapshot.l1_table_offset, snapshot.l1_size);
        let bytes = u64::from(size) * 8;
        let in_file = offset.checked_add(bytes).is_some_and(|end| {
            self.io
                .file_len(self.file)
                .is_ok_and(|len| end <= len.next_multiple_of(self.geometry.cluster_size()))
        });
        if bytes > MAX_L1_SIZE || self.geometry.in_cluster(offset) != 0 || !in_file {
            return Err(Error::corrupt(format!(
                "snapshot '{}': L1 table of {size} entries at {offset:#x}, expected at most {} \
                 entries at a cluster of the file",
                snapshot.name_text(),
                MAX_L1_SIZE / 8
            )));
        }
        self.read_l1(offset, size).await
    }

    async fn read_l1(&self, offset: u64, entries: u32) -> Result<Vec<u64>> {
        let bytes = self
            .io
            .read_padded(self.file, offset, entries as usize * 8)
            .await?;
        Ok(bytes
            .as_chunks()
            .0
            .iter()
            .map(|entry| u64::from_be_bytes(*entry))
            .collect())
    }

    async fn write_l1(&self, offset: u64, l1: &[u64]) -> Result<()> {
        if !l1.is_empty() {
            let bytes = AlignedBuf::from_slice(&l1_bytes(l1));
            self.io.write(self.file, offset, bytes).await?;
        }
        Ok(())
    }

    pub(in crate::formats::qcow2) async fn read_l2(&self, entry: u64) -> Result<AlignedBuf> {
        let offset = entry & OFFSET_MASK;
        if self.geometry.in_cluster(offset) != 0 {
            return Err(Error::corrupt(format!(
                "L1 entry {entry:#018x}, expected an L2 table on a cluster boundary"
            )));
        }
        self.io
            .read(self.file, offset, self.geometry.cluster_size() as usize)
            .await
    }

    /// The clusters that one L2 table names, and its own.
    pub(super) fn runs(&self, l1_entry: u64, table: &[u8]) -> Result<Vec<Run>> {
        let bits = self.geometry.cluster_bits;
        let mut runs: Vec<Run> = vec![((l1_entry & OFFSET_MASK) >> bits, 1)];
        for (index, raw) in self.geometry.entries(table).enumerate() {
            let entry = decode(raw, index as u64, &self.geometry)?;
            let (first, last) = match (entry, entry.host()) {
                (Entry::Compressed(data), _) => data.clusters(&self.geometry),
                (_, Some(host)) => (host >> bits, host >> bits),
                (_, None) => continue,
            };
            match runs.last_mut() {
                Some((start, count)) if *start + *count == first => *count += last - first + 1,
                _ => runs.push((first, last - first + 1)),
            }
        }
        Ok(runs)
    }

    /// Makes sure that all tables can be walked before anything changes.
    async fn check_tables(&self, l1: &[u64]) -> Result<()> {
        let clusters = self
            .io
            .file_len(self.file)?
            .div_ceil(self.geometry.cluster_size());
        for entry in used(l1) {
            let table = self.read_l2(entry).await?;
            for (first, count) in self.runs(entry, &table)? {
                if first == 0 || first.saturating_add(count) > clusters {
                    return Err(Error::corrupt(format!(
                        "host clusters {first} to {}, expected 1 to {clusters}",
                        first + count
                    )));
                }
            }
        }
        Ok(())
    }

    /// Writes bytes to new clusters and returns where; 0 for no bytes.
    async fn place(&mut self, bytes: &[u8], taken: &mut Vec<Taken>) -> Result<u64> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let clusters = (bytes.len() as u64).div_ceil(self.geometry.cluster_size());
        let run = self.counts.allocate(self.io, clusters, true).await?;
        taken.push(Taken::Clusters(run.first, run.count));
        let mut padded = AlignedBuf::zeroed((clusters << self.geometry.cluster_bits) as usize);
        padded[..bytes.len()].copy_from_slice(bytes);
        let offset = run.first << self.geometry.cluster_bits;
        self.io.write(self.file, offset, padded).await?;
        Ok(offset)
    }

    /// Writes the snapshot table to a new place, makes the header name it and gives the old one back.
    async fn switch_table(&mut self, table: &SnapshotTable, taken: &mut Vec<Taken>) -> Result<()> {
        let offset = self.place(&table.to_bytes(), taken).await?;
        self.write_counts().await?;
        let before = self.header.clone();
        self.switch_header(taken, |header| {
            header.snapshots_offset = offset;
            header.nb_snapshots = table.snapshots.len() as u32;
        })
        .await?;
        // What is named now is not given back.
        taken.clear();
        self.release_bytes(before.snapshots_offset, table.len)
            .await?;
        self.write_counts().await
    }

    /// Changes the header. After an error it is put back: the file may have the new one all the same.
    /// Where that fails too, everything that either of them names stays.
    async fn switch_header(
        &mut self,
        taken: &mut Vec<Taken>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let before = self.header.clone();
        change(self.header);
        let Err(error) = self.header.write(self.io, self.file).await else {
            return Ok(());
        };
        *self.header = before;
        if let Err(second) = self.header.write(self.io, self.file).await {
            tracing::warn!(error = %second, "the header is the old one or the new one");
            taken.clear();
            self.torn = true;
        }
        Err(error)
    }

    /// Whether it is not known which header the file has. Nothing more may be written to the image then.
    pub(in crate::formats::qcow2) fn is_torn(&self) -> bool {
        self.torn
    }

    /// Writes another snapshot table in the place of the one there is.
    pub(in crate::formats::qcow2) async fn replace_table(
        &mut self,
        table: &SnapshotTable,
    ) -> Result<()> {
        let mut taken = Vec::new();
        let result = self.switch_table(table, &mut taken).await;
        if result.is_err() && !self.torn {
            self.give_back(&[], taken).await?;
        }
        result
    }

    /// Gives back the clusters of a table that nothing names any more.
    async fn release_bytes(&self, offset: u64, len: u64) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let clusters = len.div_ceil(1 << bits);
        self.counts.release(self.io, offset >> bits, clusters).await
    }

    /// Undoes what a failed operation took.
    async fn give_back(&mut self, l1: &[u64], taken: Vec<Taken>) -> Result<()> {
        for step in taken.into_iter().rev() {
            match step {
                Taken::Clusters(first, count) => {
                    self.counts.release(self.io, first, count).await?;
                }
                Taken::References(count) => self.drop_some(l1, count).await?,
            }
        }
        self.write_counts().await
    }

    /// Writes changed reference counts and what they count, durably.
    pub(in crate::formats::qcow2) async fn write_counts(&mut self) -> Result<()> {
        write_counts(self.io, self.file, self.counts, self.header).await?;
        self.io.sync(self.file).await
    }

    /// Marks the image as one whose flags and counts may not agree.
    async fn begin(&mut self) -> Result<()> {
        if self.was_dirty {
            return Ok(());
        }
        if self.header.version >= 3 {
            self.header
                .incompatible_features
                .insert(Incompatible::DIRTY);
            return self.header.write_features(self.io, self.file).await;
        }
        let mut marked = self.header.clone();
        marked.set_extension(ExtensionType::UNFINISHED, Some(Vec::new()));
        // Only where the header is written as a whole or not at all.
        if marked.to_bytes().is_ok_and(|bytes| bytes.len() <= SECTOR) {
            marked.write(self.io, self.file).await?;
            *self.header = marked;
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<()> {
        self.write_counts().await?;
        if self.was_dirty {
            return Ok(());
        }
        if self.header.version >= 3 {
            self.header
                .incompatible_features
                .remove(Incompatible::DIRTY);
            return self.header.write_features(self.io, self.file).await;
        }
        if self.header.extension(ExtensionType::UNFINISHED).is_some() {
            self.header.set_extension(ExtensionType::UNFINISHED, None);
            self.header.write(self.io, self.file).await?;
        }
        Ok(())
    }
}

/// What an operation took and may have to give back.
enum Taken {
    /// New clusters: first and count.
    Clusters(u64, u64),
    /// The first so many references of an L1 table.
    References(u64),
}

pub(super) fn used(l1: &[u64]) -> impl Iterator<Item = u64> {
    l1.iter().copied().filter(|entry| entry & OFFSET_MASK != 0)
}

fn l1_bytes(l1: &[u64]) -> Vec<u8> {
    l1.iter().flat_map(|entry| entry.to_be_bytes()).collect()
}
