//! Persistent dirty bitmaps: kept, recorded and judged in turns with QEMU.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::path::Path;

use block::{
    AsyncDiskFile, BitmapChange, Disk, DiskExtras, DiskFile, ErrorKind, OpenOptions,
    formats::qcow2::header::{Autoclear, ExtensionType},
    io::{AlignedBuf, Buffers, EngineKind, Request, RequestOp},
};
use qcow2_support::{Random, assert_clean, header, qemu_create, qemu_io, temp_dir, tool, try_tool};
use serde_json::Value;

const ADD: BitmapChange<'static> = BitmapChange::Add {
    granularity: None,
    enabled: true,
};

fn open(path: &Path) -> Disk {
    OpenOptions::new()
        .engine(EngineKind::Sync)
        .open_disk(path)
        .unwrap()
}

fn open_read_only(path: &Path) -> Disk {
    OpenOptions::new().read_only(true).open_disk(path).unwrap()
}

fn ranges(disk: &Disk, name: &str) -> Vec<(u64, u64)> {
    let bits = disk.bitmap_bits(name).unwrap();
    bits.ranges().map(|r| (r.start.0, r.end())).collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn bitmap(path: &Path, args: &[&str], name: &str) {
    let mut all = vec!["bitmap"];
    all.extend(args);
    all.extend([text(path), name]);
    tool("qemu-img", &all);
}

/// What QEMU lists: name, granularity and flags.
fn listed(path: &Path) -> Vec<(String, u64, Vec<String>)> {
    let output = tool("qemu-img", &["info", "-U", "--output=json", text(path)]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let list = &info["format-specific"]["data"]["bitmaps"];
    let Some(list) = list.as_array() else {
        return Vec::new();
    };
    list.iter()
        .map(|one| {
            let flags = one["flags"].as_array().unwrap().iter();
            (
                one["name"].as_str().unwrap().to_owned(),
                one["granularity"].as_u64().unwrap(),
                flags
                    .map(|flag| flag.as_str().unwrap().to_owned())
                    .collect(),
            )
        })
        .collect()
}

#[test]
fn writes_are_recorded_and_kept() {
    let dir = temp_dir();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
    ] {
        let path = qemu_create(&dir, "a.qcow2", options, "16M");
        let disk = open(&path);
        disk.change_bitmap("ours", ADD).unwrap();
        let fine = BitmapChange::Add {
            granularity: Some(512),
            enabled: true,
        };
        disk.change_bitmap("fine", fine).unwrap();
        disk.change_bitmap("fine", BitmapChange::Disable).unwrap();
        disk.write_at(&[1; 100], 1 << 20).unwrap();
        disk.change_bitmap("fine", BitmapChange::Enable).unwrap();
        disk.write_at(&[1; 100], (2 << 20) + 1000).unwrap();
        disk.write_zeroes(3 << 20, 4096, true).unwrap();
        disk.discard(4 << 20, 4096).unwrap();
        let cluster = disk.info().cluster_size.unwrap();
        disk.write_compressed(&vec![2; cluster as usize], 6 << 20)
            .unwrap();
        let mut queue = disk.create_async_io(4).unwrap();
        queue.submit(&mut vec![Request {
            id: 1,
            op: RequestOp::Write {
                offset: 12 << 20,
                buffers: Buffers::owned(AlignedBuf::zeroed(512)),
                fua: false,
            },
        }]);
        let mut done = Vec::new();
        while queue.reap(&mut done) == 0 {}
        drop(queue);
        let expected = [
            ((2 << 20) + 512, (2 << 20) + 1536),
            (3 << 20, (3 << 20) + 4096),
            (4 << 20, (4 << 20) + 4096),
            (6 << 20, (6 << 20) + cluster),
            (12 << 20, (12 << 20) + 512),
        ];
        assert_eq!(ranges(&disk, "fine"), expected);
        let coarse = ranges(&disk, "ours");
        assert_eq!(coarse.len(), 6, "{coarse:?}");
        // While it is open, the image says that nobody can rely on them.
        disk.close().unwrap();
        assert_clean(&path, options);
        let names: Vec<_> = listed(&path)
            .into_iter()
            .map(|one| (one.0, one.2))
            .collect();
        let auto = vec!["auto".to_owned()];
        assert_eq!(
            names,
            [("ours".into(), auto.clone()), ("fine".into(), auto)]
        );
        // QEMU goes on recording.
        qemu_io(&path, &["write 13M 512"]);
        let disk = open_read_only(&path);
        let mut expected = expected.to_vec();
        expected.push((13 << 20, (13 << 20) + 512));
        assert_eq!(ranges(&disk, "fine"), expected);
        drop(disk);
        // And so do we, on what it stored.
        let disk = open(&path);
        disk.write_at(&[3; 512], 14 << 20).unwrap();
        expected.push((14 << 20, (14 << 20) + 512));
        disk.close().unwrap();
        assert_clean(&path, options);
        let disk = open(&path);
        assert_eq!(ranges(&disk, "fine"), expected);
        disk.change_bitmap("fine", BitmapChange::Clear).unwrap();
        disk.change_bitmap("ours", BitmapChange::Remove).unwrap();
        disk.close().unwrap();
        assert_clean(&path, options);
        assert_eq!(ranges(&open_read_only(&path), "fine"), []);
        bitmap(&path, &["--remove"], "fine");
        assert_clean(&path, options);
        assert!(header(&path).bitmaps().is_none());
    }
}

#[test]
fn the_bits_are_those_that_qemu_sees() {
    // A bitmap made here is merged by QEMU into one of its own, and the other way round.
    let dir = temp_dir();
    let mut random = Random(99);
    for (options, granularity) in [("cluster_size=512", 512), ("cluster_size=4k", 65536)] {
        let path = qemu_create(&dir, "a.qcow2", options, "40M");
        let disk = open(&path);
        let add = BitmapChange::Add {
            granularity: Some(granularity),
            enabled: true,
        };
        disk.change_bitmap("a", add).unwrap();
        for _ in 0..300 {
            let at = random.below(40 << 20);
            let len = random.below(20_000).min((40 << 20) - at);
            disk.write_zeroes(at, len, true).unwrap();
        }
        // A run of all ones.
        disk.write_zeroes(8 << 20, 20 << 20, true).unwrap();
        let written = ranges(&disk, "a");
        disk.close().unwrap();
        assert_clean(&path, options);
        bitmap(
            &path,
            &["--add", "-g", &granularity.to_string(), "--merge", "a"],
            "b",
        );
        assert_clean(&path, options);
        let disk = open(&path);
        assert_eq!(ranges(&disk, "b"), written);
        // Written anew by us.
        disk.write_at(&[1; 512], 0).unwrap();
        disk.close().unwrap();
        bitmap(&path, &["--clear"], "a");
        bitmap(&path, &["--merge", "b"], "a");
        let disk = open_read_only(&path);
        assert_eq!(ranges(&disk, "a"), ranges(&disk, "b"));
    }
}

#[test]
fn a_bitmap_of_a_dead_program_is_not_trusted() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    bitmap(&path, &["--add"], "old");
    let disk = open(&path);
    disk.write_at(&[1; 512], 0).unwrap();
    let flags = listed(&path).remove(0).2;
    assert_eq!(flags, ["in-use", "auto"]);
    // As if it died: a copy of what is in the file.
    let copy = dir.path().join("copy.qcow2");
    std::fs::copy(&path, &copy).unwrap();
    disk.close().unwrap();
    assert_eq!(listed(&path).remove(0).2, ["auto"]);

    let disk = open(&copy);
    let info = disk.bitmaps().remove(0);
    assert!(info.inconsistent && !info.enabled);
    for change in [
        BitmapChange::Clear,
        BitmapChange::Enable,
        BitmapChange::Disable,
    ] {
        let error = disk.change_bitmap("old", change).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
    }
    assert_eq!(
        disk.bitmap_bits("old").unwrap_err().kind(),
        ErrorKind::Corrupt
    );
    assert!(disk.resize(8 << 20).is_err());
    disk.write_at(&[1; 512], 0).unwrap();
    disk.close().unwrap();
    assert_eq!(listed(&copy).remove(0).2, ["in-use", "auto"]);
    let disk = open(&copy);
    disk.change_bitmap("old", BitmapChange::Remove).unwrap();
    disk.close().unwrap();
    assert_eq!(listed(&copy), []);
    assert_clean(&copy, "removed");
}

