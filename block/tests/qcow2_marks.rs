//! The dirty bit of lazy reference counts, the corrupt bit, and the metadata overlap check.

#![allow(clippy::unwrap_used)] // A test ends where something unexpected happens.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use block::{Disk, DiskFile, ErrorKind, OpenOptions};
use tempfile::TempDir;

const CLUSTER: usize = 65536;
/// Where QEMU puts things in an image that is new.
const REFCOUNT_BLOCK: usize = 0x20000;
const L2_TABLE: usize = 0x40000;
const DIRTY: u64 = 1;
const CORRUPT: u64 = 2;

fn qemu(program: &str, args: &[&str]) -> bool {
    Command::new(program)
        .args(args)
        .output()
        .unwrap()
        .status
        .success()
}

/// An image with data in its first cluster.
fn image(dir: &TempDir, options: &str) -> PathBuf {
    let path = dir.path().join("marks.qcow2");
    let name = path.to_str().unwrap();
    assert!(qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, name, "64M"]
    ));
    let write = ["-f", "qcow2", "-c", "write -q -P 7 0 64k", name];
    assert!(qemu("qemu-io", &write));
    path
}

fn dir() -> TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn features(path: &Path) -> u64 {
    let bytes = fs::read(path).unwrap();
    u64::from_be_bytes(bytes[72..80].try_into().unwrap())
}

fn is_clean(path: &Path) -> bool {
    qemu(
        "qemu-img",
        &["check", "-q", "-f", "qcow2", path.to_str().unwrap()],
    )
}

fn change(path: &Path, at: usize, value: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at..at + value.len()].copy_from_slice(value);
    fs::write(path, bytes).unwrap();
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().open_disk(path).unwrap()
}

#[test]
fn lazy_counts_are_written_when_the_image_is_closed() {
    let dir = dir();
    let path = image(&dir, "lazy_refcounts=on");
    let disk = open(&path);
    let before = fs::read(&path).unwrap();
    disk.write_at(&[3; CLUSTER], 0).unwrap();
    assert_eq!(features(&path), 0, "a write in place allocates nothing");
    disk.write_at(&[9; CLUSTER], 1 << 20).unwrap();
    assert_eq!(features(&path), DIRTY);
    disk.flush().unwrap();
    let crashed = dir.path().join("crashed.qcow2");
    fs::copy(&path, &crashed).unwrap();
    let after = fs::read(&crashed).unwrap();
    let counts = REFCOUNT_BLOCK..REFCOUNT_BLOCK + CLUSTER;
    assert!(
        before[counts.clone()] == after[counts],
        "no count was written"
    );
    assert!(!is_clean(&crashed));
    disk.close().unwrap();
    assert_eq!(features(&path), 0);
    assert!(is_clean(&path));

    // The crash: what was flushed is there, and the next open for writing counts again.
    let disk = open(&crashed);
    let mut bytes = [0; 512];
    disk.read_at(&mut bytes, 1 << 20).unwrap();
    assert_eq!(bytes, [9; 512]);
    disk.close().unwrap();
    assert_eq!(features(&crashed), 0);
    assert!(is_clean(&crashed));
}

#[test]
fn the_option_overrides_the_image() {
    let dir = dir();
    for (in_image, asked) in [("on", false), ("off", true)] {
        let path = image(&dir, &format!("lazy_refcounts={in_image}"));
        let options = OpenOptions::new().lazy_refcounts(asked);
        let disk = options.open_disk(&path).unwrap();
        disk.write_at(&[9; CLUSTER], 1 << 20).unwrap();
        assert_eq!(features(&path), u64::from(asked));
        disk.close().unwrap();
        assert_eq!(features(&path), 0);
        assert!(is_clean(&path));
    }
}

/// A write of `len` bytes at `at` meets what is wrong, says so, marks the image and changes nothing.
fn refuses(path: &Path, at: u64, expected: &str) {
    let before = fs::read(path).unwrap();
    let disk = open(path);
    let error = disk.write_at(&[1; 512], at).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert!(error.to_string().contains(expected), "{error}");
    assert_eq!(features(path), CORRUPT);
    assert!(disk.write_at(&[1; 512], 32 << 20).is_err());
    drop(disk);
    let mut after = fs::read(path).unwrap();
    after.truncate(before.len());
    after[72..80].copy_from_slice(&before[72..80]);
    // A count that was too low is not any more.
    let counts = REFCOUNT_BLOCK..REFCOUNT_BLOCK + 16;
    after[counts.clone()].copy_from_slice(&before[counts]);
    assert!(before == after, "{expected}: something was written");
    let error = OpenOptions::new().open_disk(path).err().unwrap();
    assert!(error.to_string().contains("Image is corrupt"), "{error}");
    OpenOptions::new().read_only(true).open_disk(path).unwrap();
}

#[test]
fn data_over_metadata_is_refused() {
    let copied = 1u64 << 63;
    for (host, name) in [
        (REFCOUNT_BLOCK as u64, "overlaps with refcount block"),
        (0x10000, "overlaps with refcount table"),
        (0x30000, "overlaps with active L1 table"),
        (L2_TABLE as u64, "overlaps with active L2 table"),
    ] {
        let dir = dir();
        let path = image(&dir, "refcount_bits=16");
        change(&path, L2_TABLE, &(copied | host).to_be_bytes());
        refuses(&path, 0, name);
    }
}

#[test]
fn tables_that_are_counted_as_free_are_not_given_away() {
    let dir = dir();
    let path = image(&dir, "refcount_bits=16");
    change(&path, REFCOUNT_BLOCK + 4 * 2, &[0, 0]);
    refuses(&path, 1 << 20, "overlaps with active L2 table");
}

#[test]
fn offsets_inside_clusters_mark_the_image() {
    let dir = dir();
    let path = image(&dir, "refcount_bits=16");
    let entry = (1u64 << 63) | 0x52a00;
    change(&path, L2_TABLE, &entry.to_be_bytes());
    // Reading alone changes nothing.
    let before = fs::read(&path).unwrap();
    let disk = OpenOptions::new().read_only(true).open_disk(&path).unwrap();
    let expected = "Cluster allocation offset 0x52a00 unaligned (L2 offset: 0x40000, L2 index: 0)";
    let error = disk.read_at(&mut [0; 512], 0).unwrap_err();
    assert!(error.to_string().contains(expected), "{error}");
    drop(disk);
    assert!(fs::read(&path).unwrap() == before);
    refuses(&path, 0, expected);
}

#[test]
fn discards_without_unref_keep_clusters_and_need_version_3() {
    let dir = dir();
    let path = image(&dir, "compat=0.10");
    let options = OpenOptions::new().discard_no_unref(true);
    let before = fs::read(&path).unwrap();
    let error = options.clone().open(&path).map(drop).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    assert!(error.to_string().contains("version 3"), "{error}");
    assert!(fs::read(&path).unwrap() == before, "refusing wrote");

    let path = image(&dir, "compat=1.1");
    let entry = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        u64::from_be_bytes(bytes[L2_TABLE..L2_TABLE + 8].try_into().unwrap())
    };
    let before = entry(&path);
    let disk = options.open(&path).unwrap();
    disk.discard(0, CLUSTER as u64).unwrap();
    disk.flush().unwrap();
    let mut got = vec![1; CLUSTER];
    disk.read_at(&mut got, 0).unwrap();
    assert!(got.iter().all(|byte| *byte == 0));
    disk.close().unwrap();
    // The zero flag, and the same cluster.
    assert_eq!(entry(&path), before | 1);
    assert!(is_clean(&path));
}
