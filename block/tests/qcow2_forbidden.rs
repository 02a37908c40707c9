//! What the format forbids is refused, by both variants, with an error that names the file, the field,
//! its value and what was expected; and nothing is written.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::{fs, path::Path, time::Duration};

use block::{
    BitmapChange, DiskFile, Error, NewSnapshot, OpenOptions, Qcow2Async, Qcow2Sync, Result,
    crypto::{Secret, luks::LuksOptions},
    formats::qcow2::{
        amend::{AmendOptions, amend, downgrade},
        create::{CreateOptions, Encrypt, create},
        header::CompressionType,
    },
    offline::{OfflineOptions, open_beside, with_file},
};
use qcow2_support::{on, qemu_create, temp_dir, tool};

const CLUSTER: usize = 64 << 10;

/// The image `a.qcow2` in an empty folder.
type Make = fn(&tempfile::TempDir);
type Act = fn(&dyn DiskFile) -> Result<()>;

fn secret() -> Secret {
    Secret::new(b"key".to_vec())
}

/// The error says all there is to say.
fn assert_names(error: &Error, path: &Path, parts: &[&str], what: &str) {
    let text = error.to_string();
    let file = path.file_name().unwrap().to_str().unwrap();
    for part in [file, "field ", ": value ", ", expected "]
        .iter()
        .chain(parts)
    {
        assert!(text.contains(part), "{what}: {text}: no '{part}'");
    }
}

const VARIANTS: [&str; 2] = ["Qcow2Sync", "Qcow2Async"];

/// Opens an image as one of the variants.
fn open(variant: &str, path: &Path, read_only: bool) -> Result<Box<dyn DiskFile>> {
    let mut options = OpenOptions::new().read_only(read_only);
    // A key for an image that is not encrypted would be an error of its own.
    if fs::read(path).unwrap()[35] != 0 {
        options = options.key(secret());
    }
    Ok(if variant == VARIANTS[0] {
        Box::new(Qcow2Sync::open(path, &options)?)
    } else {
        Box::new(Qcow2Async::open(path, &options)?)
    })
}

fn plain(dir: &tempfile::TempDir, options: &str) {
    let path = qemu_create(dir, "a.qcow2", options, "1M");
    tool(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 5 0 128k",
            path.to_str().unwrap(),
        ],
    );
}

fn with_data_file(dir: &tempfile::TempDir, more: &str) {
    let data = dir.path().join("data");
    plain(dir, &format!("data_file={}{more}", data.display()));
}

fn encrypted(dir: &tempfile::TempDir, encrypt: Encrypt) {
    let options = CreateOptions {
        size: 1 << 20,
        encrypt: Some(encrypt),
        ..CreateOptions::default()
    };
    on(&dir.path().join("a.qcow2"), async |io, file| {
        create(io, file, &options).await
    })
    .unwrap();
}

fn snapshot(disk: &dyn DiskFile) -> Result<()> {
    let new = NewSnapshot {
        name: "s".into(),
        ..NewSnapshot::default()
    };
    disk.extras().create_snapshot(&new).map(drop)
}

fn compress(disk: &dyn DiskFile) -> Result<()> {
    disk.write_compressed(&vec![1; CLUSTER], 0)
}

#[test]
fn an_open_disk_refuses_what_its_image_cannot_have() {
    let data: Make = |dir| with_data_file(dir, "");
    let raw: Make = |dir| with_data_file(dir, ",data_file_raw=on");
    let luks: Make = |dir| {
        let options = LuksOptions {
            iter_time: Duration::from_millis(1),
            ..LuksOptions::default()
        };
        encrypted(
            dir,
            Encrypt::Luks {
                options,
                secret: secret(),
            },
        );
    };
    let add: Act = |disk| {
        let add = BitmapChange::Add {
            granularity: None,
            enabled: true,
        };
        disk.extras().change_bitmap("b", add)
    };
    let no_data_file = "field incompatible_features: value 0x4, expected bit 2";
    let cases: [(&str, Make, Act, &[&str]); 12] = [
        ("compressed, data file", data, compress, &[no_data_file]),
        ("compressed, raw data file", raw, compress, &[no_data_file]),
        ("snapshot, data file", data, snapshot, &[no_data_file]),
        ("snapshot, raw data file", raw, snapshot, &[no_data_file]),
        (
            "snapshot applied, data file",
            data,
            |disk| disk.extras().apply_snapshot("1"),
            &[no_data_file],
        ),
        (
            "snapshot deleted, data file",
            data,
            |disk| disk.extras().delete_snapshot("1"),
            &[no_data_file],
        ),
        (
            "snapshot, 1-bit counts",
            |dir| plain(dir, "refcount_bits=1"),
            snapshot,
            &["field refcount_order: value 0, expected at least 1"],
        ),
        (
            "snapshot, 1-bit counts, subclusters",
            |dir| plain(dir, "refcount_bits=1,extended_l2=on"),
            snapshot,
            &["field refcount_order: value 0, expected at least 1"],
        ),
        (
            "compressed, LUKS",
            luks,
            compress,
            &["field crypt_method: value 2, expected 0"],
        ),
        (
            "compressed, AES",
            |dir| encrypted(dir, Encrypt::Aes),
            compress,
            &["field crypt_method: value 1, expected 0"],
        ),
        (
            "bitmap, version 2",
            |dir| plain(dir, "compat=0.10"),
            add,
            &["field version: value 2, expected 3"],
        ),
        (
            "bitmap, version 2, small clusters",
            |dir| plain(dir, "compat=0.10,cluster_size=512"),
            add,
            &["field version: value 2, expected 3"],
        ),
    ];
    for (what, make, act, parts) in cases {
        let dir = temp_dir();
        let path = dir.path().join("a.qcow2");
        make(&dir);
        for variant in VARIANTS {
            let before = fs::read(&path).unwrap();
            let disk = open(variant, &path, false);
            let disk = disk.unwrap_or_else(|error| panic!("{what}: {error}"));
            let error = act(&*disk).unwrap_err();
            assert_names(&error, &path, parts, &format!("{what}, {variant}"));
            disk.close().unwrap();
            drop(disk);
            let unchanged = fs::read(&path).unwrap() == before;
            assert!(unchanged, "{what}, {variant}: written to");
        }
    }
}