#[test]
fn reading_changes_no_byte_and_doing_nothing_only_what_it_must() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    bitmap(&path, &["--add"], "one");
    bitmap(&path, &["--add", "--disable", "-g", "2G"], "two");
    let before = std::fs::read(&path).unwrap();
    let disk = open_read_only(&path);
    assert_eq!(disk.bitmaps().len(), 2);
    assert_eq!(
        disk.change_bitmap("one", BitmapChange::Clear)
            .unwrap_err()
            .kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(ranges(&disk, "one"), []);
    disk.close().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before);
    // Opened for writing and closed: as it was.
    open(&path).close().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), before);
}

#[test]
fn what_cannot_be_is_refused() {
    let dir = temp_dir();
    let v2 = qemu_create(&dir, "v2.qcow2", "compat=0.10", "4M");
    let disk = open(&v2);
    let error = disk.change_bitmap("a", ADD).unwrap_err();
    assert!(error.message().contains("v2"), "{error}");
    disk.close().unwrap();

    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    let disk = open(&path);
    let add = |granularity| BitmapChange::Add {
        granularity: Some(granularity),
        enabled: true,
    };
    for granularity in [0, 256, 513, 3 << 20, 4 << 30] {
        let error = disk.change_bitmap("a", add(granularity)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{granularity}");
    }
    assert!(disk.change_bitmap("", ADD).is_err());
    assert!(disk.change_bitmap(&"x".repeat(1024), ADD).is_err());
    disk.change_bitmap(&"x".repeat(1023), ADD).unwrap();
    disk.change_bitmap("a", ADD).unwrap();
    assert!(disk.change_bitmap("a", ADD).is_err());
    let missing = disk.change_bitmap("b", BitmapChange::Remove).unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
    let other = block::DirtyBits::new(1 << 20, 16);
    assert!(
        disk.change_bitmap("a", BitmapChange::Merge(&other))
            .is_err()
    );
    disk.close().unwrap();
    assert_clean(&path, "a long name");

    let huge = qemu_create(&dir, "huge.qcow2", "cluster_size=2M", "1024T");
    let disk = open(&huge);
    assert!(disk.change_bitmap("a", add(512)).is_err());
    disk.change_bitmap("a", add(2 << 30)).unwrap();
    disk.write_zeroes(1 << 49, 1, false).unwrap();
    disk.close().unwrap();
    assert_eq!(
        ranges(&open_read_only(&huge), "a"),
        [(1 << 49, (1 << 49) + (2 << 30))]
    );

    let raw = dir.path().join("raw");
    std::fs::write(&raw, [0; 4096]).unwrap();
    let disk = OpenOptions::new()
        .format(block::Format::Raw)
        .open_disk(&raw)
        .unwrap();
    let error = disk.change_bitmap("a", ADD).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(disk.bitmaps().is_empty());
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    let dir = temp_dir();
    for options in ["cluster_size=512", "cluster_size=64k"] {
        let path = qemu_create(&dir, "a.qcow2", options, "8M");
        bitmap(&path, &["--add", "-g", "512"], "a");
        bitmap(&path, &["--add", "--disable"], "off");
        qemu_io(&path, &["write 0 512", "write 7M 1M"]);
        let disk = open(&path);
        disk.resize(16 << 20).unwrap();
        assert_eq!(ranges(&disk, "a"), [(0, 512), (7 << 20, 8 << 20)]);
        disk.write_at(&[1; 512], 15 << 20).unwrap();
        disk.close().unwrap();
        assert_clean(&path, options);
        qemu_io(&path, &["write 14M 512"]);
        let disk = open(&path);
        assert_eq!(ranges(&disk, "a").len(), 4);
        disk.resize((7 << 20) + 1024).unwrap();
        disk.resize(8 << 20).unwrap();
        disk.close().unwrap();
        assert_clean(&path, options);
        let disk = open_read_only(&path);
        assert_eq!(ranges(&disk, "a"), [(0, 512), (7 << 20, (7 << 20) + 1024)]);
        drop(disk);
        tool("qemu-img", &["resize", "-q", text(&path), "20M"]);
        assert_eq!(ranges(&open_read_only(&path), "a").len(), 2);
    }
}

#[test]
fn snapshots_beside_bitmaps() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "cluster_size=4k", "4M");
    let disk = open(&path);
    disk.change_bitmap("a", ADD).unwrap();
    disk.write_at(&[1; 4096], 0).unwrap();
    let new = block::NewSnapshot {
        name: "s".into(),
        ..block::NewSnapshot::default()
    };
    disk.create_snapshot(&new).unwrap();
    disk.write_at(&[2; 4096], 0).unwrap();
    // As QEMU: what the bitmap says would not be true any more.
    assert!(disk.apply_snapshot("s").is_err());
    disk.close().unwrap();
    assert_clean(&path, "snapshot and bitmap");
    let at = OpenOptions::new()
        .read_only(true)
        .snapshot("s")
        .open_disk(&path)
        .unwrap();
    let mut byte = [0];
    at.read_at(&mut byte, 0).unwrap();
    assert_eq!(byte, [1]);
    assert!(at.bitmaps().is_empty());
    at.close().unwrap();
    let disk = open(&path);
    disk.change_bitmap("a", BitmapChange::Remove).unwrap();
    disk.apply_snapshot("s").unwrap();
    disk.delete_snapshot("s").unwrap();
    disk.close().unwrap();
    assert_clean(&path, "applied");
    qemu_io(&path, &["read -P 1 0 4096"]);
}

