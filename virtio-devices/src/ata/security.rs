//! The Security feature set (ACS-3, 4.18): states SEC0 to SEC6, passwords, SECURITY ERASE UNIT.

use block::{AsyncDiskFile, ErrorKind};

use super::{
    AtaDisk, Payload, Protocol, Registers, Step, TaskFile, Work,
    password::{self, Password},
    protection::{Kept, Protection, State},
};
use crate::ata::opcode;

/// Bytes that come with a command.
const DATA: u32 = 512;

/// Bits of the control word.
const MASTER: u16 = 1;
const ENHANCED: u16 = 1 << 1;
const MAXIMUM: u16 = 1 << 8;

/// What a security command brings: control word, password, and for a master password its identifier.
pub(super) struct Given {
    control: u16,
    text: [u8; password::LEN],
    identifier: u16,
}

impl Given {
    pub(super) fn parse(data: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_le_bytes([*data.get(at)?, *data.get(at + 1)?]));
        Some(Self {
            control: word(0)?,
            text: data.get(2..2 + password::LEN)?.try_into().ok()?,
            identifier: word(2 + password::LEN)?,
        })
    }

    fn is_master(&self) -> bool {
        self.control & MASTER != 0
    }

    /// Whether it is the password that is set. Without a user password there is nothing to compare one
    /// with, and until a master password was set nothing is one.
    fn matches(&self, kept: &Kept) -> bool {
        let password = if self.is_master() {
            &kept.master
        } else {
            &kept.user
        };
        password
            .as_ref()
            .is_some_and(|password| password.is(&self.text))
    }

    /// The master password opens a disk only with the capability high.
    fn opens(&self, kept: &Kept) -> bool {
        let may = !self.is_master() || !kept.maximum;
        may && self.matches(kept)
    }
}

impl AtaDisk {
    /// The commands F1h to F6h. What brings a password goes on in [`execute`].
    pub(super) fn security(&mut self, task: &TaskFile) -> Step {
        let Some(protection) = &self.protection else {
            return self.abort(task);
        };
        let now = protection.state().now;
        let expired = now.attempts == 0;
        let refused = match task.command {
            opcode::SECURITY_SET_PASSWORD | opcode::SECURITY_DISABLE_PASSWORD => {
                now.frozen || now.locked
            }
            opcode::SECURITY_UNLOCK => now.frozen || expired,
            opcode::SECURITY_ERASE_UNIT => {
                let prepared = protection.change(|now| std::mem::take(&mut now.prepared));
                now.frozen || expired || !prepared
            }
            opcode::SECURITY_ERASE_PREPARE => now.frozen,
            _ => now.locked,
        };
        if refused {
            return self.abort(task);
        }
        match task.command {
            opcode::SECURITY_ERASE_PREPARE => protection.change(|now| now.prepared = true),
            opcode::SECURITY_FREEZE_LOCK => protection.change(|now| now.frozen = true),
            _ => {
                return Step::Out {
                    protocol: Protocol::Pio { block: DATA },
                    len: DATA,
                    payload: Payload::Password,
                };
            }
        }
        Step::End(Registers::ready(task))
    }

    /// The password has come. To compare it takes long, on purpose, and to remember one writes a file.
    pub(super) fn password(&mut self, task: &TaskFile, data: &[u8]) -> Step {
        match (&self.protection, Given::parse(data)) {
            (Some(protection), Some(given)) => {
                protection.uncancel();
                Step::Work(Work::password(task.command, given))
            }
            _ => self.abort(task),
        }
    }

    /// Words 82, 85, 89, 90, 92 and 128 of IDENTIFY DEVICE: supported, enabled, the identifier of the
    /// master password, the state. How long an erase takes is not known.
    pub(super) fn security_words(&self) -> Option<(bool, u16, u16)> {
        let state = self.protection.as_ref()?.state();
        Some((
            state.is_enabled(),
            state.kept.master_identifier,
            word_128(&state),
        ))
    }
}

