//! A page-cached read that is alone in its batch, tried without the ring.
//!
//! A cached page costs a `preadv2` about half a microsecond less than a turn through the ring; with
//! several in a batch the ring is ahead, because it enters the kernel once for all of them. So the
//! first read of a batch is held. If another operation follows, it goes into the ring after all. If
//! none does until the batch is handed over, it is tried with `RWF_NOWAIT`, and where the page is not
//! in memory the ring does it as before. After a miss some reads are not tried: pages that are not
//! there cost a system call too many.

use std::os::fd::RawFd;

use super::{Segment, pace::Pace, sys, uring_entry::Target};

/// A read that is held.
pub(super) struct Lone {
    pub(super) slot: u32,
    pub(super) fd: RawFd,
    pub(super) unit: usize,
    pub(super) offset: u64,
    pub(super) segments: *const [Segment],
    /// The file for the ring.
    pub(super) target: Target,
}

/// The read that is held, and those that were done without the ring.
#[derive(Default)]
pub(super) struct LoneReads {
    held: Option<Lone>,
    done: Vec<(u32, i32)>,
    pace: Pace,
}

impl LoneReads {
    /// Room for the results of `depth` reads: nothing is allocated later.
    pub(super) fn new(depth: usize) -> Self {
        Self {
            done: Vec::with_capacity(depth),
            ..Self::default()
        }
    }

    /// Whether the first read of a batch is worth holding.
    pub(super) fn wants(&mut self) -> bool {
        self.pace.allows()
    }

    /// Holds a read.
    ///
    /// # Safety
    /// The segments, and the memory behind them, stay valid until the result was taken.
    pub(super) unsafe fn hold(&mut self, read: Lone) {
        self.held = Some(read);
    }

    /// The read that is held, for the ring.
    pub(super) fn take_held(&mut self) -> Option<Lone> {
        self.held.take()
    }

    /// Tries the read that is held; gives it back if the ring has to do it.
    pub(super) fn try_held(&mut self) -> Option<Lone> {
        let read = self.held.take()?;
        // SAFETY: they are kept until the result was taken.
        let segments = unsafe { &*read.segments };
        // SAFETY: as above.
        let result =
            unsafe { sys::preadv(read.fd, segments, read.unit, read.offset, libc::RWF_NOWAIT) };
        if result < 0 {
            // Not in memory, or not to be tried on this file. What is wrong otherwise shows again.
            self.pace.went(false);
            return Some(read);
        }
        self.pace.went(true);
        self.done.push((read.slot, result));
        None
    }

    /// A result that takes the place of one of the ring.
    pub(super) fn failed(&mut self, slot: u32, result: i32) {
        self.done.push((slot, result));
    }

    /// Whether there are results.
    pub(super) fn has_results(&self) -> bool {
        !self.done.is_empty()
    }

    /// Takes the results.
    pub(super) fn take(&mut self, out: &mut Vec<(u32, i32)>) {
        out.append(&mut self.done);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn after_misses_fewer_reads_are_tried() {
        let mut reads = LoneReads::new(1);
        let missing = |reads: &mut LoneReads| {
            let target = Target {
                fd: -1,
                unit: 1,
                flags: io_uring::squeue::Flags::empty(),
            };
            let segments: &'static [Segment] = &[];
            // SAFETY: no memory is named.
            unsafe {
                reads.hold(Lone {
                    slot: 0,
                    fd: -1,
                    unit: 1,
                    offset: 0,
                    segments,
                    target,
                });
            }
            assert!(reads.try_held().is_some());
            let skipped = (0..1000).take_while(|_| !reads.wants()).count();
            assert!(!reads.has_results());
            skipped
        };
        let skipped: Vec<usize> = (0..8).map(|_| missing(&mut reads)).collect();
        assert_eq!(skipped, [1, 3, 7, 15, 31, 63, 63, 63]);
    }
}