#[test]
fn a_stale_extension_is_ignored_and_replaced() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    bitmap(&path, &["--add"], "old");
    let mut bytes = std::fs::read(&path).unwrap();
    // Autoclear bit 0, as a writer that knows no bitmaps leaves it.
    bytes[95] &= !1;
    std::fs::write(&path, bytes).unwrap();
    assert!(header(&path).extension(ExtensionType::BITMAPS).is_some());
    let disk = open(&path);
    assert!(disk.bitmaps().is_empty());
    disk.change_bitmap("old", ADD).unwrap();
    disk.close().unwrap();
    assert!(
        header(&path)
            .autoclear_features
            .contains(Autoclear::BITMAPS)
    );
    assert_eq!(listed(&path).len(), 1);
    // The clusters of the old one are lost until a check finds them.
    let output = try_tool("qemu-img", &["check", "-r", "leaks", text(&path)]);
    assert!(output.status.success());
    assert_eq!(listed(&path).len(), 1);
}

/// Bytes of the image with the directory changed by `change`.
fn damaged(path: &Path, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = std::fs::read(path).unwrap();
    let at = header(path).bitmaps().unwrap().bitmap_directory_offset as usize;
    change(&mut bytes[at..]);
    bytes
}

#[test]
fn damaged_directories_are_named_and_can_be_read_around() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    bitmap(&path, &["--add"], "b0");
    bitmap(&path, &["--add"], "b1");
    type Damage = fn(&mut [u8]);
    let cases: [(&str, Damage); 13] = [
        ("bitmap_table_offset", |d| d[7] = 1),
        ("bitmap_table_offset", |d| d[..8].fill(0)),
        ("bitmap_table_offset", |d| d[0] = 0xff),
        ("bitmap_table_size", |d| d[8..12].fill(0)),
        ("bitmap_table_size", |d| d[8..12].fill(0xff)),
        ("flags", |d| d[12] = 0x80),
        ("flags", |d| d[15] |= 8),
        ("type", |d| d[16] = 2),
        ("granularity_bits", |d| d[17] = 8),
        ("granularity_bits", |d| d[17] = 32),
        ("name_size", |d| d[18..20].fill(0xff)),
        ("extra_data_size", |d| d[20..24].fill(0xff)),
        ("name", |d| {
            let (first, second) = d.split_at_mut(32);
            second[24..26].copy_from_slice(&first[24..26]);
        }),
    ];
    let bad = dir.path().join("bad.qcow2");
    for (field, damage) in cases {
        let bytes = damaged(&path, damage);
        std::fs::write(&bad, &bytes).unwrap();
        let error = OpenOptions::new().open_disk(&bad).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{field}");
        assert!(error.message().contains(field), "{field}: {error}");
        let disk = open_read_only(&bad);
        let error = disk.bitmap_bits("b0").unwrap_err();
        assert!(error.message().contains(field), "{field}: {error}");
        let mut byte = [0];
        disk.read_at(&mut byte, 0).unwrap();
        disk.close().unwrap();
        assert_eq!(std::fs::read(&bad).unwrap(), bytes, "{field}");
    }
    // Both name the same table.
    let bytes = damaged(&path, |d| {
        let (first, second) = d.split_at_mut(32);
        second[..8].copy_from_slice(&first[..8]);
    });
    std::fs::write(&bad, bytes).unwrap();
    let error = OpenOptions::new().open_disk(&bad).err().unwrap();
    assert!(error.message().contains("overlap"), "{error}");
}

