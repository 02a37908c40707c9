//! Which command of an ATA disk goes where.

use super::{
    AtaDisk, Payload, Protocol, Registers, Step, TaskFile, disk::Power, opcode, sanitize, security,
};

impl AtaDisk {
    /// Starts a command.
    pub fn command(&mut self, task: &TaskFile) -> Step {
        if self.state.power == Power::Sleep {
            return self.abort(task);
        }
        if !self.admits(task) {
            return self.abort(task);
        }
        let pio = Protocol::Pio {
            block: self.config.logical_sector,
        };
        match task.command {
            opcode::READ_SECTORS | opcode::READ_SECTORS_NORETRY => self.rw28(task, pio, false),
            opcode::WRITE_SECTORS | opcode::WRITE_SECTORS_NORETRY => self.rw28(task, pio, true),
            opcode::READ_DMA | opcode::READ_DMA_NORETRY => self.rw28(task, Protocol::Dma, false),
            opcode::WRITE_DMA | opcode::WRITE_DMA_NORETRY => self.rw28(task, Protocol::Dma, true),
            opcode::READ_SECTORS_EXT => self.rw48(task, pio, false, false),
            opcode::WRITE_SECTORS_EXT => self.rw48(task, pio, true, false),
            opcode::READ_DMA_EXT => self.rw48(task, Protocol::Dma, false, false),
            opcode::WRITE_DMA_EXT => self.rw48(task, Protocol::Dma, true, false),
            opcode::WRITE_DMA_FUA_EXT => self.rw48(task, Protocol::Dma, true, true),
            opcode::READ_MULTIPLE
            | opcode::WRITE_MULTIPLE
            | opcode::READ_MULTIPLE_EXT
            | opcode::WRITE_MULTIPLE_EXT
            | opcode::WRITE_MULTIPLE_FUA_EXT => self.multiple(task),
            opcode::READ_FPDMA_QUEUED
            | opcode::WRITE_FPDMA_QUEUED
            | opcode::SEND_FPDMA_QUEUED
            | opcode::RECEIVE_FPDMA_QUEUED => self.queued(task),
            opcode::READ_VERIFY | opcode::READ_VERIFY_NORETRY | opcode::READ_VERIFY_EXT => {
                self.verify(task)
            }
            opcode::FLUSH_CACHE | opcode::FLUSH_CACHE_EXT => Step::Flush,
            opcode::DATA_SET_MANAGEMENT => self.data_set_management(task),
            opcode::IDENTIFY_DEVICE => Step::In {
                protocol: Protocol::Pio { block: 512 },
                data: self.identify().to_vec(),
            },
            opcode::SET_FEATURES => self.set_features(task),
            opcode::SET_MULTIPLE_MODE => self.set_multiple(task),
            opcode::INITIALIZE_DEVICE_PARAMETERS => self.initialize_parameters(task),
            opcode::READ_NATIVE_MAX | opcode::READ_NATIVE_MAX_EXT => self.native_max(task),
            opcode::SEEK..=0x7f | opcode::RECALIBRATE..=0x1f => Step::End(Registers::ready(task)),
            opcode::EXECUTE_DEVICE_DIAGNOSTIC => Step::End(Self::signature()),
            opcode::STANDBY_IMMEDIATE..=opcode::SLEEP
            | opcode::STANDBY_IMMEDIATE_OLD..=opcode::SLEEP_OLD => self.power(task),
            opcode::SMART => self.smart(task),
            opcode::SANITIZE_DEVICE => self.sanitize(task),
            opcode::SECURITY_SET_PASSWORD..=opcode::SECURITY_DISABLE_PASSWORD => {
                self.security(task)
            }
            opcode::READ_LOG_EXT | opcode::READ_LOG_DMA_EXT => self.read_log_command(task),
            opcode::WRITE_LOG_EXT | opcode::WRITE_LOG_DMA_EXT => self.write_log_command(task),
            // NOP always ends like this; so does everything that is not offered.
            _ => self.abort(task),
        }
    }

    /// Goes on with the data that a [`Step::Out`] asked for.
    pub fn data_out(&mut self, task: &TaskFile, payload: Payload, data: &[u8]) -> Step {
        match payload {
            Payload::Trim => self.trim(task, data),
            Payload::Log { address, page } => {
                self.state.host_logs.write(address, page, data);
                Step::End(Registers::ready(task))
            }
            Payload::Password => self.password(task, data),
            Payload::Parameters => self.abort(task),
        }
    }

    /// Whether a lock or a sanitize operation lets a command begin.
    fn admits(&self, task: &TaskFile) -> bool {
        let Some(protection) = self.protection.as_ref().filter(|it| it.restricts()) else {
            return true;
        };
        if task.command != opcode::SECURITY_ERASE_UNIT {
            // What was prepared has to follow at once.
            protection.change(|now| now.prepared = false);
        }
        let state = protection.state();
        let sanitizes = state.is_sanitizing() && !sanitize::is_allowed_meanwhile(task);
        let locked = state.now.locked && security::is_refused_when_locked(task);
        !sanitizes && !locked
    }
}
