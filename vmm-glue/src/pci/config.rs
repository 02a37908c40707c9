//! The configuration space of a function: header type 0, capabilities for power management, MSI,
//! MSI-X and PCI Express, and those that the function brings.

use super::{Bar, Description};

/// Bytes of the space: with PCI Express' extended part, which has no capabilities.
const SIZE: usize = 4096;

/// Bytes that a driver can change something in.
const SAVED: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_PIN: usize = 0x3d;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_NO_LINE: u16 = 1 << 10;
const STATUS_LINE: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;

const ID_POWER: u8 = 0x01;
const ID_MSI: u8 = 0x05;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;

/// What a write to the space changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// A BAR, or whether accesses to memory or to ports are decoded.
    pub memory: bool,
    /// MSI-X, MSI or the line were switched on or off, or masked.
    pub interrupts: bool,
    /// Whether the function may access memory and send messages.
    pub master: bool,
    /// A function-level reset was asked for, or the function came back from D3hot and keeps no state.
    pub reset: bool,
}

/// Where MSI messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address of the message.
    pub address: u64,
    /// Data of vector 0; the vector is added.
    pub data: u16,
    /// Vectors that the guest has enabled.
    pub vectors: u8,
    /// Masked vectors.
    pub mask: u32,
}

/// What a bus has to act on.
struct Facts {
    master: bool,
    memory: (bool, bool, Vec<u64>),
    interrupts: (bool, bool, Option<MsiMessage>, bool),
}

/// The configuration space of a function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    /// Bits that the guest may change.
    writable: Vec<u8>,
    /// Values that a reset puts back where they are not zero.
    initial: Vec<(usize, u8)>,
    bars: Vec<Bar>,
    msi: Option<usize>,
    msix: Option<usize>,
    express: usize,
    /// Power management control and status.
    power: usize,
}

impl ConfigSpace {
    /// The space of a function after a reset.
    #[must_use]
    pub fn new(description: &Description) -> Self {
        let mut space = Self {
            bytes: vec![0; SIZE],
            writable: vec![0; SIZE],
            initial: Vec::new(),
            bars: description.bars.clone(),
            msi: None,
            msix: None,
            express: 0,
            power: 0,
        };
        space.set16(0x00, description.id.0);
        space.set16(0x02, description.id.1);
        let [base, sub, interface] = description.class;
        space.put(0x08, &[description.revision, interface, sub, base]);
        space.set16(0x2c, description.subsystem.0);
        space.set16(0x2e, description.subsystem.1);
        // Parity and system errors can be enabled, and never happen.
        let command = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_NO_LINE;
        space.allow16(COMMAND, command | 1 << 6 | 1 << 8);
        space.allow(0x0c, &[0xff]);
        space.allow(0x3c, &[0xff]);
        space.put(INTERRUPT_PIN, &[u8::from(description.line)]);
        for bar in &description.bars {
            space.add_bar(bar);
        }
        space.add_capabilities(description);
        space
    }

    fn add_bar(&mut self, bar: &Bar) {
        let at = BARS + 4 * usize::from(bar.index);
        let mask = !(bar.size.max(16) - 1);
        self.put(at, &[u8::from(bar.io) | u8::from(bar.wide) << 2]);
        let mask = mask.to_le_bytes();
        self.allow(at, &[mask[0] & 0xf0, mask[1], mask[2], mask[3]]);
        if bar.wide {
            self.allow(at + 4, &mask[4..]);
        }
    }

