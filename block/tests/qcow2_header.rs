//! The qcow2 header: hostile bytes are refused by name, images of QEMU parse and round-trip; what
//! `info` says is what qemu-img says.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use block::{
    ErrorKind,
    formats::qcow2::{
        header::{Autoclear, CompressionType, ExtensionType, Header, Incompatible},
        info::{image_info, read_bitmaps},
        snapshot::SnapshotTable,
    },
};
use qcow2_support::{header, on, qemu_create, temp_dir, tool};

/// A valid version 3 header of a 64 MiB disk, as QEMU makes it.
fn valid() -> Vec<u8> {
    let mut header = Header::new(3, 16, 4, 64 << 20).unwrap();
    header.l1_size = 1;
    header.l1_table_offset = 0x3_0000;
    header.refcount_table_offset = 0x1_0000;
    header.refcount_table_clusters = 1;
    header.to_bytes().unwrap()
}

fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut image = valid();
    image.resize(0x1_0000, 0);
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn hostile_fields_are_refused_by_name() {
    let max32 = [0xff; 4];
    let max64 = [0xff; 8];
    let cases: &[(&str, usize, &[u8])] = &[
        ("not in qcow2 format", 0, b"QFI\xfa"),
        ("field version: value 1,", 4, &1u32.to_be_bytes()),
        ("field version: value 4,", 4, &4u32.to_be_bytes()),
        ("Unsupported qcow2 version 4294967295", 4, &max32),
        (
            "field backing_file_offset: value 8,",
            8,
            &8u64.to_be_bytes(),
        ),
        ("Invalid backing file offset", 8, &0x1_0001u64.to_be_bytes()),
        ("Invalid backing file offset", 8, &max64),
        ("field cluster_bits: value 8,", 20, &8u32.to_be_bytes()),
        ("field cluster_bits: value 22,", 20, &22u32.to_be_bytes()),
        ("Unsupported cluster size: 2^4294967295", 20, &max32),
        (
            "field l1_size: value 1, expected at least",
            24,
            &(1u64 << 40).to_be_bytes(),
        ),
        ("Image is too big", 24, &max64),
        ("field crypt_method: value 3,", 32, &3u32.to_be_bytes()),
        ("Missing CRYPTO header", 32, &2u32.to_be_bytes()),
        ("L1 table is too small", 36, &0u32.to_be_bytes()),
        ("Active L1 table too large", 36, &max32),
        ("Active L1 table too large", 36, &0x40_0001u32.to_be_bytes()),
        (
            "Active L1 table offset invalid",
            40,
            &0x200u64.to_be_bytes(),
        ),
        ("field l1_table_offset: value 0x0,", 40, &0u64.to_be_bytes()),
        (
            "Active L1 table offset invalid",
            40,
            &0xffff_ffff_ffff_0000u64.to_be_bytes(),
        ),
        (
            "Active L1 table offset invalid",
            40,
            &0x7fff_ffff_ffff_ff00u64.to_be_bytes(),
        ),
        (
            "Reference count table offset invalid",
            48,
            &0x1_0001u64.to_be_bytes(),
        ),
        (
            "field refcount_table_offset: value 0x0,",
            48,
            &0u64.to_be_bytes(),
        ),
        (
            "Reference count table offset invalid",
            48,
            &0xffff_ffff_ffff_0000u64.to_be_bytes(),
        ),
        (
            "does not contain a reference count table",
            56,
            &0u32.to_be_bytes(),
        ),
        (
            "field refcount_table_clusters: value 129, expected at most 128",
            56,
            &129u32.to_be_bytes(),
        ),
        ("Reference count table too large", 56, &max32),
        (
            "field nb_snapshots: value 65537, expected at most 65536",
            60,
            &65537u32.to_be_bytes(),
        ),
        ("Snapshot table offset invalid", 64, &1u64.to_be_bytes()),
        (
            "Snapshot table offset invalid",
            64,
            &0xffff_ffff_ffff_0000u64.to_be_bytes(),
        ),
        (
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 8000000000000000",
            72,
            &(1u64 << 63).to_be_bytes(),
        ),
        (
            "Unknown incompatible feature: 20",
            72,
            &0x20u64.to_be_bytes(),
        ),
        (
            "bit must not be set (field compression_type: value 0,",
            72,
            &8u64.to_be_bytes(),
        ),
        (
            "data-file-raw requires a data file",
            88,
            &2u64.to_be_bytes(),
        ),
        (
            "bitmaps autoclear bit without bitmaps extension",
            88,
            &1u64.to_be_bytes(),
        ),
        ("field refcount_order: value 7,", 96, &7u32.to_be_bytes()),
        ("may not exceed 64 bits", 96, &max32),
        ("qcow2 header too short", 100, &96u32.to_be_bytes()),
        ("qcow2 header too short", 100, &0u32.to_be_bytes()),
        (
            "field header_length: value 108,",
            100,
            &108u32.to_be_bytes(),
        ),
        ("qcow2 header exceeds cluster size", 100, &max32),
        (
            "bit must be set (field compression_type: value 1,",
            104,
            &[1],
        ),
        ("unknown compression type: 2", 104, &[2]),
        ("Header extension too large", 116, &max32),
        (
            "Header extension too large",
            116,
            &0x1_0000u32.to_be_bytes(),
        ),
        (
            "CRYPTO header extension only expected",
            112,
            &[0x05, 0x37, 0xbe, 0x77],
        ),
    ];
    assert!(Header::parse(&with(0, b"QFI\xfb")).is_ok());
    for (expected, at, bytes) in cases {
        let error = Header::parse(&with(*at, bytes)).unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{bytes:x?} at {at}: {error}, expected {expected}"
        );
        assert!(
            matches!(
                error.kind(),
                ErrorKind::InvalidImage | ErrorKind::Unsupported
            ),
            "{error}: {:?}",
            error.kind()
        );
    }
}

