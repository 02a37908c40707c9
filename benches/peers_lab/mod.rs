//! The images and the two sides of each comparison.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use block::{
    Disk, DiskFile, Format, Locking, OpenOptions,
    io::{AlignedBuf, EngineKind},
};
use platter_benches::{
    Result, Work,
    fio::Fio,
    load::{Random, Straight},
    qemu::{AIO, QemuBench, image_opts},
    server::{Server, cpu_of},
    side::{OnThread, Side, Slice},
    stride::{Pattern, Strided},
};

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

/// An image that is made anew for each slice.
#[derive(Clone, Copy)]
pub(crate) enum Fresh {
    /// A raw file without data.
    Raw,
    /// qcow2, nothing allocated.
    Empty,
    /// qcow2 without data over a qcow2 image that is full.
    Overlay,
}

/// The images, gone when dropped, and the peers.
pub(crate) struct Lab {
    options: Options,
    dir: tempfile::TempDir,
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
                return Err(format!("{path} does not exist; --help says what is needed").into());
            }
        }
        Ok(Self {
            dir: tempfile::tempdir_in(&options.dir)?,
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
                let plain = self.path(Set::Plain(Format::Raw), false)?;
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

    /// Random accesses by us; every mapping table is read before.
    pub(crate) fn random(&self, set: Set, work: Work) -> Result<Box<dyn Side>> {
        let path = self.path(set, work.direct)?;
        let format = format_of(set);
        Ok(Box::new(OnThread::start(move || {
            Straight::new(&open(&path, format, work.direct)?, work)
        })?))
    }

    /// Accesses by us in steps.
    pub(crate) fn strided(&self, set: Set, work: Work, pattern: Pattern) -> Result<Box<dyn Side>> {
        let path = self.path(set, work.direct)?;
        let format = format_of(set);
        Ok(Box::new(OnThread::start(move || {
            Strided::new(&open(&path, format, work.direct)?, work, pattern)
        })?))
    }

    pub(crate) fn fio(&self, work: Work) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Plain(Format::Raw), work.direct)?;
        Ok(Box::new(Fio::new(&path, work)?))
    }

    /// The same accesses by `qemu-img bench`, with whatever host I/O is fastest.
    pub(crate) fn qemu_bench(
        &self,
        set: Set,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let path = self.path(set, work.direct)?;
        let mut best: Option<QemuBench> = None;
        for aio in AIO {
            if aio == "native" && !work.direct {
                continue;
            }
            let image = image_opts(format_of(set).name(), &path, aio, work.direct, L2_CACHE);
            let program = self.options.qemu.join("qemu-img");
            let mut bench = QemuBench::new(&program, image, work, pattern)?;
            bench.slice(Duration::from_millis(300), 0)?;
            if best.as_ref().is_none_or(|best| best.rate() < bench.rate()) {
                best = Some(bench);
            }
        }
        Ok(Box::new(best.ok_or("no kind of host I/O works")?))
    }

    /// Accesses of one slice on a fresh image: a quarter of it, so that each allocates.
    fn fresh_count(work: Work) -> u64 {
        (work.size / work.block.max(65536) / 2).min(8192)
    }

    fn fresh_image(&self, fresh: Fresh, name: &str) -> Result<Image> {
        let path = self.dir.path().join(name);
        let base = match fresh {
            Fresh::Overlay => Some(self.path(Set::Plain(Format::Qcow2), false)?),
            Fresh::Raw | Fresh::Empty => None,
        };
        Ok(Image { fresh, path, base })
    }

    /// Writes by us to an image made anew for each slice.
    pub(crate) fn fresh(
        &self,
        fresh: Fresh,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let name = match fresh {
            Fresh::Raw => "fresh.raw",
            Fresh::Empty | Fresh::Overlay => "fresh.ours",
        };
        let image = self.fresh_image(fresh, name)?;
        let make = self.maker(&image, work.size);
        Ok(Box::new(FreshSide {
            make,
            run: Box::new(move || {
                let (path, format) = (image.path.clone(), image.format());
                let mut side = OnThread::start(move || {
                    Strided::new(&open(&path, format, work.direct)?, work, pattern)
                })?;
                side.ios(Self::fresh_count(work), 1)
            }),
        }))
    }

    /// The same by `qemu-img bench`.
    pub(crate) fn fresh_qemu(
        &self,
        fresh: Fresh,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let image = self.fresh_image(fresh, "fresh.qemu")?;
        let make = self.maker(&image, work.size);
        let program = self.options.qemu.join("qemu-img");
        let mut best: Option<(f64, &str)> = None;
        let run = move |aio: &str| -> Result<QemuBench> {
            let opts = image_opts("qcow2", &image.path, aio, work.direct, L2_CACHE);
            Ok(QemuBench::fresh(&program, opts, work, pattern)?.count(Self::fresh_count(work)))
        };
        for aio in AIO {
            if aio == "native" && !work.direct {
                continue;
            }
            make()?;
            let mut bench: QemuBench = run(aio)?;
            bench.slice(Duration::ZERO, 0)?;
            if best.is_none_or(|(rate, _)| rate < bench.rate()) {
                best = Some((bench.rate(), aio));
            }
        }
        let (_, aio) = best.ok_or("no kind of host I/O works")?;
        Ok(Box::new(FreshSide {
            make,
            run: Box::new(move || run(aio)?.slice(Duration::ZERO, 0)),
        }))
    }

    /// Makes a fresh image, again and again.
    fn maker(&self, image: &Image, size: u64) -> Box<dyn Fn() -> Result<()>> {
        let image = image.clone();
        let program = self.options.qemu.join("qemu-img");
        Box::new(move || {
            let _ = fs::remove_file(&image.path);
            let mut command = Command::new(&program);
            command.args(["create", "-q", "-f", image.format().name()]);
            if let Some(base) = &image.base {
                command.arg("-b").arg(base).args(["-F", "qcow2"]);
            }
            let status = command.arg(&image.path).arg(size.to_string()).status()?;
            if !status.success() {
                return Err(format!("qemu-img create: {status}").into());
            }
            Ok(())
        })
    }

    /// A disk that `platter serve` serves, driven by QEMU's client.
    pub(crate) fn served_by_platter(
        &self,
        format: Format,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Plain(format), work.direct)?;
        let socket = self.dir.path().join("ours.sock");
        let _ = fs::remove_file(&socket);
        let mut command = Command::new(&self.options.platter);
        command.args(["serve", "vhost-user-blk", "-f", format.name()]);
        command.arg("--socket").arg(&socket);
        if work.direct {
            command.arg("--direct");
        }
        let server = Server::start(command.arg(&path), &socket)?;
        self.client(server, work, pattern)
    }

    /// A disk that `qemu-storage-daemon` serves, driven by QEMU's client.
    pub(crate) fn served_by_qemu(
        &self,
        format: Format,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Plain(format), work.direct)?;
        let mut best: Option<(f64, &str)> = None;
        for aio in AIO {
            if aio == "native" && !work.direct {
                continue;
            }
            let mut side = self.daemon(&path, format, aio, work, pattern)?;
            side.slice(Duration::from_millis(200), 0)?;
            let rate = side.slice(Duration::from_millis(300), 0)?.iops();
            if best.is_none_or(|(before, _)| before < rate) {
                best = Some((rate, aio));
            }
        }
        let (_, aio) = best.ok_or("no kind of host I/O works")?;
        self.daemon(&path, format, aio, work, pattern)
    }

    fn daemon(
        &self,
        path: &Path,
        format: Format,
        aio: &str,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let socket = self.dir.path().join("peer.sock");
        let _ = fs::remove_file(&socket);
        let image = image_opts(format.name(), path, aio, work.direct, L2_CACHE);
        let mut command = Command::new(self.options.qemu.join("qemu-storage-daemon"));
        command
            .args(["--object", "iothread,id=io"])
            .args([
                "--blockdev",
                &format!("{image},node-name=disk,discard=unmap"),
            ])
            .arg("--export")
            .arg(format!(
                "vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},\
                 writable=on,num-queues=1,iothread=io",
                socket.display()
            ));
        let server = Server::start(&mut command, &socket)?;
        self.client(server, work, pattern)
    }

    fn client(&self, server: Server, work: Work, pattern: Pattern) -> Result<Box<dyn Side>> {
        let image = format!(
            "driver=virtio-blk-vhost-user,cache.direct=on,path={}",
            server.socket.display()
        );
        // The client knows no page cache.
        let work = Work {
            direct: true,
            ..work
        };
        let bench = QemuBench::new(&self.options.client, image, work, pattern)?;
        Ok(Box::new(
            bench.worker(Box::new(move || cpu_of(server.pid()))),
        ))
    }
}

#[derive(Clone)]
struct Image {
    fresh: Fresh,
    path: PathBuf,
    base: Option<PathBuf>,
}

impl Image {
    fn format(&self) -> Format {
        match self.fresh {
            Fresh::Raw => Format::Raw,
            Fresh::Empty | Fresh::Overlay => Format::Qcow2,
        }
    }
}

/// A side that gets a new image each time, which is not measured.
struct FreshSide {
    make: Box<dyn Fn() -> Result<()>>,
    run: Box<dyn Fn() -> Result<Slice>>,
}

impl Side for FreshSide {
    fn slice(&mut self, _length: Duration, _seed: u64) -> Result<Slice> {
        (self.make)()?;
        (self.run)()
    }
}

fn format_of(set: Set) -> Format {
    match set {
        Set::Plain(format) => format,
        Set::Compressed(_) | Set::Huge => Format::Qcow2,
    }
}

fn open(path: &Path, format: Format, direct: bool) -> Result<Disk> {
    // Two sides may have the same image open.
    Ok(OpenOptions::new()
        .format(format)
        .engine(EngineKind::IoUring)
        .direct(direct)
        .metadata_cache_size(L2_CACHE)
        .locking(Locking::Off)
        .open_disk(path)?)
}
