//! What an image keeps beside the disk: internal snapshots, the state of a virtual machine, dirty
//! bitmaps.

use std::sync::Arc;

use serde::Serialize;

use crate::{Error, Format, Result, dirty::DirtyBits, hooks::Hook, io::Io, sync::LocalFuture};

/// What the caller knows of a new snapshot.
#[derive(Clone, Debug, Default)]
pub struct NewSnapshot {
    /// The name.
    pub name: String,
    /// Seconds since 1970.
    pub date_sec: u32,
    /// Nanoseconds within the second.
    pub date_nsec: u32,
    /// Guest run time in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes of VM state, written before with
    /// [`write_vm_state`](DiskExtras::write_vm_state).
    pub vm_state_size: u64,
    /// The record/replay instruction count, where there is one.
    pub icount: Option<u64>,
}

/// An internal snapshot, as the image lists it.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SnapshotInfo {
    /// Unique id.
    pub id: String,
    /// The name given to it.
    pub name: String,
    /// Bytes of virtual machine state.
    pub vm_state_size: u64,
    /// Creation time, seconds since 1970.
    pub date_sec: u32,
    /// Creation time, nanoseconds within the second.
    pub date_nsec: u32,
    /// Guest run time in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Disk size at the snapshot, in bytes.
    pub disk_size: u64,
    /// The record/replay instruction count, where there is one.
    pub icount: Option<u64>,
}

/// A persistent dirty bitmap, as the image lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name, unique in the image.
    pub name: String,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// Whether it records writes.
    pub enabled: bool,
    /// It was not stored correctly, or this program does not understand it: all that can be done
    /// with it is removing it.
    pub inconsistent: bool,
}

/// What becomes of a bitmap.
#[derive(Clone, Copy, Debug)]
pub enum BitmapChange<'a> {
    /// It is made, with no bit set.
    Add {
        /// Bytes of the disk that a bit stands for: a power of two from 512 to 2 GiB; the image's
        /// default (its cluster size within 4 KiB to 64 KiB) otherwise.
        granularity: Option<u64>,
        /// Whether it records writes.
        enabled: bool,
    },
    /// It is removed.
    Remove,
    /// No bit is set any more.
    Clear,
    /// It records writes from now on.
    Enable,
    /// It records no writes from now on.
    Disable,
    /// The bits of another one, of this image or another, are set, too.
    Merge(&'a DirtyBits),
}

/// What an image implements to keep such things. The disk is drained during every call but
/// [`bitmaps`](Self::bitmaps).
pub trait ImageExtras: Send + Sync {
    /// Makes an internal snapshot and returns its id.
    fn create_snapshot<'a>(
        &'a self,
        io: &'a Io,
        new: &'a NewSnapshot,
    ) -> LocalFuture<'a, Result<String>>;

    /// Makes the disk what it was at a snapshot.
    fn apply_snapshot<'a>(&'a self, io: &'a Io, id_or_name: &'a str)
    -> LocalFuture<'a, Result<()>>;

    /// Deletes a snapshot.
    fn delete_snapshot<'a>(
        &'a self,
        io: &'a Io,
        id_or_name: &'a str,
    ) -> LocalFuture<'a, Result<()>>;

    /// Fills `buf` from `offset` of the VM state; zeroes where nothing was written.
    fn read_vm_state<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        buf: &'a mut [u8],
    ) -> LocalFuture<'a, Result<()>>;

    /// Writes `data` at `offset` of the VM state.
    fn write_vm_state<'a>(
        &'a self,
        io: &'a Io,
        offset: u64,
        data: &'a [u8],
    ) -> LocalFuture<'a, Result<()>>;

    /// The persistent bitmaps.
    fn bitmaps(&self) -> Vec<BitmapInfo>;

    /// The bits of a bitmap as they are now.
    fn bitmap_bits<'a>(&'a self, io: &'a Io, name: &'a str) -> LocalFuture<'a, Result<DirtyBits>>;

    /// Changes a bitmap.
    fn change_bitmap<'a>(
        &'a self,
        io: &'a Io,
        name: &'a str,
        change: BitmapChange<'a>,
    ) -> LocalFuture<'a, Result<()>>;

    /// What records writes in the bitmaps.
    fn recorder(&self) -> Arc<dyn Hook>;
}

