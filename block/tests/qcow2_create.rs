//! New qcow2 images satisfy QEMU's checker.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use block::formats::qcow2::{
    create::{CreateOptions, Preallocation, create},
    header::CompressionType,
};
use qcow2_support::{assert_clean, on, qemu_io, temp_dir, tool};

#[test]
fn created_images_satisfy_qemu() {
    let dir = temp_dir();
    let path = dir.path().join("new.qcow2");
    let mut count = 0;
    for cluster_bits in 9..=21 {
        for refcount_order in 0..=6 {
            let options = CreateOptions {
                size: 5 << 20 | 512,
                cluster_size: 1 << cluster_bits,
                refcount_bits: 1 << refcount_order,
                ..CreateOptions::default()
            };
            make(&path, &options);
            let what = format!("{options:?}");
            assert_clean(&path, &what);
            if cluster_bits % 4 == 0 || refcount_order % 6 == 0 {
                qemu_io(&path, &["write -P 7 0 1M", "read -P 7 0 1M"]);
                assert_clean(&path, &what);
                count += 1;
            }
        }
    }
    assert!(count > 26);
}

#[test]
fn created_images_with_everything_else() {
    let dir = temp_dir();
    let path = dir.path().join("new.qcow2");
    let base = dir.path().join("base.raw");
    std::fs::write(&base, vec![9; 1 << 20]).unwrap();
    for (version, compression_type, lazy_refcounts) in [
        (2, CompressionType::Zlib, false),
        (3, CompressionType::Zstd, false),
        (3, CompressionType::Zlib, true),
    ] {
        let options = CreateOptions {
            size: 3 << 20,
            version,
            compression_type,
            lazy_refcounts,
            backing_file: Some(b"base.raw".to_vec()),
            backing_format: Some("raw".into()),
            ..CreateOptions::default()
        };
        make(&path, &options);
        assert_clean(&path, "backing");
        qemu_io(
            &path,
            &["read -P 9 0 1M", "read -P 0 1M 2M", "write -c -P 3 64k 64k"],
        );
        assert_clean(&path, "backing, written");
    }
    for preallocation in [
        Preallocation::Metadata,
        Preallocation::Falloc,
        Preallocation::Full,
    ] {
        for (cluster_size, refcount_bits) in
            [(512, 64), (512, 1), (4096, 2), (65536, 16), (2 << 20, 64)]
        {
            let options = CreateOptions {
                size: (9 << 20) + 512,
                cluster_size,
                refcount_bits,
                preallocation,
                ..CreateOptions::default()
            };
            make(&path, &options);
            assert_clean(&path, "preallocated");
            let (_, json) = qcow2_support::qemu_check(&path);
            assert_eq!(json["total-clusters"], json["allocated-clusters"], "{json}");
            qemu_io(&path, &["read -P 0 0 9M"]);
            let used = tool("du", &["-k", path.to_str().unwrap()]).stdout;
            let used: u64 = String::from_utf8_lossy(&used)
                .split_whitespace()
                .next()
                .unwrap()
                .parse()
                .unwrap();
            assert_eq!(
                used >= 9 << 10,
                preallocation != Preallocation::Metadata,
                "{used}"
            );
        }
    }
    for size in [0, 1, 1 << 40, 64 << 40] {
        make(
            &path,
            &CreateOptions {
                size,
                ..CreateOptions::default()
            },
        );
        assert_clean(&path, "sizes");
    }
}

#[test]
fn creating_over_old_bytes_leaves_none_of_them() {
    // As on a block device: the file is there, its content is garbage and its length stays.
    let dir = temp_dir();
    let path = dir.path().join("old");
    for preallocation in [Preallocation::Off, Preallocation::Metadata] {
        std::fs::write(&path, vec![0xa5; 16 << 20]).unwrap();
        let options = CreateOptions {
            size: 8 << 20,
            preallocation,
            ..CreateOptions::default()
        };
        on(&path, async |io, file| create(io, file, &options).await).unwrap();
        assert_clean(&path, "garbage");
        qemu_io(&path, &["read -P 0 0 8M"]);
        assert_eq!(path.metadata().unwrap().len(), 16 << 20);
    }
}

fn make(path: &std::path::Path, options: &CreateOptions) {
    let _ = std::fs::remove_file(path);
    on(path, async |io, file| create(io, file, options).await).unwrap();
}

#[test]
fn impossible_options_are_refused() {
    let dir = temp_dir();
    let path = dir.path().join("none");
    let base = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    let cases = [
        (
            "at least 16384 bytes",
            CreateOptions {
                extended_l2: true,
                cluster_size: 8192,
                ..base.clone()
            },
        ),
        (
            "Extended L2 entries are only supported with compatibility level 1.1",
            CreateOptions {
                extended_l2: true,
                version: 2,
                ..base.clone()
            },
        ),
        (
            "expected the file to be given",
            CreateOptions {
                data_file: Some("x".into()),
                ..base.clone()
            },
        ),
        (
            "data-file-raw requires data-file",
            CreateOptions {
                data_file_raw: true,
                ..base.clone()
            },
        ),
        (
            "compatibility level",
            CreateOptions {
                version: 4,
                ..base.clone()
            },
        ),
        (
            "Cluster size must be",
            CreateOptions {
                cluster_size: 500,
                ..base.clone()
            },
        ),
        (
            "Cluster size must be",
            CreateOptions {
                cluster_size: 4 << 20,
                ..base.clone()
            },
        ),
        (
            "Refcount width must be",
            CreateOptions {
                refcount_bits: 3,
                ..base.clone()
            },
        ),
        (
            "Refcount width must be",
            CreateOptions {
                refcount_bits: 128,
                ..base.clone()
            },
        ),
        (
            "16 bits require",
            CreateOptions {
                version: 2,
                refcount_bits: 8,
                ..base.clone()
            },
        ),
        (
            "Lazy refcounts only",
            CreateOptions {
                version: 2,
                lazy_refcounts: true,
                ..base.clone()
            },
        ),
        (
            "too large",
            CreateOptions {
                size: 1 << 40,
                cluster_size: 512,
                ..base.clone()
            },
        ),
        (
            "too large",
            CreateOptions {
                size: u64::MAX,
                ..base.clone()
            },
        ),
        (
            "too large",
            CreateOptions {
                size: 1 << 62,
                cluster_size: 2 << 20,
                ..base.clone()
            },
        ),
        (
            "name too long",
            CreateOptions {
                backing_file: Some(vec![b'x'; 1024]),
                ..base.clone()
            },
        ),
        (
            "do not fit",
            CreateOptions {
                backing_file: Some(vec![b'x'; 1023]),
                cluster_size: 512,
                ..base.clone()
            },
        ),
        (
            "at the same time",
            CreateOptions {
                backing_file: Some(b"x".to_vec()),
                preallocation: Preallocation::Full,
                ..base
            },
        ),
    ];
    for (expected, options) in cases {
        let error = on(&path, async |io, file| create(io, file, &options).await).unwrap_err();
        assert!(
            error.to_string().contains(expected),
            "{error}, expected {expected}"
        );
        assert_eq!(path.metadata().unwrap().len(), 0, "{expected}");
    }
}
