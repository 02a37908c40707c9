//! What `info` shows of an image.

use serde_json::{Map, Value, json};

use super::{
    header::{
        Autoclear, BitmapsExtension, Compatible, CryptMethod, Header, Incompatible, be16, be32,
        be64,
    },
    snapshot::SnapshotTable,
};
use crate::{Error, FileId, Result, image::ImageInfo, io::Io};

/// Bytes of a bitmap directory entry before its variable part.
const FIXED: usize = 24;
/// Most entries of a bitmap table, as in QEMU.
const MAX_TABLE: u32 = 0x800_0000;

/// The bitmap was not saved correctly.
pub const BITMAP_IN_USE: u32 = 1;
/// The bitmap records writes.
pub const BITMAP_AUTO: u32 = 2;

/// An entry of the bitmap directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapEntry {
    /// Where the bitmap table starts, in bytes.
    pub table_offset: u64,
    /// Entries of the bitmap table.
    pub table_size: u32,
    /// [`BITMAP_IN_USE`], [`BITMAP_AUTO`] and others.
    pub flags: u32,
    /// A bit stands for `1 << granularity_bits` bytes of the disk.
    pub granularity_bits: u8,
    /// The name.
    pub name: String,
}

/// Parses a bitmap directory.
///
/// # Errors
/// [`Corrupt`](crate::ErrorKind::Corrupt) naming the byte where it is damaged.
pub fn parse_bitmap_directory(
    directory: &[u8],
    nb_bitmaps: u32,
    cluster_size: u64,
) -> Result<Vec<BitmapEntry>> {
    let damaged = |at: usize| {
        Err(Error::corrupt(format!(
            "bitmap directory is damaged at byte {at}"
        )))
    };
    let mut bitmaps = Vec::new();
    let mut at = 0;
    while at < directory.len() {
        let entry = &directory[at..];
        let extra = be32(entry, 20) as usize;
        let name_len = usize::from(be16(entry, 18));
        let name_at = FIXED.saturating_add(extra);
        let end = name_at.saturating_add(name_len);
        let bitmap = BitmapEntry {
            table_offset: be64(entry, 0),
            table_size: be32(entry, 8),
            flags: be32(entry, 12),
            granularity_bits: entry.get(17).copied().unwrap_or(0),
            name: String::from_utf8_lossy(entry.get(name_at..end).unwrap_or_default()).into_owned(),
        };
        let fits = end
            .checked_next_multiple_of(8)
            .is_some_and(|end| end <= entry.len());
        let valid = fits
            && name_len != 0
            && bitmap.table_offset != 0
            && bitmap.table_offset & (cluster_size - 1) == 0
            && (1..=MAX_TABLE).contains(&bitmap.table_size)
            && bitmap.granularity_bits < 64;
        if !valid || bitmaps.len() as u64 == u64::from(nb_bitmaps) {
            return damaged(at);
        }
        bitmaps.push(bitmap);
        at += end.next_multiple_of(8);
    }
    if bitmaps.len() as u64 != u64::from(nb_bitmaps) {
        return damaged(at);
    }
    Ok(bitmaps)
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
    // Bounded by the header's checks and by what the file can hold.
    if bitmap_directory_size > io.file_len(file)? {
        return Err(Error::corrupt(format!(
            "bitmap directory size {bitmap_directory_size} is larger than the file"
        )));
    }
    let directory = io
        .read_padded(
            file,
            bitmap_directory_offset,
            bitmap_directory_size as usize,
        )
        .await?;
    parse_bitmap_directory(&directory, nb_bitmaps, header.cluster_size())
}

/// What `info` shows: the header, the snapshots and the bitmaps. `backing_path` is left to who
/// resolves names.
#[must_use]
pub fn image_info(
    header: &Header,
    snapshots: &SnapshotTable,
    bitmaps: &[BitmapEntry],
) -> ImageInfo {
    ImageInfo {
        cluster_size: Some(header.cluster_size()),
        backing_file: header.backing_file_name(),
        backing_format: header.backing_format(),
        encrypted: header.crypt_method != CryptMethod::None,
        dirty: header.has(Incompatible::DIRTY),
        corrupt: header.has(Incompatible::CORRUPT),
        format_specific: format_specific(header, bitmaps),
        snapshots: snapshots.infos(header.size),
        ..ImageInfo::default()
    }
}

/// The `data` of `format-specific` in `qemu-img info --output=json`.
#[must_use]
pub fn format_specific(header: &Header, bitmaps: &[BitmapEntry]) -> Map<String, Value> {
    let mut data = Map::new();
    let mut put = |key: &str, value: Value| {
        data.insert(key.to_owned(), value);
    };
    put(
        "compat",
        json!(if header.version < 3 { "0.10" } else { "1.1" }),
    );
    put("compression-type", json!(header.compression_type().name()));
    put("refcount-bits", json!(header.refcount_bits()));
    if header.version >= 3 {
        let lazy = header
            .compatible_features
            .contains(Compatible::LAZY_REFCOUNTS);
        put("lazy-refcounts", json!(lazy));
        put("corrupt", json!(header.has(Incompatible::CORRUPT)));
        put("extended-l2", json!(header.has(Incompatible::EXTENDED_L2)));
        if let Some(name) = header.data_file_name() {
            put("data-file", json!(name));
        }
        if header.has(Incompatible::DATA_FILE) {
            let raw = header.autoclear_features.contains(Autoclear::DATA_FILE_RAW);
            put("data-file-raw", json!(raw));
        }
        if !bitmaps.is_empty() {
            put("bitmaps", bitmaps.iter().map(bitmap_json).collect());
        }
    }
    match header.crypt_method {
        CryptMethod::None => {}
        CryptMethod::Aes => put("encrypt", json!({"format": "aes"})),
        CryptMethod::Luks => put("encrypt", json!({"format": "luks"})),
    }
    data
}

fn bitmap_json(bitmap: &BitmapEntry) -> Value {
    let flags: Vec<&str> = [(BITMAP_IN_USE, "in-use"), (BITMAP_AUTO, "auto")]
        .into_iter()
        .filter(|(flag, _)| bitmap.flags & flag != 0)
        .map(|(_, name)| name)
        .collect();
    json!({
        "flags": flags,
        "name": bitmap.name,
        "granularity": 1u64 << bitmap.granularity_bits,
    })
}
