//! Commands that were taken and not yet posted.

use std::{cell::Cell, sync::Arc};

use super::{
    Namespace, Status,
    command::Command,
    pieces::{CopyState, Stream},
};
use crate::{memory::Data, stats::Op};

/// What a command does next when its block requests have ended.
#[derive(Debug, Default)]
pub(super) enum Step {
    /// It ends.
    #[default]
    End,
    /// One flush, then it ends.
    Flush,
    /// It goes through memory of ours in pieces.
    Stream(Box<Stream>),
    /// It moves data from one place of the disk to another.
    Copy(Box<CopyState>),
    /// The first of a fused pair has read what it compares; then the second writes.
    FusedCompare { second: u32 },
    /// The second of a fused pair has written.
    FusedWrite { first: u32 },
    /// The second of a fused pair, waiting for the first.
    FusedWait,
    /// It waits for host work, or for an event.
    Outside,
}

/// A command in flight.
#[derive(Debug, Default)]
pub(super) struct Slot {
    pub(super) busy: bool,
    pub(super) generation: u32,
    pub(super) queue: u16,
    pub(super) command: Command,
    pub(super) status: Status,
    pub(super) dw0: u32,
    /// Block requests that have not ended.
    pub(super) pending: u32,
    pub(super) op: Op,
    pub(super) bytes: u64,
    /// Nanoseconds since the worker was made.
    pub(super) started: u64,
    /// The place of its namespace in the worker.
    pub(super) namespace: Option<usize>,
    /// It is counted at the gate of its namespace.
    pub(super) gated: bool,
    /// It is alone behind that gate, or waits to be.
    pub(super) alone: bool,
    pub(super) step: Step,
    /// It waits to be posted.
    pub(super) ended: bool,
    pub(super) data: Data,
}

/// All slots of a worker. There are never more than its submission queues have entries.
#[derive(Debug, Default)]
pub(super) struct Slots {
    list: Vec<Slot>,
    free: Vec<u32>,
}

impl Slots {
    /// A slot for a command that was just taken.
    #[inline]
    pub(super) fn begin(&mut self, queue: u16, command: Command, started: u64) -> u32 {
        let index = self.free.pop().unwrap_or_else(|| {
            self.list.push(Slot::default());
            (self.list.len() - 1) as u32
        });
        let slot = &mut self.list[index as usize];
        slot.busy = true;
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        slot.queue = queue;
        slot.command = command;
        slot.status = Status::SUCCESS;
        slot.dw0 = 0;
        slot.pending = 0;
        slot.op = Op::Other;
        slot.bytes = 0;
        slot.started = started;
        slot.step = Step::End;
        slot.ended = false;
        slot.data.clear();
        index
    }

    pub(super) fn release(&mut self, index: u32) {
        let slot = &mut self.list[index as usize];
        debug_assert!(slot.busy && !slot.gated && !slot.alone && slot.namespace.is_none());
        slot.busy = false;
        slot.step = Step::End;
        self.free.push(index);
    }

    /// The name of its block requests and host work.
    pub(super) fn id(&self, index: u32) -> u64 {
        u64::from(self.list[index as usize].generation) << 32 | u64::from(index)
    }

    /// The slot that `id` names, if it is still the same command.
    pub(super) fn find(&self, id: u64) -> Option<u32> {
        let index = id as u32;
        let slot = self.list.get(index as usize)?;
        (slot.busy && u64::from(slot.generation) == id >> 32).then_some(index)
    }

    /// The command `cid` of a queue.
    pub(super) fn in_flight(&self, queue: u16, cid: u16) -> Option<u32> {
        let is = |slot: &Slot| slot.busy && slot.queue == queue && slot.command.cid == cid;
        self.list.iter().position(is).map(|index| index as u32)
    }

    /// The first of the fused pair that `second` belongs to, if it has started.
    pub(super) fn first_of(&self, second: u32) -> Option<u32> {
        let is = |slot: &Slot| {
            slot.busy && matches!(slot.step, Step::FusedCompare { second: it } if it == second)
        };
        self.list.iter().position(is).map(|index| index as u32)
    }

    /// The commands.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.list.iter().filter(|slot| slot.busy)
    }

    /// The slots in use.
    pub(super) fn busy(&self) -> Vec<u32> {
        let all = self.list.iter().enumerate();
        all.filter(|(_, slot)| slot.busy)
            .map(|(index, _)| index as u32)
            .collect()
    }
}

impl std::ops::Index<u32> for Slots {
    type Output = Slot;

    fn index(&self, index: u32) -> &Slot {
        &self.list[index as usize]
    }
}

impl std::ops::IndexMut<u32> for Slots {
    fn index_mut(&mut self, index: u32) -> &mut Slot {
        &mut self.list[index as usize]
    }
}

/// A namespace that a worker uses. The worker's own commands share this, so that none of them moves a count
/// that other threads move as well.
pub(super) struct Attached {
    pub(super) namespace: Arc<Namespace>,
    /// Its data plane, once one was needed.
    pub(super) plane: Cell<Option<usize>>,
    /// Commands that use it.
    pub(super) users: Cell<u32>,
    /// Detached: it goes when the last command has ended.
    pub(super) gone: Cell<bool>,
}

impl Attached {
    pub(super) fn new(namespace: Arc<Namespace>) -> Self {
        Self {
            namespace,
            plane: Cell::new(None),
            users: Cell::new(0),
            gone: Cell::new(false),
        }
    }

    /// One more command uses it.
    pub(super) fn enter(&self) {
        self.users.set(self.users.get() + 1);
    }

    /// A command has ended; whether it was the last of a namespace that is detached.
    pub(super) fn leave(&self) -> bool {
        self.users.set(self.users.get().saturating_sub(1));
        self.gone.get() && self.users.get() == 0
    }
}
