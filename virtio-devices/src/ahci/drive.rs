//! What is plugged into a port: a device, and the disk behind it.

use block::{AsyncDiskFile, ErrorKind};

use crate::ata::{AtaDisk, Payload, Registers, Step, TaskFile, opcode};

/// A device of either kind.
#[derive(Debug)]
pub(super) enum Device {
    Disk(AtaDisk),
}

/// A drive in a port.
pub(super) struct Drive {
    pub(super) device: Device,
    /// What data planes are made of; `None` without a medium.
    pub(super) disk: Option<Box<dyn AsyncDiskFile>>,
}

impl Drive {
    pub(super) fn reset(&mut self, hard: bool) {
        match &mut self.device {
            Device::Disk(disk) => disk.reset(hard),
        }
    }

    pub(super) fn signature(&self) -> Registers {
        match &self.device {
            Device::Disk(_) => AtaDisk::signature(),
        }
    }

    /// Whether it is a queued command of this device.
    pub(super) fn is_queued(&self, task: &TaskFile) -> bool {
        let Device::Disk(_) = &self.device;
        matches!(
            task.command,
            opcode::READ_FPDMA_QUEUED
                | opcode::WRITE_FPDMA_QUEUED
                | opcode::NCQ_NON_DATA
                | opcode::SEND_FPDMA_QUEUED
                | opcode::RECEIVE_FPDMA_QUEUED
        )
    }

    pub(super) fn command(&mut self, task: &TaskFile) -> Step {
        match &mut self.device {
            Device::Disk(disk) => disk.command(task),
        }
    }

    pub(super) fn data_out(&mut self, task: &TaskFile, payload: Payload, data: &[u8]) -> Step {
        match &mut self.device {
            Device::Disk(disk) => disk.data_out(task, payload, data),
        }
    }

    pub(super) fn finish(&mut self, task: &TaskFile, result: Result<(), ErrorKind>) -> Registers {
        match &mut self.device {
            Device::Disk(disk) => disk.finish(task, result),
        }
    }

    pub(super) fn queue_error(&mut self, task: &TaskFile, registers: Registers, queued: bool) {
        match &mut self.device {
            Device::Disk(disk) => disk.queue_error(task, registers, queued),
        }
    }
}