fn put(path: &Path, at: usize, value: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
    fs::write(path, bytes).unwrap();
}

#[test]
fn an_image_that_cannot_be_does_not_open() {
    // The words that QEMU would never write are put there by hand.
    let cases: [(&str, Make, bool, &str); 6] = [
        (
            "raw data file and backing file",
            |dir| {
                let base = dir.path().join("base");
                fs::write(&base, vec![0; 1 << 20]).unwrap();
                with_data_file(dir, ",backing_file=base,backing_fmt=raw");
                // Autoclear bit 1.
                put(&dir.path().join("a.qcow2"), 95, &[2]);
            },
            true,
            "field autoclear_features: value 0x2, expected bit 1 to be clear",
        ),
        (
            "raw without a data file",
            |dir| {
                plain(dir, "");
                put(&dir.path().join("a.qcow2"), 95, &[2]);
            },
            true,
            "field autoclear_features: value 0x2, expected bit 1 only",
        ),
        (
            "subclusters of 256 bytes",
            |dir| {
                plain(dir, "cluster_size=8k");
                put(&dir.path().join("a.qcow2"), 79, &[0x10]);
            },
            true,
            "field cluster_bits: value 13, expected at least 14",
        ),
        (
            "subclusters of 16 bytes",
            |dir| {
                plain(dir, "cluster_size=512");
                put(&dir.path().join("a.qcow2"), 79, &[0x10]);
            },
            true,
            "field cluster_bits: value 9, expected at least 14",
        ),
        (
            "snapshots and a data file",
            |dir| {
                plain(dir, "");
                let path = dir.path().join("a.qcow2");
                tool("qemu-img", &["snapshot", "-c", "s", path.to_str().unwrap()]);
                // Incompatible bit 2, and the name in place of the feature table.
                let mut extension = Vec::new();
                extension.extend_from_slice(&0x4441_5441_u32.to_be_bytes());
                extension.extend_from_slice(&4u32.to_be_bytes());
                extension.extend_from_slice(b"data\0\0\0\0\0\0\0\0\0\0\0\0");
                put(&path, 79, &[4]);
                put(&path, 112, &extension);
                fs::write(dir.path().join("data"), vec![0; 1 << 20]).unwrap();
            },
            false,
            "field nb_snapshots: value 1, expected 0",
        ),
        (
            "compression without its bit",
            |dir| {
                plain(dir, "");
                put(&dir.path().join("a.qcow2"), 104, &[1]);
            },
            true,
            "field compression_type: value 1, expected 0",
        ),
    ];
    for (what, make, reading_too, part) in cases {
        let dir = temp_dir();
        let path = dir.path().join("a.qcow2");
        make(&dir);
        let before = fs::read(&path).unwrap();
        for read_only in [false, true] {
            for variant in VARIANTS {
                let opened = open(variant, &path, read_only);
                let what = format!("{what}, {variant}, read-only {read_only}");
                if read_only && !reading_too {
                    drop(opened.unwrap_or_else(|error| panic!("{what}: {error}")));
                    continue;
                }
                let Err(error) = opened else {
                    panic!("{what}: opens");
                };
                assert_names(&error, &path, &[part], &what);
            }
        }
        assert!(fs::read(&path).unwrap() == before, "{what}: written to");
    }
}

