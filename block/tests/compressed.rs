//! Reads of compressed clusters: several at a time, into memory of all kinds.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
};

use block::{
    ErrorKind, OpenOptions,
    io::{AlignedBuf, AsyncIo, Buffers, Completion, EngineKind, Request, RequestOp},
};

const CLUSTER: usize = 64 << 10;
const CLUSTERS: usize = 40;
const PAGE: usize = 4096;

/// Bytes that compress to about a third.
fn noise(seed: u64) -> Vec<u8> {
    let mut z = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        z ^= z << 13;
        z ^= z >> 7;
        z ^= z << 17;
        z
    };
    let mut bytes = Vec::with_capacity(CLUSTERS * CLUSTER);
    while bytes.len() < CLUSTERS * CLUSTER {
        let word = next();
        bytes.extend((word as u16).to_le_bytes());
        bytes.extend([word.to_be_bytes()[0] % 5 + 1; 6]);
    }
    bytes
}

/// An image of that data, every cluster compressed.
fn compressed(dir: &Path, name: &str, codec: &str, data: &[u8]) -> PathBuf {
    let (raw, image) = (dir.join("plain.raw"), dir.join(format!("{name}.{codec}")));
    fs::write(&raw, data).unwrap();
    let options = format!("compression_type={codec}");
    let output = Command::new("qemu-img")
        .args(["convert", "-c", "-O", "qcow2", "-o", &options])
        .args([&raw, &image])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    image
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Memory of pages that lie backwards, as a guest's may.
struct Pages(Vec<u8>);

impl Pages {
    fn new(len: usize, fill: u8) -> Self {
        Self(vec![fill; len.next_multiple_of(PAGE)])
    }

    fn buffers(&mut self, len: usize) -> Buffers {
        let base = self.0.as_mut_ptr();
        let pages = self.0.len() / PAGE;
        let list: Vec<_> = (0..pages)
            .map(|page| {
                let start = base.wrapping_add((pages - 1 - page) * PAGE);
                (start, PAGE.min(len - page * PAGE))
            })
            .collect();
        // SAFETY: the pages outlive every request of these tests, which wait for them.
        unsafe { Buffers::from_raw(list, Arc::new(())) }
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = self.0.chunks(PAGE).rev().flatten().copied().collect();
        bytes.truncate(len);
        bytes
    }
}

fn read(io: &mut dyn AsyncIo, id: u64, offset: usize, buffers: Buffers) {
    let offset = offset as u64;
    let op = RequestOp::Read { offset, buffers };
    assert_eq!(io.submit(&mut vec![Request { id, op }]), 1);
}

fn finish(io: &mut dyn AsyncIo) -> Vec<Completion> {
    let mut done = Vec::new();
    while io.in_flight() > 0 {
        io.wait(None).unwrap();
        io.reap(&mut done);
    }
    done.sort_by_key(|done| done.id);
    done
}

#[test]
fn many_reads_at_once_have_their_data() {
    let dir = scratch();
    let data = noise(1);
    for codec in ["zlib", "zstd"] {
        let path = compressed(dir.path(), "disk", codec, &data);
        for engine in [EngineKind::IoUring, EngineKind::Sync] {
            let disk = OpenOptions::new().engine(engine).open(&path).unwrap();
            let mut io = disk.create_async_io(64).unwrap();
            let mut z = 7_usize;
            for _ in 0..20 {
                let ranges: Vec<(usize, usize)> = (0..12)
                    .map(|_| {
                        z = z.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        let start = (z >> 20) % (data.len() / 512) * 512;
                        let len = ((z >> 44) % (20 * CLUSTER)).next_multiple_of(512).max(512);
                        (start, len.min(data.len() - start))
                    })
                    .collect();
                let mut pages: Vec<_> = ranges
                    .iter()
                    .map(|(_, len)| Pages::new(*len, 0xee))
                    .collect();
                for (id, (start, len)) in ranges.iter().enumerate() {
                    let buffers = match id % 2 {
                        0 => Buffers::owned(AlignedBuf::zeroed(*len)),
                        _ => pages[id].buffers(*len),
                    };
                    read(&mut *io, id as u64, *start, buffers);
                }
                for (id, done) in finish(&mut *io).into_iter().enumerate() {
                    assert_eq!(done.result, Ok(()));
                    let (start, len) = ranges[id];
                    let owned = done.buffers.and_then(Buffers::into_owned);
                    let found = match owned {
                        Some(bytes) => bytes.to_vec(),
                        None => pages[id].bytes(len),
                    };
                    assert!(found == data[start..start + len], "{codec} {start} {len}");
                }
            }
        }
    }
}

/// Takes a part of a file out of memory, or all of it.
fn evict(path: &Path, start: usize, len: usize) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    let (start, len) = (start as i64, len as i64);
    // SAFETY: the call takes a descriptor and numbers.
    let result =
        unsafe { libc::posix_fadvise(file.as_raw_fd(), start, len, libc::POSIX_FADV_DONTNEED) };
    assert_eq!(result, 0);
}

