//! The host's side of optical drives: open and close trays, change media.

use std::sync::Arc;

use block::AsyncDiskFile;

use super::{
    Hba,
    drive::{Device, Drive},
};
use crate::{Error, Result, mmc::MmcDrive};

impl Hba {
    /// Opens the tray of an optical drive. If the guest has locked it, it stays closed unless
    /// `force`d, and the guest is asked to eject.
    ///
    /// # Errors
    /// [`Error::Tray`]; [`Error::NoSuchQueue`] and [`Error::NoOpticalDrive`] for the wrong port.
    pub fn open_tray(&self, port: u8, force: bool) -> Result<()> {
        self.with_tray(port, |drive, _| Ok(drive.open_tray(force)?))
    }

    /// Closes the tray of an optical drive. A medium in it is a new one to the guest.
    ///
    /// # Errors
    /// As [`open_tray`](Self::open_tray).
    pub fn close_tray(&self, port: u8) -> Result<()> {
        self.with_tray(port, |drive, _| {
            drive.close_tray();
            Ok(())
        })
    }

    /// Puts a medium into the open tray.
    ///
    /// # Errors
    /// As [`open_tray`](Self::open_tray).
    pub fn insert_medium(&self, port: u8, medium: Box<dyn AsyncDiskFile>) -> Result<()> {
        self.with_tray(port, |drive, disk| {
            drive.insert(medium.size())?;
            *disk = Some(Arc::from(medium));
            Ok(())
        })
    }

    /// Takes the medium out of the open tray and returns it; its worker gives its data plane back
    /// with the next call of `process`.
    ///
    /// # Errors
    /// As [`open_tray`](Self::open_tray).
    pub fn remove_medium(&self, port: u8) -> Result<Option<Arc<dyn AsyncDiskFile>>> {
        self.with_tray(port, |drive, disk| {
            drive.eject()?;
            Ok(disk.take())
        })
    }

    /// Whether the tray of an optical drive is open, and whether the guest has locked it.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`] and [`Error::NoOpticalDrive`] for the wrong port.
    pub fn tray(&self, port: u8) -> Result<(bool, bool)> {
        self.with_tray(port, |drive, _| Ok((drive.is_open(), drive.is_locked())))
    }

    fn with_tray<R>(
        &self,
        port: u8,
        change: impl FnOnce(&mut MmcDrive, &mut Option<Arc<dyn AsyncDiskFile>>) -> Result<R>,
    ) -> Result<R> {
        let index = self.check(port)?;
        let mut port_state = self.shared.port(index);
        let Some(Drive {
            device: Device::Optical(drive),
            disk,
            ..
        }) = &mut port_state.drive
        else {
            return Err(Error::NoOpticalDrive { port });
        };
        let had = disk.is_some();
        let result = change(&mut drive.drive, disk)?;
        if had != disk.is_some() {
            port_state.drive_changes += 1;
            port_state.ring();
        }
        Ok(result)
    }
}
