//! The controller as its owner sees it.

use std::{
    os::fd::{AsRawFd, BorrowedFd},
    sync::Arc,
};

use super::{
    core::Core,
    front::{NvmeQueues, NvmeWorker},
    interrupt::Interrupts,
    registers::DOORBELLS,
    subsystem::{Listener, Subsystem},
};
use crate::{Error, MemorySource, Result, VectorInterrupt, stats::QueueStats, worker::Worker};

/// How a controller is made.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// I/O queue pairs, 1 to 128.
    pub io_queues: u16,
    /// Workers for them, 1 to as many as there are pairs. A completion queue and its submission
    /// queues belong to one worker.
    pub workers: usize,
    /// Interrupt vectors, 1 to 2048.
    pub vectors: u16,
    /// Block requests in flight, for each worker and namespace.
    pub ring_depth: u32,
    /// The largest transfer: 4 KiB times 2 to this power, 8 (1 MiB) to 13.
    pub mdts: u8,
    /// PCI vendor and subsystem vendor, as Identify shows them.
    pub vendor: u16,
    /// Whoever writes a doorbell also calls the workers: they need not be woken.
    pub inline: bool,
}

impl Default for NvmeConfig {
    fn default() -> Self {
        Self {
            io_queues: 16,
            workers: 1,
            vectors: 17,
            ring_depth: 256,
            mdts: 9,
            // With device identifiers 10f0h to 10ffh this vendor's numbers are free for experiments.
            vendor: 0x1af4,
            inline: false,
        }
    }
}

impl NvmeConfig {
    /// Bytes of the largest transfer.
    pub(super) fn max_transfer(&self) -> u64 {
        4096 << self.mdts
    }

    fn check(&self) -> Result<()> {
        let bad = |what: &str, value: u64, expected: &str| {
            Err(Error::Config(format!("{what} is {value}, not {expected}")))
        };
        if !(1..=128).contains(&self.io_queues) {
            return bad("io_queues", self.io_queues.into(), "1 to 128");
        }
        if !(1..=usize::from(self.io_queues)).contains(&self.workers) {
            return bad("workers", self.workers as u64, "1 to the number of queues");
        }
        if !(1..=2048).contains(&self.vectors) {
            return bad("vectors", self.vectors.into(), "1 to 2048");
        }
        if !(8..=13).contains(&self.mdts) {
            return bad("mdts", self.mdts.into(), "8 to 13");
        }
        if self.ring_depth == 0 {
            return bad("ring_depth", 0, "at least 1");
        }
        Ok(())
    }
}

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
        Ok(Worker::without_disk(front))
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
