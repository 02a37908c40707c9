//! The record of requests in flight that outlives this process.
//!
//! The front end keeps a memfd; in it each queue has a region laid out as the specification says for
//! split queues ("Inflight I/O tracking" in QEMU's `vhost-user.rst`). After a crash the next
//! server finds there which heads were taken from the available ring and not given back, and
//! resubmits them in the order in which they were taken.
//!
//! ```text
//! queue region   features u64 · version u16 · desc_num u16 · last_batch_head u16 · used_idx u16
//!                then desc_num entries:
//! entry          inflight u8 · padding [u8; 5] · next u16 · counter u64
//! ```
//!
//! What this process writes is ordered so that a SIGKILL between any two stores leaves a region
//! that recovery understands. What it reads is the front end's word: every index is checked.

use std::{
    fs::File,
    num::Wrapping,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering, fence},
    },
};

use vhost::vhost_user::message::VhostUserInflight;
use virtio_devices::virtio::InflightTracker;

use super::memory::require_fixed_size;
use crate::sys::{self, Mapping};

/// The version of the layout; zero means that nothing was written yet.
const VERSION: u16 = 1;
/// The length of the head of a region.
const HEAD: usize = 16;
/// The length of an entry.
const ENTRY: usize = 16;
/// The alignment of the regions.
const ALIGN: usize = 64;

/// The length of the region of one queue.
fn stride(queue_size: u16) -> usize {
    (HEAD + ENTRY * usize::from(queue_size)).next_multiple_of(ALIGN)
}

/// Makes the memfd for so many queues of that size.
pub(super) fn create(
    num_queues: u16,
    queue_size: u16,
) -> std::io::Result<(VhostUserInflight, File)> {
    let size = (stride(queue_size) * usize::from(num_queues)) as u64;
    let file = sys::sealed_memfd(c"platter-inflight", size)?;
    Ok((
        VhostUserInflight::new(size, 0, num_queues, queue_size),
        file,
    ))
}

/// The mapped memfd.
#[derive(Debug)]
pub(super) struct InflightArea {
    mapping: Arc<Mapping>,
    num_queues: u16,
    queue_size: u16,
}

impl InflightArea {
    /// Maps what the front end gives back.
    pub(super) fn map(inflight: &VhostUserInflight, file: &File) -> Result<Self, String> {
        let needed = stride(inflight.queue_size) * usize::from(inflight.num_queues);
        if inflight.num_queues == 0
            || inflight.queue_size == 0
            || inflight.mmap_size < needed as u64
        {
            return Err(format!(
                "inflight area of {} bytes for {} queues of {}, which need {needed}",
                inflight.mmap_size, inflight.num_queues, inflight.queue_size
            ));
        }
        if !inflight.mmap_offset.is_multiple_of(8) {
            return Err(format!(
                "inflight area at offset {:#x}",
                inflight.mmap_offset
            ));
        }
        require_fixed_size(file, "inflight area")?;
        let mapping = Mapping::new(file, inflight.mmap_offset, needed as u64)
            .map_err(|error| format!("inflight area: {error}"))?;
        Ok(Self {
            mapping: Arc::new(mapping),
            num_queues: inflight.num_queues,
            queue_size: inflight.queue_size,
        })
    }

    /// The region of a queue of at most that size.
    pub(super) fn queue(&self, index: u16, queue_size: u16) -> Option<InflightRegion> {
        (index < self.num_queues && queue_size <= self.queue_size).then(|| InflightRegion {
            mapping: Arc::clone(&self.mapping),
            offset: usize::from(index) * stride(self.queue_size),
            len: self.queue_size,
            taken: 0,
        })
    }
}

/// What a queue starts with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    /// The next entry of the available ring to take.
    pub(super) next_avail: u16,
    /// The heads that were in flight, in the order in which they had been taken; `None` when no
    /// server has used the region before.
    pub(super) heads: Option<Vec<u16>>,
}

/// The region of one queue.
#[derive(Debug)]
pub(super) struct InflightRegion {
    mapping: Arc<Mapping>,
    /// Where it begins in the mapping.
    offset: usize,
    /// The number of entries.
    len: u16,
    /// The number of heads taken so far.
    taken: u64,
}

impl InflightRegion {
    /// The address of a field. The offsets below are constants inside the head, or inside entries
    /// that were checked against `len`: all of them lie in the region, which lies in the mapping.
    fn at(&self, offset: usize) -> *mut u8 {
        debug_assert!(offset < stride(self.len));
        self.mapping.as_ptr().wrapping_add(self.offset + offset)
    }

