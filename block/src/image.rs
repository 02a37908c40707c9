//! What a format implements: the map from guest bytes to extents.
//!
//! Two tiers. [`Image::try_map`] is synchronous, takes no lock that is ever held across I/O and
//! allocates nothing; almost every request ends there. [`Image::map`] and [`Image::prepare`] are
//! asynchronous: they read tables, allocate, copy on write.
//!
//! Writing is prepare → write the data → commit. [`Image::prepare`] reserves space and says where
//! the data goes; the queue writes it there straight from the caller's buffers; committing the
//! [`Prepared`] write makes it visible in the map. Dropping it instead gives the space back.
//!
//! An image holds no engine: every asynchronous method is given the calling queue's [`Io`].

use std::{path::PathBuf, sync::Arc};

use serde::Serialize;

use crate::{
    Capabilities, DiskTopology, Error, FileId, Format, GuestRange, Result,
    crypto::KeyChange,
    encryption::Encryption,
    extras::{ImageExtras, SnapshotInfo},
    io::{Buffers, Io},
    sync::LocalFuture,
    table::MapCache,
    types::HostOffset,
};

/// How a run of guest bytes lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Bytes of a host file.
    Data {
        /// The file, of this disk.
        file: FileId,
        /// Where in the file.
        offset: HostOffset,
    },
    /// Reads as zeroes.
    Zero,
    /// Bytes of a host file, encrypted as [`Image::encryption`] of the image says that holds them.
    Encrypted {
        /// Levels below the image that was asked (0: the image itself).
        depth: u16,
        /// The file, of this disk.
        file: FileId,
        /// Where in the file.
        offset: HostOffset,
    },
    /// Only the image's own [`Image::read_opaque`] can serve it: compressed data, for instance. The
    /// number says how far down the backing chain that image is (0: the image itself).
    Opaque {
        /// Levels below the image that was asked.
        depth: u32,
    },
}

/// A run of guest bytes that live in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The number of bytes.
    pub len: u64,
    /// How they live.
    pub kind: ExtentKind,
}

/// Consecutive extents of a mapped range; neighbours that continue each other are merged.
#[derive(Debug, Default)]
pub struct Extents {
    list: Vec<Extent>,
    len: u64,
    depth: u32,
}

/// The most extents one lookup returns; a longer range is looked up in pieces.
pub const MAX_EXTENTS: usize = 64;

impl Extents {
    /// Forgets everything, keeping the allocation.
    pub fn clear(&mut self) {
        self.list.clear();
        self.len = 0;
    }

    /// The extents in order.
    #[must_use]
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }

    /// Guest bytes covered.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether nothing is covered.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether no further extent fits.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.list.len() >= MAX_EXTENTS
    }

    /// Appends a run that only the image at the current depth can serve.
    pub fn push_opaque(&mut self, len: u64) {
        let depth = self.depth;
        self.push(len, ExtentKind::Opaque { depth });
    }

    /// Appends a run that the image at the current depth holds encrypted.
    pub fn push_encrypted(&mut self, len: u64, file: FileId, offset: HostOffset) {
        // Chains are much shorter than that.
        let depth = u16::try_from(self.depth).unwrap_or(u16::MAX);
        self.push(
            len,
            ExtentKind::Encrypted {
                depth,
                file,
                offset,
            },
        );
    }

    /// What `look_up` appends comes from the backing image.
    pub fn below<T>(&mut self, look_up: impl FnOnce(&mut Self) -> T) -> T {
        self.depth += 1;
        let result = look_up(self);
        self.depth -= 1;
        result
    }

    /// [`below`](Self::below) for an asynchronous lookup.
    pub async fn below_async<T>(&mut self, look_up: impl AsyncFnOnce(&mut Self) -> T) -> T {
        self.depth += 1;
        let result = look_up(self).await;
        self.depth -= 1;
        result
    }

    /// Appends a run, merging it with the last one where they continue each other. Opaque runs
    /// are merged too: their image serves any range.
    #[inline]
    pub fn push(&mut self, len: u64, kind: ExtentKind) {
        self.len += len;
        if self.list.is_empty() || !self.merge(len, kind) {
            self.list.push(Extent { len, kind });
        }
    }

    /// Merges a run with the last one if it continues that; returns whether it did.
    fn merge(&mut self, len: u64, kind: ExtentKind) -> bool {
        if let Some(last) = self.list.last_mut() {
            let continues = match (last.kind, kind) {
                (ExtentKind::Zero, ExtentKind::Zero) => true,
                (
                    ExtentKind::Data { file, offset },
                    ExtentKind::Data {
                        file: next_file,
                        offset: next,
                    },
                ) => file == next_file && offset.checked_add(last.len) == Some(next),
                (
                    ExtentKind::Encrypted {
                        depth,
                        file,
                        offset,
                    },
                    ExtentKind::Encrypted {
                        depth: next_depth,
                        file: next_file,
                        offset: next,
                    },
                ) => {
                    (depth, file) == (next_depth, next_file)
                        && offset.checked_add(last.len) == Some(next)
                }
                (ExtentKind::Opaque { depth }, ExtentKind::Opaque { depth: next }) => depth == next,
                _ => false,
            };
            if continues {
                last.len += len;
            }
            return continues;
        }
        false
    }
}

