//! The memory of a request: a scatter list of volatile segments and what keeps it mapped.
//!
//! Guest memory changes under our feet, so there is never a reference to its bytes: segments are
//! raw, copied in and out with volatile accesses or handed to the kernel.

use std::{
    alloc::{self, Layout},
    any::Any,
    cell::RefCell,
    fmt,
    ops::{Deref, DerefMut},
    ptr, slice,
    sync::Arc,
};

use smallvec::SmallVec;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::{ErrorKind, Result};

/// One run of memory, laid out as the kernel's `struct iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length. Whoever dereferences it proves that it is mapped,
// and the bytes behind it are only accessed as volatile memory.
unsafe impl Send for Segment {}
// SAFETY: as for Send; a shared reference to a segment gives away address and length alone.
unsafe impl Sync for Segment {}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{:#x}", self.0.iov_base, self.0.iov_len)
    }
}

impl Segment {
    pub(crate) fn new(base: *mut u8, len: usize) -> Self {
        Self(libc::iovec {
            iov_base: base.cast(),
            iov_len: len,
        })
    }

    /// The address of the first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// The number of bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }
}

/// A list of segments; short ones need no allocation.
pub type Segments = SmallVec<[Segment; 4]>;

/// What keeps the memory of a scatter list mapped.
enum Owner {
    /// Memory of somebody else: the guard holds the mapping.
    Guarded { _guard: Arc<dyn Any + Send + Sync> },
    /// Host memory that travels with the request.
    Owned(AlignedBuf),
}

/// The memory of a request: segments and what keeps them mapped until the request completes.
pub struct Buffers {
    segments: Segments,
    len: u64,
    owner: Owner,
}

impl Default for Buffers {
    /// No memory.
    fn default() -> Self {
        Self {
            segments: Segments::new(),
            len: 0,
            owner: Owner::Owned(AlignedBuf::zeroed(0)),
        }
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(&self.segments).finish()
    }
}

impl Buffers {
    /// Host memory, given to the request and returned by its completion.
    #[must_use]
    pub fn owned(mut buf: AlignedBuf) -> Self {
        let mut segments = Segments::new();
        if !buf.is_empty() {
            segments.push(Segment::new(buf.as_mut_ptr(), buf.len()));
        }
        Self {
            segments,
            len: buf.len() as u64,
            owner: Owner::Owned(buf),
        }
    }

    /// Guest memory: the ranges, in order. `memory` is kept alive until the request completes; one
    /// `Arc` a batch is enough. `access` is what the *device* does to guest memory: a read request
    /// writes it. Marking what was written in the memory's dirty bitmap is the front end's.
    ///
    /// # Errors
    /// [`InvalidArgument`](ErrorKind::InvalidArgument) for a range outside the memory.
    pub fn guest<M>(
        memory: &Arc<M>,
        ranges: impl IntoIterator<Item = (GuestAddress, usize)>,
        access: Permissions,
    ) -> Result<Self, ErrorKind>
    where
        M: GuestMemory + Send + Sync + 'static,
    {
        let mut segments = Segments::new();
        let mut total = 0u64;
        for (address, len) in ranges {
            if len == 0 {
                continue;
            }
            total = total
                .checked_add(len as u64)
                .ok_or(ErrorKind::InvalidArgument)?;
            let slices = memory
                .get_slices(address, len, access)
                .map_err(|_| ErrorKind::InvalidArgument)?;
            let mut seen = 0;
            for slice in slices {
                let slice = slice.map_err(|_| ErrorKind::InvalidArgument)?;
                seen += slice.len();
                segments.push(Segment::new(slice.ptr_guard_mut().as_ptr(), slice.len()));
            }
            if seen != len {
                return Err(ErrorKind::InvalidArgument);
            }
        }
        let guard: Arc<dyn Any + Send + Sync> = Arc::<M>::clone(memory);
        Ok(Self {
            segments,
            len: total,
            owner: Owner::Guarded { _guard: guard },
        })
    }

    /// Memory of the caller.
    ///
    /// # Safety
    /// Each segment must stay valid for reads and, if it is the target of a read request, for
    /// writes until `guard` is dropped, and nobody may hold a reference to its bytes meanwhile.
    pub unsafe fn from_raw(
        segments: impl IntoIterator<Item = (*mut u8, usize)>,
        guard: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        let (mut list, mut total) = (Segments::new(), 0);
        for (base, len) in segments {
            if len > 0 {
                list.push(Segment::new(base, len));
                total += len as u64;
            }
        }
        Self {
            len: total,
            segments: list,
            owner: Owner::Guarded { _guard: guard },
        }
    }

