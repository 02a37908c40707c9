//! The crates imago and qcow2-rs as sides: as many futures at once as there are accesses in flight, on one thread.

use std::{cell::Cell, future::Future, path::Path, time::Instant};

use block::io::AlignedBuf;
use futures_util::future::try_join_all;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};
use platter_benches::{
    Result, Work,
    load::Random,
    side::{Load, Stop},
};
use qcow2_rs::{
    dev::{Qcow2Dev, Qcow2DevParams},
    uring::Qcow2IoUring,
    utils::qcow2_setup_dev_uring,
};

/// A crate's disk, which reads.
trait Reader {
    /// Fills a buffer from an offset.
    fn read(&self, buffer: &mut [u8], offset: u64) -> impl Future<Output = Result<()>>;
}

impl Reader for FormatAccess<imago::file::File> {
    async fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        Ok(FormatAccess::read(self, buffer, offset).await?)
    }
}

impl Reader for Qcow2Dev<Qcow2IoUring> {
    async fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let wanted = buffer.len();
        let read = self.read_at(buffer, offset).await;
        let read = read.map_err(|error| error.to_string())?;
        if read != wanted {
            return Err(format!("qcow2-rs read {read} of {wanted} bytes at {offset}").into());
        }
        Ok(())
    }
}

/// The clock is read once for so many accesses, as our own load reads it once a batch.
const CLOCK: u64 = 32;

/// What the futures of a run share.
struct Progress {
    stop: Stop,
    random: Random,
    started: u64,
    over: bool,
}

impl Progress {
    /// The block of the next access, unless it is time to stop.
    fn next(&mut self, blocks: u64) -> Option<u64> {
        self.over |= match self.stop {
            Stop::At(end) => self.started.is_multiple_of(CLOCK) && Instant::now() >= end,
            Stop::After(ios) => self.started >= ios,
        };
        if self.over {
            return None;
        }
        self.started += 1;
        Some(self.random.below(blocks))
    }
}

fn buffers(work: Work) -> Vec<AlignedBuf> {
    (0..work.depth)
        .map(|_| AlignedBuf::zeroed(work.block as usize))
        .collect()
}

/// Random reads, until it is time to stop; how many.
async fn reads(
    reader: &impl Reader,
    work: Work,
    buffers: &mut [AlignedBuf],
    (stop, seed): (Stop, u64),
) -> Result<u64> {
    let progress = Cell::new(Some(Progress {
        stop,
        random: Random::seeded(seed),
        started: 0,
        over: false,
    }));
    let blocks = work.size / work.block;
    let next = || {
        let mut state = progress.take()?;
        let block = state.next(blocks);
        progress.set(Some(state));
        block
    };
    let loops = buffers.iter_mut().map(|buffer| {
        let next = &next;
        async move {
            let mut ended = 0;
            while let Some(block) = next() {
                reader.read(buffer, block * work.block).await?;
                ended += 1;
            }
            Result::Ok(ended)
        }
    });
    Ok(try_join_all(loops).await?.into_iter().sum())
}

/// Reads in every 64 KiB, so that every mapping table is in memory.
async fn warm(reader: &impl Reader, work: Work) -> Result<()> {
    let mut buffer = AlignedBuf::zeroed(work.block as usize);
    for offset in (0..work.size).step_by(64 << 10) {
        reader.read(&mut buffer, offset).await?;
    }
    Ok(())
}

/// imago, whose futures do their system calls themselves.
pub(crate) struct Imago {
    disk: FormatAccess<imago::file::File>,
    work: Work,
    buffers: Vec<AlignedBuf>,
}

impl Imago {
    pub(crate) fn new(path: &Path, work: Work) -> Result<Self> {
        let disk = futures_executor::block_on(async {
            let image = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path)
                .storage_open_options(StorageOpenOptions::new().direct(work.direct))
                .open(PermissiveImplicitOpenGate::default())
                .await?;
            let disk = FormatAccess::new(image);
            warm(&disk, work).await?;
            Result::Ok(disk)
        })?;
        Ok(Self {
            disk,
            work,
            buffers: buffers(work),
        })
    }
}

impl Load for Imago {
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64> {
        let reads = reads(&self.disk, self.work, &mut self.buffers, (stop, seed));
        futures_executor::block_on(reads)
    }
}

/// qcow2-rs on the io_uring runtime that it is written for.
pub(crate) struct Qcow2Rs {
    // Dropped before the runtime.
    disk: Qcow2Dev<Qcow2IoUring>,
    runtime: tokio_uring::Runtime,
    work: Work,
    buffers: Vec<AlignedBuf>,
}

impl Qcow2Rs {
    pub(crate) fn new(path: &Path, work: Work) -> Result<Self> {
        let runtime = tokio_uring::Runtime::new(&tokio_uring::builder())?;
        let disk = runtime.block_on(async {
            // Blocks of 512 bytes, read-only, caches as large as the crate makes them.
            let options = Qcow2DevParams::new(9, None, None, true, work.direct);
            let disk = qcow2_setup_dev_uring(path, &options).await;
            let disk = disk.map_err(|error| error.to_string())?;
            warm(&disk, work).await?;
            Result::Ok(disk)
        })?;
        Ok(Self {
            disk,
            runtime,
            work,
            buffers: buffers(work),
        })
    }
}

impl Load for Qcow2Rs {
    fn run(&mut self, stop: Stop, seed: u64) -> Result<u64> {
        let reads = reads(&self.disk, self.work, &mut self.buffers, (stop, seed));
        self.runtime.block_on(reads)
    }
}
