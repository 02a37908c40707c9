//! Random operations by Platter and by qemu-io in turns, on the same image: both must agree.
//!
//! `PLATTER_ROUNDS=N` runs N rounds of each combination instead of the few that are the default;
//! `PLATTER_SEED=S` starts elsewhere. A failure names the seed and the combination.

#![allow(clippy::unwrap_used)]

use std::{
    fmt::Write as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use block::{
    AsyncDiskFile, DiskFile, OpenOptions,
    io::{AlignedBuf, Buffers, EngineKind, Request, RequestOp},
};

const SIZE: u64 = 3 << 20;
const OPERATIONS: u64 = 12;

struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }

    fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.next(list.len() as u64) as usize]
    }
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// One operation, with the bytes it leaves.
#[derive(Clone, Copy, Debug)]
enum Operation {
    Write {
        offset: u64,
        len: u64,
        pattern: u8,
    },
    Zero {
        offset: u64,
        len: u64,
        unmap: bool,
    },
    /// Whole clusters: what is read afterwards is zero in version 3 and left alone where version 2
    /// has a backing file.
    Discard {
        offset: u64,
        len: u64,
    },
    Compressed {
        offset: u64,
        len: u64,
        pattern: u8,
    },
}

struct Case {
    cluster: u64,
    compat: &'static str,
    refcount_bits: u64,
    compression: &'static str,
    backing: Option<&'static str>,
    lazy: bool,
}

impl Case {
    fn random(random: &mut Random) -> Self {
        let compat = random.pick(&["1.1", "1.1", "0.10"]);
        let v3 = compat == "1.1";
        Self {
            cluster: random.pick(&[512, 1024, 4096, 65_536, 65_536, 2 << 20]),
            compat,
            refcount_bits: if v3 {
                random.pick(&[1, 2, 4, 8, 16, 32, 64])
            } else {
                16
            },
            compression: if v3 {
                random.pick(&["zlib", "zstd"])
            } else {
                "zlib"
            },
            backing: random.pick(&[None, Some("raw"), Some("qcow2")]),
            lazy: v3 && random.next(4) == 0,
        }
    }

    fn options(&self) -> String {
        let mut options = format!("cluster_size={},compat={}", self.cluster, self.compat);
        if self.compat == "1.1" {
            write!(
                options,
                ",refcount_bits={},compression_type={},lazy_refcounts={}",
                self.refcount_bits,
                self.compression,
                if self.lazy { "on" } else { "off" }
            )
            .unwrap();
        }
        options
    }

    /// A count of one bit cannot be shared by compressed clusters.
    fn compresses(&self) -> bool {
        self.refcount_bits > 1
    }

    fn operation(&self, random: &mut Random) -> Operation {
        let pattern = 1 + random.next(250) as u8;
        let sectors = SIZE / 512;
        let start = random.next(sectors);
        let most = (sectors - start).min(1 + random.next(400));
        let (offset, len) = (start * 512, (1 + random.next(most)) * 512);
        let clusters = SIZE.div_ceil(self.cluster);
        let first = random.next(clusters);
        let whole = (
            first * self.cluster,
            (1 + random.next((clusters - first).min(5))) * self.cluster,
        );
        let whole_len = whole.1.min(SIZE - whole.0);
        match random.next(8) {
            0 => Operation::Zero {
                offset,
                len,
                unmap: false,
            },
            1 => Operation::Zero {
                offset,
                len,
                unmap: true,
            },
            2 if self.compat == "1.1" || self.backing.is_none() => Operation::Discard {
                offset: whole.0,
                len: whole_len,
            },
            3 if self.compresses() => Operation::Compressed {
                offset: whole.0,
                len: self.cluster.min(SIZE - whole.0),
                pattern,
            },
            _ => Operation::Write {
                offset,
                len,
                pattern,
            },
        }
    }
}

/// QEMU does not compress over a cluster that is allocated: it writes plainly here.
fn for_qemu(operation: Operation) -> Operation {
    match operation {
        Operation::Compressed {
            offset,
            len,
            pattern,
        } => Operation::Write {
            offset,
            len,
            pattern,
        },
        other => other,
    }
}

fn apply(model: &mut [u8], operation: Operation) {
    let (offset, len, value) = match operation {
        Operation::Write {
            offset,
            len,
            pattern,
        }
        | Operation::Compressed {
            offset,
            len,
            pattern,
        } => (offset, len, pattern),
        Operation::Zero { offset, len, .. } | Operation::Discard { offset, len } => {
            (offset, len, 0)
        }
    };
    model[offset as usize..(offset + len) as usize].fill(value);
}

fn qemu(path: &Path, operations: &[Operation]) {
    let mut args = vec![
        "-f".to_owned(),
        "qcow2".to_owned(),
        "-d".to_owned(),
        "unmap".to_owned(),
    ];
    for operation in operations {
        args.push("-c".to_owned());
        args.push(match *operation {
            Operation::Write {
                offset,
                len,
                pattern,
            } => format!("write -q -P {pattern} {offset} {len}"),
            Operation::Compressed {
                offset,
                len,
                pattern,
            } => {
                format!("write -q -c -P {pattern} {offset} {len}")
            }
            Operation::Zero { offset, len, unmap } => {
                format!(
                    "write -q -z {} {offset} {len}",
                    if unmap { "-u" } else { "" }
                )
            }
            Operation::Discard { offset, len } => format!("discard -q {offset} {len}"),
        });
    }
    args.push(path.to_str().unwrap().to_owned());
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    run("qemu-io", &args);
}

