//! Guest memory as a queue sees it: one snapshot a batch, one reference count a queue.

use std::{
    any::Any,
    sync::{Arc, atomic::Ordering},
};

use block::{ErrorKind, io::Buffers};
use smallvec::SmallVec;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic,
    GuestMemoryResult, Permissions, VolatileMemory, VolatileSlice,
    bitmap::{BS, Bitmap},
    guest_memory::GuestMemorySliceIterator,
};

/// A run of guest memory that a request names. Nothing says that it exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) address: GuestAddress,
    pub(crate) len: u32,
}

/// Guest memory of a request; most need no allocation.
pub(crate) type Data = SmallVec<[Segment; 4]>;

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

/// Guest memory that a driver in this process keeps its rings in: one piece of host memory, looked up
/// once.
pub(crate) struct GuestArea {
    base: *mut u8,
    len: usize,
    _memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: the area is an address in a mapping that `_memory` keeps alive on any thread; its bytes
// are only accessed as volatile memory.
unsafe impl Send for GuestArea {}

impl GuestArea {
    /// `len` bytes from `base` on; `None` where they are not in one piece of guest memory.
    pub(crate) fn new<M>(memory: &Arc<M>, base: GuestAddress, len: usize) -> Option<Self>
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        let slice = contiguous(&**memory, base, len, Permissions::ReadWrite)?;
        Some(Self {
            base: slice.ptr_guard_mut().as_ptr(),
            len,
            _memory: Arc::<M>::clone(memory),
        })
    }

    /// The bytes.
    pub(crate) fn slice(&self) -> VolatileSlice<'_> {
        // SAFETY: `base` and `len` are one slice of guest memory, which `_memory` keeps mapped, and
        // nobody holds a reference to its bytes.
        unsafe { VolatileSlice::new(self.base, self.len) }
    }

    pub(crate) fn put<T: ByteValued>(&self, offset: usize, value: T) {
        match self.slice().get_ref(offset) {
            Ok(slot) => slot.store(value),
            Err(error) => debug_assert!(false, "{error}"),
        }
    }

    pub(crate) fn get<T: ByteValued + Default>(&self, offset: usize) -> T {
        match self.slice().get_ref(offset) {
            Ok(slot) => slot.load(),
            Err(error) => {
                debug_assert!(false, "{error}");
                T::default()
            }
        }
    }

    pub(crate) fn load(&self, offset: usize, order: Ordering) -> u16 {
        u16::from_le(self.slice().load(offset, order).unwrap_or_default())
    }

    pub(crate) fn store(&self, offset: usize, value: u16, order: Ordering) {
        let stored = self.slice().store(value.to_le(), offset, order);
        debug_assert!(stored.is_ok());
    }
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
    #[inline]
    pub(crate) fn get(
        &mut self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'m, BS<'m, M::Bitmap>>> {
        match self.inside(address, len) {
            Some(slice) => Some(slice),
            None => self.look_up(address, len, access),
        }
    }

    /// The range, which is not in what is remembered.
    #[cold]
    fn look_up(
        &mut self,
        address: GuestAddress,
        len: usize,
        access: Permissions,
    ) -> Option<VolatileSlice<'m, BS<'m, M::Bitmap>>> {
        if !self.direct {
            return contiguous(self.memory, address, len, access);
        }
        self.open(address.0);
        self.inside(address, len)
    }

    #[inline]
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

/// Guest memory for the requests of one batch.
pub(crate) struct BatchMemory<'m, M: GuestMemory> {
    /// Rings, headers, indirect tables.
    pub(crate) control: Window<'m, QueueMemory<M>>,
    /// Data, often in another region.
    pub(crate) data: Option<Window<'m, QueueMemory<M>>>,
    pub(crate) data_from: u64,
    pub(crate) memory: &'m Arc<QueueMemory<M>>,
}

impl<'m, M: GuestMemory + Send + Sync + 'static> BatchMemory<'m, M> {
    /// For one batch; the windows start where the last batch's ended up.
    pub(crate) fn new(memory: &'m Arc<QueueMemory<M>>, control_from: u64, data_from: u64) -> Self {
        Self {
            control: Window::new(&**memory, control_from),
            data: None,
            data_from,
            memory,
        }
    }

    /// Where the windows ended up.
    pub(crate) fn ended_at(&self) -> (u64, u64) {
        let data = self.data.as_ref().map_or(self.data_from, Window::start);
        (self.control.start(), data)
    }

    /// The memory of a read or write, for the disk.
    pub(crate) fn buffers(
        &mut self,
        data: &Data,
        access: Permissions,
    ) -> Result<Buffers, ErrorKind> {
        let window = self
            .data
            .get_or_insert_with(|| Window::new(&**self.memory, self.data_from));
        let mut whole = true;
        let segments = data.iter().map_while(|segment| {
            let slice = window.get(segment.address, segment.len as usize, access);
            whole = slice.is_some();
            slice.map(|slice| (slice.ptr_guard_mut().as_ptr(), slice.len()))
        });
        let guard = Arc::clone(self.memory);
        // SAFETY: each segment was just looked up in the memory that `guard` keeps mapped, and
        // nobody holds a reference to guest memory.
        let buffers = unsafe { Buffers::from_raw(segments, guard) };
        if whole {
            return Ok(buffers);
        }
        // In pieces, or nowhere.
        self.buffers_in_pieces(data, access)
    }

    fn buffers_in_pieces(&self, data: &Data, access: Permissions) -> Result<Buffers, ErrorKind> {
        let ranges = data
            .iter()
            .map(|segment| (segment.address, segment.len as usize));
        Buffers::guest(self.memory, ranges, access)
    }
}

/// Marks what the disk may have filled, because the kernel does not. Free without a bitmap.
pub(crate) fn mark_dirty<M: GuestMemory>(memory: &M, data: &Data) {
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
