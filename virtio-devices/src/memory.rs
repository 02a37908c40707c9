//! Guest memory as a queue sees it: one snapshot a batch, one reference count a queue.

use std::sync::Arc;

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryResult,
    Permissions, VolatileSlice, bitmap::BS, guest_memory::GuestMemorySliceIterator,
};

/// Where a queue gets the guest's memory map from: an `Arc` for one that never changes, a
/// [`GuestMemoryAtomic`] for one that does. It is asked once a batch.
pub trait MemorySource {
    /// The memory.
    type M: GuestMemory + Send + Sync + 'static;

    /// The current map.
    fn load(&self) -> Arc<Self::M>;

    /// Whether `memory` is still the current map.
    fn is_current(&self, memory: &Arc<Self::M>) -> bool;
}

impl<M: GuestMemory + Send + Sync + 'static> MemorySource for Arc<M> {
    type M = M;

    fn load(&self) -> Arc<M> {
        Arc::clone(self)
    }

    fn is_current(&self, memory: &Arc<M>) -> bool {
        Arc::ptr_eq(self, memory)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> MemorySource for GuestMemoryAtomic<M> {
    type M = M;

    fn load(&self) -> Arc<M> {
        self.memory().into_inner()
    }

    fn is_current(&self, memory: &Arc<M>) -> bool {
        let now = self.memory();
        std::ptr::eq(&raw const *now, Arc::as_ptr(memory))
    }
}

/// A queue's own handle on guest memory. Requests in flight hold an `Arc` of this, so that taking
/// and dropping it moves no reference count that another queue's thread also moves.
pub(crate) struct QueueMemory<M>(pub(crate) Arc<M>);

impl<M: GuestMemory> GuestMemory for QueueMemory<M> {
    type PhysicalMemory = M::PhysicalMemory;
    type Bitmap = M::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.0.check_range(addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        self.0.get_slices(addr, count, access)
    }

    fn physical_memory(&self) -> Option<&Self::PhysicalMemory> {
        self.0.physical_memory()
    }
}

/// A range of guest memory that is one piece of host memory.
pub(crate) fn contiguous<M: GuestMemory>(
    memory: &M,
    address: GuestAddress,
    len: usize,
    access: Permissions,
) -> Option<VolatileSlice<'_, BS<'_, M::Bitmap>>> {
    let slice = memory.get_slices(address, len, access).ok()?.next()?.ok()?;
    (slice.len() == len).then_some(slice)
}

/// Looks up ranges that are mostly in one region, for one batch. It remembers the host memory from
/// some guest address to the end of that address' region; only a range outside it costs a look-up.
/// Behind an IOMMU nothing is remembered: there each range has permissions of its own.
pub(crate) struct Window<'m, M: GuestMemory> {
    memory: &'m M,
    start: u64,
    slice: Option<VolatileSlice<'m, BS<'m, M::Bitmap>>>,
    direct: bool,
}

impl<'m, M: GuestMemory> Window<'m, M> {
    /// A window from `start` on, which is where the last batch's ended up.
    pub(crate) fn new(memory: &'m M, start: u64) -> Self {
        let direct = memory.physical_memory().is_some();
        let mut window = Self {
            memory,
            start,
            slice: None,
            direct,
        };
        if direct {
            window.open(start);
        }
        window
    }

    /// Where the window starts.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// The memory.
    pub(crate) fn memory(&self) -> &'m M {
        self.memory
    }

    /// The range as one piece of host memory; `None` if it is outside guest memory or in pieces.
    pub(crate) fn get(
        &mut self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'m, BS<'m, M::Bitmap>>> {
        if let Some(slice) = self.inside(address, len) {
            return Some(slice);
        }
        if !self.direct {
            return contiguous(self.memory, address, len, access);
        }
        self.open(address.0);
        self.inside(address, len)
    }

    fn inside(
        &self,
        address: GuestAddress,
        len: usize,
    ) -> Option<VolatileSlice<'m, BS<'m, M::Bitmap>>> {
        let offset = usize::try_from(address.0.checked_sub(self.start)?).ok()?;
        self.slice.as_ref()?.subslice(offset, len).ok()
    }

    fn open(&mut self, start: u64) {
        // The first slice of "everything from here" is what is left of the region.
        let rest = self
            .memory
            .get_slices(GuestAddress(start), usize::MAX, Permissions::ReadWrite);
        let first = rest.ok().and_then(|mut slices| slices.next()?.ok());
        if let Some(slice) = first {
            self.slice = Some(slice);
            self.start = start;
        }
    }
}