    /// Adds the capabilities, in the places that the registers leave. MSI is the first, as with ICH9.
    fn add_capabilities(&mut self, description: &Description) {
        let mut taken = vec![false; 256];
        for registers in &description.registers {
            for (at, (value, mask)) in (usize::from(registers.at)..256).zip(&registers.bytes) {
                taken[at] = true;
                self.put(at, &[*value]);
                self.allow(at, &[*mask]);
                self.initial.push((at, *value));
            }
        }
        let mut at = 0x40;
        let mut link = CAPABILITIES;
        let mut add = |space: &mut Self, id: u8, len: usize| {
            while taken[at..at + len].contains(&true) {
                at += 8;
            }
            let start = at;
            space.put(link, &[start as u8]);
            space.put(start, &[id]);
            link = start + 1;
            at += len.next_multiple_of(8);
            start
        };
        if description.msi > 0 {
            let log = u16::from(description.msi.max(1).ilog2() as u8).min(5);
            // 64-bit addresses. One vector needs no mask, and AHCI reserves the bit that would say so.
            let masks = log > 0;
            let msi = add(self, ID_MSI, if masks { 20 } else { 14 });
            self.set16(msi + 2, log << 1 | 1 << 7 | u16::from(masks) << 8);
            self.allow16(msi + 2, 1 | 7 << 4);
            self.allow(msi + 4, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
            self.allow(msi + 12, &[0xff, 0xff]);
            if masks {
                self.allow(msi + 16, &[0xff; 4]);
            }
            self.msi = Some(msi);
        }
        let power = add(self, ID_POWER, 8);
        // Version 3, D0 and D3hot.
        self.set16(power + 2, 3);
        self.set16(power + 4, u16::from(description.keeps_state) << 3);
        self.allow16(power + 4, 3);
        self.power = power + 4;
        let express = add(self, ID_EXPRESS, 0x3c);
        // Version 2, a root complex integrated endpoint; function-level reset.
        self.set16(express + 2, 2 | 9 << 4);
        self.put(express + 4, &(1_u32 << 15 | 1 << 28).to_le_bytes());
        self.allow16(express + 8, 0xffff);
        self.express = express;
        if let Some(table) = description.msix {
            let msix = add(self, ID_MSIX, 12);
            self.set16(msix + 2, table.vectors.max(1) - 1);
            self.allow16(msix + 2, 1 << 15 | 1 << 14);
            let place = |offset: u32| (offset & !7 | u32::from(table.bar)).to_le_bytes();
            self.put(msix + 4, &place(table.table));
            self.put(msix + 8, &place(table.pending));
            self.msix = Some(msix);
        }
        for capability in &description.capabilities {
            let start = add(self, capability.id, 2 + capability.bytes.len());
            self.put(start + 2, &capability.bytes);
            self.allow(start + 2, &capability.writable);
        }
        self.set16(STATUS, STATUS_CAPABILITIES);
    }

    /// Reads; beyond the end there are ones.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        for (ahead, byte) in (0..).zip(data) {
            let at = usize::try_from(offset.saturating_add(ahead)).unwrap_or(usize::MAX);
            *byte = self.bytes.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes what may be written, and says what that changed.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Changes {
        let before = self.facts();
        let power = self.bytes[self.power] & 3;
        for (ahead, byte) in (0..).zip(data) {
            let at = usize::try_from(offset.saturating_add(ahead)).unwrap_or(usize::MAX);
            let (Some(now), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) else {
                break;
            };
            *now = *now & !mask | byte & mask;
        }
        // From D3hot to D0 without No_Soft_Reset: everything is as after a reset.
        let now = self.bytes[self.power];
        let mut reset = power == 3 && now & 3 == 0 && now & 1 << 3 == 0;
        // Initiate Function Level Reset reads as zero.
        let control = self.express + 9;
        if self.bytes[control] & 0x80 != 0 {
            self.bytes[control] &= 0x7f;
            reset = true;
        }
        let after = self.facts();
        Changes {
            memory: before.memory != after.memory,
            interrupts: before.interrupts != after.interrupts,
            master: before.master != after.master,
            reset,
        }
    }

    fn facts(&self) -> Facts {
        let bars = self.bars.iter().map(|bar| self.address(bar)).collect();
        Facts {
            master: self.is_master(),
            memory: (self.decodes_memory(), self.decodes_io(), bars),
            interrupts: (
                self.msix_enabled(),
                self.msix_masked(),
                self.msi(),
                self.line_disabled(),
            ),
        }
    }

    /// Puts everything back that a reset puts back.
    pub fn reset(&mut self) {
        for (byte, mask) in self.bytes.iter_mut().zip(&self.writable) {
            *byte &= !mask;
        }
        for (at, value) in &self.initial {
            self.bytes[*at] = *value;
        }
    }

    /// The space as a driver has set it up, to be [restored](Self::restore) in another process.
    #[must_use]
    pub fn save(&self) -> Vec<u8> {
        self.bytes[..SAVED].to_vec()
    }

    /// Takes over a saved space; nobody has checked it.
    ///
    /// # Errors
    /// What differs although no driver can change it: the space is that of another function.
    pub fn restore(&mut self, saved: &[u8]) -> Result<(), String> {
        if saved.len() != SAVED {
            return Err(format!(
                "the configuration space has {} bytes, expected {SAVED}",
                saved.len()
            ));
        }
        // The interrupt status is not the driver's, and not ours to compare.
        let ours = |at: usize| if at == STATUS { STATUS_LINE as u8 } else { 0 };
        for (at, byte) in saved.iter().enumerate() {
            let differs = (byte ^ self.bytes[at]) & !self.writable[at] & !ours(at);
            if differs != 0 {
                return Err(format!(
                    "byte {at:#x} of the configuration space is {byte:#04x}, expected {:#04x}",
                    self.bytes[at]
                ));
            }
        }
        for ((now, mask), byte) in self.bytes.iter_mut().zip(&self.writable).zip(saved) {
            *now = *now & !mask | byte & mask;
        }
        self.bytes[self.express + 9] &= 0x7f;
        Ok(())
    }

    /// The capabilities with a number: where what follows the number and the link begins.
    pub fn capabilities(&self, id: u8) -> impl Iterator<Item = usize> + '_ {
        let next = |at: usize| (at != 0).then_some(at);
        let first = next(usize::from(self.bytes[CAPABILITIES]));
        let all = std::iter::successors(first, move |at| next(usize::from(self.bytes[at + 1])));
        all.filter(move |at| self.bytes[*at] == id).map(|at| at + 2)
    }

