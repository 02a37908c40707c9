//! ATA devices (ACS-3): what a command asks for, as a value. No transport and no I/O is here: a host
//! adapter ([`ahci`](crate::ahci)) hands in a [`TaskFile`], does what the [`Step`] says, and hands back
//! what came of it.
//!
//! ```text
//!  TaskFile ──► AtaDisk::command / AtapiDrive::command ──► Step
//!                    ▲ data_out, packet, finish              │ the adapter does it
//!                    └───────────────────────────────────────┘
//! ```

mod command;
mod disk;
mod features;
mod identify;
mod io;
mod kept;
mod logs;
pub mod opcode;
mod packet;
mod password;
mod protection;
mod sanitize;
mod security;
mod smart;
mod taskfile;
mod work;

use serde::{Deserialize, Serialize};

use crate::mmc::Fields;

pub use disk::{AtaDisk, Counters, DiskConfig, DiskState, Power, Trim};
pub use kept::NcqError;
pub use packet::AtapiDrive;
pub(crate) use protection::Protection;
pub use taskfile::{Registers, TaskFile, error, status};
pub use work::Work;

/// How the data of a command travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// In blocks of so many bytes, each announced with a PIO Setup.
    Pio {
        /// Bytes of a DRQ block.
        block: u32,
    },
    /// DMA.
    Dma,
    /// First-party DMA: a queued command.
    Fpdma,
}

/// A run of bytes of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first byte.
    pub offset: u64,
    /// The number of bytes, at least 1.
    pub len: u64,
}

/// What is done once data has come from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The ranges of a TRIM.
    Trim,
    /// Pages of a log.
    Log {
        /// The log.
        address: u8,
        /// Its first page.
        page: u16,
    },
    /// The parameter list of a packet command.
    Parameters,
    /// A password, and what goes with it.
    Password,
}

/// What a device wants of its adapter, so that a command can go on.
#[derive(Debug)]
pub enum Step {
    /// The command has ended.
    End(Registers),
    /// Give the host this data, then the command has ended well.
    In {
        /// How.
        protocol: Protocol,
        /// What.
        data: Vec<u8>,
    },
    /// Get data from the host and call `data_out`.
    Out {
        /// How.
        protocol: Protocol,
        /// The number of bytes.
        len: u32,
        /// What it is for.
        payload: Payload,
    },
    /// Move bytes between disk and host; then call `finish`.
    Transfer {
        /// How.
        protocol: Protocol,
        /// To the disk.
        write: bool,
        /// Complete only when it is durable.
        fua: bool,
        /// Where on the disk.
        range: Range,
    },
    /// Read without giving the data to the host; then call `finish`.
    Verify(Range),
    /// Make everything durable; then call `finish`.
    Flush,
    /// The ranges are not needed any more; then call `finish`.
    Trim {
        /// What to trim.
        ranges: Vec<Range>,
        /// They have to read as zeroes afterwards.
        zero: bool,
        /// It has to be durable when the command ends.
        durable: bool,
    },
    /// Let a thread that may block do this; then call `finish`.
    Work(Work),
    /// Get the command packet from the host and call [`AtapiDrive::packet`].
    Packet,
    /// Read sectors and give the host some [`Fields`] of them; then call [`AtapiDrive::finish`].
    ReadRaw {
        /// How.
        protocol: Protocol,
        /// The first sector.
        lba: u32,
        /// The number of sectors.
        blocks: u32,
        /// Which fields.
        fields: Fields,
    },
}
