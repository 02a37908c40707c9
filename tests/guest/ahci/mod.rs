//! Linux's ahci driver, its disks and its optical drives, on an adapter that `platter serve ahci` serves over vfio-user.

mod disks;
mod firmware;
mod iso;
mod optical;

use std::path::Path;

use crate::machine::Guest;

/// An adapter as the guest has it.
#[derive(Debug)]
pub(crate) struct Adapter {
    /// Its PCI address, such as `0000:01:00.0`.
    pub(crate) pci: String,
}

impl Adapter {
    /// Plugs an adapter into the guest, with the drivers of disks and optical drives.
    #[track_caller]
    pub(crate) fn plug(guest: &mut Guest, socket: &Path) -> Self {
        guest.ok("for module in sd_mod sr_mod isofs sg ahci; do modprobe $module; done");
        let pci = guest.plug_function(socket);
        Self { pci }
    }

    /// Waits for the drive of a port, counted from 0; gives its block device.
    #[track_caller]
    pub(crate) fn drive(&self, guest: &mut Guest, port: usize) -> String {
        let name = guest.wait_for(&format!(
            "cd /sys/bus/pci/devices/{pci}
            port=$(ls -d ata* | sort -V | sed -n {line}p)
            name=$(ls $port/host*/target*/*/block)
            [ -b /dev/$name ] && echo $name",
            pci = self.pci,
            line = port + 1
        ));
        format!("/dev/{name}")
    }

    /// Takes the adapter from its driver, as the end of a test does before its server ends.
    #[track_caller]
    pub(crate) fn remove(&self, guest: &mut Guest) {
        guest.ok(&format!(
            "echo 1 > /sys/bus/pci/devices/{}/remove",
            self.pci
        ));
    }
}
