//! What a copy is to do.

use std::time::Instant;

use block::{AsyncDiskFile, ErrorKind};

use super::scan::{Kind, Look, Run, SECTOR};
use crate::util::{errno, persona::Persona};

/// What to copy, and how.
pub(super) struct Job {
    /// The sources, with the offset of each in the target.
    pub(super) sources: Vec<(u64, Box<dyn AsyncDiskFile>)>,
    pub(super) target: Box<dyn AsyncDiskFile>,
    /// What is not written to reads as zeroes.
    pub(super) target_is_zero: bool,
    /// What the source itself does not hold is left to the target's backing file.
    pub(super) target_has_backing: bool,
    /// Runs of zeroes from this size on are not written as data.
    pub(super) sparse: u64,
    pub(super) parallel: usize,
    pub(super) in_order: bool,
    pub(super) salvage: bool,
    pub(super) rate: Option<u64>,
    pub(super) started: Instant,
    pub(super) persona: Persona,
}

impl Job {
    /// How the sources are looked through.
    pub(super) fn look(&self, unit: u64, chunk: u64) -> Look {
        Look {
            target_has_backing: self.target_has_backing,
            salvage: self.salvage,
            unit,
            chunk,
        }
    }

    /// How the sources are looked through for a plain copy.
    pub(super) fn look_for_copy(&self, chunk: u64) -> Look {
        let unit = if self.salvage {
            // What cannot be found out is told by the sector.
            SECTOR
        } else {
            self.sparse.clamp(SECTOR, chunk).next_power_of_two()
        };
        self.look(unit, chunk)
    }

    /// Whether a run is work: what only has to be passed over is none.
    pub(super) fn is_work(&self, run: &Run) -> bool {
        match run.kind {
            Kind::Data => true,
            Kind::Zero => self.sparse == 0 || !self.target_is_zero,
            Kind::Skip => false,
        }
    }

    /// Tells what could not be salvaged.
    pub(super) fn warn(&self, what: &str, offset: u64, kind: ErrorKind) {
        let text = errno::request_text(kind);
        self.persona.complain(&format!(
            "warning: error while reading {what} {offset}: {text}"
        ));
    }

    /// Waits until `done` bytes keep to the rate that was asked for.
    pub(super) fn keep_rate(&self, done: u64) {
        let Some(rate) = self.rate else { return };
        let due = std::time::Duration::from_secs_f64(done as f64 / rate as f64);
        if let Some(early) = due.checked_sub(self.started.elapsed()) {
            std::thread::sleep(early);
        }
    }
}
