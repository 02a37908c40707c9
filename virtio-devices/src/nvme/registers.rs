//! The controller's registers (base specification 2.0, 3.1.3): values, and what a write asks for.

use serde::{Deserialize, Serialize};

/// The most entries of an I/O queue.
pub(super) const MAX_ENTRIES: u32 = 4096;
/// The largest memory page a host may choose: 2 to the power of 12 and this.
const MPSMAX: u32 = 4;
/// Bytes of the registers before the doorbells.
pub(super) const DOORBELLS: u64 = 0x1000;

pub(super) mod csts {
    pub(in crate::nvme) const RDY: u32 = 1;
    pub(in crate::nvme) const CFS: u32 = 1 << 1;
    pub(in crate::nvme) const SHST: u32 = 3 << 2;
    pub(in crate::nvme) const SHST_OCCURRING: u32 = 1 << 2;
    pub(in crate::nvme) const SHST_COMPLETE: u32 = 2 << 2;
    pub(in crate::nvme) const NSSRO: u32 = 1 << 4;
}

const CC_EN: u32 = 1;
const CC_SHN: u32 = 3 << 14;
/// EN, CSS, MPS, AMS, SHN, IOSQES, IOCQES.
const CC_MASK: u32 = 0x00ff_fff1;

/// "NVMe", written to NSSR.
const NSSR_RESET: u32 = 0x4e56_4d65;

/// What a register write asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Nothing.
    None,
    /// CC.EN went to 1: the values are checked, the admin queue may start.
    Enable,
    /// CC.EN went to 1 with values that do not work.
    Refuse,
    /// CC.EN went to 0.
    Disable,
    /// CC.SHN asks for a shutdown.
    Shutdown,
    /// The interrupt mask has changed.
    Mask,
    /// NVM subsystem reset.
    SubsystemReset,
}

/// The registers that can be written, and CSTS.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) cc: u32,
    pub(super) csts: u32,
    pub(super) intms: u32,
    pub(super) aqa: u32,
    pub(super) asq: u64,
    pub(super) acq: u64,
}

/// CAP.
pub(super) fn cap() -> u64 {
    let mqes = u64::from(MAX_ENTRIES - 1);
    // Queues are contiguous; 20 s; NSSR; the NVM command set; ready with media.
    mqes | 1 << 16 | 40 << 24 | 1 << 36 | 1 << 37 | u64::from(MPSMAX) << 52 | 1 << 59
}

/// VS: 2.0.
pub(super) const VS: u32 = 0x0002_0000;

impl Registers {
    pub(super) fn enabled(&self) -> bool {
        self.cc & CC_EN != 0
    }

    pub(super) fn ready(&self) -> bool {
        self.csts & csts::RDY != 0
    }

    /// Bytes of a memory page.
    pub(super) fn page(&self) -> u64 {
        1 << (12 + (self.cc >> 7 & 15).min(MPSMAX))
    }

    /// CC.IOSQES and CC.IOCQES, which must be 6 and 4 before I/O queues are made.
    pub(super) fn entry_sizes(&self) -> (u32, u32) {
        (self.cc >> 16 & 15, self.cc >> 20 & 15)
    }

    /// Entries of the admin submission and completion queue.
    pub(super) fn admin_sizes(&self) -> (u32, u32) {
        ((self.aqa & 0xfff) + 1, (self.aqa >> 16 & 0xfff) + 1)
    }

    fn works(&self) -> bool {
        let css = self.cc >> 4 & 7;
        let mps = self.cc >> 7 & 15;
        let ams = self.cc >> 11 & 7;
        let (sq, cq) = self.admin_sizes();
        let page = self.page();
        css == 0
            && mps <= MPSMAX
            && ams == 0
            && sq >= 2
            && cq >= 2
            && self.asq.is_multiple_of(page)
            && self.acq.is_multiple_of(page)
    }

    fn dword(&self, at: u64) -> u32 {
        let half = |value: u64, high: bool| (if high { value >> 32 } else { value }) as u32;
        match at {
            0x00 | 0x04 => half(cap(), at == 0x04),
            0x08 => VS,
            0x0c | 0x10 => self.intms,
            0x14 => self.cc,
            0x1c => self.csts,
            0x24 => self.aqa,
            0x28 | 0x2c => half(self.asq, at == 0x2c),
            0x30 | 0x34 => half(self.acq, at == 0x34),
            // CRTO: ready with media in 20 s at most.
            0x68 => 40,
            _ => 0,
        }
    }

