//! A request in flight.

use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileMemory};

use super::request::OK;
use crate::{
    memory::{Data, Window},
    stats::Op,
};

/// A request in flight.
pub(super) struct Slot {
    pub(super) busy: bool,
    pub(super) op: Op,
    pub(super) status: u8,
    /// When the block requests have ended, one flush follows.
    pub(super) flush_after: bool,
    /// Block requests that have not ended.
    pub(super) pending: u32,
    /// Tells a completion of this request from one of an earlier request at the same head.
    pub(super) generation: u32,
    /// Bytes written to the guest before the status, if the request succeeds.
    pub(super) written: u32,
    pub(super) status_at: Option<GuestAddress>,
    /// Nanoseconds since the queue was made.
    pub(super) started: u64,
    /// For the counters.
    pub(super) bytes: u64,
    pub(super) data: Data,
}

impl Slot {
    pub(super) fn new() -> Self {
        Self {
            busy: false,
            op: Op::Other,
            status: OK,
            flush_after: false,
            pending: 0,
            generation: 0,
            written: 0,
            status_at: None,
            started: 0,
            bytes: 0,
            data: Data::new(),
        }
    }

    pub(super) fn begin(&mut self, started: u64, status_at: Option<GuestAddress>) {
        self.busy = true;
        self.op = Op::Other;
        self.status = OK;
        self.flush_after = false;
        self.pending = 0;
        self.generation = self.generation.wrapping_add(1);
        self.written = 0;
        self.status_at = status_at;
        self.started = started;
        self.bytes = 0;
        self.data.clear();
    }

    /// Writes the status; returns the used length.
    pub(super) fn finish<M: GuestMemory>(&self, window: &mut Window<'_, M>) -> u32 {
        let status = self
            .status_at
            .and_then(|address| window.get(address, 1, Permissions::Write))
            .and_then(|slice| slice.get_ref(0).map(|byte| byte.store(self.status)).ok());
        match status {
            None => 0,
            Some(()) if self.status == OK => self.written.saturating_add(1),
            Some(()) => 1,
        }
    }

    /// The id of its block requests.
    pub(super) fn id(&self, head: u16) -> u64 {
        u64::from(self.generation) << 16 | u64::from(head)
    }
}
