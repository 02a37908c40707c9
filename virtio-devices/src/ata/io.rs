//! Commands that move data between disk and host: where, how much, and what came of it.

use block::ErrorKind;

use super::{
    AtaDisk, NcqError, Payload, Protocol, Range, Registers, Step, TaskFile,
    disk::{DEFAULT_GEOMETRY, Power, Trim},
    error, opcode,
};

/// The most 512-byte blocks of ranges that a TRIM may bring: 64 ranges each.
pub(super) const MAX_TRIM_BLOCKS: u16 = 8;

impl AtaDisk {
    /// READ and WRITE with a 28-bit address.
    pub(super) fn rw28(&mut self, task: &TaskFile, protocol: Protocol, write: bool) -> Step {
        match self.address28(task) {
            Some(lba) => self.rw(task, protocol, write, false, lba, task.count8()),
            None => Step::End(self.fail(task, error::IDNF)),
        }
    }

    /// READ and WRITE with a 48-bit address.
    pub(super) fn rw48(
        &mut self,
        task: &TaskFile,
        protocol: Protocol,
        write: bool,
        fua: bool,
    ) -> Step {
        self.rw(task, protocol, write, fua, task.lba, task.count16())
    }

    /// READ and WRITE MULTIPLE.
    pub(super) fn multiple(&mut self, task: &TaskFile) -> Step {
        if self.state.multiple == 0 {
            return self.abort(task);
        }
        let protocol = Protocol::Pio {
            block: u32::from(self.state.multiple) * self.config.logical_sector,
        };
        match task.command {
            opcode::READ_MULTIPLE => self.rw28(task, protocol, false),
            opcode::WRITE_MULTIPLE => self.rw28(task, protocol, true),
            opcode::READ_MULTIPLE_EXT => self.rw48(task, protocol, false, false),
            opcode::WRITE_MULTIPLE_EXT => self.rw48(task, protocol, true, false),
            _ => self.rw48(task, protocol, true, true),
        }
    }

    /// The queued commands: count in Feature, tag in Count, FUA in Device (SATA 3.2, 13.6).
    pub(super) fn queued(&mut self, task: &TaskFile) -> Step {
        if self.state.ncq_error.is_some() {
            return self.abort(task);
        }
        let count = match task.features {
            0 => 65536,
            count => u32::from(count),
        };
        let fua = task.device & 0x80 != 0;
        let subcommand = task.count >> 8 & 0x1f;
        match (task.command, subcommand) {
            (opcode::READ_FPDMA_QUEUED, _) => {
                self.rw(task, Protocol::Fpdma, false, fua, task.lba, count)
            }
            (opcode::WRITE_FPDMA_QUEUED, _) => {
                self.rw(task, Protocol::Fpdma, true, fua, task.lba, count)
            }
            (opcode::SEND_FPDMA_QUEUED, 0) if task.auxiliary & 1 != 0 => {
                self.trim_command(task, Protocol::Fpdma, task.features)
            }
            (opcode::RECEIVE_FPDMA_QUEUED, 1) => {
                self.read_log(task, Protocol::Fpdma, task.features)
            }
            _ => self.abort(task),
        }
    }

    fn rw(
        &mut self,
        task: &TaskFile,
        protocol: Protocol,
        write: bool,
        fua: bool,
        lba: u64,
        count: u32,
    ) -> Step {
        if write && self.config.read_only {
            return self.abort(task);
        }
        let Some(range) = self.range(lba, count) else {
            return Step::End(self.fail(task, error::IDNF));
        };
        self.state.power = Power::Active;
        let counters = &mut self.state.counters;
        if write {
            counters.writes += 1;
            counters.sectors_written += u64::from(count);
        } else {
            counters.reads += 1;
            counters.sectors_read += u64::from(count);
        }
        Step::Transfer {
            protocol,
            write,
            fua: write && (fua || !self.state.write_cache),
            range,
        }
    }

    /// Sectors as bytes, if the disk has them.
    fn range(&self, lba: u64, count: u32) -> Option<Range> {
        let end = lba.checked_add(u64::from(count))?;
        let sector = u64::from(self.config.logical_sector);
        (end <= self.sectors()).then(|| Range {
            offset: lba * sector,
            len: u64::from(count) * sector,
        })
    }

    /// The address of a 28-bit command: LBA, or cylinder, head and sector.
    fn address28(&self, task: &TaskFile) -> Option<u64> {
        if task.is_lba() {
            return Some(task.lba28());
        }
        let (heads, sectors) = self.state.geometry;
        let sector = task.lba & 0xff;
        let head = u64::from(task.device & 0xf);
        let cylinder = task.lba >> 8 & 0xffff;
        if sector == 0 || sector > u64::from(sectors) || head >= u64::from(heads) {
            return None;
        }
        Some((cylinder * u64::from(heads) + head) * u64::from(sectors) + sector - 1)
    }

    /// READ VERIFY SECTOR(S) (EXT).
    pub(super) fn verify(&mut self, task: &TaskFile) -> Step {
        let (lba, count) = if task.command == opcode::READ_VERIFY_EXT {
            (Some(task.lba), task.count16())
        } else {
            (self.address28(task), task.count8())
        };
        match lba.and_then(|lba| self.range(lba, count)) {
            Some(range) => {
                self.state.power = Power::Active;
                Step::Verify(range)
            }
            None => Step::End(self.fail(task, error::IDNF)),
        }
    }

