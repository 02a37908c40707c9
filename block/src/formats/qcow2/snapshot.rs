//! Internal snapshots: the snapshot table.
//!
//! What a snapshot does to an open image (create, apply, delete) is in [`ops`].

pub mod ops;
mod space;

use super::header::{Header, MAX_SNAPSHOT_TABLE_SIZE, MAX_SNAPSHOTS, be16, be32, be64};
use crate::{Error, FileId, Result, extras::SnapshotInfo, io::Io};

/// Bytes of an entry before its extra data.
const FIXED: usize = 40;
/// Most bytes of extra data in an entry, as in QEMU.
pub const MAX_EXTRA_DATA: u32 = 1024;
/// Bytes of the table read at a time.
const READ: usize = 1 << 20;

/// An entry of the snapshot table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Where the L1 table starts; bytes into the image file.
    pub l1_table_offset: u64,
    /// Entries of the L1 table.
    pub l1_size: u32,
    /// Unique id; bytes as in the image.
    pub id: Vec<u8>,
    /// Name; bytes as in the image.
    pub name: Vec<u8>,
    /// Creation time, seconds since 1970.
    pub date_sec: u32,
    /// Creation time, nanoseconds within the second.
    pub date_nsec: u32,
    /// Guest run time in nanoseconds.
    pub vm_clock_nsec: u64,
    /// The 32-bit size of the VM state in bytes.
    vm_state_size_32: u32,
    /// Extra data as in the image: 64-bit VM state size, disk size, icount, unknown bytes.
    extra: Vec<u8>,
}

impl Snapshot {
    /// A new snapshot.
    #[must_use]
    pub fn new(id: &str, name: &str, disk_size: u64) -> Self {
        let mut snapshot = Self {
            id: id.as_bytes().to_vec(),
            name: name.as_bytes().to_vec(),
            ..Self::default()
        };
        snapshot.extra = vec![0; 24];
        snapshot.extra[8..16].copy_from_slice(&disk_size.to_be_bytes());
        // No icount.
        snapshot.extra[16..].fill(0xff);
        snapshot
    }

    /// Bytes of VM state.
    #[must_use]
    pub fn vm_state_size(&self) -> u64 {
        if self.extra.len() >= 8 {
            be64(&self.extra, 0)
        } else {
            u64::from(self.vm_state_size_32)
        }
    }

    /// Sets the bytes of VM state.
    pub fn set_vm_state_size(&mut self, size: u64) {
        // QEMU leaves the 32-bit field 0 for what does not fit.
        self.vm_state_size_32 = u32::try_from(size).unwrap_or(0);
        if self.extra.len() < 8 {
            self.extra.resize(8, 0);
        }
        self.extra[..8].copy_from_slice(&size.to_be_bytes());
    }

    /// The disk size at the snapshot, where it is recorded.
    #[must_use]
    pub fn disk_size(&self) -> Option<u64> {
        (self.extra.len() >= 16).then(|| be64(&self.extra, 8))
    }

    /// The record/replay instruction count, where there is one.
    #[must_use]
    pub fn icount(&self) -> Option<u64> {
        (self.extra.len() >= 24)
            .then(|| be64(&self.extra, 16))
            .filter(|count| *count != u64::MAX)
    }

    /// Sets the record/replay instruction count.
    fn set_icount(&mut self, icount: Option<u64>) {
        if self.extra.len() < 24 {
            self.extra.resize(24, 0);
        }
        self.extra[16..24].copy_from_slice(&icount.unwrap_or(u64::MAX).to_be_bytes());
    }

    /// Whether the entry has the extra data that version 3 demands.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.extra.len() >= 16
    }

    /// Adds the extra data that version 3 demands, for a disk of `disk_size` bytes, and what QEMU adds:
    /// the word that there is no instruction count.
    pub fn complete(&mut self, disk_size: u64) {
        let vm_state_size = self.vm_state_size();
        if !self.is_complete() {
            self.extra.resize(16, 0);
            self.extra[8..16].copy_from_slice(&disk_size.to_be_bytes());
        }
        if self.extra.len() < 24 {
            self.set_icount(None);
        }
        self.extra[..8].copy_from_slice(&vm_state_size.to_be_bytes());
    }

    /// The id as text.
    #[must_use]
    pub fn id_text(&self) -> String {
        String::from_utf8_lossy(&self.id).into_owned()
    }

    /// The name as text.
    #[must_use]
    pub fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// What `info` shows; `disk_size` is the image's, for an entry that has none.
    #[must_use]
    pub fn info(&self, disk_size: u64) -> SnapshotInfo {
        SnapshotInfo {
            id: self.id_text(),
            name: self.name_text(),
            vm_state_size: self.vm_state_size(),
            date_sec: self.date_sec,
            date_nsec: self.date_nsec,
            vm_clock_nsec: self.vm_clock_nsec,
            disk_size: self.disk_size().unwrap_or(disk_size),
            icount: self.icount(),
        }
    }

    /// Bytes of the entry with its padding.
    fn entry_len(&self) -> usize {
        (FIXED + self.extra.len() + self.id.len() + self.name.len()).next_multiple_of(8)
    }
}

