//! Interrupts of the HBA: IS, GHC.IE, and command completion coalescing (AHCI 1.3.1, 10.7 and 11).

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use crate::VectorInterrupt;

/// CCC_CTL after a reset: one completion, one millisecond.
const CCC_RESET: u32 = 1 << 8 | 1 << 16;
const CCC_EN: u32 = 1;
const CCC_INT_SHIFT: u32 = 3;

/// What is saved of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct IrqState {
    enabled: bool,
    is: u32,
    ccc_ctl: u32,
    ccc_ports: u32,
    /// Coalesced completions that were counted and not told yet.
    untold: u32,
}

/// Interrupt state of an HBA.
pub(super) struct Irq {
    sink: Option<Arc<dyn VectorInterrupt>>,
    pub(super) is: u32,
    pub(super) enabled: bool,
    line: bool,
    /// The ports whose PxIS and PxIE have a bit in common.
    pending: u32,
    /// The bit of IS that coalesced interrupts use; `None` if it is not offered.
    ccc_bit: Option<u32>,
    pub(super) ccc_ctl: u32,
    pub(super) ccc_ports: u32,
    completions: u32,
    /// When completions that were counted are reported at the latest.
    due: Option<Instant>,
}

impl Irq {
    pub(super) fn new(ccc_bit: Option<u32>) -> Self {
        Self {
            sink: None,
            is: 0,
            enabled: false,
            line: false,
            pending: 0,
            ccc_bit,
            ccc_ctl: Self::ccc_reset(ccc_bit),
            ccc_ports: 0,
            completions: 0,
            due: None,
        }
    }

    fn ccc_reset(bit: Option<u32>) -> u32 {
        bit.map_or(0, |bit| CCC_RESET | bit << CCC_INT_SHIFT)
    }

    pub(super) fn set_sink(&mut self, sink: Arc<dyn VectorInterrupt>) {
        sink.set_level(self.line);
        self.sink = Some(sink);
    }

    /// As after power on.
    pub(super) fn reset(&mut self) {
        self.is = 0;
        self.enabled = false;
        self.pending = 0;
        self.ccc_ctl = Self::ccc_reset(self.ccc_bit);
        self.ccc_ports = 0;
        self.completions = 0;
        self.due = None;
        self.settle(0);
    }

    /// Whether a port has an interrupt to report.
    pub(super) fn port(&mut self, port: u32, active: bool) {
        let (bit, before) = (1 << port, self.is);
        if active {
            self.pending |= bit;
            self.is |= bit;
        } else {
            self.pending &= !bit;
        }
        self.settle(before);
    }

    /// The guest clears bits of IS. What a port still has to report is there again, and is told
    /// again, and so is what was not cleared: the guest may have looked before it came.
    pub(super) fn clear(&mut self, bits: u32) {
        self.is &= !bits;
        self.is |= self.pending & bits;
        self.settle(0);
    }

    /// GHC.IE.
    pub(super) fn enable(&mut self, enabled: bool) {
        let before = if self.enabled { self.is } else { 0 };
        self.enabled = enabled;
        self.settle(before);
    }

    /// Commands of a port have completed.
    pub(super) fn completed(&mut self, port: u32, commands: u32) {
        if self.ccc_ctl & CCC_EN == 0 || self.ccc_ports & 1 << port == 0 || commands == 0 {
            return;
        }
        self.completions = self.completions.saturating_add(commands);
        let limit = self.ccc_ctl >> 8 & 0xff;
        if limit != 0 && self.completions >= limit {
            self.fire();
        } else if self.due.is_none() {
            self.start_timer();
        }
    }

    fn start_timer(&mut self) {
        let wait = Duration::from_millis(u64::from(self.ccc_ctl >> 16));
        self.due = Some(Instant::now() + wait);
    }

    /// When [`expire`](Self::expire) should be called.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Reports completions that have waited long enough.
    pub(super) fn expire(&mut self) {
        if self.due.is_some_and(|due| due <= Instant::now()) {
            self.fire();
        }
    }

    fn fire(&mut self) {
        self.completions = 0;
        self.due = None;
        if let Some(bit) = self.ccc_bit {
            let before = self.is;
            self.is |= 1 << bit;
            self.settle(before);
        }
    }

    /// Writes CCC_CTL: count and time can only change while it is off.
    pub(super) fn write_ccc_ctl(&mut self, value: u32) {
        if self.ccc_bit.is_none() {
            return;
        }
        let int = self.ccc_ctl & 0xf8;
        if self.ccc_ctl & CCC_EN == 0 {
            // A time of 0 is reserved.
            let time = (value >> 16).max(1) << 16;
            self.ccc_ctl = time | value & 0xff00 | int | value & CCC_EN;
        } else {
            self.ccc_ctl = self.ccc_ctl & !CCC_EN | value & CCC_EN;
        }
        if self.ccc_ctl & CCC_EN == 0 {
            self.completions = 0;
            self.due = None;
        }
    }

    /// Takes a saved state. What is unseen is told again: a message may have been lost.
    pub(super) fn restore(&mut self, saved: &IrqState) {
        self.is = saved.is | self.pending;
        self.enabled = saved.enabled;
        if let Some(bit) = self.ccc_bit {
            self.ccc_ctl = saved.ccc_ctl & !0xfe | bit << CCC_INT_SHIFT;
            self.ccc_ports = saved.ccc_ports;
            if self.ccc_ctl & CCC_EN != 0 && saved.untold > 0 {
                // They wait once more, but not for ever.
                self.completions = saved.untold;
                self.start_timer();
            }
        }
        self.settle(0);
    }

    /// What has to be saved.
    pub(super) fn save(&self) -> IrqState {
        IrqState {
            enabled: self.enabled,
            is: self.is,
            ccc_ctl: self.ccc_ctl,
            ccc_ports: self.ccc_ports,
            untold: self.completions,
        }
    }

    /// The line follows IS, and new bits of IS are worth a message.
    fn settle(&mut self, before: u32) {
        let line = self.enabled && self.is != 0;
        let news = self.enabled && self.is & !before != 0;
        let Some(sink) = &self.sink else {
            self.line = line;
            return;
        };
        if line != self.line {
            self.line = line;
            sink.set_level(line);
        }
        if news {
            // What the host says is counted nowhere: the driver finds the bits in IS.
            if let Err(error) = sink.signal(0) {
                tracing::debug!(%error, "the interrupt was not sent");
            }
        }
    }
}
