//! Guest memory as the client maps it: regions with the descriptor of their file.

use std::{fs::File, os::fd::BorrowedFd, sync::Arc};

use vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

use crate::sys::Mapping;

/// The most regions of a client.
const MAX_REGIONS: usize = 1024;

/// Memory of a vfio-user client.
pub type VfioUserMemory = GuestRegionCollection<VfioUserRegion>;

/// One region, mapped from a descriptor of the client.
#[derive(Debug)]
pub struct VfioUserRegion {
    mapping: Mapping,
    guest: u64,
}

impl GuestMemoryRegion for VfioUserRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.mapping.len() as u64
    }

    fn start_addr(&self) -> GuestAddress {
        GuestAddress(self.guest)
    }

    fn bitmap(&self) {}

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
    ) -> Result<VolatileSlice<'_, ()>, GuestMemoryError> {
        let start =
            usize::try_from(offset.0).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        let end = start.checked_add(count);
        if end.is_none_or(|end| end > self.mapping.len()) {
            return Err(GuestMemoryError::InvalidBackendAddress);
        }
        let base = self.mapping.as_ptr().wrapping_add(start);
        // SAFETY: `start + count` lies inside the mapping, which lives as long as `self`, and its
        // bytes are only accessed as volatile memory.
        Ok(unsafe { VolatileSlice::new(base, count) })
    }
}

impl GuestMemoryRegionBytes for VfioUserRegion {}

/// The regions of a client, in ascending order.
#[derive(Debug, Default)]
pub(super) struct MemoryTable(Vec<Arc<VfioUserRegion>>);

impl MemoryTable {
    /// Maps a region. Should its file become shorter, `connection` is shut down.
    pub(super) fn map(
        &mut self,
        guest: u64,
        size: u64,
        file: &File,
        at: u64,
        connection: BorrowedFd<'_>,
    ) -> Result<(), i32> {
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
        let mapping = Mapping::of_peer(file, at, size, connection).map_err(|error| {
            tracing::warn!(guest, size, at, %error, "guest memory cannot be mapped");
            error.raw_os_error().unwrap_or(libc::EINVAL)
        })?;
        self.0.push(Arc::new(VfioUserRegion { mapping, guest }));
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

    /// The memory as the device uses it.
    pub(super) fn memory(&self) -> VfioUserMemory {
        if self.0.is_empty() {
            return VfioUserMemory::new();
        }
        // Sorted and without overlaps, which is all that it checks.
        VfioUserMemory::from_arc_regions(self.0.clone()).unwrap_or_default()
    }
}
