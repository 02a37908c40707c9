//! Space that the file gets before clusters need it.
//!
//! A direct write beyond the end of a file, or into a hole, makes the file system change its own tables: such
//! writes wait for each other, on threads of the kernel. Space that was allocated before is written
//! like any other. So an allocation that comes near the end of the file gives it a piece more, and
//! closing the image cuts off what was not used. A crash leaves the piece: clusters that are free.
//! While the file system allocates, every other write to the file would wait for it on a thread of the
//! kernel, with its memory pinned there. So writes that allocate wait here until the piece is there.
//!
//! Space that is allocated and not written costs once more: the first write to each part makes the file system
//! note that it is written, and a flush that follows waits for its journal. So where flushes
//! follow after few new clusters, the clusters that are [counted ahead](super::refcount) get zeroes, many
//! at once. Nobody gets one of them meanwhile.
//!
//! A flush that leaves out a sync ([`flush`](super::flush)) needs the same: a table may name a cluster
//! before its data is durable only if the file reaches that far whatever happens. So a file that is written
//! through the page cache gets its pieces once it is flushed often.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use super::{
    Qcow2,
    refcount::{Refcounts, Run},
};
use crate::{
    Result,
    io::{FallocateMode, Io},
    sync::Notify,
};

/// The least and the most bytes that a file gets at once; in between it is an eighth of the file, or all
/// that it got so far: while the file system allocates, nothing else is written.
const LEAST: u64 = 4 << 20;
const MOST: u64 = 128 << 20;

/// The most bytes between the end of the file and new clusters that it gets besides: writes that wait together.
/// More is a file that was cut off.
const WIDEST_GAP: u64 = 256 << 20;

/// Flushes after which a file counts as flushed often.
const FLUSHED_OFTEN: u32 = 8;

/// The most new clusters between two flushes that are few.
const FEW: u64 = 4;

/// The bytes of zeroes that clusters get at once.
const ZEROES: u64 = 1 << 20;

/// How far the file reaches.
#[derive(Debug)]
pub(super) struct Ahead {
    /// The host has not refused to allocate space in the file.
    possible: AtomicBool,
    /// Pieces are of use: the file is written past the page cache, or flushed often.
    wanted: AtomicBool,
    /// Flushes so far that wrote tables.
    flushes: AtomicU32,
    /// New clusters since the last of them, and how many of them in turn came after few.
    new: AtomicU64,
    after_few: AtomicU32,
    /// The end of what the file has.
    end: AtomicU64,
    /// The end that a sync has made durable.
    durable_end: AtomicU64,
    /// A task is giving it more.
    growing: AtomicBool,
    /// It ended.
    grew: Notify,
    /// Bytes that it got so far.
    grown: AtomicU64,
}

impl Ahead {
    /// `possible`: whether the file is one that can grow; `direct`: whether it is written past the page
    /// cache.
    pub(super) fn new(possible: bool, direct: bool, file_len: u64) -> Self {
        Self {
            possible: AtomicBool::new(possible),
            wanted: AtomicBool::new(direct),
            flushes: AtomicU32::new(0),
            new: AtomicU64::new(0),
            after_few: AtomicU32::new(0),
            durable_end: AtomicU64::new(0),
            end: AtomicU64::new(file_len),
            growing: AtomicBool::new(false),
            grew: Notify::default(),
            grown: AtomicU64::new(0),
        }
    }

    /// A flush writes tables.
    pub(super) fn flushed(&self) {
        if self.flushes.fetch_add(1, Ordering::Relaxed) >= FLUSHED_OFTEN {
            self.wanted.store(true, Ordering::Relaxed);
        }
        if self.new.swap(0, Ordering::Relaxed) <= FEW {
            self.after_few.fetch_add(1, Ordering::Relaxed);
        } else {
            self.after_few.store(0, Ordering::Relaxed);
        }
    }

    /// Whether flushes follow after few new clusters, often enough that zeroes are worth writing, and the next
    /// one still can.
    fn wants_zeroes(&self) -> bool {
        self.after_few.load(Ordering::Relaxed) >= FLUSHED_OFTEN
            && self.new.load(Ordering::Relaxed) <= FEW
    }

    /// The end of what the file has, to be [durable](Self::synced) after a sync that follows.
    pub(super) fn end(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// The file was synced after it had this end.
    pub(super) fn synced(&self, end: u64) {
        self.durable_end.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether the file reaches up to `end` whatever happens.
    pub(super) fn is_durable(&self, end: u64) -> bool {
        end <= self.durable_end.load(Ordering::Acquire)
    }

    /// Where a piece goes and its length, if clusters up to `used` leave too little. The caller calls
    /// [`done`](Self::done).
    fn next(&self, used: u64) -> Option<(u64, u64)> {
        let end = self.end.load(Ordering::Acquire);
        let grown = self.grown.load(Ordering::Relaxed);
        let step = (used / 8).max(grown).clamp(LEAST, MOST);
        if used.saturating_add(step / 2) <= end
            || !self.wanted.load(Ordering::Relaxed)
            || !self.possible.load(Ordering::Relaxed)
            || self.growing.swap(true, Ordering::AcqRel)
        {
            return None;
        }
        // Somebody may have been faster. What has been given out since then is filled in as well.
        let end = self.end.load(Ordering::Acquire);
        let start = end.max(used.saturating_sub(WIDEST_GAP));
        Some((start, step + used.saturating_sub(start)))
    }

    /// The piece is there, with its end and length, or the file cannot have it.
    fn done(&self, piece: Option<(u64, u64)>) {
        match piece {
            Some((end, len)) => {
                self.end.fetch_max(end, Ordering::AcqRel);
                self.grown.fetch_add(len, Ordering::AcqRel);
            }
            None => self.possible.store(false, Ordering::Relaxed),
        }
        self.growing.store(false, Ordering::Release);
        self.grew.notify_all();
    }

    fn is_growing(&self) -> bool {
        self.growing.load(Ordering::Acquire)
    }
}

/// Ends the growing, whatever becomes of the task.
struct Growing<'a> {
    ahead: &'a Ahead,
    piece: Option<(u64, u64)>,
}

impl Drop for Growing<'_> {
    fn drop(&mut self) {
        self.ahead.done(self.piece);
    }
}

