//! The Sanitize Device feature set (ACS-3, 4.17, and the antifreeze lock of ACS-4): states SD0 to SD4.

use super::{
    AtaDisk, Registers, Step, TaskFile, Work, error, opcode,
    protection::{Outcome, State},
};
use crate::host::Action;

const STATUS: u16 = 0x0000;
const BLOCK_ERASE: u16 = 0x0012;
const OVERWRITE: u16 = 0x0014;
const FREEZE_LOCK: u16 = 0x0020;
const ANTIFREEZE_LOCK: u16 = 0x0040;

/// What LBA has to say.
const BLOCK_ERASE_KEY: u64 = 0x426b_4572;
const OVERWRITE_KEY: u64 = 0x4f57;
const FREEZE_KEY: u64 = 0x4672_4c6b;
const ANTIFREEZE_KEY: u64 = 0x416e_7469;

/// Bits of Count.
const CLEAR_FAILED: u16 = 1;
const FAILURE_MODE: u16 = 1 << 4;
const ENDING_PATTERN: u16 = 1 << 6;
const INVERT: u16 = 1 << 7;

/// Why a command was aborted, in LBA 7:0.
mod reason {
    pub(super) const NONE: u64 = 0;
    pub(super) const UNSUCCESSFUL: u64 = 1;
    pub(super) const UNSUPPORTED: u64 = 2;
    pub(super) const FROZEN: u64 = 3;
    pub(super) const ANTIFREEZE: u64 = 4;
}

/// Word 59 of IDENTIFY DEVICE: block erase, overwrite, the feature set, the commands of ACS-3 while it
/// works, the antifreeze lock.
pub(super) const WORD_59: u16 = 0xdc00;

/// Security capabilities of log 30h, page 06h: the same.
pub(super) const CAPABILITIES: u64 = 0x7a;

/// What an operation that this command asks for does, if its key is right.
fn action(task: &TaskFile) -> Option<Action> {
    let count = task.count;
    match task.features {
        BLOCK_ERASE if task.lba == BLOCK_ERASE_KEY => Some(Action::BlockErase),
        OVERWRITE if task.lba >> 32 == OVERWRITE_KEY => {
            let (pattern, passes) = (task.lba as u32, (count & 15) as u8);
            let invert = count & INVERT != 0;
            // The first pass writes the pattern, unless the last one has to.
            let ends_inverted = invert && count & ENDING_PATTERN == 0 && passes.is_multiple_of(2);
            Some(Action::Overwrite {
                pattern: if ends_inverted { !pattern } else { pattern },
                passes,
                invert,
            })
        }
        _ => None,
    }
}

impl AtaDisk {
    /// SANITIZE DEVICE.
    pub(super) fn sanitize(&mut self, task: &TaskFile) -> Step {
        let Some(protection) = &self.protection else {
            return self.abort(task);
        };
        let state = protection.state();
        let result = match task.features {
            STATUS => status(task, &state),
            FREEZE_LOCK if task.lba != FREEZE_KEY || state.is_sanitizing() => Err(reason::NONE),
            FREEZE_LOCK if state.now.antifreeze => Err(reason::ANTIFREEZE),
            FREEZE_LOCK => {
                protection.change(|now| now.sanitize_frozen = true);
                Ok(None)
            }
            ANTIFREEZE_LOCK if task.lba != ANTIFREEZE_KEY => Err(reason::NONE),
            ANTIFREEZE_LOCK if state.now.sanitize_frozen => Err(reason::FROZEN),
            ANTIFREEZE_LOCK => {
                protection.change(|now| now.antifreeze = true);
                Ok(None)
            }
            BLOCK_ERASE | OVERWRITE => start(task, &state).map(Some),
            _ => Err(reason::UNSUPPORTED),
        };
        match result {
            Ok(Some(work)) => Step::Work(work),
            Ok(None) => Step::End(self.sanitize_registers(task)),
            Err(reason) => Step::End(Registers {
                count: 0,
                lba: reason,
                ..Registers::failed(task, error::ABRT)
            }),
        }
    }

    /// How all of these commands end that end well: the state in Count, the progress in LBA.
    pub(super) fn sanitize_registers(&self, task: &TaskFile) -> Registers {
        let Some(protection) = &self.protection else {
            return Registers::failed(task, error::ABRT);
        };
        let state = protection.state();
        let outcome = state.outcome();
        Registers {
            count: u16::from(outcome == Some(Outcome::Succeeded)) << 15
                | u16::from(outcome == Some(Outcome::Running)) << 14
                | u16::from(state.now.sanitize_frozen) << 13
                | u16::from(state.now.antifreeze) << 12,
            lba: u64::from(protection.progress()),
            ..Registers::ready(task)
        }
    }
}

/// SANITIZE STATUS EXT: it fails after an operation that failed, and may leave that state.
fn status(task: &TaskFile, state: &State) -> Result<Option<Work>, u64> {
    match state.kept.sanitize {
        Some(failed) if failed.outcome == Outcome::Failed => {
            if task.count & CLEAR_FAILED != 0 && failed.failure_mode {
                Ok(Some(Work::leave_failure()))
            } else {
                Err(reason::UNSUCCESSFUL)
            }
        }
        _ => Ok(None),
    }
}

/// A sanitize operation, if the state of the disk allows one.
fn start(task: &TaskFile, state: &State) -> Result<Work, u64> {
    let action = action(task).ok_or(reason::NONE)?;
    if state.now.sanitize_frozen {
        return Err(reason::FROZEN);
    }
    let failure_mode = task.count & FAILURE_MODE != 0;
    // What failed without the mode is left by an operation without the mode.
    let restricted = state.outcome() == Some(Outcome::Failed)
        && state.kept.sanitize.is_some_and(|it| !it.failure_mode);
    let running = state.outcome() == Some(Outcome::Running);
    if state.now.locked || running || (restricted && failure_mode) {
        return Err(reason::NONE);
    }
    Ok(Work::sanitize(action, failure_mode))
}

/// Whether a command may be begun in SD2 and SD3 (ACS-3, 4.17.6).
pub(super) fn is_allowed_meanwhile(task: &TaskFile) -> bool {
    match task.command {
        opcode::IDENTIFY_DEVICE
        | opcode::CHECK_POWER_MODE
        | opcode::CHECK_POWER_MODE_OLD
        | opcode::SANITIZE_DEVICE
        | opcode::SECURITY_UNLOCK => true,
        opcode::READ_LOG_EXT | opcode::READ_LOG_DMA_EXT => {
            matches!(task.lba as u8, 0x10 | 0x30 | 0xe0)
        }
        opcode::SMART => task.features & 0xff == 0xda,
        _ => false,
    }
}
