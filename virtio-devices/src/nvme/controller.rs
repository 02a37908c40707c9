//! The controller as its owner sees it.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use super::{
    config::NvmeConfig,
    core::Core,
    doorbell::DoorbellPage,
    front::NvmeWorker,
    interrupt::Interrupts,
    queues::NvmeQueues,
    registers::DOORBELLS,
    subsystem::{Listener, Subsystem},
};
use crate::{Error, MemorySource, Result, VectorInterrupt, stats::QueueStats, worker::Worker};

/// An NVMe controller. Every method may be called from any thread.
pub struct NvmeController {
    pub(super) core: Arc<Core>,
}

impl NvmeController {
    /// A controller of `subsystem`, with all its namespaces attached.
    ///
    /// # Errors
    /// [`Error::Config`] for a value out of range, or too many controllers; the host's error.
    pub fn new(
        subsystem: &Arc<Subsystem>,
        config: NvmeConfig,
        interrupts: Arc<dyn VectorInterrupt>,
    ) -> Result<Self> {
        config.check()?;
        let id = subsystem.next_controller()?;
        let core = Arc::new(Core::new(
            config,
            Arc::clone(subsystem),
            id,
            Interrupts::new(interrupts),
        )?);
        let listener: Arc<dyn Listener> = Arc::clone(&core) as _;
        subsystem.add_controller(id, Arc::downgrade(&listener));
        Ok(Self { core })
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &NvmeConfig {
        &self.core.config
    }

    /// CNTLID.
    #[must_use]
    pub fn id(&self) -> u16 {
        self.core.id
    }

    /// Its subsystem.
    #[must_use]
    pub fn subsystem(&self) -> &Arc<Subsystem> {
        &self.core.subsystem
    }

    /// Bytes of registers and doorbells: what a BAR has to have at least.
    #[must_use]
    pub fn register_bytes(&self) -> u64 {
        DOORBELLS + 8 * self.core.doorbells.queues() as u64
    }

    /// Reads registers; what no register has is zero.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        self.core.read(offset, data);
    }

    /// Writes a register or doorbell: 4 or 8 bytes, aligned to 4. Other writes do nothing.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.core.write(offset, data);
    }

    /// Whether the guest has enabled messages (MSI-X or MSI); otherwise the line is used.
    pub fn use_messages(&self, messages: bool) {
        self.core.interrupts.use_messages(messages);
    }

    /// The driver may write doorbells to `page`, too. Whoever gives it looks at it with
    /// [`poll_doorbells`](Self::poll_doorbells), again and again.
    pub fn watch_doorbells(&self, page: Arc<dyn DoorbellPage>) {
        self.core.doorbells.watch(page);
    }

    /// Doorbells in memory are no longer looked at.
    pub fn unwatch_doorbells(&self) {
        self.core.doorbells.unwatch();
    }

    /// Looks at the doorbells in memory, and acts on those that have changed; returns whether there
    /// were any.
    pub fn poll_doorbells(&self) -> bool {
        let core = &self.core;
        core.doorbells
            .look(|offset, value| core.ring(offset, value))
    }

    /// The bus master bit of the function: while it is clear, no command is taken and none is posted,
    /// so that nothing accesses guest memory. Registers and resets work meanwhile. It is set at first.
    /// Whoever clears it holds the workers while he does: one in the midst of a batch finishes it.
    pub fn set_bus_master(&self, on: bool) {
        self.core.set_bus_master(on);
    }

    /// Resets the controller, as a function-level reset does. It is over when
    /// [`is_idle`](Self::is_idle).
    pub fn reset(&self) {
        self.core.registers().cc &= !1;
        self.core.reset();
    }

    /// Whether no reset is under way and the controller is not enabled: its workers hold nothing
    /// of the guest.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let registers = self.core.registers();
        !self.core.is_resetting() && !registers.enabled() && !registers.ready()
    }

    /// The number of workers: that of the admin queue, and those of the I/O queues.
    #[must_use]
    pub fn workers(&self) -> usize {
        self.core.ports.len()
    }

    /// The worker `index`, 0 for the admin queue. It belongs to the calling thread, which drives
    /// it: each of them once.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`].
    pub fn worker<S: MemorySource>(&self, index: usize, memory: S) -> Result<NvmeWorker<S>> {
        if index >= self.workers() {
            return Err(Error::NoSuchQueue {
                queue: index as u16,
                queues: self.workers() as u16,
            });
        }
        let front = NvmeQueues::new(Arc::clone(&self.core), index, memory);
        let mut worker = Worker::without_disk(front);
        worker.set_poll_max(self.core.config.poll_max);
        Ok(worker)
    }

    /// The descriptor that wakes a worker; the `kick` of [`Worker::run`].
    #[must_use]
    pub fn kick(&self, worker: usize) -> Option<BorrowedFd<'_>> {
        let port = self.core.ports.get(worker)?;
        // SAFETY: the descriptor is open for as long as the controller, which is borrowed.
        Some(unsafe { BorrowedFd::borrow_raw(port.event.as_raw_fd()) })
    }

    /// The counters of a worker.
    #[must_use]
    pub fn stats(&self, worker: usize) -> Option<&Arc<QueueStats>> {
        self.core.ports.get(worker).map(|port| &port.stats)
    }
}

impl Drop for NvmeController {
    fn drop(&mut self) {
        self.core.subsystem.remove_controller(self.core.id);
    }
}
