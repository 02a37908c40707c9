//! What the ports of an HBA and their workers share.

use std::sync::{
    Arc, Mutex, MutexGuard,
    atomic::{AtomicBool, Ordering},
};

use super::{
    config::HbaConfig,
    interrupt::{Irq, IrqState},
    port::Port,
};
use crate::{stats::QueueStats, sync::lock};

/// Is told when the guest moves a tray: the port, and whether the tray is open now. It is called
/// with locks of the HBA held and must not call back into it.
pub type TrayListener = Arc<dyn Fn(u8, bool) + Send + Sync>;

/// What the ports of an HBA and their workers share.
pub(super) struct Shared {
    pub(super) config: HbaConfig,
    pub(super) ports: Vec<Mutex<Port>>,
    pub(super) irq: Mutex<Irq>,
    /// The bus master bit of the function is clear: no worker may access guest memory.
    pub(super) no_dma: AtomicBool,
    /// Coalesced completions wait for their time.
    pub(super) coalescing: AtomicBool,
    pub(super) stats: Vec<Arc<QueueStats>>,
    pub(super) on_tray: Mutex<Option<TrayListener>>,
}

impl Shared {
    /// The port; it is locked before the interrupts, never after.
    pub(super) fn port(&self, index: u32) -> MutexGuard<'_, Port> {
        lock(&self.ports[index as usize])
    }

    /// Whether workers may access guest memory.
    pub(super) fn may_access(&self) -> bool {
        !self.no_dma.load(Ordering::SeqCst)
    }

    pub(super) fn irq(&self) -> MutexGuard<'_, Irq> {
        lock(&self.irq)
    }

    /// The guest has moved a tray.
    pub(super) fn tray_moved(&self, index: u32, open: bool) {
        let listener = lock(&self.on_tray).clone();
        if let Some(listener) = listener {
            listener(index as u8, open);
        }
    }

    /// Puts the interrupts into a saved state, after those of the ports.
    pub(super) fn restore_interrupts(&self, saved: &IrqState) {
        let mut irq = self.irq();
        irq.restore(saved);
        self.coalescing
            .store(irq.due().is_some(), Ordering::Relaxed);
    }

    /// Shows the interrupts of a port, after `completed` commands; returns whether that interrupts
    /// the guest.
    pub(super) fn interrupt(&self, index: u32, port: &Port, completed: u32) -> bool {
        let mut irq = self.irq();
        let before = irq.is;
        irq.port(index, port.interrupts());
        irq.completed(index, completed);
        self.coalescing
            .store(irq.due().is_some(), Ordering::Relaxed);
        irq.enabled && irq.is & !before != 0
    }
}
