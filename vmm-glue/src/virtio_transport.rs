//! What a virtio transport keeps of a block device, whatever its registers look like: status,
//! features, queues and their threads (virtio 1.3, 2.1 to 2.4 and 3.1).

use std::{
    fs::File,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
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

use crate::{
    queue_thread::{QueueHandle, QueueSetup, Stop},
    sys,
};

/// The status bits that a driver sets.
const DRIVER_BITS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What the driver has said about a queue.
pub(crate) struct TransportQueue {
    pub(crate) queue: Queue,
    kick: File,
    running: bool,
}

/// A virtio-blk device as its transport drives it.
pub(crate) struct Transport<S: MemorySource> {
    device: Arc<VirtioBlk>,
    memory: S,
    interrupt: Arc<dyn Interrupt>,
    threads: Vec<QueueHandle<S>>,
    queues: Vec<TransportQueue>,
    /// No queue may run: the device may not access memory.
    held: bool,
    status: u32,
    driver_features: u64,
    pub(crate) device_features_sel: u32,
    pub(crate) driver_features_sel: u32,
    pub(crate) queue_sel: u32,
}

impl<S: MemorySource + Clone + Send + 'static> Transport<S> {
    /// A device over `disk` in the guest memory `memory`.
    ///
    /// # Errors
    /// What [`VirtioBlk::new`] says of the configuration;
    /// [`Descriptor`](virtio_devices::Error::Descriptor) when the host has no descriptors or
    /// threads left.
    pub(crate) fn new(
        disk: Box<dyn AsyncDiskFile>,
        memory: S,
        interrupt: Arc<dyn Interrupt>,
        config: VirtioBlkConfig,
        poll: Duration,
    ) -> Result<Self> {
        let (count, max_size) = (config.num_queues, config.queue_size);
        let device = VirtioBlk::new(disk, config)?;
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
            let signal = Arc::clone(&interrupt);
            let thread = QueueHandle::spawn(index, Arc::clone(&device), signal, poll);
            threads.push(thread.map_err(failed("queue thread"))?);
            queues.push(TransportQueue {
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
            held: false,
            status: 0,
            driver_features: 0,
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
        })
    }

    pub(crate) fn device(&self) -> &Arc<VirtioBlk> {
        &self.device
    }

    pub(crate) fn doorbell(&self, index: u16) -> Option<BorrowedFd<'_>> {
        let queue = self.queues.get(usize::from(index))?;
        Some(queue.kick.as_fd())
    }

    /// The driver has put something into a queue.
    pub(crate) fn notify(&self, index: u32) {
        let index = usize::try_from(index).ok();
        if let Some(queue) = index.and_then(|index| self.queues.get(index)) {
            let _ = sys::signal(&queue.kick);
        }
    }

    /// Drains every queue and stops it.
    pub(crate) fn pause(&mut self) {
        for index in 0..self.queues.len() {
            self.stop_queue(index, Stop::Drain);
        }
    }

    /// Goes on after [`pause`](Self::pause).
    pub(crate) fn resume(&mut self) {
        if self.status & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            self.start_queues();
        }
    }

    /// Whether queues may run at all; a transport that does not say so lets them.
    pub(crate) fn set_bus_master(&mut self, on: bool) {
        self.held = !on;
        if on {
            self.resume();
        } else {
            self.pause();
        }
    }

    /// What the driver reads as status.
    pub(crate) fn status(&self) -> u32 {
        if self.device.needs_reset() {
            self.status | VIRTIO_CONFIG_S_NEEDS_RESET
        } else {
            self.status
        }
    }

    /// The selected 32 bits of what is offered.
    pub(crate) fn device_features(&self) -> u32 {
        half(self.device.features(), self.device_features_sel)
    }

    /// The selected 32 bits of what the driver wants.
    pub(crate) fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_sel)
    }

    pub(crate) fn selected(&self) -> Option<&Queue> {
        let index = usize::try_from(self.queue_sel).ok()?;
        self.queues.get(index).map(|entry| &entry.queue)
    }

    /// Changes the selected queue, if the driver may still do that.
    pub(crate) fn open(&mut self, change: impl FnOnce(&mut Queue)) {
        let index = usize::try_from(self.queue_sel).ok();
        let entry = index.and_then(|index| self.queues.get_mut(index));
        if let Some(entry) = entry
            && !entry.queue.ready()
        {
            change(&mut entry.queue);
        }
    }

    pub(crate) fn set_driver_features(&mut self, value: u32) {
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

    pub(crate) fn set_status(&mut self, value: u32) {
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

    pub(crate) fn set_queue_ready(&mut self, ready: bool) {
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
        if self.held {
            return;
        }
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

    pub(crate) fn reset(&mut self) {
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
