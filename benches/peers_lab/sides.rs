//! Sides on images that stay: ours, fio, `qemu-img bench`, the crates.

use std::{sync::Arc, time::Duration};

use block::{DiskFile as _, Format};
use platter_benches::{
    Result, Work,
    fio::Fio,
    lanes::Lanes,
    load::Straight,
    qemu::{QemuBench, fastest_aio, image_opts},
    side::{OnThread, Side},
    stride::{Pattern, Strided},
};

use super::{L2_CACHE, Lab, Set, bare_codec::BareCodec, crates, format_of, open};

/// A side of any kind.
pub(super) type AnySide = Box<dyn Side>;

impl Lab {
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

    /// Where a filled image has the data of its disk in one piece, from the first byte on: host offset
    /// and length in bytes.
    pub(crate) fn data_run(&self, set: Set, direct: bool) -> Result<(u64, u64)> {
        let disk = open(&self.path(set, direct)?, format_of(set), direct)?;
        let first = disk.block_status(0, self.size())?.offset;
        let start = first.ok_or("the image has no data at its start")?.0;
        let mut len = 0;
        while len < self.size() {
            let run = disk.block_status(len, self.size() - len)?;
            if run.offset.is_none_or(|offset| offset.0 != start + len) {
                break;
            }
            len += run.len;
        }
        if len < self.size() / 4 {
            return Err(format!("only {len} bytes of the image lie together").into());
        }
        Ok((start, len))
    }

    /// Random accesses by our raw disk to the file of an image, from a byte on.
    pub(crate) fn random_beneath(&self, set: Set, start: u64, work: Work) -> Result<AnySide> {
        let path = self.path(set, work.direct)?;
        Ok(Box::new(OnThread::start(move || {
            Straight::from(start, &open(&path, Format::Raw, work.direct)?, work)
        })?))
    }

    /// The same in steps.
    pub(crate) fn strided_beneath(
        &self,
        set: Set,
        start: u64,
        work: Work,
        pattern: Pattern,
    ) -> Result<AnySide> {
        let path = self.path(set, work.direct)?;
        Ok(Box::new(OnThread::start(move || {
            Strided::from(
                start,
                &open(&path, Format::Raw, work.direct)?,
                work,
                pattern,
            )
        })?))
    }

    /// Random reads by the crate imago.
    pub(crate) fn imago(&self, work: Work) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Plain(Format::Qcow2), work.direct)?;
        let make = move || crates::Imago::new(&path, work);
        Ok(Box::new(OnThread::start(make)?))
    }

    /// Random reads by the crate qcow2-rs.
    pub(crate) fn qcow2_rs(&self, work: Work) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Plain(Format::Qcow2), work.direct)?;
        let make = move || crates::Qcow2Rs::new(&path, work);
        Ok(Box::new(OnThread::start(make)?))
    }

    /// Random accesses by us on several queues, each on a processor of its own. The queues share the
    /// disk.
    pub(crate) fn lanes(&self, set: Set, work: Work, count: usize) -> Result<Box<dyn Side>> {
        let disk = Arc::new(open(
            &self.path(set, work.direct)?,
            format_of(set),
            work.direct,
        )?);
        let make = move || Straight::new(&*disk, work);
        Ok(Box::new(Lanes::start(count, make)?))
    }

    /// Random accesses by fio on the raw image.
    pub(crate) fn fio(&self, work: Work) -> Result<Fio> {
        let path = self.path(Set::Plain(Format::Raw), work.direct)?;
        Fio::new(&path, work)
    }

    /// The bare codec on the clusters of a compressed image, or with a `pread` of each.
    pub(crate) fn bare_codec(
        &self,
        codec: &'static str,
        work: Work,
        pattern: Pattern,
        read_each: bool,
    ) -> Result<Box<dyn Side>> {
        let path = self.path(Set::Compressed(codec), work.direct)?;
        let make = move || BareCodec::new(&path, work, pattern, read_each);
        Ok(Box::new(OnThread::start(make)?))
    }

    /// The same accesses by `qemu-img bench`, with whatever host I/O is fastest.
    pub(crate) fn qemu_bench(
        &self,
        set: Set,
        work: Work,
        pattern: Pattern,
    ) -> Result<Box<dyn Side>> {
        let path = self.path(set, work.direct)?;
        let program = self.options.qemu.join("qemu-img");
        let bench = |aio: &str| {
            let image = image_opts(format_of(set).name(), &path, aio, work.direct, L2_CACHE);
            QemuBench::new(&program, image, work, pattern)
        };
        let aio = fastest_aio(work.direct, |aio| {
            let mut bench = bench(aio)?;
            bench.slice(Duration::from_millis(300), 0)?;
            Ok(bench.rate())
        })?;
        Ok(Box::new(bench(aio)?))
    }
}