    fn half(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: inside the mapping (see `at`), which lives as long as `self`; aligned, as area,
        // regions, entries and fields are; this process accesses it only atomically.
        unsafe { AtomicU16::from_ptr(self.at(offset).cast()) }
    }

    fn version(&self) -> &AtomicU16 {
        self.half(8)
    }

    fn desc_num(&self) -> &AtomicU16 {
        self.half(10)
    }

    fn last_batch_head(&self) -> &AtomicU16 {
        self.half(12)
    }

    fn used_idx(&self) -> &AtomicU16 {
        self.half(14)
    }

    fn entry(head: u16) -> usize {
        HEAD + ENTRY * usize::from(head)
    }

    fn inflight(&self, head: u16) -> &AtomicU8 {
        // SAFETY: as in `half`.
        unsafe { AtomicU8::from_ptr(self.at(Self::entry(head))) }
    }

    fn next(&self, head: u16) -> &AtomicU16 {
        self.half(Self::entry(head) + 6)
    }

    fn counter(&self, head: u16) -> &AtomicU64 {
        // SAFETY: as in `half`.
        unsafe { AtomicU64::from_ptr(self.at(Self::entry(head) + 8).cast()) }
    }

    /// Brings the region up to date with the used ring and tells where the queue goes on.
    /// `next_avail` is the front end's word, which counts only when the region is new.
    pub(super) fn recover(
        &mut self,
        used_idx: u16,
        next_avail: u16,
        queue_size: u16,
    ) -> Result<Recovered, String> {
        if self.version().load(Ordering::Acquire) == 0 {
            self.desc_num().store(self.len, Ordering::Relaxed);
            self.last_batch_head().store(0, Ordering::Relaxed);
            self.used_idx().store(used_idx, Ordering::Relaxed);
            self.version().store(VERSION, Ordering::Release);
            return Ok(Recovered {
                next_avail,
                heads: None,
            });
        }
        let version = self.version().load(Ordering::Relaxed);
        let desc_num = self.desc_num().load(Ordering::Relaxed);
        if version != VERSION || desc_num != self.len {
            return Err(format!(
                "inflight region has version {version} and {desc_num} entries, \
                 {VERSION} and {} are due",
                self.len
            ));
        }
        // The batch that was being given back: its used entries are published, its flags are not
        // cleared yet.
        let published = (Wrapping(used_idx) - Wrapping(self.used_idx().load(Ordering::Relaxed))).0;
        let mut head = self.last_batch_head().load(Ordering::Relaxed);
        for _ in 0..published.min(self.len) {
            if head >= self.len {
                return Err(format!("inflight region names head {head} of {}", self.len));
            }
            self.inflight(head).store(0, Ordering::Relaxed);
            head = self.next(head).load(Ordering::Relaxed);
        }
        self.used_idx().store(used_idx, Ordering::Release);

        let mut heads: Vec<(u64, u16)> = (0..self.len)
            .filter(|head| self.inflight(*head).load(Ordering::Relaxed) != 0)
            .map(|head| (self.counter(head).load(Ordering::Relaxed), head))
            .collect();
        heads.sort_unstable();
        if let Some((_, head)) = heads.iter().find(|(_, head)| *head >= queue_size) {
            return Err(format!("inflight region has head {head} of {queue_size}"));
        }
        self.taken = heads.last().map_or(0, |(last, _)| last.wrapping_add(1));
        let in_flight = Wrapping(u16::try_from(heads.len()).unwrap_or(u16::MAX));
        Ok(Recovered {
            next_avail: (Wrapping(used_idx) + in_flight).0,
            heads: Some(heads.into_iter().map(|(_, head)| head).collect()),
        })
    }
}

impl InflightTracker for InflightRegion {
    fn popped(&mut self, head: u16) {
        if head >= self.len {
            return;
        }
        self.counter(head).store(self.taken, Ordering::Relaxed);
        self.taken = self.taken.wrapping_add(1);
        self.inflight(head).store(1, Ordering::Release);
    }

    fn publishing(&mut self, heads: &mut dyn Iterator<Item = u16>) {
        for head in heads.filter(|head| *head < self.len) {
            let last = self.last_batch_head().load(Ordering::Relaxed);
            self.next(head).store(last, Ordering::Relaxed);
            self.last_batch_head().store(head, Ordering::Release);
        }
        // The index that publishes this batch must not be seen before the list.
        fence(Ordering::SeqCst);
    }