/// Without the zeroes at the end.
fn trimmed(bytes: &[u8]) -> &[u8] {
    let len = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |at| at + 1);
    &bytes[..len]
}

#[test]
fn truncated_and_random_bytes_never_panic() {
    let image = valid();
    for len in 0..image.len() {
        let _ = Header::parse(&image[..len]);
    }
    let mut random = qcow2_support::Random(0x5eed);
    for _ in 0..20_000 {
        let mut image = valid();
        for _ in 0..1 + random.below(6) {
            let at = random.below(image.len() as u64) as usize;
            image[at] = random.next() as u8;
        }
        if let Ok(header) = Header::parse(&image) {
            let bytes = header.to_bytes().unwrap();
            assert!(trimmed(&bytes) == trimmed(&image), "{header:?}");
        }
        let _ = Header::parse_for_check(&image);
    }
}

#[test]
fn unknown_features_are_named_from_the_images_own_table() {
    // Entry 0 of the feature name table, at 120: names bit 62 instead of the dirty bit.
    let mut image = with(72, &(1u64 << 62 | 1 << 61).to_be_bytes());
    image[121] = 62;
    image[122..131].copy_from_slice(b"tea\x07 time");
    let error = Header::parse(&image).unwrap_err();
    assert_eq!(
        error.message(),
        "Unsupported qcow2 feature(s): tea? time, Unknown incompatible feature: 2000000000000000"
    );
    // A bit number above 63 names nothing.
    image[121] = 255;
    assert!(
        Header::parse(&image)
            .unwrap_err()
            .message()
            .ends_with("6000000000000000")
    );
}

#[test]
fn marked_images_open_for_what_is_safe() {
    let dirty = Header::parse(&with(72, &1u64.to_be_bytes())).unwrap();
    dirty.check_supported(true).unwrap();
    let corrupt = Header::parse(&with(72, &2u64.to_be_bytes())).unwrap();
    corrupt.check_supported(false).unwrap();
    assert_eq!(
        corrupt.check_supported(true).unwrap_err().kind(),
        ErrorKind::Corrupt
    );
}