/// What was wrong with a table that was read for repair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableDamage {
    /// Snapshots left out because the table would be too large.
    pub dropped: u32,
    /// Entries whose extra data was cut.
    pub trimmed: u32,
    /// What happened, as QEMU says it.
    pub messages: Vec<String>,
}

/// The snapshot table of an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotTable {
    /// The snapshots in the order of the table.
    pub snapshots: Vec<Snapshot>,
    /// Bytes the table takes in the image, as read.
    pub len: u64,
}

/// Reads bytes of the table in pieces.
struct Reader<'a> {
    io: &'a Io,
    file: FileId,
    start: u64,
    at: u64,
    piece: crate::io::AlignedBuf,
    piece_at: u64,
}

impl Reader<'_> {
    async fn take(&mut self, len: usize) -> Result<Vec<u8>> {
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            let within = self.at.wrapping_sub(self.piece_at) as usize;
            if within >= self.piece.len() {
                let offset = self
                    .start
                    .checked_add(self.at)
                    .ok_or_else(|| Error::corrupt("Snapshot table offset invalid"))?;
                if offset >= self.io.file_len(self.file)? {
                    return Err(Error::corrupt(format!(
                        "Snapshot table ends outside the file (offset {offset:#x})"
                    )));
                }
                self.piece = self
                    .io
                    .read_padded(self.file, offset, READ.min(64 << 10))
                    .await?;
                self.piece_at = self.at;
                continue;
            }
            let have = &self.piece[within..];
            let step = have.len().min(len - out.len());
            out.extend_from_slice(&have[..step]);
            self.at += step as u64;
        }
        Ok(out)
    }
}

impl SnapshotTable {
    /// Reads the table that the header names.
    ///
    /// # Errors
    /// [`Corrupt`](crate::ErrorKind::Corrupt) naming the entry; the host's.
    pub async fn read(io: &Io, file: FileId, header: &Header) -> Result<Self> {
        let mut damage = TableDamage::default();
        Self::read_as(io, file, header, &mut damage, false).await
    }

    /// Reads what there is of a damaged table: what is too much is left out and said in `damage`.
    ///
    /// # Errors
    /// As [`read`](Self::read), for what cannot be left out.
    pub async fn read_for_repair(
        io: &Io,
        file: FileId,
        header: &Header,
        damage: &mut TableDamage,
    ) -> Result<Self> {
        Self::read_as(io, file, header, damage, true).await
    }

    async fn read_as(
        io: &Io,
        file: FileId,
        header: &Header,
        damage: &mut TableDamage,
        repair: bool,
    ) -> Result<Self> {
        let mut count = header.nb_snapshots;
        if count > MAX_SNAPSHOTS {
            if !repair {
                return Err(Error::corrupt(format!(
                    "Snapshot table too large (field nb_snapshots: value {count}, expected at \
                     most {MAX_SNAPSHOTS})"
                )));
            }
            let over = count - MAX_SNAPSHOTS;
            damage
                .messages
                .push(format!("Discarding {over} overhanging snapshots"));
            damage.dropped += over;
            count = MAX_SNAPSHOTS;
        }
        let mut table = Self::default();
        if count == 0 {
            return Ok(table);
        }
        let offset = header.snapshots_offset;
        if offset == 0 || offset & (header.cluster_size() - 1) != 0 || offset > i64::MAX as u64 {
            return Err(Error::corrupt(format!(
                "Snapshot table offset invalid (field snapshots_offset: value {offset:#x}, \
                 expected a multiple of {:#x}, not 0, below 2^63)",
                header.cluster_size()
            )));
        }
        let mut reader = Reader {
            io,
            file,
            start: offset,
            at: 0,
            piece: crate::io::AlignedBuf::zeroed(0),
            piece_at: 0,
        };
        for index in 0..count {
            let before = reader.at;
            let entry = read_entry(&mut reader, index, damage, repair).await?;
            if reader.at > MAX_SNAPSHOT_TABLE_SIZE {
                if !repair {
                    return Err(Error::corrupt(format!(
                        "Snapshot table is too big (entry {index} ends at byte {}, expected at \
                         most {MAX_SNAPSHOT_TABLE_SIZE})",
                        reader.at
                    )));
                }
                let over = count - index;
                damage.messages.push(format!(
                    "Discarding {over} overhanging snapshots (snapshot table is too big)"
                ));
                damage.dropped += over;
                reader.at = before;
                break;
            }
            table.snapshots.push(entry);
        }
        table.len = reader.at;
        Ok(table)
    }

