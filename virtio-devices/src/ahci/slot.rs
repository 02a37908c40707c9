//! A command in flight.

use block::ErrorKind;
use vm_memory::GuestAddress;

use crate::{
    ata::{Protocol, Range, Registers, TaskFile},
    memory::Data,
    mmc::Fields,
    stats::Op,
};

/// How the end of a command is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// A Register FIS, with an interrupt.
    Register,
    /// The last PIO Setup FIS carries the status.
    PioIn {
        /// Bytes of a block.
        block: u32,
    },
    /// PIO Setup FISes for the blocks, and a Register FIS.
    PioOut {
        /// Bytes of a block.
        block: u32,
    },
    /// A Set Device Bits FIS.
    Queued,
}

impl End {
    /// How a command with data ends.
    pub(super) fn of(protocol: Protocol, to_device: bool) -> Self {
        match protocol {
            Protocol::Pio { block } if to_device => End::PioOut { block },
            Protocol::Pio { block } => End::PioIn { block },
            Protocol::Dma => End::Register,
            Protocol::Fpdma => End::Queued,
        }
    }
}

/// Whole sectors on their way to the guest, a few at a time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Raw {
    /// The next sector, of those that are being read if any are.
    pub(super) lba: u32,
    /// Sectors left, with those that are being read.
    pub(super) blocks: u32,
    pub(super) fields: Fields,
    /// Where in the guest's data the next byte goes.
    pub(super) at: u64,
}

/// A command in flight: a slot of the command list.
pub(super) struct Slot {
    pub(super) busy: bool,
    /// [`Port::epoch`](super::port::Port) when it was taken.
    pub(super) epoch: u32,
    /// Tells completions of this command from those of an earlier one in the slot.
    pub(super) generation: u32,
    /// Block requests that have not ended.
    pub(super) pending: u32,
    pub(super) op: Op,
    pub(super) task: TaskFile,
    pub(super) queued: bool,
    pub(super) end: End,
    /// The end of a command that needs no disk any more.
    pub(super) registers: Option<Registers>,
    /// What the disk said.
    pub(super) result: Result<(), ErrorKind>,
    /// Bytes moved between disk or device and guest, if all goes well.
    pub(super) bytes: u64,
    pub(super) count_at: GuestAddress,
    pub(super) data: Data,
    /// A descriptor asks for an interrupt.
    pub(super) descriptor_interrupt: bool,
    /// A flush follows once all of that has ended.
    pub(super) flush_after: bool,
    /// What is left to verify.
    pub(super) verify: Option<Range>,
    /// What is left to read of whole sectors.
    pub(super) raw: Option<Raw>,
    /// It is a PACKET command.
    pub(super) packet: bool,
    /// Nanoseconds since the worker was made.
    pub(super) started: u64,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            busy: false,
            epoch: 0,
            generation: 0,
            pending: 0,
            op: Op::Other,
            task: TaskFile::default(),
            queued: false,
            end: End::Register,
            registers: None,
            result: Ok(()),
            bytes: 0,
            count_at: GuestAddress(0),
            data: Data::new(),
            descriptor_interrupt: false,
            flush_after: false,
            verify: None,
            raw: None,
            packet: false,
            started: 0,
        }
    }

    pub(super) fn begin(&mut self, epoch: u32, started: u64) {
        self.busy = true;
        self.epoch = epoch;
        self.generation = self.generation.wrapping_add(1);
        self.pending = 0;
        self.op = Op::Other;
        self.queued = false;
        self.end = End::Register;
        self.registers = None;
        self.result = Ok(());
        self.bytes = 0;
        self.data.clear();
        self.descriptor_interrupt = false;
        self.flush_after = false;
        self.verify = None;
        self.raw = None;
        self.packet = false;
        self.started = started;
    }

    /// The id of its block requests.
    pub(super) fn id(&self, slot: u32) -> u64 {
        u64::from(self.generation) << 8 | u64::from(slot)
    }
}
