//! Internal snapshots made, applied and deleted here and by QEMU, in turns.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::{fs, path::Path};

use block::{
    ErrorKind,
    formats::qcow2::{
        header::Header,
        snapshot::{
            SnapshotTable,
            ops::{NewSnapshot, apply_offline, create_offline, delete_offline},
        },
    },
};
use qcow2_support::{
    Random, assert_clean, header, on, qemu_create, qemu_io, temp_dir, tool, try_tool,
};

fn create(path: &Path, name: &str) -> block::Result<String> {
    on(path, async |io, file| {
        let new = NewSnapshot {
            name: name.to_owned(),
            date_sec: 1_700_000_000,
            date_nsec: 5,
            ..NewSnapshot::default()
        };
        create_offline(io, file, &new).await
    })
}

fn apply(path: &Path, name: &str) -> block::Result<()> {
    on(path, async |io, file| apply_offline(io, file, name).await)
}

fn delete(path: &Path, name: &str) -> block::Result<()> {
    on(path, async |io, file| delete_offline(io, file, name).await)
}

const OPTIONS: [&str; 6] = [
    "cluster_size=64k",
    "cluster_size=512",
    "cluster_size=4k,refcount_bits=64",
    "cluster_size=4k,refcount_bits=32",
    "cluster_size=2M",
    "compat=0.10,cluster_size=4k",
];

#[test]
fn snapshots_keep_and_restore_content() {
    let dir = temp_dir();
    for options in OPTIONS {
        let path = qemu_create(&dir, "x.qcow2", options, "8M");
        qemu_io(
            &path,
            &["write -P 1 0 1M", "write -c -P 2 2M 2M", "write -z 4M 2M"],
        );
        assert_eq!(create(&path, "one").unwrap(), "1");
        assert_clean(&path, &format!("{options}: created"));
        qemu_io(
            &path,
            &["read -P 1 0 1M", "write -P 3 512k 1M", "write -P 4 2M 64k"],
        );
        assert_clean(&path, &format!("{options}: written"));
        assert_eq!(create(&path, "two").unwrap(), "2");
        qemu_io(&path, &["write -P 5 0 8M"]);
        assert_clean(&path, &format!("{options}: overwritten"));

        let listed = tool("qemu-img", &["snapshot", "-l", path.to_str().unwrap()]).stdout;
        let listed = String::from_utf8_lossy(&listed).into_owned();
        assert!(listed.contains("one") && listed.contains("two"), "{listed}");
        let before = header(&path);
        apply(&path, "one").unwrap();
        assert_clean(&path, &format!("{options}: applied"));
        qemu_io(
            &path,
            &[
                "read -P 1 0 1M",
                "read -P 0 1M 1M",
                "read -P 2 2M 2M",
                "read -P 0 4M 4M",
            ],
        );
        apply(&path, "2").unwrap();
        qemu_io(
            &path,
            &[
                "read -P 1 0 512k",
                "read -P 3 512k 1M",
                "read -P 4 2M 64k",
                "write -P 6 0 4k",
            ],
        );
        assert_clean(&path, &format!("{options}: applied the other"));
        delete(&path, "one").unwrap();
        assert_clean(&path, &format!("{options}: deleted"));
        qemu_io(&path, &["read -P 6 0 4k", "read -P 3 512k 1M"]);
        apply(&path, "two").unwrap();
        qemu_io(&path, &["read -P 1 0 512k"]);
        delete(&path, "two").unwrap();
        assert_clean(&path, &format!("{options}: deleted all"));
        let after = header(&path);
        assert_eq!((after.nb_snapshots, after.snapshots_offset), (0, 0));
        assert_eq!(after.incompatible_features, before.incompatible_features);
        let error = delete(&path, "two").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

#[test]
fn turns_with_qemu() {
    let dir = temp_dir();
    let mut random = Random(4711);
    for options in [
        "cluster_size=4k",
        "cluster_size=64k,refcount_bits=8",
        "cluster_size=512",
    ] {
        let path = qemu_create(&dir, "x.qcow2", options, "4M");
        let text = path.to_str().unwrap();
        let mut names: Vec<(String, Vec<u8>)> = Vec::new();
        let raw = dir.path().join("raw");
        let content = || {
            tool(
                "qemu-img",
                &["convert", "-O", "raw", text, raw.to_str().unwrap()],
            );
            fs::read(&raw).unwrap()
        };
        for round in 0..30 {
            let at = random.below(4 << 20) & !511;
            let len = (random.below(256 << 10) + 512).min((4 << 20) - at) & !511;
            if len > 0 {
                qemu_io(&path, &[&format!("write -P {} {at} {len}", round + 1)]);
            }
            let ours = random.below(2) == 0;
            match random.below(3) {
                0 => {
                    let name = format!("s{round}");
                    if ours {
                        create(&path, &name).unwrap();
                    } else {
                        tool("qemu-img", &["snapshot", "-c", &name, text]);
                    }
                    names.push((name, content()));
                }
                action if !names.is_empty() => {
                    let at = random.below(names.len() as u64) as usize;
                    let (name, bytes) = names[at].clone();
                    match (action, ours) {
                        (1, true) => apply(&path, &name).unwrap(),
                        (1, false) => drop(tool("qemu-img", &["snapshot", "-a", &name, text])),
                        (_, true) => delete(&path, &name).unwrap(),
                        (_, false) => drop(tool("qemu-img", &["snapshot", "-d", &name, text])),
                    }
                    if action == 1 {
                        assert!(content() == bytes, "{options} round {round}: {name}");
                    } else {
                        names.remove(at);
                    }
                }
                _ => {}
            }
            assert_clean(&path, &format!("{options} round {round}"));
        }
        for (name, bytes) in names {
            apply(&path, &name).unwrap();
            assert!(content() == bytes, "{options}: {name}");
        }
        assert_clean(&path, options);
    }
}

#[test]
fn sizes_extra_data_and_limits() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "", "4M");
    qemu_io(&path, &["write -P 1 0 4M"]);
    create(&path, "small").unwrap();
    tool("qemu-img", &["resize", "-q", path.to_str().unwrap(), "1G"]);
    qemu_io(&path, &["write -P 2 600M 1M"]);
    create(&path, "large").unwrap();
    apply(&path, "small").unwrap();
    assert_eq!(header(&path).size, 4 << 20);
    qemu_io(&path, &["read -P 1 0 4M"]);
    apply(&path, "large").unwrap();
    assert_eq!(header(&path).size, 1 << 30);
    qemu_io(&path, &["read -P 2 600M 1M", "read -P 0 4M 500M"]);
    assert_clean(&path, "sizes");
    on(&path, async |io, file| {
        let header = Header::read(io, file).await?;
        let table = SnapshotTable::read(io, file, &header).await?;
        assert_eq!(table.find("large"), Some(1));
        assert_eq!(table.find("1"), Some(0));
        assert_eq!(table.find_by(Some("2"), Some("small")), None);
        assert_eq!(table.snapshots[0].disk_size(), Some(4 << 20));
        assert_eq!(table.snapshots[1].icount(), None);
        Ok(())
    })
    .unwrap();

    let one_bit = qemu_create(&dir, "one.qcow2", "refcount_bits=1", "4M");
    qemu_io(&one_bit, &["write 0 1M"]);
    let bytes = fs::read(&one_bit).unwrap();
    assert_eq!(
        create(&one_bit, "x").unwrap_err().kind(),
        ErrorKind::InvalidArgument
    );
    assert!(fs::read(&one_bit).unwrap() == bytes);

    // Two bits count to 3: the third snapshot has no room, and all is as before.
    let two_bits = qemu_create(&dir, "two.qcow2", "refcount_bits=2", "4M");
    qemu_io(&two_bits, &["write -P 1 0 1M"]);
    create(&two_bits, "a").unwrap();
    create(&two_bits, "b").unwrap();
    let error = create(&two_bits, "c").unwrap_err();
    assert!(
        error.to_string().contains("the most that 2 bits can hold"),
        "{error}"
    );
    assert_clean(&two_bits, "after an error");
    assert_eq!(header(&two_bits).nb_snapshots, 2);
    delete(&two_bits, "a").unwrap();
    delete(&two_bits, "b").unwrap();
    assert_clean(&two_bits, "two bits");
}