/// A zero cluster, which version 2 does not have, and a compressed one, which a data file cannot have.
#[test]
fn clusters_that_cannot_be_are_corrupt_in_both_variants() {
    let v2: Make = |dir| plain(dir, "compat=0.10");
    let data: Make = |dir| with_data_file(dir, "");
    for (what, make, entry) in [
        ("zero flag, version 2", v2, 1u64),
        ("compressed, data file", data, 0x4000_0000_0005_0000),
    ] {
        for variant in VARIANTS {
            let dir = temp_dir();
            let path = dir.path().join("a.qcow2");
            make(&dir);
            let bytes = fs::read(&path).unwrap();
            let number_at = |at: usize| {
                let bytes: [u8; 8] = bytes[at..at + 8].try_into().unwrap();
                (u64::from_be_bytes(bytes) & 0x00ff_ffff_ffff_fe00) as usize
            };
            let l2 = number_at(number_at(40));
            put(&path, l2 + 8, &entry.to_be_bytes());
            let disk = open(variant, &path, true).unwrap();
            let error = disk.read_at(&mut [0; 512], CLUSTER as u64).unwrap_err();
            let what = format!("{what}, {variant}: {error}");
            assert_eq!(error.kind(), block::ErrorKind::Corrupt, "{what}");
            assert!(error.to_string().contains("a.qcow2"), "{what}");
            disk.read_at(&mut [0; 512], 0).expect(&what);
        }
    }
}

#[test]
fn no_image_is_made_that_cannot_be() {
    let base = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    let old = CreateOptions {
        version: 2,
        ..base.clone()
    };
    let with_data = |options: &CreateOptions| CreateOptions {
        data_file: Some("data".into()),
        ..options.clone()
    };
    let cases = [
        (
            "field data_file_raw: value on, expected off with a backing file",
            CreateOptions {
                data_file_raw: true,
                backing_file: Some(b"base".to_vec()),
                ..with_data(&base)
            },
        ),
        (
            "field data_file_raw: value on, expected off without data_file",
            CreateOptions {
                data_file_raw: true,
                ..base.clone()
            },
        ),
        (
            "field cluster_size: value 8192, expected at least 16384",
            CreateOptions {
                extended_l2: true,
                cluster_size: 8192,
                ..base.clone()
            },
        ),
        (
            "field extended_l2: value on, expected off with version 2",
            CreateOptions {
                extended_l2: true,
                ..old.clone()
            },
        ),
        (
            "field data_file: value data, expected none with version 2",
            with_data(&old),
        ),
        (
            "field refcount_bits: value 1, expected 16 with version 2",
            CreateOptions {
                refcount_bits: 1,
                ..old.clone()
            },
        ),
        (
            "field refcount_bits: value 64, expected 16 with version 2",
            CreateOptions {
                refcount_bits: 64,
                ..old.clone()
            },
        ),
        (
            "field lazy_refcounts: value on, expected off with version 2",
            CreateOptions {
                lazy_refcounts: true,
                ..old.clone()
            },
        ),
        (
            "field compression_type: value zstd, expected zlib with version 2",
            CreateOptions {
                compression_type: CompressionType::Zstd,
                ..old
            },
        ),
    ];
    for (part, options) in cases {
        let dir = temp_dir();
        let (path, data) = (dir.path().join("a.qcow2"), dir.path().join("data"));
        let error = with_file(&path, OfflineOptions::create(), async |io, file| {
            if options.data_file.is_none() {
                return create(io, file, &options).await;
            }
            let data = open_beside(io, &data, OfflineOptions::create())?;
            block::formats::qcow2::create::create_with_data_file(io, file, data, &options).await
        })
        .unwrap_err();
        assert_names(&error, &path, &[part], part);
        assert_eq!(fs::metadata(&path).unwrap().len(), 0, "{part}");
    }
}

#[test]
fn no_image_becomes_one_that_cannot_be() {
    enum Change {
        Amend(AmendOptions),
        Downgrade,
    }
    let amended = |options: AmendOptions| Change::Amend(options);
    let cases: [(&str, Make, Change); 6] = [
        (
            "field lazy_refcounts: value on, expected off with version 2",
            |dir| plain(dir, "compat=0.10"),
            amended(AmendOptions {
                lazy_refcounts: Some(true),
                ..AmendOptions::default()
            }),
        ),
        (
            "field refcount_bits: value 8, expected 16 with version 2",
            |dir| plain(dir, "compat=0.10"),
            amended(AmendOptions {
                refcount_bits: Some(8),
                ..AmendOptions::default()
            }),
        ),
        (
            "field refcount_order: value 0, expected 4 for version 2",
            |dir| plain(dir, "refcount_bits=1"),
            Change::Downgrade,
        ),
        (
            "field incompatible_features: value 0x4, expected 0 for version 2",
            |dir| with_data_file(dir, ""),
            Change::Downgrade,
        ),
        (
            "field incompatible_features: value 0x10, expected 0 for version 2",
            |dir| plain(dir, "extended_l2=on"),
            Change::Downgrade,
        ),
        (
            "field incompatible_features: value 0x8, expected 0 for version 2",
            |dir| plain(dir, "compression_type=zstd"),
            Change::Downgrade,
        ),
    ];
    for (part, make, change) in cases {
        let dir = temp_dir();
        let path = dir.path().join("a.qcow2");
        make(&dir);
        let before = fs::read(&path).unwrap();
        let error = on(&path, async |io, file| match &change {
            Change::Amend(options) => amend(io, file, options, &mut |_, _| {}).await,
            Change::Downgrade => downgrade(io, file, &mut |_, _| {}).await,
        })
        .unwrap_err();
        assert_names(&error, &path, &[part], part);
        assert!(fs::read(&path).unwrap() == before, "{part}: written to");
    }
}