#[test]
fn what_is_not_in_memory_is_read_all_the_same() {
    let dir = scratch();
    let data = noise(3);
    for codec in ["zlib", "zstd"] {
        let path = compressed(dir.path(), "disk", codec, &data);
        let middle = fs::metadata(&path).unwrap().len() as usize / 2;
        for (start, len) in [(0, 0), (middle, 4 * CLUSTER), (0, middle)] {
            let disk = OpenOptions::new().open(&path).unwrap();
            let mut io = disk.create_async_io(8).unwrap();
            evict(&path, start, len);
            for (id, at) in (0..data.len()).step_by(CLUSTER).enumerate() {
                let buffers = Buffers::owned(AlignedBuf::zeroed(PAGE));
                read(&mut *io, id as u64, at + PAGE, buffers);
                if id % 8 == 7 {
                    for done in finish(&mut *io) {
                        assert_eq!(done.result, Ok(()));
                        let found = done.buffers.and_then(Buffers::into_owned).unwrap();
                        let at = done.id as usize * CLUSTER + PAGE;
                        assert!(found[..] == data[at..at + PAGE], "{codec} {at}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_broken_cluster_fails_its_request_and_shows_nothing_of_another_disk() {
    let dir = scratch();
    let (data, secret) = (noise(1), vec![0x5e; CLUSTERS * CLUSTER]);
    for codec in ["zlib", "zstd"] {
        let open = |path: &Path| {
            let disk = OpenOptions::new().engine(EngineKind::Sync).open(path);
            disk.unwrap().create_async_io(4).unwrap()
        };
        let mut other = open(&compressed(dir.path(), "other", codec, &secret));
        let path = compressed(dir.path(), "disk", codec, &data);
        let mut image = fs::read(&path).unwrap();
        // In the middle of the file lies data alone; no frame starts with zeroes.
        let middle = image.len() / 2;
        image[middle..middle + CLUSTER].fill(0);
        fs::write(&path, image).unwrap();
        let mut io = open(&path);
        let mut failed = 0;
        for start in (0..CLUSTERS * CLUSTER).step_by(2 * CLUSTER) {
            let mut pages = Pages::new(2 * CLUSTER, 0);
            read(&mut *other, 0, start, pages.buffers(2 * CLUSTER));
            assert_eq!(finish(&mut *other)[0].result, Ok(()));
            assert!(pages.bytes(2 * CLUSTER) == secret[..2 * CLUSTER]);

            let mut pages = Pages::new(2 * CLUSTER, 0xee);
            read(&mut *io, 0, start, pages.buffers(2 * CLUSTER));
            if let Err(kind) = finish(&mut *io)[0].result {
                assert_eq!(kind, ErrorKind::Corrupt);
                failed += 1;
            }
            let found = pages.bytes(2 * CLUSTER);
            let shows = found
                .chunks(64)
                .any(|some| some.iter().all(|byte| *byte == 0x5e));
            assert!(!shows, "{codec} {start}");
        }
        assert!(failed > 0, "{codec}");
    }
}
