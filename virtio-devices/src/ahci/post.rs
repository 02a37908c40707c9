//! Ends of commands: FISes into guest memory, registers, at most one interrupt a batch.

use std::sync::{Arc, atomic::Ordering};

use super::{
    command::{self, Fault},
    fis,
    port::Port,
    queue::PortQueue,
    regs::is,
    slot::{End, Slot},
};
use crate::{
    MemorySource,
    ata::{Registers, status},
    memory::{BatchMemory, mark_dirty},
    stats::Op,
};

/// What the ends of a batch add up to.
#[derive(Default)]
struct Ends {
    /// Tags of queued commands that ended well.
    tags: u32,
    /// The newest of them: to the host, bytes.
    setup: Option<(u8, bool, u32)>,
    /// Commands posted.
    posted: u32,
}

/// Bytes of a command packet.
const PACKET: u32 = 12;

/// The last PIO Setup FIS of a command.
struct Setup {
    to_host: bool,
    interrupt: bool,
    /// Bytes of the last block.
    last: u32,
}

impl Setup {
    fn of(slot: &Slot) -> Option<Self> {
        let (to_host, block) = match slot.end {
            End::PioIn { block } if slot.bytes > 0 => (true, block),
            End::PioOut { block } if slot.bytes > 0 => (false, block),
            // The packet itself was sent with PIO.
            _ if slot.packet => {
                return Some(Self {
                    to_host: false,
                    interrupt: false,
                    last: PACKET,
                });
            }
            _ => return None,
        };
        let last = match slot.bytes % u64::from(block) {
            0 => block,
            rest => rest as u32,
        };
        Some(Self {
            to_host,
            // The first block of data to a disk comes without being asked for.
            interrupt: to_host || slot.packet || slot.bytes > u64::from(block),
            last,
        })
    }
}

impl<S: MemorySource> PortQueue<S> {
    /// Shows the guest what has ended.
    pub(super) fn post_ended(&mut self) -> usize {
        if self.ended.is_empty() {
            if self.shared.coalescing.load(Ordering::Relaxed) {
                let mut irq = self.shared.irq();
                irq.expire();
                let waits = irq.due().is_some();
                self.shared.coalescing.store(waits, Ordering::Relaxed);
            }
            return 0;
        }
        let shared = Arc::clone(&self.shared);
        if !shared.may_access() {
            return 0;
        }
        let mut port = shared.port(self.index);
        let memory = Arc::clone(&self.memory);
        let mut guest = BatchMemory::new(&memory, self.windows.0, self.windows.1);
        let ended = std::mem::take(&mut self.ended);
        let now = self.now();
        let mut ends = Ends::default();
        let mut failed = Vec::new();
        for &index in &ended {
            self.record(index, now);
            let slot = &mut self.slots[index as usize];
            if slot.epoch != port.epoch {
                continue;
            }
            let registers = match (slot.registers, &mut port.drive) {
                (Some(registers), _) => registers,
                (None, Some(drive)) => drive.finish(&slot.task, slot.result),
                (None, None) => continue,
            };
            if registers.is_error() {
                failed.push((index, registers));
            } else if let Err(fault) =
                self.succeed(index, &registers, &mut port, &mut guest, &mut ends)
            {
                self.fault(&mut port, fault);
            }
        }
        if ends.tags != 0
            && let Err(fault) = self.post_queued(&ends, &mut port, &mut guest)
        {
            self.fault(&mut port, fault);
        }
        // An error takes all that is queued with it, so it comes last; and the first one counts.
        if let Some((index, registers)) = failed.first()
            && let Err(fault) = self.fail(*index, registers, &mut port, &mut guest)
        {
            self.fault(&mut port, fault);
        }
        self.windows = guest.ended_at();
        let count = ended.len();
        for &index in &ended {
            self.release(index, &mut port);
        }
        self.ended = ended;
        self.ended.clear();
        if port.settling && self.outstanding == 0 {
            port.settle();
        }
        if shared.interrupt(self.index, &port, ends.posted) {
            self.stats.interrupted(true);
        }
        count
    }

    /// Counts a command, and marks what the disk wrote to guest memory.
    fn record(&mut self, index: u32, now: u64) {
        let slot = &self.slots[index as usize];
        if slot.op == Op::Read {
            // Also after an error: some of it may have been filled.
            mark_dirty(&*self.memory, &slot.data);
        }
        let failed = slot.result.is_err() || slot.registers.is_some_and(|end| end.is_error());
        let took = now.saturating_sub(slot.started);
        self.stats.record(slot.op, !failed, slot.bytes, took);
    }

