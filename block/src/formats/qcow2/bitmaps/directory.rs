//! The bitmap directory (specification: "Bitmaps").

use crate::{
    Error, FileId, Result,
    formats::qcow2::header::{
        Autoclear, BitmapsExtension, Header, MAX_BITMAP_DIRECTORY_SIZE, be16, be32, be64,
    },
    io::Io,
};

/// Bytes of an entry before its variable part.
const FIXED: usize = 24;
/// Most entries of a bitmap table, as in QEMU.
const MAX_TABLE_SIZE: u32 = 0x800_0000;
/// Most bytes of a bitmap's data, as in QEMU: 512 MiB.
pub(crate) const MAX_DATA_SIZE: u64 = 0x2000_0000;
/// Longest name, in bytes.
pub(crate) const MAX_NAME_SIZE: usize = 1023;
/// Granularities: 512 bytes to 2 GiB.
pub(crate) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// `type` of a dirty tracking bitmap, the only type there is.
const DIRTY_TRACKING: u8 = 1;

/// The bitmap was not saved correctly.
pub const BITMAP_IN_USE: u32 = 1;
/// The bitmap records writes.
pub const BITMAP_AUTO: u32 = 2;
/// The bitmap may be used even if its extra data is not understood.
const BITMAP_EXTRA_DATA_COMPATIBLE: u32 = 4;
/// Flags with a meaning.
const KNOWN_FLAGS: u32 = BITMAP_IN_USE | BITMAP_AUTO | BITMAP_EXTRA_DATA_COMPATIBLE;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table starts, in bytes.
    pub table_offset: u64,
    /// Entries of the bitmap table.
    pub table_size: u32,
    /// [`BITMAP_IN_USE`], [`BITMAP_AUTO`] and 4: extra data may be ignored.
    pub flags: u32,
    /// A bit stands for `1 << granularity_bits` bytes of the disk.
    pub granularity_bits: u8,
    /// Extra data, of which nothing is understood; kept as it is.
    pub extra: Vec<u8>,
    /// The name; bytes as in the image.
    pub name: Vec<u8>,
}

impl BitmapEntry {
    /// The name as text.
    #[must_use]
    pub fn name_text(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Whether extra data forbids using the bitmap.
    pub(super) fn is_foreign(&self) -> bool {
        !self.extra.is_empty() && self.flags & BITMAP_EXTRA_DATA_COMPATIBLE == 0
    }

    /// Bytes of the entry with its padding.
    fn len(&self) -> usize {
        (FIXED + self.extra.len() + self.name.len()).next_multiple_of(8)
    }

    /// Bytes of the bitmap table.
    pub(super) fn table_bytes(&self) -> u64 {
        u64::from(self.table_size) * 8
    }

    fn check(&self, index: usize, kind: u8, cluster_size: u64, disk_size: u64) -> Result<()> {
        let refuse = |field: &str, value: String, expected: String| {
            Err(Error::corrupt(format!(
                "Bitmap '{}' doesn't satisfy the constraints (bitmap directory entry {index}, \
                 field {field}: value {value}, expected {expected})",
                self.name_text()
            )))
        };
        if self.table_offset == 0
            || self.table_offset & (cluster_size - 1) != 0
            || self.table_offset > i64::MAX as u64
        {
            return refuse(
                "bitmap_table_offset",
                format!("{:#x}", self.table_offset),
                format!("a multiple of {cluster_size:#x}, not 0, below 2^63"),
            );
        }
        let most = u64::from(MAX_TABLE_SIZE).min(MAX_DATA_SIZE / cluster_size);
        if self.table_size == 0 || u64::from(self.table_size) > most {
            return refuse(
                "bitmap_table_size",
                self.table_size.to_string(),
                format!("1 to {most}"),
            );
        }
        if self.flags & !KNOWN_FLAGS != 0 {
            return refuse(
                "flags",
                format!("{:#x}", self.flags),
                "bits 3 to 31 to be 0".into(),
            );
        }
        if kind != DIRTY_TRACKING {
            return refuse("type", kind.to_string(), "1 (dirty tracking)".into());
        }
        if !GRANULARITY_BITS.contains(&self.granularity_bits) {
            return refuse(
                "granularity_bits",
                self.granularity_bits.to_string(),
                "9 to 31".into(),
            );
        }
        if self.name.is_empty() || self.name.len() > MAX_NAME_SIZE {
            return refuse(
                "name_size",
                self.name.len().to_string(),
                format!("1 to {MAX_NAME_SIZE}"),
            );
        }
        // One that was not saved correctly may be from before a resize.
        let needed = table_size_for(disk_size, self.granularity_bits, cluster_size);
        if self.flags & BITMAP_IN_USE == 0 && u64::from(self.table_size) < needed {
            return refuse(
                "bitmap_table_size",
                self.table_size.to_string(),
                format!("at least {needed} for a disk of {disk_size} bytes"),
            );
        }
        Ok(())
    }
}

/// Entries of the table of a bitmap.
pub(crate) fn table_size_for(disk_size: u64, granularity_bits: u8, cluster_size: u64) -> u64 {
    let bits = disk_size.div_ceil(1 << granularity_bits);
    bits.div_ceil(8).div_ceil(cluster_size)
}

/// Parses a bitmap directory.
///
/// # Errors
/// [`Corrupt`](crate::ErrorKind::Corrupt) naming entry, field, value and what was expected.
pub fn parse_bitmap_directory(
    directory: &[u8],
    nb_bitmaps: u32,
    cluster_size: u64,
    disk_size: u64,
) -> Result<Vec<BitmapEntry>> {
    let mut bitmaps: Vec<BitmapEntry> = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        let index = bitmaps.len();
        if index as u64 == u64::from(nb_bitmaps) {
            return Err(Error::corrupt(format!(
                "More bitmaps found than specified in header extension (field nb_bitmaps: value \
                 {nb_bitmaps}, expected more: the directory goes on at byte {at})"
            )));
        }
        let bytes = &directory[at..];
        let extra_len = be32(bytes, 20) as usize;
        let name_len = usize::from(be16(bytes, 18));
        let name_at = FIXED.saturating_add(extra_len);
        let end = name_at.saturating_add(name_len);
        let padded = end.checked_next_multiple_of(8);
        let Some(len) = padded.filter(|len| *len <= bytes.len()) else {
            return Err(Error::corrupt(format!(
                "Broken bitmap directory (entry {index} at byte {at}: extra_data_size {extra_len} \
                 and name_size {name_len}, expected to fit into {} bytes)",
                bytes.len()
            )));
        };
        let entry = BitmapEntry {
            table_offset: be64(bytes, 0),
            table_size: be32(bytes, 8),
            flags: be32(bytes, 12),
            granularity_bits: bytes[17],
            extra: bytes[FIXED..name_at].to_vec(),
            name: bytes[name_at..end].to_vec(),
        };
        entry.check(index, bytes[16], cluster_size, disk_size)?;
        bitmaps.push(entry);
        at += len;
    }
    if bitmaps.len() as u64 != u64::from(nb_bitmaps) {
        return Err(Error::corrupt(format!(
            "Less bitmaps found than specified in header extension (field nb_bitmaps: value \
             {nb_bitmaps}, expected {})",
            bitmaps.len()
        )));
    }
    check_names(&bitmaps)?;
    check_tables(&bitmaps)?;
    Ok(bitmaps)
}

