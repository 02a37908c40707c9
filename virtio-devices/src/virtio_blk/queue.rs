//! The data plane of one virtio-blk queue: a [`FrontEnd`] for the shared worker.
//!
//! A slot per head holds the request in flight. There is nothing to look up and, once the vectors
//! of the slots have grown, nothing to allocate.

use std::{sync::Arc, time::Instant};

use block::{
    ErrorKind,
    io::{Completion, MemoryRegions, RequestOp},
};
use virtio_queue::Queue;
use vm_memory::{GuestMemory, Permissions, bitmap::BS};

use super::{
    Shared, config, feature,
    request::{self, Action, IOERR, OK, Scratch, UNSUPP},
    slot::Slot,
};
use crate::{
    Error, Interrupt, MemorySource, Result,
    memory::{BatchMemory, QueueMemory, Window, mark_dirty},
    stats::{Op, QueueStats},
    virtio::{Chain, InflightTracker, QueueFault, QueueSnapshot, ring::RingView, ring::SplitRing},
    worker::{Batch, Drained, FrontEnd, Worker},
};

/// The worker of one virtio-blk queue.
pub type BlkWorker<S> = Worker<BlkQueue<S>>;

/// One queue of a [`VirtioBlk`](super::VirtioBlk), as its worker drives it.
pub struct BlkQueue<S: MemorySource> {
    shared: Arc<Shared>,
    index: u16,
    ring: SplitRing,
    source: S,
    memory: Arc<QueueMemory<S::M>>,
    interrupt: Arc<dyn Interrupt>,
    tracker: Option<Box<dyn InflightTracker>>,
    stats: Arc<QueueStats>,
    slots: Box<[Slot]>,
    /// Heads that have ended and are not yet posted.
    ended: Vec<u16>,
    outstanding: usize,
    broken: Option<QueueFault>,
    epoch: Instant,
    indirect_limit: usize,
    chain: Chain,
    scratch: Scratch,
    /// The current memory map is to be pinned.
    unpinned: bool,
    /// Where the windows on rings and headers, and on data, started last.
    control_from: u64,
    data_from: u64,
}

impl<S: MemorySource> BlkQueue<S> {
    pub(crate) fn new(
        shared: Arc<Shared>,
        index: u16,
        queue: &Queue,
        source: S,
        interrupt: Arc<dyn Interrupt>,
        stats: Arc<QueueStats>,
    ) -> Result<Self> {
        let fault = |fault| Error::Queue {
            queue: index,
            fault,
        };
        let event_idx = shared.acked(feature::EVENT_IDX);
        let ring = SplitRing::new(queue, event_idx).map_err(fault)?;
        let memory = Arc::new(QueueMemory(source.load()));
        let control_from = ring.lowest_address();
        ring.view(&mut Window::new(&*memory, control_from))
            .map_err(fault)?;
        // A front end may give the driver a smaller queue than ours after telling it our `seg_max`:
        // its indirect tables may then be longer than its queue.
        let indirect_limit =
            usize::from(ring.size()).max(config::seg_max(shared.config().queue_size) as usize + 2);
        Ok(Self {
            unpinned: shared.config().pin_memory,
            slots: (0..ring.size()).map(|_| Slot::new()).collect(),
            ended: Vec::with_capacity(usize::from(ring.size())),
            shared,
            index,
            ring,
            control_from,
            source,
            memory,
            interrupt,
            tracker: None,
            stats,
            outstanding: 0,
            broken: None,
            epoch: Instant::now(),
            indirect_limit,
            chain: Chain::default(),
            scratch: Scratch::default(),
            data_from: 0,
        })
    }

    /// The number of the queue.
    #[must_use]
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Why nothing more is taken from the queue, if the driver broke it.
    #[must_use]
    pub fn fault(&self) -> Option<QueueFault> {
        self.broken
    }

    fn now(&self) -> u64 {
        // 584 years fit.
        self.epoch.elapsed().as_nanos() as u64
    }

