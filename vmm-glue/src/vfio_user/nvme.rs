//! An NVMe controller as a PCI function, with a thread for each of its workers.

use std::{fs::File, sync::Arc, time::Instant};

use virtio_devices::{
    Error as DeviceError, MemorySource, Result as DeviceResult, VectorInterrupt,
    nvme::{NvmeConfig, NvmeController, NvmeState, NvmeWorkerState, Subsystem},
};

use super::{Error, PausableFunction, poll::Poller};
use crate::pci::{Bar, Carry, Description, Mappable, Migratable, Msix, PciFunction, WorkerThreads};

/// How the function is made.
#[derive(Clone, Debug)]
pub struct NvmeFunctionConfig {
    /// The controller, with the vendor.
    pub controller: NvmeConfig,
    /// PCI device and subsystem identifier. Drivers do not look at it: they know an NVMe controller
    /// by its class.
    pub device: u16,
    /// Lets the bus map the doorbells, and looks at them on a thread that never sleeps.
    pub poll: bool,
}

impl Default for NvmeFunctionConfig {
    fn default() -> Self {
        Self {
            controller: NvmeConfig::default(),
            // From the range that is free for experiments, like the default vendor.
            device: 0x10f4,
            poll: false,
        }
    }
}

/// An NVMe controller on a PCI bus.
pub struct NvmeFunction {
    controller: Arc<NvmeController>,
    device: u16,
    threads: WorkerThreads<NvmeWorkerState>,
    poller: Option<Poller>,
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
            let carry = Carry {
                save: |worker| worker.save(),
                restore: |worker, state| worker.restore(state),
            };
            threads.start(name, kick, move || worker.worker(index, memory), carry)?;
        }
        let poller = config
            .poll
            .then(|| Poller::start(&controller))
            .transpose()?;
        Ok(Self {
            controller,
            device: config.device,
            threads,
            poller,
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
            keeps_state: true,
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

    fn set_bus_master(&self, on: bool) {
        self.controller.set_bus_master(on);
    }

    fn mappable(&self, bar: u8) -> Option<Mappable> {
        self.poller.as_ref().filter(|_| bar == 0)?.mappable()
    }

    fn renew_mappable(&self) {
        if let Some(poller) = &self.poller {
            poller.renew(&self.controller);
        }
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

    fn migration(&self) -> Option<&dyn Migratable> {
        Some(self)
    }
}

impl Migratable for NvmeFunction {
    fn stop(&self, until: Instant) -> DeviceResult<()> {
        // Admin commands may need the other workers to end, whose last answers it takes afterwards.
        let drained = self.threads.drain(..1, until)
            && self.threads.drain(1.., until)
            && self.threads.drain(..1, until);
        if drained {
            return Ok(());
        }
        self.threads.resume();
        Err(DeviceError::Busy("commands have not ended".to_owned()))
    }

    fn save(&self) -> DeviceResult<Vec<u8>> {
        // What the driver has rung last.
        self.controller.poll_doorbells();
        let state = self.controller.save(self.threads.save()?)?;
        serde_json::to_vec(&state).map_err(|error| DeviceError::State(error.to_string()))
    }

    fn restore(&self, state: &[u8]) -> DeviceResult<()> {
        let state = serde_json::from_slice(state);
        let state: NvmeState = state.map_err(|error| DeviceError::State(error.to_string()))?;
        self.controller.restore(&state)?;
        self.threads.restore(state.workers);
        Ok(())
    }
}