/// The operations one after the other through a queue, except compressed writes, which the control
/// plane does.
fn platter(disk: &dyn AsyncDiskFile, operations: &[Operation]) {
    for operation in operations {
        let op = match *operation {
            Operation::Compressed {
                offset,
                len,
                pattern,
            } => {
                disk.write_compressed(&vec![pattern; len as usize], offset)
                    .unwrap();
                continue;
            }
            Operation::Write {
                offset,
                len,
                pattern,
            } => {
                let mut data = AlignedBuf::zeroed(len as usize);
                data.fill(pattern);
                RequestOp::Write {
                    offset,
                    buffers: Buffers::owned(data),
                    fua: pattern % 8 == 0,
                }
            }
            Operation::Zero { offset, len, unmap } => RequestOp::WriteZeroes {
                offset,
                len,
                may_unmap: unmap,
            },
            Operation::Discard { offset, len } => RequestOp::Discard { offset, len },
        };
        let mut io = disk.create_async_io(4).unwrap();
        io.submit(&mut vec![Request { id: 1, op }]);
        let mut out = Vec::new();
        while out.is_empty() {
            assert!(
                io.wait(Some(Duration::from_secs(60))).unwrap(),
                "{operation:?} hangs"
            );
            io.reap(&mut out);
        }
        assert_eq!(out[0].result, Ok(()), "{operation:?}");
    }
}

fn create(dir: &Path, case: &Case, model: &mut [u8]) -> PathBuf {
    let path = dir.join("image.qcow2");
    let name = path.to_str().unwrap();
    let options = case.options();
    let size = SIZE.to_string();
    let Some(format) = case.backing else {
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "-o", &options, name, &size],
        );
        return path;
    };
    // Shorter than the image: beyond its end the image reads as zeroes.
    let backing_len = (SIZE * 2 / 3) as usize;
    for (index, byte) in model[..backing_len].iter_mut().enumerate() {
        *byte = (index / 700 % 251) as u8;
    }
    let raw = dir.join("backing.raw");
    std::fs::write(&raw, &model[..backing_len]).unwrap();
    let backing = dir.join(format!("backing.{format}"));
    if format == "qcow2" {
        let args = ["convert", "-q", "-c", "-f", "raw", "-O", "qcow2"];
        let files = [raw.to_str().unwrap(), backing.to_str().unwrap()];
        run("qemu-img", &[&args[..], &files[..]].concat());
    }
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            &options,
            "-b",
            backing.to_str().unwrap(),
            "-F",
            format,
            name,
            &size,
        ],
    );
    path
}

fn agree(path: &Path, model: &[u8], dir: &Path, what: &str) {
    let name = path.to_str().unwrap();
    run("qemu-img", &["check", "-q", "-f", "qcow2", name]);
    let expected = dir.join("expected.raw");
    std::fs::write(&expected, model).unwrap();
    let output = Command::new("qemu-img")
        .args(["compare", "-f", "qcow2", "-F", "raw", name])
        .arg(&expected)
        .output()
        .unwrap();
    assert!(output.status.success(), "{what}: {output:?}");
}

#[test]
fn platter_and_qemu_agree() {
    let rounds = setting("PLATTER_ROUNDS", 3);
    let first = setting("PLATTER_SEED", 1);
    let engines = EngineKind::ALL;
    for number in 0..24 {
        let seed = first + number;
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let case = Case::random(&mut random);
        let engine = engines[number as usize % engines.len()];
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut model = vec![0; SIZE as usize];
        let path = create(dir.path(), &case, &mut model);
        for round in 0..rounds {
            let what = format!(
                "seed {seed} round {round} engine {engine} backing {:?} {}",
                case.backing,
                case.options()
            );
            let mut operations: Vec<Operation> = (0..OPERATIONS)
                .map(|_| case.operation(&mut random))
                .collect();
            for operation in &mut operations[(OPERATIONS / 2) as usize..] {
                *operation = for_qemu(*operation);
            }
            println!("{what}");
            for operation in &operations {
                apply(&mut model, *operation);
            }
            let (ours, theirs) = operations.split_at((OPERATIONS / 2) as usize);
            let disk = OpenOptions::new()
                .engine(engine)
                .direct(engine == EngineKind::LinuxAio)
                .open_disk(&path)
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            platter(&disk, ours);
            disk.close().unwrap();
            drop(disk);
            qemu(&path, theirs);
            agree(&path, &model, dir.path(), &what);
            let mut seen = vec![0; SIZE as usize];
            let disk = OpenOptions::new().read_only(true).open(&path).unwrap();
            disk.read_at(&mut seen, 0).unwrap();
            let differs = seen.iter().zip(&model).position(|(a, b)| a != b);
            assert_eq!(
                differs, None,
                "{what}: Platter reads other bytes than qemu-img"
            );
        }
    }
}
