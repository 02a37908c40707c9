//! Platter and QEMU work on the same qcow2 image in turns; after each turn the contents are those
//! of a model, and QEMU's checker finds nothing.
//!
//! `PLATTER_ROUNDS=N` runs N images, `PLATTER_ROUND=S` one.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use block::{
    AsyncDiskFile, Disk, DiskFile, OpenOptions,
    io::{AlignedBuf, AsyncIo, Buffers, EngineKind, Request, RequestOp},
};

/// Images of a run.
const ROUNDS: u64 = 90;

/// Random numbers (SplitMix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

struct Round {
    seed: u64,
    rng: Rng,
    dir: tempfile::TempDir,
    image: PathBuf,
    options: String,
    cluster: u64,
    /// What a discard can forget by itself: a cluster, or a subcluster.
    unit: u64,
    version_2: bool,
    /// Guest data is in a file of its own, and that is the disk by itself.
    data_file: Option<bool>,
    backing: u64,
    backing_format: &'static str,
    engine: EngineKind,
    direct: bool,
    model: Vec<u8>,
    /// Clusters that may be compressed: a discard leaves parts of them as they are.
    compressed: HashSet<u64>,
    /// The content when a snapshot was taken.
    snapshot: Option<Vec<u8>>,
}

fn run(what: &str, program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{what}: {program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Round {
    fn new(seed: u64) -> Self {
        let mut rng = Rng(seed.wrapping_mul(7919));
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let cluster = 512 << rng.pick(&[0, 0, 1, 2, 3, 4, 5, 7, 7, 9, 12]);
        let version_2 = rng.one_in(5);
        let refcount_bits = if version_2 { 16 } else { 1 << rng.below(7) };
        let zstd = !version_2 && rng.one_in(2);
        let size = ((64 + rng.below(200)) * cluster.min(16384)).min(3 << 20) + rng.below(8) * 512;
        let mut options = format!(
            "cluster_size={cluster},compat={}",
            if version_2 { "0.10" } else { "1.1" }
        );
        if !version_2 {
            options += &format!(
                ",refcount_bits={refcount_bits},compression_type={},lazy_refcounts={}",
                if zstd { "zstd" } else { "zlib" },
                if rng.one_in(4) { "on" } else { "off" }
            );
        }
        let extended = !version_2 && cluster >= 16384 && rng.one_in(2);
        if extended {
            options += ",extended_l2=on";
        }
        let data_file = (!version_2 && rng.one_in(4)).then(|| rng.one_in(2));
        if let Some(raw) = data_file {
            let data = dir.path().join("data");
            options += &format!(",data_file={}", data.display());
            options += if raw { ",data_file_raw=on" } else { "" };
        }
        let engine = rng.pick(&EngineKind::ALL);
        Self {
            seed,
            image: dir.path().join("top.qcow2"),
            dir,
            options,
            cluster,
            unit: if extended { cluster / 32 } else { cluster },
            version_2,
            data_file,
            backing: match rng.below(4) {
                0 => size,
                1 => rng.below(size / 512) * 512,
                _ => 0,
            } * u64::from(data_file != Some(true)),
            backing_format: rng.pick(&["raw", "qcow2"]),
            engine,
            direct: engine == EngineKind::LinuxAio || rng.one_in(4),
            model: vec![0; size as usize],
            compressed: HashSet::new(),
            snapshot: None,
            rng,
        }
    }

    fn what(&self) -> String {
        format!(
            "round {} ({}, backing {} {}, {} direct {}; PLATTER_ROUND={})",
            self.seed,
            self.options,
            self.backing_format,
            self.backing,
            self.engine,
            self.direct,
            self.seed
        )
    }

    fn name(&self) -> &str {
        self.image.to_str().unwrap()
    }

    fn size(&self) -> u64 {
        self.model.len() as u64
    }

    fn make(&mut self) {
        let what = self.what();
        let size = self.size().to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2", "-o", &self.options];
        if self.backing > 0 {
            let base = self.dir.path().join("base");
            let bytes: Vec<u8> = (0..self.backing).map(|at| (at / 97 % 251) as u8).collect();
            if self.backing_format == "raw" {
                fs::write(&base, &bytes).unwrap();
            } else {
                let plain = self.dir.path().join("plain");
                fs::write(&plain, &bytes).unwrap();
                let compressed = if self.rng.one_in(2) { "-c" } else { "-q" };
                let (plain, base) = (plain.to_str().unwrap(), base.to_str().unwrap());
                run(
                    &what,
                    "qemu-img",
                    &[
                        "convert", compressed, "-f", "raw", "-O", "qcow2", plain, base,
                    ],
                );
            }
            self.model[..bytes.len()].copy_from_slice(&bytes);
            args.extend(["-b", "base", "-F", self.backing_format]);
        }
        let image = self.name().to_owned();
        args.extend([image.as_str(), size.as_str()]);
        run(&what, "qemu-img", &args);
    }

    fn range(&mut self, unit: u64) -> (u64, u64) {
        let size = self.size();
        let start = self.rng.below(size / unit) * unit;
        let most = if self.rng.one_in(8) {
            size
        } else {
            3 * self.cluster + 2048
        };
        let len = (1 + self.rng.below(most)).next_multiple_of(unit);
        (start, len.min((size - start) / unit * unit))
    }

    /// Whole clusters, up to the end of the disk.
    fn clusters(&mut self) -> (u64, u64) {
        let count = self.size().div_ceil(self.cluster);
        let first = self.rng.below(count);
        let len = 1 + self.rng.below(3);
        let start = first * self.cluster;
        (start, (len * self.cluster).min(self.size() - start))
    }

    /// The part of a discarded range that becomes zero: what there is of whole units.
    fn discarded(&mut self, start: u64, len: u64, unit: u64) {
        if self.version_2 && self.backing > 0 {
            return;
        }
        let end = start + len;
        let first = start.next_multiple_of(unit);
        let last = if end == self.size() {
            end
        } else {
            end / unit * unit
        };
        if first < last {
            self.model[first as usize..last as usize].fill(0);
        }
    }

    fn qemu_turn(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..4 + self.rng.below(8) {
            let (start, len) = self.range(512);
            let value = self.rng.below(255) + 1;
            let model = &mut self.model;
            let mut fill = |start: u64, len: u64, value: u64| {
                model[start as usize..(start + len) as usize].fill(value as u8);
            };
            match self.rng.below(8) {
                0 => {
                    fill(start, len, 0);
                    commands.push(format!("write -z {start} {len}"));
                }
                1 => {
                    fill(start, len, 0);
                    commands.push(format!("write -z -u {start} {len}"));
                }
                2 if !(self.version_2 && self.backing > 0) => {
                    self.discarded(start, len, self.cluster);
                    commands.push(format!("discard {start} {len}"));
                }
                4 => commands.push("flush".into()),
                _ => {
                    fill(start, len, value);
                    commands.push(format!("write -P {value} {start} {len}"));
                }
            }
        }
        let mut args = vec!["-f", "qcow2", "-d", "unmap"];
        for command in &commands {
            args.extend(["-c", command]);
        }
        let name = self.name().to_owned();
        args.push(&name);
        let output = run(&self.what(), "qemu-io", &args);
        assert!(
            !output.contains("failed"),
            "{}: {commands:?}: {output}",
            self.what()
        );
        for _ in 0..self.rng.below(3) {
            self.qemu_compresses();
        }
    }

    /// QEMU writes a compressed cluster, unless there is a cluster already: then it refuses.
    fn qemu_compresses(&mut self) {
        if self.data_file.is_some() {
            return;
        }
        let (start, len) = self.clusters();
        let len = len.min(self.cluster);
        let value = self.rng.below(255) + 1;
        let command = format!("write -c -P {value} {start} {len}");
        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &command, self.name()])
            .output()
            .unwrap();
        if output.status.success() {
            self.compressed.insert(start / self.cluster);
            self.model[start as usize..(start + len) as usize].fill(value as u8);
        } else {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            let refused = text.contains("Input/output error");
            assert!(refused, "{}: {command}: {text}", self.what());
        }
    }

    fn open(&self, read_only: bool) -> Disk {
        let options = OpenOptions::new()
            .engine(self.engine)
            .direct(self.direct)
            .metadata_cache_size(if self.seed.is_multiple_of(3) {
                0
            } else {
                1 << 20
            })
            .read_only(read_only);
        match options.open_disk(&self.image) {
            Ok(disk) => disk,
            Err(error) => panic!("{}: {error}", self.what()),
        }
    }

    fn data(&mut self, len: u64) -> Vec<u8> {
        if self.rng.one_in(3) {
            return vec![self.rng.below(256) as u8; len as usize];
        }
        let mut seed = Rng(self.rng.next());
        (0..len.div_ceil(8))
            .flat_map(|_| seed.next().to_le_bytes())
            .take(len as usize)
            .collect()
    }

    fn platter_turn(&mut self) {
        let disk = self.open(false);
        let mut turn = Turn {
            io: disk.create_async_io(16).unwrap(),
            busy: Vec::new(),
            next: 0,
            what: self.what(),
        };
        for _ in 0..10 + self.rng.below(30) {
            let unit = if self.rng.one_in(3) { 1 } else { 512 };
            let (start, len) = self.range(unit);
            if len == 0 {
                continue;
            }
            let end = (start + len) as usize;
            let here = start as usize..end;
            let op = match self.rng.below(12) {
                0 | 1 => {
                    self.model[here].fill(0);
                    RequestOp::WriteZeroes {
                        offset: start,
                        len,
                        may_unmap: self.rng.one_in(2),
                    }
                }
                2 => {
                    let parts = [start / self.cluster, (start + len - 1) / self.cluster];
                    let compressed = parts.iter().any(|at| self.compressed.contains(at));
                    let unit = if compressed { self.cluster } else { self.unit };
                    let (start, len) = if compressed {
                        let end = start + len;
                        let end = if end == self.size() {
                            end
                        } else {
                            end / unit * unit
                        };
                        let start = start.next_multiple_of(unit);
                        (start.min(end), end.saturating_sub(start))
                    } else {
                        (start, len)
                    };
                    self.discarded(start, len, unit);
                    RequestOp::Discard { offset: start, len }
                }
                3 => RequestOp::Flush,
                4 => {
                    // Compressed data and changes of the size need a quiet queue.
                    turn.finish();
                    self.quiet(&disk);
                    continue;
                }
                5 | 6 => {
                    turn.wait_for(start, len);
                    let mut bytes = vec![0; len as usize];
                    turn.finish();
                    disk.read_at(&mut bytes, start).unwrap();
                    assert!(bytes == self.model[here], "{}: read", self.what());
                    continue;
                }
                _ => {
                    let bytes = self.data(len);
                    self.model[here].copy_from_slice(&bytes);
                    RequestOp::Write {
                        offset: start,
                        buffers: Buffers::owned(AlignedBuf::from_slice(&bytes)),
                        fua: self.rng.one_in(8),
                    }
                }
            };
            turn.wait_for(start, len);
            turn.submit(op, start, len);
        }
        turn.finish();
        drop(turn);
        disk.close().unwrap();
    }

    fn quiet(&mut self, disk: &Disk) {
        if !self.rng.one_in(4) {
            let (start, len) = self.clusters();
            let len = len.min(self.cluster);
            let bytes = self.data(len);
            if self.data_file.is_some() {
                let error = disk.write_compressed(&bytes, start).unwrap_err();
                assert_eq!(error.kind(), block::ErrorKind::Unsupported);
                return;
            }
            disk.write_compressed(&bytes, start).unwrap();
            self.compressed.insert(start / self.cluster);
            self.model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
            return;
        }
        if self.snapshot.is_some() {
            // QEMU wants the sizes of disk and snapshot to be the same in what follows.
            return;
        }
        let sectors = self.size() / 512;
        let size = (sectors / 2 + self.rng.below(sectors)).max(1) * 512;
        match disk.resize(size) {
            Ok(()) => {
                self.model.resize(size as usize, 0);
                assert_eq!(disk.size(), size);
            }
            Err(error) => assert_eq!(
                error.kind(),
                block::ErrorKind::Unsupported,
                "{}: {error}",
                self.what()
            ),
        }
    }

    fn compare(&self, when: &str) {
        let what = self.what();
        let name = self.name();
        run(
            &format!("{what} {when}"),
            "qemu-img",
            &["check", "-q", "-f", "qcow2", name],
        );
        let plain = self.dir.path().join("now");
        self.extract(&plain, &[]);
        let seen = fs::read(&plain).unwrap();
        assert_same(&seen, &self.model, &format!("{what} {when}: QEMU reads"));
        if self.data_file == Some(true) {
            let mut data = fs::read(self.dir.path().join("data")).unwrap();
            // QEMU makes it a whole number of clusters long.
            data.truncate(self.model.len());
            assert_same(
                &data,
                &self.model,
                &format!("{what} {when}: the raw data file"),
            );
        }
        if let Some(snapshot) = &self.snapshot {
            self.extract(&plain, &["-l", "s"]);
            let seen = fs::read(&plain).unwrap();
            assert_same(&seen, snapshot, &format!("{what} {when}: the snapshot"));
        }
        let disk = self.open(true);
        let mut bytes = vec![0xa5; self.model.len()];
        disk.read_at(&mut bytes, 0).unwrap();
        assert_same(
            &bytes,
            &self.model,
            &format!("{what} {when}: Platter reads"),
        );
    }

    fn extract(&self, to: &Path, more: &[&str]) {
        let mut args = vec!["convert", "-f", "qcow2", "-O", "raw"];
        args.extend(more);
        args.extend([self.name(), to.to_str().unwrap()]);
        run(&self.what(), "qemu-img", &args);
    }

    fn play(&mut self) {
        self.make();
        let turns = 3;
        // A shared cluster is counted twice.
        let can_share = !self.options.contains("refcount_bits=1,") && self.data_file.is_none();
        let snapshot_at = if can_share && self.rng.one_in(3) {
            1
        } else {
            turns
        };
        for turn in 0..turns {
            if turn == snapshot_at {
                run(
                    &self.what(),
                    "qemu-img",
                    &["snapshot", "-c", "s", self.name()],
                );
                self.snapshot = Some(self.model.clone());
            }
            if self.rng.one_in(2) {
                self.qemu_turn();
            }
            self.platter_turn();
            self.compare(&format!("after turn {turn}"));
        }
    }
}

fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at} is {:#x}, expected {:#x}",
            found[at], expected[at]
        );
    }
}

/// Requests of one turn in flight; none overlaps another.
struct Turn {
    io: Box<dyn AsyncIo>,
    busy: Vec<(u64, u64, u64)>,
    next: u64,
    what: String,
}

impl Turn {
    fn submit(&mut self, op: RequestOp, start: u64, len: u64) {
        while self.io.in_flight() == self.io.capacity() {
            self.reap();
        }
        self.next += 1;
        self.busy.push((self.next, start, start + len));
        let mut batch = vec![Request { id: self.next, op }];
        assert_eq!(self.io.submit(&mut batch), 1);
    }

    fn reap(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let mut out = Vec::new();
        while self.io.reap(&mut out) == 0 {
            assert!(Instant::now() < deadline, "{}: a request hangs", self.what);
            self.io.wait(Some(Duration::from_secs(5))).unwrap();
        }
        for done in out {
            assert_eq!(done.result, Ok(()), "{}", self.what);
            self.busy.retain(|(id, _, _)| *id != done.id);
        }
    }

    fn wait_for(&mut self, start: u64, len: u64) {
        while self
            .busy
            .iter()
            .any(|(_, first, end)| *first < start + len && start < *end)
        {
            self.reap();
        }
    }

    fn finish(&mut self) {
        while self.io.in_flight() > 0 {
            self.reap();
        }
    }
}

#[test]
fn platter_and_qemu_agree() {
    let variable = |name| env::var(name).ok().and_then(|text| text.parse().ok());
    if let Some(seed) = variable("PLATTER_ROUND") {
        Round::new(seed).play();
        return;
    }
    let start = variable("PLATTER_START").unwrap_or(0);
    for seed in start..start + variable("PLATTER_ROUNDS").unwrap_or(ROUNDS) {
        Round::new(seed).play();
    }
}
