//! Raw images: guest bytes are file bytes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::{
    Capabilities, DiskTopology, Error, ErrorKind, FileId, Format, GuestRange, Result,
    image::{BlockStatus, ExtentKind, Extents, Image, ImageInfo, Intent, Prepared},
    io::{FallocateMode, Io},
    sync::LocalFuture,
    table::MapCache,
    types::HostOffset,
};

/// A sector: raw images are seen in whole ones.
const SECTOR: u64 = 512;

/// What the host file of a raw image is like.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RawFile {
    /// The file.
    pub(crate) file: FileId,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Whether it was opened for writing.
    pub(crate) writable: bool,
    /// Whether it is a block device, whose size is fixed.
    pub(crate) block_device: bool,
    /// The unit of direct I/O, or 1.
    pub(crate) unit: u32,
    /// Logical and physical block size of a block device.
    pub(crate) block_sizes: Option<(u32, u32)>,
}

/// A raw image on a file or block device.
#[derive(Debug)]
pub(crate) struct Raw {
    host: RawFile,
    /// What the guest sees: the length in whole sectors.
    size: AtomicU64,
    /// Bytes that the file has; beyond lies at most the rest of the last sector.
    present: AtomicU64,
    /// The file system cannot punch or zero ranges.
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
}

impl Raw {
    pub(crate) fn new(host: RawFile) -> Self {
        Self {
            host,
            size: AtomicU64::new(host.len.next_multiple_of(SECTOR)),
            present: AtomicU64::new(host.len),
            no_punch: AtomicBool::new(false),
            no_zero_range: AtomicBool::new(false),
        }
    }

    fn data(&self, offset: u64) -> ExtentKind {
        ExtentKind::Data {
            file: self.host.file,
            offset: HostOffset(offset),
        }
    }

    fn map_read(&self, range: GuestRange, out: &mut Extents) {
        let present = self
            .present
            .load(Ordering::Acquire)
            .saturating_sub(range.start.0)
            .min(range.len);
        if present > 0 {
            out.push(present, self.data(range.start.0));
        }
        if present < range.len {
            out.push(range.len - present, ExtentKind::Zero);
        }
    }

    /// Changes a range with `fallocate`; `false` when the host cannot.
    async fn fallocate(
        &self,
        io: &Io,
        mode: FallocateMode,
        range: GuestRange,
        refused: &AtomicBool,
    ) -> Result<bool> {
        if refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match io
            .fallocate(self.host.file, mode, range.start.0, range.len)
            .await
        {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// The part of a range that the host can change: inside the file, in whole blocks of a device.
    fn changeable(&self, range: GuestRange) -> GuestRange {
        let inside = range.take(
            self.present
                .load(Ordering::Acquire)
                .saturating_sub(range.start.0),
        );
        let Some((block, _)) = self.host.block_sizes else {
            return inside;
        };
        let block = u64::from(block);
        let start = inside.start.0.next_multiple_of(block);
        let end = inside.end() / block * block;
        GuestRange::new(start, end.saturating_sub(start))
    }
}

impl Image for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn topology(&self) -> DiskTopology {
        let (_, physical) = self.host.block_sizes.unwrap_or((512, 512));
        DiskTopology {
            physical_block_size: physical.max(self.host.unit).max(512),
            ..DiskTopology::default()
        }
    }

    fn capabilities(&self) -> Capabilities {
        let writable = self.host.writable;
        Capabilities {
            writable,
            discard: writable,
            write_zeroes: writable,
            resize: writable && !self.host.block_device,
            discard_granularity: self.topology().physical_block_size,
            // Where the host has no holes a discard does nothing.
            secure_erase: false,
            overwrite: writable,
        }
    }

    fn info(&self) -> ImageInfo {
        ImageInfo::default()
    }

    fn data_file(&self) -> FileId {
        self.host.file
    }

    fn try_map(
        &self,
        range: GuestRange,
        intent: Intent,
        _cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()> {
        match intent {
            Intent::Read => self.map_read(range, out),
            // The rest of a last sector is written only once the file has it.
            Intent::WriteInPlace => {
                if range.end() <= self.present.load(Ordering::Acquire) {
                    out.push(range.len, self.data(range.start.0));
                }
            }
        }
        Ok(())
    }

    fn map<'a>(
        &'a self,
        _io: &'a Io,
        range: GuestRange,
        out: &'a mut Extents,
    ) -> LocalFuture<'a, Result<()>> {
        self.map_read(range, out);
        Box::pin(async { Ok(()) })
    }

    fn prepare<'a>(
        &'a self,
        io: &'a Io,
        _range: GuestRange,
    ) -> LocalFuture<'a, Result<Option<Prepared<'a>>>> {
        Box::pin(async move {
            let size = self.size();
            io.set_len(self.host.file, size).await?;
            self.present.store(size, Ordering::Release);
            Ok(None)
        })
    }

    fn discard<'a>(&'a self, io: &'a Io, range: GuestRange) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            let range = self.changeable(range);
            if range.len > 0 {
                self.fallocate(io, FallocateMode::PunchHole, range, &self.no_punch)
                    .await?;
            }
            Ok(())
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        may_unmap: bool,
    ) -> LocalFuture<'a, Result<u64>> {
        Box::pin(async move {
            let part = self.changeable(range);
            if part.len == 0 || part.start != range.start {
                return Ok(0);
            }
            let done = (may_unmap
                && self
                    .fallocate(io, FallocateMode::PunchHole, part, &self.no_punch)
                    .await?)
                || self
                    .fallocate(io, FallocateMode::ZeroRange, part, &self.no_zero_range)
                    .await?;
            Ok(if done { part.len } else { 0 })
        })
    }

    fn unaligned_zeroes(&self, range: GuestRange) -> u64 {
        // Up to where the host can change whole blocks again.
        match self.changeable(range) {
            part if part.len > 0 && part.start > range.start => part.start.0 - range.start.0,
            _ => range.len,
        }
    }

    fn flush<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        Box::pin(io.sync(self.host.file))
    }

    fn block_status<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<BlockStatus>> {
        Box::pin(async move {
            let start = range.start.0;
            let present = self.present.load(Ordering::Acquire);
            let (len, data) = if start >= present {
                (range.len, false)
            } else {
                match io.next_data(self.host.file, start).await? {
                    Some((from, to)) if from <= start => (to - start, true),
                    Some((from, _)) => (from - start, false),
                    None => (range.len, false),
                }
            };
            // The rest of the last sector has its place, too, although the file ends before.
            let offset = Some(HostOffset(start));
            Ok(BlockStatus {
                len: len.min(range.len),
                depth: 0,
                present: true,
                zero: !data,
                data,
                compressed: false,
                offset,
                file: offset.map(|_| self.host.file),
            })
        })
    }

    fn resize<'a>(&'a self, io: &'a Io, size: u64) -> LocalFuture<'a, Result<()>> {
        Box::pin(async move {
            if !size.is_multiple_of(SECTOR) {
                return Err(Error::invalid_argument(format!(
                    "size: {size}, expected a multiple of {SECTOR}"
                )));
            }
            if self.host.block_device {
                return Err(Error::unsupported("a block device cannot be resized"));
            }
            io.set_len(self.host.file, size).await?;
            self.present.store(size, Ordering::Release);
            self.size.store(size, Ordering::Release);
            // The guest is told of the size: it must not come back as another.
            io.sync(self.host.file).await
        })
    }
}
