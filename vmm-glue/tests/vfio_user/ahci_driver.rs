//! The driver of the ports of an AHCI adapter, from a client's seat.

use std::os::{fd::AsRawFd, unix::fs::FileExt};

use virtio_devices::{
    ahci::{
        driver::{Layout, command, command_fis},
        regs::{self, cmd, ghc, px},
    },
    ata::{TaskFile, opcode},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::client::{BASE, Client, MASTER};

/// Where data goes.
pub const DATA: u64 = 0x10_0000;
pub const ABAR: u32 = 5;
pub const INTX: u32 = 0;
pub const MSI: u32 = 1;

/// Bytes for the structures of a port.
const PORT_BYTES: u64 = 0x4000;

/// What a command has besides its registers.
#[derive(Clone, Copy, Default)]
pub struct Issue {
    pub slot: u32,
    pub write: bool,
    pub packet: Option<[u8; 12]>,
    /// Bytes at `DATA`.
    pub bytes: u32,
}

pub trait Ahci {
    fn port(&mut self, register: u64) -> u32;
    fn set_port(&mut self, register: u64, value: u32);
    fn interrupt_with(&mut self, index: u32) -> EventFd;
    fn start(&mut self);
    /// One command in slot 0 of port 0, with 512 bytes at `DATA`.
    fn issue(&mut self, task: &TaskFile, write: bool);
    fn finish(&mut self);
    /// Fills `DATA` with a byte and writes it to sector 3.
    fn write_sector(&mut self, byte: u8);
    /// Reads sector 3 to `DATA`.
    fn read_sector(&mut self);
    /// The same on any port.
    fn register(&mut self, index: u64, register: u64) -> u32;
    fn set_register(&mut self, index: u64, register: u64, value: u32);
    fn start_on(&mut self, index: u64);
    fn issue_on(&mut self, index: u64, task: &TaskFile, issue: Issue);
    fn finish_on(&mut self, index: u64);
}

pub fn port(register: u64) -> u64 {
    regs::PORTS + register
}

fn layout(index: u64) -> Layout {
    Layout {
        base: BASE + index * PORT_BYTES,
        descriptors: 1,
    }
}

impl Ahci for Client {
    fn port(&mut self, register: u64) -> u32 {
        self.register(0, register)
    }

    fn set_port(&mut self, register: u64, value: u32) {
        self.set_register(0, register, value);
    }

    fn interrupt_with(&mut self, index: u32) -> EventFd {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let fds = [event.as_raw_fd()];
        self.words(8, &[20, 1 << 2 | 1 << 5, index, 0, 1], &fds)
            .unwrap();
        event
    }

    fn start(&mut self) {
        self.start_on(0);
    }

    fn issue(&mut self, task: &TaskFile, write: bool) {
        let bytes = 512;
        self.issue_on(
            0,
            task,
            Issue {
                write,
                bytes,
                ..Issue::default()
            },
        );
    }

    fn finish(&mut self) {
        self.finish_on(0);
    }

    fn write_sector(&mut self, byte: u8) {
        self.memory.write_all_at(&[byte; 512], DATA).unwrap();
        self.issue(&command(opcode::WRITE_DMA_EXT, 3, 1), true);
        self.finish();
    }

    fn read_sector(&mut self) {
        self.issue(&command(opcode::READ_DMA_EXT, 3, 1), false);
        self.finish();
    }

    fn register(&mut self, index: u64, register: u64) -> u32 {
        self.read(ABAR, index * regs::PORT_SIZE + port(register))
    }

    fn set_register(&mut self, index: u64, register: u64, value: u32) {
        self.write_to(ABAR, index * regs::PORT_SIZE + port(register), value);
    }

    fn start_on(&mut self, index: u64) {
        self.set_command(MASTER);
        let layout = layout(index);
        let zeroes = [0; PORT_BYTES as usize];
        self.memory
            .write_all_at(&zeroes, layout.base - BASE)
            .unwrap();
        for (register, value) in [(px::CLB, layout.list()), (px::FB, layout.received())] {
            self.set_register(index, register, value as u32);
            self.set_register(index, register + 4, (value >> 32) as u32);
        }
        self.set_register(index, px::SERR, u32::MAX);
        self.set_register(index, px::IE, u32::MAX);
        self.set_register(index, px::CMD, cmd::FRE);
        self.set_register(index, px::CMD, cmd::FRE | cmd::ST);
        self.write_to(ABAR, regs::GHC, ghc::AE | ghc::IE);
        self.until("ready", |it| it.register(index, px::TFD) & 0x89 == 0);
    }

    fn issue_on(&mut self, index: u64, task: &TaskFile, issue: Issue) {
        let layout = layout(index);
        let at = |address: u64| address - BASE;
        let mut header = [0; 16];
        header[0] = 5 | u8::from(issue.packet.is_some()) << 5 | u8::from(issue.write) << 6;
        header[2] = u8::from(issue.bytes > 0);
        header[8..].copy_from_slice(&layout.table(issue.slot).to_le_bytes());
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&(BASE + DATA).to_le_bytes());
        entry[12..].copy_from_slice(&issue.bytes.saturating_sub(1).to_le_bytes());
        let table = at(layout.table(issue.slot));
        let place = at(layout.list()) + u64::from(issue.slot) * 32;
        let memory = &self.memory;
        memory.write_all_at(&header, place).unwrap();
        memory.write_all_at(&command_fis(task), table).unwrap();
        memory.write_all_at(&entry, table + 0x80).unwrap();
        if let Some(packet) = issue.packet {
            memory.write_all_at(&packet, table + 0x40).unwrap();
        }
        self.set_register(index, px::CI, 1 << issue.slot);
    }

    fn finish_on(&mut self, index: u64) {
        self.until("the command", |it| it.register(index, px::CI) == 0);
        assert_eq!(self.register(index, px::TFD) & 0x89, 0);
        let status = self.register(index, px::IS);
        assert_ne!(status, 0);
        self.set_register(index, px::IS, status);
        self.write_to(ABAR, regs::IS, 1 << index);
    }
}
