//! Disks on block devices: loop devices, which need root.
#![allow(clippy::unwrap_used)] // A test ends where something unexpected happens.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use block::{
    Disk, DiskFile, ErrorKind, Format, OpenOptions,
    formats::qcow2::create::{CreateOptions, create},
    io::EngineKind,
    offline::{OfflineOptions, with_file},
};
use tempfile::NamedTempFile;

const SIZE: u64 = 16 << 20;

/// A loop device over a temporary file; gone when dropped.
struct Loop {
    device: PathBuf,
    file: NamedTempFile,
}

impl Loop {
    fn new(size: u64, sector: u32) -> Self {
        let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        file.as_file().set_len(size).unwrap();
        let made = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file.path())
            .output()
            .expect("losetup runs");
        let complaint = String::from_utf8_lossy(&made.stderr);
        assert!(
            made.status.success(),
            "losetup (it needs root): {complaint}"
        );
        let device = String::from_utf8(made.stdout).unwrap();
        Self {
            device: PathBuf::from(device.trim()),
            file,
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.device).status();
    }
}

/// Every way to drive a device here.
fn ways() -> impl Iterator<Item = (EngineKind, bool)> {
    EngineKind::ALL
        .into_iter()
        .flat_map(|engine| [(engine, false), (engine, true)])
        .filter(|way| *way != (EngineKind::LinuxAio, false))
}

fn open(path: &Path, format: Format, (engine, direct): (EngineKind, bool)) -> Disk {
    OpenOptions::new()
        .format(format)
        .engine(engine)
        .direct(direct)
        .open_disk(path)
        .unwrap_or_else(|error| panic!("{} direct {direct}: {error}", engine.name()))
}

fn pattern(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|at| (at / 512) as u8 ^ (at as u8) ^ seed)
        .collect()
}

#[test]
fn raw_reads_writes_zeroes_and_discards_on_a_device() {
    for sector in [512, 4096] {
        let device = Loop::new(SIZE, sector);
        for (way, seed) in ways().zip(1..) {
            let disk = open(&device.device, Format::Raw, way);
            assert_eq!(disk.size(), SIZE);
            assert_eq!(disk.topology().physical_block_size, sector);
            // Neither ends where a sector does.
            let data = pattern(seed, 300_001);
            disk.write_at(&data, 12_345).unwrap();
            disk.flush().unwrap();
            let mut got = vec![0; data.len()];
            disk.read_at(&mut got, 12_345).unwrap();
            assert!(got == data, "{way:?} {sector}");
            disk.write_zeroes(65_536, 65_536, false).unwrap();
            disk.write_zeroes(1_000, 5_000, true).unwrap();
            disk.discard(131_072, 65_536).unwrap();
            disk.read_at(&mut got, 12_345).unwrap();
            let mut expected = data.clone();
            expected[65_536 - 12_345..196_608 - 12_345].fill(0);
            assert!(got == expected, "{way:?} {sector}");
            let end = disk.read_at(&mut got, SIZE - 5).unwrap_err();
            assert_eq!(end.kind(), ErrorKind::OutOfRange);
            assert!(disk.resize(SIZE * 2).is_err(), "a device has its size");
            disk.close().unwrap();
        }
    }
}

#[test]
fn what_is_discarded_leaves_the_file_below() {
    use std::os::unix::fs::MetadataExt;
    let device = Loop::new(SIZE, 512);
    let disk = open(&device.device, Format::Raw, (EngineKind::IoUring, true));
    disk.write_at(&pattern(7, 4 << 20), 0).unwrap();
    disk.flush().unwrap();
    let blocks = |device: &Loop| device.file.as_file().metadata().unwrap().blocks();
    let before = blocks(&device);
    assert!(before >= (4 << 20) / 512);
    disk.discard(0, 4 << 20).unwrap();
    disk.flush().unwrap();
    assert!(
        blocks(&device) < before / 2,
        "{} of {before}",
        blocks(&device)
    );
}

#[test]
fn qcow2_fills_a_device_and_says_when_it_is_full() {
    let device = Loop::new(SIZE, 512);
    let image = CreateOptions {
        size: 4 * SIZE,
        ..CreateOptions::default()
    };
    for way in ways() {
        let options = OfflineOptions::create();
        with_file(&device.device, options, async |io, file| {
            create(io, file, &image).await
        })
        .unwrap();
        let disk = open(&device.device, Format::Qcow2, way);
        assert_eq!(disk.size(), 4 * SIZE);
        let data = pattern(9, 1 << 20);
        let mut written = 0;
        let error = loop {
            match disk.write_at(&data, written) {
                Ok(()) => written += data.len() as u64,
                Err(error) => break error,
            }
            assert!(written < SIZE, "{way:?}: more than there is");
        };
        assert_eq!(error.kind(), ErrorKind::NoSpace, "{way:?}: {error}");
        assert!(written >= SIZE - (3 << 20), "{way:?}: {written}");
        disk.flush().unwrap();
        disk.close().unwrap();
        let disk = open(&device.device, Format::Qcow2, way);
        let mut got = vec![0; data.len()];
        for offset in (0..written).step_by(data.len()) {
            disk.read_at(&mut got, offset).unwrap();
            assert!(got == data, "{way:?} at {offset}");
        }
        disk.close().unwrap();
    }
}
