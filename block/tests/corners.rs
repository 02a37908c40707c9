//! The corners of the qcow2 data path and of the protocol between queues, each forced by a test.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    process::Command,
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use block::{
    AsyncDiskFile, CacheMode, Disk, DiskFile, ErrorKind, Format, OpenOptions,
    formats::qcow2::{
        check::{CheckReport, Repair, check},
        create::{CreateOptions, Preallocation, create},
        header::Header,
    },
    io::{
        AlignedBuf, AsyncIo, Buffers, Host, Request, RequestOp,
        sim::{SimConfig, SimHost, SimOp},
    },
    offline::{OfflineOptions, with_file_on},
};

const IMAGE: &str = "disk.qcow2";

/// Runs a test that may hang.
fn within<T: Send + 'static>(seconds: u64, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let worker = thread::spawn(move || {
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(Duration::from_secs(seconds)) {
        Ok(value) => value,
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("hangs"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(worker.join().unwrap_err())
        }
    }
}

fn host() -> SimHost {
    SimHost::new(SimConfig::seeded(1))
}

fn make(host: &SimHost, options: &CreateOptions) {
    let host: Arc<dyn Host> = Arc::new(host.clone());
    with_file_on(
        host,
        Path::new(IMAGE),
        OfflineOptions::create(),
        async |io, file| create(io, file, options).await,
    )
    .unwrap();
}

fn small_clusters(size: u64, refcount_bits: u32) -> CreateOptions {
    CreateOptions {
        size,
        cluster_size: 512,
        refcount_bits,
        ..CreateOptions::default()
    }
}

fn open(host: &SimHost) -> Disk {
    OpenOptions::new()
        .open_on(IMAGE, Arc::new(host.clone()))
        .unwrap()
}

fn report(host: &SimHost) -> (CheckReport, Vec<String>) {
    let host: Arc<dyn Host> = Arc::new(host.clone());
    let mut lines = Vec::new();
    let report = with_file_on(
        host,
        Path::new(IMAGE),
        OfflineOptions::read(),
        async |io, file| {
            let mut header = Header::read_for_check(io, file).await?;
            check(io, file, &mut header, Repair::None, &mut |line| {
                lines.push(line.to_owned());
            })
            .await
        },
    )
    .unwrap();
    (report, lines)
}

fn assert_clean(host: &SimHost) {
    let (report, lines) = report(host);
    assert!(report.is_clean(), "{lines:#?}");
}

fn read(disk: &dyn DiskFile, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xa5; len];
    disk.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// Bytes that do not repeat.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            z ^= z << 13;
            z ^= z >> 7;
            z ^= z << 17;
            z as u8
        })
        .collect()
}

/// Submits one request; its id is given back by the completion.
fn submit(io: &mut dyn AsyncIo, id: u64, op: RequestOp) {
    assert_eq!(io.submit(&mut vec![Request { id, op }]), 1);
}

fn write_op(offset: u64, bytes: &[u8], fua: bool) -> RequestOp {
    RequestOp::Write {
        offset,
        buffers: Buffers::owned(AlignedBuf::from_slice(bytes)),
        fua,
    }
}

fn read_op(offset: u64, len: usize) -> RequestOp {
    RequestOp::Read {
        offset,
        buffers: Buffers::owned(AlignedBuf::zeroed(len)),
    }
}

/// Moves queues on until all is done; returns what they completed: id, result, bytes.
fn finish(host: &SimHost, queues: &mut [&mut Box<dyn AsyncIo>]) -> Vec<(u64, bool, Vec<u8>)> {
    let mut out = Vec::new();
    for _ in 0..1_000_000 {
        for queue in &mut *queues {
            queue.reap(&mut out);
        }
        if queues.iter().all(|queue| queue.in_flight() == 0) {
            return out
                .into_iter()
                .map(|done| {
                    let bytes = done.buffers.and_then(Buffers::into_owned);
                    let bytes = bytes.map(|bytes| bytes.to_vec()).unwrap_or_default();
                    (done.id, done.result.is_ok(), bytes)
                })
                .collect();
        }
        let _ = host.step();
    }
    panic!("hangs");
}

