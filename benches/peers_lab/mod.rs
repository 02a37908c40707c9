//! The images, the sides of each comparison, and the rows.

mod bare_codec;
mod client;
mod crates;
mod fresh;
mod host;
pub(crate) mod opening;
pub(crate) mod rows;
mod served;
mod sides;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use block::{
    Disk, DiskFile, Format, Locking, OpenOptions,
    io::{AlignedBuf, EngineKind},
};
use platter_benches::{Result, load::Random, scratch::Scratch};

/// Bytes of L2 tables that QEMU's cache, and ours, hold: more than any image has but the huge one,
/// where it is a sixteenth of them.
const L2_CACHE: u64 = 8 << 20;

/// Where things are.
#[derive(Clone)]
pub(crate) struct Options {
    pub(crate) size: u64,
    pub(crate) dir: PathBuf,
    pub(crate) platter: PathBuf,
    pub(crate) qemu: PathBuf,
    pub(crate) client: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
        let lab = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/lab");
        Self {
            size: 1 << 30,
            dir: PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
            platter: target
                .unwrap_or(Path::new("target"))
                .join("release/platter"),
            qemu: lab.join("reference"),
            client: lab.join("bin/qemu-img"),
        }
    }
}

/// An image that is there before anything is measured.
#[derive(Clone, Copy)]
pub(crate) enum Set {
    /// Every byte written.
    Plain(Format),
    /// Compressed data.
    Compressed(&'static str),
    /// 1 TiB, tables written, no data.
    Huge,
}

/// The images, gone when dropped, and the peers.
pub(crate) struct Lab {
    options: Options,
    dir: Scratch,
}

impl Lab {
    pub(crate) fn new(options: Options) -> Result<Self> {
        for program in [
            &options.platter,
            &options.qemu.join("qemu-img"),
            &options.client,
        ] {
            if !program.exists() {
                let path = program.display();
                return Err(format!("{path} does not exist: benches/peers makes it").into());
            }
        }
        Ok(Self {
            dir: Scratch::new_in(&options.dir)?,
            options,
        })
    }

    pub(crate) fn size(&self) -> u64 {
        self.options.size
    }

    /// Versions, for the head of a table.
    pub(crate) fn about(&self) -> Result<String> {
        let first = |program: &Path| -> Result<String> {
            let output = Command::new(program).arg("--version").output()?;
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            Ok(text.lines().next().unwrap_or_default().to_owned())
        };
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?;
        Ok(format!(
            "Linux {}; {}; {}; client {}",
            kernel.trim(),
            first(Path::new("fio"))?,
            first(&self.options.qemu.join("qemu-img"))?,
            first(&self.options.client)?
        ))
    }

    fn qemu_img(&self, arguments: &[&str]) -> Result<()> {
        let run = Command::new(self.options.qemu.join("qemu-img"))
            .args(arguments)
            .output()?;
        if run.status.success() {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&run.stderr);
        Err(format!("qemu-img {}: {text}", arguments.join(" ")).into())
    }

    fn make(&self, format: Format, path: &Path, size: u64, more: &[&str]) -> Result<()> {
        let (path, size) = (path.display().to_string(), size.to_string());
        let mut arguments = vec!["create", "-q", "-f", format.name()];
        arguments.extend(more);
        arguments.extend([path.as_str(), size.as_str()]);
        self.qemu_img(&arguments)
    }

    /// The path of an image, which is made when it is asked for first. Direct and cached loads have
    /// images of their own: one that is in the page cache is no test of direct I/O.
    fn path(&self, set: Set, direct: bool) -> Result<PathBuf> {
        let cache = if direct { "direct" } else { "cached" };
        let name = match set {
            Set::Plain(format) => format!("plain.{format}.{cache}"),
            Set::Compressed(codec) => format!("{codec}.qcow2.{cache}"),
            Set::Huge => "huge.qcow2".to_owned(),
        };
        let path = self.dir.path().join(name);
        if path.exists() {
            return Ok(path);
        }
        match set {
            Set::Plain(format) => {
                self.make(format, &path, self.options.size, &[])?;
                self.fill(&path, format)?;
            }
            Set::Compressed(codec) => {
                // Not the image of other rows: what those write compresses better.
                let plain = self.dir.path().join("source.raw");
                if !plain.exists() {
                    self.make(Format::Raw, &plain, self.options.size, &[])?;
                    self.fill(&plain, Format::Raw)?;
                }
                let (plain, path) = (plain.display().to_string(), path.display().to_string());
                let codec = format!("compression_type={codec}");
                let head = ["convert", "-c", "-O", "qcow2", "-o", &codec];
                self.qemu_img(&[&head[..], &[&plain, &path]].concat())?;
            }
            Set::Huge => {
                let more = ["-o", "preallocation=metadata"];
                self.make(Format::Qcow2, &path, 1 << 40, &more)?;
            }
        }
        if !direct {
            std::io::copy(&mut fs::File::open(&path)?, &mut std::io::sink())?;
        }
        Ok(path)
    }

    /// Writes every byte, past the page cache: what compresses to about a third.
    fn fill(&self, path: &Path, format: Format) -> Result<()> {
        let disk = open(path, format, true)?;
        let mut random = Random::seeded(1);
        let mut data = AlignedBuf::zeroed(1 << 20);
        for offset in (0..self.options.size).step_by(data.len()) {
            for piece in data.chunks_exact_mut(16) {
                let word = random.below(1 << 16) as u16;
                piece[..2].copy_from_slice(&word.to_le_bytes());
                piece[2..].fill(random.below(4) as u8 + 1);
            }
            disk.write_at(&data, offset)?;
        }
        disk.close()?;
        Ok(())
    }
}

fn format_of(set: Set) -> Format {
    match set {
        Set::Plain(format) => format,
        Set::Compressed(_) | Set::Huge => Format::Qcow2,
    }
}

fn open(path: &Path, format: Format, direct: bool) -> Result<Disk> {
    Ok(how(format, direct).open_disk(path)?)
}

fn how(format: Format, direct: bool) -> OpenOptions {
    // Two sides may have the same image open.
    OpenOptions::new()
        .format(format)
        .engine(EngineKind::IoUring)
        .direct(direct)
        .metadata_cache_size(L2_CACHE)
        .locking(Locking::Off)
}