    fn refresh_memory(&mut self) {
        if !self.source.is_current(&self.memory.0) {
            self.memory = Arc::new(QueueMemory(self.source.load()));
            self.unpinned = self.shared.config().pin_memory;
        }
    }

    fn break_queue(&mut self, fault: QueueFault) {
        if self.broken.is_some() {
            return;
        }
        tracing::warn!(queue = self.index, %fault, "the driver broke a queue: it needs a reset");
        self.broken = Some(fault);
        self.stats.fault();
        self.shared.set_needs_reset();
        self.interrupt.queue_broken(self.index, fault);
    }

    /// Takes requests from the ring while there are any and the batch has room; returns whether it
    /// had none left.
    fn take(&mut self, batch: &mut Batch, taken: &mut usize) -> Result<bool, QueueFault> {
        let memory = Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, self.control_from, self.data_from);
        let full = self.take_from(&mut guest, batch, taken);
        (self.control_from, self.data_from) = guest.ended_at();
        full
    }

    fn take_from(
        &mut self,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
        taken: &mut usize,
    ) -> Result<bool, QueueFault> {
        let view = self.ring.view(&mut guest.control)?;
        let mut available = self.ring.available(&view)?;
        if available == 0 {
            return Ok(false);
        }
        self.stats.batch();
        self.ring.quiet(&view)?;
        let now = self.now();
        loop {
            while available > 0 {
                if batch.room() == 0 {
                    self.stats.stalled();
                    return Ok(true);
                }
                let head = self.ring.head(&view)?;
                if self.slots[usize::from(head)].busy {
                    return Err(QueueFault::DuplicateHead { head });
                }
                self.ring.advance();
                if let Some(tracker) = &mut self.tracker {
                    tracker.popped(head);
                }
                self.start(head, now, &view, guest, batch)?;
                *taken += 1;
                available -= 1;
            }
            if *taken >= usize::from(self.ring.size()) {
                return Ok(false);
            }
            available = self.ring.available(&view)?;
            if available == 0 {
                return Ok(false);
            }
        }
    }

    /// Starts the request at `head`, which is not in flight.
    fn start(
        &mut self,
        head: u16,
        now: u64,
        view: &RingView<'_, BS<'_, <S::M as GuestMemory>::Bitmap>>,
        guest: &mut BatchMemory<'_, S::M>,
        batch: &mut Batch,
    ) -> Result<(), QueueFault> {
        let size = self.ring.size();
        self.chain
            .read(view, &mut guest.control, head, size, self.indirect_limit)?;
        self.outstanding += 1;
        let slot = &mut self.slots[usize::from(head)];
        slot.begin(now, request::status_address(&self.chain));
        let action = request::parse(
            &self.chain,
            &mut guest.control,
            &self.shared,
            &mut slot.data,
            &mut self.scratch,
        );
        tracing::trace!(target: "platter::virtio_blk", queue = self.index, head, ?action, "start");
        let write_through = self.shared.write_through();
        let id = slot.id(head);
        let before = batch.len();
        match action {
            Action::Read { offset, len } => {
                slot.op = Op::Read;
                slot.bytes = len;
                match guest.buffers(&slot.data, Permissions::Write) {
                    Ok(buffers) => {
                        slot.written = len as u32;
                        batch.push(id, RequestOp::Read { offset, buffers });
                    }
                    Err(_) => slot.status = IOERR,
                }
            }
            Action::Write { offset, len } => {
                slot.op = Op::Write;
                slot.bytes = len;
                let fua = write_through;
                match guest.buffers(&slot.data, Permissions::Read) {
                    Ok(buffers) => batch.push(
                        id,
                        RequestOp::Write {
                            offset,
                            buffers,
                            fua,
                        },
                    ),
                    Err(_) => slot.status = IOERR,
                }
            }
            Action::Flush => {
                slot.op = Op::Flush;
                batch.push(id, RequestOp::Flush);
            }
            Action::Discard { durable } => {
                slot.op = Op::Discard;
                slot.flush_after = write_through || durable;
                for range in &self.scratch.ranges {
                    let (offset, len) = (range.offset, range.len);
                    slot.bytes += len;
                    batch.push(id, RequestOp::Discard { offset, len });
                }
            }
            Action::WriteZeroes => {
                slot.op = Op::WriteZeroes;
                slot.flush_after = write_through;
                for range in &self.scratch.ranges {
                    let (offset, len, may_unmap) = (range.offset, range.len, range.unmap);
                    slot.bytes += len;
                    batch.push(
                        id,
                        RequestOp::WriteZeroes {
                            offset,
                            len,
                            may_unmap,
                        },
                    );
                }
            }
            Action::Done {
                op,
                status,
                written,
            } => {
                slot.op = op;
                slot.status = status;
                slot.written = written;
            }
        }
        slot.pending = (batch.len() - before) as u32;
        if slot.pending == 0 {
            self.ended.push(head);
        }
        Ok(())
    }

    /// Writes the statuses of everything in `ended`, and publishes it with one store of the used
    /// index.
    fn publish(&mut self) -> Result<(), QueueFault> {
        let memory = Arc::clone(&self.memory);
        let mut window = Window::new(&*memory, self.control_from);
        let view = self.ring.view(&mut window)?;
        let count = self.ended.len() as u16;
        for (ahead, &head) in self.ended.iter().enumerate() {
            let slot = &self.slots[usize::from(head)];
            let written = slot.finish(&mut window);
            tracing::trace!(
                target: "platter::virtio_blk",
                queue = self.index, head, status = slot.status, written, "end"
            );
            self.ring.write_used(&view, ahead as u16, head, written)?;
        }
        self.control_from = window.start();
        if let Some(tracker) = &mut self.tracker {
            tracker.publishing(&mut self.ended.iter().copied());
        }
        self.ring.publish(&view, count)?;
        if let Some(tracker) = &mut self.tracker {
            let used = self.ring.snapshot().next_used;
            tracker.published(&mut self.ended.iter().copied(), used);
        }
        if self.ring.wants_interrupt(&view, count)? {
            self.signal();
        }
        Ok(())
    }

    fn signal(&self) {
        let sent = self.interrupt.signal_queue(self.index);
        self.stats.interrupted(sent.is_ok());
        if let Err(error) = sent {
            tracing::debug!(queue = self.index, %error, "the interrupt was not sent");
        }
    }

    /// Forgets `ended`, counting what ended if it was posted.
    fn forget_ended(&mut self, posted: bool) -> usize {
        let now = if posted { self.now() } else { 0 };
        let count = self.ended.len();
        for head in self.ended.drain(..) {
            let slot = &mut self.slots[usize::from(head)];
            slot.busy = false;
            if slot.op == Op::Read {
                // Also after an error: some of it may have been filled.
                mark_dirty(&*self.memory, &slot.data);
            }
            if posted {
                let took = now.saturating_sub(slot.started);
                self.stats
                    .record(slot.op, slot.status == OK, slot.bytes, took);
            }
        }
        self.outstanding -= count;
        count
    }

    /// Starts again what an earlier process had taken and not posted.
    fn replay(&mut self, heads: &[u16], batch: &mut Batch) -> Result<(), QueueFault> {
        self.refresh_memory();
        let memory = Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, self.control_from, self.data_from);
        let view = self.ring.view(&mut guest.control)?;
        let now = self.now();
        for &head in heads {
            match self.slots.get(usize::from(head)) {
                None => return Err(QueueFault::HeadOutOfRange { head }),
                Some(slot) if slot.busy => return Err(QueueFault::DuplicateHead { head }),
                Some(_) => self.start(head, now, &view, &mut guest, batch)?,
            }
        }
        Ok(())
    }
}

