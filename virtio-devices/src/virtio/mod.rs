//! What every virtio device shares: the device side of a split ring, what breaks it, what is saved
//! of it, and the tracking of requests in flight across a restart.
//!
//! The driver-facing set-up (addresses, sizes, ready) is [`virtio_queue::Queue`]'s, so that the
//! transports of rust-vmm fit. The ring itself is accessed here: `virtio-queue` stores the used
//! index once an element, counts only its own elements when it decides about an interrupt, ignores
//! `NO_INTERRUPT`, and cannot tell a chain that ends from one that is broken.

mod chain;
mod inflight;
pub(crate) mod ring;

use std::fmt;

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue, QueueState};

pub(crate) use chain::Chain;
pub use inflight::InflightTracker;

use crate::{Error, Result};

/// How a driver broke the rules of its own queue so that nothing more can be taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum QueueFault {
    /// The queue is not ready, or its size is not a power of two of at most 32768.
    NotReady,
    /// A ring is not inside guest memory, or not contiguous there, or misaligned.
    RingOutsideMemory {
        /// Its guest address.
        address: u64,
    },
    /// The available index moved further than the ring is long.
    AvailableIndex {
        /// The index in the ring.
        index: u16,
        /// The next entry the device would take.
        next: u16,
    },
    /// A head in the available ring is not a descriptor.
    HeadOutOfRange {
        /// The head.
        head: u16,
    },
    /// A head was posted again while its request is in flight.
    DuplicateHead {
        /// The head.
        head: u16,
    },
    /// A chain has a next index outside its table, loops, or is longer than the queue.
    BrokenChain {
        /// The head of the chain.
        head: u16,
    },
    /// An indirect table is empty, not a multiple of a descriptor long, too long, outside memory,
    /// inside another indirect table, or continued.
    BrokenIndirect {
        /// The head of the chain.
        head: u16,
    },
}

impl fmt::Display for QueueFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            QueueFault::NotReady => f.write_str("not ready"),
            QueueFault::RingOutsideMemory { address } => {
                write!(f, "the ring at {address:#x} is not in guest memory")
            }
            QueueFault::AvailableIndex { index, next } => {
                write!(f, "the available index {index} is too far ahead of {next}")
            }
            QueueFault::HeadOutOfRange { head } => {
                write!(f, "head {head} is not in the descriptor table")
            }
            QueueFault::DuplicateHead { head } => write!(f, "head {head} is in flight already"),
            QueueFault::BrokenChain { head } => {
                write!(f, "the chain at head {head} loops or leaves its table")
            }
            QueueFault::BrokenIndirect { head } => {
                write!(f, "the indirect table of head {head} is invalid")
            }
        }
    }
}

/// Everything about a queue that has to be saved. It is untrusted when it comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueSnapshot {
    /// The largest size that the device offers.
    pub max_size: u16,
    /// The size that the driver chose.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Whether `EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// The next entry of the available ring to take.
    pub next_avail: u16,
    /// The next entry of the used ring to write.
    pub next_used: u16,
    /// Guest address of the descriptor table.
    pub desc_table: u64,
    /// Guest address of the available ring.
    pub avail_ring: u64,
    /// Guest address of the used ring.
    pub used_ring: u64,
}

impl QueueSnapshot {
    /// The queue in this state.
    ///
    /// # Errors
    /// [`Error::State`] when a field is out of range.
    pub fn to_queue(&self) -> Result<Queue> {
        Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: self.event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.desc_table,
            avail_ring: self.avail_ring,
            used_ring: self.used_ring,
        })
        .map_err(|error| Error::State(format!("queue: {error}")))
    }

    /// The state of a queue.
    #[must_use]
    pub fn of(queue: &Queue) -> Self {
        let state = queue.state();
        Self {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            next_avail: state.next_avail,
            next_used: state.next_used,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        }
    }
}