    /// A command has ended well.
    fn succeed(
        &mut self,
        index: u32,
        registers: &Registers,
        port: &mut Port,
        guest: &mut BatchMemory<'_, S::M>,
        ends: &mut Ends,
    ) -> Result<(), Fault> {
        let quirks = self.shared.config.quirks;
        let slot = &self.slots[index as usize];
        if slot.descriptor_interrupt && !quirks.no_descriptor_interrupt {
            port.regs.is |= is::DPS;
        }
        ends.posted += 1;
        if slot.end == End::Queued {
            ends.tags |= 1 << index;
            if slot.bytes > 0 {
                ends.setup = Some((index as u8, slot.op == Op::Read, slot.bytes as u32));
            }
            return Ok(());
        }
        port.regs.tfd = fis::task_file_data(registers);
        let window = &mut guest.control;
        let count = (slot.bytes as u32).to_le_bytes();
        command::store(window, slot.count_at.0, &count)?;
        let area = port.regs.fb;
        let mut register_fis = true;
        if let Some(setup) = Setup::of(slot) {
            let status = registers.status;
            let during = Registers {
                status: status | status::DRQ,
                ..*registers
            };
            let end = if setup.to_host && !slot.packet {
                status
            } else {
                status | status::BSY
            };
            let fis = fis::pio_setup(&during, setup.to_host, setup.interrupt, end, setup.last);
            command::store(window, area.wrapping_add(fis::PIO_SETUP_AT), &fis)?;
            if setup.interrupt {
                port.regs.is |= is::PSS;
            }
            register_fis = slot.packet || !setup.to_host || quirks.register_after_pio_in;
        }
        if register_fis {
            let fis = fis::register(registers, true);
            command::store(window, area.wrapping_add(fis::REGISTER_AT), &fis)?;
            port.regs.is |= is::DHRS;
        }
        port.regs.ci &= !(1 << index);
        Ok(())
    }

    /// One Set Device Bits FIS for all queued commands that ended well.
    fn post_queued(
        &self,
        ends: &Ends,
        port: &mut Port,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Result<(), Fault> {
        let (area, window) = (port.regs.fb, &mut guest.control);
        if let Some((tag, to_host, len)) = ends.setup {
            let fis = fis::dma_setup(tag, to_host, len);
            command::store(window, area.wrapping_add(fis::DMA_SETUP_AT), &fis)?;
        }
        let fis = fis::set_device_bits(status::READY, 0, ends.tags);
        command::store(window, area.wrapping_add(fis::SET_DEVICE_BITS_AT), &fis)?;
        let regs = &mut port.regs;
        regs.tfd = regs.tfd & u32::from(status::BSY | status::DRQ) | u32::from(status::READY);
        regs.sact &= !ends.tags;
        regs.is |= is::SDBS;
        Ok(())
    }

    /// A command has failed: the port stops until the driver restarts it.
    fn fail(
        &self,
        index: u32,
        registers: &Registers,
        port: &mut Port,
        guest: &mut BatchMemory<'_, S::M>,
    ) -> Result<(), Fault> {
        let slot = &self.slots[index as usize];
        let (area, window) = (port.regs.fb, &mut guest.control);
        port.regs.is |= is::TFES;
        port.regs.tfd = fis::task_file_data(registers);
        port.regs.halted = true;
        port.orphan();
        if slot.queued
            && let Some(drive) = &mut port.drive
        {
            drive.queue_error(&slot.task, *registers, true);
        }
        if slot.end == End::Queued {
            // It was accepted: Status and Error come with a Set Device Bits FIS.
            let fis = fis::set_device_bits(registers.status, registers.error, 0);
            command::store(window, area.wrapping_add(fis::SET_DEVICE_BITS_AT), &fis)?;
            port.regs.is |= is::SDBS;
        } else {
            if !slot.queued {
                command::store(window, slot.count_at.0, &0u32.to_le_bytes())?;
            }
            if slot.packet {
                let fis = fis::pio_setup(registers, false, false, registers.status, PACKET);
                command::store(window, area.wrapping_add(fis::PIO_SETUP_AT), &fis)?;
            }
            let fis = fis::register(registers, true);
            command::store(window, area.wrapping_add(fis::REGISTER_AT), &fis)?;
            port.regs.is |= is::DHRS;
        }
        Ok(())
    }
}
