//! What is saved of a controller, for snapshots and migration.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{PoisonError, atomic::Ordering},
};

use serde::{Deserialize, Serialize};

use super::{
    NvmeController, Status,
    command::{Command, SQE},
    core::{NewCq, NewSq, Queue},
    doorbell::Shadow,
    events::{Events, MAX_REQUESTS},
    features::Features,
    opcode::admin as opcode,
    outcome::Outcome,
    queues::NvmeQueues,
    registers::{MAX_ENTRIES, Registers, csts},
    reservation::SavedReservations,
    slot::Step,
    smart::Counters,
};
use crate::{
    Error, MemorySource, Result,
    worker::{FrontEnd, Worker},
};

/// The version of [`NvmeState`] that this crate writes.
pub const STATE_VERSION: u32 = 4;

/// A submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedSq {
    id: u16,
    base: u64,
    size: u32,
    cq: u16,
    head: u32,
    tail: u32,
    /// Entries that were aborted before they were taken, and have ended.
    aborted: Vec<u32>,
}

/// A completion queue, and what has ended and found no room in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedCq {
    id: u16,
    base: u64,
    size: u32,
    vector: Option<u16>,
    tail: u32,
    phase: bool,
    head: u32,
    ended: Vec<SavedCompletion>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedCompletion {
    sq: u16,
    cid: u16,
    status: u16,
    dw0: u32,
}

/// An admin command that ends when the host has taken completions of an I/O queue: Abort, and the
/// deletion of a submission queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedWaiting {
    opcode: u8,
    cid: u16,
    cdw10: u32,
}

impl SavedWaiting {
    /// The submission queue that it is about.
    fn queue(&self) -> u16 {
        self.cdw10 as u16
    }
}

/// The queues of one drained worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvmeWorkerState {
    sqs: Vec<SavedSq>,
    cqs: Vec<SavedCq>,
    /// Command identifiers of event requests, oldest first.
    event_requests: Vec<u16>,
    waiting: Vec<SavedWaiting>,
}

/// What a namespace has that its image and sidecar need not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SavedNamespace {
    nsid: u32,
    lba_size: u32,
    attached: bool,
    reservations: SavedReservations,
    persistent: bool,
}

/// Everything about a controller that its configuration and its disks do not say. Saved when every
/// worker has been drained; untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NvmeState {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    registers: Registers,
    features: Features,
    shadow: Option<Shadow>,
    /// With the error log and the reservation notices.
    events: Events,
    counters: Counters,
    namespaces: Vec<SavedNamespace>,
    /// The workers, in order.
    pub workers: Vec<NvmeWorkerState>,
}

fn bad(what: impl std::fmt::Display) -> Error {
    Error::State(what.to_string())
}

impl NvmeController {
    /// The state of the controller. `workers` are what [`Worker::save`] gave for each, in order.
    ///
    /// # Errors
    /// [`Error::State`] while a reset is under way; [`Error::Busy`] while a sanitize operation runs, which two
    /// servers must not do at once.
    pub fn save(&self, workers: Vec<NvmeWorkerState>) -> Result<NvmeState> {
        let core = &self.core;
        if core.is_resetting() {
            return Err(bad("a reset is under way: let the workers finish it"));
        }
        if core.subsystem.sanitize.is_running() {
            return Err(Error::Busy("a sanitize operation runs".to_owned()));
        }
        let namespaces = core.subsystem.namespaces();
        let namespaces = namespaces.iter().map(|namespace| {
            let attached = namespace.attached().contains(&core.id);
            let reservations = namespace.reservations();
            SavedNamespace {
                nsid: namespace.nsid(),
                lba_size: namespace.lba_size(),
                attached,
                reservations: reservations.state(),
                persistent: reservations.persistent,
            }
        });
        Ok(NvmeState {
            version: STATE_VERSION,
            registers: core.registers().clone(),
            features: core.features().clone(),
            shadow: *core.shadow.lock().unwrap_or_else(PoisonError::into_inner),
            events: core.with_events_quietly(|events| events.clone()),
            counters: core.counters(),
            namespaces: namespaces.collect(),
            workers,
        })
    }

