//! virtio-blk: the control plane of the device. The data plane of a queue is [`BlkWorker`].
//!
//! ```text
//! VirtioBlk (Send + Sync, one Arc)      features, configuration space, counters, state
//!    │ queue_worker(n, queue, memory, interrupt), on the queue's thread
//!    ▼
//! BlkWorker = Worker<BlkQueue>          one a queue, stays on its thread
//! ```

mod config;
pub mod driver;
mod queue;
mod request;
mod slot;
mod state;

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use block::AsyncDiskFile;
use virtio_queue::{Queue, QueueT};

pub use config::{CONFIG_SPACE, SECTOR, WRITEBACK_OFFSET, feature};
pub use queue::{BlkQueue, BlkWorker};
pub use state::{STATE_VERSION, VirtioBlkState};

use crate::{
    Error, Interrupt, MemorySource, Result,
    stats::QueueStats,
    worker::{DEFAULT_POLL_MAX, Worker},
};

/// How a device is made.
#[derive(Clone, Debug)]
pub struct VirtioBlkConfig {
    /// Request queues, 1 to 1024.
    pub num_queues: u16,
    /// The largest queue that a driver may set up: a power of two from 2 to 32768. It decides how
    /// many segments a request may have.
    pub queue_size: u16,
    /// Block requests in flight a queue; 0 is `queue_size`.
    pub ring_depth: u32,
    /// What a driver reads as the disk's ID: at most 20 bytes.
    pub serial: String,
    /// Refuse everything that writes, also on a writable disk.
    pub read_only: bool,
    /// Whether the device starts with a volatile write cache. Without, a write completes only when
    /// it is durable. A driver can switch.
    pub write_back: bool,
    /// Offer discard (and secure erase) where the disk can.
    pub discard: bool,
    /// Offer write zeroes.
    pub write_zeroes: bool,
    /// The most sectors of one segment of a discard, secure erase or write zeroes request.
    pub max_discard_sectors: u32,
    /// The most segments of one such request.
    pub max_discard_segments: u32,
    /// Pins guest memory with the ring of each queue, which saves the host's work of pinning the
    /// buffers of each request under direct I/O. The memory cannot be swapped out, shared or given
    /// back by a balloon then; where the host refuses, requests are as without.
    pub pin_memory: bool,
    /// How long a queue's worker looks for requests before it sleeps, at most; zero: never. See
    /// [`Worker::set_poll_max`].
    pub poll_max: Duration,
}

impl Default for VirtioBlkConfig {
    fn default() -> Self {
        Self {
            num_queues: 1,
            queue_size: 256,
            ring_depth: 0,
            serial: String::new(),
            read_only: false,
            write_back: true,
            discard: true,
            write_zeroes: true,
            // 2 GiB a segment: no multiple of any cluster size is cut in an odd place.
            max_discard_sectors: 1 << 22,
            max_discard_segments: 64,
            pin_memory: false,
            poll_max: DEFAULT_POLL_MAX,
        }
    }
}

/// Bytes of a disk ID.
pub(crate) const ID_BYTES: usize = 20;

/// What the queues of a device share.
pub(crate) struct Shared {
    config: VirtioBlkConfig,
    offered: u64,
    static_space: [u8; CONFIG_SPACE],
    acked: AtomicU64,
    writeback: AtomicBool,
    /// Bytes, as the disk says; the guest sees whole sectors.
    size: AtomicU64,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    on_config_change: Mutex<Option<ConfigListener>>,
}

type ConfigListener = Arc<dyn Fn() + Send + Sync>;

impl Shared {
    pub(crate) fn offers(&self, feature: u64) -> bool {
        self.offered & feature != 0
    }

    pub(crate) fn acked(&self, feature: u64) -> bool {
        self.acked.load(Ordering::Acquire) & feature != 0
    }

    pub(crate) fn config(&self) -> &VirtioBlkConfig {
        &self.config
    }

    /// The size in sectors.
    pub(crate) fn capacity(&self) -> u64 {
        self.size.load(Ordering::Acquire) / SECTOR
    }

