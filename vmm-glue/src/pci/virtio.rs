//! A virtio-blk device as a PCI function: virtio 1.3, 4.1, without the legacy interface.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    time::Duration,
};

use block::AsyncDiskFile;
use virtio_devices::{
    Interrupt, MemorySource, Result, VectorInterrupt,
    virtio_blk::{VirtioBlk, VirtioBlkConfig},
};
use virtio_queue::QueueT;

use super::{Bar, Capability, Description, Msix, PausableFunction, PciFunction};
use crate::virtio_transport::Transport;

/// How the function is made.
#[derive(Clone, Debug, Default)]
pub struct VirtioPciConfig {
    /// The device behind the registers.
    pub device: VirtioBlkConfig,
    /// How long a queue's thread looks at its ring before it sleeps; zero sleeps at once.
    pub poll: Duration,
}

/// The BAR with the structures of virtio, of 16 KiB.
const VIRTIO_BAR: u8 = 0;
/// The BAR with the MSI-X structures.
const MSIX_BAR: u8 = 2;
/// A structure has a page of its own, so that a VMM can map or trap each.
const PAGE: u32 = 0x1000;
const COMMON: u32 = 0;
const ISR: u32 = PAGE;
const DEVICE: u32 = 2 * PAGE;
const NOTIFY: u32 = 3 * PAGE;
/// Bytes of the common configuration: up to and with `queue_reset`.
const COMMON_BYTES: u32 = 0x3c;

/// `VIRTIO_PCI_CAP_*`.
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;

const ID_VENDOR: u8 = 0x09;
/// `VIRTIO_MSI_NO_VECTOR`.
const NO_VECTOR: u16 = 0xffff;

/// ISR: a queue has used buffers.
const ISR_QUEUE: u8 = 1;
/// ISR: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// The registers of the common configuration, by offset.
mod register {
    pub(super) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(super) const DEVICE_FEATURE: u64 = 0x04;
    pub(super) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(super) const DRIVER_FEATURE: u64 = 0x0c;
    pub(super) const CONFIG_MSIX_VECTOR: u64 = 0x10;
    pub(super) const NUM_QUEUES: u64 = 0x12;
    pub(super) const DEVICE_STATUS: u64 = 0x14;
    pub(super) const CONFIG_GENERATION: u64 = 0x15;
    pub(super) const QUEUE_SELECT: u64 = 0x16;
    pub(super) const QUEUE_SIZE: u64 = 0x18;
    pub(super) const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub(super) const QUEUE_ENABLE: u64 = 0x1c;
    pub(super) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(super) const QUEUE_DESC: u64 = 0x20;
    /// The last of the three addresses of a queue ends here.
    pub(super) const QUEUE_END: u64 = 0x37;
}

/// The interrupts of the function: vectors as the driver has assigned them, or ISR and the line.
struct PciInterrupt {
    sink: Arc<dyn VectorInterrupt>,
    /// ISR, and with it the level of the line.
    isr: Mutex<u8>,
    /// Whether the guest has enabled messages.
    messages: AtomicBool,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl PciInterrupt {
    fn raise(&self, bit: u8, vector: &AtomicU16) -> io::Result<()> {
        if self.messages.load(Ordering::SeqCst) {
            return match vector.load(Ordering::SeqCst) {
                // The driver polls.
                NO_VECTOR => Ok(()),
                vector => self.sink.signal(vector),
            };
        }
        let mut isr = self.isr();
        *isr |= bit;
        self.sink.set_level(true);
        Ok(())
    }

    fn isr(&self) -> MutexGuard<'_, u8> {
        self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reading ISR clears it, and lowers the line.
    fn take_isr(&self) -> u8 {
        let mut isr = self.isr();
        let value = std::mem::take(&mut *isr);
        if value != 0 {
            self.sink.set_level(false);
        }
        value
    }

    fn reset(&self) {
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.take_isr();
    }

    /// Takes the vector that a driver assigns, if there is such a one.
    fn assign(&self, vector: &AtomicU16, value: u32) {
        let vectors = self.queue_vectors.len() + 1;
        let known = u16::try_from(value)
            .ok()
            .filter(|v| usize::from(*v) < vectors);
        vector.store(known.unwrap_or(NO_VECTOR), Ordering::SeqCst);
    }
}

impl Interrupt for PciInterrupt {
    fn signal_queue(&self, queue: u16) -> io::Result<()> {
        match self.queue_vectors.get(usize::from(queue)) {
            Some(vector) => self.raise(ISR_QUEUE, vector),
            None => Ok(()),
        }
    }

