//! Devices inside a VMM's own process, on the bus traits of the `vm-device` crate.
//!
//! [`VirtioMmioBlk`] is a virtio-blk device behind the virtio-mmio registers. A VMM registers it on
//! its bus, forwards the guest's accesses, and injects an interrupt when
//! [`IrqLine::raise`] is called; `examples/mini_vmm.rs` shows all of it.

mod mmio;

use std::{io, sync::Arc};

pub use mmio::{MMIO_SIZE, VirtioMmioBlk, VirtioMmioConfig};
use vmm_sys_util::eventfd::EventFd;

/// An interrupt line of the VMM. Called from every queue's thread and from the thread that accesses
/// the registers.
pub trait IrqLine: Send + Sync {
    /// Interrupts the guest.
    ///
    /// # Errors
    /// What the host says; the device counts it and goes on.
    fn raise(&self) -> io::Result<()>;

    /// The guest has acknowledged everything. An edge-triggered line, as an irqfd is, has nothing
    /// to do.
    fn lower(&self) {}
}

/// An irqfd: an edge on every write.
impl IrqLine for EventFd {
    fn raise(&self) -> io::Result<()> {
        self.write(1)
    }
}

impl<T: IrqLine + ?Sized> IrqLine for Arc<T> {
    fn raise(&self) -> io::Result<()> {
        (**self).raise()
    }

    fn lower(&self) {
        (**self).lower();
    }
}