#[test]
fn free_space_is_found_behind_more_full_refcount_blocks_than_are_kept() {
    within(60, || {
        let host = host();
        make(
            &host,
            &CreateOptions {
                size: 33 << 30,
                refcount_bits: 64,
                preallocation: Preallocation::Metadata,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        disk.resize(34 << 30).unwrap();
        disk.write_at(&[7; 4096], 33 << 30).unwrap();
        assert_eq!(read(&disk, 33 << 30, 4096), [7; 4096]);
        disk.close().unwrap();
    });
}

#[test]
fn the_refcount_table_grows_as_often_as_it_must_before_a_flush() {
    within(60, || {
        let host = host();
        make(&host, &small_clusters(64 << 20, 64));
        let disk = open(&host);
        let bytes = noise(1, 12 << 20);
        disk.write_at(&bytes, 0).unwrap();
        assert!(read(&disk, 0, bytes.len()) == bytes);
        disk.flush().unwrap();
        disk.write_at(&bytes, 20 << 20).unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert!(read(&disk, 20 << 20, bytes.len()) == bytes);
    });
}

#[test]
fn an_l1_table_longer_than_a_refcount_block_counts_is_moved() {
    within(60, || {
        let host = host();
        make(&host, &small_clusters(1 << 20, 64));
        let disk = open(&host);
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.resize(200 << 20).unwrap();
        disk.write_at(&[2; 4096], (200 << 20) - 4096).unwrap();
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert_eq!(read(&disk, (200 << 20) - 4096, 4096), [2; 4096]);
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
    });
}

#[test]
fn a_refcount_table_longer_than_a_refcount_block_counts_is_moved() {
    within(120, || {
        let host = host();
        make(
            &host,
            &CreateOptions {
                preallocation: Preallocation::Metadata,
                ..small_clusters(125 << 20, 64)
            },
        );
        let disk = open(&host);
        disk.resize(160 << 20).unwrap();
        let bytes = noise(2, 1 << 20);
        for at in 0..16 {
            disk.write_at(&bytes, (126 + at) << 20).unwrap();
        }
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        assert!(read(&disk, 130 << 20, bytes.len()) == bytes);
    });
}

#[test]
fn compressed_data_is_not_packed_into_a_cluster_that_was_given_away() {
    let host = host();
    let size = 65536;
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_compressed(&vec![1; size], 0).unwrap();
    disk.write_at(&noise(3, size), 0).unwrap();
    // The cluster of the compressed data is free now.
    for _ in 0..3 {
        disk.flush().unwrap();
    }
    let mut expected = vec![(0, noise(3, size))];
    for cluster in 1..4u64 {
        let bytes = noise(10 + cluster, size);
        disk.write_at(&bytes, cluster * size as u64).unwrap();
        expected.push((cluster, bytes));
    }
    disk.write_compressed(&vec![2; size], 8 * size as u64)
        .unwrap();
    expected.push((8, vec![2; size]));
    for (cluster, bytes) in &expected {
        let found = read(&disk, cluster * size as u64, size);
        assert!(found == *bytes, "cluster {cluster}");
    }
    disk.close().unwrap();
    assert_clean(&host);
    let disk = open(&host);
    for (cluster, bytes) in &expected {
        let found = read(&disk, cluster * size as u64, size);
        assert!(found == *bytes, "cluster {cluster}, read again");
    }
}

fn qemu(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// An image made by QEMU: data in every cluster, and a snapshot that shares all of it.
fn image_with_snapshot(cluster_size: &str) -> Vec<u8> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(IMAGE);
    let name = path.to_str().unwrap();
    let options = format!("cluster_size={cluster_size}");
    qemu(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &options, name, "256k"],
    );
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 256k", name]);
    qemu("qemu-img", &["snapshot", "-c", "s", name]);
    fs::read(&path).unwrap()
}

/// The disk as it was at the snapshot, as QEMU sees it.
fn snapshot_content(host: &SimHost) -> Vec<u8> {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join(IMAGE);
    host.file(IMAGE).unwrap().save(&path).unwrap();
    let plain = dir.path().join("plain");
    let (path, plain) = (path.to_str().unwrap(), plain.to_str().unwrap());
    qemu("qemu-img", &["check", "-q", path]);
    qemu(
        "qemu-img",
        &[
            "convert", "-l", "s", "-f", "qcow2", "-O", "raw", path, plain,
        ],
    );
    fs::read(plain).unwrap()
}

#[test]
fn a_reader_that_was_on_its_way_does_not_keep_a_shared_table() {
    let image = image_with_snapshot("4k");
    for seed in 0..400 {
        let host = SimHost::new(SimConfig::seeded(seed));
        host.create(IMAGE, &image);
        let disk = open(&host);
        let mut reader = disk.create_async_io(8).unwrap();
        let mut writer = disk.create_async_io(8).unwrap();
        submit(&mut *writer, 1, write_op(8192, &[9; 4096], false));
        for _ in 0..seed % 6 {
            let _ = host.step();
            writer.reap(&mut Vec::new());
        }
        submit(&mut *reader, 2, read_op(0, 4096));
        finish(&host, &mut [&mut reader, &mut writer]);
        submit(&mut *reader, 3, read_op(8192, 4096));
        let done = finish(&host, &mut [&mut reader]);
        assert!(done[0].1);
        assert!(done[0].2 == [9; 4096], "seed {seed}: old data");
    }
}

#[test]
fn a_snapshot_keeps_what_it_had() {
    for cluster_size in ["512", "4k", "64k"] {
        let image = image_with_snapshot(cluster_size);
        let host = host();
        host.create(IMAGE, &image);
        let disk = open(&host);
        disk.write_at(&noise(4, 100_000), 5000).unwrap();
        disk.discard(131_072, 65_536).unwrap();
        disk.write_zeroes(200_000, 40_000, false).unwrap();
        for _ in 0..3 {
            disk.flush().unwrap();
        }
        disk.write_at(&noise(5, 100_000), 120_000).unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        assert!(
            snapshot_content(&host) == vec![1; 256 << 10],
            "{cluster_size}: the snapshot changed"
        );
    }
}

#[test]
fn a_call_that_waited_for_a_drain_is_checked_against_the_new_size() {
    for format in [Format::Raw, Format::Qcow2] {
        within(60, move || {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = dir.path().join("a.img");
            let name = path.to_str().unwrap();
            qemu(
                "qemu-img",
                &["create", "-q", "-f", format.name(), name, "1M"],
            );
            let disk = OpenOptions::new().format(format).open_disk(&path).unwrap();
            let guard = disk.drain().unwrap();
            let other = disk.clone();
            let caller = thread::spawn(move || {
                let write = other.write_at(&[1; 4096], (1 << 20) - 4096);
                let read = other.read_at(&mut [0; 4096], (1 << 20) - 4096);
                (write, read)
            });
            thread::sleep(Duration::from_millis(300));
            disk.resize(512 << 10).unwrap();
            drop(guard);
            let (write, read) = caller.join().unwrap();
            assert_eq!(write.unwrap_err().kind(), ErrorKind::OutOfRange, "{format}");
            assert_eq!(read.unwrap_err().kind(), ErrorKind::OutOfRange, "{format}");
        });
    }
}

#[test]
fn a_call_that_waited_for_a_close_is_refused() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("a.img");
    fs::write(&path, vec![0; 8192]).unwrap();
    let disk = OpenOptions::new()
        .format(Format::Raw)
        .open_disk(&path)
        .unwrap();
    let guard = disk.drain().unwrap();
    let other = disk.clone();
    let caller = thread::spawn(move || other.write_at(&[1; 512], 0));
    thread::sleep(Duration::from_millis(300));
    disk.close().unwrap();
    drop(guard);
    assert!(caller.join().unwrap().is_err());
    assert_eq!(fs::read(&path).unwrap(), vec![0; 8192]);
}