#[test]
fn damaged_tables_cost_the_bitmap_alone() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    bitmap(&path, &["--add"], "bad");
    bitmap(&path, &["--add"], "good");
    let bytes = damaged(&path, |_| {});
    let at = header(&path).bitmaps().unwrap().bitmap_directory_offset as usize;
    let table = u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    for entry in [2u64, 1 << 56, 0x1_0001, 0x1_0200, 1 << 50, 0x5_0000_0000] {
        let mut bytes = bytes.clone();
        bytes[table..table + 8].copy_from_slice(&entry.to_be_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let disk = open(&path);
        let error = disk.bitmap_bits("bad").unwrap_err();
        assert!(error.message().contains("bitmap table entry 0"), "{error}");
        disk.write_at(&[7; 512], 1 << 20).unwrap();
        // What was written is there; the bitmap that could not be stored is not trusted.
        assert!(disk.close().is_err());
        qemu_io_unless_broken(&path);
        let disk = open_read_only(&path);
        assert_eq!(ranges(&disk, "good"), [(1 << 20, (1 << 20) + 65536)]);
        assert!(disk.bitmaps()[0].inconsistent);
        drop(disk);
        let disk = open(&path);
        disk.change_bitmap("bad", BitmapChange::Remove).unwrap();
        disk.close().unwrap();
    }
}

