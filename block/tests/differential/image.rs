//! The image of a round: made by QEMU or here, and how both programs are told to open it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use block::{
    Disk, OpenOptions,
    crypto::{Secret, luks::LuksOptions},
    formats::qcow2::{
        create::{CreateOptions, Encrypt, create, create_with_data_file},
        header::CompressionType,
    },
    io::EngineKind,
    offline::{OfflineOptions, open_beside, with_file},
};

use crate::{random::Rng, shapes::Shape};

const PASSWORD: &str = "open sesame";

pub(crate) struct Image {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) path: PathBuf,
    pub(crate) shape: Shape,
    /// Of the disk, in the beginning.
    pub(crate) size: u64,
    engine: EngineKind,
    direct: bool,
    cache: u64,
    /// Written here instead of by QEMU, which takes a second to measure how fast it derives keys.
    ours: bool,
    number: u64,
}

impl Image {
    pub(crate) fn new(number: u64, shape: Shape, rng: &mut Rng) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let cluster = shape.number("cluster_size");
        let size = ((64 + rng.below(200)) * cluster.min(16384)).min(3 << 20) + rng.below(8) * 512;
        let engine = rng.pick(&EngineKind::ALL);
        Self {
            path: dir.path().join("top.qcow2"),
            dir,
            shape,
            size,
            engine,
            direct: engine == EngineKind::LinuxAio || rng.one_in(4),
            cache: if rng.one_in(3) { 0 } else { 1 << 20 },
            ours: shape.is("encrypt", "luks") && !rng.one_in(8),
            number,
        }
    }

    pub(crate) fn what(&self) -> String {
        format!(
            "round {} ({}, {} direct {}, made here {}; --round {})",
            self.number,
            self.options().join(","),
            self.engine,
            self.direct,
            self.ours,
            self.number
        )
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        !self.shape.is("encrypt", "none")
    }

    pub(crate) fn has_data_file(&self) -> bool {
        !self.shape.is("data_file", "none")
    }

    pub(crate) fn data_file(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn options(&self) -> Vec<String> {
        let shape = self.shape;
        let mut names = vec!["compat", "cluster_size"];
        if shape.is("compat", "1.1") {
            names.extend([
                "refcount_bits",
                "extended_l2",
                "compression_type",
                "lazy_refcounts",
            ]);
        }
        let mut all: Vec<String> = names
            .iter()
            .map(|name| format!("{name}={}", shape.get(name)))
            .collect();
        if self.has_data_file() {
            all.push(format!("data_file={}", self.data_file().display()));
        }
        if shape.is("data_file", "raw") {
            all.push("data_file_raw=on".into());
        }
        if self.is_encrypted() {
            all.push(format!("encrypt.format={}", shape.get("encrypt")));
            all.push("encrypt.key-secret=s".into());
        }
        if shape.is("encrypt", "luks") {
            all.push("encrypt.iter-time=10".into());
        }
        if let Some(format) = self.backing_format() {
            all.push(format!("backing_file=base,backing_fmt={format}"));
        }
        all
    }

    fn backing_format(&self) -> Option<&'static str> {
        match self.shape.get("backing") {
            "none" => None,
            "qcow2" => Some("qcow2"),
            _ => Some("raw"),
        }
    }

    /// Makes the image and its backing file; returns what the disk reads as.
    pub(crate) fn make(&self, rng: &mut Rng) -> Vec<u8> {
        let mut model = vec![0; self.size as usize];
        if self.backing_format().is_some() {
            let len = match self.shape.get("backing") {
                "short" => rng.below(self.size / 512) * 512,
                _ => self.size,
            };
            let bytes: Vec<u8> = (0..len).map(|at| (at / 97 % 251) as u8).collect();
            self.make_base(&bytes, rng.one_in(2));
            model[..bytes.len()].copy_from_slice(&bytes);
        }
        if self.ours {
            self.make_here();
        } else {
            let (options, size) = (self.options().join(","), self.size.to_string());
            let path = self.path.to_str().unwrap();
            let args = ["-q", "-f", "qcow2", "-o", options.as_str(), path, &size];
            self.img("create", &args, &[]);
        }
        model
    }

    fn make_base(&self, bytes: &[u8], compressed: bool) {
        let base = self.dir.path().join("base");
        if self.backing_format() == Some("raw") {
            return fs::write(&base, bytes).unwrap();
        }
        let plain = self.dir.path().join("plain");
        fs::write(&plain, bytes).unwrap();
        let how = if compressed { "-c" } else { "-q" };
        let (plain, base) = (plain.to_str().unwrap(), base.to_str().unwrap());
        let args = [how, "-f", "raw", "-O", "qcow2", plain, base];
        self.tool("qemu-img", &[&["convert"], &args[..]].concat());
    }

    fn make_here(&self) {
        let shape = self.shape;
        let on = |name| shape.is(name, "on");
        let options = CreateOptions {
            size: self.size,
            version: if shape.is("compat", "1.1") { 3 } else { 2 },
            cluster_size: shape.number("cluster_size"),
            refcount_bits: shape.number("refcount_bits") as u32,
            lazy_refcounts: on("lazy_refcounts"),
            compression_type: match shape.get("compression_type") {
                "zstd" => CompressionType::Zstd,
                _ => CompressionType::Zlib,
            },
            backing_file: self.backing_format().map(|_| b"base".to_vec()),
            backing_format: self.backing_format().map(str::to_owned),
            extended_l2: on("extended_l2"),
            data_file: self
                .has_data_file()
                .then(|| self.data_file().to_str().unwrap().to_owned()),
            data_file_raw: shape.is("data_file", "raw"),
            encrypt: Some(Encrypt::Luks {
                options: LuksOptions {
                    iter_time: Duration::from_millis(1),
                    ..LuksOptions::default()
                },
                secret: secret(),
            }),
            ..CreateOptions::default()
        };
        with_file(&self.path, OfflineOptions::create(), async |io, file| {
            if !self.has_data_file() {
                return create(io, file, &options).await;
            }
            let data = open_beside(io, &self.data_file(), OfflineOptions::create())?;
            create_with_data_file(io, file, data, &options).await
        })
        .unwrap_or_else(|error| panic!("{}: {error}", self.what()));
    }

    pub(crate) fn open(&self, read_only: bool) -> Disk {
        let mut options = OpenOptions::new()
            .engine(self.engine)
            .direct(self.direct)
            .metadata_cache_size(self.cache)
            .read_only(read_only);
        if self.is_encrypted() {
            options = options.key(secret());
        }
        match options.open_disk(&self.path) {
            Ok(disk) => disk,
            Err(error) => panic!("{}: {error}", self.what()),
        }
    }

    /// QEMU's name of the image, with its key.
    fn spec(&self) -> String {
        let path = self.path.display();
        let key = if self.is_encrypted() {
            ",encrypt.key-secret=s"
        } else {
            ""
        };
        format!("driver=qcow2,file.filename={path}{key}")
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let output = Command::new(program).args(args).output();
        output.unwrap_or_else(|error| panic!("{}: {program}: {error}", self.what()))
    }

    fn tool(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        let good = output.status.success();
        assert!(
            good,
            "{}: {program} {args:?}: {stdout}{stderr}",
            self.what()
        );
        stdout.into_owned()
    }

    /// `qemu-img COMMAND`, with the secret, `args` and `last`.
    fn img(&self, command: &str, args: &[&str], last: &[&str]) -> String {
        let secret = object();
        let head = [command, "--object", &secret];
        self.tool("qemu-img", &[&head, args, last].concat())
    }

    /// `qemu-img COMMAND ARGS IMAGE LAST`.
    pub(crate) fn qemu_img(&self, command: &str, args: &[&str], last: &[&str]) -> String {
        let spec = self.spec();
        self.img(
            command,
            &[&["--image-opts"], args, &[spec.as_str()]].concat(),
            last,
        )
    }

    /// Whether QEMU's bitmap command worked; it has no room for one in every header.
    pub(crate) fn add_bitmap(&self, name: &str) -> bool {
        let (secret, spec) = (object(), self.spec());
        let args = ["bitmap", "--object", &secret, "--image-opts", "--add"];
        let output = self.run("qemu-img", &[&args[..], &[&spec, name]].concat());
        output.status.success()
    }

    /// What qemu-io says.
    pub(crate) fn qemu_io(&self, commands: &[String]) -> String {
        let (secret, spec) = (object(), self.spec());
        let mut args = vec!["--object", &secret, "--image-opts", "-d", "unmap"];
        for command in commands {
            args.extend(["-c", command]);
        }
        args.push(&spec);
        let output = self.run("qemu-io", &args);
        String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr)
    }

    /// What QEMU reads: now, or at a snapshot.
    pub(crate) fn extract(&self, snapshot: Option<&str>) -> Vec<u8> {
        let to: &Path = &self.dir.path().join("now");
        let mut args = vec!["-O", "raw"];
        if let Some(snapshot) = snapshot {
            args.extend(["-l", snapshot]);
        }
        self.qemu_img("convert", &args, &[to.to_str().unwrap()]);
        fs::read(to).unwrap()
    }
}

fn secret() -> Secret {
    Secret::new(PASSWORD.into())
}

fn object() -> String {
    format!("secret,id=s,data={PASSWORD}")
}
