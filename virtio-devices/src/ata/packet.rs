//! An ATAPI device (ACS-3, PACKET feature set) around an optical drive.

use block::ErrorKind;

use super::{
    Payload, Protocol, Range, Registers, Step, TaskFile, disk::check_text, error, features,
    identify::Words, opcode, status,
};
use crate::{
    Result,
    mmc::{BLOCK, Cdb, MmcDrive, Reply},
};

/// The end of a PACKET command in the Count field: status, no data.
const INTERRUPT_REASON: u16 = 3;

/// An ATAPI device: parses commands, hands packets to its drive. It does no I/O.
#[derive(Debug)]
pub struct AtapiDrive {
    /// The drive.
    pub drive: MmcDrive,
    model: String,
    serial: String,
    firmware: String,
    transfer_mode: u8,
    /// The packet of the command that is in progress.
    cdb: Cdb,
}

impl AtapiDrive {
    /// A device around `drive`.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for texts that IDENTIFY PACKET DEVICE cannot
    /// express.
    pub fn new(drive: MmcDrive, model: &str, serial: &str, firmware: &str) -> Result<Self> {
        check_text("model", model, 40)?;
        check_text("serial", serial, 20)?;
        check_text("firmware", firmware, 8)?;
        Ok(Self {
            drive,
            model: model.to_owned(),
            serial: serial.to_owned(),
            firmware: firmware.to_owned(),
            transfer_mode: 0x46,
            cdb: [0; 16],
        })
    }

    /// The transfer mode that was set last, which has to be saved.
    #[must_use]
    pub fn transfer_mode(&self) -> u8 {
        self.transfer_mode
    }

    /// Takes a saved transfer mode; one that no command could have set is ignored.
    pub fn restore_transfer_mode(&mut self, mode: u8) {
        if features::is_transfer_mode(mode) {
            self.transfer_mode = mode;
        }
    }

    /// The registers after a reset: the signature of an ATAPI device.
    #[must_use]
    pub fn signature() -> Registers {
        Registers {
            status: 0,
            error: 1,
            count: 1,
            lba: 0xeb_1401,
            device: 0,
        }
    }

    /// A reset of the device.
    pub fn reset(&mut self) {
        self.drive.reset();
    }

    /// Starts a command.
    pub fn command(&mut self, task: &TaskFile) -> Step {
        match task.command {
            opcode::PACKET => Step::Packet,
            opcode::IDENTIFY_PACKET_DEVICE => Step::In {
                protocol: Protocol::Pio { block: 512 },
                data: self.identify().to_vec(),
            },
            // A disk's commands end with the signature, so that a driver sees what this is.
            opcode::IDENTIFY_DEVICE | opcode::READ_SECTORS => Step::End(Registers {
                status: status::READY | status::ERR,
                error: error::ABRT,
                ..Self::signature()
            }),
            opcode::DEVICE_RESET => {
                self.reset();
                Step::End(Self::signature())
            }
            opcode::EXECUTE_DEVICE_DIAGNOSTIC => Step::End(Self::signature()),
            opcode::SET_FEATURES if task.features & 0xff == 3 => {
                let mode = task.count as u8;
                if !features::is_transfer_mode(mode) {
                    return abort(task);
                }
                self.transfer_mode = mode;
                Step::End(Registers::ready(task))
            }
            opcode::IDLE_IMMEDIATE
            | opcode::STANDBY_IMMEDIATE
            | opcode::IDLE_IMMEDIATE_OLD
            | opcode::STANDBY_IMMEDIATE_OLD => Step::End(Registers::ready(task)),
            opcode::CHECK_POWER_MODE | opcode::CHECK_POWER_MODE_OLD => {
                let mut registers = Registers::ready(task);
                registers.count = 0xff;
                Step::End(registers)
            }
            _ => abort(task),
        }
    }

    /// Goes on with the packet that [`Step::Packet`] asked for.
    pub fn packet(&mut self, task: &TaskFile, cdb: &Cdb) -> Step {
        self.cdb = *cdb;
        let reply = self.drive.command(cdb);
        self.step(task, reply)
    }

    /// Goes on with the data that a [`Step::Out`] asked for.
    pub fn data_out(&mut self, task: &TaskFile, data: &[u8]) -> Step {
        let reply = self.drive.data_out(&self.cdb, data);
        self.step(task, reply)
    }

