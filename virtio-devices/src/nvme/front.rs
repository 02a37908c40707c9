//! What the shared loop calls: a [`FrontEnd`] of the queues of one worker.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use block::io::Completion;

use super::{Status, core::Mail, queues::NvmeQueues, shadow, slot::Step};
use crate::{
    MemorySource,
    memory::{BatchMemory, QueueMemory, Window},
    stats::Op,
    worker::{Batch, Drained, FrontEnd, Worker},
};

/// The worker of some queues of an NVMe controller.
pub type NvmeWorker<S> = Worker<NvmeQueues<S>>;

impl<S: MemorySource> NvmeQueues<S> {
    fn read_mail(&mut self, batch: &mut Batch) {
        if !self.port().has_mail() {
            return;
        }
        for mail in self.port().receive() {
            match mail {
                Mail::Enable => self.open_admin(),
                Mail::CreateCq(new) => self.open_cq(&new),
                Mail::CreateSq(new) => self.open_sq(&new),
                Mail::DeleteCq { id, token } => self.close_cq(id, token),
                Mail::DeleteSq { id, token } => self.close_sq(id, token),
                Mail::Abort { queue, cid, token } => self.abort_io(queue, cid, token, batch),
                Mail::Ended { token, status, dw0 } => {
                    if let Some(index) = self.slots.find(token)
                        && matches!(self.slots[index].step, Step::Outside)
                        && self.slots[index].pending == 0
                    {
                        self.slots[index].dw0 = dw0;
                        if self.is_admin() {
                            self.queue_deleted(index);
                        }
                        self.end(index, status);
                    }
                }
                Mail::Reset => self.begin_reset(),
            }
        }
    }

    fn retry_parked(&mut self, batch: &mut Batch) {
        if self.parked.is_empty() || self.resetting || !self.core.may_access() {
            return;
        }
        let memory = Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, self.control_from, self.data_from);
        for index in std::mem::take(&mut self.parked) {
            self.retry(index, &mut guest, batch);
        }
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
        self.refresh_shadow();
        self.refresh_namespaces(batch);
        if !self.core.may_access() {
            return Drained { taken, full: false };
        }
        let full = self.take(batch, &mut taken);
        Drained { taken, full }
    }

    fn complete(&mut self, completion: Completion, batch: &mut Batch) {
        self.ended_one(completion, batch);
    }

    fn post(&mut self) -> usize {
        let mut posted = 0;
        if !self.core.may_access() {
            return posted;
        }
        let ready = std::mem::take(&mut self.ready);
        for id in ready {
            if self.post_to(id, &mut posted) && !self.ready.contains(&id) {
                self.ready.push(id);
            }
        }
        if !self.abort_replies.is_empty() {
            self.reply_to_aborts();
        }
        posted
    }

    fn rearm(&mut self) -> bool {
        self.port().sleeping.store(true, Ordering::SeqCst);
        let mut more = self.port().has_mail()
            || (self.is_admin()
                && self.core.hot.events.load(Ordering::SeqCst)
                && self.can_report())
            || (!self.is_admin()
                && self.namespaces_version
                    != Some(self.core.hot.namespaces.load(Ordering::SeqCst)))
            || self.shadow_version != self.core.hot.shadow_version.load(Ordering::SeqCst);
        if self.core.may_access() {
            let memory = Arc::clone(&self.memory);
            let mut window = Window::new(&*memory, self.control_from);
            more |= self.tails_moved(&mut window);
            more |= self.heads_moved(&mut window);
        }
        if more {
            self.port().sleeping.store(false, Ordering::SeqCst);
        }
        more
    }

    fn outstanding(&self) -> usize {
        // Event requests end only with an event; what has ended and finds no room, what waits for that,
        // and the first of a fused pair, have to wait for the host. They are saved as they are.
        let halves = self.sqs.iter().flatten().filter(|sq| sq.fused.is_some());
        let waiting = self.event_requests.len() + self.waiting_to_post + halves.count();
        let waiting = waiting + self.waiting_for_host().count();
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
        self.abort_replies.clear();
        self.waiting_to_post = 0;
        for cq in self.cqs.iter_mut().flatten() {
            cq.ended.clear();
        }
        self.ready.clear();
    }

    fn resume(&mut self, batch: &mut Batch) {
        // Before anything is posted: what was mapped before may be somebody else's now.
        self.refresh_memory();
        self.read_mail(batch);
        self.finish_reset();
        self.report_events();
        self.retry_parked(batch);
    }

    fn deadline(&self) -> Option<Instant> {
        if !self.core.may_access() {
            return None;
        }
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