/// What a disk keeps beside its bytes. Every call waits until no request is in flight, and new
/// requests wait until it is done. Formats that keep no such things answer
/// [`Unsupported`](crate::ErrorKind::Unsupported).
pub trait DiskExtras {
    /// The internal snapshots, in the order of the image's table.
    fn snapshots(&self) -> Vec<SnapshotInfo>;

    /// Makes an internal snapshot of the disk and returns its id.
    ///
    /// # Errors
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) and
    /// [`Unsupported`](crate::ErrorKind::Unsupported) for what the image cannot hold,
    /// [`Corrupt`](crate::ErrorKind::Corrupt) for tables that cannot be walked, the host's. The image
    /// is as before then.
    fn create_snapshot(&self, new: &NewSnapshot) -> Result<String>;

    /// Makes the disk what it was at a snapshot, named by id or else by name; its size too.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound); otherwise as
    /// [`create_snapshot`](Self::create_snapshot).
    fn apply_snapshot(&self, id_or_name: &str) -> Result<()>;

    /// Deletes a snapshot, named by id or else by name.
    ///
    /// # Errors
    /// As [`apply_snapshot`](Self::apply_snapshot).
    fn delete_snapshot(&self, id_or_name: &str) -> Result<()>;

    /// Fills `buf` from byte `offset` of the VM state; zeroes where nothing was written.
    ///
    /// # Errors
    /// Those of a read.
    fn read_vm_state(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Writes `data` at byte `offset` of the VM state, which lives behind the disk until a snapshot
    /// takes it.
    ///
    /// # Errors
    /// Those of a write.
    fn write_vm_state(&self, data: &[u8], offset: u64) -> Result<()>;

    /// The persistent dirty bitmaps, in the order of the image.
    fn bitmaps(&self) -> Vec<BitmapInfo>;

    /// The bits of a bitmap as they are now; [`DirtyBits::ranges`] lists what is dirty.
    ///
    /// # Errors
    /// [`NotFound`](crate::ErrorKind::NotFound),
    /// [`Corrupt`](crate::ErrorKind::Corrupt) for one that is inconsistent or damaged.
    fn bitmap_bits(&self, name: &str) -> Result<DirtyBits>;

    /// Changes a bitmap. It reaches the image when the disk is closed.
    ///
    /// # Errors
    /// As [`bitmap_bits`](Self::bitmap_bits), and
    /// [`InvalidArgument`](crate::ErrorKind::InvalidArgument) for what cannot be.
    fn change_bitmap(&self, name: &str, change: BitmapChange<'_>) -> Result<()>;
}

/// A disk that keeps nothing beside its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoExtras;

impl NoExtras {
    fn refuse<T>() -> Result<T> {
        Err(Error::unsupported(
            "this disk keeps no snapshots, VM state or bitmaps",
        ))
    }
}

impl DiskExtras for NoExtras {
    fn snapshots(&self) -> Vec<SnapshotInfo> {
        Vec::new()
    }
    fn create_snapshot(&self, _: &NewSnapshot) -> Result<String> {
        Self::refuse()
    }
    fn apply_snapshot(&self, _: &str) -> Result<()> {
        Self::refuse()
    }
    fn delete_snapshot(&self, _: &str) -> Result<()> {
        Self::refuse()
    }
    fn read_vm_state(&self, _: &mut [u8], _: u64) -> Result<()> {
        Self::refuse()
    }
    fn write_vm_state(&self, _: &[u8], _: u64) -> Result<()> {
        Self::refuse()
    }
    fn bitmaps(&self) -> Vec<BitmapInfo> {
        Vec::new()
    }
    fn bitmap_bits(&self, _: &str) -> Result<DirtyBits> {
        Self::refuse()
    }
    fn change_bitmap(&self, _: &str, _: BitmapChange<'_>) -> Result<()> {
        Self::refuse()
    }
}

/// The error of a format that keeps no such things.
pub(crate) fn keeps_none(format: Format, what: &str) -> Error {
    Error::unsupported(format!("{format} images keep no {what}"))
}
