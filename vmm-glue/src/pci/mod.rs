//! PCI functions: what a device model is on a PCI bus, whoever emulates the bus.
//!
//! ```text
//!  bus (vfio-user server, VMM in process)
//!    │ configuration space          │ BAR accesses
//!    ▼                              ▼
//!  ConfigSpace   MsixTable     PciFunction (one for each device model)
//! ```

mod ahci;
mod config;
mod msix;
mod slot;
mod threads;
mod virtio;

use std::{fs::File, sync::Arc, time::Instant};

use virtio_devices::Result;

pub use ahci::{AhciFunction, AhciFunctionConfig};
pub use config::{Changes, ConfigSpace, MsiMessage};
pub use msix::{MsixMessage, MsixTable};
pub use slot::{BusSignals, PciSlot, SlotInterrupts};
pub(crate) use threads::{Carry, WorkerThreads};
pub use virtio::{VirtioPciBlk, VirtioPciConfig};

/// A base address register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Its number, 0 to 5. One of 64 bits takes the next number, too.
    pub index: u8,
    /// Bytes: a power of two of at least 16.
    pub size: u64,
    /// It may be above 4 GiB.
    pub wide: bool,
    /// It is in I/O space; such a one is never wide and has at most 256 bytes.
    pub io: bool,
}

impl Bar {
    /// One in memory space, of `size` bytes rounded up to a power of two.
    #[must_use]
    pub fn memory(index: u8, size: u64, wide: bool) -> Self {
        Self {
            index,
            size: size.next_power_of_two().max(16),
            wide,
            io: false,
        }
    }

    /// One of `size` bytes in I/O space.
    #[must_use]
    pub fn io(index: u8, size: u64) -> Self {
        Self {
            index,
            size: size.next_power_of_two().clamp(16, 256),
            wide: false,
            io: true,
        }
    }
}

/// A capability that only some functions have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capability {
    /// Its number.
    pub id: u8,
    /// What follows the number and the link.
    pub bytes: Vec<u8>,
    /// The bits of `bytes` that the guest may change; what is missing it may not.
    pub writable: Vec<u8>,
}

/// Registers of the device's own in the configuration space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registers {
    /// Their place, 40h to FFh.
    pub at: u8,
    /// Their values after a reset, and the bits that the guest may change.
    pub bytes: Vec<(u8, u8)>,
}

/// Where the MSI-X table of a function is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Msix {
    /// Vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR that holds both structures.
    pub bar: u8,
    /// Bytes from its start to the table, a multiple of 8.
    pub table: u32,
    /// Bytes from its start to the pending bits, a multiple of 8.
    pub pending: u32,
}

/// What the configuration space of a function says about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// Vendor and device.
    pub id: (u16, u16),
    /// Subsystem vendor and subsystem.
    pub subsystem: (u16, u16),
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    /// Revision.
    pub revision: u8,
    /// The base address registers.
    pub bars: Vec<Bar>,
    /// MSI-X, if it has it.
    pub msix: Option<Msix>,
    /// Vectors of MSI: 1, 2, 4, 8, 16 or 32; 0 for none.
    pub msi: u8,
    /// Whether it has an interrupt line (INTA).
    pub line: bool,
    /// Whether it keeps its state in D3hot (`No_Soft_Reset`).
    pub keeps_state: bool,
    /// Capabilities besides power management, MSI, MSI-X and PCI Express.
    pub capabilities: Vec<Capability>,
    /// Registers outside of capabilities.
    pub registers: Vec<Registers>,
}

/// A part of a BAR that is memory, at the same place in a file.
#[derive(Clone, Debug)]
pub struct Mappable {
    /// The file; what is not of the part has no meaning in it.
    pub file: Arc<File>,
    /// Bytes from the start of the BAR to the part.
    pub offset: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A device model as a function on a PCI bus. Every method may be called from any thread.
pub trait PciFunction: Send + Sync {
    /// What it is; always the same.
    fn description(&self) -> Description;

    /// Reads from a BAR. The MSI-X structures are the bus', not the function's.
    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// Writes to a BAR.
    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]);

    /// Whether the guest has enabled MSI-X or MSI; otherwise the line is used.
    fn use_messages(&self, messages: bool);

    /// Whether the guest lets it access memory and send messages (the bus master bit). Until then, and
    /// from then on, it takes no command and ends none. Called with the function
    /// [paused](PausableFunction::pause) when it is switched off.
    fn set_bus_master(&self, on: bool);

    /// The part of a BAR that whoever emulates the bus may give to the guest as memory, without seeing
    /// its accesses any more.
    fn mappable(&self, bar: u8) -> Option<Mappable> {
        let _ = bar;
        None
    }

    /// What was mapped until now means nothing any more: the next one to map it is somebody else.
    fn renew_mappable(&self) {}

    /// Function-level reset. It is over when [`is_idle`](Self::is_idle).
    fn reset(&self);

    /// Whether the reset is over and nothing of the guest's memory is in use.
    fn is_idle(&self) -> bool;
}

/// A PCI function whose threads can be held while guest memory is exchanged.
pub trait PausableFunction: PciFunction {
    /// Returns when nothing of guest memory is in use, and keeps it so until
    /// [`resume`](Self::resume).
    fn pause(&self);

    /// Goes on with the memory that is there now.
    fn resume(&self);

    /// How its state is taken to another process, if it can be.
    fn migration(&self) -> Option<&dyn Migratable> {
        None
    }
}

/// A function whose state can be taken to another process.
pub trait Migratable: Send + Sync {
    /// Ends what the function has taken, shows the guest what there is room for, and holds the function
    /// until [`resume`](PausableFunction::resume).
    ///
    /// # Errors
    /// [`Busy`](virtio_devices::Error::Busy) when that has not come to an end at `until`; it goes on
    /// then.
    fn stop(&self, until: Instant) -> Result<()>;

    /// The state of a function that is stopped.
    ///
    /// # Errors
    /// [`State`](virtio_devices::Error::State) when it cannot be saved as it is.
    fn save(&self) -> Result<Vec<u8>>;

    /// Puts a function that has been reset and is stopped into a saved state, which nobody has checked.
    ///
    /// # Errors
    /// [`State`](virtio_devices::Error::State) for a state this function cannot be in; it has to be
    /// reset then.
    fn restore(&self, state: &[u8]) -> Result<()>;
}
