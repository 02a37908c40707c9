//! [`Io`]: what an image is given to do I/O with, on the calling queue's own thread.

use std::{
    cell::RefCell,
    path::PathBuf,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    AlignedBuf, EngineFile, FallocateMode, IoAlignment, Segment, Segments, buffers,
    core::{DiskCore, FileEntry},
    driver::Driver,
    operation::{Eof, NewOp, OpKind},
    pace::Pace,
    pins::QueuePins,
    spare::SpareBuffers,
};
use crate::faults::{Event, Operation};
use crate::sync::join_all;
use crate::{Error, ErrorKind, FileId, Result, table::MapCache};

/// The most bytes of a buffer of zeroes.
const ZERO_BUFFER: u64 = 64 << 10;

struct OpenFile {
    entry: Arc<FileEntry>,
    engine_file: EngineFile,
    alignment: IoAlignment,
}

/// Asynchronous I/O on the files of one disk, by one queue. It stays on the queue's thread.
pub struct Io {
    pub(crate) driver: Rc<Driver>,
    pub(crate) core: Arc<DiskCore>,
    pub(crate) pins: QueuePins,
    pub(crate) cache: RefCell<MapCache>,
    pub(crate) spare: SpareBuffers,
    pub(super) cached_pace: RefCell<Pace>,
    files: RefCell<Vec<OpenFile>>,
}

/// A file as the hit path needs it.
pub(crate) struct FileView<'a> {
    pub(crate) entry: &'a Arc<FileEntry>,
    pub(crate) engine_file: EngineFile,
    /// The file's, without a look at the file.
    pub(crate) alignment: IoAlignment,
}

impl Io {
    pub(crate) fn new(driver: &Rc<Driver>, core: &Arc<DiskCore>) -> Result<Self> {
        let io = Self {
            driver: Rc::clone(driver),
            core: Arc::clone(core),
            pins: core.pins.register(),
            cache: RefCell::default(),
            spare: SpareBuffers::default(),
            cached_pace: RefCell::default(),
            files: RefCell::default(),
        };
        io.open_files(core.file_count())?;
        Ok(io)
    }

    /// Makes the disk's first `count` files known to the engine.
    fn open_files(&self, count: u32) -> Result<()> {
        let mut files = self.files.borrow_mut();
        for index in files.len() as u32..count {
            let entry = self.core.file(FileId(index))?;
            let engine_file = self.driver.register(&entry.file)?;
            let alignment = entry.file.alignment();
            files.push(OpenFile {
                entry,
                engine_file,
                alignment,
            });
        }
        Ok(())
    }

