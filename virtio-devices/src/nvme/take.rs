//! Taking commands from the submission queues, round robin.

use std::sync::{Arc, atomic::Ordering};

use super::{
    command::Command, queues::NvmeQueues, registers::MAX_ENTRIES, ring::OutsideMemory, shadow,
};
use crate::{
    MemorySource,
    memory::{BatchMemory, QueueMemory, Window},
    worker::Batch,
};

impl<S: MemorySource> NvmeQueues<S> {
    /// The tail of a submission queue as the host has it now; a value that is no entry is ignored.
    pub(super) fn tail(&mut self, id: u16, window: &mut Window<'_, QueueMemory<S::M>>) -> u32 {
        let rung = self.core.doorbells.tail(id);
        let Some(Some(sq)) = self.sqs.get_mut(usize::from(id)) else {
            return 0;
        };
        let head = sq.ring.head();
        let mut tail = rung;
        if let Some(shadow) = self.shadow {
            let (value, _) = shadow.at(id, false);
            if id == 0 {
                // Hosts ring the admin doorbell itself: the shadow follows it.
                if sq.copied.replace(rung) != Some(rung) {
                    shadow::store(window, value, rung);
                }
            } else {
                tail = shadow::load(window, value).unwrap_or(rung);
            }
        }
        if tail < sq.ring.size() { tail } else { head }
    }

    /// Counts a command of a queue that is there, and gives it a slot.
    #[inline]
    pub(super) fn begin(&mut self, queue: u16, command: Command, now: u64) -> u32 {
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(queue)) {
            sq.outstanding += 1;
        }
        if self.outstanding == 0 {
            self.busy_since = now;
        }
        self.outstanding += 1;
        self.slots.begin(queue, command, now)
    }

    pub(super) fn take(&mut self, batch: &mut Batch, taken: &mut usize) -> bool {
        let memory = Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, self.control_from, self.data_from);
        let burst = match self.core.hot.arbitration.load(Ordering::Relaxed) & 7 {
            7 => u32::MAX,
            burst => 1 << burst,
        };
        let mut now = None;
        let mut full = false;
        loop {
            let before = *taken;
            for turn in 0..self.active.len() {
                let id = self.active[(self.next + turn) % self.active.len()];
                full |= self.take_from(id, burst, &mut guest, batch, taken, &mut now);
            }
            if !self.active.is_empty() {
                self.next = (self.next + 1) % self.active.len();
            }
            if *taken == before || full || *taken >= MAX_ENTRIES as usize {
                break;
            }
        }
        (self.control_from, self.data_from) = guest.ended_at();
        if *taken > 0 {
            self.port().stats.batch();
        }
        if full {
            self.port().stats.stalled();
        }
        full
    }

    /// Takes up to `burst` commands of one queue; returns whether it stopped for want of room.
    fn take_from(
        &mut self,
        id: u16,
        burst: u32,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
        taken: &mut usize,
        now: &mut Option<u64>,
    ) -> bool {
        let tail = self.tail(id, &mut guest.control);
        // After the tail: who posted these commands may have seen a namespace that has just been attached.
        self.refresh_namespaces(batch);
        for _ in 0..burst {
            self.step_over(id);
            let Some(Some(sq)) = self.sqs.get_mut(usize::from(id)) else {
                return false;
            };
            if sq.ring.head() == tail || sq.is_stopped() || sq.outstanding >= sq.ring.size() {
                return false;
            }
            if !batch.has_room() {
                return true;
            }
            let command = match sq.ring.fetch(&mut guest.control) {
                Ok(command) => command,
                Err(OutsideMemory) => {
                    sq.broken = true;
                    self.port().stats.fault();
                    self.core.fail("a submission queue is outside guest memory");
                    return false;
                }
            };
            let now = *now.get_or_insert_with(|| self.now());
            *taken += 1;
            let index = self.begin(id, command, now);
            tracing::trace!(target: "platter::nvme", queue = id, ?command, "start");
            if self.is_admin() {
                self.admin(index, guest);
            } else {
                self.io(index, &command, guest, batch);
            }
        }
        self.step_over(id);
        false
    }
}
