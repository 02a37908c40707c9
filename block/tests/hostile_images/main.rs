//! Images that are wrong in every way: an error that names the file and the field, no panic, no
//! write, bounded memory.

#![allow(clippy::unwrap_used)]

mod chains;
mod flips;

use std::{
    fs,
    os::unix::fs::symlink,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use block::{
    Disk, DiskFile, Error, ErrorKind, FileGate, Format, OpenOptions,
    io::sim::{SimConfig, SimHost},
};

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

fn qemu(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn create(path: &Path, options: &str, size: &str) {
    let name = path.to_str().unwrap();
    let mut args = vec!["create", "-q", "-f", "qcow2"];
    if !options.is_empty() {
        args.extend(["-o", options]);
    }
    args.extend([name, size]);
    qemu("qemu-img", &args);
}

/// A valid image of 1 MiB with data, compressed data and a snapshot.
fn valid() -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    create(&path, "cluster_size=4k", "1M");
    qemu(
        "qemu-io",
        &[
            "-f",
            "qcow2",
            "-c",
            "write -P 1 0 256k",
            "-c",
            "write -c -P 2 512k 64k",
            "-c",
            "write -z 300k 40k",
            name,
        ],
    );
    qemu("qemu-img", &["snapshot", "-c", "one", name]);
    qemu(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 3 64k 64k", name],
    );
    fs::read(&path).unwrap()
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Opens bytes as an image; it must fail, say so clearly, and leave the file alone.
fn refused(bytes: &[u8], what: &str) -> Error {
    let dir = scratch();
    let path = dir.path().join("hostile.img");
    fs::write(&path, bytes).unwrap();
    let named = OpenOptions::new().format(Format::Qcow2);
    let mut last = None;
    for read_only in [false, true] {
        let opened = named.clone().read_only(read_only).open_disk(&path);
        let Err(error) = opened else {
            panic!("{what}: opens");
        };
        let text = error.to_string();
        assert!(text.contains("hostile.img"), "{what}: {text}");
        assert!(fs::read(&path).unwrap() == bytes, "{what}: written to");
        last = Some(error);
    }
    last.unwrap()
}

#[test]
fn a_header_cut_anywhere_is_refused_or_harmless() {
    let image = valid();
    for len in 0..200 {
        let dir = scratch();
        let path = dir.path().join("hostile.img");
        fs::write(&path, &image[..len]).unwrap();
        let opened = OpenOptions::new()
            .format(Format::Qcow2)
            .read_only(true)
            .open_disk(&path);
        match opened {
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("hostile.img"), "{len}: {text}");
            }
            Ok(disk) => {
                // The header is there, tables are not: nothing can be made up for data.
                assert!(len >= 104, "{len}");
                let mut bytes = vec![0xa5; 4096];
                if disk.read_at(&mut bytes, 0).is_ok() {
                    assert!(bytes.iter().all(|byte| *byte == 0), "{len}");
                }
            }
        }
        if len < 72 {
            let error = OpenOptions::new()
                .format(Format::Qcow2)
                .open_disk(&path)
                .unwrap_err_or_panic(len);
            assert_eq!(error.kind(), ErrorKind::InvalidImage, "{len}: {error}");
        }
        assert!(
            fs::read(&path).unwrap() == image[..len],
            "{len}: written to"
        );
    }
}

trait UnwrapErr {
    fn unwrap_err_or_panic(self, len: usize) -> Error;
}

impl UnwrapErr for Result<Disk, Error> {
    fn unwrap_err_or_panic(self, len: usize) -> Error {
        match self {
            Ok(_) => panic!("opens with {len} bytes"),
            Err(error) => error,
        }
    }
}

