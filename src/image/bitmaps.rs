//! Persistent bitmaps, as several commands speak of them.

use block::{BitmapInfo, DiskFile, Error, Format};

use crate::util::persona::Persona;

/// Whether the image can keep bitmaps: qcow2 from version 3 on.
pub(crate) fn supported(disk: &dyn DiskFile) -> bool {
    let compat = |info: block::image::ImageInfo| {
        let compat = info.format_specific.get("compat").cloned();
        compat.is_some_and(|compat| compat != "0.10")
    };
    disk.format() == Format::Qcow2 && compat(disk.info())
}

/// What went wrong, with what can be done about it.
pub(crate) fn explain(error: &Error, persona: Persona) -> String {
    let text = error.message();
    if !text.ends_with("is inconsistent and cannot be used") {
        return text;
    }
    let hint = if persona.is_qemu() {
        "Try block-dirty-bitmap-remove to delete this bitmap from disk"
    } else {
        "Try 'platter bitmap --remove' to delete this bitmap"
    };
    format!("{text}\n{hint}")
}

/// Bytes that copies of bitmaps take in a new image of a disk of `disk_size` bytes.
pub(crate) fn space(bitmaps: &[BitmapInfo], disk_size: u64, cluster_size: u64) -> u64 {
    let mut sum = 0;
    let mut directory = 0;
    for bitmap in bitmaps {
        let bits = disk_size.div_ceil(bitmap.granularity);
        let clusters = bits.div_ceil(8).div_ceil(cluster_size);
        sum += clusters * cluster_size + (clusters * 8).next_multiple_of(cluster_size);
        directory += (24 + bitmap.name.len() as u64).next_multiple_of(8);
    }
    sum + directory.next_multiple_of(cluster_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_what_qemu_measures() {
        let bitmap = |name: &str| BitmapInfo {
            name: name.into(),
            granularity: 65536,
            enabled: true,
            inconsistent: false,
        };
        let list = [bitmap("b"), bitmap("b2"), bitmap("b4")];
        assert_eq!(space(&list, 10 << 20, 65536), 458_752);
        assert_eq!(space(&[], 10 << 20, 65536), 0);
    }
}
