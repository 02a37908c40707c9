//! Reads of a page-cached file by blocking work itself.
//!
//! Work that reads what it needs finds it in the cache of its own processor, and nobody has to wake it
//! for that. It never waits for the disk: what is not in memory is left to the engine.

use std::{os::fd::RawFd, sync::Arc};

use super::{Io, Segment, core::FileEntry, sys};
use crate::FileId;

/// A file whose pages may be in memory.
pub(crate) struct CachedFile {
    /// Keeps the descriptor open.
    _entry: Arc<FileEntry>,
    fd: RawFd,
}

impl CachedFile {
    /// Fills a buffer from `offset` on if all of that is in memory.
    pub(crate) fn try_read(&self, offset: u64, buffer: &mut [u8]) -> bool {
        let segment = [Segment::new(buffer.as_mut_ptr(), buffer.len())];
        // SAFETY: the segment is the buffer, which is borrowed until this returns.
        let read = unsafe { sys::preadv(self.fd, &segment, 1, offset, libc::RWF_NOWAIT) };
        usize::try_from(read) == Ok(buffer.len())
    }
}

impl Io {
    /// A file for blocking work to read from; `None` where that is the engine's alone, or has been in
    /// vain lately. The caller says how it [went](Self::cached_read_went).
    pub(crate) fn cached_file(&self, file: FileId) -> Option<CachedFile> {
        let entry = self.with_file(file, |file| Arc::clone(file.entry)).ok()?;
        let fd = entry.file.raw_fd()?;
        let possible = !entry.file.is_direct() && !self.has_faults(file);
        (possible && self.cached_pace.borrow_mut().allows())
            .then_some(CachedFile { _entry: entry, fd })
    }

    /// Whether all was in memory.
    pub(crate) fn cached_read_went(&self, well: bool) {
        self.cached_pace.borrow_mut().went(well);
    }
}
