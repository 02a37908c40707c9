//! What a device wants of its adapter, done: packets and data from the guest, block requests, data
//! to the guest.

use std::sync::Arc;

use block::{
    ErrorKind,
    io::{AlignedBuf, Buffers, RequestOp},
};
use vm_memory::Permissions;

use super::{
    command::{self, Command, Fault},
    queue::{PortQueue, Taking},
    regs::is,
    slot::{End, Raw, Slot},
};
use crate::{
    MemorySource,
    ata::{Range, Registers, Step, Work, error, status},
    memory::Window,
    mmc::{self, BLOCK},
    stats::Op,
    worker::Batch,
};

/// Bytes that a verify reads at once.
const VERIFY_BYTES: u64 = 1 << 20;

/// Sectors that a READ CD reads at once.
const RAW_SECTORS: u32 = 64;

impl<S: MemorySource> PortQueue<S> {
    /// Does what a device wants.
    pub(super) fn execute(
        &mut self,
        index: u32,
        command: Command,
        mut step: Step,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<(), Fault> {
        // A packet, and data, may come from the host first.
        if matches!(step, Step::Packet) {
            step = self.packet(index, &command, taking)?;
        }
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
            Step::ReadRaw {
                protocol,
                lba,
                blocks,
                fields,
            } => {
                slot.end = End::of(protocol, false);
                slot.op = Op::Read;
                slot.bytes = u64::from(blocks) * fields.len() as u64;
                match Self::data(slot, &command, taking) {
                    Err(Fault::Overflow) => return self.overflow(index, taking),
                    other => other?,
                }
                slot.raw = Some(Raw {
                    lba,
                    blocks,
                    fields,
                    at: 0,
                });
                self.read_raw(index, taking.batch);
            }
            Step::Work(work) => self.work(index, work, taking),
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
    pub(super) fn verify(&mut self, index: u32, batch: &mut Batch) {
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

    /// Has the thread for host work do something.
    fn work(&mut self, index: u32, work: Work, taking: &Taking<'_, '_, S>) {
        let slot = &mut self.slots[index as usize];
        let drive = taking.port.drive.as_ref();
        let Some((host, disk)) =
            drive.and_then(|drive| drive.work.as_ref().zip(drive.disk.as_ref()))
        else {
            slot.result = Err(ErrorKind::NotFound);
            return;
        };
        slot.pending += 1;
        let (id, port) = (slot.id(index), self.index);
        let (shared, mail) = (Arc::clone(&self.shared), Arc::clone(&self.mail));
        host.run(work, Arc::clone(disk), move |result| {
            mail.send((id, result));
            shared.port(port).ring();
        });
    }

    /// Takes the answers of that thread.
    pub(super) fn read_mail(&mut self) {
        for (id, result) in self.mail.take() {
            let index = (id & 0xff) as u32;
            let Some(slot) = self.slots.get_mut(index as usize) else {
                continue;
            };
            if !slot.busy || slot.pending == 0 || slot.id(index) != id {
                debug_assert!(false, "an answer nobody waits for: {id:x}");
                continue;
            }
            slot.pending -= 1;
            slot.result = result;
            if slot.pending == 0 {
                self.ended.push(index);
            }
        }
    }

    /// Fetches the packet of a PACKET command.
    fn packet(
        &mut self,
        index: u32,
        command: &Command,
        taking: &mut Taking<'_, '_, S>,
    ) -> Result<Step, Fault> {
        let slot = &mut self.slots[index as usize];
        let Some(drive) = &mut taking.port.drive else {
            return Err(Fault::Interface);
        };
        let abort = Step::End(Registers::failed(&slot.task, error::ABRT));
        if !command.atapi {
            // The HBA was not told to send the packet.
            return Ok(abort);
        }
        slot.packet = true;
        let cdb = command.packet(&mut taking.guest.control)?;
        tracing::trace!(target: "platter::ahci", port = self.index, slot = index, ?cdb, "packet");
        let before = drive.tray();
        let step = drive.packet(&slot.task, &cdb).unwrap_or(abort);
        if let (Some((_, open)), true) = (drive.tray(), drive.tray() != before) {
            self.shared.tray_moved(self.index, open);
        }
        Ok(step)
    }

    /// Reads the next sectors of a READ CD that wants more than user data.
    fn read_raw(&mut self, index: u32, batch: &mut Batch) {
        let Some(raw) = self.slots[index as usize].raw else {
            return;
        };
        let len = u64::from(raw.blocks.min(RAW_SECTORS)) * BLOCK;
        let op = RequestOp::Read {
            offset: u64::from(raw.lba) * BLOCK,
            buffers: Buffers::owned(AlignedBuf::zeroed(len as usize)),
        };
        self.push(index, op, batch);
    }

    /// Gives the guest what was read of whole sectors, and reads on.
    pub(super) fn raw_ended(&mut self, index: u32, buffers: Option<Buffers>, batch: &mut Batch) {
        let slot = &mut self.slots[index as usize];
        let (Some(mut raw), Some(data)) = (slot.raw, buffers.and_then(Buffers::into_owned)) else {
            slot.result = Err(ErrorKind::InvalidArgument);
            return;
        };
        let memory = Arc::clone(&self.memory);
        let mut window = Window::new(&*memory, self.windows.1);
        let mut out = Vec::new();
        for user in data.chunks_exact(BLOCK as usize) {
            let mut block = [0; BLOCK as usize];
            block.copy_from_slice(user);
            let sector = mmc::assemble(raw.lba, &block);
            out.extend_from_slice(raw.fields.of(&sector));
            raw.lba = raw.lba.saturating_add(1);
            raw.blocks = raw.blocks.saturating_sub(1);
        }
        if command::scatter_at(&mut window, &slot.data, raw.at, &out).is_err() {
            slot.result = Err(ErrorKind::InvalidArgument);
            return;
        }
        raw.at += out.len() as u64;
        slot.raw = (raw.blocks > 0).then_some(raw);
        self.read_raw(index, batch);
    }

    /// A block request of a command. Without a medium it fails at once.
    pub(super) fn push(&mut self, index: u32, op: RequestOp, batch: &mut Batch) {
        let slot = &mut self.slots[index as usize];
        let id = slot.id(index);
        match self.plane {
            Some(plane) if batch.push_to(plane, id, op) => slot.pending += 1,
            _ => slot.result = Err(ErrorKind::NotFound),
        }
    }
}
