//! A PCI function with one disk, whichever kind it is: what the tests of storage are about.

use std::path::{Path, PathBuf};

use crate::ahci::Adapter;
use crate::lab::Workplace;
use crate::lab::function::FunctionServer;
use crate::machine::Guest;
use crate::nvme::Controller;

/// A kind of PCI function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The disk is namespace 1.
    Nvme,
    /// The disk is in port 0.
    Ahci,
}

impl Kind {
    /// Serves one image as the only disk.
    #[track_caller]
    pub(crate) fn serve(self, workplace: &Workplace, image: &Path, format: &str) -> FunctionServer {
        self.serve_with(workplace, image, format, &[])
    }

    /// The same with a control socket, whose path it gives, too.
    #[track_caller]
    pub(crate) fn serve_controlled(
        self,
        workplace: &Workplace,
        image: &Path,
        format: &str,
    ) -> (FunctionServer, PathBuf) {
        let control = workplace.socket("control");
        let path = control.to_str().expect("a plain path");
        let server = self.serve_with(workplace, image, format, &["--control", path]);
        (server, control)
    }

    #[track_caller]
    fn serve_with(
        self,
        workplace: &Workplace,
        image: &Path,
        format: &str,
        more: &[&str],
    ) -> FunctionServer {
        let (device, option) = match self {
            Self::Nvme => ("nvme", "--namespace"),
            Self::Ahci => ("ahci", "--disk"),
        };
        let disk = format!("{},format={format}", image.display());
        let mut arguments = vec![option, disk.as_str()];
        arguments.extend(more);
        FunctionServer::start(workplace, device, device, &arguments)
    }

    /// Plugs the function into the guest.
    #[track_caller]
    pub(crate) fn plug(self, guest: &mut Guest, socket: &Path) -> Function {
        match self {
            Self::Nvme => Function::Nvme(Controller::plug(guest, socket)),
            Self::Ahci => Function::Ahci(Adapter::plug(guest, socket)),
        }
    }
}

/// A function in a guest.
#[derive(Debug)]
pub(crate) enum Function {
    /// A controller.
    Nvme(Controller),
    /// A host bus adapter.
    Ahci(Adapter),
}

impl Function {
    fn pci(&self) -> &str {
        match self {
            Self::Nvme(controller) => &controller.pci,
            Self::Ahci(adapter) => &adapter.pci,
        }
    }

    /// Waits for the disk; gives its block device.
    #[track_caller]
    pub(crate) fn disk(&self, guest: &mut Guest) -> String {
        match self {
            Self::Nvme(controller) => controller.namespace(guest, 1),
            Self::Ahci(adapter) => adapter.drive(guest, 0),
        }
    }

    /// Expects that the driver uses all that the function offers: a queue for each of the two processors, or queued
    /// commands, with messages as interrupts; and that each of these has been of use.
    #[track_caller]
    pub(crate) fn expect_queues(&self, guest: &mut Guest, device: &str) {
        let (interrupts, queues) = match self {
            Self::Nvme(Controller { name, .. }) => {
                let count = guest.ok(&format!("cat /sys/class/nvme/{name}/queue_count"));
                assert_eq!(count, "3", "the third is for administration");
                let script = format!("grep -E ' {name}q[1-9]' /proc/interrupts");
                (guest.ok(&script), 2)
            }
            Self::Ahci(Adapter { pci }) => {
                let name = device.trim_start_matches("/dev/");
                let depth = guest.ok(&format!("cat /sys/block/{name}/device/queue_depth"));
                assert!(matches!(depth.trim(), "31" | "32"), "{depth}");
                let script = format!(
                    "for irq in $(ls /sys/bus/pci/devices/{pci}/msi_irqs); do grep \"^ *$irq:\" /proc/interrupts; done"
                );
                (guest.ok(&script), 1)
            }
        };
        assert_eq!(interrupts.lines().count(), queues, "{interrupts}");
        for queue in interrupts.lines() {
            assert!(queue.contains("MSI"), "{interrupts}");
            let counts = queue
                .split_whitespace()
                .skip(1)
                .map_while(|field| field.parse::<u64>().ok());
            assert_ne!(counts.sum::<u64>(), 0, "a queue is idle: {interrupts}");
        }
    }

    /// Has the driver reset the controller, or the port of the disk; both are done when this returns.
    #[track_caller]
    pub(crate) fn reset(&self, guest: &mut Guest, device: &str) {
        match self {
            Self::Nvme(Controller { name, .. }) => guest.ok(&format!(
                "echo 1 > /sys/class/nvme/{name}/reset_controller
                [ $(cat /sys/class/nvme/{name}/state) = live ]"
            )),
            // A scan of all its addresses begins with a COMRESET of the port.
            Self::Ahci(_) => guest.ok(&format!(
                "resets() {{ dmesg | grep -c 'SATA link up' || true; }}
                before=$(resets)
                for scan in /sys/block/{name}/device/../../scsi_host/host*/scan; do echo '- - -' > $scan; done
                [ $(resets) -gt $before ]",
                name = device.trim_start_matches("/dev/")
            )),
        };
    }

    /// Takes the function from its driver and gives it back. What was in flight in between may have failed, of which
    /// the kernel may have complained.
    #[track_caller]
    pub(crate) fn rebind(&mut self, guest: &mut Guest, device: &str) {
        let driver = match self {
            Self::Nvme(_) => "nvme",
            Self::Ahci(_) => "ahci",
        };
        let pci = self.pci().to_owned();
        guest.ok(&format!(
            "echo {pci} > /sys/bus/pci/drivers/{driver}/unbind
            [ ! -e {device} ]
            dmesg -c > /dev/null
            echo {pci} > /sys/bus/pci/drivers/{driver}/bind"
        ));
        if let Self::Nvme(controller) = self {
            *controller = Controller::find(guest, pci);
        }
    }

    /// Takes the function away, as the end of a test does before its server ends.
    #[track_caller]
    pub(crate) fn remove(&self, guest: &mut Guest) {
        match self {
            Self::Nvme(controller) => controller.remove(guest),
            Self::Ahci(adapter) => adapter.remove(guest),
        }
    }
}
