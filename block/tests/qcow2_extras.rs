//! Snapshots and VM state of an opened disk, in turns with QEMU.
#![allow(clippy::unwrap_used, reason = "tests")]

mod qcow2_support;

use std::path::Path;

use block::{
    AsyncDiskFile, Disk, DiskExtras, DiskFile, ErrorKind, NewSnapshot, OpenOptions,
    io::{AlignedBuf, Buffers, EngineKind, Request, RequestOp},
};
use qcow2_support::{Random, assert_clean, header, qemu_create, qemu_io, temp_dir, tool};

fn open(path: &Path) -> Disk {
    OpenOptions::new()
        .engine(EngineKind::Sync)
        .open_disk(path)
        .unwrap()
}

fn snapshot(disk: &Disk, name: &str) -> String {
    let new = NewSnapshot {
        name: name.into(),
        date_sec: 1_700_000_000,
        ..NewSnapshot::default()
    };
    disk.create_snapshot(&new).unwrap()
}

fn check_read(disk: &Disk, at: u64, len: usize, value: u8) {
    let mut buf = vec![!value; len];
    disk.read_at(&mut buf, at).unwrap();
    assert!(buf.iter().all(|byte| *byte == value), "{value} at {at}");
}

#[test]
fn snapshots_of_an_open_disk() {
    let dir = temp_dir();
    for options in [
        "cluster_size=64k",
        "cluster_size=512",
        "cluster_size=4k,refcount_bits=64",
        "cluster_size=2M",
        "compat=0.10,cluster_size=4k",
    ] {
        let path = qemu_create(&dir, "a.qcow2", options, "8M");
        let disk = open(&path);
        // A queue whose cache knows the tables from before.
        let mut queue = disk.create_async_io(4).unwrap();
        let mut write = |at: u64, len: usize, value: u8| {
            let mut buf = AlignedBuf::zeroed(len);
            buf.fill(value);
            let op = RequestOp::Write {
                offset: at,
                buffers: Buffers::owned(buf),
                fua: false,
            };
            queue.submit(&mut vec![Request { id: 1, op }]);
            let mut done = Vec::new();
            while queue.reap(&mut done) == 0 {}
            assert!(done[0].result.is_ok());
        };
        write(0, 1 << 20, 1);
        assert_eq!(snapshot(&disk, "one"), "1");
        write(512 << 10, 1 << 20, 2);
        assert_eq!(snapshot(&disk, "two"), "2");
        write(0, 8 << 20, 3);
        assert_eq!(disk.snapshots().len(), 2);
        disk.apply_snapshot("one").unwrap();
        check_read(&disk, 0, 1 << 20, 1);
        check_read(&disk, 1 << 20, 7 << 20, 0);
        write(0, 4096, 4);
        check_read(&disk, 0, 4096, 4);
        check_read(&disk, 4096, 4096, 1);
        disk.apply_snapshot("2").unwrap();
        check_read(&disk, 0, 512 << 10, 1);
        check_read(&disk, 512 << 10, 1 << 20, 2);
        disk.delete_snapshot("one").unwrap();
        let missing = disk.apply_snapshot("one").unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
        write(512 << 10, 4096, 5);
        disk.flush().unwrap();
        drop(queue);
        disk.close().unwrap();
        assert_clean(&path, options);
        qemu_io(&path, &["read -P 1 0 512k", "read -P 5 512k 4k"]);
        let at = OpenOptions::new()
            .read_only(true)
            .snapshot("two")
            .open_disk(&path)
            .unwrap();
        check_read(&at, 512 << 10, 1 << 20, 2);
        at.close().unwrap();
        let disk = open(&path);
        disk.delete_snapshot("two").unwrap();
        check_read(&disk, 512 << 10, 4096, 5);
        disk.close().unwrap();
        assert_clean(&path, options);
    }
}

#[test]
fn random_operations_between_snapshots() {
    let dir = temp_dir();
    let mut random = Random(815);
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "compat=0.10,cluster_size=1k",
    ] {
        let size = 1usize << 20;
        let path = qemu_create(&dir, "a.qcow2", options, "1M");
        let mut model = vec![0u8; size];
        let mut kept: Vec<(String, Vec<u8>)> = Vec::new();
        let mut disk = open(&path);
        for round in 0..150u64 {
            let at = random.below(size as u64) as usize;
            let len = (random.below(60_000) as usize + 1).min(size - at);
            match random.below(12) {
                0..6 => {
                    let value = round as u8;
                    disk.write_at(&vec![value; len], at as u64).unwrap();
                    model[at..at + len].fill(value);
                }
                6 => {
                    disk.write_zeroes(at as u64, len as u64, true).unwrap();
                    model[at..at + len].fill(0);
                }
                7 => {
                    let name = format!("s{round}");
                    snapshot(&disk, &name);
                    kept.push((name, model.clone()));
                }
                8 if !kept.is_empty() => {
                    let (name, content) = &kept[random.below(kept.len() as u64) as usize];
                    disk.apply_snapshot(name).unwrap();
                    model.clone_from(content);
                }
                9 if !kept.is_empty() => {
                    let (name, _) = kept.remove(random.below(kept.len() as u64) as usize);
                    disk.delete_snapshot(&name).unwrap();
                }
                10 => {
                    disk.close().unwrap();
                    assert_clean(&path, options);
                    disk = open(&path);
                }
                _ => {
                    let mut buf = vec![0; size];
                    disk.read_at(&mut buf, 0).unwrap();
                    assert!(buf == model, "{options} round {round}");
                }
            }
        }
        disk.close().unwrap();
        assert_clean(&path, options);
        for (name, content) in kept {
            let disk = OpenOptions::new()
                .read_only(true)
                .snapshot(&name)
                .open_disk(&path)
                .unwrap();
            let mut buf = vec![0; size];
            disk.read_at(&mut buf, 0).unwrap();
            assert!(buf == content, "{options} {name}");
        }
    }
}

