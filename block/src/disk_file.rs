//! What a caller sees of an opened disk.
//!
//! ```text
//! DiskFile        control plane and synchronous I/O: any thread, shared by reference
//!    ▲
//! AsyncDiskFile   also makes data planes: one AsyncIo per device queue, on the thread that drives it
//! ```

use std::path::Path;

use crate::{
    Error, Format, Result,
    crypto::KeyChange,
    extras::{DiskExtras, NoExtras},
    image::{BlockStatus, ImageInfo},
    io::AsyncIo,
};

/// Block sizes that a front end reports to the guest, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskTopology {
    /// The smallest unit the guest can address.
    pub logical_block_size: u32,
    /// The unit that is written without a read-modify-write in the host.
    pub physical_block_size: u32,
    /// The preferred smallest request; 0 when nothing is known.
    pub minimum_io_size: u32,
    /// The preferred request size; 0 when nothing is known.
    pub optimal_io_size: u32,
}

impl Default for DiskTopology {
    fn default() -> Self {
        Self {
            logical_block_size: 512,
            physical_block_size: 512,
            minimum_io_size: 0,
            optimal_io_size: 0,
        }
    }
}

/// What a disk can do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Writes, discards, write zeroes and resize are accepted.
    pub writable: bool,
    /// Discard gives host space back.
    pub discard: bool,
    /// Write zeroes is cheaper than writing zeroes.
    pub write_zeroes: bool,
    /// The size can be changed.
    pub resize: bool,
    /// The unit, in bytes, in which discard gives space back; requests smaller than it do nothing.
    pub discard_granularity: u32,
    /// Discard really removes the data from the host: no backing file or snapshot keeps a copy.
    pub secure_erase: bool,
    /// What is written takes the place of what was there, in the host's file too: after writing
    /// everything, no backing file, snapshot or freed cluster of the image keeps a copy.
    pub overwrite: bool,
}

/// An opened image: control plane and synchronous I/O.
///
/// Offsets and lengths are in bytes and need no alignment. A call either transfers everything or
/// fails. A call made on a thread that has requests in flight on an [`AsyncIo`] of the same disk is
/// refused with [`ErrorKind::WouldDeadlock`](crate::ErrorKind::WouldDeadlock).
pub trait DiskFile: Send + Sync {
    /// The path it was opened by.
    fn path(&self) -> &Path;

    /// The format of the image.
    fn format(&self) -> Format;

    /// The size that the guest sees, in bytes.
    fn size(&self) -> u64;

    /// Host bytes in use by the image file itself, without files it names.
    ///
    /// # Errors
    /// The error of the host, if it cannot tell.
    fn physical_size(&self) -> Result<u64>;

    /// Block sizes for the guest.
    fn topology(&self) -> DiskTopology;

    /// What the disk can do.
    fn capabilities(&self) -> Capabilities;

    /// What the header says: format specifics, backing file, snapshots.
    fn info(&self) -> ImageInfo;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    /// [`OutOfRange`](crate::ErrorKind::OutOfRange) beyond the end; the host's error otherwise.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes all of `buf` at `offset`.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at), and [`ReadOnly`](crate::ErrorKind::ReadOnly).
    fn write_at(&self, buf: &[u8], offset: u64) -> Result<()>;

    /// Makes everything that completed before durable.
    ///
    /// # Errors
    /// The host's error. After a failed sync every later flush fails too.
    fn flush(&self) -> Result<()>;

    /// Tells the disk that the range is not needed any more. What it reads afterwards is the
    /// format's business: zeroes or the old content, never the data of another range.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// Makes the range read as zeroes; with `may_unmap` host space may be given back.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<()>;

    /// How the guest bytes from `offset` live: the state of a run of at most `len` bytes, as
    /// `map` and `convert` need it. The run has at least one byte and may be shorter than the
    /// state really lasts.
    ///
    /// # Errors
    /// As [`read_at`](Self::read_at).
    fn block_status(&self, offset: u64, len: u64) -> Result<BlockStatus>;

    /// Changes the size. Requests in flight end first; new ones wait until it is done.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where the format cannot.
    fn resize(&self, size: u64) -> Result<()>;

    /// Writes `data` as one compressed cluster at `offset`, which must be aligned to the cluster
    /// size; `data` is one cluster, or less at the end of the disk.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where the format has no compression.
    fn write_compressed(&self, data: &[u8], offset: u64) -> Result<()>;

    /// Adds or removes a password of an encrypted image. The key in use stays the same.
    ///
    /// # Errors
    /// [`Unsupported`](crate::ErrorKind::Unsupported) where there are no key slots,
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) when the change cannot be made, or
    /// would leave no password.
    fn change_keys(&self, change: &KeyChange) -> Result<()> {
        let _ = change;
        Err(Error::unsupported("this disk has no key slots"))
    }

    /// Snapshots, VM state and bitmaps.
    fn extras(&self) -> &dyn DiskExtras {
        &NoExtras
    }

    /// Flushes and closes: caches are written, locks released. Dropping does the same but cannot
    /// report an error.
    ///
    /// # Errors
    /// As [`flush`](Self::flush).
    fn close(&self) -> Result<()>;

    /// A second handle on the same opened disk, with the same caches and locks.
    fn try_clone(&self) -> Result<Box<dyn DiskFile>>;
}

/// A [`DiskFile`] that also makes data planes for device queues.
pub trait AsyncDiskFile: DiskFile {
    /// A data plane for one queue with at most `ring_depth` requests in flight. It belongs to the
    /// calling thread and is driven there.
    ///
    /// # Errors
    /// The host's error when the engine cannot be set up; a `ring_depth` of 0.
    fn create_async_io(&self, ring_depth: u32) -> Result<Box<dyn AsyncIo>>;

    /// A second handle on the same opened disk.
    fn clone_async(&self) -> Box<dyn AsyncDiskFile>;

    /// Calls `listener` with the new size after every resize, on the thread that resized.
    fn on_resize(&self, listener: Box<dyn Fn(u64) + Send + Sync>);
}
