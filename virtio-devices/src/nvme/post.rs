//! Posting, interrupts, and the [`FrontEnd`] itself.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use block::io::Completion;

use super::{
    Status,
    front::{Cq, NvmeQueues},
    shadow,
    slot::Step,
};
use crate::{
    MemorySource,
    memory::{QueueMemory, Window, mark_dirty},
    stats::Op,
    worker::{Batch, Drained, FrontEnd},
};

impl<S: MemorySource> NvmeQueues<S> {
    /// Posts what has ended to one completion queue and interrupts; returns whether something is
    /// left: entries that wait for room, or an interrupt that was held back.
    fn post_to(&mut self, id: u16, posted: &mut usize) -> bool {
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
    fn see_head(&self, cq: &Cq, window: &mut Window<'_, QueueMemory<S::M>>, ask: bool) {
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
            if slot.op == Op::Read {
                // Also after an error: some of it may have been filled.
                mark_dirty(&*self.memory, &slot.data);
            }
            let took = now.saturating_sub(slot.started);
            self.port()
                .stats
                .record(slot.op, status.is_success(), slot.bytes, took);
            self.posted_one(index, now);
        }
    }

    fn posted_one(&mut self, index: u32, now: u64) {
        let queue = self.slots[index].queue;
        self.slots.release(index);
        self.outstanding -= 1;
        if self.outstanding == 0 {
            let busy = now.saturating_sub(self.busy_since);
            let total = self.port().busy.load(Ordering::Relaxed);
            self.port().busy.store(total + busy, Ordering::Relaxed);
        }
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(queue)) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
            self.finish_deletion(queue);
        }
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
    fn coalescing(&self, id: u16, vector: u16) -> Option<(u32, Duration)> {
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

    /// A block request of a command has ended well or not; the last one moves the command on.
    fn ended_one(&mut self, completion: Completion, batch: &mut Batch) {
        let Some(index) = self.slots.find(completion.id) else {
            debug_assert!(false, "a completion nobody waits for: {completion:?}");
            return;
        };
        let slot = &mut self.slots[index];
        if slot.pending == 0 {
            debug_assert!(false, "a completion nobody waits for: {completion:?}");
            return;
        }
        slot.pending -= 1;
        if let Err(kind) = completion.result
            && slot.status.is_success()
        {
            slot.status = Status::of_disk(kind, slot.op != Op::Read);
            tracing::debug!(
                target: "platter::nvme",
                queue = slot.queue, cid = slot.command.cid, error = %kind, "failed"
            );
        }
        if slot.pending > 0 {
            return;
        }
        if self.resetting {
            if let Step::FusedWrite { first } = slot.step {
                self.forget(first);
            }
            self.forget(index);
            return;
        }
        match std::mem::take(&mut slot.step) {
            Step::End => {
                let status = slot.status;
                self.finish(index, status);
            }
            step => self.advance(index, step, completion.buffers, batch),
        }
    }
}

impl<S: MemorySource> FrontEnd for NvmeQueues<S> {
    fn drain(&mut self, batch: &mut Batch) -> Drained {
        let mut taken = 0;
        if self.resetting {
            return Drained { taken, full: false };
        }
        self.refresh_memory();
        self.refresh_shadow();
        self.refresh_namespaces(batch);
        let full = self.take(batch, &mut taken);
        Drained { taken, full }
    }

    fn complete(&mut self, completion: Completion, batch: &mut Batch) {
        self.ended_one(completion, batch);
    }

    fn post(&mut self) -> usize {
        if self.ready.is_empty() {
            return 0;
        }
        let mut posted = 0;
        let ready = std::mem::take(&mut self.ready);
        for id in ready {
            if self.post_to(id, &mut posted) && !self.ready.contains(&id) {
                self.ready.push(id);
            }
        }
        posted
    }