    /// Reads up to 8 bytes; what no register has is zero.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = self.dword(at & !3).to_le_bytes()[(at & 3) as usize];
        }
    }

    /// Writes a whole dword.
    pub(super) fn write(&mut self, at: u64, value: u32) -> Action {
        let set = |old: u64, high: bool| {
            if high {
                old & 0xffff_ffff | u64::from(value) << 32
            } else {
                old & !0xffff_ffff | u64::from(value)
            }
        };
        match at {
            0x0c => {
                self.intms |= value;
                Action::Mask
            }
            0x10 => {
                self.intms &= !value;
                Action::Mask
            }
            0x14 => self.write_cc(value),
            0x1c => {
                self.csts &= !(value & csts::NSSRO);
                Action::None
            }
            0x20 if value == NSSR_RESET => Action::SubsystemReset,
            // The admin queue cannot be moved while it runs.
            0x24 | 0x28 | 0x2c | 0x30 | 0x34 if self.enabled() => Action::None,
            0x24 => {
                self.aqa = value & 0x0fff_0fff;
                Action::None
            }
            0x28 | 0x2c => {
                self.asq = set(self.asq, at == 0x2c) & !0xfff;
                Action::None
            }
            0x30 | 0x34 => {
                self.acq = set(self.acq, at == 0x34) & !0xfff;
                Action::None
            }
            _ => Action::None,
        }
    }

    fn write_cc(&mut self, value: u32) -> Action {
        let old = self.cc;
        self.cc = value & CC_MASK;
        if old & CC_EN == 0 && self.cc & CC_EN != 0 {
            return if self.works() {
                Action::Enable
            } else {
                Action::Refuse
            };
        }
        if old & CC_EN != 0 && self.cc & CC_EN == 0 {
            return Action::Disable;
        }
        if old & CC_EN != 0 {
            // Only SHN and the entry sizes may change while the controller is enabled.
            let free = CC_SHN | 0x00ff_0000;
            self.cc = old & !free | self.cc & free;
        }
        if old & CC_SHN == 0 && self.cc & CC_SHN != 0 && self.csts & csts::SHST == 0 {
            return Action::Shutdown;
        }
        Action::None
    }

    /// What a controller reset does to them: the admin queue stays where it is.
    pub(super) fn reset(&mut self) {
        self.cc = 0;
        self.csts &= csts::NSSRO;
        self.intms = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cap_reads_the_same_in_one_and_in_two_pieces() {
        let registers = Registers::default();
        let (mut whole, mut low, mut high) = ([0; 8], [0; 4], [0; 4]);
        registers.read(0, &mut whole);
        registers.read(0, &mut low);
        registers.read(4, &mut high);
        assert_eq!(whole[..4], low);
        assert_eq!(whole[4..], high);
        assert_eq!(u64::from_le_bytes(whole), cap());
        assert_eq!(cap() & 0xffff, 4095);
    }

    #[test]
    fn the_interrupt_mask_is_set_and_cleared_bit_by_bit() {
        let mut registers = Registers::default();
        registers.write(0x0c, 0b110);
        registers.write(0x0c, 0b001);
        registers.write(0x10, 0b010);
        assert_eq!(registers.intms, 0b101);
    }

    #[test]
    fn values_that_do_not_work_are_refused() {
        let good = |registers: &mut Registers| {
            registers.write(0x24, 0x001f_001f);
            registers.write(0x28, 0x1000);
            registers.write(0x30, 0x2000);
        };
        let mut registers = Registers::default();
        good(&mut registers);
        assert_eq!(registers.write(0x14, 0x0046_0001), Action::Enable);
        for cc in [
            1 | 1 << 4,
            1 | 5 << 7,
            1 | 1 << 11,
            // Pages of 8 KiB: the admin completion queue is aligned, the submission queue is not.
            1 | 1 << 7,
        ] {
            let mut registers = Registers::default();
            good(&mut registers);
            assert_eq!(registers.write(0x14, cc), Action::Refuse, "{cc:#x}");
        }
        for aqa in [0, 0x001f_0000, 0x0000_001f] {
            let mut registers = Registers::default();
            good(&mut registers);
            registers.write(0x24, aqa);
            assert_eq!(registers.write(0x14, 1), Action::Refuse, "{aqa:#x}");
        }
    }
}
