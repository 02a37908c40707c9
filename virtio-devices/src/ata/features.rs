//! SET FEATURES, SET MULTIPLE MODE, INITIALIZE DEVICE PARAMETERS, and the power modes.

use super::{
    AtaDisk, Registers, Step, TaskFile,
    disk::{MAX_MULTIPLE, Power},
    opcode,
};

impl AtaDisk {
    /// SET FEATURES (ACS-3, 7.45).
    pub(super) fn set_features(&mut self, task: &TaskFile) -> Step {
        let state = &mut self.state;
        match task.features & 0xff {
            0x02 => state.write_cache = true,
            0x82 => {
                state.write_cache = false;
                // What the cache holds has to be durable before this ends.
                return Step::Flush;
            }
            0x03 if is_transfer_mode(task.count as u8) => state.transfer_mode = task.count as u8,
            0x55 => state.look_ahead = false,
            0xaa => state.look_ahead = true,
            0x66 => state.keep_on_reset = true,
            0xcc => state.keep_on_reset = false,
            // Software settings preservation; the other SATA features are not offered.
            0x10 if task.count & 0xff == 6 => state.preserve_settings = true,
            0x90 if task.count & 0xff == 6 => state.preserve_settings = false,
            _ => return self.abort(task),
        }
        Step::End(Registers::ready(task))
    }

    /// SET MULTIPLE MODE.
    pub(super) fn set_multiple(&mut self, task: &TaskFile) -> Step {
        let count = task.count as u8;
        if count != 0 && (!count.is_power_of_two() || count > MAX_MULTIPLE) {
            return self.abort(task);
        }
        self.state.multiple = count;
        Step::End(Registers::ready(task))
    }

    /// INITIALIZE DEVICE PARAMETERS: the geometry for addresses that are not LBA.
    pub(super) fn initialize_parameters(&mut self, task: &TaskFile) -> Step {
        let (heads, sectors) = ((task.device & 0xf) + 1, task.count as u8);
        if sectors == 0 {
            return self.abort(task);
        }
        self.state.geometry = (heads, sectors);
        Step::End(Registers::ready(task))
    }

    /// STANDBY, IDLE, their immediate forms, CHECK POWER MODE and SLEEP. The timers of STANDBY and
    /// IDLE are accepted and never expire: a virtual disk saves nothing by standing by.
    pub(super) fn power(&mut self, task: &TaskFile) -> Step {
        let power = match task.command {
            opcode::STANDBY_IMMEDIATE
            | opcode::STANDBY_IMMEDIATE_OLD
            | opcode::STANDBY
            | opcode::STANDBY_OLD => Power::Standby,
            opcode::IDLE_IMMEDIATE
            | opcode::IDLE_IMMEDIATE_OLD
            | opcode::IDLE
            | opcode::IDLE_OLD => Power::Idle,
            opcode::SLEEP | opcode::SLEEP_OLD => Power::Sleep,
            opcode::CHECK_POWER_MODE | opcode::CHECK_POWER_MODE_OLD => {
                let mut registers = Registers::ready(task);
                registers.count = match self.state.power {
                    Power::Active => 0xff,
                    Power::Idle => 0x80,
                    Power::Standby | Power::Sleep => 0x00,
                };
                return Step::End(registers);
            }
            _ => return self.abort(task),
        };
        self.state.power = power;
        match power {
            // A disk that stops spinning has written its cache.
            Power::Standby | Power::Sleep => Step::Flush,
            _ => Step::End(Registers::ready(task)),
        }
    }
}

/// PIO default, PIO 0 to 4, multiword DMA 0 to 2, ultra DMA 0 to 6.
pub(super) fn is_transfer_mode(mode: u8) -> bool {
    matches!(mode, 0x00 | 0x01 | 0x08..=0x0c | 0x20..=0x22 | 0x40..=0x46)
}