#[test]
fn every_header_field_is_checked() {
    let image = valid();
    let max32 = &[0xff; 4][..];
    let max64 = &[0xff; 8][..];
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"XFI\xfb", "not in qcow2 format"),
        (4, &[0, 0, 0, 1], "version"),
        (4, &[0, 0, 0, 4], "version"),
        (4, max32, "version"),
        (8, max64, "backing_file_offset"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 8], "backing_file_offset"),
        (20, &[0, 0, 0, 8], "cluster_bits"),
        (20, &[0, 0, 0, 22], "cluster_bits"),
        (20, &[0, 0, 0, 0], "cluster_bits"),
        (20, max32, "cluster_bits"),
        (24, max64, "size"),
        (
            24,
            &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            "size",
        ),
        (32, &[0, 0, 0, 1], "key-secret"),
        (32, &[0, 0, 0, 2], "crypt_method"),
        (32, &[0, 0, 0, 3], "crypt_method"),
        (32, max32, "crypt_method"),
        (36, max32, "l1_size"),
        (36, &[0, 0, 0, 0], "l1_size"),
        (36, &[0, 0x40, 0, 1], "l1_size"),
        (40, max64, "l1_table_offset"),
        (40, &[0; 8], "l1_table_offset"),
        (40, &[0, 0, 0, 0, 0, 0, 0x12, 0x34], "l1_table_offset"),
        (40, &[0x80, 0, 0, 0, 0, 0, 0, 0], "l1_table_offset"),
        (48, max64, "refcount_table_offset"),
        (48, &[0; 8], "refcount_table_offset"),
        (48, &[0, 0, 0, 0, 0, 0, 0, 1], "refcount_table_offset"),
        (56, max32, "refcount_table_clusters"),
        (56, &[0; 4], "refcount_table_clusters"),
        (60, max32, "nb_snapshots"),
        (60, &[0, 1, 0, 1], "nb_snapshots"),
        (64, max64, "snapshots_offset"),
        (64, &[0, 0, 0, 0, 0, 0, 0, 3], "snapshots_offset"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "feature"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "'data-file' is required"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "compression_type"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "cluster_bits"),
        (88, &[0, 0, 0, 0, 0, 0, 0, 1], "autoclear_features"),
        (96, &[0, 0, 0, 7], "refcount_order"),
        (96, max32, "refcount_order"),
        (100, &[0, 0, 0, 103], "header_length"),
        (100, &[0, 0, 0, 105], "header_length"),
        (100, &[0, 0, 0, 0], "header_length"),
        (100, max32, "header_length"),
        (104, &[1], "compression_type"),
        (104, &[0xff], "compression"),
        // The first extension: longer than the header area.
        (116, max32, "extension"),
    ];
    for (at, value, text) in cases {
        let mut bytes = image.clone();
        put(&mut bytes, *at, value);
        let what = format!("{value:x?} at {at}");
        let message = refused(&bytes, &what).to_string();
        assert!(
            message.to_lowercase().contains(&text.to_lowercase()),
            "{what}: {message:?} does not say {text:?}"
        );
    }
}

#[test]
fn features_that_are_not_there_are_named() {
    let dir = scratch();
    let path = dir.path().join("a.qcow2");
    // The copy that is opened lies in another folder than the data file.
    let data = dir.path().join("a.data");
    create(&path, &format!("data_file={}", data.display()), "1M");
    let message = refused(&fs::read(&path).unwrap(), "a data file").to_string();
    assert!(message.contains("outside the folders"), "{message}");
    let secret = "secret,id=s,data=x";
    for (format, text) in [("luks", "key-secret"), ("aes", "key-secret")] {
        let options = format!("encrypt.format={format},encrypt.key-secret=s");
        let name = path.to_str().unwrap();
        let status = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "--object", secret, "-o"])
            .args([&options, name, "1M"])
            .output()
            .unwrap()
            .status;
        if status.success() {
            let message = refused(&fs::read(&path).unwrap(), format).to_string();
            assert!(message.contains(text), "{format}: {message}");
        }
    }
    // A bit that nobody knows has the name that the image gives it.
    create(&path, "", "1M");
    let mut bytes = fs::read(&path).unwrap();
    put(&mut bytes, 72, &[0, 0x40, 0, 0, 0, 0, 0, 0]);
    let table = bytes
        .windows(4)
        .position(|window| window == [0x68, 0x03, 0xf8, 0x57])
        .unwrap();
    let mut entry = [0; 48];
    entry[1] = 54;
    put(&mut entry, 2, b"teleportation");
    put(&mut bytes, table + 8, &entry);
    let message = refused(&bytes, "an unknown feature").to_string();
    assert!(message.contains("teleportation"), "{message}");
}