/// Whether a command gets at the data of a disk, or changes its passwords: not while it is locked.
pub(super) fn is_refused_when_locked(task: &TaskFile) -> bool {
    matches!(
        task.command,
        opcode::READ_SECTORS
            | opcode::READ_SECTORS_NORETRY
            | opcode::READ_SECTORS_EXT
            | opcode::READ_DMA
            | opcode::READ_DMA_NORETRY
            | opcode::READ_DMA_EXT
            | opcode::READ_MULTIPLE
            | opcode::READ_MULTIPLE_EXT
            | opcode::WRITE_SECTORS
            | opcode::WRITE_SECTORS_NORETRY
            | opcode::WRITE_SECTORS_EXT
            | opcode::WRITE_DMA
            | opcode::WRITE_DMA_NORETRY
            | opcode::WRITE_DMA_EXT
            | opcode::WRITE_DMA_FUA_EXT
            | opcode::WRITE_MULTIPLE
            | opcode::WRITE_MULTIPLE_EXT
            | opcode::WRITE_MULTIPLE_FUA_EXT
            | opcode::READ_FPDMA_QUEUED
            | opcode::WRITE_FPDMA_QUEUED
            | opcode::SEND_FPDMA_QUEUED
            | opcode::RECEIVE_FPDMA_QUEUED
            | opcode::READ_VERIFY
            | opcode::READ_VERIFY_NORETRY
            | opcode::READ_VERIFY_EXT
            | opcode::FLUSH_CACHE
            | opcode::FLUSH_CACHE_EXT
            | opcode::DATA_SET_MANAGEMENT
    )
}

/// Word 128: supported, enabled, locked, frozen, count expired, level maximum.
fn word_128(state: &State) -> u16 {
    1 | u16::from(state.is_enabled()) << 1
        | u16::from(state.now.locked) << 2
        | u16::from(state.now.frozen) << 3
        | u16::from(state.now.attempts == 0) << 4
        | u16::from(state.kept.maximum) << 8
}

/// Does a command that brought a password; an error ends it with ABRT.
pub(super) fn execute(
    protection: &Protection,
    command: u8,
    given: &Given,
    disk: &dyn AsyncDiskFile,
) -> Result<(), ErrorKind> {
    const WRONG: Result<(), ErrorKind> = Err(ErrorKind::InvalidArgument);
    let State { kept, now } = protection.state();
    match command {
        opcode::SECURITY_SET_PASSWORD => {
            let password = Password::new(&given.text).map_err(|_| ErrorKind::Io(libc::EIO))?;
            protection.keep(|kept| {
                if given.is_master() {
                    kept.master = Some(password);
                    if !matches!(given.identifier, 0 | 0xffff) {
                        kept.master_identifier = given.identifier;
                    }
                } else {
                    kept.user = Some(password);
                    kept.maximum = given.control & MAXIMUM != 0;
                }
            })
        }
        opcode::SECURITY_UNLOCK => {
            if given.opens(&kept) {
                protection.change(|now| now.locked = false);
                return Ok(());
            }
            // A master password that may not open is not even compared.
            if now.locked && !(given.is_master() && kept.maximum) {
                protection.change(|now| now.attempts = now.attempts.saturating_sub(1));
            }
            WRONG
        }
        opcode::SECURITY_DISABLE_PASSWORD if given.opens(&kept) => disable(protection),
        opcode::SECURITY_ERASE_UNIT if given.control & ENHANCED == 0 && given.matches(&kept) => {
            protection.erase_unit(disk)?;
            disable(protection)
        }
        _ => WRONG,
    }
}

/// There is no user password any more; the master password stays.
fn disable(protection: &Protection) -> Result<(), ErrorKind> {
    protection.keep(|kept| {
        kept.user = None;
        kept.maximum = false;
    })?;
    protection.change(|now| now.locked = false);
    Ok(())
}