    fn signal_config(&self) -> io::Result<()> {
        // Without vectors a driver may look at the first bit only, and finds an unchanged ring then.
        self.raise(ISR_CONFIG | ISR_QUEUE, &self.config_vector)
    }
}

/// A virtio-blk device on a PCI bus. It has a vector for each queue and one for the configuration.
pub struct VirtioPciBlk<S: MemorySource> {
    transport: Mutex<Transport<S>>,
    device: Arc<VirtioBlk>,
    interrupt: Arc<PciInterrupt>,
    queues: u16,
}

impl<S: MemorySource + Clone + Send + 'static> VirtioPciBlk<S> {
    /// A device over `disk` in the guest memory `memory`.
    ///
    /// # Errors
    /// What [`VirtioBlk::new`] says of the configuration;
    /// [`Descriptor`](virtio_devices::Error::Descriptor) when the host has no descriptors or
    /// threads left.
    pub fn new(
        disk: Box<dyn AsyncDiskFile>,
        memory: S,
        interrupts: Arc<dyn VectorInterrupt>,
        config: VirtioPciConfig,
    ) -> Result<Self> {
        let queues = config.device.num_queues;
        let no_vector = || AtomicU16::new(NO_VECTOR);
        let interrupt = Arc::new(PciInterrupt {
            sink: interrupts,
            isr: Mutex::new(0),
            messages: AtomicBool::new(false),
            config_vector: no_vector(),
            queue_vectors: (0..queues).map(|_| no_vector()).collect(),
        });
        let signal: Arc<dyn Interrupt> = Arc::<PciInterrupt>::clone(&interrupt);
        let transport = Transport::new(disk, memory, signal, config.device, config.poll)?;
        Ok(Self {
            device: Arc::clone(transport.device()),
            transport: Mutex::new(transport),
            interrupt,
            queues,
        })
    }

    /// The device: its counters, and its size, which can be changed while the guest runs.
    #[must_use]
    pub fn device(&self) -> &Arc<VirtioBlk> {
        &self.device
    }

    fn transport(&self) -> MutexGuard<'_, Transport<S>> {
        self.transport
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The vector of the selected queue.
    fn queue_vector(&self, transport: &Transport<S>) -> Option<&AtomicU16> {
        let index = usize::try_from(transport.queue_sel).ok()?;
        self.interrupt.queue_vectors.get(index)
    }

    /// The register at an offset, at its own width; `None` between registers.
    fn read_common(&self, offset: u64) -> Option<(u64, u32)> {
        use register as r;
        let transport = self.transport();
        let queue = transport.selected();
        let of_queue = |value: Option<u32>| value.unwrap_or(0);
        let vector = |vector: Option<&AtomicU16>| {
            let vector = vector.map(|it| it.load(Ordering::SeqCst));
            u32::from(vector.unwrap_or(NO_VECTOR))
        };
        Some(match offset {
            r::DEVICE_FEATURE_SELECT => (4, transport.device_features_sel),
            r::DEVICE_FEATURE => (4, transport.device_features()),
            r::DRIVER_FEATURE_SELECT => (4, transport.driver_features_sel),
            r::DRIVER_FEATURE => (4, transport.driver_features()),
            r::CONFIG_MSIX_VECTOR => (2, vector(Some(&self.interrupt.config_vector))),
            r::NUM_QUEUES => (2, u32::from(self.queues)),
            r::DEVICE_STATUS => (1, transport.status()),
            r::CONFIG_GENERATION => (1, self.device.config_generation() & 0xff),
            r::QUEUE_SELECT => (2, transport.queue_sel),
            r::QUEUE_SIZE => (2, of_queue(queue.map(|queue| u32::from(queue.size())))),
            r::QUEUE_MSIX_VECTOR => (2, vector(self.queue_vector(&transport))),
            r::QUEUE_ENABLE => (2, of_queue(queue.map(|queue| u32::from(queue.ready())))),
            r::QUEUE_NOTIFY_OFF => (2, of_queue(queue.map(|_| transport.queue_sel))),
            r::QUEUE_DESC..=r::QUEUE_END if offset.is_multiple_of(4) => {
                let queue = queue.map_or([0; 3], |it| {
                    [it.desc_table(), it.avail_ring(), it.used_ring()]
                });
                let at = offset - r::QUEUE_DESC;
                (4, (queue[at as usize / 8] >> (8 * (at & 4))) as u32)
            }
            _ => return None,
        })
    }

    fn write_common(&self, offset: u64, width: usize, value: u32) {
        use register as r;
        let mut transport = self.transport();
        let word = value as u16;
        match (offset, width) {
            (r::DEVICE_FEATURE_SELECT, 4) => transport.device_features_sel = value,
            (r::DRIVER_FEATURE_SELECT, 4) => transport.driver_features_sel = value,
            (r::DRIVER_FEATURE, 4) => transport.set_driver_features(value),
            (r::CONFIG_MSIX_VECTOR, 2) => {
                self.interrupt.assign(&self.interrupt.config_vector, value);
            }
            (r::DEVICE_STATUS, 1) => {
                transport.set_status(value);
                if value == 0 {
                    self.interrupt.reset();
                }
            }
            (r::QUEUE_SELECT, 2) => transport.queue_sel = value,
            // A size that is not allowed is ignored; the queue then is not ready.
            (r::QUEUE_SIZE, 2) => transport.open(|queue| queue.set_size(word)),
            (r::QUEUE_MSIX_VECTOR, 2) => {
                if let Some(vector) = self.queue_vector(&transport) {
                    self.interrupt.assign(vector, value);
                }
            }
            // Only 1 may be written: a queue ends with a reset of the device.
            (r::QUEUE_ENABLE, 2) if value == 1 => transport.set_queue_ready(true),
            (_, 4) => {
                let (low, high) = (Some(value), None);
                transport.open(|queue| match offset.wrapping_sub(r::QUEUE_DESC) {
                    0x00 => queue.set_desc_table_address(low, high),
                    0x04 => queue.set_desc_table_address(high, low),
                    0x08 => queue.set_avail_ring_address(low, high),
                    0x0c => queue.set_avail_ring_address(high, low),
                    0x10 => queue.set_used_ring_address(low, high),
                    0x14 => queue.set_used_ring_address(high, low),
                    _ => {}
                });
            }
            _ => tracing::debug!(offset, width, value, "no register of that width to write"),
        }
    }

