//! Space that the file gets before clusters need it.
//!
//! A direct write beyond the end of a file, or into a hole, makes the file system change its own tables: such
//! writes wait for each other, on threads of the kernel. Space that was allocated before is written
//! like any other. So an allocation that comes near the end of the file gives it a piece more, and
//! closing the image cuts off what was not used. A crash leaves the piece: clusters that are free.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{Qcow2, refcount::Run};
use crate::{
    Result,
    io::{FallocateMode, Io},
};

/// The least and the most bytes that a file gets at once; in between it is an eighth of the file.
const LEAST: u64 = 1 << 20;
const MOST: u64 = 64 << 20;

/// How far the file reaches.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Direct I/O to a regular file, that the host has not refused to allocate.
    wanted: AtomicBool,
    /// The end of what the file has.
    end: AtomicU64,
    /// A task is giving it more.
    growing: AtomicBool,
    /// It got more than it had.
    grown: AtomicBool,
}

impl Ahead {
    /// `wanted`: whether the file is written past the page cache, and can grow.
    pub(super) fn new(wanted: bool, file_len: u64) -> Self {
        Self {
            wanted: AtomicBool::new(wanted),
            end: AtomicU64::new(file_len),
            growing: AtomicBool::new(false),
            grown: AtomicBool::new(false),
        }
    }

    /// Where a piece goes and its length, if clusters up to `used` leave too little. The caller calls
    /// [`done`](Self::done).
    fn next(&self, used: u64) -> Option<(u64, u64)> {
        let end = self.end.load(Ordering::Acquire);
        let step = (used / 8).clamp(LEAST, MOST);
        if used.saturating_add(step / 2) <= end
            || !self.wanted.load(Ordering::Relaxed)
            || self.growing.swap(true, Ordering::AcqRel)
        {
            return None;
        }
        // Somebody may have been faster.
        let start = self.end.load(Ordering::Acquire).max(used);
        Some((start, step))
    }

    fn done(&self, end: Option<u64>) {
        match end {
            Some(end) => {
                self.end.fetch_max(end, Ordering::AcqRel);
                self.grown.store(true, Ordering::Release);
            }
            None => self.wanted.store(false, Ordering::Relaxed),
        }
        self.growing.store(false, Ordering::Release);
    }
}

/// Ends the growing, whatever becomes of the task.
struct Growing<'a> {
    ahead: &'a Ahead,
    end: Option<u64>,
}

impl Drop for Growing<'_> {
    fn drop(&mut self) {
        self.ahead.done(self.end);
    }
}

impl Qcow2 {
    /// Gives the file more space if a run of new clusters comes near its end.
    pub(super) async fn grow_ahead(&self, io: &Io, run: Run) {
        let used = self.geometry.start(run.first.saturating_add(run.count));
        let Some((start, len)) = self.ahead.next(used) else {
            return;
        };
        let mut growing = Growing {
            ahead: &self.ahead,
            end: None,
        };
        let mode = FallocateMode::Allocate;
        match io.fallocate(self.file, mode, start, len).await {
            Ok(()) => growing.end = Some(start + len),
            // Writes go on without; where space is short they say so themselves.
            Err(error) => tracing::debug!(%error, "no space allocated ahead"),
        }
    }

    /// Cuts off what was allocated ahead and not used. Nothing is written any more.
    pub(super) async fn end_growing(&self, io: &Io) -> Result<()> {
        if !self.ahead.grown.load(Ordering::Acquire) {
            return Ok(());
        }
        let used = self.refcounts.written_end();
        if io.file_len(self.file)? > used {
            io.set_len(self.file, used).await?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_follow_each_other_and_grow_with_the_file() {
        let ahead = Ahead::new(true, 1 << 20);
        assert_eq!(ahead.next(1 << 16), None, "there is room");
        assert_eq!(ahead.next(1 << 20), Some((1 << 20, LEAST)));
        assert_eq!(ahead.next(1 << 20), None, "a task is at it");
        ahead.done(Some(2 << 20));
        assert_eq!(ahead.next(1 << 20), None);
        assert_eq!(ahead.next(80 << 20), Some((80 << 20, 10 << 20)));
        ahead.done(None);
        assert_eq!(ahead.next(1 << 40), None, "the host refused");
        assert_eq!(Ahead::new(false, 0).next(1 << 20), None);
        assert_eq!(Ahead::new(true, 0).next(1 << 40), Some((1 << 40, MOST)));
    }
}
