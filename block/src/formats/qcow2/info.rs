//! What `info` shows of an image.

use serde_json::{Map, Value, json};

use super::{
    header::{Autoclear, Compatible, CryptMethod, Header, Incompatible},
    snapshot::SnapshotTable,
};
use crate::image::ImageInfo;

pub use super::bitmaps::directory::{
    BITMAP_AUTO, BITMAP_IN_USE, BitmapEntry, parse_bitmap_directory, read_bitmaps,
};

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
        "name": bitmap.name_text(),
        "granularity": 1u64 << bitmap.granularity_bits,
    })
}
