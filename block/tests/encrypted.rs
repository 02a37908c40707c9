//! Encrypted images, made by QEMU and here, read and written by both in turns.

#![allow(clippy::unwrap_used)]

mod qcow2_support;

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use block::{
    AsyncDiskFile, Disk, DiskFile, ErrorKind, Format, OpenOptions,
    crypto::{
        KeyChange, Secret,
        cipher::{CipherAlgorithm, CipherMode, CipherSpec, IvGenerator},
        hash::HashAlgorithm,
        luks::LuksOptions,
    },
    formats::{
        luks,
        qcow2::{
            check::{Repair, check},
            create::{CreateOptions, Encrypt, Preallocation, create},
            header::Header,
        },
    },
    io::{AlignedBuf, Buffers, Completion, EngineKind, Request, RequestOp},
    offline::{OfflineOptions, with_file},
};
use qcow2_support::{Random, temp_dir, tool, try_tool};
use tempfile::TempDir;

const PASSWORD: &str = "open sesame";
const SIZE: u64 = 3 << 20;

fn secret() -> Secret {
    Secret::new(PASSWORD.into())
}

fn quick() -> LuksOptions {
    LuksOptions {
        iter_time: Duration::from_millis(1),
        ..LuksOptions::default()
    }
}

/// How an image is encrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Luks,
    Qcow2Luks,
    Qcow2Aes,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Luks, Self::Qcow2Luks, Self::Qcow2Aes];

    fn format(self) -> Format {
        match self {
            Kind::Luks => Format::Luks,
            Kind::Qcow2Luks | Kind::Qcow2Aes => Format::Qcow2,
        }
    }

    fn prefix(self) -> &'static str {
        if self == Kind::Luks { "" } else { "encrypt." }
    }

    /// QEMU's name of an image whose secret is `s`.
    fn spec(self, path: &Path) -> String {
        let (format, prefix) = (self.format(), self.prefix());
        let path = path.to_str().unwrap();
        format!("driver={format},file.filename={path},{prefix}key-secret=s")
    }

    fn qemu_create(self, path: &Path, more: &str) {
        let prefix = self.prefix();
        let options = match self {
            Kind::Luks => format!("key-secret=s,iter-time=10{more}"),
            Kind::Qcow2Luks => {
                format!("{prefix}format=luks,{prefix}key-secret=s,{prefix}iter-time=10{more}")
            }
            Kind::Qcow2Aes => format!("{prefix}format=aes,{prefix}key-secret=s{more}"),
        };
        let size = SIZE.to_string();
        tool(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                self.format().name(),
                "--object",
                &object(),
                "-o",
                &options,
                path.to_str().unwrap(),
                &size,
            ],
        );
    }

    fn create(self, path: &Path, cluster_size: u64) {
        let encrypt = match self {
            Kind::Luks => return create_luks(path, quick(), SIZE),
            Kind::Qcow2Luks => Encrypt::Luks {
                options: quick(),
                secret: secret(),
            },
            Kind::Qcow2Aes => Encrypt::Aes,
        };
        create_qcow2(
            path,
            &CreateOptions {
                size: SIZE,
                cluster_size,
                encrypt: Some(encrypt),
                ..CreateOptions::default()
            },
        );
    }

    fn check(self, path: &Path, what: &str) {
        if self != Kind::Luks {
            let output = tool(
                "qemu-img",
                &[
                    "check",
                    "--object",
                    &object(),
                    "--image-opts",
                    &self.spec(path),
                ],
            );
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("No errors were found"), "{what}: {text}");
        }
    }
}

fn object() -> String {
    format!("secret,id=s,data={PASSWORD}")
}

fn create_luks(path: &Path, luks: LuksOptions, size: u64) {
    let options = luks::create::CreateOptions {
        size,
        luks,
        secret: secret(),
        preallocation: luks::create::Preallocation::Off,
    };
    with_file(path, OfflineOptions::create(), async |io, file| {
        luks::create::create(io, file, &options).await
    })
    .unwrap();
}

fn create_qcow2(path: &Path, options: &CreateOptions) {
    with_file(path, OfflineOptions::create(), async |io, file| {
        create(io, file, options).await
    })
    .unwrap();
}

fn open(path: &Path) -> Disk {
    OpenOptions::new().key(secret()).open_disk(path).unwrap()
}