#[test]
fn resizes_at_the_same_time_take_turns() {
    within(120, || {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = dir.path().join("a.qcow2");
        let name = path.to_str().unwrap();
        qemu(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                "cluster_size=512",
                name,
                "1M",
            ],
        );
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let workers: Vec<_> = (0..2u64)
            .map(|number| {
                let disk = disk.clone();
                thread::spawn(move || {
                    for round in 0..60 {
                        disk.resize((1 + (round * 7 + number * 3) % 50) << 20)
                            .unwrap();
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
        let size = disk.size();
        disk.write_at(&[1; 512], size - 512).unwrap();
        disk.close().unwrap();
        drop(disk);
        qemu("qemu-img", &["check", "-q", name]);
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        assert_eq!(disk.size(), size);
        assert_eq!(read(&disk, size - 512, 512), [1; 512]);
    });
}

#[test]
fn the_header_is_never_allocated() {
    let host = host();
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let file = host.file(IMAGE).unwrap();
    let before = file.content();
    // The first count of the first block: the block follows header and table.
    let at =
        |offset: usize| u64::from_be_bytes(before[offset..offset + 8].try_into().unwrap()) as usize;
    let table = at(48);
    let block = at(table);
    assert_eq!(before[block..block + 2], [0, 1]);
    file.poke(block as u64, &[0, 0]);
    let disk = open(&host);
    let result = disk.write_at(&noise(6, 65536), 0);
    let _ = disk.close();
    assert_eq!(host.file(IMAGE).unwrap().content()[..4], *b"QFI\xfb");
    if let Err(error) = result {
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
}

#[test]
fn a_fua_write_after_the_death_of_another_process_is_durable() {
    for seed in 0..200 {
        let host = SimHost::new(SimConfig::seeded(seed));
        make(
            &host,
            &CreateOptions {
                size: 4 << 20,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        let mut io = disk.create_async_io(8).unwrap();
        submit(&mut *io, 1, write_op(0, &[1; 4096], false));
        finish(&host, &mut [&mut io]);
        submit(&mut *io, 2, RequestOp::Flush);
        // After its first sync, tables are on their way; the second never ends.
        let syncs = host.stats().syncs;
        // What was submitted is handed over by the second reap.
        io.reap(&mut Vec::new());
        while host.stats().syncs == syncs {
            io.reap(&mut Vec::new());
            assert!(host.step() || !host.idle());
        }
        host.hold(IMAGE, SimOp::Sync);
        for _ in 0..50 {
            io.reap(&mut Vec::new());
            let _ = host.step();
        }
        assert_eq!(io.in_flight(), 1);
        let next = host.kill();
        drop(io);
        drop(disk);
        let disk = open(&next);
        let mut io = disk.create_async_io(8).unwrap();
        submit(&mut *io, 3, write_op(0, &[2; 4096], true));
        assert!(finish(&next, &mut [&mut io])[0].1);
        let last = next.power_cut();
        drop(io);
        drop(disk);
        assert!(
            read(&open(&last), 0, 4096) == [2; 4096],
            "seed {seed}: not durable"
        );
    }
}

#[test]
fn a_write_into_a_cluster_that_another_just_took_survives_a_kill() {
    for seed in 0..60 {
        let host = SimHost::new(SimConfig::seeded(seed));
        make(&host, &small_clusters(1 << 20, 16));
        let disk = OpenOptions::new()
            .restartable(true)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        let mut first = disk.create_async_io(8).unwrap();
        let mut second = disk.create_async_io(8).unwrap();
        submit(&mut *first, 1, write_op(0, &[1; 256], false));
        submit(&mut *second, 2, write_op(256, &[2; 256], false));
        let mut out = Vec::new();
        while second.in_flight() > 0 {
            let _ = host.step();
            first.reap(&mut Vec::new());
            second.reap(&mut out);
        }
        assert_eq!(out[0].result, Ok(()));
        let after = host.kill();
        drop((first, second));
        drop(disk);
        let found = read(&open(&after), 256, 256);
        assert!(found == [2; 256], "seed {seed}: lost");
    }
}

/// A disk whose cluster 0 holds ones, durably, and a slow request of one queue on it.
fn slow_request(op: RequestOp) -> (SimHost, Disk, Box<dyn AsyncIo>, Box<dyn AsyncIo>) {
    let host = host();
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            cluster_size: 4096,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_at(&[1; 4096], 0).unwrap();
    disk.flush().unwrap();
    let mut slow = disk.create_async_io(8).unwrap();
    let quick = disk.create_async_io(8).unwrap();
    let second = Duration::from_secs(1);
    host.configure(|config| (config.min_delay, config.max_delay) = (second, second));
    submit(&mut *slow, 1, op);
    let short = Duration::from_micros(10);
    host.configure(|config| (config.min_delay, config.max_delay) = (short, short));
    (host, disk, slow, quick)
}

/// Discards cluster 0, makes that durable, and writes twos elsewhere: nothing of that may reach the
/// slow request, nor the other way round. Then lets the slow request end.
fn reuse_meanwhile(
    host: &SimHost,
    slow: &mut Box<dyn AsyncIo>,
    quick: &mut Box<dyn AsyncIo>,
) -> Vec<u8> {
    submit(
        &mut **quick,
        2,
        RequestOp::Discard {
            offset: 0,
            len: 4096,
        },
    );
    finish(host, &mut [quick]);
    for round in 1..6u64 {
        submit(&mut **quick, 3, RequestOp::Flush);
        finish(host, &mut [quick]);
        submit(&mut **quick, 4, write_op(round * 4096, &[2; 4096], false));
        finish(host, &mut [quick]);
    }
    assert_eq!(slow.in_flight(), 1, "it ended too early for this test");
    finish(host, &mut [slow]).remove(0).2
}

#[test]
fn a_write_on_its_way_keeps_its_cluster() {
    let (host, disk, mut slow, mut quick) = slow_request(write_op(0, &[9; 4096], false));
    reuse_meanwhile(&host, &mut slow, &mut quick);
    drop((slow, quick));
    assert!(read(&disk, 4096, 5 * 4096) == vec![2; 5 * 4096]);
    let len = host.file(IMAGE).unwrap().content().len();
    // Now that it ended the cluster is used again.
    for _ in 0..3 {
        disk.flush().unwrap();
    }
    disk.write_at(&[3; 4096], 1 << 20).unwrap();
    disk.flush().unwrap();
    assert_eq!(host.file(IMAGE).unwrap().content().len(), len);
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn a_read_on_its_way_sees_no_other_data() {
    let (host, disk, mut slow, mut quick) = slow_request(read_op(0, 4096));
    let found = reuse_meanwhile(&host, &mut slow, &mut quick);
    assert!(found == [1; 4096], "{:?}", &found[..8]);
    drop((slow, quick));
    disk.close().unwrap();
    assert_clean(&host);
}

#[test]
fn a_corrupt_entry_does_not_hide_changes_beside_it() {
    let host = host();
    let size = 65536u64;
    make(
        &host,
        &CreateOptions {
            size: 4 << 20,
            ..CreateOptions::default()
        },
    );
    let disk = open(&host);
    disk.write_at(&noise(7, 8 * size as usize), 0).unwrap();
    disk.close().unwrap();
    drop(disk);
    let file = host.file(IMAGE).unwrap();
    let content = file.content();
    let at = |offset: usize| {
        u64::from_be_bytes(content[offset..offset + 8].try_into().unwrap()) as usize
    };
    let l2 = at(at(40)) & 0x00ff_ffff_ffff_fe00;
    // The entry of cluster 3 names no cluster boundary.
    file.poke(l2 as u64 + 3 * 8 + 6, &[0x02]);
    let disk = open(&host);
    let error = disk.discard(size, 5 * size).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    // The image is marked; what was changed before the entry is kept all the same.
    assert!(disk.write_at(&[8; 4096], 20 * size).is_err());
    disk.flush().unwrap();
    let after = host.power_cut();
    drop(disk);
    let options = OpenOptions::new().read_only(true);
    let disk = options
        .open_on(IMAGE, std::sync::Arc::new(after.clone()))
        .unwrap();
    assert_eq!(read(&disk, size, 4096), [0; 4096]);
    assert!(disk.info().corrupt);
}

#[test]
fn growing_again_shows_no_old_data() {
    for cluster_size in [512, 65536] {
        let host = host();
        make(
            &host,
            &CreateOptions {
                size: 256 << 10,
                cluster_size,
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        disk.write_at(&[5; 256 << 10], 0).unwrap();
        disk.write_compressed(&vec![6; cluster_size as usize], 131_072)
            .unwrap();
        for (small, large) in [(200_192, 256 << 10), (131_584, 256 << 10)] {
            disk.resize(small).unwrap();
            disk.resize(large).unwrap();
            let tail = read(&disk, small, (large - small) as usize);
            assert!(
                tail.iter().all(|byte| *byte == 0),
                "{cluster_size}: from {small}"
            );
        }
        assert_eq!(read(&disk, 131_072, 512), [6; 512]);
        disk.close().unwrap();
        assert_clean(&host);
    }
}

#[test]
fn growing_over_a_longer_backing_file_shows_zeroes() {
    for (version, small) in [(3, 100_352), (3, 131_072), (2, 100_352), (2, 131_072)] {
        let host = host();
        host.create("base.raw", &vec![3; 1 << 20]);
        make(
            &host,
            &CreateOptions {
                size: small,
                version,
                backing_file: Some(b"base.raw".to_vec()),
                backing_format: Some("raw".into()),
                ..CreateOptions::default()
            },
        );
        let disk = open(&host);
        let grown = disk.resize(512 << 10);
        if version == 2 {
            // There is no way to say zero without writing it.
            assert_eq!(grown.unwrap_err().kind(), ErrorKind::Unsupported);
            continue;
        }
        grown.unwrap();
        assert!(read(&disk, 0, small as usize) == vec![3; small as usize]);
        let grown = read(&disk, small, (512 << 10) - small as usize);
        assert!(grown.iter().all(|byte| *byte == 0), "{version} {small}");
        disk.close().unwrap();
        assert_clean(&host);
    }
}

#[test]
fn space_that_a_failed_growth_took_comes_back() {
    use block::io::sim::SimFault;
    for skip in 0..8 {
        let host = host();
        make(&host, &small_clusters(1 << 20, 16));
        let disk = open(&host);
        disk.write_at(&[1; 4096], 0).unwrap();
        disk.flush().unwrap();
        host.inject(SimFault {
            path: None,
            op: SimOp::Write,
            skip,
            count: 1,
            errno: libc::ENOSPC,
        });
        while let Err(error) = disk.resize(40 << 20) {
            assert_eq!(error.kind(), ErrorKind::NoSpace);
            assert_eq!(disk.size(), 1 << 20);
        }
        while let Err(error) = disk.resize(60 << 20) {
            assert_eq!(error.kind(), ErrorKind::NoSpace);
        }
        disk.write_at(&[2; 4096], 50 << 20).unwrap();
        assert_eq!(read(&disk, 0, 4096), [1; 4096]);
        disk.close().unwrap();
        assert_clean(&host);
    }
}

#[test]
fn a_disk_that_was_full_goes_on_when_there_is_space() {
    use block::io::sim::SimFault;
    for skip in 0..12 {
        let host = host();
        make(&host, &small_clusters(4 << 20, 16));
        let disk = open(&host);
        host.inject(SimFault {
            path: None,
            op: SimOp::Write,
            skip,
            count: 1 + skip % 4,
            errno: libc::ENOSPC,
        });
        let mut failed = 0;
        for round in 0..8u64 {
            let bytes = noise(round, 10_000);
            failed += u32::from(disk.write_at(&bytes, round * 20_000 + 100).is_err());
            failed += u32::from(disk.flush().is_err());
        }
        assert!(failed > 0);
        for round in 0..8u64 {
            disk.write_at(&noise(round, 10_000), round * 20_000 + 100)
                .unwrap();
        }
        disk.flush().unwrap();
        disk.close().unwrap();
        assert_clean(&host);
        let disk = open(&host);
        for round in 0..8u64 {
            assert!(read(&disk, round * 20_000 + 100, 10_000) == noise(round, 10_000));
        }
    }
}

#[test]
fn a_failed_sync_is_not_forgotten() {
    use block::io::sim::SimFault;
    let host = host();
    make(&host, &small_clusters(1 << 20, 16));
    let disk = open(&host);
    disk.write_at(&[1; 4096], 0).unwrap();
    host.inject(SimFault {
        path: None,
        op: SimOp::Sync,
        skip: 0,
        count: 1,
        errno: libc::EIO,
    });
    assert!(disk.flush().is_err());
    for _ in 0..3 {
        assert_eq!(disk.flush().unwrap_err().kind(), ErrorKind::SyncFailed);
    }
    // Reading goes on.
    assert_eq!(read(&disk, 0, 4096), [1; 4096]);
    assert!(disk.close().is_err());
}

#[test]
fn a_flush_that_waited_for_a_failed_sync_fails_too() {
    use block::io::sim::SimFault;
    for format in [Format::Raw, Format::Qcow2] {
        let host = host();
        match format {
            Format::Raw => drop(host.create(IMAGE, &vec![0; 1 << 20])),
            _ => make(&host, &small_clusters(1 << 20, 16)),
        }
        let disk = OpenOptions::new()
            .format(format)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        host.inject(SimFault {
            path: None,
            op: SimOp::Sync,
            skip: 0,
            count: 1,
            errno: libc::EIO,
        });
        let mut first = disk.create_async_io(8).unwrap();
        let mut second = disk.create_async_io(8).unwrap();
        submit(&mut *first, 1, write_op(0, &[1; 4096], false));
        assert!(finish(&host, &mut [&mut first])[0].1);
        submit(&mut *first, 2, RequestOp::Flush);
        submit(&mut *second, 3, RequestOp::Flush);
        submit(&mut *second, 4, RequestOp::Flush);
        for (id, succeeded, _) in finish(&host, &mut [&mut first, &mut second]) {
            assert!(!succeeded, "{format}: flush {id} succeeded");
        }
    }
}

#[test]
fn a_raw_disk_that_ends_inside_a_host_block_keeps_its_length() {
    use block::io::IoAlignment;
    for unit in [512u32, 4096] {
        let mut config = SimConfig::seeded(1);
        config.alignment = IoAlignment {
            memory: unit,
            offset: unit,
        };
        let host = SimHost::new(config);
        let len = 20_480 + 1000;
        host.create(IMAGE, &vec![7; len]);
        let disk = OpenOptions::new()
            .format(Format::Raw)
            .direct(true)
            .open_on(IMAGE, Arc::new(host.clone()))
            .unwrap();
        assert_eq!(disk.size(), 20_480 + 1024);
        let tail = read(&disk, 20_480, 1024);
        assert!(tail[..1000] == [7; 1000] && tail[1000..] == [0; 24]);
        disk.write_at(&[8; 100], 20_480 + 600).unwrap();
        assert_eq!(host.file(IMAGE).unwrap().content().len(), len);
        disk.write_at(&[9; 24], 20_480 + 1000).unwrap();
        assert_eq!(host.file(IMAGE).unwrap().content().len(), 20_480 + 1024);
        let tail = read(&disk, 20_480, 1024);
        assert!(tail[..600] == [7; 600] && tail[600..700] == [8; 100]);
        assert!(tail[700..1000] == [7; 300] && tail[1000..] == [9; 24]);
        disk.write_zeroes(20_480, 1024, true).unwrap();
        disk.discard(0, 20_480 + 1024).unwrap();
        assert!(read(&disk, 0, len).iter().all(|byte| *byte == 0));
        disk.close().unwrap();
    }
}

#[test]
fn a_truncated_image_fails_and_does_not_panic() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    for len in [
        0, 100, 512, 65_536, 65_537, 131_072, 196_608, 262_144, 300_000,
    ] {
        qemu("qemu-img", &["create", "-q", "-f", "qcow2", name, "4M"]);
        qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 1 0 2M", name]);
        let disk = OpenOptions::new().open_disk(&path).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(len).unwrap();
        let mut bytes = vec![0; 65536];
        for at in (0..4 << 20).step_by(65536) {
            let _ = disk.read_at(&mut bytes, at);
            let _ = disk.write_at(&bytes, at);
        }
        let _ = disk.discard(0, 4 << 20);
        let _ = disk.flush();
        let _ = disk.close();
        let _ = file.write_at(&[0], 0);
    }
}

#[test]
fn unsafe_syncs_nothing_and_keeps_everything() {
    for format in [Format::Raw, Format::Qcow2] {
        let host = SimHost::new(SimConfig::seeded(5));
        let path = Path::new("disk.img");
        if format == Format::Raw {
            host.create(path, &[0; 1 << 20]);
        } else {
            let image = CreateOptions {
                size: 1 << 20,
                ..CreateOptions::default()
            };
            let shared: Arc<dyn Host> = Arc::new(host.clone());
            with_file_on(shared, path, OfflineOptions::create(), async |io, file| {
                create(io, file, &image).await
            })
            .unwrap();
        }
        let open = |mode| {
            OpenOptions::new()
                .format(format)
                .cache_mode(mode)
                .open_on(path, Arc::new(host.clone()))
                .unwrap()
        };
        let before = host.stats().syncs;
        let disk = open(CacheMode::Unsafe);
        let data = vec![7; 100_000];
        disk.write_at(&data, 5_000).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(60_000, 10_000, true).unwrap();
        disk.close().unwrap();
        assert_eq!(host.stats().syncs, before, "{format}");
        let disk = open(CacheMode::WriteBack);
        let mut got = vec![0; data.len()];
        disk.read_at(&mut got, 5_000).unwrap();
        let mut expected = data;
        expected[55_000..65_000].fill(0);
        assert!(got == expected, "{format}");
    }
}
