//! virtio-mmio, version 2: the registers of section 4.2.2 of the virtio specification.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use block::AsyncDiskFile;
use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FAILED, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_devices::{
    Interrupt, MemorySource, Result,
    virtio_blk::{VirtioBlk, VirtioBlkConfig, feature},
};
use virtio_queue::{Queue, QueueT};
use vm_device::{
    MutDeviceMmio,
    bus::{MmioAddress, MmioAddressOffset},
};

use super::IrqLine;
use crate::{
    queue_thread::{QueueHandle, QueueSetup, Stop},
    sys,
};

/// The bytes of bus that the device needs: registers and configuration space.
pub const MMIO_SIZE: u64 = 0x200;

/// `"virt"`.
const MAGIC: u32 = 0x7472_6976;
/// The version of the registers.
const VERSION: u32 = 2;
/// The number of a block device: `VIRTIO_ID_BLOCK`.
const DEVICE_ID: u32 = 2;
/// Reads back to drivers that ask who made this.
const VENDOR: u32 = u32::from_le_bytes(*b"PLTR");

/// The registers, by offset.
mod register {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_SIZE_MAX: u64 = 0x034;
    pub(super) const QUEUE_SIZE: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const INTERRUPT_ACK: u64 = 0x064;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// Interrupt status: a queue has used buffers.
const USED_BUFFERS: u32 = 1;
/// Interrupt status: the configuration space, or the need for a reset, has changed.
const CONFIG_CHANGE: u32 = 2;

/// The status bits that a driver sets.
const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// How a device is made.
#[derive(Clone, Debug, Default)]
pub struct VirtioMmioConfig {
    /// The device behind the registers.
    pub device: VirtioBlkConfig,
    /// How long a queue's thread looks at its ring before it sleeps; zero sleeps at once.
    pub poll: Duration,
}

/// The interrupt of the device: status bits and the line.
struct MmioInterrupt {
    status: AtomicU32,
    line: Box<dyn IrqLine>,
}

impl MmioInterrupt {
    fn raise(&self, bit: u32) -> io::Result<()> {
        self.status.fetch_or(bit, Ordering::SeqCst);
        self.line.raise()
    }

    fn acknowledge(&self, bits: u32) {
        if self.status.fetch_and(!bits, Ordering::SeqCst) & !bits == 0 {
            self.line.lower();
        }
    }
}

impl Interrupt for MmioInterrupt {
    fn signal_queue(&self, _queue: u16) -> io::Result<()> {
        self.raise(USED_BUFFERS)
    }

    fn signal_config(&self) -> io::Result<()> {
        self.raise(CONFIG_CHANGE)
    }
}

/// What the driver has said about a queue.
struct MmioQueue {
    queue: Queue,
    kick: File,
    running: bool,
}

/// A virtio-blk device behind virtio-mmio registers.
///
/// Wrapped in a `Mutex` it is what `vm_device`'s `IoManager` registers. Accesses come from vCPU
/// threads and are short, but for two: the write that starts the device and the one that resets it
/// wait for the queues' threads, the latter until the disk has let go of the guest's memory.
///
/// The queues run on threads of their own, named `platter-vq0` and so on, which exist from the start:
/// a VMM can make the device and then restrict what the process may do.
pub struct VirtioMmioBlk<S: MemorySource> {
    device: Arc<VirtioBlk>,
    memory: S,
    interrupt: Arc<MmioInterrupt>,
    threads: Vec<QueueHandle<S>>,
    queues: Vec<MmioQueue>,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
}

impl<S: MemorySource + Clone + Send + 'static> VirtioMmioBlk<S> {
    /// A device over `disk` in the guest memory `memory`, which interrupts through `line`.
    ///
    /// # Errors
    /// What [`VirtioBlk::new`] says of the configuration;
    /// [`Descriptor`](virtio_devices::Error::Descriptor) when the host has no descriptors or
    /// threads left.
    pub fn new(
        disk: Box<dyn AsyncDiskFile>,
        memory: S,
        line: impl IrqLine + 'static,
        config: VirtioMmioConfig,
    ) -> Result<Self> {
        let (count, max_size) = (config.device.num_queues, config.device.queue_size);
        let device = VirtioBlk::new(disk, config.device)?;
        let interrupt = Arc::new(MmioInterrupt {
            status: AtomicU32::new(0),
            line: Box::new(line),
        });
        let of_config = Arc::clone(&interrupt);
        device.on_config_change(move || {
            if let Err(error) = of_config.signal_config() {
                tracing::warn!(%error, "the guest was not told of the new configuration");
            }
        });
        let failed = |what| move |source| virtio_devices::Error::Descriptor { what, source };
        let mut threads = Vec::new();
        let mut queues = Vec::new();
        for index in 0..count {
            let signal: Arc<dyn Interrupt> = Arc::<MmioInterrupt>::clone(&interrupt);
            let thread = QueueHandle::spawn(index, Arc::clone(&device), signal, config.poll);
            threads.push(thread.map_err(failed("queue thread"))?);
            queues.push(MmioQueue {
                queue: new_queue(max_size)?,
                kick: sys::event().map_err(failed("doorbell"))?,
                running: false,
            });
        }
        Ok(Self {
            device,
            memory,
            interrupt,
            threads,
            queues,
            status: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            queue_sel: 0,
        })
    }