fn read_all(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What QEMU reads.
fn qemu_reads(dir: &TempDir, spec: &str) -> Vec<u8> {
    let plain = dir.path().join("plain");
    tool(
        "qemu-img",
        &[
            "convert",
            "--object",
            &object(),
            "--image-opts",
            spec,
            "-O",
            "raw",
            plain.to_str().unwrap(),
        ],
    );
    fs::read(plain).unwrap()
}

fn qemu_io(spec: &str, commands: &[String]) {
    let object = object();
    let mut args = vec!["--object", &object, "--image-opts"];
    for command in commands {
        args.extend(["-c", command]);
    }
    args.push(spec);
    let output = tool("qemu-io", &args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("failed"), "{commands:?}: {text}");
}

fn assert_same(seen: &[u8], model: &[u8], what: &str) {
    assert_eq!(seen.len(), model.len(), "{what}: length");
    let differs = seen.iter().zip(model).position(|(seen, is)| seen != is);
    assert_eq!(differs, None, "{what}: first difference");
}

/// An image and what it should hold.
struct Pair {
    dir: TempDir,
    path: PathBuf,
    kind: Kind,
    model: Vec<u8>,
    rng: Random,
    what: String,
}

impl Pair {
    fn new(kind: Kind, seed: u64, what: &str) -> Self {
        let dir = temp_dir();
        Self {
            path: dir.path().join("image"),
            dir,
            kind,
            model: vec![0; SIZE as usize],
            rng: Random(seed),
            what: format!("{kind:?} {what}"),
        }
    }

    fn range(&mut self, unit: u64) -> (u64, u64) {
        let start = self.rng.below(SIZE / unit) * unit;
        let most = [2000, 70_000, 1 << 20][self.rng.below(3) as usize];
        let len = (1 + self.rng.below(most)).next_multiple_of(unit);
        (start, len.min(SIZE - start))
    }

    fn fill(&mut self, start: u64, len: u64, value: u8) {
        self.model[start as usize..(start + len) as usize].fill(value);
    }

    fn qemu_turn(&mut self) {
        let mut commands = Vec::new();
        for _ in 0..8 {
            let (start, len) = self.range(512);
            let value = self.rng.below(255) as u8 + 1;
            self.fill(start, len, value);
            commands.push(format!("write -P {value} {start} {len}"));
            let (start, len) = self.range(512);
            self.fill(start, len, 0);
            commands.push(format!("write -z {start} {len}"));
        }
        qemu_io(&self.kind.spec(&self.path), &commands);
    }

    fn write(&mut self, disk: &Disk, unit: u64) {
        let (start, len) = self.range(unit);
        let mut rng = Random(self.rng.next());
        let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
        disk.write_at(&bytes, start).unwrap();
        self.model[start as usize..(start + len) as usize].copy_from_slice(&bytes);
    }

    fn our_turn(&mut self) {
        let disk = open(&self.path);
        for round in 0..12 {
            let unit = if round % 2 == 0 { 512 } else { 1 };
            self.write(&disk, unit);
            let (start, len) = self.range(1);
            self.fill(start, len, 0);
            disk.write_zeroes(start, len, round % 3 == 0).unwrap();
            let (start, len) = self.range(1);
            let mut seen = vec![0; len as usize];
            disk.read_at(&mut seen, start).unwrap();
            let model = &self.model[start as usize..(start + len) as usize];
            assert_same(&seen, model, &self.what);
        }
        disk.close().unwrap();
    }

    fn compare(&self, when: &str) {
        let what = format!("{} {when}", self.what);
        self.kind.check(&self.path, &what);
        let seen = qemu_reads(&self.dir, &self.kind.spec(&self.path));
        // A raw target of QEMU ends where the disk does.
        assert_same(&seen, &self.model, &format!("{what}: QEMU reads"));
        let seen = read_all(&open(&self.path));
        assert_same(&seen, &self.model, &format!("{what}: Platter reads"));
    }

    fn turns(&mut self) {
        self.qemu_turn();
        self.compare("after QEMU wrote");
        self.our_turn();
        self.compare("after Platter wrote");
        self.qemu_turn();
        self.compare("after both wrote");
    }

    /// A new LUKS volume reads as whatever its bytes decrypt to.
    fn clear(&mut self) {
        let disk = open(&self.path);
        disk.write_at(&self.model, 0).unwrap();
        disk.close().unwrap();
    }
}

#[test]
fn images_of_both_are_read_and_written_by_both() {
    for (number, kind) in Kind::ALL.into_iter().enumerate() {
        for (cluster, more) in [
            (512, ""),
            (4096, ",compat=0.10"),
            (65536, ""),
            (2 << 20, ""),
            (65536, ",extended_l2=on"),
            (65536, ",data_file=DATA"),
        ] {
            for ours in [false, true] {
                // QEMU takes a second for each new image: it makes what is special.
                if (ours && !more.is_empty()) || (!ours && more.is_empty() && cluster != 65536) {
                    continue;
                }
                let what = format!("cluster {cluster}{more}, made here: {ours}");
                let mut pair = Pair::new(kind, cluster + number as u64, &what);
                if ours {
                    kind.create(&pair.path, cluster);
                } else if kind == Kind::Luks {
                    kind.qemu_create(&pair.path, "");
                } else {
                    let data = pair.dir.path().join("data");
                    let more = more.replace("DATA", data.to_str().unwrap());
                    kind.qemu_create(&pair.path, &format!(",cluster_size={cluster}{more}"));
                }
                if kind == Kind::Luks {
                    pair.clear();
                }
                pair.turns();
            }
            if kind == Kind::Luks && cluster == 4096 {
                // The format has no clusters: once is enough.
                break;
            }
        }
    }
}

#[test]
fn every_cipher_that_qemu_has_gives_the_same_bytes() {
    let mut tried = 0;
    for algorithm in CipherAlgorithm::ALL {
        for (mode, iv, iv_hash, hash) in [
            (
                CipherMode::Xts,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Sha1,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Plain,
                None,
                HashAlgorithm::Sha512,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Ripemd160,
            ),
            (
                CipherMode::Cbc,
                IvGenerator::Essiv,
                Some(HashAlgorithm::Sha256),
                HashAlgorithm::Sha256,
            ),
            (
                CipherMode::Ecb,
                IvGenerator::Plain64,
                None,
                HashAlgorithm::Sha224,
            ),
            (
                CipherMode::Xts,
                IvGenerator::Essiv,
                Some(HashAlgorithm::Md5),
                HashAlgorithm::Sha384,
            ),
        ] {
            let spec = CipherSpec {
                algorithm,
                mode,
                iv,
                iv_hash,
            };
            if spec.check().is_err() {
                continue;
            }
            // Made here: QEMU takes a second for each new volume.
            let dir = temp_dir();
            let path = dir.path().join("image");
            let luks = LuksOptions {
                spec,
                hash,
                ..quick()
            };
            create_luks(&path, luks, 256 << 10);
            let (object, name) = (object(), Kind::Luks.spec(&path));
            let args = ["--object", &object, "--image-opts", "-c", "length", &name];
            let opened = try_tool("qemu-io", &args);
            if !String::from_utf8_lossy(&opened.stdout).contains("256 KiB") {
                // This QEMU was built without it.
                continue;
            }
            tried += 1;
            let what = format!("{spec:?} {hash}");
            let write = [
                "write -P 119 0 256k".to_owned(),
                "write -P 7 1k 512".to_owned(),
            ];
            qemu_io(&name, &write);
            let disk = open(&path);
            let seen = read_all(&disk);
            assert!(seen[..1024].iter().all(|byte| *byte == 119), "{what}");
            assert!(seen[1024..1536].iter().all(|byte| *byte == 7), "{what}");
            assert!(seen[1536..].iter().all(|byte| *byte == 119), "{what}");
            let data: Vec<u8> = (0..256 << 10).map(|at: u32| (at / 300) as u8).collect();
            disk.write_at(&data, 0).unwrap();
            disk.close().unwrap();
            assert_same(&qemu_reads(&dir, &name), &data, &what);
        }
    }
    assert!(tried >= 40, "QEMU opened only {tried} of the images");
}

/// Guest memory as a device would give it.
fn request(id: u64, op: RequestOp) -> Request {
    Request { id, op }
}

#[test]
fn every_engine_decrypts_and_leaves_what_it_writes_alone() {
    for kind in Kind::ALL {
        for (engine, direct) in [
            (EngineKind::Sync, false),
            (EngineKind::IoUring, false),
            (EngineKind::IoUring, true),
            (EngineKind::LinuxAio, true),
        ] {
            let what = format!("{kind:?} {engine} direct {direct}");
            let dir = temp_dir();
            let path = dir.path().join("image");
            kind.create(&path, 65536);
            let options = OpenOptions::new()
                .key(secret())
                .engine(engine)
                .direct(direct);
            let disk = options.open_disk(&path).unwrap();
            let mut io = disk.create_async_io(8).unwrap();
            let mut rng = Random(5);
            let mut run = |op: RequestOp| -> Completion {
                let mut batch = vec![request(1, op)];
                assert_eq!(io.submit(&mut batch), 1);
                let mut done = Vec::new();
                while io.reap(&mut done) == 0 {
                    io.wait(None).unwrap();
                }
                let completion = done.pop().unwrap();
                assert_eq!(completion.result, Ok(()), "{what}");
                completion
            };
            // Small ones inline, large ones on the pool, odd ones with parts of sectors.
            for (offset, len) in [(0, 4096), (512, 1 << 20), (70_001, 131), (1 << 20, 300_000)] {
                let bytes: Vec<u8> = (0..len).map(|_| rng.next() as u8).collect();
                let buffers = Buffers::owned(AlignedBuf::from_slice(&bytes));
                let done = run(RequestOp::Write {
                    offset,
                    buffers,
                    fua: len == 131,
                });
                let kept = done.buffers.unwrap().into_owned().unwrap();
                assert!(kept[..] == bytes[..], "{what}: the source changed");
                let buffers = Buffers::owned(AlignedBuf::zeroed(len));
                let done = run(RequestOp::Read { offset, buffers });
                let seen = done.buffers.unwrap().into_owned().unwrap();
                assert_same(&seen, &bytes, &format!("{what} {offset}+{len}"));
            }
            run(RequestOp::Flush);
            drop(io);
            let model = read_all(&disk);
            disk.close().unwrap();
            assert_same(&qemu_reads(&dir, &kind.spec(&path)), &model, &what);
            kind.check(&path, &what);
        }
    }
}

#[test]
fn sectors_written_by_halves_at_once_keep_both() {
    let dir = temp_dir();
    let path = dir.path().join("image");
    create_luks(&path, quick(), SIZE);
    let disk = open(&path);
    disk.write_at(&vec![0; 8192], 0).unwrap();
    std::thread::scope(|scope| {
        for half in 0..4u64 {
            let disk = disk.clone();
            scope.spawn(move || {
                for round in 0..200u64 {
                    let offset = (round % 16) * 512 + half * 128;
                    disk.write_at(&[half as u8 + 1; 128], offset).unwrap();
                }
            });
        }
    });
    let mut seen = vec![0; 8192];
    disk.read_at(&mut seen, 0).unwrap();
    for (at, byte) in seen.iter().enumerate() {
        assert_eq!(usize::from(*byte), at % 512 / 128 + 1, "at {at}");
    }
}

#[test]
fn a_key_is_needed_and_has_to_be_the_right_one() {
    for kind in Kind::ALL {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let before = fs::read(&path).unwrap();
        let error = OpenOptions::new().open_disk(&path).err().unwrap();
        let option = format!("'{}key-secret' is required", kind.prefix());
        assert!(error.to_string().contains(&option), "{kind:?}: {error}");
        assert_eq!(error.kind(), ErrorKind::Denied, "{kind:?}");
        if kind != Kind::Qcow2Aes {
            let wrong = OpenOptions::new().key(Secret::new(b"guess".to_vec()));
            let error = wrong.open_disk(&path).err().unwrap();
            assert!(error.to_string().contains("Invalid password"), "{error}");
        }
        // Its header can be seen all the same, its data not.
        let locked = OpenOptions::new().locked(true).open_disk(&path).unwrap();
        assert_eq!(locked.size(), SIZE);
        assert!(locked.info().encrypted);
        assert_eq!(locked.format(), kind.format());
        if kind == Kind::Luks {
            assert!(locked.read_at(&mut [0; 512], 0).is_err());
        }
        let refused = locked.write_at(&[1; 512], 0).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Denied, "{refused}");
        drop(locked);
        assert!(fs::read(&path).unwrap()[..1 << 16] == before[..1 << 16]);
        let debug = format!("{:?}", OpenOptions::new().key(secret()));
        assert!(
            !debug.contains(PASSWORD) && !debug.contains("111, 112"),
            "{debug}"
        );
    }
}