    fn rearm(&mut self) -> bool {
        self.port().sleeping.store(true, Ordering::SeqCst);
        let memory = Arc::clone(&self.memory);
        let mut window = Window::new(&*memory, self.control_from);
        let mut more = self.port().has_mail()
            || (self.is_admin()
                && self.core.hot.events.load(Ordering::SeqCst)
                && self.can_report())
            || (!self.is_admin()
                && self.namespaces_version
                    != Some(self.core.hot.namespaces.load(Ordering::SeqCst)))
            || self.shadow_version != self.core.hot.shadow_version.load(Ordering::SeqCst);
        more |= self.tails_moved(&mut window);
        more |= self.heads_moved(&mut window);
        if more {
            self.port().sleeping.store(false, Ordering::SeqCst);
        }
        more
    }

    fn outstanding(&self) -> usize {
        // Event requests end only with an event; what has ended and finds no room, and the first of
        // a fused pair, have to wait for the host. They are saved as they are.
        let halves = self.sqs.iter().flatten().filter(|sq| sq.fused.is_some());
        let waiting = self.event_requests.len() + self.waiting_to_post + halves.count();
        self.outstanding.saturating_sub(waiting)
    }

    fn discard_ended(&mut self) {
        for index in self.slots.busy() {
            if self.slots[index].pending == 0 {
                self.forget(index);
            }
        }
        self.event_requests.clear();
        self.parked.clear();
        self.waiting_to_post = 0;
        for cq in self.cqs.iter_mut().flatten() {
            cq.ended.clear();
        }
        self.ready.clear();
    }

    fn resume(&mut self, batch: &mut Batch) {
        self.read_mail();
        self.finish_reset();
        self.report_events();
        self.retry_parked(batch);
    }

    fn deadline(&self) -> Option<Instant> {
        if !self.parked.is_empty() {
            return Some(Instant::now() + Duration::from_millis(1));
        }
        let waiting = self.ready.iter().filter_map(|id| {
            let cq = self.cqs.get(usize::from(*id))?.as_ref()?;
            let (_, time) = self.coalescing(*id, cq.vector?)?;
            Some(cq.since? + time)
        });
        waiting.min()
    }
}

impl<S: MemorySource> NvmeQueues<S> {
    fn can_report(&self) -> bool {
        !self.event_requests.is_empty()
    }

    /// Asks for doorbells of the submission queues, and looks whether one has something to take.
    fn tails_moved(&mut self, window: &mut Window<'_, QueueMemory<S::M>>) -> bool {
        let mut more = false;
        for at in 0..self.active.len() {
            let id = self.active[at];
            let Some(Some(sq)) = self.sqs.get(usize::from(id)) else {
                continue;
            };
            let head = sq.ring.head();
            let takes = !sq.is_stopped() && sq.outstanding < sq.ring.size() && !self.resetting;
            if let Some(shadow) = self.shadow {
                // Before the tail is looked at again: a host that moves it now rings.
                shadow::store(window, shadow.at(id, false).1, head);
            }
            more |= takes && self.tail(id, window) != head;
        }
        more
    }

    /// Asks for doorbells of the completion queues that are full, and looks whether there is room.
    fn heads_moved(&mut self, window: &mut Window<'_, QueueMemory<S::M>>) -> bool {
        let mut more = false;
        for id in &self.ready {
            let Some(Some(cq)) = self.cqs.get(usize::from(*id)) else {
                continue;
            };
            if cq.ended.is_empty() || cq.broken {
                continue;
            }
            self.port().blocked.store(true, Ordering::SeqCst);
            self.see_head(cq, window, true);
            more |= cq.ring.free(self.core.doorbells.head(*id)) > 0;
        }
        if !self.core.interrupts.uses_messages() {
            // The line falls when the host has taken everything.
            for cq in self.cqs.iter().flatten() {
                self.see_head(cq, window, true);
                let doorbells = &self.core.doorbells;
                let empty = || doorbells.is_empty(cq.id);
                self.core.interrupts.taken(cq.id, empty);
            }
        }
        more
    }
}
