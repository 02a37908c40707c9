//! The data plane of a port: a [`FrontEnd`] for the shared worker. Commands come in here; their ends
//! go out in [`post`](super::post).

use std::{sync::Arc, time::Instant};

use block::io::{Completion, RequestOp};

use super::{
    command::{self, Command, Fault},
    fis::{self, FromHost},
    port::Port,
    regs::{cmd, is, serr},
    shared::Shared,
    slot::Slot,
};
use crate::{
    MemorySource,
    ata::{Registers, Step, TaskFile, error, status},
    memory::{BatchMemory, QueueMemory},
    stats::QueueStats,
    worker::{Batch, Drained, FrontEnd, Worker},
};

/// The worker of a port.
pub type PortWorker<S> = Worker<PortQueue<S>>;

/// Command slots of a port.
pub(super) const SLOTS: u32 = 32;

/// One port of an [`Hba`](super::Hba), as its worker drives it.
pub struct PortQueue<S: MemorySource> {
    pub(super) shared: Arc<Shared>,
    pub(super) index: u32,
    source: S,
    pub(super) memory: Arc<QueueMemory<S::M>>,
    pub(super) stats: Arc<QueueStats>,
    pub(super) slots: Box<[Slot]>,
    /// Slots whose commands have ended and are not yet posted.
    pub(super) ended: Vec<u32>,
    pub(super) outstanding: usize,
    /// The data plane of the drive's disk.
    pub(super) plane: Option<usize>,
    /// [`Port::drive_changes`] that `plane` belongs to.
    drive_changes: u64,
    since: Instant,
    /// Where the windows on command lists and on data started last.
    pub(super) windows: (u64, u64),
}

/// What a batch of commands works with.
pub(super) struct Taking<'a, 'm, S: MemorySource> {
    pub(super) port: &'a mut Port,
    pub(super) guest: &'a mut BatchMemory<'m, S::M>,
    pub(super) batch: &'a mut Batch,
    now: u64,
    /// A queued command was accepted.
    pub(super) accepted: bool,
}

impl<S: MemorySource> PortQueue<S> {
    pub(super) fn new(shared: Arc<Shared>, index: u32, source: S, stats: Arc<QueueStats>) -> Self {
        Self {
            shared,
            index,
            memory: Arc::new(QueueMemory(source.load())),
            source,
            stats,
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
            ended: Vec::with_capacity(SLOTS as usize),
            outstanding: 0,
            plane: None,
            drive_changes: 0,
            since: Instant::now(),
            windows: (0, 0),
        }
    }