#[test]
fn an_overlay_and_its_base_have_keys_of_their_own() {
    for (top, base) in [
        (Kind::Qcow2Luks, Kind::Qcow2Aes),
        (Kind::Qcow2Aes, Kind::Qcow2Luks),
        (Kind::Qcow2Luks, Kind::Luks),
    ] {
        let dir = temp_dir();
        let (below, above) = (dir.path().join("base"), dir.path().join("top"));
        base.create(&below, 65536);
        let mut model: Vec<u8> = (0..SIZE).map(|at| (at / 1000) as u8).collect();
        let disk = open(&below);
        disk.write_at(&model, 0).unwrap();
        disk.close().unwrap();
        let other = Secret::new(b"another".to_vec());
        let encrypt = match top {
            Kind::Qcow2Aes => Encrypt::Aes,
            _ => Encrypt::Luks {
                options: quick(),
                secret: other.clone(),
            },
        };
        create_qcow2(
            &above,
            &CreateOptions {
                size: SIZE,
                encrypt: Some(encrypt),
                backing_file: Some(b"base".to_vec()),
                backing_format: Some(base.format().name().into()),
                ..CreateOptions::default()
            },
        );
        let options = OpenOptions::new().key(other);
        let error = options.clone().open_disk(&above).err().unwrap();
        assert!(error.to_string().contains("is required"), "{error}");
        let disk = options.backing_key(1, secret()).open_disk(&above).unwrap();
        let bytes: Vec<u8> = (0..5000u32).map(|at| (at * 7) as u8).collect();
        for offset in [300, 65536, 200_001, SIZE - 5000] {
            disk.write_at(&bytes, offset).unwrap();
            model[offset as usize..offset as usize + 5000].copy_from_slice(&bytes);
        }
        assert_same(&read_all(&disk), &model, &format!("{top:?} over {base:?}"));
        disk.close().unwrap();
        let base_options = format!(
            "backing.driver={},backing.file.filename={},backing.{}key-secret=s",
            base.format(),
            below.to_str().unwrap(),
            base.prefix()
        );
        let spec = format!(
            "driver=qcow2,file.filename={},encrypt.key-secret=t,{base_options}",
            above.to_str().unwrap()
        );
        let plain = dir.path().join("plain");
        let object = object();
        tool(
            "qemu-img",
            &[
                "convert",
                "--object",
                &object,
                "--object",
                "secret,id=t,data=another",
                "--image-opts",
                &spec,
                "-O",
                "raw",
                plain.to_str().unwrap(),
            ],
        );
        assert_same(
            &fs::read(plain).unwrap(),
            &model,
            &format!("{top:?}: QEMU reads"),
        );
    }
}