    /// The device: its counters, and its size, which can be changed while the guest runs.
    #[must_use]
    pub fn device(&self) -> &Arc<VirtioBlk> {
        &self.device
    }

    /// The doorbell of a queue. A VMM may bind it to the guest's writes of `index` to
    /// [`QUEUE_NOTIFY`](Self::QUEUE_NOTIFY) (an ioeventfd), so that they cause no exit to user space.
    #[must_use]
    pub fn doorbell(&self, index: u16) -> Option<BorrowedFd<'_>> {
        let queue = self.queues.get(usize::from(index))?;
        Some(queue.kick.as_fd())
    }

    /// The offset of the register in which a driver writes the number of a queue it filled.
    pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

    /// Drains every queue and stops it: when this returns, nothing is in flight, all that ended was
    /// shown to the guest, and guest memory is not touched until [`resume`](Self::resume).
    pub fn pause(&mut self) {
        for index in 0..self.queues.len() {
            self.stop_queue(index, Stop::Drain);
        }
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&mut self) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start_queues();
        }
    }

    /// What the driver reads as status.
    fn current_status(&self) -> u32 {
        if self.device.needs_reset() {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    fn selected(&mut self) -> Option<&mut MmioQueue> {
        let index = usize::try_from(self.queue_sel).ok()?;
        self.queues.get_mut(index)
    }

    /// The selected queue, if the driver may still change it.
    fn open_queue(&mut self) -> Option<&mut Queue> {
        let queue = self.selected()?;
        (!queue.queue.ready()).then_some(&mut queue.queue)
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => DEVICE_ID,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.device.features(), self.device_features_sel),
            register::QUEUE_SIZE_MAX => self
                .selected()
                .map_or(0, |queue| u32::from(queue.queue.max_size())),
            register::QUEUE_READY => self
                .selected()
                .map_or(0, |queue| u32::from(queue.queue.ready())),
            register::INTERRUPT_STATUS => self.interrupt.status.load(Ordering::SeqCst),
            register::STATUS => self.current_status(),
            // No shared memory: a region that is not there has the length -1.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.device.config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            register::DRIVER_FEATURES => self.set_driver_features(value),
            register::QUEUE_SEL => self.queue_sel = value,
            register::QUEUE_SIZE => {
                if let (Some(queue), Ok(size)) = (self.open_queue(), u16::try_from(value)) {
                    // A size that is not allowed is ignored; the queue then is not ready.
                    queue.set_size(size);
                }
            }
            register::QUEUE_READY => self.set_queue_ready(value == 1),
            register::QUEUE_NOTIFY => {
                if let Some(queue) = usize::try_from(value)
                    .ok()
                    .and_then(|index| self.queues.get(index))
                {
                    let _ = sys::signal(&queue.kick);
                }
            }
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.set_status(value),
            register::QUEUE_DESC_LOW => self.open(|q| q.set_desc_table_address(Some(value), None)),
            register::QUEUE_DESC_HIGH => self.open(|q| q.set_desc_table_address(None, Some(value))),
            register::QUEUE_DRIVER_LOW => {
                self.open(|q| q.set_avail_ring_address(Some(value), None));
            }
            register::QUEUE_DRIVER_HIGH => {
                self.open(|q| q.set_avail_ring_address(None, Some(value)));
            }
            register::QUEUE_DEVICE_LOW => self.open(|q| q.set_used_ring_address(Some(value), None)),
            register::QUEUE_DEVICE_HIGH => {
                self.open(|q| q.set_used_ring_address(None, Some(value)));
            }
            _ => tracing::debug!(offset, value, "write to a register that cannot be written"),
        }
    }

    fn open(&mut self, change: impl FnOnce(&mut Queue)) {
        if let Some(queue) = self.open_queue() {
            change(queue);
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        let settled = self.status & (VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_FAILED) != 0;
        if settled || self.status & VIRTIO_CONFIG_S_DRIVER == 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let value = value & DRIVER_BITS;
        if value & self.status != self.status {
            tracing::debug!(
                value,
                status = self.status,
                "a driver cannot clear status bits"
            );
            return;
        }
        let mut added = value & !self.status;
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let modern = self.driver_features & feature::VERSION_1 != 0;
            if !modern || self.device.ack_features(self.driver_features).is_err() {
                // The driver reads the bit back and sees that its choice does not work.
                added &= !VIRTIO_CONFIG_S_FEATURES_OK;
            }
        }
        let ready =
            VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER | VIRTIO_CONFIG_S_FEATURES_OK;
        if (self.status | added) & ready != ready {
            added &= !VIRTIO_CONFIG_S_DRIVER_OK;
        }
        self.status |= added;
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start_queues();
        }
    }

    fn set_queue_ready(&mut self, ready: bool) {
        let Ok(index) = usize::try_from(self.queue_sel) else {
            return;
        };
        let Some(entry) = self.queues.get_mut(index) else {
            return;
        };
        if ready {
            entry.queue.set_ready(true);
            if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                self.start_queues();
            }
        } else {
            self.stop_queue(index, Stop::Drain);
            self.queues[index].queue.set_ready(false);
        }
    }

    /// Starts every queue that the driver made ready. One that cannot run needs a reset.
    fn start_queues(&mut self) {
        let event_idx = self.driver_features & feature::EVENT_IDX != 0;
        for (entry, thread) in self.queues.iter_mut().zip(&mut self.threads) {
            if !entry.queue.ready() || entry.running {
                continue;
            }
            entry.queue.set_event_idx(event_idx);
            let started = entry
                .kick
                .try_clone()
                .map_err(|error| error.to_string())
                .and_then(|kick| {
                    let queue = Queue::try_from(entry.queue.state());
                    thread.start(QueueSetup {
                        memory: self.memory.clone(),
                        queue: queue.map_err(|error| error.to_string())?,
                        kick,
                        tracker: None,
                        resubmit: None,
                    })
                });
            match started {
                Ok(()) => entry.running = true,
                Err(error) => {
                    tracing::warn!(error, "the guest's queue cannot run");
                    self.status |= VIRTIO_CONFIG_S_NEEDS_RESET;
                    let _ = self.interrupt.signal_config();
                }
            }
        }
    }

    fn stop_queue(&mut self, index: usize, how: Stop) {
        let entry = &mut self.queues[index];
        if entry.running {
            entry.running = false;
            if let Some(next_avail) = self.threads[index].stop(how) {
                entry.queue.set_next_avail(next_avail);
                // Drained: everything that was taken has been given back.
                entry.queue.set_next_used(next_avail);
            }
        }
    }

    fn reset(&mut self) {
        for index in 0..self.queues.len() {
            self.stop_queue(index, Stop::Reset);
            let entry = &mut self.queues[index];
            entry.queue.reset();
            sys::clear(&entry.kick);
        }
        self.device.reset();
        self.status = 0;
        self.device_features_sel = 0;
        self.driver_features_sel = 0;
        self.driver_features = 0;
        self.queue_sel = 0;
        self.interrupt.acknowledge(u32::MAX);
    }
}

impl<S: MemorySource + Clone + Send + 'static> MutDeviceMmio for VirtioMmioBlk<S> {
    fn mmio_read(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(at) => self.device.read_config(at, data),
            None => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(word) => *word = self.read_register(offset).to_le_bytes(),
                // Registers are accessed as aligned 32-bit words and in no other way.
                Err(_) => data.fill(0),
            },
        }
    }

    fn mmio_write(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(at) => self.device.write_config(at, data),
            None => {
                if let Ok(word) = <[u8; 4]>::try_from(data) {
                    self.write_register(offset, u32::from_le_bytes(word));
                }
            }
        }
    }
}

fn new_queue(max_size: u16) -> Result<Queue> {
    Queue::new(max_size).map_err(|error| virtio_devices::Error::Config(error.to_string()))
}

/// The 32 bits of a feature mask that a selector names.
fn half(features: u64, selector: u32) -> u32 {
    match selector {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