    /// Whether a write may complete only when it is durable.
    pub(crate) fn write_through(&self) -> bool {
        let acked = self.acked.load(Ordering::Relaxed);
        if acked & feature::CONFIG_WCE != 0 {
            !self.writeback.load(Ordering::Relaxed)
        } else if acked & feature::FLUSH != 0 {
            false
        } else {
            // The driver will never flush.
            true
        }
    }

    pub(crate) fn set_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::Release);
    }

    fn resized(&self, size: u64) {
        self.size.store(size, Ordering::Release);
        self.config_changed();
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        let listener = self
            .on_config_change
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        if let Some(listener) = listener {
            listener();
        }
    }
}

/// A virtio-blk device over one disk. Every method may be called from any thread.
pub struct VirtioBlk {
    disk: Box<dyn AsyncDiskFile>,
    shared: Arc<Shared>,
    stats: Vec<Arc<QueueStats>>,
}

impl VirtioBlk {
    /// A device over `disk`.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of queues, queue size or serial out of range.
    pub fn new(disk: Box<dyn AsyncDiskFile>, config: VirtioBlkConfig) -> Result<Arc<Self>> {
        if !(1..=1024).contains(&config.num_queues) {
            return Err(Error::Config(format!(
                "num_queues is {}, not 1 to 1024",
                config.num_queues
            )));
        }
        if config.queue_size < 2
            || config.queue_size > 1 << 15
            || !config.queue_size.is_power_of_two()
        {
            return Err(Error::Config(format!(
                "queue_size is {}, not a power of two from 2 to 32768",
                config.queue_size
            )));
        }
        if config.serial.len() > ID_BYTES {
            return Err(Error::Config(format!(
                "serial has {} bytes, not at most {ID_BYTES}",
                config.serial.len()
            )));
        }
        if config.max_discard_segments == 0 || config.max_discard_sectors == 0 {
            return Err(Error::Config(
                "max_discard_sectors and max_discard_segments must not be 0".to_owned(),
            ));
        }
        let offered = config::offered(&*disk, &config);
        let shared = Arc::new(Shared {
            offered,
            static_space: config::static_space(
                offered,
                disk.topology(),
                disk.capabilities().discard_granularity,
                &config,
            ),
            acked: AtomicU64::new(0),
            writeback: AtomicBool::new(config.write_back),
            size: AtomicU64::new(disk.size()),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            on_config_change: Mutex::new(None),
            config,
        });
        let weak = Arc::downgrade(&shared);
        disk.on_resize(Box::new(move |size| {
            if let Some(shared) = weak.upgrade() {
                shared.resized(size);
            }
        }));
        Ok(Arc::new(Self {
            stats: (0..shared.config.num_queues)
                .map(|_| Arc::default())
                .collect(),
            disk,
            shared,
        }))
    }

    /// How it was made.
    #[must_use]
    pub fn config(&self) -> &VirtioBlkConfig {
        &self.shared.config
    }