    /// Calls `use_file` with a file of the disk.
    pub(crate) fn with_file<T>(
        &self,
        id: FileId,
        use_file: impl FnOnce(FileView<'_>) -> T,
    ) -> Result<T> {
        if id.0 as usize >= self.files.borrow().len() {
            self.open_files(id.0.saturating_add(1).min(self.core.file_count()))?;
        }
        let files = self.files.borrow();
        let file = files
            .get(id.0 as usize)
            .ok_or_else(|| Error::corrupt(format!("disk has no file number {}", id.0)))?;
        Ok(use_file(FileView {
            entry: &file.entry,
            engine_file: file.engine_file,
            alignment: file.alignment,
        }))
    }

    fn open_file(&self, id: FileId) -> Result<(Arc<FileEntry>, EngineFile)> {
        self.with_file(id, |file| (Arc::clone(file.entry), file.engine_file))
    }

    /// The length of a file in bytes, now.
    ///
    /// # Errors
    /// The host's error.
    pub fn file_len(&self, file: FileId) -> Result<u64> {
        self.with_file(file, |file| file.entry.file.len())?
    }

    /// Whether reads and writes bypass the page cache.
    pub(crate) fn is_direct(&self, file: FileId) -> bool {
        self.with_file(file, |file| file.entry.file.is_direct())
            .unwrap_or(false)
    }

    /// Whether a file can become longer.
    pub(crate) fn can_grow(&self, file: FileId) -> bool {
        self.with_file(file, |file| !file.entry.file.is_block_device())
            .unwrap_or(false)
    }

    /// The path of a file.
    #[must_use]
    pub fn file_path(&self, file: FileId) -> PathBuf {
        self.with_file(file, |file| file.entry.path().to_owned())
            .unwrap_or_default()
    }

    /// Host bytes in use by a file.
    ///
    /// # Errors
    /// The host's error.
    pub fn file_allocated(&self, file: FileId) -> Result<u64> {
        self.with_file(file, |file| file.entry.file.allocated())?
    }

    /// Reads `len` bytes.
    ///
    /// # Errors
    /// [`ErrorKind::ShortTransfer`] when the file ends before; the host's error otherwise.
    pub async fn read(&self, file: FileId, offset: u64, len: usize) -> Result<AlignedBuf> {
        self.read_buffer(file, offset, len, Eof::Error).await
    }

    /// Reads `len` bytes, zeroes for what lies beyond the end of the file.
    ///
    /// # Errors
    /// The host's error.
    pub async fn read_padded(&self, file: FileId, offset: u64, len: usize) -> Result<AlignedBuf> {
        self.read_buffer(file, offset, len, Eof::Zeroes).await
    }

    async fn read_buffer(
        &self,
        file: FileId,
        offset: u64,
        len: usize,
        eof: Eof,
    ) -> Result<AlignedBuf> {
        let (buffer, lead) = self
            .read_around(file, offset, len, eof, AlignedBuf::zeroed)
            .await?;
        if buffer.len() == len {
            return Ok(buffer);
        }
        Ok(AlignedBuf::from_slice(&buffer[lead..lead + len]))
    }

    /// [`read_padded`](Self::read_padded) into a buffer that `buffer` makes, of at least as many bytes
    /// as it is asked for: whole host blocks. Returns it, and where in it the bytes start.
    pub(crate) async fn read_padded_into(
        &self,
        file: FileId,
        offset: u64,
        len: usize,
        buffer: impl FnOnce(usize) -> AlignedBuf,
    ) -> Result<(AlignedBuf, usize)> {
        self.read_around(file, offset, len, Eof::Zeroes, buffer)
            .await
    }

    async fn read_around(
        &self,
        file: FileId,
        offset: u64,
        len: usize,
        eof: Eof,
        buffer: impl FnOnce(usize) -> AlignedBuf,
    ) -> Result<(AlignedBuf, usize)> {
        let (entry, engine_file) = self.open_file(file)?;
        let fail = |kind: ErrorKind| {
            Error::new(kind)
                .operation("read")
                .offset(offset)
                .path(entry.path())
        };
        self.inject(file, Operation::Read, offset, len as u64)
            .map_err(fail)?;
        let unit = entry.file.alignment().offset;
        let lead = offset % u64::from(unit);
        let span = usize::try_from(lead)
            .ok()
            .and_then(|lead| lead.checked_add(len))
            .and_then(|span| span.checked_next_multiple_of(unit as usize))
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange).path(entry.path()))?;
        let exact = span == len;
        let mut buffer = buffer(span);
        let segments = whole(&mut buffer[..span]);
        let (result, buffer) = self
            .driver
            .operation(NewOp {
                kind: OpKind::Read {
                    eof: if exact { eof } else { Eof::Zeroes },
                },
                file: engine_file,
                offset: offset - lead,
                segments,
                unit,
                buffer: Some(buffer),
            })
            .await;
        result.map_err(fail)?;
        let buffer = buffer.ok_or_else(|| fail(ErrorKind::Cancelled))?;
        if !exact && eof == Eof::Error && entry.file.len()? < offset.saturating_add(len as u64) {
            return Err(fail(ErrorKind::ShortTransfer));
        }
        Ok((buffer, lead as usize))
    }

    /// Reads into segments that the caller keeps valid until this future ends.
    pub(crate) async fn read_segments(
        &self,
        file: FileId,
        offset: u64,
        segments: Segments,
    ) -> Result<()> {
        let (entry, engine_file) = self.open_file(file)?;
        if !entry.file.alignment().fits(offset, &segments) {
            let len: usize = segments.iter().map(Segment::len).sum();
            let buffer = self.read_buffer(file, offset, len, entry.eof()).await?;
            buffers::scatter(&segments, &buffer);
            return Ok(());
        }
        let fail = |kind: ErrorKind| {
            Error::new(kind)
                .operation("read")
                .offset(offset)
                .path(entry.path())
        };
        let len = segments.iter().map(|segment| segment.len() as u64).sum();
        self.inject(file, Operation::Read, offset, len)
            .map_err(fail)?;
        let (result, _) = self
            .driver
            .operation(NewOp {
                kind: OpKind::Read { eof: entry.eof() },
                file: engine_file,
                offset,
                segments,
                unit: entry.file.alignment().offset,
                buffer: None,
            })
            .await;
        result.map_err(fail)
    }

    /// Writes a buffer and gives it back.
    ///
    /// # Errors
    /// The host's error.
    pub async fn write(
        &self,
        file: FileId,
        offset: u64,
        mut buffer: AlignedBuf,
    ) -> Result<AlignedBuf> {
        let (entry, _) = self.open_file(file)?;
        let segments = whole(&mut buffer);
        if entry.file.alignment().fits(offset, &segments) {
            return self
                .write_aligned(file, offset, segments, Some(buffer), false)
                .await?
                .ok_or_else(|| Error::new(ErrorKind::Cancelled));
        }
        self.write_segments(file, offset, segments, false).await?;
        Ok(buffer)
    }

    /// Writes segments that the caller keeps valid until this future ends.
    pub(crate) async fn write_segments(
        &self,
        file: FileId,
        offset: u64,
        segments: Segments,
        dsync: bool,
    ) -> Result<()> {
        let (entry, _) = self.open_file(file)?;
        if entry.file.alignment().fits(offset, &segments) {
            return self
                .write_aligned(file, offset, segments, None, dsync)
                .await
                .map(drop);
        }
        self.read_modify_write(&entry, file, offset, &segments, dsync)
            .await
    }

    /// Writes zeroes, all from one small buffer.
    pub(crate) async fn write_zeroes(&self, file: FileId, offset: u64, len: u64) -> Result<()> {
        let mut zeroes = AlignedBuf::zeroed(len.min(ZERO_BUFFER) as usize);
        let mut segments = Segments::new();
        let mut left = len;
        while left > 0 {
            let part = left.min(ZERO_BUFFER);
            segments.push(Segment::new(zeroes.as_mut_ptr(), part as usize));
            left -= part;
        }
        self.write_segments(file, offset, segments, false).await
    }

    async fn write_aligned(
        &self,
        file: FileId,
        offset: u64,
        segments: Segments,
        buffer: Option<AlignedBuf>,
        dsync: bool,
    ) -> Result<Option<AlignedBuf>> {
        let (entry, _) = self.open_file(file)?;
        let len: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let _range = match &entry.ranges {
            Some(ranges) => Some(ranges.hold(offset, offset.saturating_add(len), false).await),
            None => None,
        };
        self.write_now(file, offset, segments, buffer, dsync).await
    }

    /// One write operation, whatever is held.
    async fn write_now(
        &self,
        file: FileId,
        offset: u64,
        segments: Segments,
        buffer: Option<AlignedBuf>,
        dsync: bool,
    ) -> Result<Option<AlignedBuf>> {
        let (entry, engine_file) = self.open_file(file)?;
        let fail = |kind: ErrorKind| {
            Error::new(kind)
                .operation("write")
                .offset(offset)
                .path(entry.path())
        };
        if !entry.file.is_writable() {
            return Err(fail(ErrorKind::ReadOnly));
        }
        let len = segments.iter().map(|segment| segment.len() as u64).sum();
        self.inject(file, Operation::Write, offset, len)
            .map_err(fail)?;
        let (result, buffer) = self
            .driver
            .operation(NewOp {
                kind: OpKind::Write {
                    dsync: dsync && !self.core.never_sync,
                },
                file: engine_file,
                offset,
                segments,
                unit: entry.file.alignment().offset,
                buffer,
            })
            .await;
        result.map_err(fail)?;
        Ok(buffer)
    }

    /// A write whose memory or range does not suit the file. The host blocks at its ends that it
    /// does not fill are read and changed, with every other write to them excluded.
    async fn read_modify_write(
        &self,
        entry: &Arc<FileEntry>,
        file: FileId,
        offset: u64,
        segments: &Segments,
        dsync: bool,
    ) -> Result<()> {
        let len: u64 = segments.iter().map(|segment| segment.len() as u64).sum();
        let unit = u64::from(entry.file.alignment().offset);
        let start = offset - offset % unit;
        let end = offset
            .checked_add(len)
            .and_then(|end| end.checked_next_multiple_of(unit))
            .ok_or_else(|| Error::new(ErrorKind::OutOfRange).path(entry.path()))?;
        let fills_blocks = start == offset && end == offset + len;
        let _range = match &entry.ranges {
            Some(ranges) => Some(ranges.hold(start, end, !fills_blocks).await),
            None => None,
        };
        let mut buffer = AlignedBuf::zeroed((end - start) as usize);
        let mut partial = Vec::new();
        if start != offset {
            partial.push(start);
        }
        let last = end - unit;
        if end != offset + len && !partial.contains(&last) {
            partial.push(last);
        }
        let reads = partial
            .iter()
            .map(|block| self.read_padded(file, *block, unit as usize));
        for (block, read) in partial.iter().zip(join_all(reads).await) {
            let at = (block - start) as usize;
            buffer[at..at + unit as usize].copy_from_slice(&read?);
        }
        let at = (offset - start) as usize;
        buffers::gather(segments, &mut buffer[at..at + len as usize]);
        let file_len = entry.file.len()?;
        let segments = whole(&mut buffer);
        self.write_now(file, start, segments, Some(buffer), dsync)
            .await?;
        let wanted = file_len.max(offset + len);
        if entry.role() != super::FileRole::Clusters && end > wanted {
            // Direct I/O wrote whole blocks; a raw image keeps its length.
            self.set_len(file, wanted).await?;
        }
        Ok(())
    }

    /// Whether nothing of this disk is ever synced: durability is not worth any detour.
    pub(crate) fn never_syncs(&self) -> bool {
        self.core.never_sync
    }

    /// Makes completed writes durable (`fdatasync`). Callers of several queues share one sync where
    /// it has not started yet. After a failure every later sync of the file fails.
    ///
    /// # Errors
    /// The host's error, or [`ErrorKind::SyncFailed`].
    pub async fn sync(&self, file: FileId) -> Result<()> {
        if self.core.never_sync {
            return Ok(());
        }
        let (entry, engine_file) = self.open_file(file)?;
        let fail = |kind: ErrorKind| Error::new(kind).operation("sync").path(entry.path());
        if entry.sync_failed.load(Ordering::Acquire) {
            return Err(fail(ErrorKind::SyncFailed));
        }
        self.event(file, Event::FlushToDisk).await;
        self.inject(file, Operation::Flush, 0, 0).map_err(fail)?;
        entry
            .sync
            .run(|| async {
                // Asked again: the run that this one waited for may have failed, and the host does
                // not fail the next one for it.
                if entry.sync_failed.load(Ordering::Acquire) {
                    return Err(fail(ErrorKind::SyncFailed));
                }
                let (result, _) = self
                    .driver
                    .operation(NewOp {
                        kind: OpKind::Sync,
                        file: engine_file,
                        offset: 0,
                        segments: Segments::new(),
                        unit: 1,
                        buffer: None,
                    })
                    .await;
                result.map_err(|kind| {
                    entry.sync_failed.store(true, Ordering::Release);
                    fail(kind)
                })
            })
            .await
            .map_err(|error| error.operation("sync").path(entry.path()))
    }

    /// Changes the allocation of a range.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the file system cannot; the host's error otherwise.
    pub async fn fallocate(
        &self,
        file: FileId,
        mode: FallocateMode,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let (entry, engine_file) = self.open_file(file)?;
        if !entry.file.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly).path(entry.path()));
        }
        let operation = match mode {
            FallocateMode::PunchHole => Operation::Discard,
            _ => Operation::WriteZeroes,
        };
        self.inject(file, operation, offset, len)
            .map_err(|kind| Error::new(kind).operation("fallocate").path(entry.path()))?;
        let unit = u64::from(entry.file.alignment().offset);
        let _range = match &entry.ranges {
            Some(ranges) => {
                let end = offset.saturating_add(len).next_multiple_of(unit);
                Some(ranges.hold(offset - offset % unit, end, true).await)
            }
            None => None,
        };
        let (result, _) = self
            .driver
            .operation(NewOp {
                kind: OpKind::Fallocate { mode, len },
                file: engine_file,
                offset,
                segments: Segments::new(),
                unit: 1,
                buffer: None,
            })
            .await;
        result.map_err(|kind| {
            Error::new(kind)
                .operation("fallocate")
                .offset(offset)
                .path(entry.path())
        })
    }

    /// Changes the length of a file.
    ///
    /// # Errors
    /// The host's error.
    pub async fn set_len(&self, file: FileId, len: u64) -> Result<()> {
        let (entry, _) = self.open_file(file)?;
        self.run(move || entry.file.set_len(len)).await?
    }

    /// The next run of data of a file at or after `offset`; `None` when only a hole follows.
    ///
    /// # Errors
    /// The host's error.
    pub async fn next_data(&self, file: FileId, offset: u64) -> Result<Option<(u64, u64)>> {
        let (entry, _) = self.open_file(file)?;
        self.inject(file, Operation::BlockStatus, offset, 1)
            .map_err(|kind| Error::new(kind).operation("seek").path(entry.path()))?;
        self.run(move || entry.file.next_data(offset)).await?
    }

    /// Waits.
    ///
    /// # Errors
    /// The host's error.
    pub async fn sleep(&self, after: Duration) -> Result<()> {
        let (result, _) = self
            .driver
            .operation(NewOp {
                kind: OpKind::Timer { after },
                file: EngineFile(0),
                offset: 0,
                segments: Segments::new(),
                unit: 1,
                buffer: None,
            })
            .await;
        result.map_err(|kind| Error::new(kind).operation("sleep"))
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        for file in self.files.get_mut().drain(..) {
            self.driver.unregister(file.engine_file);
        }
        self.core.pins.unregister(&self.pins);
    }
}

/// All of a buffer as a scatter list.
fn whole(buffer: &mut [u8]) -> Segments {
    let mut segments = Segments::new();
    if !buffer.is_empty() {
        segments.push(Segment::new(buffer.as_mut_ptr(), buffer.len()));
    }
    segments
}