impl Qcow2 {
    /// Makes the file ready for clusters to come after a run of new ones.
    pub(super) async fn prepare_ahead(&self, io: &Io, run: Run) {
        self.ahead.new.fetch_add(run.count, Ordering::Relaxed);
        self.grow_ahead(io, run).await;
        if self.ahead.wants_zeroes() {
            self.zero_ahead(io).await;
        }
    }

    /// Writes zeroes to the next clusters that are counted ahead and have none.
    async fn zero_ahead(&self, io: &Io) {
        let most = ZEROES >> self.geometry.cluster_bits;
        let end = self.ahead.end() >> self.geometry.cluster_bits;
        let Some((first, end)) = self.refcounts.withhold(most, end) else {
            return;
        };
        let mut withheld = Withheld {
            refcounts: &self.refcounts,
            tried: first,
        };
        let (start, len) = (self.geometry.start(first), self.geometry.start(end - first));
        if let Err(error) = io.write_zeroes(self.file, start, len).await {
            // They read as zeroes without.
            tracing::debug!(%error, "no zeroes written ahead");
        }
        withheld.tried = end;
    }

    /// Gives the file more space if a run of new clusters comes near its end, or waits for who is at it.
    async fn grow_ahead(&self, io: &Io, run: Run) {
        let used = self.geometry.start(run.first.saturating_add(run.count));
        let (start, len) = loop {
            if let Some(piece) = self.ahead.next(used) {
                break piece;
            }
            if !self.ahead.is_growing() {
                return;
            }
            let over = || (!self.ahead.is_growing()).then_some(());
            self.ahead.grew.until(over).await;
        };
        let mut growing = Growing {
            ahead: &self.ahead,
            piece: None,
        };
        let mode = FallocateMode::Allocate;
        match io.fallocate(self.file, mode, start, len).await {
            Ok(()) => growing.piece = Some((start + len, len)),
            // Writes go on without; where space is short they say so themselves.
            Err(error) => tracing::debug!(%error, "no space allocated ahead"),
        }
    }

    /// Cuts off what was allocated ahead and not used. Nothing is written any more.
    pub(super) async fn end_growing(&self, io: &Io) -> Result<()> {
        if self.ahead.grown.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        let used = self.refcounts.written_end();
        if io.file_len(self.file)? > used {
            io.set_len(self.file, used).await?;
        }
        Ok(())
    }
}

/// Ends the withholding of clusters, whatever becomes of the task.
struct Withheld<'a> {
    refcounts: &'a Refcounts,
    tried: u64,
}

impl Drop for Withheld<'_> {
    fn drop(&mut self) {
        self.refcounts.end_withholding(self.tried);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_and_grow_with_the_file() {
        let ahead = Ahead::new(true, true, LEAST);
        assert_eq!(ahead.next(LEAST / 4), None, "there is room");
        assert_eq!(ahead.next(LEAST), Some((LEAST, LEAST)));
        assert_eq!(ahead.next(LEAST), None, "a task is at it");
        ahead.done(Some((2 * LEAST, LEAST)));
        assert_eq!(ahead.next(LEAST), None);
        assert_eq!(ahead.next(2 * LEAST), Some((2 * LEAST, LEAST)));
        ahead.done(Some((3 * LEAST, LEAST)));
        assert_eq!(
            ahead.next(3 * LEAST),
            Some((3 * LEAST, 2 * LEAST)),
            "as much as all so far"
        );
        ahead.done(Some((5 * LEAST, 2 * LEAST)));
        assert_eq!(
            ahead.next(40 * LEAST),
            Some((5 * LEAST, 35 * LEAST + 5 * LEAST)),
            "for all who wait"
        );
        ahead.done(None);
        assert_eq!(ahead.next(1 << 40), None, "the host refused");
        assert_eq!(Ahead::new(false, true, 0).next(1 << 20), None);
        assert_eq!(
            Ahead::new(true, true, 0).next(1 << 40),
            Some(((1 << 40) - WIDEST_GAP, MOST + WIDEST_GAP))
        );
        let cached = Ahead::new(true, false, 0);
        assert_eq!(cached.next(1 << 20), None);
        (0..=FLUSHED_OFTEN).for_each(|_| cached.flushed());
        assert_eq!(cached.next(1 << 20), Some((0, LEAST + (1 << 20))));
    }
}
