//! The queues of one worker, and what it has in flight.
//!
//! A worker has some completion queues and every submission queue that completes to one of them, so
//! no queue is touched by two threads. The admin queue pair has a worker of its own. What others
//! want of a worker comes as mail.

use std::{
    collections::VecDeque,
    rc::Rc,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use super::{
    Status,
    core::{AbortReply, Core, Mail, NewCq, NewSq, Port},
    doorbell::Shadow,
    events,
    ring::{CompletionRing, SubmissionRing},
    slot::{Attached, Slots, Step},
};
use crate::{MemorySource, memory::QueueMemory, worker::Batch};

/// A submission queue.
pub(super) struct Sq {
    pub(super) ring: SubmissionRing,
    pub(super) cq: u16,
    pub(super) base: u64,
    pub(super) outstanding: u32,
    /// The admin command that deletes it.
    deleting: Option<u64>,
    /// The first of a fused pair whose second has not come.
    pub(super) fused: Option<u32>,
    pub(super) broken: bool,
    /// Entries that were aborted before they were taken: they have ended, and are stepped over.
    pub(super) aborted: Vec<u32>,
    /// The doorbell that was copied to the shadow last; for the admin queue.
    pub(super) copied: Option<u32>,
}

impl Sq {
    /// Nothing more is taken from it.
    pub(super) fn is_stopped(&self) -> bool {
        self.broken || self.deleting.is_some()
    }

    /// Steps over the entries at the head that were aborted; returns whether there were any.
    fn step_over(&mut self) -> bool {
        let head = self.ring.head();
        while let Some(at) = self.aborted.iter().position(|it| *it == self.ring.head()) {
            self.aborted.swap_remove(at);
            self.ring.skip();
        }
        self.ring.head() != head
    }
}

/// A completion queue.
pub(super) struct Cq {
    pub(super) id: u16,
    pub(super) ring: CompletionRing,
    pub(super) base: u64,
    pub(super) size: u32,
    pub(super) vector: Option<u16>,
    /// Slots that have ended.
    pub(super) ended: VecDeque<u32>,
    /// Entries posted since the last interrupt, and when the first was.
    pub(super) unsignalled: u32,
    pub(super) since: Option<Instant>,
    pub(super) broken: bool,
}

/// Some queues of a controller, as their worker drives them.
pub struct NvmeQueues<S: MemorySource> {
    pub(super) core: Arc<Core>,
    pub(super) index: usize,
    source: S,
    pub(super) memory: Arc<QueueMemory<S::M>>,
    pub(super) sqs: Vec<Option<Sq>>,
    pub(super) cqs: Vec<Option<Cq>>,
    /// The submission queues, in the order of arbitration.
    pub(super) active: Vec<u16>,
    pub(super) next: usize,
    /// Completion queues with something to post or an interrupt held back.
    pub(super) ready: Vec<u16>,
    pub(super) slots: Slots,
    pub(super) outstanding: usize,
    /// Of `outstanding`: ended, but the completion queue was full.
    pub(super) waiting_to_post: usize,
    /// Event requests, oldest first.
    pub(super) event_requests: VecDeque<u32>,
    pub(super) parked: Vec<u32>,
    /// Aborts that were dealt with and not answered.
    pub(super) abort_replies: Vec<AbortReply>,
    pub(super) namespaces: Vec<Option<Rc<Attached>>>,
    last_namespace: usize,
    pub(super) namespaces_version: Option<u32>,
    pub(super) shadow: Option<Shadow>,
    pub(super) shadow_version: u32,
    pub(super) resetting: bool,
    epoch: Instant,
    pub(super) busy_since: u64,
    pub(super) control_from: u64,
    pub(super) data_from: u64,
}

impl<S: MemorySource> NvmeQueues<S> {
    pub(super) fn new(core: Arc<Core>, index: usize, source: S) -> Self {
        let memory = Arc::new(QueueMemory(source.load()));
        let queues = core.doorbells.queues();
        let shadow_version = core.hot.shadow_version.load(Ordering::SeqCst);
        let shadow = *core
            .shadow
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        Self {
            core,
            index,
            source,
            memory,
            sqs: (0..queues).map(|_| None).collect(),
            cqs: (0..queues).map(|_| None).collect(),
            active: Vec::new(),
            next: 0,
            ready: Vec::new(),
            slots: Slots::default(),
            outstanding: 0,
            waiting_to_post: 0,
            event_requests: VecDeque::new(),
            parked: Vec::new(),
            abort_replies: Vec::new(),
            namespaces: Vec::new(),
            last_namespace: 0,
            namespaces_version: None,
            shadow,
            shadow_version,
            resetting: false,
            epoch: Instant::now(),
            busy_since: 0,
            control_from: 0,
            data_from: 0,
        }
    }

    pub(super) fn port(&self) -> &Port {
        &self.core.ports[self.index]
    }

    pub(super) fn is_admin(&self) -> bool {
        self.index == 0
    }

    pub(super) fn page(&self) -> u64 {
        self.core.hot.page.load(Ordering::Relaxed)
    }

    pub(super) fn now(&self) -> u64 {
        // 584 years fit.
        self.epoch.elapsed().as_nanos() as u64
    }

    pub(super) fn refresh_memory(&mut self) {
        if !self.source.is_current(&self.memory.0) {
            self.memory = Arc::new(QueueMemory(self.source.load()));
        }
    }

    pub(super) fn open_admin(&mut self) {
        let (asq, acq, sizes) = {
            let registers = self.core.registers();
            (registers.asq, registers.acq, registers.admin_sizes())
        };
        self.core.doorbells.open_cq(0, sizes.1, 0, 0);
        self.core.doorbells.open_sq(0, sizes.0, 0, 0);
        self.open_cq(&NewCq {
            id: 0,
            base: acq,
            size: sizes.1,
            vector: Some(0),
            tail: 0,
            phase: true,
        });
        self.open_sq(&NewSq {
            id: 0,
            base: asq,
            size: sizes.0,
            cq: 0,
            head: 0,
        });
        self.core.enabled();
    }

    pub(super) fn open_cq(&mut self, new: &NewCq) {
        self.cqs[usize::from(new.id)] = Some(Cq {
            id: new.id,
            ring: CompletionRing::new(new.base, new.size, new.tail, new.phase),
            base: new.base,
            size: new.size,
            vector: new.vector,
            ended: VecDeque::new(),
            unsignalled: 0,
            since: None,
            broken: false,
        });
    }

    pub(super) fn open_sq(&mut self, new: &NewSq) {
        self.sqs[usize::from(new.id)] = Some(Sq {
            ring: SubmissionRing::new(new.base, new.size, new.head),
            cq: new.cq,
            base: new.base,
            outstanding: 0,
            deleting: None,
            fused: None,
            broken: false,
            aborted: Vec::new(),
            copied: None,
        });
        self.active.push(new.id);
    }

    /// Steps over what was aborted at the head of a queue. The first of a fused pair misses it.
    pub(super) fn step_over(&mut self, id: u16) {
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(id))
            && !sq.aborted.is_empty()
            && sq.step_over()
            && let Some(first) = sq.fused.take()
        {
            self.end(first, Status::ABORTED_MISSING_FUSED);
        }
    }

    pub(super) fn close_cq(&mut self, id: u16, token: u64) {
        if let Some(place) = self.cqs.get_mut(usize::from(id)) {
            *place = None;
        }
        self.ready.retain(|ready| *ready != id);
        self.core.interrupts.taken(id, || true);
        self.reply(token);
    }

    /// Nothing more is taken from it; it goes when everything taken was posted.
    pub(super) fn close_sq(&mut self, id: u16, token: u64) {
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(id)) {
            sq.deleting = Some(token);
            if let Some(first) = sq.fused.take() {
                self.end(first, Status::ABORTED_SQ_DELETION);
            }
        }
        self.finish_deletion(id);
    }

    fn finish_deletion(&mut self, id: u16) {
        let Some(Some(sq)) = self.sqs.get(usize::from(id)) else {
            return;
        };
        if let Some(token) = sq.deleting
            && sq.outstanding == 0
        {
            self.sqs[usize::from(id)] = None;
            self.active.retain(|active| *active != id);
            self.next = 0;
            self.reply(token);
        }
    }

    /// A command of a queue was posted.
    #[inline]
    pub(super) fn posted_of(&mut self, id: u16) {
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(id)) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
            if sq.deleting.is_some() {
                self.finish_deletion(id);
            }
        }
    }

    fn reply(&self, token: u64) {
        self.core.ports[0].send(Mail::Ended {
            token,
            status: Status::SUCCESS,
            dw0: 0,
        });
    }

    pub(super) fn begin_reset(&mut self) {
        self.resetting = true;
        self.parked.clear();
        self.abort_replies.clear();
        self.event_requests.clear();
        // What has ended is forgotten below, and must not be posted after that.
        for cq in self.cqs.iter_mut().flatten() {
            cq.ended.clear();
        }
        self.ready.clear();
        self.waiting_to_post = 0;
        for index in self.slots.busy() {
            let slot = &self.slots[index];
            let second_writes = match slot.step {
                Step::FusedCompare { second } => self.slots[second].pending > 0,
                _ => false,
            };
            if slot.pending == 0 && !second_writes {
                self.forget(index);
            }
        }
    }

    pub(super) fn finish_reset(&mut self) {
        if !self.resetting || self.outstanding > 0 {
            return;
        }
        self.resetting = false;
        for id in 0..self.cqs.len() {
            if self.cqs[id].take().is_some() {
                self.core.interrupts.taken(id as u16, || true);
            }
            self.sqs[id] = None;
        }
        self.active.clear();
        self.ready.clear();
        self.waiting_to_post = 0;
        self.next = 0;
        self.core.worker_reset();
    }

    /// Drops a command without posting it.
    pub(super) fn forget(&mut self, index: u32) {
        self.let_go(index);
        let queue = self.slots[index].queue;
        self.slots.release(index);
        self.outstanding -= 1;
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(queue)) {
            sq.outstanding = sq.outstanding.saturating_sub(1);
        }
    }

    /// The shadow doorbells may have been set or taken away.
    pub(super) fn refresh_shadow(&mut self) {
        let version = self.core.hot.shadow_version.load(Ordering::SeqCst);
        if version == self.shadow_version {
            return;
        }
        self.shadow_version = version;
        self.shadow = *self
            .core
            .shadow
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
    }

    /// Tries a command again when somebody wakes this worker, or soon.
    pub(super) fn park(&mut self, index: u32) {
        self.parked.push(index);
    }

    /// A command has ended: it is posted with the next batch, and in the error log if it failed.
    #[inline]
    pub(super) fn end(&mut self, index: u32, status: Status) {
        if !status.is_success() {
            let slot = &self.slots[index];
            self.core.log_error(slot.queue, &slot.command, status);
        }
        self.ended(index, status);
    }

    /// A command has ended, and the error log knows.
    pub(super) fn ended(&mut self, index: u32, status: Status) {
        self.let_go(index);
        let slot = &mut self.slots[index];
        slot.status = status;
        slot.step = Step::End;
        slot.ended = true;
        let queue = slot.queue;
        let cq = match self.sqs.get(usize::from(queue)) {
            Some(Some(sq)) => sq.cq,
            _ => 0,
        };
        if let Some(Some(cq)) = self.cqs.get_mut(usize::from(cq)) {
            cq.ended.push_back(index);
            self.waiting_to_post += 1;
            // Mostly it is the one that the command before ended to.
            if self.ready.last() != Some(&cq.id) && !self.ready.contains(&cq.id) {
                self.ready.push(cq.id);
            }
        } else {
            self.forget(index);
        }
    }

    /// Gives back what a command holds of its namespace.
    #[inline]
    pub(super) fn let_go(&mut self, index: u32) {
        let slot = &mut self.slots[index];
        let Some(place) = slot.namespace.take() else {
            return;
        };
        let (gated, alone) = (
            std::mem::take(&mut slot.gated),
            std::mem::take(&mut slot.alone),
        );
        let Some(Some(attached)) = self.namespaces.get(place) else {
            return;
        };
        if attached.leave() {
            self.namespaces_version = None;
        }
        if !gated && !alone {
            return;
        }
        let gate = &attached.namespace.gate;
        let mut wake = false;
        if gated {
            wake |= gate.leave(self.index);
        }
        if alone {
            gate.release();
            wake = true;
        }
        if wake {
            self.core.subsystem.tell(|_, listener| listener.wake());
        }
    }

    /// Uses a namespace for a command; the place of it in this worker.
    #[inline]
    pub(super) fn attach(&mut self, index: u32, nsid: u32) -> Option<(usize, Rc<Attached>)> {
        let is = |attached: &Option<Rc<Attached>>| {
            attached
                .as_ref()
                .is_some_and(|it| it.namespace.nsid() == nsid && !it.gone.get())
        };
        let place = if self.namespaces.get(self.last_namespace).is_some_and(is) {
            self.last_namespace
        } else {
            self.namespaces.iter().position(is)?
        };
        self.last_namespace = place;
        let attached = self.namespaces.get(place)?.as_ref()?;
        attached.enter();
        self.slots[index].namespace = Some(place);
        Some((place, Rc::clone(attached)))
    }

    /// The data plane of a namespace that this worker uses.
    #[inline]
    pub(super) fn plane(&self, place: usize, batch: &mut Batch) -> Result<usize, Status> {
        let attached = self.namespaces[place]
            .as_ref()
            .ok_or(Status::INTERNAL_ERROR)?;
        match attached.plane.get() {
            Some(plane) => Ok(plane),
            None => self.make_plane(attached, batch),
        }
    }

    #[cold]
    fn make_plane(&self, attached: &Attached, batch: &mut Batch) -> Result<usize, Status> {
        let depth = self.core.config.ring_depth;
        match attached.namespace.disk().create_async_io(depth) {
            Ok(io) => {
                let plane = batch.attach(io);
                attached.plane.set(Some(plane));
                Ok(plane)
            }
            Err(error) => {
                tracing::error!(nsid = attached.namespace.nsid(), %error, "no data plane");
                Err(Status::INTERNAL_ERROR)
            }
        }
    }

    /// Follows attachments and detachments.
    pub(super) fn refresh_namespaces(&mut self, batch: &mut Batch) {
        let version = self.core.hot.namespaces.load(Ordering::SeqCst);
        if self.is_admin() || self.namespaces_version == Some(version) {
            return;
        }
        self.namespaces_version = Some(version);
        let now = self.core.subsystem.attached_to(self.core.id);
        for place in &mut self.namespaces {
            let Some(attached) = place else { continue };
            if !now.iter().any(|it| Arc::ptr_eq(it, &attached.namespace)) {
                attached.gone.set(true);
            }
            if attached.gone.get() && attached.users.get() == 0 {
                if let Some(plane) = attached.plane.get() {
                    batch.detach(plane);
                }
                *place = None;
            }
        }
        for namespace in now {
            let known = self.namespaces.iter().flatten();
            if known
                .into_iter()
                .any(|it| Arc::ptr_eq(&it.namespace, &namespace) && !it.gone.get())
            {
                continue;
            }
            let attached = Some(Rc::new(Attached::new(namespace)));
            match self.namespaces.iter().position(Option::is_none) {
                Some(free) => self.namespaces[free] = attached,
                None => self.namespaces.push(attached),
            }
        }
    }

    /// Completes event requests with events that may be reported.
    pub(super) fn report_events(&mut self) {
        if !self.is_admin() || !self.core.hot.events.swap(false, Ordering::SeqCst) {
            return;
        }
        while !self.event_requests.is_empty() {
            let Some(event) = self.core.with_events_quietly(events::Events::next) else {
                return;
            };
            if let Some(index) = self.event_requests.pop_front() {
                self.slots[index].dw0 = event.dword();
                self.end(index, Status::SUCCESS);
            }
        }
    }
}
