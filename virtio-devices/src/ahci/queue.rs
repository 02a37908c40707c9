//! The data plane of a port: a [`FrontEnd`] for the shared worker. Commands come in here; their ends
//! go out in [`post`](super::post).

use std::{sync::Arc, time::Instant};

use block::{
    ErrorKind,
    io::{AlignedBuf, Buffers, Completion, RequestOp},
};
use vm_memory::Permissions;

use super::{
    command::{self, Command, Fault},
    fis::{self, FromHost},
    hba::Shared,
    port::Port,
    regs::{cmd, is, serr},
    slot::{End, Slot},
};
use crate::{
    MemorySource,
    ata::{Range, Registers, Step, TaskFile, error, status},
    memory::{BatchMemory, QueueMemory},
    stats::{Op, QueueStats},
    worker::{Batch, Drained, FrontEnd, Worker},
};

/// The worker of a port.
pub type PortWorker<S> = Worker<PortQueue<S>>;

/// Command slots of a port.
pub(super) const SLOTS: u32 = 32;

/// Bytes that a verify reads at once.
const VERIFY_BYTES: u64 = 1 << 20;

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
    plane: Option<usize>,
    /// [`Port::drive_changes`] that `plane` belongs to.
    drive_changes: u64,
    since: Instant,
    /// Where the windows on command lists and on data started last.
    pub(super) windows: (u64, u64),
}