    /// The number of the port.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index as u8
    }

    pub(super) fn now(&self) -> u64 {
        // 584 years fit.
        self.since.elapsed().as_nanos() as u64
    }

    /// Uses the data plane of the disk that is there now.
    fn follow_drive(&mut self, port: &Port, batch: &mut Batch) {
        if self.drive_changes == port.drive_changes {
            return;
        }
        self.drive_changes = port.drive_changes;
        if let Some(old) = self.plane.take() {
            batch.detach(old);
        }
        let disk = port.drive.as_ref().and_then(|drive| drive.disk.as_ref());
        let Some(disk) = disk else {
            return;
        };
        match disk.create_async_io(SLOTS) {
            Ok(io) => self.plane = Some(batch.attach(io)),
            Err(error) => {
                tracing::error!(port = self.index, %error, "the disk has no data plane");
            }
        }
    }

    /// Fetches and starts commands, while there are any and the disk has room; returns whether it
    /// had none left.
    fn take(&mut self, taking: &mut Taking<'_, '_, S>, taken: &mut usize) -> bool {
        while taking.port.runs() {
            let ready = taking.port.regs.ci & !taking.port.taken;
            if ready == 0 {
                break;
            }
            let room = self.plane.map_or(1, |plane| taking.batch.room_of(plane));
            if room == 0 {
                self.stats.stalled();
                return true;
            }
            let first = u32::from(taking.port.regs.next_slot);
            let slot = (ready.rotate_right(first).trailing_zeros() + first) % SLOTS;
            let regs = &mut taking.port.regs;
            regs.next_slot = ((slot + 1) % SLOTS) as u8;
            regs.cmd = regs.cmd & !cmd::CCS | slot << cmd::CCS_SHIFT;
            *taken += 1;
            if let Err(fault) = self.fetch(slot, taking) {
                self.fault(taking.port, fault);
            }
        }
        false
    }

    /// The HBA cannot go on: it reports why and stops until the driver restarts it.
    pub(super) fn fault(&self, port: &mut Port, fault: Fault) {
        tracing::debug!(port = self.index, ?fault, "a command list broke its rules");
        self.stats.fault();
        let regs = &mut port.regs;
        regs.halted = true;
        regs.is |= match fault {
            Fault::Bus => is::HBFS,
            Fault::Interface => {
                regs.serr |= serr::ERR_P;
                is::IFS
            }
            Fault::Overflow => is::OFS,
        };
    }

    /// Fetches the command in a slot, and starts it.
    fn fetch(&mut self, index: u32, taking: &mut Taking<'_, '_, S>) -> Result<(), Fault> {
        let list = taking.port.regs.clb;
        let command = Command::fetch(&mut taking.guest.control, list, index)?;
        match command.fis {
            FromHost::Control(control) => self.control(index, command, control, taking),
            FromHost::Command(mut task) => {
                if self.shared.config.quirks.wide_counts {
                    task = task.widened();
                }
                let started = self.start(index, command, &task, taking);
                if started.is_err() {
                    self.release(index, taking.port);
                }
                return started;
            }
        }
        Ok(())
    }

    /// The driver writes Device Control: SRST may begin or end.
    fn control(
        &mut self,
        index: u32,
        command: Command,
        control: u8,
        taking: &mut Taking<'_, '_, S>,
    ) {
        let port = &mut *taking.port;
        let reset = control & 4 != 0;
        let was = std::mem::replace(&mut port.regs.soft_reset, reset);
        if reset && !was {
            // Commands that the device has are gone.
            port.orphan();
        }
        port.regs.ci &= !(1 << index);
        let _ = command::store(
            &mut taking.guest.control,
            command.count_at.0,
            &0u32.to_le_bytes(),
        );
        if was && !reset {
            port.soft_reset_ended();
            self.post_signature(port, taking.guest);
        }
    }

    /// Starts a command.
    fn start(
        &mut self,
        index: u32,
        command: Command,
        task: &TaskFile,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<(), Fault> {
        let port = &mut *taking.port;
        let (others, bit) = (port.taken != 0, 1 << index);
        let slot = &mut self.slots[index as usize];
        slot.begin(port.epoch, taking.now);
        slot.task = *task;
        slot.count_at = command.count_at;
        port.taken |= bit;
        self.outstanding += 1;
        let Some(drive) = &mut port.drive else {
            return Err(Fault::Interface);
        };
        slot.queued = drive.is_queued(task);
        tracing::trace!(target: "platter::ahci", port = self.index, slot = index, ?task, "start");
        let step = if port.regs.soft_reset || (slot.queued && u32::from(task.tag()) != index) {
            Step::End(Registers::failed(task, error::ABRT))
        } else if !slot.queued && others {
            // Not while queued commands are outstanding: that ends them all (SATA 3.2, 13.6.3).
            let registers = Registers::failed(task, error::ABRT);
            drive.queue_error(task, registers, false);
            Step::End(registers)
        } else {
            drive.command(task)
        };
        self.execute(index, command, step, taking)
    }

    /// A slot is free again.
    pub(super) fn release(&mut self, index: u32, port: &mut Port) {
        self.slots[index as usize].busy = false;
        port.taken &= !(1 << index);
        self.outstanding -= 1;
    }

    /// Puts the signature of the device where the driver finds it.
    fn post_signature(&self, port: &mut Port, guest: &mut BatchMemory<'_, S::M>) {
        if !std::mem::take(&mut port.regs.signature_unposted) {
            return;
        }
        if let Some(drive) = &port.drive {
            let fis = fis::register(&drive.signature(), false);
            let at = port.regs.fb.wrapping_add(fis::REGISTER_AT);
            if command::store(&mut guest.control, at, &fis).is_err() {
                self.fault(port, Fault::Bus);
            }
        }
    }

    /// Tells that queued commands were accepted: once for all of them, they are all alike.
    fn post_accepted(&self, taking: &mut Taking<'_, '_, S>) {
        let registers = Registers {
            status: status::READY,
            ..Registers::default()
        };
        let regs = &mut taking.port.regs;
        regs.tfd = fis::task_file_data(&registers) | regs.tfd & u32::from(status::BSY);
        let at = regs.fb.wrapping_add(fis::REGISTER_AT);
        let fis = fis::register(&registers, false);
        if command::store(&mut taking.guest.control, at, &fis).is_err() {
            self.fault(taking.port, Fault::Bus);
        }
    }
}

