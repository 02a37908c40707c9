//! What is plugged into a port: a device, and the disk behind it.

use std::sync::Arc;

use block::{AsyncDiskFile, ErrorKind};

use super::work::HostWork;
use crate::{
    ata::{AtaDisk, AtapiDrive, Payload, Registers, Step, TaskFile, opcode},
    mmc::Cdb,
};

/// A device of either kind.
#[derive(Debug)]
pub(super) enum Device {
    Disk(AtaDisk),
    Optical(AtapiDrive),
}

/// A drive in a port.
pub(super) struct Drive {
    pub(super) device: Device,
    /// What data planes are made of; `None` without a medium. Shared, so that what waits for
    /// requests in flight can be done without the lock of the port, which they need to end.
    pub(super) disk: Option<Arc<dyn AsyncDiskFile>>,
    /// Of a disk that is protected: the thread for that. Dropping it waits for what it does.
    pub(super) work: Option<HostWork>,
}

impl Drive {
    pub(super) fn reset(&mut self, hard: bool) {
        match &mut self.device {
            Device::Disk(disk) => disk.reset(hard),
            Device::Optical(drive) => drive.reset(),
        }
    }

    pub(super) fn signature(&self) -> Registers {
        match &self.device {
            Device::Disk(_) => AtaDisk::signature(),
            Device::Optical(_) => AtapiDrive::signature(),
        }
    }

    /// Whether it is a queued command of this device.
    pub(super) fn is_queued(&self, task: &TaskFile) -> bool {
        matches!(self.device, Device::Disk(_))
            && matches!(
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
            Device::Optical(drive) => drive.command(task),
        }
    }

    pub(super) fn data_out(&mut self, task: &TaskFile, payload: Payload, data: &[u8]) -> Step {
        match &mut self.device {
            Device::Disk(disk) => disk.data_out(task, payload, data),
            Device::Optical(drive) => drive.data_out(task, data),
        }
    }

    pub(super) fn finish(&mut self, task: &TaskFile, result: Result<(), ErrorKind>) -> Registers {
        match &mut self.device {
            Device::Disk(disk) => disk.finish(task, result),
            Device::Optical(drive) => drive.finish(task, result),
        }
    }

    pub(super) fn queue_error(&mut self, task: &TaskFile, registers: Registers, queued: bool) {
        if let Device::Disk(disk) = &mut self.device {
            disk.queue_error(task, registers, queued);
        }
    }

    /// The host forgets every command that the device has.
    pub(super) fn forget(&self) {
        if let Some(work) = &self.work {
            work.cancel();
        }
    }

    /// The packet of a PACKET command; only optical drives ask for one.
    pub(super) fn packet(&mut self, task: &TaskFile, cdb: &Cdb) -> Option<Step> {
        match &mut self.device {
            Device::Disk(_) => None,
            Device::Optical(drive) => Some(drive.packet(task, cdb)),
        }
    }

    /// Movements of the tray so far, and whether it is open; of an optical drive.
    pub(super) fn tray(&self) -> Option<(u64, bool)> {
        match &self.device {
            Device::Disk(_) => None,
            Device::Optical(drive) => Some((drive.drive.tray_moves(), drive.drive.is_open())),
        }
    }
}