    /// READ NATIVE MAX ADDRESS (EXT): there is no host protected area, so it is the last sector.
    pub(super) fn native_max(&mut self, task: &TaskFile) -> Step {
        let last = self.sectors().saturating_sub(1);
        let mut registers = Registers::ready(task);
        if task.command == opcode::READ_NATIVE_MAX_EXT {
            registers.lba = last;
        } else if task.is_lba() {
            let last = last.min(0xfff_ffff);
            registers.lba = last & 0xff_ffff;
            registers.device = task.device & 0xf0 | (last >> 24) as u8;
        } else {
            let (cylinders, heads, sectors) = self.default_chs();
            registers.lba = u64::from(cylinders.saturating_sub(1)) << 8 | u64::from(sectors);
            registers.device = task.device & 0xf0 | (heads - 1);
        }
        Step::End(registers)
    }

    /// Cylinders, heads and sectors a track, as IDENTIFY tells them.
    pub(super) fn default_chs(&self) -> (u16, u8, u8) {
        let (heads, sectors) = DEFAULT_GEOMETRY;
        let cylinders = self.sectors() / (u64::from(heads) * u64::from(sectors));
        (cylinders.min(16383) as u16, heads, sectors)
    }

    /// DATA SET MANAGEMENT.
    pub(super) fn data_set_management(&mut self, task: &TaskFile) -> Step {
        if task.features & 0xff != 1 {
            return self.abort(task);
        }
        self.trim_command(task, Protocol::Dma, task.count)
    }

    fn trim_command(&mut self, task: &TaskFile, protocol: Protocol, blocks: u16) -> Step {
        if !self.offers_trim() || blocks == 0 || blocks > MAX_TRIM_BLOCKS {
            return self.abort(task);
        }
        Step::Out {
            protocol,
            len: u32::from(blocks) * 512,
            payload: Payload::Trim,
        }
    }

    /// The ranges of a TRIM: 48 bits of LBA, 16 bits of sectors each. All are checked before any is
    /// trimmed.
    pub(super) fn trim(&mut self, task: &TaskFile, data: &[u8]) -> Step {
        let mut ranges = Vec::<Range>::new();
        for entry in data.chunks_exact(8) {
            let mut value = [0; 8];
            value.copy_from_slice(entry);
            let value = u64::from_le_bytes(value);
            let count = (value >> 48) as u32;
            if count == 0 {
                continue;
            }
            let Some(range) = self.range(value & 0xffff_ffff_ffff, count) else {
                return Step::End(self.fail(task, error::IDNF));
            };
            // Drivers cut long runs into pieces of 65535 sectors.
            match ranges.last_mut() {
                Some(last) if last.offset + last.len == range.offset => last.len += range.len,
                _ => ranges.push(range),
            }
        }
        self.state.power = Power::Active;
        if ranges.is_empty() {
            return Step::End(Registers::ready(task));
        }
        Step::Trim {
            ranges,
            zero: self.config.trim == Trim::Zero,
            durable: !self.state.write_cache,
        }
    }

    /// What a command ends with whose work on the disk is done.
    pub fn finish(&mut self, task: &TaskFile, result: Result<(), ErrorKind>) -> Registers {
        match (task.command, result) {
            (opcode::SANITIZE_DEVICE, Ok(())) => return self.sanitize_registers(task),
            (opcode::SANITIZE_DEVICE, Err(_)) => {
                return Registers {
                    count: 0,
                    lba: 0,
                    ..Registers::failed(task, error::ABRT)
                };
            }
            // A wrong password is no failure of the disk.
            (
                opcode::SECURITY_SET_PASSWORD..=opcode::SECURITY_DISABLE_PASSWORD,
                Err(ErrorKind::InvalidArgument),
            ) => return Registers::failed(task, error::ABRT),
            _ => {}
        }
        let Err(kind) = result else {
            return Registers::ready(task);
        };
        self.state.counters.media_errors += 1;
        let error = match (kind, task.command) {
            (ErrorKind::OutOfRange, _) => error::IDNF,
            (
                opcode_kind,
                opcode::READ_SECTORS
                | opcode::READ_SECTORS_NORETRY
                | opcode::READ_SECTORS_EXT
                | opcode::READ_DMA
                | opcode::READ_DMA_NORETRY
                | opcode::READ_DMA_EXT
                | opcode::READ_MULTIPLE
                | opcode::READ_MULTIPLE_EXT
                | opcode::READ_FPDMA_QUEUED
                | opcode::READ_VERIFY
                | opcode::READ_VERIFY_NORETRY
                | opcode::READ_VERIFY_EXT,
            ) if opcode_kind != ErrorKind::InvalidArgument => error::UNC,
            _ => error::ABRT,
        };
        let registers = Registers::failed(task, error);
        self.note_error(task, registers);
        registers
    }

    /// A queued command failed with these registers, or (`queued` is false) a command came that
    /// must not come while others are queued. Queued commands are refused from now on until the
    /// log is read or the device is reset.
    pub fn queue_error(&mut self, task: &TaskFile, registers: Registers, queued: bool) {
        // The first error counts.
        if self.state.ncq_error.is_none() {
            self.state.ncq_error = Some(NcqError {
                tag: queued.then(|| task.tag()),
                registers,
            });
        }
    }
}