    fn read_virtio(&self, offset: u64, data: &mut [u8]) {
        let page = u64::from(PAGE);
        match ((offset / page) as u32 * PAGE, offset % page) {
            (COMMON, at) => {
                // An access is to one register, of its width; one of 64 bits is to both halves.
                for (ahead, bytes) in (at..).step_by(4).zip(data.chunks_mut(4)) {
                    if let Some((width, value)) = self.read_common(ahead) {
                        let value = value.to_le_bytes();
                        let len = bytes.len().min(width as usize);
                        bytes[..len].copy_from_slice(&value[..len]);
                    }
                }
            }
            (ISR, 0) => {
                if let Some(first) = data.first_mut() {
                    *first = self.interrupt.take_isr();
                }
            }
            (DEVICE, at) => self.device.read_config(at, data),
            _ => {}
        }
    }

    fn write_virtio(&self, offset: u64, data: &[u8]) {
        let page = u64::from(PAGE);
        match ((offset / page) as u32 * PAGE, offset % page) {
            (COMMON, at) => {
                for (ahead, bytes) in (at..).step_by(4).zip(data.chunks(4)) {
                    let mut value = [0; 4];
                    value[..bytes.len()].copy_from_slice(bytes);
                    self.write_common(ahead, bytes.len(), u32::from_le_bytes(value));
                }
            }
            (DEVICE, at) => self.device.write_config(at, data),
            // Its own place for each queue; what is written is the number again.
            (NOTIFY, at) => self.transport().notify((at / 4) as u32),
            _ => {}
        }
    }
}

/// A vendor-specific capability that tells where a structure is.
fn structure(kind: u8, offset: u32, bytes: u32, more: &[u8]) -> Capability {
    let len = 16 + more.len() as u8;
    let mut cap = vec![len, kind, VIRTIO_BAR, 0, 0, 0];
    cap.extend_from_slice(&offset.to_le_bytes());
    cap.extend_from_slice(&bytes.to_le_bytes());
    cap.extend_from_slice(more);
    Capability {
        id: ID_VENDOR,
        bytes: cap,
        writable: Vec::new(),
    }
}

impl<S: MemorySource + Clone + Send + 'static> PciFunction for VirtioPciBlk<S> {
    fn description(&self) -> Description {
        let vectors = self.queues + 1;
        let table = (u32::from(vectors) * 16).next_multiple_of(PAGE);
        let notify = u32::from(self.queues) * 4;
        Description {
            // 1040h and the number of a block device.
            id: (0x1af4, 0x1042),
            subsystem: (0x1af4, 0x1100),
            // Mass storage, of another kind.
            class: [0x01, 0x80, 0x00],
            revision: 1,
            bars: vec![
                Bar::memory(VIRTIO_BAR, u64::from(4 * PAGE), true),
                Bar::memory(MSIX_BAR, u64::from(table + PAGE), false),
            ],
            msix: Some(Msix {
                vectors,
                bar: MSIX_BAR,
                table: 0,
                pending: table,
            }),
            msi: 0,
            line: true,
            keeps_state: true,
            capabilities: vec![
                structure(CAP_COMMON, COMMON, COMMON_BYTES, &[]),
                structure(CAP_NOTIFY, NOTIFY, notify, &4_u32.to_le_bytes()),
                structure(CAP_ISR, ISR, 1, &[]),
                structure(CAP_DEVICE, DEVICE, PAGE, &[]),
            ],
            registers: Vec::new(),
        }
    }

    fn read_bar(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar == VIRTIO_BAR {
            self.read_virtio(offset, data);
        }
    }

    fn write_bar(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == VIRTIO_BAR {
            self.write_virtio(offset, data);
        }
    }

    fn use_messages(&self, messages: bool) {
        self.interrupt.messages.store(messages, Ordering::SeqCst);
    }

    fn set_bus_master(&self, on: bool) {
        self.transport().set_bus_master(on);
    }

    fn reset(&self) {
        self.transport().set_status(0);
        self.interrupt.reset();
    }

    fn is_idle(&self) -> bool {
        // A reset returns when the queues' threads have let go of everything.
        true
    }
}

impl<S: MemorySource + Clone + Send + 'static> PausableFunction for VirtioPciBlk<S> {
    fn pause(&self) {
        self.transport().pause();
    }

    fn resume(&self) {
        self.transport().resume();
    }
}