#[test]
fn autoclear_bits_are_cleared_for_writing_and_compatible_bits_stay() {
    let mut image = with(88, &(1u64 << 40).to_be_bytes());
    image[80..88].copy_from_slice(&(1u64 << 50 | 1).to_be_bytes());
    let mut header = Header::parse(&image).unwrap();
    header.check_supported(true).unwrap();
    assert!(header.clear_for_writing());
    assert!(!header.clear_for_writing());
    image[88..96].fill(0);
    let bytes = header.to_bytes().unwrap();
    assert_eq!(bytes, image[..bytes.len()]);
}

#[test]
fn images_of_qemu_round_trip() {
    let dir = temp_dir();
    let base = dir.path().join("base.raw");
    tool(
        "qemu-img",
        &["create", "-q", "-f", "raw", base.to_str().unwrap(), "1M"],
    );
    let backing = format!("backing_file={},backing_fmt=raw", base.display());
    let mut count = 0;
    for options in [
        "",
        "compat=0.10",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
        &backing,
        &format!("{backing},compat=0.10"),
    ] {
        for cluster_size in ["512", "4k", "64k", "2M"] {
            let options = format!("{options},cluster_size={cluster_size}");
            let options = options.trim_start_matches(',');
            let path = qemu_create(&dir, "x.qcow2", options, "10M");
            assert_round_trip(&path);
            let header = header(&path);
            assert_eq!(header.size, 10 << 20);
            assert_eq!(
                header.backing_file_name().is_some(),
                options.contains("backing")
            );
            if options.contains("backing") {
                assert_eq!(header.backing_format().as_deref(), Some("raw"));
                assert_eq!(header.backing_file_name().as_deref(), base.to_str());
            }
            if options.contains("zstd") {
                assert_eq!(header.compression_type(), CompressionType::Zstd);
            }
            count += 1;
        }
    }
    assert_eq!(count, 32);
    let path = qemu_create(&dir, "bitmaps.qcow2", "", "10M");
    tool(
        "qemu-img",
        &["bitmap", "--add", path.to_str().unwrap(), "b0"],
    );
    assert_round_trip(&path);
    let header = header(&path);
    assert_eq!(header.bitmaps().unwrap().nb_bitmaps, 1);
    assert!(header.autoclear_features.contains(Autoclear::BITMAPS));
}

fn assert_round_trip(path: &std::path::Path) {
    let before = std::fs::read(path).unwrap();
    let header = header(path);
    let bytes = header.to_bytes().unwrap();
    assert_eq!(bytes, before[..bytes.len()]);
    on(path, async |io, file| header.write(io, file).await).unwrap();
    assert!(std::fs::read(path).unwrap() == before, "{}", path.display());
}