impl<S: MemorySource> FrontEnd for BlkQueue<S> {
    fn drain(&mut self, batch: &mut Batch) -> Drained {
        let mut taken = 0;
        if self.broken.is_some() {
            return Drained { taken, full: false };
        }
        self.refresh_memory();
        let full = self.take(batch, &mut taken).unwrap_or_else(|fault| {
            self.break_queue(fault);
            false
        });
        Drained { taken, full }
    }

    fn complete(&mut self, completion: Completion, batch: &mut Batch) {
        let head = (completion.id & 0xffff) as u16;
        let Some(slot) = self.slots.get_mut(usize::from(head)) else {
            return;
        };
        if !slot.busy || slot.pending == 0 || slot.id(head) != completion.id {
            debug_assert!(false, "a completion nobody waits for: {completion:?}");
            return;
        }
        slot.pending -= 1;
        if let Err(kind) = completion.result
            && slot.status == OK
        {
            slot.status = status_of(kind);
            tracing::debug!(
                target: "platter::virtio_blk",
                queue = self.index, head, op = slot.op.name(), error = %kind, "failed"
            );
        }
        if slot.pending > 0 {
            return;
        }
        if slot.flush_after && slot.status == OK {
            slot.flush_after = false;
            slot.pending = 1;
            batch.push(completion.id, RequestOp::Flush);
            return;
        }
        self.ended.push(head);
    }

