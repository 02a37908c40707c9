//! An AHCI host bus adapter as a PCI function, with a thread for each port.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Instant,
};

use serde::{Deserialize, Serialize};
use virtio_devices::{
    Error, MemorySource, Result, VectorInterrupt,
    ahci::{Hba, HbaConfig, HbaState},
};

use super::{
    Bar, Capability, Description, Migratable, PausableFunction, PciFunction, Registers,
    threads::{Carry, WorkerThreads},
};
use crate::sys;

/// How the function is made.
#[derive(Clone, Debug)]
pub struct AhciFunctionConfig {
    /// The host bus adapter.
    pub hba: HbaConfig,
    /// Vendor and device. The class code is what drivers and firmware go by; the default is the number
    /// of Intel's ICH9, which has the same registers.
    pub id: (u16, u16),
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
}

impl Default for AhciFunctionConfig {
    fn default() -> Self {
        Self {
            hba: HbaConfig::default(),
            id: (0x8086, 0x2922),
            subsystem: (0x1234, 0x4148),
        }
    }
}

/// The BAR in I/O space, with the index and data pair.
const PAIR_BAR: u8 = 4;
/// The registers of the HBA.
const ABAR: u8 = 5;
/// Where the pair is in its BAR: the index, then the data.
const INDEX: u64 = 0x10;
const DATA: u64 = 0x14;
/// The same for SATACR1: BAR 4, dword 4.
const PAIR: u8 = 0x48;
/// Capability: SATA.
const ID_SATA: u8 = 0x12;

/// An AHCI host bus adapter on a PCI bus.
pub struct AhciFunction {
    hba: Arc<Hba>,
    config: AhciFunctionConfig,
    /// The index register of the pair.
    index: AtomicU32,
    threads: WorkerThreads,
}

impl AhciFunction {
    /// An HBA with empty ports; drives are plugged into [`hba`](Self::hba). Its threads, one a port, run
    /// until it is dropped.
    ///
    /// # Errors
    /// As [`Hba::new`]; the host's error when a thread cannot be started.
    pub fn new<S: MemorySource + Clone + Send + 'static>(
        config: AhciFunctionConfig,
        memory: &S,
        interrupts: Arc<dyn VectorInterrupt>,
    ) -> Result<Self> {
        let hba = Arc::new(Hba::new(config.hba.clone())?);
        hba.set_interrupt(interrupts);
        let threads = WorkerThreads::default();
        for port in 0..config.hba.ports {
            let doorbell = sys::duplicate(&*hba.doorbell(port)?).map_err(|source| {
                virtio_devices::Error::Descriptor {
                    what: "doorbell",
                    source,
                }
            })?;
            let (hba, memory) = (Arc::clone(&hba), memory.clone());
            let name = format!("ahci-port{port}");
            let make = move || hba.port_worker(port, memory);
            threads.start(name, doorbell, make, Carry::NOTHING)?;
        }
        Ok(Self {
            hba,
            config,
            index: AtomicU32::new(0),
            threads,
        })
    }

    /// The host bus adapter: hot plug, trays, counters.
    #[must_use]
    pub fn hba(&self) -> &Arc<Hba> {
        &self.hba
    }

    fn set_index(&self, index: u32) {
        let mask = (self.hba.size() - 1) as u32 & !3;
        self.index.store(index & mask, Ordering::Relaxed);
    }

    /// The register that the pair points at, if `offset` is inside the data register.
    fn paired(&self, offset: u64) -> Option<u64> {
        let ahead = offset.checked_sub(DATA).filter(|ahead| *ahead < 4)?;
        Some(u64::from(self.index.load(Ordering::Relaxed)) + ahead)
    }
}

impl PciFunction for AhciFunction {
    fn description(&self) -> Description {
        let ports = u32::MAX >> (32 - u32::from(self.config.hba.ports.clamp(1, 32)));
        let enabled = ports as u8 & 0x3f;
        Description {
            id: self.config.id,
            subsystem: self.config.subsystem,
            // Mass storage, SATA, AHCI 1.0 and later.
            class: [0x01, 0x06, 0x01],
            revision: 2,
            bars: vec![
                Bar::io(PAIR_BAR, 0x20),
                Bar::memory(ABAR, self.hba.size(), false),
            ],
            msix: None,
            msi: 1,
            line: true,
            // AHCI 1.3.1 (2.3) reserves the bit that would say so.
            keeps_state: false,
            capabilities: vec![Capability {
                id: ID_SATA,
                // Revision 1.0, then SATACR1.
                bytes: vec![0x10, 0, PAIR, 0, 0, 0],
                writable: Vec::new(),
            }],
            registers: vec![Registers {
                // MAP says that this is AHCI; PCS has the enabled ports, and those with a drive.
                at: 0x90,
                bytes: vec![(0x40, 0), (0, 0), (enabled, 0x3f), (0, 0)],
            }],
        }
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (bar, self.paired(offset)) {
            (ABAR, _) => self.hba.read(offset, data),
            (PAIR_BAR, Some(at)) => self.hba.read(at, data),
            (PAIR_BAR, None) => {
                let index = self.index.load(Ordering::Relaxed).to_le_bytes();
                for (at, byte) in (offset..INDEX + 4).zip(data) {
                    if let Some(ahead) = at.checked_sub(INDEX) {
                        *byte = index[ahead as usize];
                    }
                }
            }
            _ => {}
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        match (bar, self.paired(offset)) {
            (ABAR, _) => self.hba.write(offset, data),
            (PAIR_BAR, Some(at)) => self.hba.write(at, data),
            (PAIR_BAR, None) => {
                // The index is a multiple of 4 inside the ABAR, and is written as one dword.
                if let (INDEX, Ok(value)) = (offset, <[u8; 4]>::try_from(data)) {
                    self.set_index(u32::from_le_bytes(value));
                }
            }
            _ => {}
        }
    }

    fn use_messages(&self, _messages: bool) {
        // The HBA tells both of every interrupt: the line follows IS, and a message goes out for each
        // new bit. The bus passes on what the guest has enabled.
    }

    fn set_bus_master(&self, on: bool) {
        self.hba.set_bus_master(on);
    }

    fn reset(&self) {
        self.index.store(0, Ordering::Relaxed);
        self.hba.reset();
    }

    fn is_idle(&self) -> bool {
        self.hba.is_idle()
    }
}

impl PausableFunction for AhciFunction {
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

/// What is saved: the adapter, and the index register of the pair.
#[derive(Serialize, Deserialize)]
struct AhciState {
    hba: HbaState,
    index: u32,
}

impl Migratable for AhciFunction {
    fn stop(&self, until: Instant) -> Result<()> {
        if self.threads.drain(.., until) {
            return Ok(());
        }
        self.threads.resume();
        Err(Error::Busy("commands have not ended".to_owned()))
    }

    fn save(&self) -> Result<Vec<u8>> {
        let state = AhciState {
            hba: self.hba.save()?,
            index: self.index.load(Ordering::Relaxed),
        };
        serde_json::to_vec(&state).map_err(|error| Error::State(error.to_string()))
    }

    fn restore(&self, state: &[u8]) -> Result<()> {
        let state = serde_json::from_slice(state);
        let state: AhciState = state.map_err(|error| Error::State(error.to_string()))?;
        self.hba.restore(&state.hba)?;
        self.set_index(state.index);
        Ok(())
    }
}
