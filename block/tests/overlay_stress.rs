//! Two queues over a compressed backing image: every byte read is the byte last written.

#![allow(clippy::unwrap_used)]

use std::{path::Path, process::Command, time::Duration};

use block::{
    AsyncDiskFile, OpenOptions,
    io::{AlignedBuf, Buffers, Completion, EngineKind, Request, RequestOp},
};

const SIZE: u64 = 48 << 20;
const BLOCK: u64 = 4096;
const ROUNDS: usize = 300;
const DEPTH: usize = 24;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// Content that compresses and says where it belongs.
fn fill(block: u64, version: u8, out: &mut [u8]) {
    for (index, word) in out.chunks_exact_mut(8).enumerate() {
        let value = (block << 20) ^ ((index as u64 / 16) << 8) ^ u64::from(version);
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn qemu_img(args: &[&str]) {
    let output = Command::new("qemu-img").args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
}

/// One queue: it writes its own half of the blocks and reads them all back, many at a time.
fn drive(disk: &dyn AsyncDiskFile, half: u64, seed: u64) {
    let mut io = disk.create_async_io(64).unwrap();
    let blocks = SIZE / BLOCK / 2;
    let first = half * blocks;
    let mut versions = vec![0u8; blocks as usize];
    let mut random = Random(seed);
    let mut out: Vec<Completion> = Vec::new();
    for round in 0..ROUNDS {
        let mut batch = Vec::new();
        let mut places = Vec::new();
        let mut taken: Vec<(u64, u64)> = Vec::new();
        while batch.len() < DEPTH {
            let count = 1 + random.next(40).min(random.next(40));
            let start = random.next(blocks - count);
            if taken.iter().any(|(s, e)| start < *e && *s < start + count) {
                continue;
            }
            taken.push((start, start + count));
            let write = random.next(4) == 0;
            let mut data = AlignedBuf::zeroed((count * BLOCK) as usize);
            if write {
                for (index, chunk) in data.chunks_exact_mut(BLOCK as usize).enumerate() {
                    let version = &mut versions[start as usize + index];
                    *version = version.wrapping_add(1);
                    fill(first + start + index as u64, *version, chunk);
                }
            } else {
                data.fill(0xee);
            }
            let offset = (first + start) * BLOCK;
            let buffers = Buffers::owned(data);
            let op = if write {
                RequestOp::Write {
                    offset,
                    buffers,
                    fua: random.next(16) == 0,
                }
            } else {
                RequestOp::Read { offset, buffers }
            };
            places.push((start, write));
            batch.push(Request {
                id: batch.len() as u64,
                op,
            });
        }
        if random.next(8) == 0 {
            places.push((0, true));
            batch.push(Request {
                id: batch.len() as u64,
                op: RequestOp::Flush,
            });
        }
        let wanted = batch.len();
        while !batch.is_empty() {
            io.submit(&mut batch);
            io.wait(Some(Duration::from_secs(20))).unwrap();
            io.reap(&mut out);
        }
        while out.len() < wanted {
            assert!(
                io.wait(Some(Duration::from_secs(20))).unwrap(),
                "a request hangs"
            );
            io.reap(&mut out);
        }
        for done in out.drain(..) {
            let (start, write) = places[done.id as usize];
            assert_eq!(done.result, Ok(()));
            if write {
                continue;
            }
            let data = done.buffers.unwrap().into_owned().unwrap();
            let mut expected = vec![0; BLOCK as usize];
            for (index, chunk) in data.chunks_exact(BLOCK as usize).enumerate() {
                let block = start as usize + index;
                fill(first + block as u64, versions[block], &mut expected);
                if chunk != expected {
                    let at = chunk
                        .iter()
                        .zip(&expected)
                        .position(|(a, b)| a != b)
                        .unwrap();
                    panic!(
                        "half {half} round {round} block {block} version {} of read at {start}+{}: byte {at} is {:#x} not {:#x}",
                        versions[block],
                        data.len() / BLOCK as usize,
                        chunk[at],
                        expected[at]
                    );
                }
            }
        }
    }
}

fn overlay(dir: &Path, codec: &str, cluster: &str) -> std::path::PathBuf {
    let raw = dir.join("base.raw");
    let mut content = vec![0; SIZE as usize];
    for (index, chunk) in content.chunks_exact_mut(BLOCK as usize).enumerate() {
        fill(index as u64, 0, chunk);
    }
    std::fs::write(&raw, content).unwrap();
    let base = dir.join("base.qcow2");
    let options = format!("compression_type={codec},cluster_size={cluster}");
    let (raw, base_name) = (raw.to_str().unwrap(), base.to_str().unwrap());
    qemu_img(&[
        "convert", "-c", "-O", "qcow2", "-o", &options, raw, base_name,
    ]);
    let path = dir.join("top.qcow2");
    let top = path.to_str().unwrap();
    qemu_img(&[
        "create", "-q", "-f", "qcow2", "-b", base_name, "-F", "qcow2", top,
    ]);
    path
}

fn stress(codec: &str, cluster: &str) {
    for (engine, direct) in [
        (EngineKind::IoUring, false),
        (EngineKind::IoUring, true),
        (EngineKind::LinuxAio, true),
        (EngineKind::Sync, false),
    ] {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = overlay(dir.path(), codec, cluster);
        let disk = OpenOptions::new()
            .engine(engine)
            .direct(direct)
            .open_disk(&path)
            .unwrap();
        std::thread::scope(|scope| {
            let disk = &disk;
            scope.spawn(move || drive(disk, 0, 0x1234_5678_9abc));
            scope.spawn(move || drive(disk, 1, 0xdef0_1234_5678));
        });
        drop(disk);
        qemu_img(&["check", "-q", "-f", "qcow2", path.to_str().unwrap()]);
    }
}

#[test]
fn over_zlib() {
    stress("zlib", "64k");
}

#[test]
fn over_zstd() {
    stress("zstd", "64k");
}

#[test]
fn over_small_clusters() {
    stress("zlib", "4k");
}