fn qemu_io_unless_broken(path: &Path) {
    qemu_io(path, &["read -P 7 1M 512"]);
}

#[test]
fn extra_data_decides_whether_a_bitmap_can_be_used() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "", "4M");
    // The name becomes 8 bytes of extra data and a name of 8 bytes.
    bitmap(&path, &["--add"], "12345678abcdefgh");
    for compatible in [false, true] {
        let bytes = damaged(&path, |d| {
            d[18..20].copy_from_slice(&8u16.to_be_bytes());
            d[20..24].copy_from_slice(&8u32.to_be_bytes());
            if compatible {
                d[15] |= 4;
            }
        });
        let copy = dir.path().join("copy.qcow2");
        std::fs::write(&copy, &bytes).unwrap();
        let disk = open(&copy);
        assert_eq!(disk.bitmaps()[0].name, "abcdefgh");
        assert_eq!(disk.bitmap_bits("abcdefgh").is_ok(), compatible);
        disk.close().unwrap();
        // Nothing was written: it is as it was.
        assert_eq!(std::fs::read(&copy).unwrap(), bytes);
        let disk = open(&copy);
        disk.write_at(&[1; 512], 0).unwrap();
        disk.close().unwrap();
        let after = std::fs::read(&copy).unwrap();
        let at = header(&copy).bitmaps().unwrap().bitmap_directory_offset as usize;
        assert_eq!(&after[at + 24..at + 40], b"12345678abcdefgh");
        let flags = after[at + 15];
        assert_eq!(flags, if compatible { 4 | 2 } else { 2 | 1 });
    }
}

#[test]
fn a_commit_is_recorded_below() {
    let dir = temp_dir();
    let base = qemu_create(&dir, "base.qcow2", "", "4M");
    bitmap(&base, &["--add"], "below");
    let over = "backing_file=base.qcow2,backing_fmt=qcow2";
    let path = qemu_create(&dir, "a.qcow2", over, "8M");
    bitmap(&path, &["--add"], "above");
    qemu_io(&path, &["write 1M 64k", "write 6M 64k", "write -z 2M 64k"]);
    let disk = OpenOptions::new()
        .writable_backing(1)
        .open_disk(&path)
        .unwrap();
    block::maintenance::commit(&disk, 1, &mut |_| Ok(())).unwrap();
    disk.close().unwrap();
    assert_clean(&base, "committed");
    assert_clean(&path, "committed");
    let expected = [1u64, 2, 6].map(|at| (at << 20, (at << 20) + 65536));
    assert_eq!(ranges(&open_read_only(&base), "below"), expected);
    assert_eq!(ranges(&open_read_only(&path), "above"), expected);
}