#[test]
fn snapshots_stay_readable() {
    for kind in [Kind::Qcow2Luks, Kind::Qcow2Aes] {
        let mut pair = Pair::new(kind, 3, "with a snapshot");
        kind.qemu_create(&pair.path, "");
        pair.our_turn();
        let then = pair.model.clone();
        let object = object();
        let spec = kind.spec(&pair.path);
        tool(
            "qemu-img",
            &[
                "snapshot",
                "--object",
                &object,
                "--image-opts",
                "-c",
                "s1",
                &spec,
            ],
        );
        pair.our_turn();
        pair.compare("after the snapshot");
        let old = OpenOptions::new()
            .key(secret())
            .read_only(true)
            .snapshot("s1")
            .open_disk(&pair.path)
            .unwrap();
        assert_same(&read_all(&old), &then, "the snapshot");
    }
}

#[test]
fn the_luks_header_is_counted_by_a_check_and_by_a_rebuild() {
    let dir = temp_dir();
    let path = dir.path().join("image");
    Kind::Qcow2Luks.create(&path, 4096);
    let disk = open(&path);
    disk.write_at(&[5; 100_000], 0).unwrap();
    disk.close().unwrap();
    let check_here = |repair| {
        let options = match repair {
            Repair::None => OfflineOptions::read(),
            _ => OfflineOptions::write(),
        };
        with_file(&path, options, async |io, file| {
            let mut header = Header::read_for_check(io, file).await?;
            check(io, file, &mut header, repair, &mut |_| {}).await
        })
        .unwrap()
    };
    assert!(check_here(Repair::None).is_clean());
    Kind::Qcow2Luks.check(&path, "as it was written");
    // Without its reference counts, a whole table of them.
    let mut image = fs::read(&path).unwrap();
    image[4096..2 * 4096].fill(0);
    fs::write(&path, &image).unwrap();
    assert!(!check_here(Repair::None).is_clean());
    check_here(Repair::All);
    assert!(check_here(Repair::None).is_clean());
    Kind::Qcow2Luks.check(&path, "rebuilt");
    let mut seen = [0; 100_000];
    open(&path).read_at(&mut seen, 0).unwrap();
    assert!(seen.iter().all(|byte| *byte == 5));
}