/// Names must be unique.
fn check_names(bitmaps: &[BitmapEntry]) -> Result<()> {
    let mut names: Vec<&[u8]> = bitmaps.iter().map(|entry| &entry.name[..]).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        None => Ok(()),
        Some(pair) => Err(Error::corrupt(format!(
            "Broken bitmap directory (field name: {:?} twice, expected unique names)",
            String::from_utf8_lossy(pair[0])
        ))),
    }
}

/// No two tables may overlap: reading them all stays within what the file holds.
fn check_tables(bitmaps: &[BitmapEntry]) -> Result<()> {
    let mut tables: Vec<&BitmapEntry> = bitmaps.iter().collect();
    tables.sort_unstable_by_key(|entry| entry.table_offset);
    for pair in tables.windows(2) {
        // Below 2^63 and 2^30: no overflow.
        if pair[0].table_offset + pair[0].table_bytes() > pair[1].table_offset {
            return Err(Error::corrupt(format!(
                "Bitmap '{}' doesn't satisfy the constraints (field bitmap_table_offset: value \
                 {:#x}, expected a table that does not overlap that of bitmap '{}')",
                pair[1].name_text(),
                pair[1].table_offset,
                pair[0].name_text()
            )));
        }
    }
    Ok(())
}

/// A directory as it goes to the image.
pub(super) fn directory_bytes(bitmaps: &[BitmapEntry]) -> Vec<u8> {
    let mut out = Vec::with_capacity(directory_len(bitmaps) as usize);
    for entry in bitmaps {
        out.extend_from_slice(&entry.table_offset.to_be_bytes());
        out.extend_from_slice(&entry.table_size.to_be_bytes());
        out.extend_from_slice(&entry.flags.to_be_bytes());
        out.extend_from_slice(&[DIRTY_TRACKING, entry.granularity_bits]);
        // Checked when they were read or made.
        out.extend_from_slice(&(entry.name.len() as u16).to_be_bytes());
        out.extend_from_slice(&(entry.extra.len() as u32).to_be_bytes());
        out.extend_from_slice(&entry.extra);
        out.extend_from_slice(&entry.name);
        out.resize(out.len().next_multiple_of(8), 0);
    }
    out
}

/// Bytes of a directory.
pub(super) fn directory_len(bitmaps: &[BitmapEntry]) -> u64 {
    bitmaps.iter().map(|entry| entry.len() as u64).sum()
}

/// Reads the list of persistent bitmaps; empty where there are none or they are not consistent.
///
/// # Errors
/// As [`parse_bitmap_directory`], and the host's.
pub async fn read_bitmaps(io: &Io, file: FileId, header: &Header) -> Result<Vec<BitmapEntry>> {
    let consistent = header.autoclear_features.contains(Autoclear::BITMAPS);
    let Some(extension) = header.bitmaps().filter(|_| consistent) else {
        return Ok(Vec::new());
    };
    let BitmapsExtension {
        nb_bitmaps,
        bitmap_directory_size,
        bitmap_directory_offset,
    } = extension;
    let file_len = io.file_len(file)?;
    let end = bitmap_directory_offset.saturating_add(bitmap_directory_size);
    if bitmap_directory_size == 0
        || bitmap_directory_size > MAX_BITMAP_DIRECTORY_SIZE
        || end > file_len.next_multiple_of(header.cluster_size())
    {
        return Err(Error::corrupt(format!(
            "Broken bitmap directory (field bitmap_directory_size: value {bitmap_directory_size} at \
             {bitmap_directory_offset:#x}, expected 1 to {MAX_BITMAP_DIRECTORY_SIZE} inside the \
             file of {file_len} bytes)"
        )));
    }
    let directory = io
        .read_padded(
            file,
            bitmap_directory_offset,
            bitmap_directory_size as usize,
        )
        .await?;
    parse_bitmap_directory(&directory, nb_bitmaps, header.cluster_size(), header.size)
}