    /// Puts a fresh controller, whose workers have not run, into a saved state. Then each worker is
    /// [restored](Worker::restore).
    ///
    /// # Errors
    /// [`Error::State`] for anything this controller cannot be in; it is unchanged then.
    pub fn restore(&self, state: &NvmeState) -> Result<()> {
        self.check(state)?;
        let core = &self.core;
        for saved in &state.namespaces {
            let Some(namespace) = core.subsystem.namespace(saved.nsid) else {
                continue;
            };
            namespace.set_lba_size(saved.lba_size);
            namespace.set_reservations(&saved.reservations, saved.persistent);
            namespace.choose(&[core.id], saved.attached);
            if saved.attached {
                namespace.attached().insert(core.id);
            } else {
                namespace.attached().remove(&core.id);
            }
        }
        core.hot.namespaces.fetch_add(1, Ordering::SeqCst);
        *core.registers() = state.registers.clone();
        core.hot
            .page
            .store(state.registers.page(), Ordering::Release);
        core.interrupts.mask(state.registers.intms);
        *core.features() = state.features.clone();
        core.apply_features();
        *core.shadow.lock().unwrap_or_else(PoisonError::into_inner) = state.shadow;
        core.hot.shadow_version.fetch_add(1, Ordering::SeqCst);
        core.with_events(|events| events.clone_from(&state.events));
        core.set_counters(state.counters);
        for (worker, saved) in state.workers.iter().enumerate() {
            self.open_queues(worker, saved);
        }
        Ok(())
    }

    fn check(&self, state: &NvmeState) -> Result<()> {
        let core = &self.core;
        if state.version != STATE_VERSION {
            return Err(bad(format!(
                "version is {}, this is version {STATE_VERSION}",
                state.version
            )));
        }
        if state.workers.len() != core.ports.len() {
            return Err(bad(format!(
                "it has {} workers, the controller {}",
                state.workers.len(),
                core.ports.len()
            )));
        }
        if state.features.uncoalesced.len() != usize::from(core.config.vectors) {
            return Err(bad(format!(
                "it has {} vectors, the controller {}",
                state.features.uncoalesced.len(),
                core.config.vectors
            )));
        }
        for nsid in state.features.namespaces.keys() {
            if core.subsystem.namespace(*nsid).is_none() {
                return Err(bad(format!("there is no namespace {nsid}")));
            }
        }
        if !state.events.is_possible() {
            return Err(bad("events that there are not"));
        }
        if state.shadow.is_some_and(|shadow| !shadow.is_aligned()) {
            return Err(bad("shadow doorbells that are no pages"));
        }
        for saved in &state.namespaces {
            if !matches!(saved.lba_size, 512 | 4096) {
                return Err(bad(format!(
                    "namespace {} has blocks of {} bytes",
                    saved.nsid, saved.lba_size
                )));
            }
            if core.subsystem.namespace(saved.nsid).is_none() {
                return Err(bad(format!("there is no namespace {}", saved.nsid)));
            }
        }
        let mut sqs = BTreeSet::new();
        for (worker, saved) in state.workers.iter().enumerate() {
            self.check_queues(worker, saved)?;
            if let Some(twice) = saved.sqs.iter().find(|sq| !sqs.insert(sq.id)) {
                return Err(bad(format!("submission queue {} is there twice", twice.id)));
            }
        }
        Ok(())
    }

