//! The driver of an NVMe controller, from a client's seat. Queue pair `n` is at `n * 2000h`: submission
//! queue, then completion queue; I/O queues have 16 entries.

use std::os::unix::fs::FileExt;

use crate::client::{BASE, Client, MASTER};

/// The driver of an NVMe controller.
pub trait Nvme {
    /// Enables the controller and creates an I/O queue pair.
    fn set_up(&mut self);
    fn enable(&mut self);
    /// Disables the controller first.
    fn enable_again(&mut self);
    /// Posts entry `index` of a queue and waits for its completion; returns the status field.
    fn command(&mut self, queue: u64, index: u64, dwords: &[(usize, u32)]) -> u16;
    fn post(&mut self, queue: u64, index: u64, dwords: &[(usize, u32)]);
    fn create_queues(&mut self);
    fn identify(&mut self, index: u64) -> u16;
    /// A read or write of one block.
    fn io(opcode: u32) -> [(usize, u32); 5];
    fn transfer(&mut self, index: u64, opcode: u32) -> u16;
}

impl Nvme for Client {
    fn set_up(&mut self) {
        self.enable();
        self.create_queues();
    }

    fn enable(&mut self) {
        self.set_command(MASTER);
        self.memory.write_all_at(&[0; 0x4000], 0).unwrap();
        self.write(0x24, 0x000f_000f);
        for (at, value) in [(0x28, BASE), (0x30, BASE + 0x1000)] {
            self.write(at, value as u32);
            self.write(at + 4, (value >> 32) as u32);
        }
        self.write(0x14, 0x0046_0001);
        self.until("ready", |it| it.read(0, 0x1c) & 1 != 0);
    }

    fn enable_again(&mut self) {
        self.write(0x14, 0);
        self.until("the reset", |it| it.read(0, 0x1c) & 1 == 0);
        self.enable();
    }

    fn post(&mut self, queue: u64, index: u64, dwords: &[(usize, u32)]) {
        let mut entry = [0; 64];
        for (at, value) in dwords {
            entry[at * 4..at * 4 + 4].copy_from_slice(&value.to_le_bytes());
        }
        let base = queue * 0x2000;
        self.memory.write_all_at(&entry, base + index * 64).unwrap();
    }

    fn command(&mut self, queue: u64, index: u64, dwords: &[(usize, u32)]) -> u16 {
        self.post(queue, index, dwords);
        let base = queue * 0x2000;
        self.write(0x1000 + 8 * queue, index as u32 + 1);
        let mut status = 0;
        self.until("a completion", |it| {
            let mut entry = [0; 16];
            it.memory
                .read_exact_at(&mut entry, base + 0x1000 + index * 16)
                .unwrap();
            status = u16::from_le_bytes([entry[14], entry[15]]);
            status & 1 != 0
        });
        status >> 1
    }

    fn create_queues(&mut self) {
        for (index, opcode, at, flags) in [(0, 5, 0x3000, 3 | 1 << 16), (1, 1, 0x2000, 1 | 1 << 16)]
        {
            let low = (BASE + at) as u32;
            let high = ((BASE + at) >> 32) as u32;
            let entry = [
                (0, opcode | 7 << 16),
                (6, low),
                (7, high),
                (10, 1 | 15 << 16),
                (11, flags),
            ];
            assert_eq!(self.command(0, index, &entry), 0);
        }
    }

    fn identify(&mut self, index: u64) -> u16 {
        let at = BASE + 0xa000;
        let (low, high) = (at as u32, (at >> 32) as u32);
        self.command(0, index, &[(0, 6 | 8 << 16), (6, low), (7, high), (10, 1)])
    }

    fn io(opcode: u32) -> [(usize, u32); 5] {
        let at = BASE + 0x8000;
        [
            (0, opcode | 9 << 16),
            (1, 1),
            (6, at as u32),
            (7, (at >> 32) as u32),
            (10, 3),
        ]
    }

    fn transfer(&mut self, index: u64, opcode: u32) -> u16 {
        self.command(1, index, &Self::io(opcode))
    }
}