#[test]
fn vm_state_lives_behind_the_disk() {
    let dir = temp_dir();
    let base = qemu_create(&dir, "base.qcow2", "", "64M");
    qemu_io(&base, &["write -P 9 0 64M"]);
    for options in ["cluster_size=512", "cluster_size=64k", "compat=0.10"] {
        let over = format!("{options},backing_file=base.qcow2,backing_fmt=qcow2");
        let path = qemu_create(&dir, "a.qcow2", &over, "4M");
        let disk = open(&path);
        let mut buf = [1; 1000];
        disk.read_vm_state(&mut buf, 0).unwrap();
        assert_eq!(buf, [0; 1000], "nothing, and nothing of the backing file");
        disk.write_vm_state(&[5; 100_000], 777).unwrap();
        let new = NewSnapshot {
            name: "vm".into(),
            vm_state_size: 100_777,
            vm_clock_nsec: 12,
            icount: Some(44),
            ..NewSnapshot::default()
        };
        disk.create_snapshot(&new).unwrap();
        let info = disk.snapshots().remove(0);
        assert_eq!((info.vm_state_size, info.icount), (100_777, Some(44)));
        // Only the snapshot has it now.
        disk.read_vm_state(&mut buf, 777).unwrap();
        assert_eq!(buf, [0; 1000]);
        disk.write_vm_state(&[6; 512], 1 << 20).unwrap();
        disk.close().unwrap();
        assert_clean(&path, options);
        qemu_io(&path, &["read -b -P 6 1M 512", "write -b -P 7 512 1024"]);
        let disk = open(&path);
        let mut buf = [0; 1024];
        disk.read_vm_state(&mut buf, 512).unwrap();
        assert_eq!(buf, [7; 1024]);
        if header(&path).version == 3 {
            // A larger disk does not show it.
            disk.resize(20 << 20).unwrap();
            let mut all = vec![0; 16 << 20];
            disk.read_at(&mut all, 4 << 20).unwrap();
            assert!(all.iter().all(|byte| *byte == 0));
        }
        disk.apply_snapshot("vm").unwrap();
        assert_eq!(disk.size(), 4 << 20);
        let mut buf = vec![0; 100_777];
        disk.read_vm_state(&mut buf, 0).unwrap();
        assert!(buf[..777].iter().all(|byte| *byte == 0));
        assert!(buf[777..].iter().all(|byte| *byte == 5));
        check_read(&disk, 0, 4 << 20, 9);
        assert!(disk.read_vm_state(&mut buf, u64::MAX - 5).is_err());
        disk.close().unwrap();
        assert_clean(&path, options);
        let listed = tool("qemu-img", &["snapshot", "-l", path.to_str().unwrap()]);
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        assert!(listed.contains("44"), "{listed}");
    }
}

#[test]
fn what_snapshots_cannot_be_taken_of() {
    let dir = temp_dir();
    let path = qemu_create(&dir, "a.qcow2", "refcount_bits=1", "4M");
    let disk = open(&path);
    let new = NewSnapshot::default();
    let error = disk.create_snapshot(&new).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    disk.close().unwrap();
    let path = qemu_create(&dir, "v2.qcow2", "compat=0.10", "4M");
    let disk = open(&path);
    snapshot(&disk, "s");
    assert_eq!(
        disk.resize(8 << 20).unwrap_err().kind(),
        ErrorKind::Unsupported
    );
    disk.close().unwrap();
    let disk = OpenOptions::new().read_only(true).open_disk(&path).unwrap();
    assert_eq!(
        disk.create_snapshot(&new).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
    assert_eq!(
        disk.write_vm_state(&[1], 0).unwrap_err().kind(),
        ErrorKind::ReadOnly
    );
}

#[test]
fn the_reference_count_table_may_move_with_the_l1_table() {
    let dir = temp_dir();
    // A table of one cluster, which the new L1 table outgrows.
    let options = "cluster_size=512,refcount_bits=64";
    let path = qemu_create(&dir, "a.qcow2", options, "1M");
    let disk = open(&path);
    disk.write_at(&[1; 1 << 16], 0).unwrap();
    disk.resize(8 << 30).unwrap();
    disk.close().unwrap();
    assert_clean(&path, "resized");
    qemu_io(&path, &["read -P 1 0 64k"]);
    let path = qemu_create(&dir, "b.qcow2", options, "1M");
    let disk = open(&path);
    disk.write_vm_state(&[2; 512], 8 << 30).unwrap();
    disk.close().unwrap();
    assert_clean(&path, "VM state far behind");
    qemu_io(&path, &["read -b -P 2 8G 512"]);
}
