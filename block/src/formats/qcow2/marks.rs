//! The bits of the header that say how far an image can be trusted: dirty and corrupt.
//!
//! With lazy reference counts (compatible feature bit 0) no flush writes them. The dirty bit is durable
//! before the first cluster is allocated, and goes when the image is closed, once the counts are durable.
//! Whoever opens the image for writing after a crash finds the bit and counts again.

use std::sync::atomic::{AtomicBool, Ordering};

use super::{
    Qcow2,
    claims::Claim,
    claims::Claims,
    header::{Compatible, Header, Incompatible},
    read_only,
};
use crate::{Error, ErrorKind, Result, io::Io, sync::lock};

/// The target of the event that tells of corruption.
const CORRUPTION: &str = "block::corruption";

/// Bytes of changed reference counts that may wait for the image to be closed.
const MAX_LATE_BYTES: u64 = 16 << 20;

/// How the image is marked while it is open.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Reference counts are written late.
    lazy: bool,
    /// The file says that the counts may be wrong, because of this open.
    dirty: AtomicBool,
    /// Corruption was met.
    corrupt: AtomicBool,
    /// A change of the header failed, and so did taking it back.
    torn: AtomicBool,
    /// Held by who changes the header in the file.
    header: Claims,
}

impl Marks {
    /// `lazy` overrides what the image says.
    pub(super) fn new(header: &Header, lazy: Option<bool>) -> Self {
        let wished = header
            .compatible_features
            .contains(Compatible::LAZY_REFCOUNTS);
        Self {
            lazy: header.version >= 3 && lazy.unwrap_or(wished),
            ..Self::default()
        }
    }

    /// Whether corruption was met.
    pub(super) fn is_corrupt(&self) -> bool {
        self.corrupt.load(Ordering::Acquire)
    }

    /// The file has an old header or a new one, and nobody knows which.
    pub(super) fn set_torn(&self) {
        self.torn.store(true, Ordering::Release);
    }

    /// Nobody else changes the header in the file while this is held.
    pub(super) async fn claim_header(&self) -> Claim<'_> {
        self.header.claim(0, 1).await
    }
}

impl Qcow2 {
    /// Refuses changes of an image that was opened for reading, where corruption was met, or whose header
    /// is not known.
    pub(super) fn check_writable(&self) -> Result<()> {
        if !self.writable {
            return Err(read_only());
        }
        if self.marks.is_corrupt() {
            return Err(Error::with_message(
                ErrorKind::Io(libc::EIO),
                "the image was marked corrupt: expected no more writes before it is repaired",
            ));
        }
        if self.marks.torn.load(Ordering::Acquire) {
            return Err(Error::with_message(
                ErrorKind::Io(libc::EIO),
                "a change of the header failed half-way: expected no more writes before the image is \
                 opened again",
            ));
        }
        Ok(())
    }

    /// Marks the image dirty, durably, before its first allocation with lazy reference counts.
    pub(super) async fn before_allocation(&self, io: &Io) -> Result<()> {
        self.know_metadata(io).await?;
        if !self.marks.lazy || self.marks.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        let _claim = self.marks.claim_header().await;
        if self.marks.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        self.change_features(io, |header| {
            header.incompatible_features.insert(Incompatible::DIRTY);
        })
        .await?;
        self.marks.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// The reference counts are durable: the image is not dirty any more.
    pub(super) async fn after_settling(&self, io: &Io) -> Result<()> {
        if !self.marks.dirty.load(Ordering::Acquire) {
            return Ok(());
        }
        let _claim = self.marks.claim_header().await;
        self.change_features(io, |header| {
            header.incompatible_features.remove(Incompatible::DIRTY);
        })
        .await?;
        self.marks.dirty.store(false, Ordering::Release);
        Ok(())
    }

    /// Whether a flush leaves the reference counts for later.
    pub(super) fn counts_wait(&self) -> bool {
        self.marks.lazy
            && self.marks.dirty.load(Ordering::Acquire)
            && self.refcounts.dirty_bytes() <= MAX_LATE_BYTES
    }

    /// Passes a result on. Where it says that the image itself is corrupt the image is marked so, and
    /// nothing more is written to it.
    pub(super) async fn note_corruption<T>(&self, io: &Io, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.kind() == ErrorKind::Corrupt
            && self.writable
            && !self.marks.corrupt.swap(true, Ordering::AcqRel)
        {
            let path = io.file_path(self.file);
            // A program may want to tell of this in its own words: the target and `corruption` are for it.
            tracing::error!(
                target: CORRUPTION,
                path = %path.display(),
                corruption = error.message().as_str(),
                "marking the image as corrupt"
            );
            let _claim = self.marks.claim_header().await;
            let marked = self
                .change_features(io, |header| {
                    header.incompatible_features.insert(Incompatible::CORRUPT);
                })
                .await;
            if let Err(error) = marked {
                tracing::error!(%error, "the image could not be marked as corrupt");
            }
        }
        result
    }

    /// Changes feature bits, in the file and then in memory. The header is claimed.
    async fn change_features(&self, io: &Io, change: impl FnOnce(&mut Header)) -> Result<()> {
        let mut header = lock(&self.header).clone();
        change(&mut header);
        header.write_features(io, self.file).await?;
        *lock(&self.header) = header;
        Ok(())
    }
}
