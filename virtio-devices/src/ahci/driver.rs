//! The driver's side of a port, for tests and benchmarks: command list, tables and descriptors in guest
//! memory, registers through [`Hba::read`] and [`Hba::write`].

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemory};

use super::{
    Hba,
    regs::{self, cmd, ghc, px},
};
use crate::ata::{TaskFile, opcode};

/// Bytes of a command table with room for so many descriptors.
const TABLE_HEAD: u64 = 0x80;
const DESCRIPTOR: u64 = 16;

/// Where a driver keeps its structures.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// The first byte, a multiple of 1024.
    pub base: u64,
    /// Descriptors of a command, at least 1.
    pub descriptors: u16,
}

impl Layout {
    /// Bytes from [`base`](Self::base).
    #[must_use]
    pub fn bytes(&self) -> u64 {
        0x800 + 32 * self.table_size()
    }

    /// The command list: 1 KiB.
    #[must_use]
    pub fn list(&self) -> u64 {
        self.base
    }

    /// The received FISes: 256 bytes.
    #[must_use]
    pub fn received(&self) -> u64 {
        self.base + 0x400
    }

    fn table_size(&self) -> u64 {
        (TABLE_HEAD + DESCRIPTOR * u64::from(self.descriptors)).next_multiple_of(128)
    }

    /// The command table of a slot.
    #[must_use]
    pub fn table(&self, slot: u32) -> u64 {
        self.base + 0x800 + u64::from(slot) * self.table_size()
    }
}

/// A command to be issued.
#[derive(Clone, Copy, Debug, Default)]
pub struct Issue<'a> {
    /// The command.
    pub task: TaskFile,
    /// The W bit of the header: data goes to the device.
    pub write: bool,
    /// The command packet of PACKET.
    pub packet: Option<[u8; 16]>,
    /// Guest memory for the data: address, bytes (1 to 4 MiB).
    pub data: &'a [(u64, u32)],
}

/// A driver of one port.
pub struct Driver<M> {
    hba: Arc<Hba>,
    port: u8,
    memory: Arc<M>,
    layout: Layout,
    /// Commands prepared and not issued.
    prepared: u32,
    queued: u32,
    /// Commands issued and not seen to have ended.
    issued: u32,
}

impl<M: GuestMemory> Driver<M> {
    /// A driver; nothing is touched.
    #[must_use]
    pub fn new(hba: Arc<Hba>, port: u8, memory: Arc<M>, layout: Layout) -> Self {
        Self {
            hba,
            port,
            memory,
            layout,
            prepared: 0,
            queued: 0,
            issued: 0,
        }
    }

    /// The HBA.
    #[must_use]
    pub fn hba(&self) -> &Hba {
        &self.hba
    }