    /// The table as it goes to the image.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.byte_len() as usize);
        for snapshot in &self.snapshots {
            out.extend_from_slice(&snapshot.l1_table_offset.to_be_bytes());
            out.extend_from_slice(&snapshot.l1_size.to_be_bytes());
            // Checked when they were read or set.
            out.extend_from_slice(&(snapshot.id.len() as u16).to_be_bytes());
            out.extend_from_slice(&(snapshot.name.len() as u16).to_be_bytes());
            out.extend_from_slice(&snapshot.date_sec.to_be_bytes());
            out.extend_from_slice(&snapshot.date_nsec.to_be_bytes());
            out.extend_from_slice(&snapshot.vm_clock_nsec.to_be_bytes());
            out.extend_from_slice(&snapshot.vm_state_size_32.to_be_bytes());
            out.extend_from_slice(&(snapshot.extra.len() as u32).to_be_bytes());
            out.extend_from_slice(&snapshot.extra);
            out.extend_from_slice(&snapshot.id);
            out.extend_from_slice(&snapshot.name);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out
    }

    /// Bytes of the table as it would be written now.
    #[must_use]
    pub fn byte_len(&self) -> u64 {
        self.snapshots
            .iter()
            .map(|snapshot| snapshot.entry_len() as u64)
            .sum()
    }

    /// Finds a snapshot: by id first, then by name.
    #[must_use]
    pub fn find(&self, id_or_name: &str) -> Option<usize> {
        let key = id_or_name.as_bytes();
        let by_id = self
            .snapshots
            .iter()
            .position(|snapshot| snapshot.id == key);
        by_id.or_else(|| {
            self.snapshots
                .iter()
                .position(|snapshot| snapshot.name == key)
        })
    }

    /// Finds a snapshot by id and name, whichever are given; both must match.
    #[must_use]
    pub fn find_by(&self, id: Option<&str>, name: Option<&str>) -> Option<usize> {
        if id.is_none() && name.is_none() {
            return None;
        }
        self.snapshots.iter().position(|snapshot| {
            id.is_none_or(|id| snapshot.id == id.as_bytes())
                && name.is_none_or(|name| snapshot.name == name.as_bytes())
        })
    }

    /// The id for a new snapshot: one more than the highest number among the ids.
    #[must_use]
    pub fn next_id(&self) -> String {
        let highest = self
            .snapshots
            .iter()
            .filter_map(|snapshot| snapshot.id_text().parse::<u64>().ok())
            .max()
            .unwrap_or(0);
        let mut id = highest.saturating_add(1);
        while self.find_by(Some(&id.to_string()), None).is_some() {
            id = id.wrapping_add(1);
        }
        id.to_string()
    }

    /// What `info` lists.
    #[must_use]
    pub fn infos(&self, disk_size: u64) -> Vec<SnapshotInfo> {
        self.snapshots
            .iter()
            .map(|snapshot| snapshot.info(disk_size))
            .collect()
    }
}

async fn read_entry(
    reader: &mut Reader<'_>,
    index: u32,
    damage: &mut TableDamage,
    repair: bool,
) -> Result<Snapshot> {
    let fixed = reader.take(FIXED).await?;
    let extra_len = be32(&fixed, 36);
    let mut snapshot = Snapshot {
        l1_table_offset: be64(&fixed, 0),
        l1_size: be32(&fixed, 8),
        date_sec: be32(&fixed, 16),
        date_nsec: be32(&fixed, 20),
        vm_clock_nsec: be64(&fixed, 24),
        vm_state_size_32: be32(&fixed, 32),
        ..Snapshot::default()
    };
    if extra_len > MAX_EXTRA_DATA {
        if !repair {
            return Err(Error::corrupt(format!(
                "Too much extra metadata in snapshot table entry {index} (field extra data size: \
                 value {extra_len}, expected at most {MAX_EXTRA_DATA})"
            )));
        }
        damage.messages.push(format!(
            "Discarding too much extra metadata in snapshot table entry {index} ({extra_len} > \
             {MAX_EXTRA_DATA})"
        ));
        damage.trimmed += 1;
    }
    snapshot.extra = reader.take(extra_len.min(MAX_EXTRA_DATA) as usize).await?;
    reader.at += u64::from(extra_len.saturating_sub(MAX_EXTRA_DATA));
    snapshot.id = reader.take(usize::from(be16(&fixed, 12))).await?;
    snapshot.name = reader.take(usize::from(be16(&fixed, 14))).await?;
    reader.at = reader.at.next_multiple_of(8);
    Ok(snapshot)
}