    fn check_queues(&self, worker: usize, state: &NvmeWorkerState) -> Result<()> {
        let core = &self.core;
        let queues = core.doorbells.queues();
        let mut seen = BTreeSet::new();
        for cq in &state.cqs {
            if usize::from(cq.id) >= queues
                || core.worker_of(cq.id) != worker
                || !seen.insert(cq.id)
                || !(2..=MAX_ENTRIES).contains(&cq.size)
                || cq.tail >= cq.size
                || cq.head >= cq.size
                || cq.vector.is_some_and(|it| it >= core.config.vectors)
            {
                return Err(bad(format!("completion queue {} is impossible", cq.id)));
            }
        }
        let mut sqs = BTreeSet::new();
        for sq in &state.sqs {
            if usize::from(sq.id) >= queues
                || !seen.contains(&sq.cq)
                || !sqs.insert(sq.id)
                || !(2..=MAX_ENTRIES).contains(&sq.size)
                || sq.head >= sq.size
                || sq.tail >= sq.size
                || sq.aborted.len() >= sq.size as usize
                || sq.aborted.iter().any(|entry| *entry >= sq.size)
                || sq.base.checked_add(u64::from(sq.size) * SQE).is_none()
            {
                return Err(bad(format!("submission queue {} is impossible", sq.id)));
            }
        }
        // Entries that were taken, and as many that were aborted before they were.
        let mut room: BTreeMap<u16, u32> =
            state.sqs.iter().map(|it| (it.id, 2 * it.size)).collect();
        for ended in state.cqs.iter().flat_map(|cq| &cq.ended) {
            let room = room.get_mut(&ended.sq);
            let room = room.ok_or_else(|| bad("a completion of a queue that is not there"))?;
            let left = room.checked_sub(1);
            *room = left.ok_or_else(|| bad("more completions than a queue has entries"))?;
        }
        check_waiting(worker, state)?;
        if state.event_requests.len() > MAX_REQUESTS
            || (!state.event_requests.is_empty() && (worker != 0 || !sqs.contains(&0)))
        {
            return Err(bad("event requests where none can be"));
        }
        Ok(())
    }

    /// Queues as the admin commands and doorbells see them.
    fn open_queues(&self, worker: usize, state: &NvmeWorkerState) {
        let core = &self.core;
        for cq in &state.cqs {
            core.doorbells.open_cq(cq.id, cq.size, worker, cq.head);
            core.doorbells.posted(cq.id, cq.tail);
            if cq.id != 0 {
                core.queues().cqs[usize::from(cq.id)] = Some(Queue {
                    new: new_cq(cq),
                    closing: false,
                });
            }
        }
        for sq in &state.sqs {
            core.doorbells.open_sq(sq.id, sq.size, worker, sq.tail);
            if sq.id != 0 {
                core.queues().sqs[usize::from(sq.id)] = Some(Queue {
                    new: new_sq(sq),
                    closing: false,
                });
            }
        }
        if core.registers().csts & csts::SHST == csts::SHST_OCCURRING {
            // What was being flushed was flushed when the disks were closed.
            let mut registers = core.registers();
            registers.csts = registers.csts & !csts::SHST | csts::SHST_COMPLETE;
        }
    }
}

fn check_waiting(worker: usize, state: &NvmeWorkerState) -> Result<()> {
    let admin = state.sqs.iter().find(|sq| sq.id == 0 && worker == 0);
    let most = admin.map_or(0, |sq| sq.size as usize);
    let known = |waiting: &SavedWaiting| match waiting.opcode {
        opcode::ABORT => true,
        opcode::DELETE_SQ => waiting.queue() != 0,
        _ => false,
    };
    if state.waiting.len() > most || !state.waiting.iter().all(known) {
        return Err(bad("admin commands that wait for nothing"));
    }
    Ok(())
}

fn new_cq(cq: &SavedCq) -> NewCq {
    NewCq {
        id: cq.id,
        base: cq.base,
        size: cq.size,
        vector: cq.vector,
        tail: cq.tail,
        phase: cq.phase,
    }
}

fn new_sq(sq: &SavedSq) -> NewSq {
    NewSq {
        id: sq.id,
        base: sq.base,
        size: sq.size,
        cq: sq.cq,
        head: sq.head,
    }
}

impl<S: MemorySource> Worker<NvmeQueues<S>> {
    /// The state of a [drained](Worker::drain) worker.
    ///
    /// # Errors
    /// [`Error::NotDrained`] while commands are in flight.
    pub fn save(&self) -> Result<NvmeWorkerState> {
        let front = self.front();
        if front.outstanding() > 0 || self.in_flight() > 0 {
            return Err(Error::NotDrained {
                queue: front.index as u16,
                in_flight: front.outstanding().max(self.in_flight()),
            });
        }
        Ok(front.state())
    }

