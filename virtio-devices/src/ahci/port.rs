//! A port: its registers and its state machine (AHCI 1.3.1, 3.3 and 5.3). It is shared by the threads
//! that access registers and the port's worker, behind one lock.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use super::{
    drive::Drive,
    fis,
    regs::{SIG_NONE, TFD_NONE, cmd, is, px, serr},
};
use crate::ata::status;

/// The registers of a port that a driver sees, and what the HBA keeps for them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) clb: u64,
    pub(super) fb: u64,
    pub(super) is: u32,
    pub(super) ie: u32,
    pub(super) cmd: u32,
    pub(super) tfd: u32,
    pub(super) sig: u32,
    pub(super) sctl: u32,
    pub(super) serr: u32,
    pub(super) sact: u32,
    pub(super) ci: u32,
    /// An error was reported: nothing is fetched until the driver clears PxCMD.ST.
    pub(super) halted: bool,
    /// The slot to look at first.
    pub(super) next_slot: u8,
    /// The device holds its signature back: the port does not receive, or is not ready.
    pub(super) signature_due: bool,
    /// The signature is in the registers, but not yet in memory.
    pub(super) signature_unposted: bool,
    /// The driver holds SRST.
    pub(super) soft_reset: bool,
    /// The link is up.
    pub(super) link: bool,
}

/// What a register access leads to, once the port is unlocked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effects {
    /// The worker has something to do and sleeps.
    pub(super) kick: bool,
}

/// A port.
pub(super) struct Port {
    pub(super) regs: Registers,
    pub(super) drive: Option<Drive>,
    /// Counts changes of the drive or its medium: the worker takes a new data plane.
    pub(super) drive_changes: u64,
    /// Slots that the worker has taken and not posted.
    pub(super) taken: u32,
    /// Changes when everything that is in flight is to be forgotten.
    pub(super) epoch: u32,
    /// Forgotten requests are still in flight: nothing is taken until they have ended.
    pub(super) settling: bool,
    /// An HBA reset waits for them.
    pub(super) resetting: bool,
    /// The worker sleeps.
    pub(super) wants_doorbell: bool,
    pub(super) doorbell: Option<Arc<EventFd>>,
    staggered: bool,
}

impl Port {
    pub(super) fn new(staggered: bool) -> Self {
        let mut port = Self {
            regs: Registers {
                clb: 0,
                fb: 0,
                is: 0,
                ie: 0,
                cmd: 0,
                tfd: TFD_NONE,
                sig: SIG_NONE,
                sctl: 0,
                serr: 0,
                sact: 0,
                ci: 0,
                halted: false,
                next_slot: 0,
                signature_due: false,
                signature_unposted: false,
                soft_reset: false,
                link: false,
            },
            drive: None,
            drive_changes: 0,
            taken: 0,
            epoch: 0,
            settling: false,
            resetting: false,
            wants_doorbell: false,
            doorbell: None,
            staggered,
        };
        port.reset();
        port
    }

    /// HBA reset: everything as after power on.
    pub(super) fn reset(&mut self) {
        self.forget();
        self.resetting = self.settling;
        let spin_up = if self.staggered { 0 } else { cmd::SUD };
        let regs = &mut self.regs;
        (regs.clb, regs.fb, regs.is, regs.ie, regs.sctl) = (0, 0, 0, 0, 0);
        regs.cmd = cmd::HPCP | cmd::POD | spin_up;
        regs.next_slot = 0;
        self.link_down();
        self.regs.serr = 0;
        if !self.staggered {
            self.link_up();
        }
        self.regs.serr = 0;
        self.settle();
    }

    /// Forgets every command: issued, and in flight.
    fn forget(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.settling = self.taken != 0;
        if let Some(drive) = &self.drive {
            drive.forget();
        }
        let regs = &mut self.regs;
        (regs.ci, regs.sact, regs.halted, regs.soft_reset) = (0, 0, false, false);
    }

    /// Forgets what is in flight, but leaves the registers: an error was reported.
    pub(super) fn orphan(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        self.settling = self.taken != 0;
    }

    /// The device is gone, or not reachable.
    fn link_down(&mut self) {
        let regs = &mut self.regs;
        regs.link = false;
        regs.tfd = TFD_NONE;
        regs.sig = SIG_NONE;
        regs.signature_due = false;
        regs.signature_unposted = false;
    }

