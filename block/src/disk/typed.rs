//! Disks whose format, and way of being driven, is a type: names for the pairs that embedders ask for.

use std::{marker::PhantomData, path::Path};

use super::{Disk, ResizeListener};
use crate::{
    AsyncDiskFile, Capabilities, DiskFile, DiskTopology, Format, OpenOptions, Result,
    crypto::KeyChange,
    extras::DiskExtras,
    image::{BlockStatus, ImageInfo},
    io::{AsyncIo, EngineKind},
};

/// A format, as a type: what [`SyncDisk`] and [`AsyncDisk`] are named by.
pub trait DiskFormat: Send + Sync + 'static {
    /// The format.
    const FORMAT: Format;
}

/// The raw format.
#[derive(Debug)]
pub enum RawFormat {}

impl DiskFormat for RawFormat {
    const FORMAT: Format = Format::Raw;
}

/// The qcow2 format.
#[derive(Debug)]
pub enum Qcow2Format {}

impl DiskFormat for Qcow2Format {
    const FORMAT: Format = Format::Qcow2;
}

/// The LUKS format.
#[derive(Debug)]
pub enum LuksFormat {}

impl DiskFormat for LuksFormat {
    const FORMAT: Format = Format::Luks;
}

/// How a disk is driven, as a type.
pub trait Drive: Send + Sync + 'static {
    /// Adjusts the options.
    fn adjust(options: OpenOptions) -> OpenOptions;
}

/// On the calling thread alone: no ring and no pool thread works for it.
#[derive(Debug)]
pub enum Synchronous {}

impl Drive for Synchronous {
    fn adjust(options: OpenOptions) -> OpenOptions {
        options.engine(EngineKind::Sync)
    }
}

/// By queues on an asynchronous engine, as well as by synchronous calls.
#[derive(Debug)]
pub enum Asynchronous {}

impl Drive for Asynchronous {
    fn adjust(options: OpenOptions) -> OpenOptions {
        options
    }
}

/// A disk of one format, driven in one way: the shell that every named pair shares.
pub struct TypedDisk<F, D> {
    disk: Disk,
    _types: PhantomData<fn() -> (F, D)>,
}

/// A disk of format `F` for synchronous calls.
pub type SyncDisk<F> = TypedDisk<F, Synchronous>;
/// A disk of format `F` for queues.
pub type AsyncDisk<F> = TypedDisk<F, Asynchronous>;
/// A raw image, synchronous.
pub type RawSync = SyncDisk<RawFormat>;
/// A raw image, asynchronous.
pub type RawAsync = AsyncDisk<RawFormat>;
/// A qcow2 image, synchronous.
pub type Qcow2Sync = SyncDisk<Qcow2Format>;
/// A qcow2 image, asynchronous.
pub type Qcow2Async = AsyncDisk<Qcow2Format>;
/// A LUKS volume, synchronous.
pub type LuksSync = SyncDisk<LuksFormat>;
/// A LUKS volume, asynchronous.
pub type LuksAsync = AsyncDisk<LuksFormat>;

impl<F: DiskFormat, D: Drive> TypedDisk<F, D> {
    /// Opens an image of this format.
    ///
    /// # Errors
    /// As [`OpenOptions::open`].
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Self> {
        let options = D::adjust(options.clone().format(F::FORMAT));
        Ok(Self {
            disk: options.open_disk(path)?,
            _types: PhantomData,
        })
    }

    /// The disk, whatever its format.
    #[must_use]
    pub fn into_disk(self) -> Disk {
        self.disk
    }
}

impl<F: DiskFormat, D: Drive> DiskFile for TypedDisk<F, D> {
    fn path(&self) -> &Path {
        self.disk.path()
    }
    fn format(&self) -> Format {
        self.disk.format()
    }
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn physical_size(&self) -> Result<u64> {
        self.disk.physical_size()
    }
    fn topology(&self) -> DiskTopology {
        self.disk.topology()
    }
    fn capabilities(&self) -> Capabilities {
        self.disk.capabilities()
    }
    fn info(&self) -> ImageInfo {
        self.disk.info()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.disk.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.disk.write_at(buf, offset)
    }
    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)
    }
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, len, may_unmap)
    }
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        self.disk.block_status(offset, len)
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.disk.resize(size)
    }
    fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()> {
        self.disk.write_compressed(data, offset)
    }
    fn change_keys(&self, change: &KeyChange) -> Result<()> {
        self.disk.change_keys(change)
    }

    fn extras(&self) -> &dyn DiskExtras {
        self.disk.extras()
    }
    fn close(&self) -> Result<()> {
        self.disk.close()
    }
    fn try_clone(&self) -> Result<Box<dyn DiskFile>> {
        self.disk.try_clone()
    }
}

impl<F: DiskFormat> AsyncDiskFile for AsyncDisk<F> {
    fn create_async_io(&self, ring_depth: u32) -> Result<Box<dyn AsyncIo>> {
        self.disk.create_async_io(ring_depth)
    }
    fn clone_async(&self) -> Box<dyn AsyncDiskFile> {
        self.disk.clone_async()
    }
    fn on_resize(&self, listener: ResizeListener) {
        self.disk.on_resize(listener);
    }
}