    /// The features it offers.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.shared.offered
    }

    /// The features that the driver accepted; 0 before.
    #[must_use]
    pub fn acked_features(&self) -> u64 {
        self.shared.acked.load(Ordering::Acquire)
    }

    /// Takes the features that the driver accepted. A transport sets `FEATURES_OK` only when this
    /// succeeds. Queues made afterwards honour them.
    ///
    /// # Errors
    /// [`Error::Features`] for a feature that was not offered.
    pub fn ack_features(&self, features: u64) -> Result<()> {
        if features & !self.shared.offered != 0 {
            return Err(Error::Features {
                features,
                reason: "some were not offered",
            });
        }
        self.shared.acked.store(features, Ordering::Release);
        // A driver that can set the cache mode but never flushes starts with write-through.
        if features & feature::CONFIG_WCE != 0 && features & feature::FLUSH == 0 {
            self.shared.writeback.store(false, Ordering::Release);
        }
        Ok(())
    }

    /// Whether a driver broke a queue since the last [`reset`](Self::reset).
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.shared.needs_reset.load(Ordering::Acquire)
    }

    /// Whether the device has a volatile write cache as far as the driver can tell.
    #[must_use]
    pub fn write_back(&self) -> bool {
        self.shared.writeback.load(Ordering::Acquire)
    }

    /// Copies the configuration space from `offset` into `data`; beyond its end there are zeroes.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut space = self.shared.static_space;
        space[..8].copy_from_slice(&self.shared.capacity().to_le_bytes());
        space[WRITEBACK_OFFSET] = u8::from(self.write_back());
        data.fill(0);
        let Ok(offset) = usize::try_from(offset) else {
            return;
        };
        if let Some(from) = space.get(offset..) {
            let len = from.len().min(data.len());
            data[..len].copy_from_slice(&from[..len]);
        }
    }

    /// Writes to the configuration space. Only `writeback` can be written, and only when the driver
    /// accepted `CONFIG_WCE`; all else is ignored.
    pub fn write_config(&self, offset: u64, data: &[u8]) {
        let Some(value) = (WRITEBACK_OFFSET as u64)
            .checked_sub(offset)
            .and_then(|at| usize::try_from(at).ok())
            .and_then(|at| data.get(at))
        else {
            return;
        };
        if self.acked_features() & feature::CONFIG_WCE != 0 {
            self.shared
                .writeback
                .store(*value & 1 != 0, Ordering::Release);
        }
    }

    /// Changes with every change of the configuration space that the driver did not make. A
    /// transport that has 8 bits for it shows the lowest.
    #[must_use]
    pub fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Calls `listener` after every change of the configuration space that the driver did not make:
    /// the transport sends a configuration interrupt.
    pub fn on_config_change(&self, listener: impl Fn() + Send + Sync + 'static) {
        *self
            .shared
            .on_config_change
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(listener));
    }

    /// Changes the size of the disk; the driver is told through
    /// [`on_config_change`](Self::on_config_change). Must not be called on a queue's thread.
    ///
    /// # Errors
    /// As [`DiskFile::resize`](block::DiskFile::resize).
    pub fn resize(&self, size: u64) -> Result<()> {
        Ok(self.disk.resize(size)?)
    }

    /// Makes everything that completed durable. Must not be called on a queue's thread.
    ///
    /// # Errors
    /// As [`DiskFile::flush`](block::DiskFile::flush).
    pub fn flush(&self) -> Result<()> {
        Ok(self.disk.flush()?)
    }

    /// The size in bytes, as the guest sees it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.shared.capacity() * SECTOR
    }

    /// Back to the state before any driver. The owner has reset or drained the queues' workers
    /// ([`Worker::reset`]) and drops them.
    pub fn reset(&self) {
        self.shared.acked.store(0, Ordering::Release);
        self.shared
            .writeback
            .store(self.shared.config.write_back, Ordering::Release);
        self.shared.needs_reset.store(false, Ordering::Release);
    }

    /// The counters of a queue.
    #[must_use]
    pub fn stats(&self, queue: u16) -> Option<&Arc<QueueStats>> {
        self.stats.get(usize::from(queue))
    }

    /// The worker of one queue. It belongs to the calling thread, which drives it. `queue` is as
    /// the driver set it up: ready, with addresses, and with the index to start at.
    ///
    /// # Errors
    /// [`Error::NoSuchQueue`]; [`Error::Queue`] when the rings are not in guest memory;
    /// [`Error::Block`] when the data plane cannot be made.
    pub fn queue_worker<S: MemorySource>(
        &self,
        index: u16,
        queue: &Queue,
        memory: S,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<BlkWorker<S>> {
        let Some(stats) = self.stats(index) else {
            return Err(Error::NoSuchQueue {
                queue: index,
                queues: self.shared.config.num_queues,
            });
        };
        let front = BlkQueue::new(
            Arc::clone(&self.shared),
            index,
            queue,
            memory,
            interrupt,
            Arc::clone(stats),
        )?;
        let depth = match self.shared.config.ring_depth {
            0 => u32::from(queue.size()),
            depth => depth,
        };
        let io = self.disk.create_async_io(depth)?;
        let mut worker = Worker::new(front, io);
        worker.set_poll_max(self.shared.config.poll_max);
        Ok(worker)
    }
}