/// What a lookup is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Reading: data, zero and opaque extents, through the backing chain.
    Read,
    /// Writing in place: only data, encrypted or not, of this image that may be overwritten where it
    /// is.
    WriteInPlace,
}

/// A prepared write: space is reserved, nothing is visible yet.
///
/// Where the image is encrypted, so is everything that goes to `file`.
///
/// The queue fills `head` bytes before and `tail` bytes after the caller's data with what the image
/// holds there now (copy on write), writes everything at `offset - head` with one operation, and
/// commits. Dropping it without commit gives the space back.
pub struct Prepared<'a> {
    /// Guest bytes of the request this covers, from its start. At least one.
    pub len: u64,
    /// The file to write to.
    pub file: FileId,
    /// Where the first byte of the caller's data goes.
    pub offset: HostOffset,
    /// Guest bytes before the data that must be written along.
    pub head: u64,
    /// Guest bytes after the data that must be written along.
    pub tail: u64,
    /// Whether head and tail are zeroes: no need to read them from the image.
    pub fill_zero: bool,
    /// Makes the write visible.
    pub commit: Box<dyn Commit + 'a>,
}

/// The second half of a prepared write.
pub trait Commit {
    /// Makes the written data visible in the map.
    fn commit<'a>(self: Box<Self>, io: &'a Io) -> LocalFuture<'a, Result<()>>
    where
        Self: 'a;
}

/// How a run of guest bytes lives, as `map` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// The number of guest bytes.
    pub len: u64,
    /// Levels down the backing chain of the image that holds the run (0: this image).
    pub depth: u32,
    /// Some image of the chain has an allocation for the run.
    pub present: bool,
    /// The run reads as zeroes.
    pub zero: bool,
    /// The run has data in a file.
    pub data: bool,
    /// The data is compressed.
    pub compressed: bool,
    /// Where in the file named by `file` the run starts, if it is stored as it is.
    pub offset: Option<HostOffset>,
    /// The file, where `offset` is given.
    pub file: Option<FileId>,
}

/// What a header says, for `info`.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageInfo {
    /// Cluster or block size in bytes, where the format has one.
    pub cluster_size: Option<u64>,
    /// The backing file's name as the header has it.
    pub backing_file: Option<String>,
    /// The backing file's format as the header has it.
    pub backing_format: Option<String>,
    /// The path that the backing name resolves to; set even when the file was not opened.
    pub backing_path: Option<PathBuf>,
    /// Data in the image is encrypted.
    pub encrypted: bool,
    /// Whether data is compressed.
    pub compressed: bool,
    /// The image was not closed properly.
    pub dirty: bool,
    /// The image is marked corrupt.
    pub corrupt: bool,
    /// Fields that only this format has, as `qemu-img info` names them.
    pub format_specific: serde_json::Map<String, serde_json::Value>,
    /// Internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
}

/// What a format implements. One implementation serves the sync and the async variant, and every
/// queue shares it.
///
/// Ranges given to an image lie inside [`size`](Self::size), except while a resize is going on,
/// which drains the disk first.
pub trait Image: Send + Sync {
    /// The format.
    fn format(&self) -> Format;

    /// The size the guest sees, in bytes.
    fn size(&self) -> u64;

    /// Block sizes for the guest.
    fn topology(&self) -> DiskTopology;

    /// What the image can do, given how it was opened.
    fn capabilities(&self) -> Capabilities;

    /// What the header says.
    fn info(&self) -> ImageInfo;

    /// The image below, where there is one.
    fn backing(&self) -> Option<&Arc<dyn Image>> {
        None
    }

    /// How the image's own data is encrypted, where it is.
    fn encryption(&self) -> Option<&Arc<Encryption>> {
        None
    }

    /// The host file that holds the image's own data.
    fn data_file(&self) -> FileId;