    fn published(&mut self, heads: &mut dyn Iterator<Item = u16>, used_idx: u16) {
        for head in heads.filter(|head| *head < self.len) {
            self.inflight(head).store(0, Ordering::Release);
        }
        self.used_idx().store(used_idx, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(queues: u16, size: u16) -> (InflightArea, VhostUserInflight, File) {
        let (inflight, file) = create(queues, size).unwrap();
        (InflightArea::map(&inflight, &file).unwrap(), inflight, file)
    }

    #[test]
    fn a_new_region_believes_the_front_end() {
        let (area, _, _) = area(2, 8);
        let mut region = area.queue(1, 8).unwrap();
        let recovered = region.recover(3, 5, 8).unwrap();
        assert_eq!(
            recovered,
            Recovered {
                next_avail: 5,
                heads: None
            }
        );
        assert!(area.queue(2, 8).is_none());
        assert!(area.queue(0, 16).is_none());
    }

    #[test]
    fn heads_come_back_in_the_order_in_which_they_were_taken() {
        let (area, inflight, file) = area(1, 8);
        let mut region = area.queue(0, 8).unwrap();
        region.recover(0xfffe, 0xfffe, 8).unwrap();
        for head in [4, 2, 7, 1] {
            region.popped(head);
        }
        region.publishing(&mut [2].into_iter());
        region.published(&mut [2].into_iter(), 0xffff);
        drop((region, area));

        let area = InflightArea::map(&inflight, &file).unwrap();
        let mut region = area.queue(0, 8).unwrap();
        let recovered = region.recover(0xffff, 0, 8).unwrap();
        assert_eq!(recovered.heads.unwrap(), [4, 7, 1]);
        assert_eq!(recovered.next_avail, 2);
        // New ones come after those.
        region.popped(2);
        let mut again = area.queue(0, 8).unwrap();
        assert_eq!(
            again.recover(0xffff, 0, 8).unwrap().heads.unwrap(),
            [4, 7, 1, 2]
        );
    }

    #[test]
    fn a_kill_between_publishing_and_clearing_repeats_nothing() {
        let (area, ..) = area(1, 8);
        let mut region = area.queue(0, 8).unwrap();
        region.recover(0, 0, 8).unwrap();
        for head in 0..5 {
            region.popped(head);
        }
        region.publishing(&mut [3, 0].into_iter());
        // Killed before the index is published: both are still in flight.
        let mut before = area.queue(0, 8).unwrap();
        assert_eq!(
            before.recover(0, 0, 8).unwrap().heads.unwrap(),
            [0, 1, 2, 3, 4]
        );
        // Killed after it: both are done, although their flags are set.
        let mut after = area.queue(0, 8).unwrap();
        assert_eq!(after.recover(2, 0, 8).unwrap().heads.unwrap(), [1, 2, 4]);
    }

    #[test]
    fn a_hostile_region_is_refused() {
        let (area, inflight, file) = area(1, 8);
        let mut region = area.queue(0, 8).unwrap();
        region.recover(0, 0, 8).unwrap();
        region.last_batch_head().store(8, Ordering::Relaxed);
        assert!(region.recover(1, 0, 8).is_err());
        region.last_batch_head().store(0, Ordering::Relaxed);
        region.inflight(6).store(1, Ordering::Relaxed);
        assert!(region.recover(1, 0, 4).is_err());
        region.desc_num().store(9, Ordering::Relaxed);
        assert!(region.recover(1, 0, 8).is_err());

        for (size, offset, queues, entries) in [
            (inflight.mmap_size, u64::MAX - 7, 1, 8),
            (inflight.mmap_size, 4096, 1, 8),
            (inflight.mmap_size, 4, 1, 8),
            (inflight.mmap_size, 0, 2, 8),
            (inflight.mmap_size, 0, 1, 0),
            (inflight.mmap_size, 0, 0, 8),
            (u64::MAX, 0, u16::MAX, u16::MAX),
        ] {
            let bad = VhostUserInflight::new(size, offset, queues, entries);
            assert!(InflightArea::map(&bad, &file).is_err());
        }
        let unsealed = tempfile::tempfile().unwrap();
        unsealed.set_len(inflight.mmap_size).unwrap();
        assert!(InflightArea::map(&inflight, &unsealed).is_err());
    }
}