#[test]
fn compressed_writes_are_refused() {
    for kind in [Kind::Qcow2Luks, Kind::Qcow2Aes] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        let error = disk.write_compressed(&[0; 65536], 0).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    }
}

#[test]
fn preallocated_clusters_read_as_zeroes() {
    for preallocation in [Preallocation::Metadata, Preallocation::Full] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        create_qcow2(
            &path,
            &CreateOptions {
                size: SIZE,
                preallocation,
                encrypt: Some(Encrypt::Luks {
                    options: quick(),
                    secret: secret(),
                }),
                ..CreateOptions::default()
            },
        );
        Kind::Qcow2Luks.check(&path, "preallocated");
        let mut model = vec![0; SIZE as usize];
        let disk = open(&path);
        assert_same(&read_all(&disk), &model, "preallocated");
        let before = fs::metadata(&path).unwrap().len();
        disk.write_at(&[9; 1000], 70_000).unwrap();
        model[70_000..71_000].fill(9);
        disk.close().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), before);
        let spec = Kind::Qcow2Luks.spec(&path);
        assert_same(&qemu_reads(&dir, &spec), &model, "preallocated: QEMU reads");
    }
}

#[test]
fn sizes_change() {
    for kind in Kind::ALL {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        disk.write_at(&[3; 70_000], SIZE - 70_000).unwrap();
        disk.resize(SIZE - 1024).unwrap();
        disk.resize(SIZE * 2).unwrap();
        let mut seen = vec![0; 70_000];
        disk.read_at(&mut seen, SIZE - 70_000).unwrap();
        assert!(
            seen[..70_000 - 1024].iter().all(|byte| *byte == 3),
            "{kind:?}"
        );
        if kind != Kind::Luks {
            assert!(
                seen[70_000 - 1024..].iter().all(|byte| *byte == 0),
                "{kind:?}"
            );
        }
        disk.write_at(&[4; 512], SIZE * 2 - 512).unwrap();
        disk.close().unwrap();
        let seen = qemu_reads(&dir, &kind.spec(&path));
        assert_eq!(seen.len() as u64, SIZE * 2, "{kind:?}");
        assert!(
            seen[seen.len() - 512..].iter().all(|byte| *byte == 4),
            "{kind:?}"
        );
    }
}