/// What a batch of commands works with.
struct Taking<'a, 'm, S: MemorySource> {
    port: &'a mut Port,
    guest: &'a mut BatchMemory<'m, S::M>,
    batch: &'a mut Batch,
    now: u64,
    /// A queued command was accepted.
    accepted: bool,
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
            FromHost::Command(task) => {
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

    /// Does what a device wants.
    fn execute(
        &mut self,
        index: u32,
        command: Command,
        mut step: Step,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<(), Fault> {
        // Data may come from the host first.
        if let Step::Out {
            protocol,
            len,
            payload,
        } = step
        {
            let slot = &mut self.slots[index as usize];
            slot.end = End::of(protocol, true);
            slot.bytes = u64::from(len);
            match Self::data(slot, &command, taking) {
                Err(Fault::Overflow) => return self.overflow(index, taking),
                other => other?,
            }
            let mut data = vec![0; len as usize];
            command::gather(&mut taking.guest.control, &slot.data, &mut data)?;
            let Some(drive) = &mut taking.port.drive else {
                return Err(Fault::Interface);
            };
            step = drive.data_out(&slot.task, payload, &data);
        }
        let slot = &mut self.slots[index as usize];
        match step {
            Step::End(registers) => {
                slot.registers = Some(registers);
                if registers.is_error() {
                    slot.end = End::Register;
                    slot.bytes = 0;
                }
            }
            Step::In { protocol, data } => {
                slot.end = End::of(protocol, false);
                slot.bytes = data.len() as u64;
                match Self::data(slot, &command, taking) {
                    Err(Fault::Overflow) => return self.overflow(index, taking),
                    other => other?,
                }
                command::scatter(&mut taking.guest.control, &slot.data, &data)?;
                slot.registers = Some(Registers::ready(&slot.task));
            }
            Step::Transfer {
                protocol,
                write,
                fua,
                range,
            } => {
                slot.end = End::of(protocol, write);
                slot.op = if write { Op::Write } else { Op::Read };
                slot.bytes = range.len;
                match Self::data(slot, &command, taking) {
                    Err(Fault::Overflow) => return self.overflow(index, taking),
                    other => other?,
                }
                self.transfer(index, write, fua, range.offset, taking)?;
            }
            Step::Verify(range) => {
                slot.verify = Some(range);
                self.verify(index, taking.batch);
            }
            Step::Flush => {
                slot.op = Op::Flush;
                self.push(index, RequestOp::Flush, taking.batch);
            }
            Step::Trim {
                ranges,
                zero,
                durable,
            } => self.trim(index, &ranges, zero, durable, taking.batch),
            Step::Out { .. } | Step::Packet => {
                slot.registers = Some(Registers::failed(&slot.task, error::ABRT));
            }
        }
        self.accept(index, taking);
        Ok(())
    }

    /// The command is with the device now.
    fn accept(&mut self, index: u32, taking: &mut Taking<'_, '_, S>) {
        let slot = &mut self.slots[index as usize];
        let failed = slot.registers.is_some_and(|registers| registers.is_error());
        if slot.queued && !failed {
            if slot.registers.is_some() {
                slot.end = End::Queued;
            }
            taking.port.regs.ci &= !(1 << index);
            taking.accepted = true;
        } else {
            taking.port.regs.tfd |= u32::from(status::BSY);
        }
        if slot.pending == 0 {
            self.ended.push(index);
        }
    }

    /// The descriptors have less room than the command has data: nothing is moved.
    fn overflow(&mut self, index: u32, taking: &mut Taking<'_, '_, S>) -> Result<(), Fault> {
        taking.port.regs.is |= is::OFS;
        let slot = &mut self.slots[index as usize];
        slot.end = End::Register;
        slot.bytes = 0;
        slot.registers = Some(Registers::failed(&slot.task, error::ABRT));
        self.accept(index, taking);
        Ok(())
    }

    /// Looks up the guest memory of a command.
    fn data(
        slot: &mut Slot,
        command: &Command,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<(), Fault> {
        let window = &mut taking.guest.control;
        slot.descriptor_interrupt = command.data(window, slot.bytes, &mut slot.data)?;
        Ok(())
    }

    fn transfer(
        &mut self,
        index: u32,
        write: bool,
        fua: bool,
        offset: u64,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<(), Fault> {
        let slot = &self.slots[index as usize];
        let access = if write {
            Permissions::Read
        } else {
            Permissions::Write
        };
        let buffers = taking
            .guest
            .buffers(&slot.data, access)
            .map_err(|_| Fault::Bus)?;
        let op = if write {
            RequestOp::Write {
                offset,
                buffers,
                fua,
            }
        } else {
            RequestOp::Read { offset, buffers }
        };
        self.push(index, op, taking.batch);
        Ok(())
    }

    fn trim(&mut self, index: u32, ranges: &[Range], zero: bool, durable: bool, batch: &mut Batch) {
        let slot = &mut self.slots[index as usize];
        slot.op = Op::Discard;
        slot.flush_after = durable;
        for &Range { offset, len } in ranges {
            let op = if zero {
                RequestOp::WriteZeroes {
                    offset,
                    len,
                    may_unmap: true,
                }
            } else {
                RequestOp::Discard { offset, len }
            };
            self.push(index, op, batch);
        }
    }

    /// Reads the next piece of what is to be verified.
    fn verify(&mut self, index: u32, batch: &mut Batch) {
        let slot = &mut self.slots[index as usize];
        let Some(range) = slot.verify else {
            return;
        };
        let len = range.len.min(VERIFY_BYTES);
        slot.verify = (range.len > len).then(|| Range {
            offset: range.offset + len,
            len: range.len - len,
        });
        let op = RequestOp::Read {
            offset: range.offset,
            buffers: Buffers::owned(AlignedBuf::zeroed(len as usize)),
        };
        self.push(index, op, batch);
    }

    /// A block request of a command. Without a medium it fails at once.
    fn push(&mut self, index: u32, op: RequestOp, batch: &mut Batch) {
        let slot = &mut self.slots[index as usize];
        let id = slot.id(index);
        match self.plane {
            Some(plane) if batch.push_to(plane, id, op) => slot.pending += 1,
            _ => slot.result = Err(ErrorKind::NotFound),
        }
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
            if slot.verify.is_some() && slot.epoch == self.shared.port(self.index).epoch {
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
