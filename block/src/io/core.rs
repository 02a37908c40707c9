//! What all queues of an opened disk share below the image: its host files, pins and pool.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, RwLock,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
};

use super::{Host, HostFile, Pool, operation::Eof, pins::Pins, ranges::RangeTable};
use crate::sync::Coalescer;
use crate::{FileId, Result, faults::FaultPlaces};

/// What a file of a disk is used for: it decides what the end of the file means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// Raw data of the declared size: reading beyond the end is an I/O error, and the length is
    /// never changed by a write.
    RawData,
    /// Clusters of a format, or a backing file: what is missing reads as zeroes.
    Clusters,
    /// A data file that is a raw disk by itself: what is missing reads as zeroes, and the length, which
    /// is that of the disk already, is never changed by a write.
    RawClusters,
}

/// A host file of a disk and what belongs to it.
#[derive(Debug)]
pub(crate) struct FileEntry {
    pub(crate) file: Arc<HostFile>,
    role: AtomicU8,
    /// Writes in flight, where direct I/O makes that matter.
    pub(crate) ranges: Option<RangeTable>,
    pub(crate) sync: Coalescer,
    /// A sync failed: what it should have covered may be lost, whatever later ones say.
    pub(crate) sync_failed: AtomicBool,
}

impl FileEntry {
    /// What a read of data does at the end of the file.
    pub(crate) fn eof(&self) -> Eof {
        match self.role() {
            FileRole::RawData => Eof::Error,
            FileRole::Clusters | FileRole::RawClusters => Eof::Zeroes,
        }
    }

    pub(crate) fn role(&self) -> FileRole {
        match self.role.load(Ordering::Acquire) {
            0 => FileRole::RawData,
            1 => FileRole::Clusters,
            _ => FileRole::RawClusters,
        }
    }

    pub(crate) fn set_role(&self, role: FileRole) {
        self.role.store(role as u8, Ordering::Release);
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }
}

/// What all queues of a disk share below the image.
pub(crate) struct DiskCore {
    /// Unique in the process.
    pub(crate) id: u64,
    pub(crate) path: PathBuf,
    pub(crate) host: Arc<dyn Host>,
    pub(crate) pins: Arc<Pins>,
    pub(crate) pool: Pool,
    /// Nothing of the disk is ever synced to the host's disk.
    pub(crate) never_sync: bool,
    /// Faults on purpose.
    pub(crate) faults: FaultPlaces,
    files: RwLock<Vec<Arc<FileEntry>>>,
}

impl DiskCore {
    pub(crate) fn new(path: &Path, host: Arc<dyn Host>, pool: Pool, never_sync: bool) -> Arc<Self> {
        Self::with_faults(path, host, pool, never_sync, FaultPlaces::default())
    }

    pub(crate) fn with_faults(
        path: &Path,
        host: Arc<dyn Host>,
        pool: Pool,
        never_sync: bool,
        faults: FaultPlaces,
    ) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            path: path.to_owned(),
            host,
            pins: Arc::default(),
            pool,
            never_sync,
            faults,
            files: RwLock::default(),
        })
    }

    /// Adds a file to the disk.
    pub(crate) fn add_file(&self, file: HostFile, role: FileRole) -> FileId {
        let entry = FileEntry {
            ranges: (file.is_direct() && file.is_writable()).then(RangeTable::default),
            file: Arc::new(file),
            role: AtomicU8::new(role as u8),
            sync: Coalescer::default(),
            sync_failed: AtomicBool::new(false),
        };
        let mut files = self
            .files
            .write()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        files.push(Arc::new(entry));
        FileId((files.len() - 1) as u32)
    }

    /// A file of the disk.
    pub(crate) fn file(&self, id: FileId) -> Result<Arc<FileEntry>> {
        let files = self
            .files
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        files
            .get(id.0 as usize)
            .cloned()
            .ok_or_else(|| crate::Error::corrupt(format!("disk has no file number {}", id.0)))
    }

    /// The number of files.
    pub(crate) fn file_count(&self) -> u32 {
        let files = self
            .files
            .read()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        files.len() as u32
    }
}
