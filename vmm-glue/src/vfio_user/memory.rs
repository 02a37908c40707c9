//! Guest memory as the client maps it. A region comes with the descriptor of its file, and is mapped; or
//! without one, and is reached by messages.
//!
//! Of the latter there is a copy in memory of ours, which device models use as they use all guest memory.
//! Looking a range up to be read fetches exactly those bytes from the client; what a device has written
//! is sent to it when the device marks it as written, and the mark returns when the client has it. So
//! the copy is a bounce buffer that happens to have the guest's addresses: nothing in it is trusted for
//! longer than one look-up, and no byte is sent that a device has not written.

use std::{
    fs::File,
    io,
    iter::FusedIterator,
    os::fd::{AsFd, BorrowedFd},
    sync::Arc,
};

use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestMemoryResult, GuestRegionCollection, GuestUsize,
    MemoryRegionAddress, Permissions, VolatileSlice,
    bitmap::{Bitmap, BitmapSlice, WithBitmapSlice},
    guest_memory::GuestMemorySliceIterator,
};

use super::{Error, message::Channel};
use crate::sys::Mapping;

/// The most regions of a client.
const MAX_REGIONS: usize = 1024;

const DMA_READ: u16 = 11;
const DMA_WRITE: u16 = 12;

/// The regions of a client.
type Regions = GuestRegionCollection<VfioUserRegion>;

/// Memory of a vfio-user client.
#[derive(Clone, Debug, Default)]
pub struct VfioUserMemory {
    regions: Regions,
    /// All of it is mapped and may be read and written: whoever looks at it need not ask again.
    plain: bool,
}

impl VfioUserMemory {
    /// No memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl GuestMemory for VfioUserMemory {
    type PhysicalMemory = Regions;
    type Bitmap = WriteBack;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        let (mut at, mut left) = (addr.0, count as u64);
        while left > 0 {
            let Some(region) = self.regions.find_region(GuestAddress(at)) else {
                return false;
            };
            if !region.access.allow(access) {
                return false;
            }
            let take = left.min(region.len() - (at - region.guest));
            left -= take;
            at = at.wrapping_add(take);
        }
        true
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, Written<'a>>> {
        Ok(Slices {
            regions: &self.regions,
            at: addr.0,
            left: count,
            access,
        })
    }

    fn physical_memory(&self) -> Option<&Regions> {
        self.plain.then_some(&self.regions)
    }
}

/// A range of memory, piece by piece.
struct Slices<'a> {
    regions: &'a Regions,
    at: u64,
    left: usize,
    access: Permissions,
}

impl<'a> Slices<'a> {
    fn piece(&mut self) -> GuestMemoryResult<VolatileSlice<'a, Written<'a>>> {
        let at = GuestAddress(self.at);
        let region = self.regions.find_region(at);
        let region = region.ok_or(GuestMemoryError::InvalidGuestAddress(at))?;
        if !region.access.allow(self.access) {
            return Err(GuestMemoryError::InvalidGuestAddress(at));
        }
        let offset = self.at - region.guest;
        let rest = usize::try_from(region.len() - offset).unwrap_or(usize::MAX);
        let take = self.left.min(rest);
        if self.access.allow(Permissions::Read) {
            region
                .fetch(offset, take)
                .map_err(GuestMemoryError::IOError)?;
        }
        self.at = self.at.wrapping_add(take as u64);
        self.left -= take;
        region.get_slice(MemoryRegionAddress(offset), take)
    }
}

impl<'a> Iterator for Slices<'a> {
    type Item = GuestMemoryResult<VolatileSlice<'a, Written<'a>>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let piece = self.piece();
        if piece.is_err() {
            self.left = 0;
        }
        Some(piece)
    }
}

impl FusedIterator for Slices<'_> {}
impl<'a> GuestMemorySliceIterator<'a, Written<'a>> for Slices<'a> {}

/// One region of a client.
#[derive(Debug)]
pub struct VfioUserRegion {
    /// The client's file, or a copy.
    mapping: Mapping,
    guest: u64,
    access: Permissions,
    /// The connection that `mapping` is a copy of memory behind.
    copied: Option<Copied>,
}

