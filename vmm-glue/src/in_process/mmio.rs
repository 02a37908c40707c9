//! virtio-mmio, version 2: the registers of section 4.2.2 of the virtio specification.

use std::{
    io,
    os::fd::BorrowedFd,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use block::AsyncDiskFile;
use virtio_devices::{
    Interrupt, MemorySource, Result,
    virtio_blk::{VirtioBlk, VirtioBlkConfig},
};
use virtio_queue::QueueT;
use vm_device::{
    MutDeviceMmio,
    bus::{MmioAddress, MmioAddressOffset},
};

use super::IrqLine;
use crate::virtio_transport::Transport;

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

/// A virtio-blk device behind virtio-mmio registers.
///
/// Wrapped in a `Mutex` it is what `vm_device`'s `IoManager` registers. Accesses come from vCPU
/// threads and are short, but for two: the write that starts the device and the one that resets it
/// wait for the queues' threads, the latter until the disk has let go of the guest's memory.
///
/// The queues run on threads of their own, named `platter-vq0` and so on, which exist from the start:
/// a VMM can make the device and then restrict what the process may do.
pub struct VirtioMmioBlk<S: MemorySource> {
    transport: Transport<S>,
    interrupt: Arc<MmioInterrupt>,
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
        let interrupt = Arc::new(MmioInterrupt {
            status: AtomicU32::new(0),
            line: Box::new(line),
        });
        let signal: Arc<dyn Interrupt> = Arc::<MmioInterrupt>::clone(&interrupt);
        let transport = Transport::new(disk, memory, signal, config.device, config.poll)?;
        Ok(Self {
            transport,
            interrupt,
        })
    }

    /// The device: its counters, and its size, which can be changed while the guest runs.
    #[must_use]
    pub fn device(&self) -> &Arc<VirtioBlk> {
        self.transport.device()
    }

    /// The doorbell of a queue. A VMM may bind it to the guest's writes of `index` to
    /// [`QUEUE_NOTIFY`](Self::QUEUE_NOTIFY) (an ioeventfd), so that they cause no exit to user space.
    #[must_use]
    pub fn doorbell(&self, index: u16) -> Option<BorrowedFd<'_>> {
        self.transport.doorbell(index)
    }

    /// The offset of the register in which a driver writes the number of a queue it filled.
    pub const QUEUE_NOTIFY: u64 = register::QUEUE_NOTIFY;

    /// Drains every queue and stops it: when this returns, nothing is in flight, all that ended was
    /// shown to the guest, and guest memory is not touched until [`resume`](Self::resume).
    pub fn pause(&mut self) {
        self.transport.pause();
    }

    /// Goes on after [`pause`](Self::pause).
    pub fn resume(&mut self) {
        self.transport.resume();
    }

    fn read_register(&mut self, offset: u64) -> u32 {
        let transport = &self.transport;
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => DEVICE_ID,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => transport.device_features(),
            register::QUEUE_SIZE_MAX => transport
                .selected()
                .map_or(0, |queue| u32::from(queue.max_size())),
            register::QUEUE_READY => transport
                .selected()
                .map_or(0, |queue| u32::from(queue.ready())),
            register::INTERRUPT_STATUS => self.interrupt.status.load(Ordering::SeqCst),
            register::STATUS => transport.status(),
            // No shared memory: a region that is not there has the length -1.
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => transport.device().config_generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let transport = &mut self.transport;
        match offset {
            register::DEVICE_FEATURES_SEL => transport.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => transport.driver_features_sel = value,
            register::DRIVER_FEATURES => transport.set_driver_features(value),
            register::QUEUE_SEL => transport.queue_sel = value,
            register::QUEUE_SIZE => {
                if let Ok(size) = u16::try_from(value) {
                    // A size that is not allowed is ignored; the queue then is not ready.
                    transport.open(|queue| queue.set_size(size));
                }
            }
            register::QUEUE_READY => transport.set_queue_ready(value == 1),
            register::QUEUE_NOTIFY => transport.notify(value),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => {
                transport.set_status(value);
                if value == 0 {
                    self.interrupt.acknowledge(u32::MAX);
                }
            }
            register::QUEUE_DESC_LOW => {
                transport.open(|q| q.set_desc_table_address(Some(value), None));
            }
            register::QUEUE_DESC_HIGH => {
                transport.open(|q| q.set_desc_table_address(None, Some(value)));
            }
            register::QUEUE_DRIVER_LOW => {
                transport.open(|q| q.set_avail_ring_address(Some(value), None));
            }
            register::QUEUE_DRIVER_HIGH => {
                transport.open(|q| q.set_avail_ring_address(None, Some(value)));
            }
            register::QUEUE_DEVICE_LOW => {
                transport.open(|q| q.set_used_ring_address(Some(value), None));
            }
            register::QUEUE_DEVICE_HIGH => {
                transport.open(|q| q.set_used_ring_address(None, Some(value)));
            }
            _ => tracing::debug!(offset, value, "write to a register that cannot be written"),
        }
    }
}

impl<S: MemorySource + Clone + Send + 'static> MutDeviceMmio for VirtioMmioBlk<S> {
    fn mmio_read(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(at) => self.transport.device().read_config(at, data),
            None => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(word) => *word = self.read_register(offset).to_le_bytes(),
                // Registers are accessed as aligned 32-bit words and in no other way.
                Err(_) => data.fill(0),
            },
        }
    }

    fn mmio_write(&mut self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(at) => self.transport.device().write_config(at, data),
            None => {
                if let Ok(word) = <[u8; 4]>::try_from(data) {
                    self.write_register(offset, u32::from_le_bytes(word));
                }
            }
        }
    }
}