    fn address(&self, bar: &Bar) -> u64 {
        let at = BARS + 4 * usize::from(bar.index);
        let flags = if bar.io { 3 } else { 15 };
        let low = u64::from(self.get32(at) & !flags);
        if bar.wide {
            low | u64::from(self.get32(at + 4)) << 32
        } else {
            low
        }
    }

    /// Where the guest has put a BAR.
    #[must_use]
    pub fn bar_address(&self, index: u8) -> Option<u64> {
        let bar = self.bars.iter().find(|bar| bar.index == index)?;
        Some(self.address(bar))
    }

    /// Whether accesses to memory BARs are decoded.
    #[must_use]
    pub fn decodes_memory(&self) -> bool {
        self.get16(COMMAND) & COMMAND_MEMORY != 0
    }

    /// Whether accesses to BARs in I/O space are decoded.
    #[must_use]
    pub fn decodes_io(&self) -> bool {
        self.get16(COMMAND) & COMMAND_IO != 0
    }

    /// Whether the function may access memory.
    #[must_use]
    pub fn is_master(&self) -> bool {
        self.get16(COMMAND) & COMMAND_MASTER != 0
    }

    /// Whether the line may not be raised.
    #[must_use]
    pub fn line_disabled(&self) -> bool {
        self.get16(COMMAND) & COMMAND_NO_LINE != 0
    }

    /// Shows the line in the status register.
    pub fn show_line(&mut self, asserted: bool) {
        let status = self.get16(STATUS) & !STATUS_LINE;
        self.set16(
            STATUS,
            if asserted {
                status | STATUS_LINE
            } else {
                status
            },
        );
    }

    /// Whether MSI-X is enabled.
    #[must_use]
    pub fn msix_enabled(&self) -> bool {
        self.msix
            .is_some_and(|at| self.get16(at + 2) & 1 << 15 != 0)
    }