/// What an image with broken tables may do: fail with an error.
fn exercise(disk: &Disk) -> Vec<Error> {
    let mut errors = Vec::new();
    let mut note = |result: Result<(), Error>| {
        if let Err(error) = result {
            errors.push(error);
        }
    };
    let size = disk.size().min(1 << 20);
    let mut bytes = vec![0; 65536];
    for at in (0..size).step_by(65536) {
        let len = (size - at).min(65536) as usize;
        note(disk.read_at(&mut bytes[..len], at));
    }
    for at in (0..size).step_by(150_000) {
        let len = (size - at).min(9000);
        note(disk.block_status(at, len).map(drop));
        note(disk.write_at(&bytes[..len as usize], at));
    }
    note(disk.discard(0, size));
    note(disk.flush());
    note(disk.write_zeroes(0, size, true));
    note(disk.write_compressed(&bytes[..4096], 0));
    if size > 100_000 {
        note(disk.write_at(&bytes[..5000], 70_000));
    }
    note(disk.resize(2 << 20));
    note(disk.flush());
    note(disk.close());
    errors
}

#[test]
fn tables_that_point_anywhere_give_errors() {
    let image = valid();
    let l1 = be64(&image, 40) as usize;
    let refcount_table = be64(&image, 48) as usize;
    let refcount_block = be64(&image, refcount_table) as usize;
    let mask = 0x00ff_ffff_ffff_fe00;
    let l2 = (be64(&image, l1) & mask) as usize;
    let copied = 1u64 << 63;
    let wild = [
        ("the header", 0),
        ("the L1 table", l1 as u64),
        ("an L2 table", l2 as u64),
        ("the refcount table", refcount_table as u64),
        ("a refcount block", refcount_block as u64),
        ("no cluster", 0x1200),
        ("beyond the end", 1 << 40),
        ("beyond everything", mask & !0xfff),
        ("reserved bits", 0x7f00_0000_0000_01fe),
    ];
    for (place, at) in [
        ("L1 entry", l1),
        ("L2 entry", l2),
        ("refcount table entry", refcount_table),
    ] {
        for (name, target) in wild {
            for flags in [0, copied] {
                let mut bytes = image.clone();
                put(&mut bytes, at, &(target | flags).to_be_bytes());
                let host = SimHost::new(SimConfig::seeded(1));
                host.create("a.qcow2", &bytes);
                let options = OpenOptions::new().format(Format::Qcow2);
                let disk = options.clone().read_only(true);
                if let Ok(disk) = disk.open_on("a.qcow2", Arc::new(host.clone())) {
                    let mut read = vec![0; 65536];
                    let _ = disk.read_at(&mut read, 0);
                    drop(disk);
                    let after = host.file("a.qcow2").unwrap().content();
                    assert!(after == bytes, "{place} to {name}: reading wrote");
                }
                if let Ok(disk) = options.open_on("a.qcow2", Arc::new(host.clone())) {
                    exercise(&disk);
                    drop(disk);
                    // The file may be very long now.
                    let magic = host.file("a.qcow2").unwrap().content_at(0, 4);
                    assert_eq!(magic, b"QFI\xfb", "{place} to {name}: no header left");
                }
            }
        }
    }
    // Not on a cluster boundary: said so.
    for (at, text) in [(l1, "L1 entry 0"), (l2, "L2 entry of guest cluster 0")] {
        let mut bytes = image.clone();
        put(&mut bytes, at, &(copied | 0x1200).to_be_bytes());
        let host = SimHost::new(SimConfig::seeded(1));
        host.create("a.qcow2", &bytes);
        let disk = OpenOptions::new()
            .open_on("a.qcow2", Arc::new(host.clone()))
            .unwrap();
        let error = disk.read_at(&mut [0; 512], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        let message = error.to_string();
        assert!(message.contains(text), "{message}");
        assert!(message.contains("a.qcow2"), "{message}");
        assert!(message.contains("cluster boundary"), "{message}");
    }
}

#[test]
fn compressed_data_that_inflates_wrongly_is_an_error() {
    let image = valid();
    let mask = 0x00ff_ffff_ffff_fe00;
    let l2 = (be64(&image, be64(&image, 40) as usize) & mask) as usize;
    let at = l2 + 128 * 8;
    let entry = be64(&image, at);
    assert!(entry & 1 << 62 != 0, "compressed");
    // Cluster bits 12: 4 bits of sectors above 58 bits of offset.
    let offset = (entry & ((1 << 58) - 1)) as usize;
    let read = |bytes: &[u8]| {
        let host = SimHost::new(SimConfig::seeded(1));
        host.create("a.qcow2", bytes);
        let disk = OpenOptions::new()
            .open_on("a.qcow2", Arc::new(host.clone()))
            .unwrap();
        let mut found = vec![0; 4096];
        let result = disk.read_at(&mut found, 128 * 4096);
        (result, found)
    };
    assert!(read(&image).0.is_ok());
    // Garbage; nothing; a stored block that never ends; ends too early.
    let mut endless = vec![0u8; 64];
    endless[..5].copy_from_slice(&[0, 0xff, 0xff, 0, 0]);
    for (name, data) in [
        ("garbage", vec![0xa5; 64]),
        ("nothing", vec![0; 64]),
        ("endless", endless),
        ("short", vec![3, 0]),
    ] {
        let mut bytes = image.clone();
        put(&mut bytes, offset, &data);
        let (result, _) = read(&bytes);
        let error = result.expect_err(name);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{name}: {error}");
        assert!(error.to_string().contains("a.qcow2"), "{name}: {error}");
    }
    for target in [0, 1 << 57, (1 << 58) - 1, image.len() as u64 - 1] {
        let mut bytes = image.clone();
        put(&mut bytes, at, &(0xf << 58 | target).to_be_bytes());
        put(&mut bytes, at, &[0x7f]);
        let _ = read(&bytes);
    }
}

#[test]
fn a_snapshot_table_of_garbage_does_not_hurt_the_disk() {
    let image = valid();
    let at = be64(&image, 64) as usize;
    for garbage in [vec![0xff; 200], vec![0; 200]] {
        let mut bytes = image.clone();
        put(&mut bytes, at, &garbage);
        let host = SimHost::new(SimConfig::seeded(1));
        host.create("a.qcow2", &bytes);
        let options = OpenOptions::new();
        match options.open_on("a.qcow2", Arc::new(host.clone())) {
            Ok(disk) => {
                let mut read = vec![0; 4096];
                disk.read_at(&mut read, 0).unwrap();
                assert_eq!(read, vec![1; 4096]);
                disk.write_at(&read, 0).unwrap();
                disk.close().unwrap();
            }
            Err(error) => assert!(error.to_string().contains("napshot"), "{error}"),
        }
    }
}

/// Found by the fuzz target `qcow2_image`: writing listed every cluster of such tables.
#[test]
fn a_snapshot_with_an_absurd_l1_table_costs_no_memory() {
    let image = valid();
    let table = be64(&image, 64) as usize;
    // Too large to be one: writing goes on, the snapshot does not open.
    let mut absurd = image.clone();
    put(&mut absurd, table + 8, &u32::MAX.to_be_bytes());
    let dir = scratch();
    let path = dir.path().join("hostile.img");
    fs::write(&path, &absurd).unwrap();
    let named = OpenOptions::new().format(Format::Qcow2);
    let disk = named.clone().open_disk(&path).unwrap();
    disk.write_at(&[7; 4096], 0).unwrap();
    disk.close().unwrap();
    let opened = named.read_only(true).snapshot("one").open_disk(&path);
    let text = opened.err().unwrap().to_string();
    assert!(text.contains("hostile.img"), "{text}");
}
