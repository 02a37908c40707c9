//! Posting, and interrupts.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    queues::{Cq, NvmeQueues},
    shadow,
};
use crate::{
    MemorySource,
    memory::{QueueMemory, Window, mark_dirty},
    stats::Op,
};

impl<S: MemorySource> NvmeQueues<S> {
    /// Posts what has ended to one completion queue and interrupts; returns whether something is
    /// left: entries that wait for room, or an interrupt that was held back.
    pub(super) fn post_to(&mut self, id: u16, posted: &mut usize) -> bool {
        // Out of its place, so that the slots can be changed meanwhile.
        let Some(mut cq) = self.cqs.get_mut(usize::from(id)).and_then(Option::take) else {
            return false;
        };
        let before = *posted;
        if !cq.ended.is_empty() {
            let memory = Arc::clone(&self.memory);
            let mut window = Window::new(&*memory, self.control_from);
            self.see_head(&cq, &mut window, false);
            self.post_entries(&mut cq, &mut window, posted);
            self.control_from = window.start();
        }
        self.raise(&mut cq, *posted - before);
        let left = !cq.ended.is_empty() || cq.unsignalled > 0;
        self.cqs[usize::from(id)] = Some(cq);
        left
    }

    /// Takes over the head from the shadow doorbell; `ask`s for a doorbell when it moves again.
    pub(super) fn see_head(&self, cq: &Cq, window: &mut Window<'_, QueueMemory<S::M>>, ask: bool) {
        let Some(shadow) = self.shadow.filter(|_| cq.id != 0) else {
            return;
        };
        let (value, event) = shadow.at(cq.id, true);
        if ask {
            // Before the head is looked at again: a host that moves it now rings.
            shadow::store(window, event, self.core.doorbells.head(cq.id));
        }
        if let Some(head) = shadow::load(window, value).filter(|head| *head < cq.size) {
            self.core.doorbells.set_head(cq.id, head);
        }
    }

    fn post_entries(
        &mut self,
        cq: &mut Cq,
        window: &mut Window<'_, QueueMemory<S::M>>,
        posted: &mut usize,
    ) {
        let now = self.now();
        let mut free = cq.ring.free(self.core.doorbells.head(cq.id));
        while free > 0 && !cq.broken {
            let Some(index) = cq.ended.pop_front() else {
                break;
            };
            free -= 1;
            *posted += 1;
            self.waiting_to_post = self.waiting_to_post.saturating_sub(1);
            let slot = &self.slots[index];
            let (queue, cid, status) = (slot.queue, slot.command.cid, slot.status);
            tracing::trace!(target: "platter::nvme", queue, cid, status = status.0, "end");
            if slot.op == Op::Read {
                // Before the entry that tells of it, because marking may be what brings it to the
                // guest; and also after an error: some of it may have been filled.
                mark_dirty(&*self.memory, &slot.data);
            }
            let head = match self.sqs.get(usize::from(queue)) {
                Some(Some(sq)) => sq.ring.head(),
                _ => 0,
            };
            let field = if status.is_success() {
                status
            } else {
                status.with_more()
            };
            if cq
                .ring
                .post(window, slot.dw0, head, queue, cid, field.0)
                .is_err()
            {
                cq.broken = true;
                self.port().stats.fault();
                self.core.fail("a completion queue is outside guest memory");
            }
            let took = now.saturating_sub(slot.started);
            self.port()
                .stats
                .record(slot.op, status.is_success(), slot.bytes, took);
            self.posted_one(index, now);
        }
    }

    #[inline]
    fn posted_one(&mut self, index: u32, now: u64) {
        let queue = self.slots[index].queue;
        self.slots.release(index);
        self.outstanding -= 1;
        if self.outstanding == 0 {
            let busy = now.saturating_sub(self.busy_since);
            let total = self.port().busy.load(Ordering::Relaxed);
            self.port().busy.store(total + busy, Ordering::Relaxed);
        }
        self.posted_of(queue);
    }

    /// Interrupts for `count` new entries, unless coalescing says later.
    fn raise(&mut self, cq: &mut Cq, count: usize) {
        if count > 0 {
            self.core.doorbells.posted(cq.id, cq.ring.tail());
            cq.unsignalled = cq.unsignalled.saturating_add(count as u32);
        }
        if cq.unsignalled == 0 {
            return;
        }
        let Some(vector) = cq.vector else {
            cq.unsignalled = 0;
            return;
        };
        if let Some((threshold, time)) = self.coalescing(cq.id, vector) {
            let since = *cq.since.get_or_insert_with(Instant::now);
            if cq.unsignalled <= threshold && since.elapsed() < time {
                return;
            }
        }
        cq.unsignalled = 0;
        cq.since = None;
        if let Some(sent) = self.core.interrupts.posted(cq.id, vector) {
            self.port().stats.interrupted(sent.is_ok());
            if let Err(error) = sent {
                tracing::debug!(queue = cq.id, vector, %error, "the interrupt was not sent");
            }
        }
    }

    /// Entries and time to wait for, if interrupts of this queue are coalesced. Both are the
    /// specification's: a threshold of 0 or a time of 0 means no coalescing.
    pub(super) fn coalescing(&self, id: u16, vector: u16) -> Option<(u32, Duration)> {
        let value = self.core.hot.coalescing.load(Ordering::Relaxed);
        let (threshold, time) = (value & 0xff, value >> 8 & 0xff);
        if id == 0 || threshold == 0 || time == 0 {
            return None;
        }
        let features = self.core.features();
        if *features.uncoalesced.get(usize::from(vector))? {
            return None;
        }
        Some((threshold, Duration::from_micros(100) * time))
    }
}