    /// The number of bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments, in order.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The host memory given to [`Buffers::owned`]; `None` for guest memory.
    #[must_use]
    pub fn into_owned(self) -> Option<AlignedBuf> {
        match self.owner {
            Owner::Owned(buf) => Some(buf),
            Owner::Guarded { .. } => None,
        }
    }

    /// The host memory given to [`Buffers::owned`]; `None` for guest memory.
    #[must_use]
    pub fn as_owned(&self) -> Option<&AlignedBuf> {
        match &self.owner {
            Owner::Owned(buf) => Some(buf),
            Owner::Guarded { .. } => None,
        }
    }

    /// The part of the scatter list from `offset` (bytes into it), `len` bytes long.
    #[must_use]
    pub fn part(&self, offset: u64, len: u64) -> Segments {
        part_of(&self.segments, offset, len)
    }

    /// The part from `offset`, `len` bytes long, for work on the pool. No other target has any of it.
    pub(crate) fn target(&self, offset: u64, len: u64) -> Target {
        Target {
            segments: self.part(offset, len),
            exclusive: self.as_owned().is_some(),
        }
    }

    /// Fills `len` bytes from `offset` with zeroes.
    pub fn fill_zero(&self, offset: u64, len: u64) {
        zero(&self.part(offset, len));
    }

    /// Copies `bytes` to `offset`.
    pub fn copy_in(&self, offset: u64, bytes: &[u8]) {
        scatter(&self.part(offset, bytes.len() as u64), bytes);
    }

    /// Copies the bytes from `offset` into `bytes`, once: what is checked afterwards is the copy.
    pub fn copy_out(&self, offset: u64, bytes: &mut [u8]) {
        gather(&self.part(offset, bytes.len() as u64), bytes);
    }
}

/// A part of a request's memory that [work on the pool](super::Io::run) fills, which ends before the request
/// does. It is valid as long as the [`Buffers`] are.
#[derive(Debug)]
pub(crate) struct Target {
    segments: Segments,
    /// Nobody but the request reaches it.
    exclusive: bool,
}

thread_local! {
    /// Where what cannot be made in place is made.
    static SCRATCH: RefCell<AlignedBuf> = RefCell::new(AlignedBuf::zeroed(0));
}

impl Target {
    /// Lets `make` write every byte: in place, if nobody else can see them meanwhile. Where it fails they
    /// stay as they are, or have what it wrote.
    pub(crate) fn fill(self, make: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        match *self.segments {
            [one] if self.exclusive => {
                // SAFETY: the memory is the request's own, stays until the work has ended, and is
                // part of one target.
                make(unsafe { slice::from_raw_parts_mut(one.as_ptr(), one.len()) })
            }
            _ => self.fill_from_scratch(make),
        }
    }

    fn fill_from_scratch(self, make: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let len = self.segments.iter().map(Segment::len).sum();
        SCRATCH.with_borrow_mut(|scratch| {
            if scratch.len() < len {
                *scratch = AlignedBuf::zeroed(len);
            }
            // What an earlier one left there is not for this guest.
            make(&mut scratch[..len])?;
            scatter(&self.segments, &scratch[..len]);
            Ok(())
        })
    }
}

/// The part of a scatter list from `offset` (bytes into it), `len` bytes long.
pub(crate) fn part_of(segments: &[Segment], mut offset: u64, mut len: u64) -> Segments {
    let mut out = Segments::new();
    for segment in segments {
        if len == 0 {
            break;
        }
        let size = segment.len() as u64;
        if offset >= size {
            offset -= size;
            continue;
        }
        let take = (size - offset).min(len);
        out.push(Segment::new(
            segment.as_ptr().wrapping_add(offset as usize),
            take as usize,
        ));
        offset = 0;
        len -= take;
    }
    out
}

/// Removes the first `bytes` of a scatter list.
pub(crate) fn advance(segments: &mut Segments, bytes: u64) {
    let total: u64 = segments.iter().map(|s| s.len() as u64).sum();
    *segments = part_of(segments, bytes, total.saturating_sub(bytes));
}

/// Fills segments with zeroes.
pub(crate) fn zero(segments: &[Segment]) {
    for segment in segments {
        // SAFETY: the owner of the scatter list keeps the segment mapped and writable, and no
        // reference to its bytes exists.
        unsafe { ptr::write_bytes(segment.as_ptr(), 0, segment.len()) };
    }
}

/// Copies `bytes` into segments of the same total length.
pub(crate) fn scatter(segments: &[Segment], mut bytes: &[u8]) {
    for segment in segments {
        let take = segment.len().min(bytes.len());
        // SAFETY: the owner of the scatter list keeps the segment mapped and writable; `bytes` is
        // ours and at least `take` long.
        unsafe { ptr::copy(bytes.as_ptr(), segment.as_ptr(), take) };
        bytes = &bytes[take..];
    }
}

