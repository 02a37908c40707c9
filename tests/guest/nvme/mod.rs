//! Linux's nvme driver on controllers that `platter serve nvme` serves over vfio-user.

mod commands;
mod live;

use std::path::Path;

use crate::machine::Guest;

/// A controller as the guest has it.
#[derive(Debug)]
pub(crate) struct Controller {
    /// Its PCI address, such as `0000:01:00.0`.
    pub(crate) pci: String,
    /// Its name, such as `nvme0`.
    pub(crate) name: String,
}

impl Controller {
    /// Plugs a controller into the guest, and waits until its driver has taken it.
    #[track_caller]
    pub(crate) fn plug(guest: &mut Guest, socket: &Path) -> Self {
        let pci = guest.plug_function(socket);
        Self::find(guest, pci)
    }

    /// Waits until the driver has taken the controller at a PCI address.
    #[track_caller]
    pub(crate) fn find(guest: &mut Guest, pci: String) -> Self {
        let folder = format!("/sys/bus/pci/devices/{pci}/nvme");
        let name = guest.wait_for(&format!(
            "name=$(ls {folder}) && [ \"$(cat {folder}/$name/state)\" = live ] && echo $name"
        ));
        Self { pci, name }
    }

    /// Waits for a namespace; gives its block device.
    #[track_caller]
    pub(crate) fn namespace(&self, guest: &mut Guest, nsid: u32) -> String {
        // With more than one controller in a subsystem, the namespace is a device of the subsystem.
        let name = guest.wait_for(&format!(
            "for subsystem in /sys/class/nvme-subsystem/*; do
                [ -e $subsystem/{name} ] || continue
                for place in $subsystem/nvme*n* $subsystem/{name}/nvme*n*; do
                    [ -e $place/nsid ] && [ \"$(cat $place/nsid)\" = {nsid} ] || continue
                    block=$(basename $place)
                    [ -b /dev/$block ] && [ \"$(cat $place/size)\" -gt 0 ] && echo $block && exit 0
                done
            done
            exit 1",
            name = self.name
        ));
        format!("/dev/{name}")
    }

    /// Takes the controller from its driver, as the end of a test does before its server ends.
    #[track_caller]
    pub(crate) fn remove(&self, guest: &mut Guest) {
        guest.ok(&format!(
            "echo 1 > /sys/bus/pci/devices/{}/remove",
            self.pci
        ));
    }
}