    /// Looks `range` up without waiting: appends extents to `out` for as much of the range, from
    /// its start, as is known now. Nothing appended is a miss.
    ///
    /// # Errors
    /// When the map itself is corrupt.
    fn try_map(
        &self,
        range: GuestRange,
        intent: Intent,
        cache: &mut MapCache,
        out: &mut Extents,
    ) -> Result<()>;

    /// Looks `range` up for reading, loading tables as needed: appends extents to `out` for at
    /// least one byte of the range.
    fn map<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        out: &'a mut Extents,
    ) -> LocalFuture<'a, Result<()>>;

    /// Reads a range that [`map`](Self::map) called opaque at depth 0 into `buffers` from `at`.
    fn read_opaque<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        buffers: &'a Buffers,
        at: u64,
    ) -> LocalFuture<'a, Result<()>> {
        let _ = (io, range, buffers, at);
        Box::pin(async { Err(Error::corrupt("image has no opaque data")) })
    }

    /// Reserves space for writing the start of `range`, loading tables as needed. Waits for other
    /// writes in preparation that need the same clusters. `None` means: look again, it can be
    /// written in place now.
    fn prepare<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<Option<Prepared<'a>>>>;

    /// Forgets a range. What is smaller than the image's unit stays as it is.
    fn discard<'a>(&'a self, io: &'a Io, range: GuestRange) -> LocalFuture<'a, Result<()>>;

    /// Makes as much of `range`, from its start, read as zeroes as the map alone can express and
    /// returns the bytes done. The queue writes zeroes for a part the map cannot express
    /// (0 returned): it calls again after it.
    fn write_zeroes<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        may_unmap: bool,
    ) -> LocalFuture<'a, Result<u64>>;

    /// The length of the run from the start of `range` that must be written as plain zeroes because
    /// [`write_zeroes`](Self::write_zeroes) returned 0 for it.
    fn unaligned_zeroes(&self, range: GuestRange) -> u64 {
        range.len
    }

    /// Makes everything that completed before durable.
    fn flush<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>>;

    /// Writes the tables that completed writes rely on to the file, in crash order, without
    /// necessarily making the last of them durable: enough for this process to be killed.
    fn write_back<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        self.flush(io)
    }

    /// Whether the mapping of `range` is durable, so that a write in place needs only its own data
    /// synced.
    fn mapping_is_durable(&self, range: GuestRange) -> bool {
        let _ = range;
        true
    }

    /// The state of a run from the start of `range`.
    fn block_status<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
    ) -> LocalFuture<'a, Result<BlockStatus>>;

    /// Changes the size. The disk is drained.
    fn resize<'a>(&'a self, io: &'a Io, size: u64) -> LocalFuture<'a, Result<()>>;

    /// Writes one cluster compressed; `false` when it does not become smaller: the caller writes it
    /// as it is then.
    fn write_compressed<'a>(
        &'a self,
        io: &'a Io,
        range: GuestRange,
        data: &'a [u8],
    ) -> LocalFuture<'a, Result<bool>> {
        let _ = (io, range, data);
        let format = self.format();
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "{format} images have no compressed clusters"
            )))
        })
    }

    /// Changes the passwords of an encrypted image. The disk is drained.
    fn change_keys<'a>(&'a self, io: &'a Io, change: &'a KeyChange) -> LocalFuture<'a, Result<()>> {
        let _ = (io, change);
        let format = self.format();
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "this {format} image has no key slots"
            )))
        })
    }

    /// Makes the header name another backing file, or none; what is below this image stays open as it
    /// is. Everything that was written before is durable first. The disk is drained.
    fn set_backing<'a>(
        &'a self,
        io: &'a Io,
        name: Option<&'a str>,
        format: Option<&'a str>,
    ) -> LocalFuture<'a, Result<()>> {
        let _ = (io, name, format);
        let own = self.format();
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "{own} images have no backing file"
            )))
        })
    }

    /// Forgets everything the image itself holds, so that all of the disk is what the backing file
    /// has. The disk is drained.
    fn make_empty<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        let _ = io;
        let own = self.format();
        Box::pin(async move {
            Err(Error::unsupported(format!(
                "{own} images have no backing file"
            )))
        })
    }

    /// Snapshots, VM state and bitmaps, where the format keeps them.
    fn extras(&self) -> Option<&dyn ImageExtras> {
        None
    }

    /// Flushes and puts the file into the state of a cleanly closed image. The disk is drained.
    fn close<'a>(&'a self, io: &'a Io) -> LocalFuture<'a, Result<()>> {
        self.flush(io)
    }
}