    /// A COMINIT: the device starts, and will send its signature.
    fn link_up(&mut self) {
        let Some(drive) = &mut self.drive else {
            return;
        };
        if self.regs.cmd & cmd::SUD == 0 {
            return;
        }
        drive.reset(true);
        self.regs.link = true;
        self.regs.serr |= serr::DIAG_X;
        self.regs.signature_due = true;
        self.signature();
    }

    /// Sends the signature, if the port takes it.
    fn signature(&mut self) {
        let Some(drive) = &self.drive else {
            return;
        };
        if !self.regs.signature_due {
            return;
        }
        if self.regs.cmd & cmd::FRE == 0 {
            self.regs.tfd = TFD_NONE;
        } else if self.settling {
            self.regs.tfd = u32::from(status::BSY);
        } else {
            let registers = drive.signature();
            self.regs.tfd = fis::task_file_data(&registers);
            self.regs.sig = fis::signature(&registers);
            self.regs.signature_due = false;
            self.regs.signature_unposted = true;
        }
    }

    /// A software reset has ended: the device sends its signature.
    pub(super) fn soft_reset_ended(&mut self) {
        if let Some(drive) = &mut self.drive {
            drive.reset(false);
            self.regs.signature_due = true;
            self.signature();
        }
    }

    /// Goes on once nothing forgotten is in flight any more.
    pub(super) fn settle(&mut self) {
        if self.taken != 0 {
            return;
        }
        if self.settling && self.regs.link && self.regs.tfd & u32::from(status::BSY) != 0 {
            // The device has ended what was forgotten, and says so although nobody asks.
            self.regs.tfd = u32::from(status::READY);
        }
        self.settling = false;
        self.resetting = false;
        if self.regs.cmd & cmd::ST == 0 {
            self.regs.cmd &= !(cmd::CR | cmd::CCS);
        } else {
            self.regs.cmd |= cmd::CR;
        }
        self.signature();
    }

    /// Whether commands may be fetched.
    pub(super) fn runs(&self) -> bool {
        let regs = &self.regs;
        regs.cmd & (cmd::ST | cmd::CR | cmd::FRE) == cmd::ST | cmd::CR | cmd::FRE
            && regs.tfd & u32::from(status::BSY | status::DRQ) == 0
            && regs.link
            && !regs.halted
            && !self.settling
    }

    /// Whether the worker has something to do.
    pub(super) fn has_work(&self) -> bool {
        self.regs.signature_unposted || (self.runs() && self.regs.ci & !self.taken != 0)
    }

    /// Wakes the worker.
    pub(super) fn ring(&mut self) {
        self.wants_doorbell = false;
        if let Some(doorbell) = &self.doorbell {
            // It only fails when it is readable already.
            let _ = doorbell.write(1);
        }
    }

    /// Another drive, or none. Returns the one that was there: dropping it may take long, and is
    /// done without the lock.
    #[must_use]
    pub(super) fn plug(&mut self, drive: Option<Drive>) -> Option<Drive> {
        self.forget();
        let was_up = self.regs.link;
        self.link_down();
        let old = std::mem::replace(&mut self.drive, drive);
        self.drive_changes += 1;
        if self.regs.sctl & 0xf == 0 {
            self.link_up();
        }
        if self.regs.cmd & cmd::FRE == 0 && self.regs.ie == 0 {
            // No driver uses the port yet: to it the drive has always been there.
            self.regs.serr = 0;
        } else if was_up || self.regs.link {
            self.regs.serr |= serr::DIAG_N;
        }
        self.settle();
        old
    }

    /// PxIS as the driver reads it: two bits mirror PxSERR.
    pub(super) fn interrupt_status(&self) -> u32 {
        let regs = &self.regs;
        let mirror = |on: u32, bit: u32| if regs.serr & on != 0 { bit } else { 0 };
        regs.is | mirror(serr::DIAG_X, is::PCS) | mirror(serr::DIAG_N, is::PRCS)
    }

    /// Whether the port has an interrupt to report.
    pub(super) fn interrupts(&self) -> bool {
        self.interrupt_status() & self.regs.ie != 0
    }