/// Copies segments into `bytes` of the same total length.
pub(crate) fn gather(segments: &[Segment], mut bytes: &mut [u8]) {
    for segment in segments {
        let take = segment.len().min(bytes.len());
        // SAFETY: the owner of the scatter list keeps the segment mapped and readable; `bytes` is
        // ours and at least `take` long.
        unsafe { ptr::copy(segment.as_ptr(), bytes.as_mut_ptr(), take) };
        bytes = &mut bytes[take..];
    }
}

/// The alignment of every [`AlignedBuf`]: a page, which satisfies every direct I/O known.
pub const BUFFER_ALIGNMENT: usize = 4096;

/// Zeroed host memory aligned for direct I/O.
pub struct AlignedBuf {
    ptr: ptr::NonNull<u8>,
    len: usize,
}

// SAFETY: the buffer owns its memory, as `Vec<u8>` does.
unsafe impl Send for AlignedBuf {}
// SAFETY: as for Send; shared references only read.
unsafe impl Sync for AlignedBuf {}

impl AlignedBuf {
    /// `len` zero bytes.
    #[must_use]
    pub fn zeroed(len: usize) -> Self {
        let Some(layout) = Self::layout(len) else {
            return Self {
                ptr: ptr::NonNull::dangling(),
                len: 0,
            };
        };
        // SAFETY: the layout has a size above zero.
        let raw = unsafe { alloc::alloc_zeroed(layout) };
        let Some(ptr) = ptr::NonNull::new(raw) else {
            alloc::handle_alloc_error(layout)
        };
        Self { ptr, len }
    }

    /// A copy of `bytes`.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Self {
        let mut buf = Self::zeroed(bytes.len());
        buf.copy_from_slice(bytes);
        buf
    }

    fn layout(len: usize) -> Option<Layout> {
        if len == 0 {
            return None;
        }
        // A length near isize::MAX cannot be allocated; treating it as an allocation failure of
        // the largest layout would only hide the caller's mistake.
        Some(Layout::from_size_align(len, BUFFER_ALIGNMENT).expect("buffer length fits in memory"))
    }
}

impl Drop for AlignedBuf {
    fn drop(&mut self) {
        if let Some(layout) = Self::layout(self.len) {
            // SAFETY: the memory came from `alloc_zeroed` with this layout and is freed once.
            unsafe { alloc::dealloc(self.ptr.as_ptr(), layout) };
        }
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` initialised bytes, owned by self.
        unsafe { slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialised bytes, owned by self, borrowed exclusively.
        unsafe { slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl fmt::Debug for AlignedBuf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AlignedBuf({} bytes)", self.len)
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryMmap};

    use super::*;

    #[test]
    fn parts_cross_segments() {
        let memory: Arc<GuestMemoryMmap<()>> =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x3000)]).unwrap());
        let buffers = Buffers::guest(
            &memory,
            [(GuestAddress(0x10), 4), (GuestAddress(0x1000), 8)],
            Permissions::Write,
        )
        .unwrap();
        assert_eq!(buffers.len(), 12);
        buffers.copy_in(2, &[1, 2, 3, 4, 5]);
        let mut low = [0; 4];
        memory.read_slice(&mut low, GuestAddress(0x10)).unwrap();
        assert_eq!(low, [0, 0, 1, 2]);
        let mut out = [0; 12];
        buffers.copy_out(0, &mut out);
        assert_eq!(out, [0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0]);
        buffers.fill_zero(3, 2);
        buffers.copy_out(0, &mut out);
        assert_eq!(out, [0, 0, 1, 0, 0, 4, 5, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn guest_ranges_outside_the_memory_are_refused() {
        let memory: Arc<GuestMemoryMmap<()>> =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap());
        let outside = Buffers::guest(&memory, [(GuestAddress(0xfff), 2)], Permissions::Write);
        assert_eq!(outside.unwrap_err(), ErrorKind::InvalidArgument);
    }

    #[test]
    fn advance_drops_whole_and_partial_segments() {
        let buf = AlignedBuf::zeroed(16);
        let base = buf.as_ptr().cast_mut();
        let mut segments: Segments = [Segment::new(base, 4), Segment::new(base.wrapping_add(8), 8)]
            .into_iter()
            .collect();
        advance(&mut segments, 6);
        assert_eq!(segments.len(), 1);
        assert_eq!(segments[0].as_ptr(), base.wrapping_add(10));
        assert_eq!(segments[0].len(), 6);
    }
}
