//! The maintenance commands: the images they work on, and what each has to reach beside qemu-img.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
};

use crate::{Result, command::Program, load::Random, report::Bars, scratch::Scratch};

/// The images, gone when dropped, and the two programs.
pub struct Images {
    dir: Scratch,
    ours: PathBuf,
    peer: PathBuf,
}

impl Images {
    /// Makes them in a new folder below `dir`. The raw one, which the others are made from, has
    /// `size` bytes: two thirds files of this machine, a part random bytes, the rest never written.
    ///
    /// # Errors
    /// The host's, and the peer's, which converts.
    pub fn new(dir: &Path, size: u64, platter: &Path, qemu_img: &Path) -> Result<Self> {
        let dir = Scratch::new_in(dir)?;
        let ours = dir.path().join("qemu-img");
        std::os::unix::fs::symlink(platter.canonicalize()?, &ours)?;
        let lab = Self {
            dir,
            ours,
            peer: qemu_img.to_owned(),
        };
        lab.fill(size)?;
        lab.qemu(&["convert", "-O", "qcow2", "RAW", "QCOW2"])?;
        lab.qemu(&["convert", "-c", "-O", "qcow2", "QCOW2", "ZLIB"])?;
        let zstd = "compression_type=zstd";
        lab.qemu(&["convert", "-c", "-O", "qcow2", "-o", zstd, "QCOW2", "ZSTD"])?;
        lab.qemu(&["create", "-f", "qcow2", "SPARSE", "64T"])?;
        let full = "preallocation=metadata";
        lab.qemu(&["create", "-f", "qcow2", "-o", full, "FULL", "1T"])?;
        Ok(lab)
    }

    /// Writes the raw image that everything starts from.
    fn fill(&self, size: u64) -> Result<()> {
        let mut raw = File::create(self.path("RAW"))?;
        let mut left = size * 2 / 3;
        let mut folders = vec![PathBuf::from("/usr")];
        while let Some(folder) = folders.pop() {
            let mut entries: Vec<_> = fs::read_dir(&folder)?.collect::<std::io::Result<_>>()?;
            entries.sort_by_key(fs::DirEntry::path);
            for entry in entries {
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() && left > 0 {
                    let file = File::open(entry.path())?;
                    left -= std::io::copy(&mut file.take(left), &mut raw)?;
                }
            }
        }
        let mut random = Random::seeded(1);
        let mut block = vec![0; 1 << 20];
        for _ in 0..(size / 16) >> 20 {
            block.fill_with(|| random.below(256) as u8);
            raw.write_all(&block)?;
        }
        raw.set_len(size)?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Arguments with the names in capitals as paths; `OUT` is what the command makes.
    fn program(&self, program: &Path, arguments: &[&str], out: &str) -> Program {
        let out = self.path(out);
        let path = |name: &&str| match *name {
            "RAW" | "QCOW2" | "ZLIB" | "ZSTD" | "SPARSE" | "FULL" => {
                self.path(name).display().to_string()
            }
            "OUT" => out.display().to_string(),
            other => other.to_owned(),
        };
        Program {
            program: program.to_owned(),
            arguments: arguments.iter().map(path).collect(),
            output: Some(out),
        }
    }

    /// A command of ours and of the peer, each with an output of its own.
    #[must_use]
    pub fn sides(&self, command: &Command) -> (Program, Program) {
        (
            self.program(&self.ours, command.arguments, "ours"),
            self.program(&self.peer, command.arguments, "peer"),
        )
    }

    /// The sizes of the outputs that a command left, ours first; then they are gone.
    #[must_use]
    pub fn outputs(&self) -> Option<(u64, u64)> {
        let size = |name| {
            let path = self.path(name);
            let size = fs::metadata(&path).map(|meta| meta.len());
            let _ = fs::remove_file(path);
            size.ok()
        };
        let (ours, peer) = (size("ours"), size("peer"));
        ours.zip(peer)
    }

    fn qemu(&self, arguments: &[&str]) -> Result<()> {
        self.program(&self.peer, arguments, "none").run()
    }
}

/// A command, and what it has to reach.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments; names in capitals are images.
    arguments: &'static [&'static str],
    /// How many times as fast as qemu-img it has to be.
    fast: f64,
}

impl Command {
    /// What it has to reach. Where it need not be faster, it may not use more processor time.
    #[must_use]
    pub fn bars(&self) -> Bars {
        let bars = Bars::rate(self.fast);
        if self.fast > 1.0 || self.name.starts_with("info") {
            bars
        } else {
            bars.and_cpu(1.0)
        }
    }
}

const fn command(name: &'static str, arguments: &'static [&'static str], fast: f64) -> Command {
    Command {
        name,
        arguments,
        fast,
    }
}

/// How much larger than the peer's an output may be.
pub const LARGER: f64 = 1.02;

/// All of them.
pub const COMMANDS: &[Command] = &[
    command("info, 64 TiB sparse", &["info", "SPARSE"], 1.0),
    command("info, 1 TiB of metadata", &["info", "FULL"], 1.0),
    command("check", &["check", "QCOW2"], 1.5),
    command("check, compressed", &["check", "ZLIB"], 1.5),
    command("check, 1 TiB of metadata", &["check", "FULL"], 1.5),
    command("map", &["map", "--output=json", "QCOW2"], 1.5),
    command(
        "map, 1 TiB of metadata",
        &["map", "--output=json", "FULL"],
        1.5,
    ),
    command("compare", &["compare", "RAW", "QCOW2"], 1.0),
    command(
        "raw to qcow2",
        &["convert", "-O", "qcow2", "RAW", "OUT"],
        1.0,
    ),
    command(
        "qcow2 to raw",
        &["convert", "-O", "raw", "QCOW2", "OUT"],
        1.0,
    ),
    command("zlib to raw", &["convert", "-O", "raw", "ZLIB", "OUT"], 1.5),
    command("zstd to raw", &["convert", "-O", "raw", "ZSTD", "OUT"], 1.0),
    command(
        "qcow2 to zstd",
        &[
            "convert",
            "-c",
            "-O",
            "qcow2",
            "-o",
            "compression_type=zstd",
            "QCOW2",
            "OUT",
        ],
        1.0,
    ),
    command(
        "qcow2 to zlib",
        &["convert", "-c", "-O", "qcow2", "QCOW2", "OUT"],
        1.5,
    ),
];