    /// Reads a register.
    pub(super) fn read(&self, register: u64) -> u32 {
        let regs = &self.regs;
        match register {
            px::CLB => regs.clb as u32,
            px::CLBU => (regs.clb >> 32) as u32,
            px::FB => regs.fb as u32,
            px::FBU => (regs.fb >> 32) as u32,
            px::IS => self.interrupt_status(),
            px::IE => regs.ie,
            px::CMD => regs.cmd,
            px::TFD => regs.tfd,
            px::SIG => regs.sig,
            px::SSTS => self.sata_status(),
            px::SCTL => regs.sctl,
            px::SERR => regs.serr,
            px::SACT => regs.sact,
            px::CI => regs.ci,
            _ => 0,
        }
    }

    /// PxSSTS: active at 6 Gb/s or what the driver limits it to; or what PxSCTL.DET makes of it.
    fn sata_status(&self) -> u32 {
        match (self.regs.sctl & 0xf, self.regs.link) {
            (4, _) => 4,
            (1, _) if self.drive.is_some() => 1,
            (0, true) => {
                let speed = match self.regs.sctl >> 4 & 0xf {
                    limit @ 1..=3 => limit,
                    _ => 3,
                };
                0x103 | speed << 4
            }
            _ => 0,
        }
    }

    /// Writes those bits of a register that `mask` says.
    pub(super) fn write(&mut self, register: u64, value: u32, mask: u32) -> Effects {
        let ones = value & mask;
        let low = |old: u64, keep: u32| {
            let new = old as u32 & !mask | ones;
            old & !0xffff_ffff | u64::from(new & keep)
        };
        let high = |old: u64| {
            let new = (old >> 32) as u32 & !mask | ones;
            old & 0xffff_ffff | u64::from(new) << 32
        };
        let regs = &mut self.regs;
        match register {
            px::CLB => regs.clb = low(regs.clb, !0x3ff),
            px::CLBU => regs.clb = high(regs.clb),
            px::FB => regs.fb = low(regs.fb, !0xff),
            px::FBU => regs.fb = high(regs.fb),
            px::IS => regs.is &= !ones,
            px::IE => regs.ie = (regs.ie & !mask | ones) & is::ALL,
            px::CMD => self.write_cmd(value, mask),
            px::SCTL => {
                let value = (regs.sctl & !mask | ones) & 0xfff;
                self.write_sctl(value);
            }
            px::SERR => regs.serr &= !ones,
            // Both can only be set, and only while the list may run.
            px::SACT if regs.cmd & cmd::ST != 0 => regs.sact |= ones,
            px::CI if regs.cmd & cmd::ST != 0 => regs.ci |= ones,
            _ => {}
        }
        Effects {
            kick: self.wants_doorbell && self.has_work(),
        }
    }

    fn write_cmd(&mut self, value: u32, mask: u32) {
        let mut writable = cmd::ST | cmd::FRE | cmd::ATAPI;
        if self.staggered {
            writable |= cmd::SUD;
        }
        let old = self.regs.cmd;
        let new = old & !(mask & writable) | value & mask & writable;
        let (set, cleared) = (new & !old, old & !new);
        self.regs.cmd = new;
        if value & mask & cmd::CLO != 0 && new & cmd::ST == 0 {
            self.regs.tfd &= !u32::from(status::BSY | status::DRQ);
        }
        if cleared & cmd::ST != 0 {
            self.forget();
            self.settle();
        }
        if set & cmd::FRE != 0 {
            self.regs.cmd |= cmd::FR;
            self.signature();
        }
        if cleared & cmd::FRE != 0 {
            self.regs.cmd &= !cmd::FR;
        }
        if set & cmd::SUD != 0 && self.regs.sctl & 0xf == 0 {
            self.link_up();
        }
        if cleared & cmd::SUD != 0 {
            self.forget();
            self.link_down();
            self.settle();
        }
        if set & cmd::ST != 0 {
            self.regs.next_slot = 0;
            self.settle();
        }
    }

    /// PxSCTL: DET 1 holds the link in reset, 4 switches it off, and going back to 0 brings it up.
    fn write_sctl(&mut self, value: u32) {
        let (before, now) = (self.regs.sctl & 0xf, value & 0xf);
        self.regs.sctl = value;
        if now == before {
            return;
        }
        self.forget();
        match now {
            0 => {
                // The driver asked for it: PhyRdy changes are no news.
                self.link_up();
            }
            _ => self.link_down(),
        }
        self.settle();
    }
}