    /// Whether all vectors of MSI-X are masked.
    #[must_use]
    pub fn msix_masked(&self) -> bool {
        self.msix
            .is_some_and(|at| self.get16(at + 2) & 1 << 14 != 0)
    }

    /// Where MSI messages go, if MSI is enabled.
    #[must_use]
    pub fn msi(&self) -> Option<MsiMessage> {
        let at = self.msi?;
        let control = self.get16(at + 2);
        let masks = control & 1 << 8 != 0;
        (control & 1 != 0).then(|| MsiMessage {
            address: u64::from(self.get32(at + 4)) | u64::from(self.get32(at + 8)) << 32,
            data: self.get16(at + 12),
            vectors: 1 << (control >> 4 & 7).min(5),
            mask: if masks { self.get32(at + 16) } else { 0 },
        })
    }

    /// Whether messages are used in place of the line.
    #[must_use]
    pub fn uses_messages(&self) -> bool {
        self.msix_enabled() || self.msi().is_some()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    fn allow16(&mut self, at: usize, mask: u16) {
        self.allow(at, &mask.to_le_bytes());
    }

    fn set16(&mut self, at: usize, value: u16) {
        self.put(at, &value.to_le_bytes());
    }

    fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.bytes[at], self.bytes[at + 1]])
    }

    fn get32(&self, at: usize) -> u32 {
        u32::from(self.get16(at)) | u32::from(self.get16(at + 2)) << 16
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::{Capability, Msix, Registers};

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Description {
            id: (0x1234, 0x4e56),
            subsystem: (1, 2),
            class: [1, 8, 2],
            revision: 3,
            bars: vec![
                Bar::memory(0, 0x4000, true),
                Bar::memory(4, 0x1000, false),
                Bar::io(5, 32),
            ],
            msix: Some(Msix {
                vectors: 17,
                bar: 4,
                table: 0,
                pending: 0x800,
            }),
            msi: 4,
            line: true,
            keeps_state: false,
            capabilities: vec![Capability {
                id: 9,
                bytes: vec![8, 1, 2, 3, 4, 5],
                writable: vec![0, 0, 0xf0],
            }],
            registers: vec![Registers {
                at: 0x92,
                bytes: vec![(0x3f, 0x3f), (1, 0)],
            }],
        })
    }

    fn get32(space: &ConfigSpace, at: u64) -> u32 {
        let mut bytes = [0; 4];
        space.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_bar_tells_its_size_and_takes_an_address() {
        let mut space = space();
        assert_eq!(get32(&space, 8), 0x0108_0203);
        space.write(0x10, &[0xff; 8]);
        assert_eq!(get32(&space, 0x10), 0xffff_c004);
        assert_eq!(get32(&space, 0x14), 0xffff_ffff);
        let changes = space.write(0x10, &0x12_3456_8000_u64.to_le_bytes());
        assert!(changes.memory && !changes.interrupts);
        assert_eq!(space.bar_address(0), Some(0x12_3456_8000));
        space.write(0x20, &[0xff; 4]);
        assert_eq!(get32(&space, 0x20), 0xffff_f000);
        assert_eq!(space.bar_address(1), None);
    }

    #[test]
    fn the_list_of_capabilities_ends_and_has_each_once() {
        let space = space();
        let mut at = get32(&space, 0x34) & 0xff;
        let mut ids = Vec::new();
        while at != 0 {
            let entry = get32(&space, at.into());
            ids.push(entry as u8);
            at = entry >> 8 & 0xff;
            assert!(ids.len() < 8);
        }
        assert_eq!(ids, [ID_MSI, ID_POWER, ID_EXPRESS, ID_MSIX, 9]);
        let own: Vec<usize> = space.capabilities(9).collect();
        assert_eq!(get32(&space, own[0] as u64), 0x0302_0108);
        assert_eq!(own.len(), 1);
    }

    #[test]
    fn registers_of_the_device_keep_their_place_and_come_back() {
        let mut space = space();
        assert_eq!(get32(&space, 0x90) >> 16, 0x013f);
        space.write(0x92, &[0, 0]);
        assert_eq!(get32(&space, 0x90) >> 16, 0x0100);
        let own = space.capabilities(9).next().unwrap() as u64;
        space.write(own, &[0xff; 6]);
        assert_eq!(get32(&space, own), 0x03f2_0108);
        space.reset();
        assert_eq!(get32(&space, 0x90) >> 16, 0x013f);
    }

    #[test]
    fn waking_up_is_a_reset() {
        let mut space = space();
        let power = space.power as u64;
        assert!(!space.write(power, &[3, 0]).reset);
        assert!(space.write(power, &[0, 0]).reset);
        assert!(!space.write(power, &[0, 0]).reset);
    }

    #[test]
    fn ports_are_decoded_beside_memory() {
        let mut space = space();
        assert_eq!(get32(&space, 0x24), 1);
        space.write(0x24, &[0xff; 4]);
        assert_eq!(get32(&space, 0x24), 0xffff_ffe1);
        space.write(0x24, &0xc040_u32.to_le_bytes());
        assert!(space.write(4, &[1, 0]).memory);
        assert!(space.decodes_io() && !space.decodes_memory());
        assert_eq!(space.bar_address(5), Some(0xc040));
    }

    #[test]
    fn interrupts_are_switched_and_a_reset_switches_them_off() {
        let mut space = space();
        let msix = space.msix.unwrap() as u64;
        assert_eq!(get32(&space, msix) >> 16, 16);
        assert!(space.write(msix + 3, &[0x80]).interrupts);
        assert!(space.uses_messages() && space.msix_enabled());
        let msi = space.msi.unwrap() as u64;
        space.write(msi + 4, &0xfee0_0000_u64.to_le_bytes());
        space.write(msi + 12, &[7, 0]);
        space.write(msi + 2, &[1 | 2 << 4]);
        assert_eq!(
            space.msi(),
            Some(MsiMessage {
                address: 0xfee0_0000,
                data: 7,
                vectors: 4,
                mask: 0
            })
        );
        space.reset();
        assert!(!space.uses_messages());
        assert_eq!(get32(&space, msix) >> 16, 16);
    }

    #[test]
    fn a_saved_space_comes_back_in_the_same_function_alone() {
        let mut one = space();
        let changes = one.write(4, &[6, 4]);
        assert!(changes.master && changes.memory && changes.interrupts);
        one.write(0x10, &0x12_3456_8000_u64.to_le_bytes());
        one.show_line(true);
        let saved = one.save();
        let mut two = space();
        two.restore(&saved).unwrap();
        assert!(two.is_master() && two.line_disabled());
        assert_eq!(two.bar_address(0), Some(0x12_3456_8000));
        assert_eq!(two.save()[..6], saved[..6]);
        for (at, byte) in [(0, 0x35), (0x34, 0x44), (8, 4)] {
            let mut other = saved.clone();
            other[at] = byte;
            let mut fresh = space();
            assert!(fresh.restore(&other).is_err(), "{at:#x}");
            assert_eq!(fresh.save(), space().save());
        }
        assert!(space().restore(&saved[1..]).is_err());
        assert!(!one.write(4, &[6, 0]).master);
    }

    #[test]
    fn what_cannot_be_written_stays_and_a_reset_is_told_once() {
        let mut space = space();
        let before = get32(&space, 0);
        space.write(0, &[0; 4]);
        assert_eq!(get32(&space, 0), before);
        let control = space.express as u64 + 8;
        assert!(space.write(control, &0x8000_u16.to_le_bytes()).reset);
        assert!(!space.write(control, &[0; 2]).reset);
        space.write(SIZE as u64 - 1, &[1, 2, 3]);
        let mut beyond = [0; 2];
        space.read(u64::MAX - 1, &mut beyond);
        assert_eq!(beyond, [0xff; 2]);
    }
}