    fn step(&mut self, task: &TaskFile, reply: Reply) -> Step {
        let protocol = |len: u64| protocol(task, len);
        match reply {
            Reply::Good | Reply::Check => Step::End(self.end(task, reply == Reply::Good)),
            Reply::Data(data) => match protocol(data.len() as u64) {
                Some(protocol) => Step::In { protocol, data },
                None => abort(task),
            },
            Reply::Out(len) => match protocol(u64::from(len)) {
                Some(protocol) => Step::Out {
                    protocol,
                    len,
                    payload: Payload::Parameters,
                },
                None => abort(task),
            },
            Reply::Read { lba, blocks } => {
                let range = Range {
                    offset: u64::from(lba) * BLOCK,
                    len: u64::from(blocks) * BLOCK,
                };
                match protocol(BLOCK) {
                    Some(protocol) => Step::Transfer {
                        protocol,
                        write: false,
                        fua: false,
                        range,
                    },
                    None => abort(task),
                }
            }
            Reply::ReadRaw {
                lba,
                blocks,
                fields,
            } => match protocol(fields.len() as u64) {
                Some(protocol) => Step::ReadRaw {
                    protocol,
                    lba,
                    blocks,
                    fields,
                },
                None => abort(task),
            },
        }
    }

    /// The registers at the end of a packet command: the sense key is in the Error field.
    fn end(&self, task: &TaskFile, good: bool) -> Registers {
        let mut registers = Registers::ready(task);
        registers.count = INTERRUPT_REASON;
        if !good {
            registers.status |= status::ERR;
            registers.error = self.drive.sense().key << 4;
        }
        registers
    }

    /// What a command ends with whose reading is done.
    pub fn finish(&mut self, task: &TaskFile, result: Result<(), ErrorKind>) -> Registers {
        let reply = self.drive.read_ended(result.is_ok());
        self.end(task, reply == Reply::Good)
    }

    /// The data of IDENTIFY PACKET DEVICE (ACS-3, 7.13).
    #[must_use]
    pub fn identify(&self) -> [u8; 512] {
        let mut id = Words::new();
        // ATAPI, CD-ROM device, removable, DRQ within 50 us, packets of 12 bytes.
        id.set(0, 0x85c0);
        id.text(10, 10, &self.serial);
        id.text(23, 4, &self.firmware);
        id.text(27, 20, &self.model);
        // DMA, LBA, IORDY.
        id.set(49, 0x0f00);
        id.set(50, 0x4000);
        id.set(53, 0x0006);
        let selected = 1u16 << (self.transfer_mode & 7) << 8;
        let when = |kind| {
            if self.transfer_mode & 0xf8 == kind {
                selected
            } else {
                0
            }
        };
        id.set(63, 0x0007 | when(0x20));
        id.set(64, 0x0003);
        for word in 65..=68 {
            id.set(word, 120);
        }
        // Three speeds; connected at the highest.
        id.set(76, 0x000e);
        id.set(77, 0x0006);
        id.set(80, 0x07e0);
        // PACKET, DEVICE RESET, power management, NOP.
        id.set(82, 0x4218);
        id.set(83, 0x4000);
        id.set(84, 0x4000);
        id.set(85, 0x4218);
        id.set(87, 0x4000);
        id.set(88, 0x007f | when(0x40));
        id.set(222, 0x107f);
        id.seal()
    }
}

fn abort(task: &TaskFile) -> Step {
    Step::End(Registers::failed(task, error::ABRT))
}

/// How data of a packet command travels: with DMA if Feature bit 0 says so, otherwise in blocks of
/// at most the byte count limit, for which 0 is none. `unit` is what a drive moves at once.
fn protocol(task: &TaskFile, unit: u64) -> Option<Protocol> {
    if task.features & 1 != 0 {
        return Some(Protocol::Dma);
    }
    let limit = (task.lba >> 8 & 0xffff) as u32;
    let limit = if limit == 0xffff { 0xfffe } else { limit };
    let unit = unit.min(0xfffe) as u32;
    if limit == 0 {
        return None;
    }
    let block = if unit <= limit {
        unit
    } else {
        // Only the last block may be odd.
        (limit & !1).max(1)
    };
    Some(Protocol::Pio { block })
}