    fn post(&mut self) -> usize {
        if self.ended.is_empty() {
            return 0;
        }
        if let Err(fault) = self.publish() {
            self.break_queue(fault);
        }
        self.forget_ended(true)
    }

    fn rearm(&mut self) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let memory = Arc::clone(&self.memory);
        let more = self
            .ring
            .view(&mut Window::new(&*memory, self.control_from))
            .and_then(|view| self.ring.rearm(&view));
        more.unwrap_or_else(|fault| {
            self.break_queue(fault);
            false
        })
    }

    fn memory_to_pin(&mut self) -> Option<MemoryRegions> {
        if !std::mem::take(&mut self.unpinned) {
            return None;
        }
        MemoryRegions::of(&self.memory.0)
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn discard_ended(&mut self) {
        self.forget_ended(false);
    }
}

impl<S: MemorySource> Worker<BlkQueue<S>> {
    /// Records requests in flight in `tracker` from now on.
    pub fn set_inflight_tracker(&mut self, tracker: Box<dyn InflightTracker>) {
        self.front_mut().tracker = Some(tracker);
    }

    /// Starts again, in this order, requests that an earlier process took from the ring and did not
    /// post; see [`InflightTracker`] for the indices that the queue must have. Also interrupts the
    /// driver once, because the earlier process may have died between posting and interrupting.
    ///
    /// # Errors
    /// [`Error::Queue`] for a head that is in flight already or not in the table, or a broken chain.
    pub fn resubmit(&mut self, heads: &[u16]) -> Result<()> {
        let queue = self.front().index;
        self.with_batch(|front, batch| front.replay(heads, batch))
            .map_err(|fault| Error::Queue { queue, fault })?;
        self.front().signal();
        self.process();
        Ok(())
    }

    /// The state of the queue: how far it has got. Exact only when nothing is in flight.
    #[must_use]
    pub fn queue_state(&self) -> QueueSnapshot {
        self.front().ring.snapshot().clone()
    }

    /// Guest requests taken from the ring and not yet posted.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.front().outstanding
    }

    /// Drains the queue and gives everything back: the disk's data plane, the guest's memory. What
    /// remains is where the queue stands.
    ///
    /// # Errors
    /// The host's error when waiting fails.
    pub fn stop(mut self) -> Result<QueueSnapshot> {
        self.drain()?;
        Ok(self.queue_state())
    }
}

/// The status that says what a disk's error says.
fn status_of(kind: ErrorKind) -> u8 {
    match kind {
        ErrorKind::Unsupported => UNSUPP,
        _ => IOERR,
    }
}
