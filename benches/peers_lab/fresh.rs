//! Sides on images that are made anew for each slice.

use std::{fs, path::PathBuf, process::Command, time::Duration};

use block::Format;
use platter_benches::{
    Result, Work,
    qemu::{QemuBench, fastest_aio, image_opts},
    side::{OnThread, Side, Slice},
    stride::{Pattern, Strided},
};

use super::{L2_CACHE, Lab, Set, open};

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

impl Lab {
    /// Accesses of one slice on a fresh image: at most half of its clusters, so that each allocates, and
    /// so many that there are at most 256 flushes.
    fn fresh_count(work: Work, pattern: Pattern) -> u64 {
        let most = match pattern.flush_every {
            0 => 8192,
            every => (256 * every).min(4096),
        };
        (work.size / work.block.max(65536) / 2).min(most)
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
                side.ios(Self::fresh_count(work, pattern), 1)
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
        let run = move |aio: &str| -> Result<QemuBench> {
            let opts = image_opts("qcow2", &image.path, aio, work.direct, L2_CACHE);
            Ok(QemuBench::fresh(&program, opts, work, pattern)?
                .count(Self::fresh_count(work, pattern)))
        };
        let aio = fastest_aio(work.direct, |aio| {
            make()?;
            let mut bench = run(aio)?;
            bench.slice(Duration::ZERO, 0)?;
            Ok(bench.rate())
        })?;
        Ok(Box::new(FreshSide {
            make,
            run: Box::new(move || run(aio)?.slice(Duration::ZERO, 0)),
        }))
    }

    /// A fresh image: its path and its format.
    pub(super) fn remake(&self, fresh: Fresh, name: &str, size: u64) -> Result<(PathBuf, Format)> {
        let image = self.fresh_image(fresh, name)?;
        self.maker(&image, size)()?;
        let format = image.format();
        Ok((image.path, format))
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
}
