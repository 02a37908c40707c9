//! Guest memory as a queue sees it: one snapshot a batch, one reference count a queue.

use std::sync::Arc;

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryResult,
    Permissions, bitmap::BS, guest_memory::GuestMemorySliceIterator,
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