#[test]
fn damaged_tables_are_refused_before_anything_changes() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "x.qcow2", "", "4M");
    qemu_io(&path, &["write -P 1 0 1M"]);
    create(&path, "one").unwrap();
    let original = fs::read(&path).unwrap();
    let header = header(&path);
    let l1 = header.l1_table_offset as usize;
    let l2 = u64::from_be_bytes(original[l1..l1 + 8].try_into().unwrap()) & !(1 << 63);
    let table = header.snapshots_offset as usize;
    for (what, at, value) in [
        ("L1 entry misaligned", l1, l2 | 0x200),
        ("L1 entry outside", l1, 1 << 50),
        ("data outside", l2 as usize, 1 << 50),
        ("data over the header", l2 as usize, 1 << 63),
        ("snapshot L1 outside", table, 1 << 50),
        ("snapshot L1 misaligned", table, 0x200),
        ("snapshot L1 too large", table + 8, u64::MAX << 32),
    ] {
        let mut bytes = original.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        fs::write(&path, &bytes).unwrap();
        let snapshot_only = what.starts_with("snapshot");
        if !snapshot_only {
            assert!(create(&path, "two").is_err(), "{what}");
        }
        assert!(apply(&path, "one").is_err(), "{what}");
        assert!(delete(&path, "one").is_err(), "{what}");
        assert!(fs::read(&path).unwrap() == bytes, "{what}: changed");
    }
    fs::write(&path, &original).unwrap();
    assert!(
        try_tool("qemu-img", &["check", path.to_str().unwrap()])
            .status
            .success()
    );
}
