//! Real threads over the real engines: writes in place and reads on some queues, discards, reuse of
//! what they freed, resizes, flushes and new queues on others. What a thread owns nobody else
//! touches, so everything it reads is known.

#![allow(clippy::unwrap_used)]

use std::{
    path::Path,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use block::{
    AsyncDiskFile, Disk, DiskFile, OpenOptions,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, EngineKind, Request, RequestOp},
};

const CLUSTER: u64 = 4096;

fn qemu(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

fn run(io: &mut dyn AsyncIo, ops: Vec<RequestOp>) -> Vec<Completion> {
    let mut batch: Vec<Request> = ops
        .into_iter()
        .enumerate()
        .map(|(id, op)| Request { id: id as u64, op })
        .collect();
    let wanted = batch.len();
    assert_eq!(io.submit(&mut batch), wanted);
    let mut out = Vec::new();
    let deadline = Instant::now() + Duration::from_secs(60);
    while out.len() < wanted {
        assert!(Instant::now() < deadline, "requests hang");
        io.wait(Some(Duration::from_secs(5))).unwrap();
        io.reap(&mut out);
    }
    for done in &out {
        assert_eq!(done.result, Ok(()));
    }
    out.sort_by_key(|done| done.id);
    out
}

fn pattern(owner: u64, round: u64, cluster: u64) -> Vec<u8> {
    let mut z = (owner << 56 | round << 24 | cluster).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..CLUSTER / 8)
        .flat_map(|_| {
            z ^= z << 13;
            z ^= z >> 7;
            z ^= z << 17;
            z.to_le_bytes()
        })
        .collect()
}

/// Guest clusters of an owner: every fourth one, so that neighbours belong to others.
fn cluster_of(owner: u64, number: u64) -> u64 {
    number * 4 + owner
}

fn write(owner: u64, round: u64, number: u64) -> RequestOp {
    let cluster = cluster_of(owner, number);
    RequestOp::Write {
        offset: cluster * CLUSTER,
        buffers: Buffers::owned(AlignedBuf::from_slice(&pattern(owner, round, cluster))),
        fua: round.is_multiple_of(16),
    }
}

fn read(owner: u64, number: u64) -> RequestOp {
    RequestOp::Read {
        offset: cluster_of(owner, number) * CLUSTER,
        buffers: Buffers::owned(AlignedBuf::zeroed(CLUSTER as usize)),
    }
}

fn bytes(done: Completion) -> Vec<u8> {
    done.buffers.unwrap().into_owned().unwrap().to_vec()
}

/// Writes in place and reads back, for ever.
fn steady(disk: &Disk, owner: u64, stop: &AtomicBool) {
    let mut io = disk.create_async_io(32).unwrap();
    let mut round = 1;
    while !stop.load(Ordering::Relaxed) {
        run(&mut *io, (0..8).map(|n| write(owner, round, n)).collect());
        let found = run(&mut *io, (0..8).map(|n| read(owner, n)).collect());
        for (number, done) in found.into_iter().enumerate() {
            let expected = pattern(owner, round, cluster_of(owner, number as u64));
            assert!(bytes(done) == expected, "owner {owner}, round {round}");
        }
        round += 1;
        if round % 40 == 0 {
            // A reset: the queue goes with requests in flight.
            let mut batch: Vec<Request> = (0..8)
                .map(|n| Request {
                    id: n,
                    op: write(owner, round, n),
                })
                .collect();
            io.submit(&mut batch);
            drop(io);
            io = disk.create_async_io(32).unwrap();
        }
    }
}

/// Writes, discards and writes again: clusters are freed and used again all the time.
fn churning(disk: &Disk, owner: u64, stop: &AtomicBool) {
    let mut io = disk.create_async_io(32).unwrap();
    let mut round = 1;
    while !stop.load(Ordering::Relaxed) {
        run(&mut *io, (0..8).map(|n| write(owner, round, n)).collect());
        let discards = (0..8).filter(|n| n % 2 == round % 2).map(|n| {
            let offset = cluster_of(owner, n) * CLUSTER;
            match round % 3 {
                0 => RequestOp::WriteZeroes {
                    offset,
                    len: CLUSTER,
                    may_unmap: true,
                },
                _ => RequestOp::Discard {
                    offset,
                    len: CLUSTER,
                },
            }
        });
        run(&mut *io, discards.collect());
        run(&mut *io, vec![RequestOp::Flush]);
        let found = run(&mut *io, (0..8).map(|n| read(owner, n)).collect());
        for (number, done) in (0..).zip(found) {
            let expected = if number % 2 == round % 2 {
                vec![0; CLUSTER as usize]
            } else {
                pattern(owner, round, cluster_of(owner, number))
            };
            assert!(bytes(done) == expected, "owner {owner}, round {round}");
        }
        round += 1;
    }
}

/// Changes the size beyond what the others use.
fn resizing(disk: &Disk, stop: &AtomicBool) {
    let mut round = 0u64;
    while !stop.load(Ordering::Relaxed) {
        disk.resize((1 << 20) + (round * 37 % 64) * 65536).unwrap();
        thread::sleep(Duration::from_millis(3));
        round += 1;
    }
}

fn race(options: &OpenOptions, path: &Path, time: Duration) {
    let name = path.to_str().unwrap();
    qemu(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=4k",
            name,
            "1M",
        ],
    );
    let disk = options.open_disk(path).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let start = |work: fn(&Disk, u64, &AtomicBool), owner: u64| {
        let (disk, stop) = (disk.clone(), Arc::clone(&stop));
        thread::spawn(move || work(&disk, owner, &stop))
    };
    let workers = [
        start(steady, 0),
        start(churning, 1),
        start(steady, 2),
        start(churning, 3),
        start(|disk, _, stop| resizing(disk, stop), 0),
    ];
    thread::sleep(time);
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.join().unwrap();
    }
    disk.close().unwrap();
    drop(disk);
    qemu("qemu-img", &["check", "-q", name]);
}

#[test]
fn writes_in_place_race_reuse_resize_and_reset() {
    for engine in EngineKind::ALL {
        for tiny in [false, true] {
            let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let path = dir.path().join("race.qcow2");
            let mut options = OpenOptions::new()
                .engine(engine)
                .direct(engine == EngineKind::LinuxAio);
            if tiny {
                options = options.metadata_cache_size(0);
            }
            race(&options, &path, Duration::from_millis(1500));
        }
    }
}
