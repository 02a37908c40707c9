//! What the shared loop calls: a [`FrontEnd`] of a port. Commands come in here; their ends go out in
//! [`post`](super::post).

use std::{sync::Arc, time::Instant};

use block::io::{Completion, RequestOp};

use super::{
    command::{self, Command, Fault},
    fis::FromHost,
    port::Port,
    queue::{PortQueue, SLOTS, Taking},
    regs::cmd,
};
use crate::{
    MemorySource,
    ata::{Registers, Step, TaskFile, error},
    memory::{BatchMemory, QueueMemory},
    worker::{Batch, Drained, FrontEnd, Worker},
};

/// The worker of a port.
pub type PortWorker<S> = Worker<PortQueue<S>>;

impl<S: MemorySource> PortQueue<S> {
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
        if port.has_work() && shared.may_access() {
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

    fn resume(&mut self, _batch: &mut Batch) {
        if self.outstanding > 0 {
            self.read_mail();
        }
    }

    fn rearm(&mut self) -> bool {
        let shared = Arc::clone(&self.shared);
        let mut port = shared.port(self.index);
        port.wants_doorbell = true;
        (port.has_work() && shared.may_access())
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
