//! An NVMe controller as a PCI function, with a thread for each of its workers.

use std::{fs::File, sync::Arc};

use virtio_devices::{
    MemorySource, VectorInterrupt,
    nvme::{NvmeConfig, NvmeController, Subsystem},
};

use super::{Error, PausableFunction};
use crate::pci::{Bar, Description, Msix, PciFunction, WorkerThreads};

/// How the function is made.
#[derive(Clone, Debug)]
pub struct NvmeFunctionConfig {
    /// The controller, with the vendor.
    pub controller: NvmeConfig,
    /// PCI device and subsystem identifier. Drivers do not look at it: they know an NVMe controller
    /// by its class.
    pub device: u16,
}

impl Default for NvmeFunctionConfig {
    fn default() -> Self {
        Self {
            controller: NvmeConfig::default(),
            // From the range that is free for experiments, like the default vendor.
            device: 0x10f4,
        }
    }
}

/// An NVMe controller on a PCI bus.
pub struct NvmeFunction {
    controller: Arc<NvmeController>,
    device: u16,
    threads: WorkerThreads,
}

impl NvmeFunction {
    /// A controller of `subsystem`; its threads run until it is dropped.
    ///
    /// # Errors
    /// As [`NvmeController::new`]; the host's error when a thread cannot be started.
    pub fn new<S: MemorySource + Clone + Send + 'static>(
        subsystem: &Arc<Subsystem>,
        config: NvmeFunctionConfig,
        memory: &S,
        interrupts: Arc<dyn VectorInterrupt>,
    ) -> Result<Self, Error> {
        let controller = NvmeController::new(subsystem, config.controller, interrupts)?;
        // The line, until the guest enables messages.
        controller.use_messages(false);
        let controller = Arc::new(controller);
        let threads = WorkerThreads::default();
        for index in 0..controller.workers() {
            let Some(kick) = controller.kick(index) else {
                continue;
            };
            let kick = File::from(kick.try_clone_to_owned()?);
            let name = if index == 0 {
                "nvme-admin".to_owned()
            } else {
                format!("nvme-q{index}")
            };
            let (worker, memory) = (Arc::clone(&controller), memory.clone());
            threads.start(name, kick, move || worker.worker(index, memory))?;
        }
        Ok(Self {
            controller,
            device: config.device,
            threads,
        })
    }

    /// The controller.
    #[must_use]
    pub fn controller(&self) -> &NvmeController {
        &self.controller
    }
}

/// The BAR with the MSI-X structures.
const MSIX_BAR: u8 = 4;

impl PciFunction for NvmeFunction {
    fn description(&self) -> Description {
        let config = self.controller.config();
        let table = (u32::from(config.vectors) * 16).next_multiple_of(4096);
        Description {
            id: (config.vendor, self.device),
            subsystem: (config.vendor, self.device),
            // Mass storage, non-volatile memory, NVM Express I/O controller.
            class: [0x01, 0x08, 0x02],
            revision: 1,
            bars: vec![
                Bar::memory(0, self.controller.register_bytes().max(0x4000), true),
                Bar::memory(MSIX_BAR, u64::from(table + 4096), false),
            ],
            msix: Some(Msix {
                vectors: config.vectors,
                bar: MSIX_BAR,
                table: 0,
                pending: table,
            }),
            msi: 0,
            line: true,
            capabilities: Vec::new(),
            registers: Vec::new(),
        }
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == 0 {
            self.controller.read(offset, data);
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == 0 {
            self.controller.write(offset, data);
        }
    }

    fn use_messages(&self, messages: bool) {
        self.controller.use_messages(messages);
    }

    fn reset(&self) {
        self.controller.reset();
    }

    fn is_idle(&self) -> bool {
        self.controller.is_idle()
    }
}

impl PausableFunction for NvmeFunction {
    fn pause(&self) {
        self.threads.pause();
    }

    fn resume(&self) {
        self.threads.resume();
    }
}