    /// Puts a fresh worker into its part of the state that the controller was
    /// [restored](NvmeController::restore) from.
    pub fn restore(&mut self, state: &NvmeWorkerState) {
        self.front_mut().restore(state);
    }
}

impl<S: MemorySource> NvmeQueues<S> {
    fn state(&self) -> NvmeWorkerState {
        let doorbells = &self.core.doorbells;
        let sqs = self.sqs.iter().enumerate().filter_map(|(id, sq)| {
            let sq = sq.as_ref()?;
            let (head, size) = (sq.ring.head(), sq.ring.size());
            Some(SavedSq {
                id: id as u16,
                base: sq.base,
                size,
                cq: sq.cq,
                // The first of a fused pair is taken again, with its second.
                head: if sq.fused.is_some() {
                    (head + size - 1) % size
                } else {
                    head
                },
                tail: doorbells.tail(id as u16),
                aborted: sq.aborted.clone(),
            })
        });
        let cqs = self.cqs.iter().flatten().map(|cq| SavedCq {
            id: cq.id,
            base: cq.base,
            size: cq.size,
            vector: cq.vector,
            tail: cq.ring.tail(),
            phase: cq.ring.phase(),
            head: doorbells.head(cq.id),
            ended: cq
                .ended
                .iter()
                .map(|index| {
                    let slot = &self.slots[*index];
                    SavedCompletion {
                        sq: slot.queue,
                        cid: slot.command.cid,
                        status: slot.status.0,
                        dw0: slot.dw0,
                    }
                })
                .collect(),
        });
        NvmeWorkerState {
            sqs: sqs.collect(),
            cqs: cqs.collect(),
            event_requests: self
                .event_requests
                .iter()
                .map(|index| self.slots[*index].command.cid)
                .collect(),
            waiting: self
                .waiting_for_host()
                .map(|command| SavedWaiting {
                    opcode: command.opcode,
                    cid: command.cid,
                    cdw10: command.cdw10(),
                })
                .collect(),
        }
    }

    fn restore(&mut self, state: &NvmeWorkerState) {
        for cq in &state.cqs {
            self.open_cq(&new_cq(cq));
        }
        for sq in &state.sqs {
            self.open_sq(&new_sq(sq));
            if let Some(Some(opened)) = self.sqs.get_mut(usize::from(sq.id)) {
                opened.aborted.clone_from(&sq.aborted);
            }
        }
        for cq in &state.cqs {
            for ended in &cq.ended {
                let index = self.again(ended.sq, ended.cid);
                self.slots[index].dw0 = ended.dw0;
                self.ended(index, Status(ended.status));
            }
            // The interrupt of what was posted last may not have arrived: another one follows.
            if cq.head != cq.tail
                && let Some(Some(opened)) = self.cqs.get_mut(usize::from(cq.id))
            {
                opened.unsignalled = 1;
                if !self.ready.contains(&cq.id) {
                    self.ready.push(cq.id);
                }
            }
        }
        for cid in &state.event_requests {
            let index = self.again(0, *cid);
            self.slots[index].step = Step::Outside;
            self.event_requests.push_back(index);
        }
        for waiting in &state.waiting {
            let index = self.again(0, waiting.cid);
            let command = &mut self.slots[index].command;
            command.opcode = waiting.opcode;
            command.cdw[0] = waiting.cdw10;
            let command = *command;
            let answer = if waiting.opcode == opcode::ABORT {
                self.abort(index, &command)
            } else {
                self.delete_sq(index, &command)
            };
            match answer {
                Ok(Outcome::Later) => self.slots[index].step = Step::Outside,
                Ok(Outcome::Done(dw0)) => {
                    self.slots[index].dw0 = dw0;
                    self.end(index, Status::SUCCESS);
                }
                Err(status) => self.end(index, status),
            }
        }
    }

    /// A command that was taken before.
    fn again(&mut self, queue: u16, cid: u16) -> u32 {
        self.outstanding += 1;
        if let Some(Some(sq)) = self.sqs.get_mut(usize::from(queue)) {
            sq.outstanding += 1;
        }
        let command = Command {
            cid,
            ..Command::default()
        };
        self.slots.begin(queue, command, 0)
    }
}
