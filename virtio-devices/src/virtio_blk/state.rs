//! What is saved of a device, for snapshots and migration.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use virtio_queue::Queue;

use super::VirtioBlk;
use crate::{Error, Result, virtio::QueueSnapshot};

/// The version of [`VirtioBlkState`] that this crate writes.
pub const STATE_VERSION: u32 = 1;

/// Everything about a device that its configuration and its disk do not say. Saved when every queue
/// has been drained; untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlkState {
    /// [`STATE_VERSION`] of the writer.
    pub version: u32,
    /// The features that the driver accepted.
    pub acked_features: u64,
    /// The `writeback` field of the configuration space.
    pub writeback: bool,
    /// The configuration generation.
    pub generation: u32,
    /// Whether a driver broke a queue.
    pub needs_reset: bool,
    /// The queues, in order.
    pub queues: Vec<QueueSnapshot>,
}

impl VirtioBlk {
    /// The state of the device. `queues` are the [`queue_state`](super::BlkWorker::queue_state)s of
    /// drained workers, or [`QueueSnapshot::of`] queues that have none.
    #[must_use]
    pub fn save(&self, queues: Vec<QueueSnapshot>) -> VirtioBlkState {
        VirtioBlkState {
            version: STATE_VERSION,
            acked_features: self.acked_features(),
            writeback: self.write_back(),
            generation: self.config_generation(),
            needs_reset: self.needs_reset(),
            queues,
        }
    }

    /// Puts the device into a saved state and returns its queues, ready to be driven.
    ///
    /// # Errors
    /// [`Error::State`] for a version, feature or queue that this device does not have; the device
    /// is unchanged then.
    pub fn restore(&self, state: &VirtioBlkState) -> Result<Vec<Queue>> {
        if state.version != STATE_VERSION {
            return Err(Error::State(format!(
                "version is {}, this is version {STATE_VERSION}",
                state.version
            )));
        }
        if state.queues.len() > usize::from(self.config().num_queues) {
            return Err(Error::State(format!(
                "it has {} queues, the device {}",
                state.queues.len(),
                self.config().num_queues
            )));
        }
        let missing = state.acked_features & !self.features();
        if missing != 0 {
            return Err(Error::State(format!(
                "the driver accepted features {missing:#x} that are not offered"
            )));
        }
        let queues = state
            .queues
            .iter()
            .map(QueueSnapshot::to_queue)
            .collect::<Result<Vec<Queue>>>()?;
        self.ack_features(state.acked_features)?;
        self.shared
            .writeback
            .store(state.writeback, Ordering::Release);
        self.shared
            .generation
            .store(state.generation, Ordering::Release);
        self.shared
            .needs_reset
            .store(state.needs_reset, Ordering::Release);
        Ok(queues)
    }
}
