//! What is saved of an HBA, for snapshots and migration.

use serde::{Deserialize, Serialize};

use super::{
    Hba,
    drive::{Device, Drive},
    interrupt::IrqState,
    port::{Port, Registers},
    regs::{cmd, is},
    work::HostWork,
};
use crate::{Error, Result, ata::DiskState, mmc::MmcState};

/// The version of [`HbaState`] that this crate writes.
pub const STATE_VERSION: u32 = 3;

/// Everything about an HBA that its configuration, its drives and their disks do not say. Saved when
/// every worker has been drained; untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HbaState {
    version: u32,
    interrupts: IrqState,
    ports: Vec<PortState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    registers: Registers,
    drive: DriveState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum DriveState {
    None,
    Disk(Box<DiskState>),
    Optical { drive: MmcState, transfer_mode: u8 },
}

impl DriveState {
    fn of(drive: Option<&Drive>) -> Self {
        match drive.map(|drive| &drive.device) {
            None => DriveState::None,
            Some(Device::Disk(disk)) => DriveState::Disk(Box::new(disk.save())),
            Some(Device::Optical(optical)) => DriveState::Optical {
                drive: optical.drive.save(),
                transfer_mode: optical.transfer_mode(),
            },
        }
    }

    fn name(&self) -> &'static str {
        match self {
            DriveState::None => "nothing",
            DriveState::Disk(_) => "a disk",
            DriveState::Optical { .. } => "an optical drive",
        }
    }
}

impl Hba {
    /// The state of the HBA. The workers of all ports are drained; commands that were issued and not
    /// taken are in it and start after the restore.
    ///
    /// # Errors
    /// [`Error::NotDrained`]; [`Error::Busy`] while a sanitize operation runs, which two servers must not
    /// do at once.
    pub fn save(&self) -> Result<HbaState> {
        let mut ports = Vec::new();
        for index in 0..u32::from(self.config().ports) {
            let port = self.shared.port(index);
            if port.taken != 0 {
                return Err(Error::NotDrained {
                    queue: index as u16,
                    in_flight: port.taken.count_ones() as usize,
                });
            }
            let work = port.drive.as_ref().and_then(|drive| drive.work.as_ref());
            if work.is_some_and(HostWork::runs_sanitize) {
                return Err(Error::Busy(format!(
                    "a sanitize operation runs on the disk in port {index}"
                )));
            }
            ports.push(PortState {
                registers: port.regs.clone(),
                drive: DriveState::of(port.drive.as_ref()),
            });
        }
        Ok(HbaState {
            version: STATE_VERSION,
            interrupts: self.shared.irq().save(),
            ports,
        })
    }

    /// Puts the HBA into a saved state. It has the same ports, and drives of the same kinds in them.
    ///
    /// # Errors
    /// [`Error::State`] for a version, port or drive that this HBA does not have, or values that no
    /// driver could have set. What it was is lost then: [`reset`](Self::reset) it.
    pub fn restore(&self, state: &HbaState) -> Result<()> {
        if state.version != STATE_VERSION {
            return Err(Error::State(format!(
                "version is {}, this is version {STATE_VERSION}",
                state.version
            )));
        }
        if state.ports.len() != usize::from(self.config().ports) {
            return Err(Error::State(format!(
                "it has {} ports, the HBA {}",
                state.ports.len(),
                self.config().ports
            )));
        }
        for (index, saved) in state.ports.iter().enumerate() {
            let has = DriveState::of(self.shared.port(index as u32).drive.as_ref());
            if std::mem::discriminant(&has) != std::mem::discriminant(&saved.drive) {
                return Err(Error::State(format!(
                    "port {index} has {}, the saved one {}",
                    has.name(),
                    saved.drive.name()
                )));
            }
        }
        self.reset();
        for (index, saved) in state.ports.iter().enumerate() {
            let mut port = self.shared.port(index as u32);
            restore_port(&mut port, saved)?;
            self.shared.interrupt(index as u32, &port, 0);
        }
        self.shared.restore_interrupts(&state.interrupts);
        for index in 0..state.ports.len() {
            self.shared.port(index as u32).ring();
        }
        Ok(())
    }
}

fn restore_port(port: &mut Port, saved: &PortState) -> Result<()> {
    match (&mut port.drive, &saved.drive) {
        (
            Some(Drive {
                device: Device::Disk(disk),
                disk: image,
                work,
            }),
            DriveState::Disk(state),
        ) => {
            disk.restore((**state).clone())?;
            if let (Some(work), Some(image)) = (work, image) {
                work.resume(image);
            }
        }
        (
            Some(Drive {
                device: Device::Optical(optical),
                ..
            }),
            DriveState::Optical {
                drive,
                transfer_mode,
            },
        ) => {
            optical.drive.restore(drive.clone())?;
            optical.restore_transfer_mode(*transfer_mode);
        }
        _ => {}
    }
    let plugged = port.drive.is_some();
    let mut regs = saved.registers.clone();
    let running = |on: bool, bit: u32| if on { bit } else { 0 };
    let writable = cmd::ST | cmd::FRE | cmd::SUD | cmd::ATAPI | cmd::CCS;
    regs.clb &= !0x3ff;
    regs.fb &= !0xff;
    regs.ie &= is::ALL;
    regs.sctl &= 0xfff;
    regs.next_slot &= 31;
    regs.link &= plugged;
    regs.cmd = regs.cmd & writable
        | port.regs.cmd & (cmd::HPCP | cmd::POD)
        | running(regs.cmd & cmd::ST != 0, cmd::CR)
        | running(regs.cmd & cmd::FRE != 0, cmd::FR);
    port.regs = regs;
    Ok(())
}