#[test]
fn unknown_parts_survive_changes() {
    // header_length 120 with an unknown field, an unknown extension with odd length and padding
    // that is not zero, then a format and a name far behind.
    let mut image = vec![0; 0x1_0000];
    image[..104].copy_from_slice(&valid()[..104]);
    image[100..104].copy_from_slice(&120u32.to_be_bytes());
    image[112..120].copy_from_slice(b"unknown!");
    image[120..128].copy_from_slice(&[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 5]);
    image[128..136].copy_from_slice(b"ext\0\x01pad");
    image[136..144].copy_from_slice(&[0xe2, 0x79, 0x2a, 0xca, 0, 0, 0, 3]);
    image[144..152].copy_from_slice(b"raw\0\0\0\0\0");
    image[8..16].copy_from_slice(&0x800u64.to_be_bytes());
    image[16..20].copy_from_slice(&4u32.to_be_bytes());
    image[0x800..0x804].copy_from_slice(b"base");
    let mut header = Header::parse(&image).unwrap();
    assert_eq!(header.extensions.len(), 2);
    let same = header.to_bytes().unwrap();
    assert_eq!(same, image[..same.len()]);

    header.incompatible_features.insert(Incompatible::DIRTY);
    header.size -= 512;
    let changed = header.to_bytes().unwrap();
    image[79] = 1;
    image[24..32].copy_from_slice(&((64u64 << 20) - 512).to_be_bytes());
    assert_eq!(changed, image[..changed.len()]);

    header
        .set_backing(Some(b"other-base"), Some("qcow2"))
        .unwrap();
    let moved = header.to_bytes().unwrap();
    assert!(moved.len() >= 0x804 && moved[0x800..].iter().all(|byte| *byte == 0));
    let again = Header::parse(&moved).unwrap();
    assert_eq!(again.backing_file_name().as_deref(), Some("other-base"));
    assert_eq!(again.backing_format().as_deref(), Some("qcow2"));
    let unknown = again.extension(ExtensionType(0x1234_5678)).unwrap();
    assert_eq!(unknown.data, b"ext\0\x01");
    assert_eq!(moved[112..136], image[112..136]);
    assert!(trimmed(&again.to_bytes().unwrap()) == trimmed(&moved));

    header.set_backing(None, None).unwrap();
    let gone = Header::parse(&header.to_bytes().unwrap()).unwrap();
    assert_eq!(gone.backing_file_name(), None);
    assert_eq!(gone.extensions.len(), 1);
}

#[test]
fn info_is_qemus() {
    let dir = temp_dir();
    for options in [
        "",
        "compat=0.10",
        "compression_type=zstd,lazy_refcounts=on,refcount_bits=1",
        "extended_l2=on",
        "data_file=DATA,data_file_raw=on",
        "cluster_size=2M,refcount_bits=64",
    ] {
        let data = dir.path().join("data");
        let options = options.replace("DATA", data.to_str().unwrap());
        let path = qemu_create(&dir, "info.qcow2", &options, "10M");
        let text = path.to_str().unwrap();
        if !options.contains("0.10") {
            tool("qemu-img", &["bitmap", "--add", "-g", "32k", text, "b0"]);
            tool("qemu-img", &["bitmap", "--add", "--disable", text, "b1"]);
        }
        if !options.contains("refcount_bits=1") && !options.contains("data_file") {
            tool("qemu-img", &["snapshot", "-c", "first one", text]);
            tool("qemu-img", &["snapshot", "-c", "second", text]);
        }
        let info = on(&path, async |io, file| {
            let header = Header::read(io, file).await?;
            let snapshots = SnapshotTable::read(io, file, &header).await?;
            assert_eq!(snapshots.len, snapshots.byte_len());
            let bytes = io
                .read_padded(file, header.snapshots_offset, snapshots.len as usize)
                .await?;
            assert_eq!(snapshots.to_bytes(), *bytes);
            let bitmaps = read_bitmaps(io, file, &header).await?;
            Ok(image_info(&header, &snapshots, &bitmaps))
        })
        .unwrap();
        let output = tool("qemu-img", &["info", "--output=json", text]);
        let theirs: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let ours = serde_json::Value::Object(info.format_specific);
        assert_eq!(ours, theirs["format-specific"]["data"]);
        assert_eq!(theirs["cluster-size"], info.cluster_size.unwrap());
        let list = theirs["snapshots"]
            .as_array()
            .map_or(&[][..], Vec::as_slice);
        assert_eq!(info.snapshots.len(), list.len());
        for (ours, theirs) in info.snapshots.iter().zip(list) {
            assert_eq!(theirs["id"], ours.id);
            assert_eq!(theirs["name"], ours.name);
            assert_eq!(theirs["date-sec"], ours.date_sec);
            assert_eq!(theirs["date-nsec"], ours.date_nsec);
            assert_eq!(theirs["vm-state-size"], ours.vm_state_size);
            assert_eq!(ours.disk_size, 10 << 20);
        }
    }
}
