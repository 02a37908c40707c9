//! The registers of an ATA device: what a command says, and what its end says.

use serde::{Deserialize, Serialize};

use super::opcode;

/// Bits of the Status field (ACS-3, 6.2).
pub mod status {
    /// The device is busy.
    pub const BSY: u8 = 0x80;
    /// The device is ready for commands.
    pub const DRDY: u8 = 0x40;
    /// Device fault.
    pub const DF: u8 = 0x20;
    /// Once "seek complete"; always set with `DRDY`, as all devices do.
    pub const DSC: u8 = 0x10;
    /// Data is to be transferred.
    pub const DRQ: u8 = 0x08;
    /// The command failed; the Error field says why. For PACKET: check condition.
    pub const ERR: u8 = 0x01;
    /// Ready, and nothing else.
    pub const READY: u8 = DRDY | DSC;
}

/// Bits of the Error field (ACS-3, 6.3).
pub mod error {
    /// Data could not be read.
    pub const UNC: u8 = 0x40;
    /// The address is not one of the device.
    pub const IDNF: u8 = 0x10;
    /// The command was aborted: it is not supported, or a field of it is wrong.
    pub const ABRT: u8 = 0x04;
}

/// A command, as a Register Host to Device FIS has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskFile {
    /// The Command field.
    pub command: u8,
    /// The Feature field; the upper byte counts only for 48-bit commands.
    pub features: u16,
    /// The Count field; the upper byte counts only for 48-bit commands.
    pub count: u16,
    /// 48 bits of LBA.
    pub lba: u64,
    /// The Device field.
    pub device: u8,
    /// The Auxiliary field.
    pub auxiliary: u32,
}

impl TaskFile {
    /// The count of a 28-bit command: 0 says 256.
    #[must_use]
    pub fn count8(&self) -> u32 {
        match self.count & 0xff {
            0 => 256,
            count => u32::from(count),
        }
    }

    /// The count of a 48-bit command: 0 says 65536.
    #[must_use]
    pub fn count16(&self) -> u32 {
        match self.count {
            0 => 65536,
            count => u32::from(count),
        }
    }

    /// The 28-bit address: its upper four bits are in the Device field.
    #[must_use]
    pub fn lba28(&self) -> u64 {
        self.lba & 0xff_ffff | u64::from(self.device & 0xf) << 24
    }

    /// A READ or WRITE with a 28-bit address as the 48-bit command that counts with 16 bits; any other
    /// command as it is.
    #[must_use]
    pub fn widened(&self) -> Self {
        let command = match self.command {
            opcode::READ_SECTORS => opcode::READ_SECTORS_EXT,
            opcode::WRITE_SECTORS => opcode::WRITE_SECTORS_EXT,
            opcode::READ_DMA => opcode::READ_DMA_EXT,
            opcode::WRITE_DMA => opcode::WRITE_DMA_EXT,
            _ => return *self,
        };
        if !self.is_lba() || self.count == 0 {
            return *self;
        }
        Self {
            command,
            lba: self.lba28(),
            ..*self
        }
    }

    /// Whether the Device field says LBA, not cylinder, head and sector.
    #[must_use]
    pub fn is_lba(&self) -> bool {
        self.device & 0x40 != 0
    }

    /// The tag of an NCQ command.
    #[must_use]
    pub fn tag(&self) -> u8 {
        (self.count >> 3) as u8 & 0x1f
    }
}

/// What a device says when a command has ended, as a Register Device to Host FIS has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// The Status field.
    pub status: u8,
    /// The Error field.
    pub error: u8,
    /// The Count field.
    pub count: u16,
    /// 48 bits of LBA.
    pub lba: u64,
    /// The Device field.
    pub device: u8,
}

impl Registers {
    /// A command that ended well: its own registers, as most commands return them.
    #[must_use]
    pub fn ready(task: &TaskFile) -> Self {
        Self {
            status: status::READY,
            error: 0,
            count: task.count,
            lba: task.lba,
            device: task.device,
        }
    }

    /// A command that failed.
    #[must_use]
    pub fn failed(task: &TaskFile, error: u8) -> Self {
        Self {
            status: status::READY | status::ERR,
            error,
            ..Self::ready(task)
        }
    }

    /// Whether this reports an error.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.status & (status::ERR | status::DF) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_widened_command_keeps_its_address_and_all_of_its_count() {
        let task = TaskFile {
            command: opcode::WRITE_DMA,
            count: 0x201,
            lba: 0x12_3456,
            device: 0x47,
            ..TaskFile::default()
        };
        let wide = task.widened();
        assert_eq!(wide.command, opcode::WRITE_DMA_EXT);
        assert_eq!((wide.lba, wide.count16()), (0x0712_3456, 0x201));
        // Cylinder, head and sector; a count of 0, which says 256; another command.
        for other in [
            TaskFile { device: 7, ..task },
            TaskFile { count: 0, ..task },
            TaskFile {
                command: opcode::READ_MULTIPLE,
                ..task
            },
        ] {
            assert_eq!(other.widened(), other);
        }
    }
}