#[test]
fn passwords_come_and_go() {
    for kind in [Kind::Luks, Kind::Qcow2Luks] {
        let dir = temp_dir();
        let path = dir.path().join("image");
        kind.create(&path, 65536);
        let disk = open(&path);
        disk.write_at(&[8; 4096], 0).unwrap();
        let add = |password: &str, slot| KeyChange::Add {
            new: Secret::new(password.into()),
            slot,
            iter_time: Duration::from_millis(1),
            force: false,
        };
        let erase = |old: Option<&str>, slot, force| KeyChange::Erase {
            old: old.map(|old| Secret::new(old.into())),
            slot,
            force,
        };
        let refused = |change: &KeyChange, expected: &str| {
            let error = disk.change_keys(change).unwrap_err().to_string();
            assert!(error.contains(expected), "{kind:?}: {error}");
        };
        disk.change_keys(&add("second", None)).unwrap();
        disk.change_keys(&add("third", Some(5))).unwrap();
        refused(&add("x", Some(5)), "Refusing to overwrite active keyslot 5");
        refused(&add("x", Some(8)), "Invalid keyslot 8");
        refused(&erase(None, None, false), "must be given");
        refused(&erase(Some("none"), None, true), "No keyslots match");
        refused(&erase(None, Some(4), false), "already erased");
        disk.change_keys(&erase(Some(PASSWORD), None, false))
            .unwrap();
        disk.change_keys(&erase(None, Some(1), false)).unwrap();
        refused(&erase(None, Some(5), false), "the only active keyslot");
        refused(
            &erase(Some("third"), None, false),
            "All the active keyslots",
        );
        disk.close().unwrap();
        let opens = |password: &str| {
            OpenOptions::new()
                .key(Secret::new(password.into()))
                .open_disk(&path)
        };
        assert!(opens(PASSWORD).is_err() && opens("second").is_err());
        let mut seen = [0; 4096];
        opens("third").unwrap().read_at(&mut seen, 0).unwrap();
        assert_eq!(seen, [8; 4096]);
        let spec = kind.spec(&path);
        let third = "secret,id=s,data=third";
        tool(
            "qemu-io",
            &[
                "--object",
                third,
                "--image-opts",
                "-c",
                "read -P 8 0 4k",
                &spec,
            ],
        );
        let disk = opens("third").unwrap();
        disk.change_keys(&erase(None, Some(5), true)).unwrap();
        drop(disk);
        assert!(opens("third").is_err(), "no password is left");
    }
}