/// How a copy is kept.
struct Copied(Arc<Channel>);

impl std::fmt::Debug for Copied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Copied")
    }
}

impl VfioUserRegion {
    fn bytes(&self, offset: u64, len: usize) -> io::Result<VolatileSlice<'_, ()>> {
        let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let end = start.checked_add(len);
        if end.is_none_or(|end| end > self.mapping.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let base = self.mapping.as_ptr().wrapping_add(start);
        // SAFETY: `start + len` lies inside the mapping, which lives as long as `self`, and its
        // bytes are only accessed as volatile memory.
        Ok(unsafe { VolatileSlice::new(base, len) })
    }

    /// Brings a range of the copy up to date.
    fn fetch(&self, offset: u64, len: usize) -> io::Result<()> {
        let Some(Copied(channel)) = &self.copied else {
            return Ok(());
        };
        let mut done = 0;
        while done < len {
            let take = (len - done).min(channel.piece());
            let at = offset + done as u64;
            let address = (self.guest + at).to_ne_bytes();
            let count = (take as u64).to_ne_bytes();
            let reply = channel.request(DMA_READ, &[&address, &count], take)?;
            let data = reply.get(16..).filter(|data| data.len() == take);
            let Some(data) = data.filter(|_| reply[..8] == address) else {
                let text = "a reply to DMA_READ that is not about the range".to_owned();
                channel.fail(Error::Client(text));
                return Err(io::ErrorKind::InvalidData.into());
            };
            self.bytes(at, take)?.copy_from(data);
            done += take;
        }
        Ok(())
    }

    /// Sends what was written to the client. A client that does not take it loses the connection: it
    /// has mapped the range as writable, and the guest would miss what it was told is there.
    fn send(&self, channel: &Channel, offset: usize, len: usize) {
        let mut done = 0;
        while done < len {
            let take = (len - done).min(channel.piece());
            let at = (offset + done) as u64;
            let mut data = vec![0; take];
            let sent = self.bytes(at, take).and_then(|bytes| {
                bytes.copy_to(&mut data);
                let address = (self.guest + at).to_ne_bytes();
                let count = (take as u64).to_ne_bytes();
                channel.request(DMA_WRITE, &[&address, &count, &data], 0)
            });
            if let Err(error) = sent {
                let guest = self.guest + at;
                channel.fail(Error::Client(format!(
                    "{take} bytes at {guest:#x} of its memory were not taken: {error}"
                )));
                return;
            }
            done += take;
        }
    }
}

/// What is written to a region goes to the client, if the region is a copy.
#[derive(Clone, Copy, Debug)]
pub struct WriteBack;

/// A place in a region, from which writes are marked.
#[derive(Clone, Copy, Debug)]
pub struct Written<'a> {
    region: Option<&'a VfioUserRegion>,
    offset: usize,
}

impl<'a> WithBitmapSlice<'a> for WriteBack {
    type S = Written<'a>;
}

impl Bitmap for WriteBack {
    fn mark_dirty(&self, _offset: usize, _len: usize) {}

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Written<'_> {
        Written {
            region: None,
            offset,
        }
    }
}

impl WithBitmapSlice<'_> for Written<'_> {
    type S = Self;
}

impl BitmapSlice for Written<'_> {}

impl Bitmap for Written<'_> {
    /// Returns when the client has the bytes.
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(region) = self.region
            && let Some(Copied(channel)) = &region.copied
        {
            region.send(channel, self.offset + offset, len);
        }
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self {
            region: self.region,
            offset: self.offset + offset,
        }
    }
}

impl GuestMemoryRegion for VfioUserRegion {
    type B = WriteBack;

