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

pub use ahci::{AhciFunction, AhciFunctionConfig};
pub use config::{Changes, ConfigSpace, MsiMessage};
pub use msix::{MsixMessage, MsixTable};
pub use slot::{BusSignals, PciSlot, SlotInterrupts};
pub(crate) use threads::WorkerThreads;
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
    /// Capabilities besides power management, MSI, MSI-X and PCI Express.
    pub capabilities: Vec<Capability>,
    /// Registers outside of capabilities.
    pub registers: Vec<Registers>,
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
}
