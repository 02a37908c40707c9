//! A request in flight, and the guest memory of a batch.

use std::sync::Arc;

use block::{ErrorKind, io::Buffers};
use smallvec::SmallVec;
use vm_memory::{
    GuestAddress, GuestMemory, Permissions, VolatileMemory,
    bitmap::{BS, Bitmap},
};

use super::request::{Data, OK};
use crate::{
    memory::{QueueMemory, Window},
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

/// Guest memory for the requests of one batch.
pub(super) struct Guest<'m, M: GuestMemory> {
    /// Rings, headers, indirect tables.
    pub(super) control: Window<'m, QueueMemory<M>>,
    /// Data, often in another region.
    pub(super) data: Option<Window<'m, QueueMemory<M>>>,
    pub(super) data_from: u64,
    pub(super) memory: &'m Arc<QueueMemory<M>>,
}

impl<M: GuestMemory + Send + Sync + 'static> Guest<'_, M> {
    /// The memory of a read or write, for the disk.
    pub(super) fn buffers(
        &mut self,
        data: &Data,
        access: Permissions,
    ) -> Result<Buffers, ErrorKind> {
        let window = self
            .data
            .get_or_insert_with(|| Window::new(&**self.memory, self.data_from));
        let mut segments = SmallVec::<[(*mut u8, usize); 4]>::new();
        for segment in data {
            match window.get(segment.address, segment.len as usize, access) {
                Some(slice) => segments.push((slice.ptr_guard_mut().as_ptr(), slice.len())),
                // In pieces, or nowhere.
                None => return self.buffers_in_pieces(data, access),
            }
        }
        let guard = Arc::clone(self.memory);
        // SAFETY: each segment was just looked up in the memory that `guard` keeps mapped, and
        // nobody holds a reference to guest memory.
        Ok(unsafe { Buffers::from_raw(segments, guard) })
    }

    fn buffers_in_pieces(&self, data: &Data, access: Permissions) -> Result<Buffers, ErrorKind> {
        let ranges = data
            .iter()
            .map(|segment| (segment.address, segment.len as usize));
        Buffers::guest(self.memory, ranges, access)
    }
}

/// Marks what the disk may have filled, because the kernel does not. Free without a bitmap.
pub(super) fn mark_dirty<M: GuestMemory>(memory: &M, data: &Data) {
    if size_of::<BS<'static, M::Bitmap>>() == 0 {
        return;
    }
    for segment in data {
        let Ok(slices) =
            memory.get_slices(segment.address, segment.len as usize, Permissions::Write)
        else {
            continue;
        };
        for slice in slices.flatten() {
            slice.bitmap().mark_dirty(0, slice.len());
        }
    }
}