    fn len(&self) -> GuestUsize {
        self.mapping.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.guest)
    }

    fn bitmap(&self) -> Written<'_> {
        Written {
            region: Some(self),
            offset: 0,
        }
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> Result<*mut u8, GuestMemoryError> {
        let offset = self
            .check_address(addr)
            .ok_or(GuestMemoryError::InvalidBackendAddress)?;
        Ok(self.mapping.as_ptr().wrapping_add(offset.0 as usize))
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_, Written<'_>>, GuestMemoryError> {
        let bytes = self.bytes(offset.0, count);
        let bytes = bytes.map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        let written = self.bitmap().slice_at(offset.0 as usize);
        let base = bytes.ptr_guard_mut().as_ptr();
        // SAFETY: as for `bytes`, whose address and length these are.
        Ok(unsafe { VolatileSlice::with_bitmap(base, count, written, None) })
    }
}

impl GuestMemoryRegionBytes for VfioUserRegion {}

/// The regions of a client, in ascending order.
#[derive(Debug, Default)]
pub(super) struct MemoryTable(Vec<Arc<VfioUserRegion>>);

/// A region that is to be mapped.
#[derive(Clone, Copy, Debug)]
pub(super) struct NewRegion {
    pub(super) guest: u64,
    pub(super) size: u64,
    /// Where it starts in its file.
    pub(super) at: u64,
    pub(super) access: Permissions,
}

impl MemoryTable {
    /// Adds a region: mapped from its file, or without one a copy. Should the file become shorter, the
    /// connection is shut down.
    pub(super) fn map(
        &mut self,
        new: NewRegion,
        file: Option<&File>,
        channel: &Arc<Channel>,
    ) -> Result<(), i32> {
        let NewRegion { guest, size, .. } = new;
        let end = guest.checked_add(size).ok_or(libc::EINVAL)?;
        if size == 0 {
            return Err(libc::EINVAL);
        }
        if self.0.len() >= MAX_REGIONS {
            return Err(libc::ENOSPC);
        }
        let overlaps = |it: &Arc<VfioUserRegion>| guest < it.guest + it.len() && it.guest < end;
        if self.0.iter().any(overlaps) {
            return Err(libc::EEXIST);
        }
        let connection: BorrowedFd<'_> = channel.as_fd();
        let mapping = match file {
            Some(file) => Mapping::of_peer(file, new.at, size, connection),
            None => Mapping::anonymous(size),
        };
        let mapping = mapping.map_err(|error| {
            tracing::warn!(guest, size, at = new.at, %error, "guest memory cannot be mapped");
            error.raw_os_error().unwrap_or(libc::EINVAL)
        })?;
        self.0.push(Arc::new(VfioUserRegion {
            mapping,
            guest,
            access: new.access,
            copied: file.is_none().then(|| Copied(Arc::clone(channel))),
        }));
        self.0.sort_by_key(|region| region.guest);
        Ok(())
    }

    /// Forgets the regions inside a range; one that is cut by it is an error.
    pub(super) fn unmap(&mut self, guest: u64, size: u64) -> Result<(), i32> {
        let end = guest.checked_add(size).ok_or(libc::EINVAL)?;
        let inside = |it: &Arc<VfioUserRegion>| it.guest >= guest && it.guest + it.len() <= end;
        let outside = |it: &Arc<VfioUserRegion>| it.guest >= end || it.guest + it.len() <= guest;
        if !self.0.iter().all(|it| inside(it) || outside(it)) {
            return Err(libc::EINVAL);
        }
        self.0.retain(|it| !inside(it));
        Ok(())
    }

    /// Whether the file of a region became shorter.
    pub(super) fn is_lost(&self) -> bool {
        self.0.iter().any(|region| region.mapping.is_lost())
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Gives the memory of the copies back to the host. No device uses any of it meanwhile.
    pub(super) fn forget_copies(&self) {
        for region in self.0.iter().filter(|region| region.copied.is_some()) {
            region.mapping.forget();
        }
    }

    /// The memory as the device uses it.
    pub(super) fn memory(&self) -> VfioUserMemory {
        if self.0.is_empty() {
            return VfioUserMemory::new();
        }
        let plain = |region: &Arc<VfioUserRegion>| {
            region.copied.is_none() && region.access.allow(Permissions::ReadWrite)
        };
        VfioUserMemory {
            plain: self.0.iter().all(plain),
            // Sorted and without overlaps, which is all that it checks.
            regions: Regions::from_arc_regions(self.0.clone()).unwrap_or_default(),
        }
    }
}