    /// Where everything is.
    #[must_use]
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// Reads a register of the HBA.
    #[must_use]
    pub fn global(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.hba.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Writes a register of the HBA.
    pub fn set_global(&self, register: u64, value: u32) {
        self.hba.write(register, &value.to_le_bytes());
    }

    fn register(&self, register: u64) -> u64 {
        regs::PORTS + regs::PORT_SIZE * u64::from(self.port) + register
    }

    /// Reads a register of the port.
    #[must_use]
    pub fn get(&self, register: u64) -> u32 {
        self.global(self.register(register))
    }

    /// Writes a register of the port.
    pub fn set(&self, register: u64, value: u32) {
        self.set_global(self.register(register), value);
    }

    /// Sets up command list and received FISes, enables all interrupts, and receives (PxCMD.FRE).
    pub fn receive(&self) {
        let (list, received) = (self.layout.list(), self.layout.received());
        self.set(px::CLB, list as u32);
        self.set(px::CLBU, (list >> 32) as u32);
        self.set(px::FB, received as u32);
        self.set(px::FBU, (received >> 32) as u32);
        self.set(px::SERR, u32::MAX);
        self.set(px::IS, u32::MAX);
        self.set(px::IE, u32::MAX);
        self.set(px::CMD, self.get(px::CMD) | cmd::FRE);
        self.set_global(regs::GHC, ghc::AE | ghc::IE);
    }

    /// Starts the command list (PxCMD.ST).
    pub fn start(&self) {
        self.set(px::CMD, self.get(px::CMD) | cmd::ST);
    }

    /// Stops the command list; PxCMD.CR tells when it has stopped.
    pub fn stop(&mut self) {
        self.set(px::CMD, self.get(px::CMD) & !cmd::ST);
        (self.prepared, self.queued, self.issued) = (0, 0, 0);
    }

    /// Writes a command into its slot; [`issue`](Self::issue) issues it. More descriptors than the
    /// layout has room for are left out.
    ///
    /// # Panics
    /// If the layout does not lie in guest memory.
    pub fn prepare(&mut self, slot: u32, issue: &Issue<'_>) {
        let table = self.layout.table(slot);
        let count = issue.data.len().min(usize::from(self.layout.descriptors));
        let mut header = [0; 16];
        header[0] =
            5 | if issue.packet.is_some() { 0x20 } else { 0 } | if issue.write { 0x40 } else { 0 };
        header[2..4].copy_from_slice(&(count as u16).to_le_bytes());
        header[8..16].copy_from_slice(&table.to_le_bytes());
        self.put(self.layout.list() + u64::from(slot) * 32, &header);
        self.put(table, &command_fis(&issue.task));
        if let Some(packet) = &issue.packet {
            self.put(table + 0x40, packet);
        }
        for (at, &(address, len)) in issue.data.iter().take(count).enumerate() {
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&address.to_le_bytes());
            entry[12..].copy_from_slice(&(len.wrapping_sub(1) & 0x3f_ffff).to_le_bytes());
            self.put(table + TABLE_HEAD + at as u64 * DESCRIPTOR, &entry);
        }
        self.prepared |= 1 << slot;
        if matches!(
            issue.task.command,
            opcode::READ_FPDMA_QUEUED..=opcode::RECEIVE_FPDMA_QUEUED
        ) {
            self.queued |= 1 << slot;
        }
    }

    /// Issues what was prepared.
    pub fn issue(&mut self) {
        if self.queued != 0 {
            self.set(px::SACT, self.queued);
        }
        self.set(px::CI, self.prepared);
        self.issued |= self.prepared;
        (self.prepared, self.queued) = (0, 0);
    }

    /// Commands that have ended since the last call: a bit for each slot. Those behind an error
    /// never end.
    pub fn ended(&mut self) -> u32 {
        let ended = self.issued & !(self.get(px::CI) | self.get(px::SACT));
        self.issued &= !ended;
        ended
    }

    /// Commands issued and not seen to have ended.
    #[must_use]
    pub fn issued(&self) -> u32 {
        self.issued
    }

    /// Guest memory.
    #[must_use]
    pub fn memory(&self) -> &M {
        &self.memory
    }

    /// Writes guest memory.
    ///
    /// # Panics
    /// Outside guest memory.
    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .expect("inside guest memory");
    }

    /// Reads guest memory.
    ///
    /// # Panics
    /// Outside guest memory.
    #[must_use]
    pub fn take(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .expect("inside guest memory");
        bytes
    }
}

/// A Register Host to Device FIS with a command.
#[must_use]
pub fn command_fis(task: &TaskFile) -> [u8; 20] {
    let (lba, mut fis) = (task.lba.to_le_bytes(), [0; 20]);
    fis[0] = 0x27;
    fis[1] = 0x80;
    fis[2] = task.command;
    fis[3] = task.features as u8;
    fis[4..7].copy_from_slice(&lba[..3]);
    fis[7] = task.device;
    fis[8..11].copy_from_slice(&lba[3..6]);
    fis[11] = (task.features >> 8) as u8;
    fis[12..14].copy_from_slice(&task.count.to_le_bytes());
    fis[16..20].copy_from_slice(&task.auxiliary.to_le_bytes());
    fis
}

/// READ or WRITE FPDMA QUEUED.
#[must_use]
pub fn queued(tag: u8, write: bool, lba: u64, sectors: u16) -> TaskFile {
    TaskFile {
        command: if write {
            opcode::WRITE_FPDMA_QUEUED
        } else {
            opcode::READ_FPDMA_QUEUED
        },
        features: sectors,
        count: u16::from(tag) << 3,
        lba,
        device: 0x40,
        auxiliary: 0,
    }
}

/// A 48-bit command.
#[must_use]
pub fn command(command: u8, lba: u64, sectors: u16) -> TaskFile {
    TaskFile {
        command,
        features: 0,
        count: sectors,
        lba,
        device: 0x40,
        auxiliary: 0,
    }
}
