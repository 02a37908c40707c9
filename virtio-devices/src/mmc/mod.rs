//! The command set of a DVD-ROM drive (MMC-6, with what SPC-3 and SBC-2 add): command packets in,
//! replies as values out. It moves no data and knows no transport: ATAPI and SCSI front ends do what
//! a [`Reply`] says.
//!
//! The host's side of the tray is here too: [`MmcDrive::insert`], [`MmcDrive::eject`],
//! [`MmcDrive::open_tray`] and [`MmcDrive::close_tray`].

mod command;
mod disc;
mod drive;
mod features;
mod mode;
mod raw;
mod read;
mod sense;
mod toc;

pub use drive::{MmcConfig, MmcDrive, MmcState, TrayError};
pub use raw::{Fields, SECTOR, assemble};
pub use sense::Sense;

/// Bytes of user data of a sector.
pub const BLOCK: u64 = 2048;

/// What a front end does for a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// It ended well, without data.
    Good,
    /// It ended well with this data, already cut to the allocation length.
    Data(Vec<u8>),
    /// Give the initiator user data of the medium; [`MmcDrive::read_ended`] with the result.
    Read {
        /// The first sector.
        lba: u32,
        /// The number of sectors, at least 1.
        blocks: u32,
    },
    /// Give the initiator these fields of sectors, see [`assemble`]; [`MmcDrive::read_ended`] with
    /// the result.
    ReadRaw {
        /// The first sector.
        lba: u32,
        /// The number of sectors, at least 1.
        blocks: u32,
        /// What of a sector.
        fields: Fields,
    },
    /// Get so many bytes from the initiator, then call [`MmcDrive::data_out`].
    Out(u32),
    /// Check condition: [`MmcDrive::sense`] says why.
    Check,
}

/// Operation codes (MMC-6, table 246 and others).
#[allow(missing_docs, reason = "the names are those of the standard")]
pub mod opcode {
    pub const TEST_UNIT_READY: u8 = 0x00;
    pub const REQUEST_SENSE: u8 = 0x03;
    pub const INQUIRY: u8 = 0x12;
    pub const START_STOP_UNIT: u8 = 0x1b;
    pub const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
    pub const READ_FORMAT_CAPACITIES: u8 = 0x23;
    pub const READ_CAPACITY: u8 = 0x25;
    pub const READ_10: u8 = 0x28;
    pub const SEEK_10: u8 = 0x2b;
    pub const READ_TOC: u8 = 0x43;
    pub const GET_CONFIGURATION: u8 = 0x46;
    pub const GET_EVENT_STATUS: u8 = 0x4a;
    pub const READ_DISC_INFORMATION: u8 = 0x51;
    pub const READ_TRACK_INFORMATION: u8 = 0x52;
    pub const MODE_SELECT_10: u8 = 0x55;
    pub const MODE_SENSE_10: u8 = 0x5a;
    pub const READ_12: u8 = 0xa8;
    pub const GET_PERFORMANCE: u8 = 0xac;
    pub const READ_DVD_STRUCTURE: u8 = 0xad;
    pub const SET_CD_SPEED: u8 = 0xbb;
    pub const MECHANISM_STATUS: u8 = 0xbd;
    pub const READ_CD: u8 = 0xbe;
}

/// A command packet.
pub type Cdb = [u8; 16];

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