impl<S: MemorySource> FrontEnd for PortQueue<S> {
    fn drain(&mut self, batch: &mut Batch) -> Drained {
        if !self.source.is_current(&self.memory.0) {
            self.memory = Arc::new(QueueMemory(self.source.load()));
        }
        let shared = Arc::clone(&self.shared);
        let mut port = shared.port(self.index);
        self.follow_drive(&port, batch);
        if port.settling && self.outstanding == 0 {
            port.settle();
        }
        let mut taken = 0;
        let mut full = false;
        if port.has_work() {
            let before = port.interrupts();
            let memory = Arc::clone(&self.memory);
            let mut guest = BatchMemory::new(&memory, self.windows.0, self.windows.1);
            self.post_signature(&mut port, &mut guest);
            self.stats.batch();
            let mut taking = Taking {
                port: &mut port,
                guest: &mut guest,
                batch,
                now: self.now(),
                accepted: false,
            };
            full = self.take(&mut taking, &mut taken);
            if taking.accepted {
                self.post_accepted(&mut taking);
            }
            self.windows = guest.ended_at();
            if port.interrupts() != before {
                shared.interrupt(self.index, &port, 0);
            }
        }
        Drained { taken, full }
    }

    fn complete(&mut self, completion: Completion, batch: &mut Batch) {
        let index = (completion.id & 0xff) as u32;
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return;
        };
        if !slot.busy || slot.pending == 0 || slot.id(index) != completion.id {
            debug_assert!(false, "a completion nobody waits for: {completion:?}");
            return;
        }
        slot.pending -= 1;
        if let Err(kind) = completion.result
            && slot.result.is_ok()
        {
            slot.result = Err(kind);
            tracing::debug!(
                target: "platter::ahci",
                port = self.index, slot = index, op = slot.op.name(), error = %kind, "failed"
            );
        }
        if slot.pending == 0 && slot.result.is_ok() {
            let forgotten = slot.epoch != self.shared.port(self.index).epoch;
            if slot.raw.is_some() {
                if !forgotten {
                    self.raw_ended(index, completion.buffers, batch);
                }
            } else if slot.verify.is_some() && !forgotten {
                self.verify(index, batch);
            } else if std::mem::take(&mut slot.flush_after) {
                self.push(index, RequestOp::Flush, batch);
            }
        }
        if self.slots[index as usize].pending == 0 {
            self.ended.push(index);
        }
    }

    fn post(&mut self) -> usize {
        self.post_ended()
    }

    fn rearm(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut port = shared.port(self.index);
        port.wants_doorbell = true;
        port.has_work()
            || port.drive_changes != self.drive_changes
            || (port.settling && self.outstanding == 0)
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn discard_ended(&mut self) {
        let shared = Arc::clone(&self.shared);
        let mut port = shared.port(self.index);
        for index in std::mem::take(&mut self.ended) {
            self.release(index, &mut port);
        }
        port.settle();
    }

    fn deadline(&self) -> Option<Instant> {
        self.shared.irq().due()
    }
}

impl<S: MemorySource> Drop for PortQueue<S> {
    fn drop(&mut self) {
        // What was taken and not posted will never be: the port must not wait for it.
        let mut port = self.shared.port(self.index);
        if self.outstanding > 0 {
            port.taken = 0;
            port.settle();
        }
    }
}
