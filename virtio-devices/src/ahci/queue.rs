//! The data plane of a port: what its worker has of it.

use std::{sync::Arc, time::Instant};

use super::{
    command::{self, Fault},
    fis,
    port::Port,
    regs::{is, serr},
    shared::Shared,
    slot::Slot,
    work::Mail,
};
use crate::{
    MemorySource,
    ata::{Registers, status},
    memory::{BatchMemory, QueueMemory},
    stats::QueueStats,
    worker::Batch,
};

/// Command slots of a port.
pub(super) const SLOTS: u32 = 32;

/// One port of an [`Hba`](super::Hba), as its worker drives it.
pub struct PortQueue<S: MemorySource> {
    pub(super) shared: Arc<Shared>,
    pub(super) index: u32,
    pub(super) source: S,
    pub(super) memory: Arc<QueueMemory<S::M>>,
    pub(super) stats: Arc<QueueStats>,
    pub(super) slots: Box<[Slot]>,
    /// Slots whose commands have ended and are not yet posted.
    pub(super) ended: Vec<u32>,
    pub(super) outstanding: usize,
    /// The data plane of the drive's disk.
    pub(super) plane: Option<usize>,
    /// [`Port::drive_changes`] that `plane` belongs to.
    pub(super) drive_changes: u64,
    /// What the thread for host work has done.
    pub(super) mail: Arc<Mail>,
    since: Instant,
    /// Where the windows on command lists and on data started last.
    pub(super) windows: (u64, u64),
}

/// What a batch of commands works with.
pub(super) struct Taking<'a, 'm, S: MemorySource> {
    pub(super) port: &'a mut Port,
    pub(super) guest: &'a mut BatchMemory<'m, S::M>,
    pub(super) batch: &'a mut Batch,
    pub(super) now: u64,
    /// A queued command was accepted.
    pub(super) accepted: bool,
}

impl<S: MemorySource> PortQueue<S> {
    pub(super) fn new(shared: Arc<Shared>, index: u32, source: S, stats: Arc<QueueStats>) -> Self {
        Self {
            shared,
            index,
            memory: Arc::new(QueueMemory(source.load())),
            source,
            stats,
            slots: (0..SLOTS).map(|_| Slot::new()).collect(),
            ended: Vec::with_capacity(SLOTS as usize),
            outstanding: 0,
            plane: None,
            drive_changes: 0,
            mail: Arc::default(),
            since: Instant::now(),
            windows: (0, 0),
        }
    }

    /// The number of the port.
    #[must_use]
    pub fn index(&self) -> u8 {
        self.index as u8
    }

    pub(super) fn now(&self) -> u64 {
        // 584 years fit.
        self.since.elapsed().as_nanos() as u64
    }

    /// The HBA cannot go on: it reports why and stops until the driver restarts it.
    pub(super) fn fault(&self, port: &mut Port, fault: Fault) {
        tracing::debug!(port = self.index, ?fault, "a command list broke its rules");
        self.stats.fault();
        let regs = &mut port.regs;
        regs.halted = true;
        regs.is |= match fault {
            Fault::Bus => is::HBFS,
            Fault::Interface => {
                regs.serr |= serr::ERR_P;
                is::IFS
            }
            Fault::Overflow => is::OFS,
        };
    }

    /// A slot is free again.
    pub(super) fn release(&mut self, index: u32, port: &mut Port) {
        self.slots[index as usize].busy = false;
        port.taken &= !(1 << index);
        self.outstanding -= 1;
    }

    /// Puts the signature of the device where the driver finds it.
    pub(super) fn post_signature(&self, port: &mut Port, guest: &mut BatchMemory<'_, S::M>) {
        if !std::mem::take(&mut port.regs.signature_unposted) {
            return;
        }
        if let Some(drive) = &port.drive {
            let fis = fis::register(&drive.signature(), false);
            let at = port.regs.fb.wrapping_add(fis::REGISTER_AT);
            if command::store(&mut guest.control, at, &fis).is_err() {
                self.fault(port, Fault::Bus);
            }
        }
    }

    /// Tells that queued commands were accepted: once for all of them, they are all alike.
    pub(super) fn post_accepted(&self, taking: &mut Taking<'_, '_, S>) {
        let registers = Registers {
            status: status::READY,
            ..Registers::default()
        };
        let regs = &mut taking.port.regs;
        regs.tfd = fis::task_file_data(&registers) | regs.tfd & u32::from(status::BSY);
        let at = regs.fb.wrapping_add(fis::REGISTER_AT);
        let fis = fis::register(&registers, false);
        if command::store(&mut taking.guest.control, at, &fis).is_err() {
            self.fault(taking.port, Fault::Bus);
        }
    }
}

impl<S: MemorySource> Drop for PortQueue<S> {
    fn drop(&mut self) {
        // What was taken and not posted will never be: the port must not wait for it.
        let mut port = self.shared.port(self.index);
        if self.outstanding > 0 {
            port.taken = 0;
            port.settle();
        }
    }
}
